"""`agevlm-convert vision` without torch: what it reads, and what it refuses."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.config import read_json
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import read_weights
from convert import __main__ as cli

CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture
def tensors() -> dict[str, mx.array]:
    """A checkpoint as Hugging Face writes it: prefixed, kernels channels first, with a head."""
    encoder = build_encoder(CONFIG)
    out = {}
    for key, value in dict(tree_flatten(encoder.parameters())).items():
        if key.endswith("patch_embedding.weight"):
            value = value.transpose(0, 3, 1, 2)
        out[f"vision_model.{key}"] = value
    out["vision_model.head.probe"] = mx.zeros((1, 1, 16))
    return out


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, mx.array]) -> Path:
    folder = tmp_path / "hf"
    write(folder, CONFIG | {"dropout": 0.0, "transformers_version": "5"}, tensors)
    return folder


def write(folder: Path, config: dict, tensors: dict[str, mx.array]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def convert(folder: Path) -> int:
    out = folder.parent / "out"
    return cli.main(["vision", "--hf-path", str(folder), "--mlx-path", str(out)])


def test_the_result_is_a_complete_encoder_folder(checkpoint, tensors, capsys):
    assert convert(checkpoint) == 0
    out = checkpoint.parent / "out"
    assert "left out 1 of its pooling head" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    weights = read_weights(out)
    assert set(weights) == set(dict(tree_flatten(build_encoder(CONFIG).parameters())))
    kernel = tensors["vision_model.embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1)
    assert mx.array_equal(weights["embeddings.patch_embedding.weight"], kernel)
    assert read_json(out / "config.json") == CONFIG | {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
    }


def test_a_two_tower_checkpoint_gives_its_vision_half(checkpoint, tensors, capsys):
    inner = {k: v for k, v in CONFIG.items() if k != "model_type"}
    both = tensors | {"text_model.x.weight": mx.zeros(3), "logit_scale": mx.zeros(1)}
    write(checkpoint, {"model_type": "siglip", "vision_config": inner}, both)
    assert convert(checkpoint) == 0
    assert "left out 2 of its text tower" in capsys.readouterr().out


def refusal(checkpoint: Path, capsys) -> str:
    """The one line that a refused conversion says; it leaves nothing behind."""
    before = sorted(checkpoint.parent.rglob("*"))
    assert convert(checkpoint) == 2
    assert sorted(checkpoint.parent.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_unknown_key_is_named(checkpoint, tensors, capsys):
    write(checkpoint, CONFIG, tensors | {"vision_model.lora.weight": mx.zeros(2)})
    assert "vision_model.lora.weight (0 rules)" in refusal(checkpoint, capsys)


def test_a_missing_key_is_named(checkpoint, tensors, capsys):
    del tensors["vision_model.post_layernorm.bias"]
    write(checkpoint, CONFIG, tensors)
    assert "missing post_layernorm.bias" in refusal(checkpoint, capsys)


def test_a_tensor_of_another_shape_is_named(checkpoint, tensors, capsys):
    tensors["vision_model.post_layernorm.bias"] = mx.zeros(7)
    write(checkpoint, CONFIG, tensors)
    assert "post_layernorm.bias expected (16,), got (7,)" in refusal(checkpoint, capsys)


def test_two_keys_for_one_tensor(checkpoint, tensors, capsys):
    write(checkpoint, CONFIG, tensors | {"post_layernorm.bias": mx.zeros(16)})
    assert "two name one tensor" in refusal(checkpoint, capsys)


def test_another_architecture(checkpoint, tensors, capsys):
    write(checkpoint, {"model_type": "clip"}, tensors)
    assert "got 'clip'" in refusal(checkpoint, capsys)


def test_another_activation_is_not_silently_replaced(checkpoint, tensors, capsys):
    write(checkpoint, CONFIG | {"hidden_act": "gelu"}, tensors)
    assert "hidden_act" in refusal(checkpoint, capsys)


def test_a_truncated_file(checkpoint, capsys):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: not a readable" in refusal(checkpoint, capsys)


def test_a_missing_shard(checkpoint, capsys):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors: missing" in refusal(checkpoint, capsys)


def test_an_index_cannot_reach_outside_its_folder(checkpoint, capsys):
    index = {"weight_map": {"a": "../hf/model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing" in refusal(checkpoint, capsys)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(checkpoint, name, capsys):
    (checkpoint / name).unlink()
    assert name in refusal(checkpoint, capsys)


def test_an_existing_folder_is_kept(checkpoint, capsys):
    out = checkpoint.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "already there" in refusal(checkpoint, capsys)


def test_no_such_folder(tmp_path, capsys):
    assert "no such folder" in refusal(tmp_path / "nowhere", capsys)
