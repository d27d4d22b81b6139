"""`agevlm-convert sam` without torch: what it reads, and what it refuses."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.config import read_json
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import read_weights
from convert import __main__ as cli
from convert import sam_weights

CONFIG = {
    "model_type": "sam_vision_model",
    "image_size": 40,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_dim": 24,
    "output_channels": 6,
    "window_size": 3,
    "global_attn_indexes": [0, 2],
    "use_rel_pos": True,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
#: Our names -> Meta's.
META = {
    "patch_embed.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "neck.conv1": "neck.0",
    "neck.layer_norm1": "neck.1",
    "neck.conv2": "neck.2",
    "neck.layer_norm2": "neck.3",
    "layer_norm": "norm",
}


def own(**changes) -> dict[str, mx.array]:
    """An encoder's tensors by our names, kernels channels first as theirs."""
    weights = dict(tree_flatten(build_encoder(CONFIG | changes).parameters()))
    return {
        name: value.transpose(0, 3, 1, 2) if value.ndim == 4 and name != "pos_embed" else value
        for name, value in weights.items()
    }


def meta(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A file of Meta's with the tensors of `own`, and something of the rest of a SAM."""
    tensors = {}
    for name, value in weights.items():
        for ours, theirs in META.items():
            name = name.replace(ours, theirs)
        tensors[f"image_encoder.{name}"] = value
    rest = ("prompt_encoder.not_a_point_embed.weight", "mask_decoder.iou_token.weight")
    return tensors | {name: mx.zeros((1, 6)) for name in rest}


def write(path: Path, tensors: dict[str, mx.array]) -> Path:
    mx.save_safetensors(str(path), tensors)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "sam.safetensors", meta(own()))


def convert(out: Path, *arguments: object) -> int:
    return cli.main(["sam", *map(str, arguments), "--mlx-path", str(out)])


def refusal(capsys, out: Path, *arguments: object) -> str:
    """The one line that a refused conversion says; it leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    assert convert(out, *arguments) == 2
    assert sorted(out.parent.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_metas_file_says_its_sizes_by_its_shapes(checkpoint, tmp_path, capsys):
    assert convert(tmp_path / "out", "--checkpoint", checkpoint) == 0
    assert read_json(tmp_path / "out/config.json") == CONFIG
    said = capsys.readouterr().out
    assert "5x5 tokens of width 6 from 40x40 pixels" in said
    assert "left out 2 of its prompt encoder and mask decoder" in said


@pytest.mark.parametrize(
    ("sizes", "width", "depth", "heads", "everywhere"),
    [
        ("vit_b", 768, 12, 12, [2, 5, 8, 11]),
        ("vit_l", 1024, 24, 16, [5, 11, 17, 23]),
        ("vit_h", 1280, 32, 16, [7, 15, 23, 31]),
    ],
)
def test_metas_three_models(sizes, width, depth, heads, everywhere):
    weights = own(
        image_size=1024,
        patch_size=16,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        mlp_dim=4 * width,
        output_channels=256,
        window_size=14,
        global_attn_indexes=everywhere,
    )  # lazy: only the shapes are looked at
    found = sam_weights.meta_config(meta(weights), sizes)
    assert found == {
        "image_size": 1024,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_dim": 4 * width,
        "output_channels": 256,
        "window_size": 14,
        "global_attn_indexes": everywhere,
        "qkv_bias": True,
    }


def test_another_size_and_type(checkpoint, tmp_path):
    options = "--image-size", 64, "--dtype", "float16"
    assert convert(tmp_path / "out", "--checkpoint", checkpoint, *options) == 0
    weights = read_weights(tmp_path / "out")
    assert weights["pos_embed"].shape == (1, 8, 8, 16)
    assert weights["layers.0.attn.rel_pos_h"].shape == (15, 8)
    assert weights["layers.1.attn.rel_pos_h"].shape == (5, 8)
    assert {value.dtype for value in weights.values()} == {mx.float16}
    assert read_json(tmp_path / "out/preprocessor_config.json")["image_size"] == 64


def test_a_size_that_is_no_multiple_of_the_patch(checkpoint, tmp_path, capsys):
    arguments = "--checkpoint", checkpoint, "--image-size", 65
    assert "expected a multiple of patch_size (8)" in refusal(capsys, tmp_path / "out", *arguments)


def test_a_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    assert convert(tmp_path / "out", "--checkpoint", checkpoint, "--dry-run") == 0
    assert "nothing written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_folder_of_hugging_face_gives_the_same(checkpoint, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    vision = {k: v for k, v in CONFIG.items() if k not in ("model_type", "mlp_dim")}
    vision |= {"mlp_dim": None, "mlp_ratio": 1.5, "num_pos_feats": 3}
    text = json.dumps({"model_type": "sam", "vision_config": vision})
    (folder / "config.json").write_text(text)
    weights = own()
    theirs = {f"vision_encoder.{name}": value for name, value in weights.items()}
    rest = {"shared_image_embedding.positional_embedding": mx.zeros((2, 3))}
    write(folder / "model.safetensors", theirs | rest)
    write(checkpoint, meta(weights))
    assert convert(tmp_path / "a", "--hf-path", folder) == 0
    assert convert(tmp_path / "b", "--checkpoint", checkpoint) == 0
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert read_json(tmp_path / "a/config.json") == read_json(tmp_path / "b/config.json") == CONFIG
    ours = read_weights(tmp_path / "a")
    assert set(ours) == set(weights)
    for name, value in weights.items():
        kernel = value.ndim == 4 and name != "pos_embed"
        assert mx.array_equal(ours[name], value.transpose(0, 2, 3, 1) if kernel else value)


def test_another_encoder_is_sent_to_the_other_command(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "siglip_vision_model"}')
    error = refusal(capsys, tmp_path / "out", "--hf-path", tmp_path / "hf")
    assert "got siglip_vision_model; `agevlm-convert vision`" in error


def test_no_such_file(tmp_path, capsys):
    error = refusal(capsys, tmp_path / "out", "--checkpoint", tmp_path / "sam_vit_b.pth")
    assert "no such file; expected sam_vit_b_01ec64.pth" in error


def test_a_folder_is_no_file(tmp_path, capsys):
    error = refusal(capsys, tmp_path / "out", "--checkpoint", tmp_path)
    assert "--hf-path" in error


def broken(key: str, value: mx.array | None) -> dict[str, mx.array]:
    tensors = meta(own())
    assert tensors.pop(key, None) is not None or value is not None
    return tensors if value is None else tensors | {key: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_encoder.pos_embed", None, "expected a file of Meta's first SAM"),
        ("image_encoder.pos_embed", mx.zeros((25, 16)), "a tensor of shape (25, 16)"),
        ("image_encoder.blocks.1.attn.rel_pos_h", None, "blocks.1.attn.rel_pos_h, got nothing"),
        ("image_encoder.blocks.1.attn.rel_pos_h", mx.zeros((5, 0)), "a tensor of shape (5, 0)"),
        ("image_encoder.blocks.3.norm1.weight", mx.zeros(16), "blocks.3.attn.rel_pos_h"),
        ("image_encoder.blocks.2.attn.rel_pos_h", mx.zeros((7, 8)), "got [5, 7] rows"),
        ("image_encoder.neck.3.bias", None, "missing neck.layer_norm2.bias"),
        ("image_encoder.neck.3.bias", mx.zeros(7), "neck.layer_norm2.bias expected (6,), got (7,)"),
        ("image_encoder.blocks.0.adapter.weight", mx.zeros(3), "unexpected layers.0.adapter"),
        ("memory_encoder.x", mx.zeros(3), "memory_encoder.x is no tensor of SAM's"),
    ],
)
def test_other_files(tmp_path, capsys, key, value, message):
    checkpoint = write(tmp_path / "sam.safetensors", broken(key, value))
    error = refusal(capsys, tmp_path / "out", "--checkpoint", checkpoint)
    assert "sam.safetensors: " in error
    assert message in error


def test_an_existing_folder_is_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    assert "already there" in refusal(capsys, tmp_path / "out", "--checkpoint", checkpoint)
