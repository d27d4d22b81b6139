"""`agevlm-convert assemble`: published parts in, one runnable checkpoint out."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from agevlm_mlx import weights
from agevlm_mlx.config import read_json
from agevlm_mlx.data import chat
from agevlm_mlx.generation import generate
from agevlm_mlx.models.graft import build_language_model
from agevlm_mlx.models.vision import build_encoder
from convert import __main__ as cli
from convert.language_model import packaged

# transformers imports torchvision for the configuration of any language model, if it is there.
pytestmark = pytest.mark.usefixtures("torchvision")

#: Small models of the families that the README names.
FAMILIES = {
    "llama": {"head_dim": 8, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layer_interval": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 3},
}
ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def tokenizer():
    return chat.build_tokenizer(["Is there a dog? yes no", "a dog and a cat"], vocab_size=300)


def language_model(folder: Path, tokenizer, kind: str = "llama", **changes) -> Path:
    """A published language model: config.json, weights and tokenizer in one folder."""
    config = {
        "model_type": kind,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
        **FAMILIES.get(kind, {}),
        **changes,
    }
    folder.mkdir()
    mx.random.seed(1)
    model = build_language_model(config)
    tensors = dict(tree_flatten(model.parameters()))
    if kind == "gemma3_text":  # as it is published
        del tensors["lm_head.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return folder


@pytest.fixture
def lm(tmp_path, tokenizer) -> Path:
    return language_model(tmp_path / "lm", tokenizer)


@pytest.fixture
def siglip(tmp_path) -> Path:
    """A published vision tower, as Hugging Face writes it."""
    folder = tmp_path / "siglip"
    folder.mkdir()
    tensors = {}
    for name, value in dict(tree_flatten(build_encoder(ENCODER).parameters())).items():
        if name.endswith("patch_embedding.weight"):
            value = value.transpose(0, 3, 1, 2)
        tensors[f"vision_model.{name}"] = value
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(ENCODER))
    return folder


def assemble(lm: Path, vision, out: Path, *options: str) -> int:
    arguments = ["assemble", "--lm", str(lm), "--vision", str(vision), "--mlx-path", str(out)]
    return cli.main([*arguments, *options])


def pixels(loaded: weights.Loaded) -> mx.array:
    size = loaded.preprocessor.image_size
    return mx.random.normal((1, size, size, 3), key=mx.random.key(3))


@pytest.mark.parametrize("kind", FAMILIES)
def test_closed_gates_leave_the_language_model_as_it_is_bit_for_bit(
    kind, tmp_path, tokenizer, siglip, parity
):
    folder = language_model(tmp_path / "lm", tokenizer, kind)
    assert assemble(folder, siglip, tmp_path / "out") == 0
    ours = weights.load(tmp_path / "out")
    alone = mlx_lm.load(str(folder))[0]
    ids = mx.array([[5, 9, 200, 17, 40, 3]])
    expected = alone(ids)
    assert mx.array_equal(ours.model(ids), expected)
    seen = ours.model.see(pixels(ours))
    difference = mx.abs(ours.model(ids, cache=seen) - expected).max().item()
    parity("Logits with closed gates", f"mlx-lm {kind}", "with an image", difference, 0.0)
    for i in ours.model.looking_layers:
        ours.model.layers[i].cross_attn.gate = mx.ones(1)
    opened = ours.model(ids, cache=ours.model.see(pixels(ours)))
    assert mx.abs(opened - expected).max() > 1e-4


@pytest.mark.parametrize("kind", ["llama", "smollm3", "qwen2", "qwen3", "gemma3_text"])
def test_positions_as_transformers_5_configures_them(kind, tmp_path, tokenizer, siglip):
    older = {"rope_theta": 5e5}
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None}
    if kind == "gemma3_text":
        older |= {"rope_local_base_freq": 100.0, "sliding_window_pattern": 2}
        newer["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        newer |= {"_sliding_window_pattern": 2}
    elif kind != "qwen2":
        scaling = {"rope_type": "linear", "factor": 4.0}
        older["rope_scaling"] = scaling
        newer["rope_parameters"] |= scaling
    language_model(tmp_path / "lm", tokenizer, kind, **older)
    assert assemble(tmp_path / "lm", siglip, tmp_path / "older") == 0
    path = tmp_path / "lm/config.json"
    kept = {k: v for k, v in read_json(path).items() if k not in older}
    path.write_text(json.dumps({k: v for k, v in (kept | newer).items() if v is not None}))
    assert assemble(tmp_path / "lm", siglip, tmp_path / "newer") == 0
    a, b = (weights.load(tmp_path / name).model for name in ("older", "newer"))
    ids = mx.arange(5, 65)[None]
    assert mx.array_equal(a(ids), b(ids))


@pytest.mark.parametrize("says", [{}, {"tie_word_embeddings": True}])
def test_gemma_without_an_output_layer_as_it_is_published(says, tmp_path, tokenizer, siglip):
    folder = language_model(tmp_path / "lm", tokenizer, "gemma3_text", **says)
    assert assemble(folder, siglip, tmp_path / "out") == 0
    ids = mx.array([[5, 9, 200, 17, 40, 3]])
    ours = weights.load(tmp_path / "out").model
    assert mx.array_equal(ours(ids), mlx_lm.load(str(folder))[0](ids))


def test_the_result_is_a_whole_checkpoint(lm, siglip, tmp_path, capsys):
    assert assemble(lm, siglip, tmp_path / "out", "--cross-layers", "3,1") == 0
    said = capsys.readouterr().out
    assert "cross-attention before layers 1, 3" in said
    assert "4x4 tokens" in said
    ours = weights.load(tmp_path / "out")
    assert ours.model.looking_layers == (1, 3)
    assert ours.preprocessor.image_size == 16
    assert "dtype" not in json.dumps(read_json(tmp_path / "out/config.json"))
    assert "not trained yet" in (tmp_path / "out/README.md").read_text()
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    generate(ours.model, ours.tokenizer, ours.preprocessor, "Is there a dog?", image, max_tokens=3)


def test_the_same_seed_gives_the_same_bytes(lm, siglip, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert assemble(lm, siglip, tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_concat_from_the_same_parts(lm, siglip, tmp_path):
    assert assemble(lm, siglip, tmp_path / "out", "--fusion", "concat") == 0
    ours = weights.load(tmp_path / "out")
    assert ours.model.fusion == "concat"
    assert not [n for n, _ in tree_flatten(ours.model.parameters()) if "cross_attn" in n]


def test_a_converted_encoder_gives_what_its_source_gives(lm, siglip, tmp_path):
    folder = str(tmp_path / "mlx")
    assert cli.main(["vision", "--hf-path", str(siglip), "--mlx-path", folder]) == 0
    assert assemble(lm, siglip, tmp_path / "a") == 0
    assert assemble(lm, folder, tmp_path / "b") == 0
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_the_shipped_encoder(lm, tmp_path):
    assert assemble(lm, "shipped", tmp_path / "a") == 0
    assert weights.load(tmp_path / "a").model.grid == (8, 8)
    assert assemble(lm, "shipped", tmp_path / "b", "--image-size", "96") == 0
    assert weights.load(tmp_path / "b").model.grid == (6, 6)


def test_another_image_size(lm, siglip, tmp_path):
    assert assemble(lm, siglip, tmp_path / "out", "--image-size", "24") == 0
    ours = weights.load(tmp_path / "out")
    assert ours.model.grid == (6, 6)
    assert ours.model.encode(pixels(ours)).shape == (1, 36, 16)


def test_dtype(lm, siglip, tmp_path):
    assert assemble(lm, siglip, tmp_path / "out", "--dtype", "bfloat16") == 0
    stored = weights.read_weights(tmp_path / "out")
    assert {value.dtype for value in stored.values()} == {mx.bfloat16}


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantised_on_the_way(bits, lm, siglip, tmp_path):
    options = ["-q", "--q-bits", bits, "--q-group-size", "32"]
    assert assemble(lm, siglip, tmp_path / "q", *options) == 0
    assert assemble(lm, siglip, tmp_path / "full") == 0
    arguments = ["--model", str(tmp_path / "full"), "--mlx-path", str(tmp_path / "after")]
    assert cli.main(["quantize", *arguments, *options[1:]]) == 0
    assert cli.main(["verify", str(tmp_path / "q"), str(tmp_path / "after")]) == 0
    q = weights.load(tmp_path / "q")
    assert q.model.layers[0].self_attn.q_proj.bits == int(bits)


def test_a_language_model_that_mlx_lm_quantised(lm, siglip, tmp_path, capsys):
    from mlx_lm.convert import convert

    quantised = tmp_path / "lm-4bit"
    convert(str(lm), str(quantised), quantize=True, q_bits=4, q_group_size=32)
    assert assemble(quantised, siglip, tmp_path / "out", "--dtype", "float32") == 0
    ours = weights.load(tmp_path / "out")
    alone = mlx_lm.load(str(quantised))[0]
    ids = mx.array([[5, 9, 200, 17, 40, 3]])
    assert mx.abs(ours.model(ids) - alone(ids)).max() < 1e-4
    assert assemble(quantised, siglip, tmp_path / "again", "-q") == 2
    assert "is quantised already" in capsys.readouterr().err


def test_a_model_without_a_chat_template_gets_a_plain_one(tmp_path, tokenizer, siglip, capsys):
    folder = language_model(tmp_path / "lm", tokenizer)
    (folder / "chat_template.jinja").unlink()
    assert assemble(folder, siglip, tmp_path / "out") == 0
    assert "no chat template" in capsys.readouterr().out
    ours = weights.load(tmp_path / "out")
    turns = [chat.Turn("user", "Is there a dog?"), chat.Turn("assistant", "yes")]
    encoded = chat.encode(ours.tokenizer, turns, [])
    answer = [i for i, learned in zip(encoded.ids, encoded.loss_mask, strict=True) if learned]
    assert ours.tokenizer.decode(answer) == " yes<|end|>"


def test_neither_a_chat_template_nor_an_end(lm, siglip, tmp_path, capsys):
    (lm / "chat_template.jinja").unlink()
    config = read_json(lm / "tokenizer_config.json")
    del config["eos_token"]
    (lm / "tokenizer_config.json").write_text(json.dumps(config))
    assert "nor an eos_token" in refusal(capsys, tmp_path, lm, siglip, tmp_path / "out")


def test_every_token_that_ends_an_answer_is_kept(lm, siglip, tmp_path):
    (lm / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert assemble(lm, siglip, tmp_path / "out") == 0
    assert weights.load(tmp_path / "out").tokenizer.eos_token_ids == {3, 7}


def test_a_dry_run_writes_nothing(lm, siglip, tmp_path, capsys):
    assert assemble(lm, siglip, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert "dry run" in capsys.readouterr().out


def refusal(capsys, tmp_path: Path, *arguments) -> str:
    """The one line that a refused command says; it leaves nothing behind."""
    assert assemble(*arguments) == 2
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out-*"))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cross-layers", "2,9"], r"different layers from 0 to 3, got \[2, 9\]"),
        (["--cross-layers", "1,1"], "different layers"),
        (["--cross-layers", "a"], "numbers like 2,6,10,14"),
        (["--cross-layers", "1", "--fusion", "concat"], "has no cross-attention"),
        (["--image-size", "15"], "multiple of 4, got 15"),
        (["--q-bits", "4"], "expected -q with them"),
        (["--projector", "pixel_shuffle", "--image-size", "12"], "divisor of the 3x3"),
    ],
)
def test_options_that_do_not_fit(options, message, lm, siglip, tmp_path, capsys):
    assert re.search(message, refusal(capsys, tmp_path, lm, siglip, tmp_path / "out", *options))


def test_parts_that_are_none(lm, siglip, tmp_path, capsys):
    def said(a, b) -> str:
        return refusal(capsys, tmp_path, a, b, tmp_path / "out")

    assert "no such folder" in said(tmp_path / "nowhere", siglip)
    assert "no such folder" in said(lm, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found no config.json" in said(tmp_path / "empty", siglip)
    assert "found no config.json" in said(lm, tmp_path / "empty")
    assert "expected model_type" in said(lm, lm)
    assert "siglip_vision_model" in said(siglip, siglip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "agevlm"}, "is an AgeVLM already"),
        ({"model_type": None}, "expected a model_type"),
        ({"num_hidden_layers": 3}, "unexpected model.layers.3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1000"),
        ({"num_hidden_layers": 5}, "missing model.layers.4"),
        ({"hidden_size": 48}, "expected"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
    ],
)
def test_a_language_model_that_does_not_fit(change, message, lm, siglip, tmp_path, capsys):
    config = read_json(lm / "config.json") | change
    (lm / "config.json").write_text(json.dumps(config))
    assert message in refusal(capsys, tmp_path, lm, siglip, tmp_path / "out")


def test_a_language_model_without_its_tokenizer(lm, siglip, tmp_path, capsys):
    (lm / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(capsys, tmp_path, lm, siglip, tmp_path / "out")


def test_offline_the_hub_is_named(siglip, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal(capsys, tmp_path, Path("org/name"), siglip, tmp_path / "out")
    assert "config.json was wanted from the hub" in said
    assert "HF_HUB_OFFLINE" in said


def test_gates_may_start_open(lm, siglip, tmp_path):
    assert assemble(lm, siglip, tmp_path / "out", "--gate-init", "0.5") == 0
    ours = weights.load(tmp_path / "out")
    assert {ours.model.layers[i].cross_attn.gate.item() for i in ours.model.looking_layers} == {0.5}
    assert "language model alone" not in (tmp_path / "out/README.md").read_text()
    assert assemble(lm, siglip, tmp_path / "nan", "--gate-init", "nan") == 2


def test_a_language_model_in_a_python_package(tmp_path, monkeypatch, capsys):
    """It is found by its name and never imported."""
    package = tmp_path / "llm_tiny"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged("llm-tiny") is None
    (package / "one.gguf").write_bytes(b"GGUF")
    assert packaged("llm-tiny") == package / "one.gguf"
    assert assemble(Path("llm-tiny"), "shipped", tmp_path / "out") == 2
    assert "one.gguf" in capsys.readouterr().err  # it is this file that is refused
    (package / "two.gguf").write_bytes(b"GGUF")
    for name in ("llm-tiny", "llm-not-there", "../llm_tiny", str(package), "org/name"):
        assert packaged(name) is None, name


def test_an_encoder_as_the_script_makes_it(lm, tmp_path, capsys):
    """`scripts/train_encoder.py` writes what the package ships."""
    folder = tmp_path / "encoder"
    shutil.copytree(weights.shipped("encoder"), folder)
    assert assemble(lm, folder, tmp_path / "out") == 0
    assert "agevlm_vit, 128x128 pixels" in capsys.readouterr().out
    (folder / "config.json").write_text('{"vision_config": {"model_type": "vgg"}}')
    assert assemble(lm, folder, tmp_path / "bad") == 2
    assert "expected one of" in capsys.readouterr().err
