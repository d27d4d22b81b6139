"""The converted CLIP equals transformers', through the command that a user runs."""

from typing import Any

import pytest

from agevlm_mlx.config import read_json
from agevlm_mlx.models.vision.clip import ClipConfig
from convert import __main__ as cli

pytestmark = pytest.mark.parity

BOUND = 1e-4
TOWERS = [
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_act": "quick_gelu",
    },
    {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-2,
    },
]
RESOLUTIONS = [{"image_size": 32, "patch_size": 8}, {"image_size": 42, "patch_size": 14}]
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
CLIP = ("CLIP ViT", "transformers.CLIPVisionModel")


@pytest.fixture
def tower(transformers, randomise) -> Any:
    """``tower(**config)``: transformers' model with random weights."""
    return lambda **config: randomise(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    )


def patch_tokens(model: Any, layer: int, **options: Any) -> Any:
    """NCHW pixels -> what `layer` gives for the patches."""

    def run(pixels: Any) -> Any:
        states = model(pixels, output_hidden_states=True, **options).hidden_states
        assert len(states) == 1 + model.config.num_hidden_layers
        return states[layer][:, 1:]

    return run


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", TOWERS)
def test_every_token(
    tower, converted, token_error, parity, size, resolution, layer, tmp_path, capsys
):
    # Published configurations have no vision_feature_layer; -2 is what ours then takes.
    chosen = {} if layer == -2 else {"vision_feature_layer": layer}
    reference = tower(**size, **resolution, **chosen)
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    assert len(ours.encoder.layers) == size["num_hidden_layers"] + 1 + layer
    left = f"left out {-16 * (1 + layer)} of its layers after the features"
    assert (left in capsys.readouterr().out) == (layer == -2)
    image, patch = resolution["image_size"], resolution["patch_size"]
    error = token_error(ours, patch_tokens(reference, layer), image)
    case = f"width {size['hidden_size']}, {image} px, patch {patch}, {size['hidden_act']}, {layer}"
    parity(*CLIP, case, error, BOUND)


@pytest.mark.parametrize("image_size", [24, 40, 96])
def test_another_input_size(tower, converted, token_error, parity, image_size, tmp_path):
    reference = tower(**TOWERS[0], **RESOLUTIONS[0])
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx", "--image-size", str(image_size))
    assert ours.grid == (image_size // 8, image_size // 8)
    assert read_json(tmp_path / "mlx/preprocessor_config.json")["image_size"] == image_size
    resized = patch_tokens(reference, -2, interpolate_pos_encoding=True)
    error = token_error(ours, resized, image_size)
    parity(*CLIP, f"made for 32 px, run at {image_size} px", error, BOUND)


def test_the_vision_half_of_a_two_tower_checkpoint_in_shards(
    transformers, randomise, converted, token_error, parity, tmp_path, capsys
):
    vision = TOWERS[0] | RESOLUTIONS[0]
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=24)
    reference = randomise(transformers.CLIPModel(config))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    said = capsys.readouterr().out
    assert "left out 3 of its pooled output" in said  # post_layernorm and visual_projection
    assert "of its text tower" in said
    error = token_error(ours, patch_tokens(reference.vision_model, -2), 32)
    parity("CLIP ViT", "transformers.CLIPModel", "two towers, sharded", error, BOUND)


def test_a_tower_with_its_projection(
    transformers, randomise, converted, token_error, parity, tmp_path
):
    config = transformers.CLIPVisionConfig(**TOWERS[0], **RESOLUTIONS[0], projection_dim=24)
    reference = randomise(transformers.CLIPVisionModelWithProjection(config))
    reference.save_pretrained(tmp_path / "hf")
    ours = converted(tmp_path / "hf", tmp_path / "mlx")
    error = token_error(ours, patch_tokens(reference.vision_model, -2), 32)
    name = "transformers.CLIPVisionModelWithProjection"
    parity("CLIP ViT", name, "width 32, 32 px", error, BOUND)


def test_a_bin_file_gives_what_the_safetensors_file_gives(tower, converted, tmp_path):
    import torch

    reference = tower(**TOWERS[0], **RESOLUTIONS[0])
    reference.save_pretrained(tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "a")
    (tmp_path / "hf/model.safetensors").unlink()
    # As published in 2021 and 2022: prefixed, with the index buffer.
    state = {f"vision_model.{key}": value for key, value in reference.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "hf/pytorch_model.bin")
    converted(tmp_path / "hf", tmp_path / "b")
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_what_a_configuration_leaves_out_is_what_transformers_takes(transformers):
    # Two-tower configurations on the hub list only what differs from the library's defaults.
    theirs, ours = transformers.CLIPVisionConfig(), ClipConfig()
    for name in ClipConfig.__dataclass_fields__.keys() - {"vision_feature_layer"}:
        assert getattr(ours, name) == getattr(theirs, name), name
