"""Checkpoint folders: what is written is what is read, and wrong ones are refused."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx import weights
from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["Is there a dog? Yes", "No"] * 3, vocab_size=270)


@pytest.fixture
def saved(tmp_path, tiny_model_config, tokenizer):
    model = AgeVLM(tiny_model_config(vocab_size=270, gate_init=0.5))
    preprocessor = Preprocessor.from_dict(model.vision_tower.preprocessing)
    folder = tmp_path / "model"
    weights.save_model(folder, model, tokenizer, preprocessor, "# A card\n")
    return folder, model


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def test_round_trip(saved):
    folder, model = saved
    loaded = weights.load(folder)
    before, after = parameters(model), parameters(loaded.model)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    assert loaded.preprocessor.image_size == 16
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Is there a dog?")) == "Is there a dog?"
    assert loaded.tokenizer.eos_token == "<|end|>"
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names
    assert not any(name.startswith(".") for name in names)
    _, metadata = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert metadata["format"] == "mlx"


def test_quantised_round_trip(saved, tmp_path, tokenizer):
    _, model = saved
    wide = {**model.config.text_config, "hidden_size": 64, "head_dim": 16}
    config = type(model.config)(
        text_config=wide,
        vision_config=model.config.vision_config,
        fusion_config=model.config.fusion_config,
    )
    model = AgeVLM(config)
    settings = {"group_size": 64, "bits": 8}
    nn.quantize(
        model,
        **settings,
        class_predicate=lambda path, m: (
            hasattr(m, "to_quantized")
            and path.startswith("language_model")
            and m.weight.shape[-1] % 64 == 0
        ),
    )
    preprocessor = Preprocessor.from_dict(model.vision_tower.preprocessing)
    folder = tmp_path / "quantised"
    weights.save_model(folder, model, tokenizer, preprocessor, "", quantization=settings)
    loaded = weights.load(folder).model
    pixels, ids = mx.random.normal((1, 16, 16, 3)), mx.array([[1, 2, 3]])
    assert "language_model.model.layers.0.mlp.up_proj.scales" in parameters(loaded)
    expected = model(ids, cache=model.see(pixels))
    assert mx.array_equal(loaded(ids, cache=loaded.see(pixels)), expected)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_wrong_folders_say_what_is_wrong(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(UserError, match="no such folder; pass a checkpoint folder or a hub id"):
        weights.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="expected a checkpoint folder, got a file"):
        weights.load(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        weights.load(tmp_path / "empty")
    edit(folder, model_type="llama")
    with pytest.raises(UserError, match="expected model_type 'agevlm', got 'llama'"):
        weights.load(folder)
    edit(folder, model_type="agevlm", fusion_confg={})
    with pytest.raises(UserError, match="fusion_confg: unknown key; did you mean 'fusion_config'"):
        weights.load(folder)


def test_wrong_weights_are_listed(saved):
    folder, _ = saved
    fusion = json.loads((folder / "config.json").read_text())["fusion_config"]
    edit(folder, fusion_config={**fusion, "layers": [0, 2]})
    with pytest.raises(UserError, match=r"another architecture: missing .*layers\.0\.cross_attn"):
        weights.load(folder)


def test_damaged_and_missing_files(saved, tmp_path):
    folder, _ = saved
    for damage, message in [
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not a readable safetensors file"),
        (lambda p: p.unlink(), "missing; the checkpoint is incomplete"),
    ]:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        damage(broken / "model.safetensors")
        with pytest.raises(UserError, match=message):
            weights.load(broken)
    for content in ("{nope", "{}"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"its tokenizer cannot be read \(.*; take tokenizer"):
            weights.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        weights.load(folder)
    for content in ("[]", "{}", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="expected a weight_map of tensor names to files"):
            weights.load(folder)


def test_an_index_cannot_point_outside_the_folder(saved):
    folder, _ = saved
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="incomplete"):
        weights.load(folder)


def test_an_interrupted_save_leaves_no_config(tmp_path, saved, tokenizer, monkeypatch):
    _, model = saved
    preprocessor = Preprocessor.from_dict(model.vision_tower.preprocessing)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_weights", full)
    with pytest.raises(OSError, match="No space"):
        weights.save_model(tmp_path / "new", model, tokenizer, preprocessor, "")
    assert list((tmp_path / "new").iterdir()) == []


def test_encoder_weights_go_into_the_vision_tower(saved, tmp_path):
    _, model = saved
    tower = {k: v + 1 for k, v in tree_flatten(model.vision_tower.parameters())}
    (tmp_path / "encoder").mkdir()
    mx.save_safetensors(str(tmp_path / "encoder" / "model.safetensors"), tower)
    weights.load_encoder(model, tmp_path / "encoder")
    assert all(
        mx.array_equal(tower[k], v) for k, v in tree_flatten(model.vision_tower.parameters())
    )
    tower.popitem()
    mx.save_safetensors(str(tmp_path / "encoder" / "model.safetensors"), tower)
    with pytest.raises(UserError, match="missing"):
        weights.load_encoder(model, tmp_path / "encoder")


def test_fingerprint_follows_the_content(saved):
    folder, _ = saved
    before = weights.fingerprint(folder)
    assert before == weights.fingerprint(folder)
    edit(folder, extra=1)
    assert weights.fingerprint(folder) != before


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_fingerprint_is_of_all_that_decides_an_answer(name, tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    before = weights.fingerprint(folder)
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert weights.fingerprint(folder) != before
    changed = weights.fingerprint(folder)
    (folder / "README.md").write_text("other words")
    assert weights.fingerprint(folder) == changed
