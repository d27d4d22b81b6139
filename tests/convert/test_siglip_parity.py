"""The converted SigLIP and SigLIP 2 equal transformers', through the command that a user runs."""

import os
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.config import read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.models.vision.siglip import Siglip2Config, SiglipConfig
from convert import __main__ as cli

pytestmark = pytest.mark.parity

BOUND = 1e-4
TOWERS = [
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "layer_norm_eps": 1e-2,
    },
]
# 384 px in patches of 14, as published, leaves some pixels over; so does 45 px.
RESOLUTIONS = [{"image_size": 32, "patch_size": 8}, {"image_size": 45, "patch_size": 14}]
NAFLEX = [{"num_patches": 16, "patch_size": 8}, {"num_patches": 9, "patch_size": 14}]
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
SIGLIP = ("SigLIP", "transformers.SiglipVisionModel")
SIGLIP2 = ("SigLIP 2 NaFlex", "transformers.Siglip2VisionModel")


@pytest.fixture
def siglip(transformers, randomise) -> Any:
    """``siglip(**config)``: transformers' model with random weights."""
    return lambda **config: randomise(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
    )


@pytest.fixture
def siglip2(transformers, randomise) -> Any:
    return lambda **config: randomise(
        transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config))
    )


def tokens(model: Any, **options: Any) -> Any:
    return lambda pixels: model(pixels, **options).last_hidden_state


def naflex_tokens(model: Any) -> Any:
    """NCHW pixels -> tokens, by way of transformers' own patches."""
    import torch
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patch = model.config.patch_size

    def run(pixels: Any) -> Any:
        flat = torch.stack([convert_image_to_patches(image, patch) for image in pixels])
        grid = torch.tensor([[side // patch for side in pixels.shape[2:]]] * len(pixels))
        return model(flat, torch.ones(flat.shape[:2]), grid).last_hidden_state

    return run


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", TOWERS)
def test_every_token(siglip, converted, token_error, parity, size, resolution, tmp_path):
    reference = siglip(**size, **resolution)
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    image, patch = resolution["image_size"], resolution["patch_size"]
    seen = image // patch * patch
    error = token_error(lambda x: ours(x[:, :seen, :seen]), tokens(reference), image)
    parity(*SIGLIP, f"width {size['hidden_size']}, {image} px, patch {patch}", error, BOUND)


def test_pixels_that_no_patch_covers(transformers, siglip, converted, parity, tmp_path):
    """45 px in patches of 14: the picture is resized to 45 and cut to the 42 that are seen, so
    that a token's cell is where the token looks."""
    import torch

    reference = siglip(**TOWERS[0], **RESOLUTIONS[1])
    reference.save_pretrained(tmp_path / "hf")
    size = {"height": 45, "width": 45}
    processor = transformers.SiglipImageProcessorPil(size=size)
    processor.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8))
    pixels, geometry = Preprocessor.from_dict(read_json(tmp_path / "mlx/preprocessor_config.json"))(
        image
    )
    assert geometry.to_input([[90, 70]]).tolist() == [[45, 45]]
    theirs = processor(image, return_tensors="np").pixel_values
    with torch.no_grad():
        want = reference(torch.from_numpy(theirs)).last_hidden_state.numpy()
    error = float(np.abs(np.array(ours(mx.array(pixels[None]))) - want).max() / np.abs(want).max())
    parity(*SIGLIP, "45 px, patch 14, from a picture to tokens", error, BOUND)


@pytest.mark.parametrize("image_size", [24, 40, 96])
def test_another_input_size(siglip, converted, token_error, parity, image_size, tmp_path):
    reference = siglip(**TOWERS[0], **RESOLUTIONS[0])
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx", "--image-size", str(image_size))
    resized = tokens(reference, interpolate_pos_encoding=True)
    error = token_error(ours, resized, image_size)
    parity(*SIGLIP, f"made for 32 px, run at {image_size} px", error, BOUND)


@pytest.mark.parametrize("resolution", NAFLEX)
@pytest.mark.parametrize("size", TOWERS)
def test_every_token_of_naflex(siglip2, converted, token_error, parity, size, resolution, tmp_path):
    reference = siglip2(**size, **resolution)
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    patch = resolution["patch_size"]
    image = round(resolution["num_patches"] ** 0.5) * patch
    error = token_error(ours, naflex_tokens(reference), image)
    parity(*SIGLIP2, f"width {size['hidden_size']}, {image} px, patch {patch}", error, BOUND)


@pytest.mark.parametrize("image_size", [16, 24, 56])
def test_naflex_at_another_input_size(
    siglip2, converted, token_error, parity, image_size, tmp_path
):
    reference = siglip2(**TOWERS[0], **NAFLEX[0])
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx", "--image-size", str(image_size))
    error = token_error(ours, naflex_tokens(reference), image_size)
    parity(*SIGLIP2, f"made for 32 px, run at {image_size} px", error, BOUND)


def test_the_vision_half_of_a_two_tower_checkpoint_in_shards(
    transformers, randomise, converted, token_error, parity, tmp_path
):
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=TOWERS[0] | RESOLUTIONS[0])
    reference = randomise(transformers.SiglipModel(config))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    error = token_error(ours, tokens(reference.vision_model), RESOLUTIONS[0]["image_size"])
    parity("SigLIP", "transformers.SiglipModel", "two towers, sharded", error, BOUND)


def test_the_vision_half_of_a_two_tower_naflex_checkpoint_in_shards(
    transformers, randomise, converted, token_error, parity, tmp_path
):
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=TOWERS[0] | NAFLEX[0])
    reference = randomise(transformers.Siglip2Model(config))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    error = token_error(ours, naflex_tokens(reference.vision_model), 32)
    parity("SigLIP 2 NaFlex", "transformers.Siglip2Model", "two towers, sharded", error, BOUND)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_bin_file_gives_what_the_safetensors_file_gives(
    request, converted, family, dtype, tmp_path
):
    import torch

    resolution = RESOLUTIONS[0] if family == "siglip" else NAFLEX[0]
    reference = request.getfixturevalue(family)(**TOWERS[0], **resolution)
    reference.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "a")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "hf/pytorch_model.bin")
    converted(tmp_path / "hf", tmp_path / "b")
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_a_pickle_that_would_run_code_is_refused(transformers, tmp_path, capsys):
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    config = transformers.SiglipVisionConfig(**TOWERS[0], **RESOLUTIONS[0])
    config.save_pretrained(tmp_path / "hf")
    torch.save({"embeddings": Evil()}, tmp_path / "hf/pytorch_model.bin")
    arguments = ["vision", "--hf-path", str(tmp_path / "hf"), "--mlx-path", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "not a file of plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_what_a_configuration_leaves_out_is_what_transformers_takes(transformers, family):
    # Two-tower configurations on the hub list only what differs from the library's defaults.
    ours = {"Siglip": SiglipConfig, "Siglip2": Siglip2Config}[family]()
    theirs = getattr(transformers, f"{family}VisionConfig")()
    for name in ours.__dataclass_fields__.keys() & set(vars(theirs)):
        assert getattr(ours, name) == getattr(theirs, name), name
    side = getattr(theirs, "image_size", theirs.patch_size * 16)
    assert ours.image_size == side
