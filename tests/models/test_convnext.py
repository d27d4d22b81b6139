"""ConvNeXt without torch: its shapes, and what its configuration and conversion refuse."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import read_weights
from convert import __main__ as cli
from convert.convnext import ARCHITECTURES

TINY = {
    "model_type": "convnext_clip",
    "image_size": 64,
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [4, 8, 12, 16],
}
TIMM = {
    "architecture": "convnext_base",
    "num_features": 16,
    "model_args": {"depths": TINY["depths"], "dims": TINY["hidden_sizes"], "num_classes": 0},
    "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3},
}
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 64},
    }
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    mx.random.seed(0)


def test_tokens_are_the_map_row_by_row_for_any_multiple_of_the_stride():
    encoder = build_encoder(TINY)
    assert (encoder.grid, encoder.width) == ((2, 2), 16)
    assert encoder(mx.zeros((2, 64, 64, 3))).shape == (2, 4, 16)
    pixels = mx.random.normal((1, 64, 160, 3))
    cell = mx.zeros((1, 64, 160, 1))
    cell[:, 32:, 96:128] = 1.0  # the second row, the fourth column
    difference = encoder(pixels + cell) - encoder(pixels)
    assert np.abs(np.array(difference)).sum((0, 2)).argmax() == 1 * 5 + 3


def test_the_weights_dtype_is_the_one_it_computes_in():
    encoder = build_encoder(TINY)
    encoder.set_dtype(mx.bfloat16)
    assert encoder(mx.zeros((1, 32, 32, 3))).dtype == mx.bfloat16


@pytest.mark.parametrize("shape", [(1, 64, 48, 3), (1, 0, 64, 3)])
def test_other_pixels_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 32"):
        build_encoder(TINY)(mx.zeros(shape))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_size": 336}, r"image_size: expected a multiple of 32 pixels, got 336"),
        ({"image_size": 0}, r"multiple of 32 pixels, got 0; 32 is nearest"),
        ({"depths": [1, 1, 1]}, "depths: expected"),
        ({"depths": [1, 0, 1, 1]}, r"depths: expected numbers from 1 up, got \[1, 0, 1, 1\]"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu' or 'gelu_pytorch_tanh'"),
    ],
)
def test_a_configuration_that_cannot_be(change, expected):
    with pytest.raises(UserError, match=expected):
        build_encoder(TINY | change)


@pytest.mark.parametrize(
    ("architecture", "millions", "width"),
    [
        ("convnext_base", 87.56, 1024),
        ("convnext_large", 196.23, 1536),
        ("convnext_large_mlp", 196.23, 1536),
        ("convnext_xxlarge", 843.39, 3072),
    ],
)
def test_the_published_sizes(architecture, millions, width):
    encoder = build_encoder(TINY | {"image_size": 256} | ARCHITECTURES[architecture])  # lazy
    count = sum(value.size for _, value in tree_flatten(encoder.parameters()))
    assert round(count / 1e6, 2) == millions
    assert (encoder.grid, encoder.width) == ((8, 8), width)


def foreign(config: dict[str, Any], prefix: str = "") -> dict[str, mx.array]:
    """The tensors of an encoder under timm's names, with a head."""
    names = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "encoder.": "",
        "downsampling_layer": "downsample",
        "layers": "blocks",
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv": "mlp.fc",
        "layer_scale_parameter": "gamma",
    }
    tensors = {}
    for name, value in dict(tree_flatten(build_encoder(config).parameters())).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[prefix + name] = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
    return tensors | {f"{prefix}head.norm.weight": mx.ones(config["hidden_sizes"][-1])}


def convert(folder: Path, tensors: dict[str, mx.array], **configs: Any) -> int:
    """Run the command on a folder of these tensors and ``<name>.json`` files."""
    source = folder / "hf"
    source.mkdir()
    for name, table in configs.items():
        (source / f"{name}.json").write_text(json.dumps(table))
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    return cli.main(["vision", "--hf-path", str(source), "--mlx-path", str(folder / "out")])


def test_a_timm_checkpoint_with_overrides(tmp_path, capsys):
    tensors = foreign(TINY)
    assert convert(tmp_path, tensors, config=TIMM) == 0
    assert "left out 1 of its pooling head" in capsys.readouterr().out
    assert read_json(tmp_path / "out/config.json") == TINY | {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    kernel = read_weights(tmp_path / "out")["encoder.stages.2.layers.1.dwconv.weight"]
    assert mx.array_equal(kernel, tensors["stages.2.blocks.1.conv_dw.weight"].transpose(0, 2, 3, 1))


def test_older_timm_files_have_no_inner_table(tmp_path):
    table = {"architecture": "test_convnext2", "input_size": [3, 96, 96]}
    assert convert(tmp_path, foreign(TINY | ARCHITECTURES["test_convnext2"]), config=table) == 0
    assert read_json(tmp_path / "out/config.json")["image_size"] == 96


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_open_clips_configuration_with_either_naming(tmp_path, prefix):
    """timm's CLIP repositories hold both configurations, and the trunk under timm's names."""
    tensors = foreign(TINY | ARCHITECTURES["test_convnext2"], prefix)
    tables = {"open_clip_config": OPEN_CLIP, "config": TIMM}
    assert convert(tmp_path, tensors, **tables) == 0
    assert read_json(tmp_path / "out/config.json")["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "resnet50"}, "convnext_base or convnext_large or"),
        ({"architecture": None}, "got None"),
        ({"pretrained_cfg": {}}, "input_size: expected a square size in pixels, got None"),
        ({"pretrained_cfg": {"input_size": [3, 64, 96]}}, "got [64, 96]"),
        ({"pretrained_cfg": []}, "pretrained_cfg: expected a table"),
        ({"model_args": {"use_grn": True}}, "use_grn: expected False, got True"),
        ({"model_args": {"stem_type": "overlap"}}, "expected 'patch', got 'overlap'"),
        ({"model_args": {"new_part": 1}}, "new_part: expected nothing of that name, got 1"),
        ({"model_args": {"act_layer": "silu"}}, "hidden_act: expected 'gelu'"),
        ({"model_args": {"depths": [1, 1, 2, 2]}}, "missing encoder.stages."),
    ],
)
def test_a_timm_checkpoint_that_is_refused(tmp_path, capsys, change, expected):
    assert expected in refusal(tmp_path, capsys, foreign(TINY), config=TIMM | change)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"model_cfg": {"vision_cfg": {"layers": 12, "width": 768}}}, "a tower of open_clip's own"),
        ({"model_cfg": {"vision_cfg": None}}, "vision_cfg: expected a table, got None"),
        ([], "expected a table, got []"),
    ],
)
def test_an_open_clip_checkpoint_that_is_refused(tmp_path, capsys, table, expected):
    assert expected in refusal(tmp_path, capsys, foreign(TINY), open_clip_config=table)


def test_a_trunk_without_layer_scale(tmp_path, capsys):
    tensors = {name: value for name, value in foreign(TINY).items() if "gamma" not in name}
    assert "missing encoder.stages.0.layers.0.layer_scale" in refusal(
        tmp_path, capsys, tensors, config=TIMM
    )


def test_a_norm_before_the_head_is_another_trunk(tmp_path, capsys):
    tensors = foreign(TINY) | {"norm_pre.weight": mx.ones(16)}
    assert "norm_pre.weight (0 rules)" in refusal(tmp_path, capsys, tensors, config=TIMM)


def refusal(tmp_path: Path, capsys: Any, tensors: dict[str, mx.array], **configs: Any) -> str:
    """The one line that a refused conversion says; it leaves nothing behind."""
    assert convert(tmp_path, tensors, **configs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
