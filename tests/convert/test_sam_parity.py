"""The converted SAM image encoder equals Meta's and transformers', through the command that a
user runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.config import read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import assign, read_weights, shipped
from convert import __main__ as cli

pytestmark = pytest.mark.parity

BOUND = 1e-4
#: Neither window divides its grid, so the last windows of a row and a column are padded.
TOWERS = [
    {
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "window_size": 3,
        "global_attn_indexes": (1,),
        "out_chans": 16,
    },
    {
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "window_size": 5,
        "global_attn_indexes": (0, 3),
        "out_chans": 32,
    },
]
RESOLUTIONS = [{"image_size": 64, "patch_size": 8}, {"image_size": 112, "patch_size": 16}]
DECODER = {
    "mask_in_chans": 4,
    "decoder_depth": 1,
    "decoder_mlp_dim": 16,
    "decoder_num_heads": 2,
    "iou_head_hidden_dim": 8,
}


def case(tower: dict, resolution: dict) -> str:
    return (
        f"width {tower['embed_dim']}, window {tower['window_size']}, "
        f"{resolution['image_size']} px, patch {resolution['patch_size']}"
    )


@pytest.fixture(scope="module")
def meta(randomise) -> Callable[..., Any]:
    """A whole SAM of Meta's own classes."""
    from agevlm_mlx.sam.architecture import Architecture
    from agevlm_mlx.sam.teacher import build

    return lambda **sizes: randomise(build(Architecture(**DECODER, **sizes)))


@pytest.fixture(scope="module")
def hugging_face(transformers) -> Callable[..., Any]:
    """transformers' SamModel with the image encoder of one of Meta's."""
    import torch

    def same(sam: Any, tower: dict, resolution: dict) -> Any:
        sizes = {
            "hidden_size": tower["embed_dim"],
            "num_hidden_layers": tower["depth"],
            "num_attention_heads": tower["num_heads"],
            "mlp_ratio": tower["mlp_ratio"],
            "window_size": tower["window_size"],
            "global_attn_indexes": list(tower["global_attn_indexes"]),
            "output_channels": tower["out_chans"],
        }
        config = transformers.SamConfig(
            vision_config=sizes | resolution | {"num_pos_feats": tower["out_chans"] // 2},
            prompt_encoder_config={"hidden_size": tower["out_chans"]} | resolution,
            mask_decoder_config={
                "hidden_size": tower["out_chans"],
                "num_attention_heads": 2,
                "mlp_dim": 16,
                "iou_head_hidden_dim": 8,
            },
        )
        model = transformers.SamModel(config).eval()
        own, theirs = (list(m.parameters()) for m in (model.vision_encoder, sam.image_encoder))
        with torch.no_grad():
            for parameter, value in zip(own, theirs, strict=True):
                assert parameter.shape == value.shape
                parameter.copy_(value)
        return model

    return same


def tokens(module: Any) -> Callable[[Any], Any]:
    """A torch encoder's map [B C Gh Gw] as tokens."""

    def encode(pixels: Any) -> Any:
        out = module(pixels)
        return getattr(out, "last_hidden_state", out).flatten(2).swapaxes(1, 2)

    return encode


def save(sam: Any, path: Path) -> Path:
    """One of Meta's files: a pickle of the whole model's tensors."""
    import torch

    torch.save(sam.state_dict(), path)
    return path


def encoder(out: Path, *arguments: object) -> Any:
    """The MLX encoder that `agevlm-convert sam` makes."""
    assert cli.main(["sam", *map(str, arguments), "--mlx-path", str(out)]) == 0
    encoder = build_encoder(read_json(out / "config.json"))
    assign(encoder, read_weights(out), out)
    return encoder


@pytest.mark.parametrize("resolution", RESOLUTIONS, ids=["64px", "112px"])
@pytest.mark.parametrize("tower", TOWERS, ids=["small", "large"])
def test_meta_and_hugging_face(
    meta, transformers, hugging_face, tower, resolution, token_error, parity, tmp_path, capsys
):
    sam = meta(**tower, **resolution)
    model = hugging_face(sam, tower, resolution)
    size = resolution["image_size"]
    model.save_pretrained(tmp_path / "hf")
    transformers.SamImageProcessor(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}
    ).save_pretrained(tmp_path / "hf")
    checkpoint = save(sam, tmp_path / "sam.pth")
    ours = encoder(tmp_path / "meta", "--checkpoint", checkpoint)
    error = token_error(ours, tokens(sam.image_encoder), size)
    name = "segment_anything ImageEncoderViT"
    parity("SAM ViT", name, case(tower, resolution), error, BOUND)
    assert "prompt encoder and mask decoder" in capsys.readouterr().out

    ours = encoder(tmp_path / "mlx", "--hf-path", tmp_path / "hf")
    error = token_error(ours, tokens(model.vision_encoder), size)
    parity("SAM ViT", "transformers.SamModel", case(tower, resolution), error, BOUND)
    # Both files hold the same weights: the same encoder, to the last bit and setting.
    assert cli.main(["verify", str(tmp_path / "meta"), str(tmp_path / "mlx")]) == 0
    for file in ("config.json", "preprocessor_config.json"):
        assert read_json(tmp_path / "meta" / file) == read_json(tmp_path / "mlx" / file)


def test_a_vision_model_alone_through_either_command(
    transformers, converted, randomise, token_error, parity, tmp_path
):
    config = transformers.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_dim=40,
        window_size=4,
        global_attn_indexes=[1],
        output_channels=24,
        image_size=96,
        patch_size=16,
        qkv_bias=False,
        layer_norm_eps=1e-3,
    )
    reference = randomise(transformers.SamVisionModel(config))
    reference.save_pretrained(tmp_path / "hf")
    for command in ("sam", "vision"):
        ours = converted(tmp_path / "hf", tmp_path / command, command=command)
        error = token_error(ours, tokens(reference), 96)
        name = "transformers.SamVisionModel"
        parity("SAM ViT", name, f"width 32, window 4, 96 px, patch 16 ({command})", error, BOUND)


@pytest.mark.parametrize("size", [96, 40])
def test_another_image_size(meta, token_error, parity, tmp_path, size):
    """Meta's encoder looks relative positions up in tables of any length (linear); its absolute
    ones are resampled here as ViTDet, which it is made after, does it (bicubic)."""
    import torch

    sam = meta(**TOWERS[0], **RESOLUTIONS[0])
    checkpoint = save(sam, tmp_path / "sam.pth")
    ours = encoder(tmp_path / "mlx", "--checkpoint", checkpoint, "--image-size", size)
    reference = sam.image_encoder
    table = torch.nn.functional.interpolate(
        reference.pos_embed.detach().permute(0, 3, 1, 2),
        size=(size // 8, size // 8),
        mode="bicubic",
    )
    reference.pos_embed = torch.nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
    name = "segment_anything ImageEncoderViT"
    label = f"{case(TOWERS[0], RESOLUTIONS[0])} at {size} px"
    parity("SAM ViT", name, label, token_error(ours, tokens(reference), size), BOUND)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (61, 133)])
def test_the_shipped_teacher_without_torch(width, height, parity, tmp_path):
    """Trained weights, from the picture's file to the features, as `agevlm teach` has them."""
    from agevlm_mlx.sam.teacher import Teacher

    checkpoint = shipped("teacher") / "model.safetensors"  # float16, run in float32
    ours = encoder(tmp_path / "mlx", "--checkpoint", checkpoint, "--dtype", "float32")
    preprocessor = Preprocessor.from_dict(read_json(tmp_path / "mlx/preprocessor_config.json"))
    noise = np.random.default_rng(0).integers(0, 256, (height // 9 + 1, width // 9 + 1, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height))
    pixels, _ = preprocessor(image)
    got = np.array(ours(mx.array(pixels[None])))[0]
    want = Teacher(device="cpu").features(np.asarray(image)).reshape(got.shape)
    error = float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())
    label = f"{width}x{height} picture, preprocessing included"
    parity("SAM ViT", "segment_anything, the shipped teacher", label, error, BOUND)
