"""`agevlm-convert quantize` and `verify`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.config import FusionConfig, read_json
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.vision.vit import VitConfig, VitEncoder
from agevlm_mlx.quantization import layers_by_bits
from agevlm_mlx.weights import load, read_weights, save_model, shipped
from agevlm_mlx.weights import quantize as quantize_as_stored
from convert import __main__ as cli
from convert import outputs
from convert.verify import differences


@pytest.fixture
def copy(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def quantize(model: Path, out: Path, bits: int = 8, group: int = 32) -> int:
    flags = ["--q-bits", str(bits), "--q-group-size", str(group)]
    return cli.main(["quantize", "--model", str(model), "--mlx-path", str(out), *flags])


def disagreement(a: Path, b: Path) -> float:
    """How far apart two models' next-token distributions are on the same image (0..1)."""
    first, second = load(a), load(b)
    pixels = mx.random.normal((2, *[first.preprocessor.image_size] * 2, 3))
    ids = mx.random.randint(4, 200, (2, 12))
    p, q = (
        mx.softmax(m(ids, cache=m.see(pixels)).astype(mx.float32), -1)
        for m in (first.model, second.model)
    )
    return float(mx.abs(p - q).sum(-1).mean().item()) / 2  # pyright: ignore[reportArgumentType]


def test_more_bits_are_closer_and_fewer_are_smaller(copy, tmp_path):
    assert quantize(copy, tmp_path / "q8", 8) == 0
    assert quantize(copy, tmp_path / "q4", 4) == 0
    far, near = disagreement(copy, tmp_path / "q4"), disagreement(copy, tmp_path / "q8")
    assert 0 < near < far < 0.5
    sizes = [(p / "model.safetensors").stat().st_size for p in (copy, tmp_path / "q8")]
    assert sizes[1] < 0.8 * sizes[0]
    assert (tmp_path / "q4/model.safetensors").stat().st_size < sizes[1]


def test_only_the_language_model_changes(copy, tmp_path):
    assert quantize(copy, tmp_path / "q8") == 0
    before, after = read_weights(copy), read_weights(tmp_path / "q8")
    kept = [k for k in before if not k.startswith("language_model.")]
    assert kept
    assert all(mx.array_equal(before[k], after[k]) for k in kept)
    assert any(k.endswith("q_proj.scales") for k in after)
    assert load(tmp_path / "q8").model.config.quantization == {"bits": 8, "group_size": 32}


def test_quantised_twice_is_an_error(copy, tmp_path, capsys):
    assert quantize(copy, tmp_path / "q8") == 0
    assert quantize(tmp_path / "q8", tmp_path / "again") == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_an_interrupted_save_leaves_nothing(copy, tmp_path, monkeypatch):
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.quantize.save_model", full_disk)
    assert quantize(copy, tmp_path / "q8") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_verify_finds_a_copy_equal(copy, tiny_checkpoint, capsys):
    assert cli.main(["verify", str(tiny_checkpoint), str(copy)]) == 0
    assert capsys.readouterr().out.startswith("equal: ")


def test_verify_reports_one_changed_number(copy, tiny_checkpoint, capsys):
    weights = read_weights(copy)
    key = sorted(weights)[0]
    weights[key] = weights[key] + mx.zeros_like(weights[key]).at[0].add(0.25)
    mx.eval(weights)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    arguments = ["verify", str(tiny_checkpoint), str(copy)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert f"value: {key} differs by up to 0.25" in out
    assert "different: " in out
    assert cli.main([*arguments, "--atol", "0.3"]) == 0


def test_verify_names_keys_shapes_and_dtypes():
    a = {"both": mx.zeros(2), "shape": mx.zeros(2), "dtype": mx.zeros(2), "a": mx.zeros(1)}
    b = {"both": mx.zeros(2), "shape": mx.zeros(3), "dtype": mx.zeros(2, mx.int32)}
    lines, largest = differences(a, b | {"b": mx.zeros(1)})
    assert lines == [
        "only in A: a",
        "only in B: b",
        "shape: shape is (2,) in A and (3,) in B",
        "dtype: dtype is mlx.core.float32 in A and mlx.core.int32 in B",
    ]
    assert largest == 0


@pytest.mark.parametrize(("x", "y", "equal"), [("nan", "nan", 1), ("nan", 0, 0), ("inf", "inf", 1)])
def test_verify_and_numbers_that_are_none(x, y, equal):
    lines, _ = differences({"k": mx.array([float(x)])}, {"k": mx.array([float(y)])})
    assert (not lines) == equal


def test_verify_needs_two_checkpoints(copy, tmp_path, capsys):
    assert cli.main(["verify", str(copy), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_sizes_are_told(copy, tmp_path, capsys):
    assert quantize(copy, tmp_path / "q4", 4) == 0
    told = capsys.readouterr().out
    assert "MB became" in told
    parameters = dict(tree_flatten(load(tmp_path / "q4").model.parameters()))
    assert f"{sum(a.nbytes for a in parameters.values()) / 1e6:.1f} MB" in told


def test_a_group_that_fits_nothing_names_the_flag(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("agevlm_mlx.quantization._can_be_quantised", lambda *_: False)
    assert quantize(copy, tmp_path / "q", group=64) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: --q-group-size: expected a divisor of some layer's width, got 64; try 32\n"
    )
    assert not (tmp_path / "q").exists()


def test_a_recipe_gives_more_bits_where_it_matters(copy, tmp_path):
    arguments = ["quantize", "--model", str(copy), "--mlx-path", str(tmp_path / "q")]
    assert cli.main([*arguments, "--q-recipe", "mixed_4_8", "--q-group-size", "32"]) == 0
    model = load(tmp_path / "q").model
    prefix = "language_model.model."
    high = [
        f"{prefix}layers.2.cross_attn.v_proj",
        f"{prefix}layers.2.mlp.down_proj",
        f"{prefix}layers.2.self_attn.v_proj",
    ]
    layers = layers_by_bits(model)
    [output] = [path for path in layers[8] if ".layers." not in path]
    assert output.rpartition(".")[2] in ("lm_head", "embed_tokens")
    assert sorted([output, *high]) == sorted(layers[8])
    config = read_json(tmp_path / "q/config.json")
    own = {"bits": 8, "group_size": 32}
    assert config["quantization"] == dict.fromkeys(layers[8], own) | {"bits": 4, "group_size": 32}
    assert config["quantization_config"] == config["quantization"]


def test_layers_that_do_not_fit_are_named(copy, tmp_path, capsys):
    config = read_json(copy / "config.json")
    assert config["text_config"]["hidden_size"] == 32
    assert quantize(copy, tmp_path / "q", group=64) == 0  # only down_proj is 64 wide
    assert "27 kept, their width is no multiple: language_model." in capsys.readouterr().out
    assert layers_by_bits(load(tmp_path / "q").model)[8] == [
        f"language_model.model.layers.{i}.mlp.down_proj" for i in (2, 1, 0)
    ]


@pytest.mark.parametrize("settings", [{}, {"bits": 7, "group_size": 32}, {"bits": "4"}])
def test_settings_that_mlx_does_not_have(copy, tmp_path, settings, capsys):
    assert quantize(copy, tmp_path / "q") == 0
    config = read_json(tmp_path / "q/config.json") | {"quantization": {"x": 1, **settings}}
    with pytest.raises(UserError):
        quantize_as_stored(
            AgeVLM(load(copy).model.config), config["quantization"], read_weights(tmp_path / "q")
        )


def test_dequantised_weights_compute_the_same(copy, tmp_path):
    assert quantize(copy, tmp_path / "q", 4) == 0
    arguments = ["dequantize", "--model", str(tmp_path / "q"), "--mlx-path", str(tmp_path / "f")]
    assert cli.main(arguments) == 0
    assert disagreement(tmp_path / "q", tmp_path / "f") < 1e-5
    assert disagreement(copy, tmp_path / "f") > 1e-3
    before, after = read_weights(copy), read_weights(tmp_path / "f")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert "quantization" not in read_json(tmp_path / "f/config.json")
    assert cli.main(["verify", str(tmp_path / "q"), str(tmp_path / "f"), "--logits",
                     "--images", "1", "--atol", "1e-4"]) == 0  # fmt: skip


def test_what_quantising_rounded_away_does_not_come_back(copy, tmp_path):
    """And a second time need not give the same integers (the help text of dequantize)."""
    assert quantize(copy, tmp_path / "q", 4) == 0
    arguments = ["dequantize", "--model", str(tmp_path / "q"), "--mlx-path", str(tmp_path / "f")]
    assert cli.main(arguments) == 0
    assert quantize(tmp_path / "f", tmp_path / "again", 4) == 0
    whole, q, f, again = (
        read_weights(folder)
        for folder in (copy, tmp_path / "q", tmp_path / "f", tmp_path / "again")
    )
    packed = [key.removesuffix(".scales") for key in q if key.endswith(".scales")]
    other_integers = 0
    for layer in packed:
        name, scales = f"{layer}.weight", q[f"{layer}.scales"]
        values = mx.dequantize(q[name], scales, q[f"{layer}.biases"], group_size=32, bits=4)
        assert mx.array_equal(f[name], values)
        # At the far end of a group a whole step can be missing: zero is kept exact instead.
        step = mx.repeat(mx.abs(scales), 32, axis=-1) * 1.001
        assert mx.all(mx.abs(whole[name] - values) <= step)
        assert not mx.array_equal(whole[name], values)
        other_integers += not mx.array_equal(q[name], again[name])
    assert packed
    assert other_integers
    assert all(
        mx.array_equal(f[key], whole[key]) for key in f if key.rpartition(".")[0] not in packed
    )


def test_nothing_to_dequantise(copy, tmp_path, capsys):
    out = tmp_path / "f"
    assert cli.main(["dequantize", "--model", str(copy), "--mlx-path", str(out)]) == 2
    assert "not quantised" in capsys.readouterr().err
    assert not out.exists()


def test_verify_sees_the_low_bits_of_packed_weights():
    a, b = mx.array([2**31], mx.uint32), mx.array([2**31 + 1], mx.uint32)
    lines, largest = differences({"k": a}, {"k": b})
    assert lines == ["value: k differs by up to 1"]
    assert largest == 1


def test_verify_reads_the_settings_too(copy, tiny_checkpoint, capsys):
    config = read_json(copy / "config.json")
    config["text_config"]["rms_norm_eps"] = 0.1
    (copy / "config.json").write_text(json.dumps(config))
    assert cli.main(["verify", str(tiny_checkpoint), str(copy), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["differences"] == ["config: text_config.rms_norm_eps is 1e-05 in A and 0.1 in B"]
    assert cli.main(["verify", str(tiny_checkpoint), str(copy), "--logits", "--images", "1"]) == 1


def test_the_same_model_computes_the_same(copy, tiny_checkpoint, capsys):
    arguments = ["verify", str(tiny_checkpoint), str(copy), "--logits", "--images", "2", "--json"]
    assert cli.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["logits"]
    assert len(rows) == 3
    assert all(r["top1"] == 1 and r["largest"] == 0 and r["positions"] > 0 for r in rows)


def concatenated(folder: Path) -> Path:
    """A model that reads the image as a prefix of the text, with the tokenizer of `folder`."""
    loaded = load(folder)
    fusion = FusionConfig(fusion="concat")
    model = AgeVLM(replace(loaded.model.config, fusion_config=fusion))
    out = folder.parent / "concat"
    save_model(out, model, loaded.tokenizer, loaded.preprocessor, "")
    return out


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_pictures_together_count_as_one_at_a_time(copy, tmp_path, fusion, monkeypatch):
    model = concatenated(copy) if fusion == "concat" else copy
    assert quantize(model, tmp_path / "q", 4) == 0
    a, b = load(model), load(tmp_path / "q")
    monkeypatch.setattr(outputs, "_BATCH", 2)
    together = outputs.compare_logits(a, b, 3)  # two, then the one that is left
    monkeypatch.setattr(outputs, "_LOGITS", 0)
    apart = outputs.compare_logits(a, b, 3)
    for x, y in zip(together, apart, strict=True):
        assert x.positions == y.positions > 0
        assert 0 < x.largest == pytest.approx(y.largest, abs=1e-4)
        assert x.kl == pytest.approx(y.kl, abs=1e-4)
        assert x.top1 == pytest.approx(y.top1, abs=1e-2)
    assert len({row.positions for row in together}) == 2
    seen, blind, _ = together
    assert seen.kl != blind.kl


def test_packed_weights_count_as_the_values_they_stand_for(copy, tmp_path, capsys):
    assert quantize(copy, tmp_path / "q", 4) == 0
    arguments = ["verify", str(copy), str(tmp_path / "q"), "--logits", "--images", "2", "--json"]
    capsys.readouterr()
    assert cli.main(arguments) == 1
    told = json.loads(capsys.readouterr().out)["logits"]
    exact = outputs.compare_logits(load(copy), load(tmp_path / "q"), 2)
    assert [row["kl"] for row in told] == pytest.approx([row.kl for row in exact], rel=1e-3)


@pytest.mark.parametrize(
    ("part", "name", "value"), [("text", "vocab_size", 320), ("vision", "image_size", 32)]
)
def test_models_that_cannot_be_compared(copy, tmp_path, part, name, value, capsys):
    loaded = load(copy)
    config = loaded.model.config
    section = {**getattr(config, f"{part}_config"), name: value}
    model = AgeVLM(replace(config, **{f"{part}_config": section}))
    image_size = model.config.vision_config["image_size"]
    preprocessor = replace(loaded.preprocessor, image_size=image_size)
    save_model(tmp_path / "other", model, loaded.tokenizer, preprocessor, "")
    assert cli.main(["verify", str(copy), str(tmp_path / "other"), "--logits"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: A has ")
    assert f"B has {value}; outputs can only be compared where they are the same" in error
    assert error.count("\n") == 1


def test_a_model_without_a_chat_template(copy, tiny_checkpoint, capsys):
    (copy / "chat_template.jinja").unlink()
    assert cli.main(["verify", str(copy), str(tiny_checkpoint), "--logits"]) == 2
    error = capsys.readouterr().err
    assert "chat template" in error
    assert error.count("\n") == 1


def test_encoder_folders(tmp_path, capsys):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(shipped("encoder"), folder)
        own = json.loads((folder / "config.json").read_text())["vision_config"]
        (folder / "config.json").write_text(json.dumps(own))
        pixels = VitEncoder(VitConfig(image_size=128, patch_size=16, stem_channels=(24, 48)))
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels.preprocessing))
    arguments = ["verify", *map(str, folders), "--logits", "--images", "1"]
    assert cli.main(arguments) == 0
    weights = read_weights(folders[1])
    mx.eval(weights)
    key = sorted(weights)[0]
    changed = weights | {key: weights[key] + 1}
    mx.save_safetensors(str(folders[1] / "model.safetensors"), changed)
    assert cli.main(arguments) == 1


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("flags", "top1"),
    [
        (["--q-bits", "8"], 0.99),
        (["--q-bits", "4"], 0.95),
        (["--q-recipe", "mixed_4_6"], 0.98),
        (["--q-recipe", "mixed_4_8"], 0.98),
    ],
)
def test_the_embedded_model_keeps_its_words(tmp_path, flags, top1, capsys, parity):
    model, out = str(shipped("model")), str(tmp_path / "q")
    assert cli.main(["quantize", "--model", model, "--mlx-path", out, *flags]) == 0
    capsys.readouterr()
    arguments = ["verify", model, out, "--logits", "--images", "40", "--min-top1", str(top1)]
    assert cli.main([*arguments, "--json"]) == 0
    share = json.loads(capsys.readouterr().out)["logits"][0]["top1"]
    reference = "the same model in full precision"
    parity("Quantised: other next words", reference, " ".join(flags), 1 - share, 1 - top1)
