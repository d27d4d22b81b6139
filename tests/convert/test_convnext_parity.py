"""The converted ConvNeXt equals timm's and open_clip's, through the command that a user runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.parity

#: Two sizes; convnext_xxlarge stands for another epsilon than convnext_base.
TRUNKS = {
    "convnext_base": {"depths": [1, 2, 3, 1], "dims": [16, 24, 32, 48]},
    "convnext_xxlarge": {"depths": [2, 1, 2, 2], "dims": [12, 20, 40, 64]},
}
#: (height, width) in pixels
RESOLUTIONS = [(64, 64), (96, 96), (64, 128)]
#: open_clip's file has no place for overrides, so its trunks are timm's own two test models.
CLIPS = {
    "test_convnext": {"timm_proj": "linear", "custom_text": False},
    "test_convnext2": {"timm_proj": "mlp", "custom_text": True},
}
BOUND = 1e-4


@pytest.fixture(scope="module")
def timm(torchvision: Any) -> Any:
    import timm

    return timm


@pytest.fixture(scope="module")
def open_clip(torchvision: Any) -> Any:
    import open_clip

    return open_clip


@pytest.fixture(scope="module")
def sensitive(randomise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Random weights for which small mistakes show: a quiet residual stream, so that every
    norm's epsilon counts, and negative inputs to GELU, where its two formulas differ most in
    proportion to its value."""
    import torch

    def prepare(trunk: Any) -> Any:
        randomise(trunk)
        with torch.no_grad():
            for name, parameter in trunk.named_parameters():
                if name.startswith("stem.") or ".downsample.1." in name:
                    parameter.mul_(0.02)
                if name.endswith(".mlp.fc1.bias"):
                    parameter.sub_(2.0)
        return trunk

    return prepare


def tokens(trunk: Any) -> Callable[[Any], Any]:
    return lambda pixels: trunk.forward_features(pixels).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("architecture", TRUNKS)
def test_every_token_of_a_timm_trunk(
    timm, architecture, sensitive, converted, parity, token_error, tmp_path
):
    trunk = sensitive(timm.create_model(architecture, **TRUNKS[architecture]))
    timm.models.save_for_hf(trunk, tmp_path / "hf", safe_serialization=True)
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    for height, width in RESOLUTIONS:
        parity(
            "CLIP ConvNeXt",
            "timm ConvNeXt.forward_features",
            f"{architecture} of widths {TRUNKS[architecture]['dims']}, {height}x{width} px",
            token_error(ours, tokens(trunk), height, width),
            BOUND,
        )


@pytest.mark.parametrize("architecture", CLIPS)
@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_every_token_of_an_open_clip_model(
    open_clip, architecture, file, sensitive, converted, parity, token_error, tmp_path, capsys
):
    clip, config = tiny_clip(open_clip, architecture)
    trunk = sensitive(clip.visual.trunk)
    save_for_hub(tmp_path / "hf", file, clip, config)
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    assert ours.config.image_size == 64
    said = capsys.readouterr().out
    assert all(part in said for part in ("pooling head", "image projection", "text tower"))
    for height, width in RESOLUTIONS:
        parity(
            "CLIP ConvNeXt",
            f"open_clip {type(clip).__name__}",
            f"{architecture}, {file.rpartition('.')[2]}, {height}x{width} px",
            token_error(ours, tokens(trunk), height, width),
            BOUND,
        )


def test_another_image_size_changes_the_grid_and_no_weight(
    timm, sensitive, converted, token_error, tmp_path
):
    trunk = sensitive(timm.create_model("convnext_base", **TRUNKS["convnext_base"]))
    timm.models.save_for_hf(trunk, tmp_path / "hf", safe_serialization=True)
    ours = converted(tmp_path / "hf", tmp_path / "mlx", "--image-size", "96")
    assert ours.grid == (3, 3)
    assert token_error(ours, tokens(trunk), 96) <= BOUND


def tiny_clip(open_clip: Any, architecture: str) -> tuple[Any, dict[str, Any]]:
    """One of open_clip's two classes, which name the text tower differently, and its config."""
    settings = CLIPS[architecture]
    vision = {
        "timm_model_name": architecture,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": settings["timm_proj"],
        "image_size": 64,
    }
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    towers = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    build = open_clip.CustomTextCLIP if settings["custom_text"] else open_clip.CLIP
    return build(**towers), towers


def save_for_hub(folder: Path, file: str, clip: Any, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    table = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(table))
    if file.endswith(".bin"):
        torch.save(clip.state_dict(), folder / file)
    else:
        save_file(clip.state_dict(), folder / file)
