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
TABLE = "embeddings.position_embedding.weight"


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
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def convert(folder: Path, *options: str) -> int:
    out = folder.parent / "out"
    return cli.main(["vision", "--hf-path", str(folder), "--mlx-path", str(out), *options])


def test_the_result_is_a_complete_encoder_folder(checkpoint, tensors, capsys):
    assert convert(checkpoint) == 0
    out = checkpoint.parent / "out"
    assert "left out 1 of its pooling head" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
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


def test_the_result_can_be_converted_to_another_size(checkpoint):
    assert convert(checkpoint) == 0
    made = checkpoint.parent / "out"
    out = checkpoint.parent / "larger"
    arguments = ["--hf-path", str(made), "--mlx-path", str(out), "--image-size", "32"]
    assert cli.main(["vision", *arguments]) == 0
    before, after = read_weights(made), read_weights(out)
    assert {k for k in before if not mx.array_equal(before[k], after[k])} == {TABLE}
    assert after[TABLE].shape == (16, 16)


def test_another_image_size_changes_the_position_table_alone(checkpoint, capsys):
    assert convert(checkpoint, "--image-size", "24") == 0
    assert "3x3 tokens of width 16 from 24x24 pixels" in capsys.readouterr().out
    out = checkpoint.parent / "out"
    assert read_json(out / "config.json")["image_size"] == 24
    assert read_json(out / "preprocessor_config.json")["image_size"] == 24
    weights = read_weights(out)
    assert weights[TABLE].shape == (9, 16)
    assert convert_again(checkpoint) == {TABLE}


def convert_again(checkpoint: Path) -> set[str]:
    """The tensors of ``out`` that differ from those of a conversion without options."""
    out = checkpoint.parent / "plain"
    assert cli.main(["vision", "--hf-path", str(checkpoint), "--mlx-path", str(out)]) == 0
    plain, ours = read_weights(out), read_weights(checkpoint.parent / "out")
    assert set(plain) == set(ours)
    return {name for name in plain if not mx.array_equal(plain[name], ours[name])}


@pytest.mark.parametrize("size", ["20", "0", "-8", "7"])
def test_an_image_size_that_patches_do_not_fill(checkpoint, size, capsys):
    assert f"expected a multiple of 8, got {size}" in refusal(
        checkpoint, capsys, "--image-size", size
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_of_every_tensor(checkpoint, dtype):
    assert convert(checkpoint, "--dtype", dtype, "--image-size", "24") == 0
    weights = read_weights(checkpoint.parent / "out")
    assert {value.dtype for value in weights.values()} == {getattr(mx, dtype)}


def test_without_dtype_the_checkpoints_own_is_kept(checkpoint, tensors):
    half = {name: value.astype(mx.bfloat16) for name, value in tensors.items()}
    write(checkpoint, CONFIG, half)
    assert convert(checkpoint, "--image-size", "24") == 0
    weights = read_weights(checkpoint.parent / "out")
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}


def test_a_dry_run_says_the_same_and_writes_nothing(checkpoint, capsys):
    before = sorted(checkpoint.parent.rglob("*"))
    options = ("--image-size", "24", "--dtype", "float16")
    assert convert(checkpoint, *options, "--dry-run") == 0
    assert sorted(checkpoint.parent.rglob("*")) == before
    dry = capsys.readouterr().out
    assert convert(checkpoint, *options) == 0
    assert dry == capsys.readouterr().out.replace("\n", " (dry run: nothing written)\n")


def test_a_dry_run_refuses_what_a_conversion_refuses(checkpoint, tensors, capsys):
    del tensors["vision_model.post_layernorm.bias"]
    write(checkpoint, CONFIG, tensors)
    assert "missing post_layernorm.bias" in refusal(checkpoint, capsys, "--dry-run")


def as_clip(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same tower with CLIP's tensors, and a second layer."""
    out = {k: v for k, v in tensors.items() if "head" not in k and "embedding" not in k}
    for key in [k for k in out if "layers.0." in k]:
        out[key.replace("layers.0.", "layers.1.")] = mx.array(out[key])
    embeddings = "vision_model.embeddings"
    return out | {
        f"{embeddings}.class_embedding": mx.random.normal((16,)),
        f"{embeddings}.patch_embedding.weight": tensors[f"{embeddings}.patch_embedding.weight"],
        f"{embeddings}.position_embedding.weight": mx.random.normal((5, 16)),
        f"{embeddings}.position_ids": mx.arange(5)[None],
        "vision_model.pre_layrnorm.weight": mx.ones(16),
        "vision_model.pre_layrnorm.bias": mx.zeros(16),
        "visual_projection.weight": mx.zeros((8, 16)),
        "text_model.embeddings.position_ids": mx.arange(7)[None],
        "text_model.final_layer_norm.weight": mx.zeros(3),
        "text_projection.weight": mx.zeros((8, 3)),
        "logit_scale": mx.zeros(1),
    }


CLIP = {k: v for k, v in CONFIG.items() if k != "model_type"} | {"num_hidden_layers": 2}


def test_clip_without_its_text_tower_last_layer_and_pooled_output(checkpoint, tensors, capsys):
    write(checkpoint, {"model_type": "clip", "vision_config": CLIP}, as_clip(tensors))
    assert convert(checkpoint) == 0
    said = capsys.readouterr().out
    for left in (
        "16 of its layers after the features",
        "3 of its pooled output",
        "1 of its index buffer",
        "4 of its text tower",
    ):
        assert f"left out {left}" in said
    config = read_json(checkpoint.parent / "out/config.json")
    assert (config["model_type"], config["vision_feature_layer"]) == ("clip_vision_model", -2)
    weights = read_weights(checkpoint.parent / "out")
    assert {k.split(".")[2] for k in weights if k.startswith("encoder.")} == {"0"}


def test_clip_with_more_layers_than_its_config_says(checkpoint, tensors, capsys):
    config = CLIP | {"model_type": "clip_vision_model", "num_hidden_layers": 1}
    write(checkpoint, config | {"vision_feature_layer": -1}, as_clip(tensors))
    error = refusal(checkpoint, capsys)
    assert error.count("vision_model.encoder.layers.1.") == error.count("(0 rules)") == 8


def as_naflex(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    kernel = "vision_model.embeddings.patch_embedding.weight"
    return tensors | {kernel: tensors[kernel].transpose(0, 2, 3, 1).reshape(16, -1)}


NAFLEX = {k: v for k, v in CONFIG.items() if k != "image_size"} | {
    "model_type": "siglip2_vision_model",
    "num_patches": 4,
}


def test_naflex_is_the_square_that_its_table_is_for(checkpoint, tensors):
    write(checkpoint, NAFLEX, as_naflex(tensors))
    assert convert(checkpoint) == 0
    assert read_json(checkpoint.parent / "out/config.json")["image_size"] == 16
    write(checkpoint, CONFIG, tensors)
    assert convert_again(checkpoint) == set()


@pytest.mark.parametrize("patches", [5, 0, "4", None])
def test_naflex_with_a_table_of_no_square(checkpoint, tensors, patches, capsys):
    write(checkpoint, NAFLEX | {"num_patches": patches}, as_naflex(tensors))
    assert "num_patches: expected a square number, got" in refusal(checkpoint, capsys)


def test_a_naflex_kernel_of_another_patch_size_is_named(checkpoint, tensors, capsys):
    write(checkpoint, NAFLEX | {"patch_size": 7}, as_naflex(tensors))
    assert "patch_embedding.weight of shape (16, 192)" in refusal(checkpoint, capsys)


def refusal(checkpoint: Path, capsys, *options: str) -> str:
    """The one line that a refused conversion says; it leaves nothing behind."""
    before = sorted(checkpoint.parent.rglob("*"))
    assert convert(checkpoint, *options) == 2
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
    assert "two keys name one tensor" in refusal(checkpoint, capsys)


def test_another_architecture(checkpoint, tensors, capsys):
    write(checkpoint, {"model_type": "vgg"}, tensors)
    assert "got 'vgg'" in refusal(checkpoint, capsys)


def test_the_tensors_of_another_architecture(checkpoint, tensors, capsys):
    write(checkpoint, CLIP | {"model_type": "clip_vision_model"}, tensors)
    assert "another architecture than its config says" in refusal(checkpoint, capsys)


def test_another_activation_is_not_silently_replaced(checkpoint, tensors, capsys):
    write(checkpoint, CONFIG | {"hidden_act": "gelu_new"}, tensors)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ["siglip"]}, "expected model_type"),
        ({"model_type": {}}, "expected model_type"),
        ({"hidden_size": 10**12}, "cannot be built"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1000"),
    ],
)
def test_a_config_of_nonsense(change, message, checkpoint, tensors, capsys):
    write(checkpoint, CONFIG | change, tensors)
    assert message in refusal(checkpoint, capsys)


def test_an_existing_folder_is_kept(checkpoint, capsys):
    out = checkpoint.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "already there" in refusal(checkpoint, capsys)


def test_no_such_folder(tmp_path, capsys):
    assert "no such folder" in refusal(tmp_path / "nowhere", capsys)
