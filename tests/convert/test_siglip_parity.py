"""The converted SigLIP equals transformers', through the command that a user runs."""

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.config import read_json
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import assign, read_weights
from convert import __main__ as cli

pytestmark = pytest.mark.parity

TOWERS = [
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80},
]
RESOLUTIONS = [{"image_size": 32, "patch_size": 8}, {"image_size": 42, "patch_size": 14}]
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    from agevlm_mlx.sam.torchvision_ops import import_torchvision

    with contextlib.suppress(ImportError):
        import_torchvision()  # transformers' models import it where it is installed
    return pytest.importorskip("transformers")


def randomise(model: Any) -> Any:
    """Weights large enough that every layer matters (the library's own start near zero)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1)
    return model.eval()


def converted(folder: Path, out: Path) -> Any:
    """The MLX encoder that `agevlm-convert vision` makes of a saved checkpoint."""
    assert cli.main(["vision", "--hf-path", str(folder), "--mlx-path", str(out)]) == 0
    encoder = build_encoder(read_json(out / "config.json"))
    assign(encoder, read_weights(out), out)
    return encoder


def relative_error(ours: Any, reference: Any, size: int) -> float:
    """Largest error of an output token over the largest reference value."""
    import torch

    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        nchw = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        want = reference(pixel_values=nchw).last_hidden_state.numpy()
    got = np.array(ours(mx.array(pixels)))
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_token_of_a_vision_tower(transformers, tower, resolution, tmp_path):
    config = transformers.SiglipVisionConfig(**tower, **resolution)
    reference = randomise(transformers.SiglipVisionModel(config))
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    assert relative_error(ours, reference, resolution["image_size"]) <= 1e-4


def test_the_vision_half_of_a_two_tower_checkpoint_in_shards(transformers, tmp_path):
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=TOWERS[0] | RESOLUTIONS[0])
    reference = randomise(transformers.SiglipModel(config))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    assert relative_error(ours, reference.vision_model, RESOLUTIONS[0]["image_size"]) <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bin_file_gives_what_the_safetensors_file_gives(transformers, dtype, tmp_path):
    import torch

    config = transformers.SiglipVisionConfig(**TOWERS[0], **RESOLUTIONS[0])
    reference = randomise(transformers.SiglipVisionModel(config)).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "a")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "hf/pytorch_model.bin")
    converted(tmp_path / "hf", tmp_path / "b")
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_a_pickle_that_would_run_code_is_refused(transformers, tmp_path, capsys):
    import os

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
