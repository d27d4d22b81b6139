"""Convert a published vision tower to this project's encoder weights.

Reads Hugging Face, open_clip and timm checkpoints: safetensors, or PyTorch pickles as plain
tensors only. The result is a folder with model.safetensors, config.json and
preprocessor_config.json. A two-tower checkpoint gives its vision half.

examples:
  agevlm-convert vision --hf-path google/siglip-base-patch16-224 --mlx-path siglip
  agevlm-convert vision --hf-path openai/clip-vit-large-patch14-336 --mlx-path clip --dry-run
  agevlm-convert vision --hf-path laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft \\
    --image-size 512 --mlx-path convnext
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from agevlm_mlx.config import from_dict, read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import Rule, apply_rules, check_shapes
from agevlm_mlx.models.vision import VISION_ENCODERS, build_encoder, fitted
from agevlm_mlx.weights import read_weights, shipped, write_weights

from . import clip, convnext, pixels, sam_weights, siglip, source


@dataclass(frozen=True)
class Foreign:
    """How one architecture of other people's checkpoints becomes one of ours."""

    #: Their configuration and its path -> our ``vision_config``, without ``model_type``.
    config: Callable[[Mapping[str, Any], str], dict[str, Any]]
    #: Our ``vision_config`` -> what happens to each of their keys.
    rules: Callable[[Mapping[str, Any]], Sequence[Rule]]
    #: Our ``vision_config.model_type``.
    model_type: str


#: Their architecture -> ours. Hugging Face: ``model_type`` of config.json; timm and open_clip
#: checkpoints: "timm" and "open_clip".
FOREIGN: dict[str, Foreign] = {
    "clip_vision_model": Foreign(clip.config, clip.rules, "clip_vision_model"),
    "timm": Foreign(convnext.timm_config, convnext.rules, "convnext_clip"),
    "open_clip": Foreign(convnext.open_clip_config, convnext.rules, "convnext_clip"),
    "siglip_vision_model": Foreign(siglip.config, siglip.rules, "siglip_vision_model"),
    "siglip2_vision_model": Foreign(
        siglip.naflex_config, siglip.naflex_rules, "siglip2_vision_model"
    ),
    "sam_vision_model": Foreign(sam_weights.config, sam_weights.rules, "sam_vision_model"),
}
#: Two-tower ``model_type`` -> the one of its vision half.
_VISION_HALF = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "sam": "sam_vision_model",
}


@dataclass
class Converted:
    """An encoder's weights (lazy, to be taken out one by one) and what belongs to them."""

    weights: dict[str, mx.array]
    config: dict[str, Any]
    preprocessor: Preprocessor
    #: Reason -> how many keys were left out for it.
    dropped: Counter[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-path", required=True, help="folder or hub id of the checkpoint")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What `save` and `open_encoder` take."""
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--image-size",
        type=int,
        help="pixels of a side of the input (default: the checkpoint's own); position embeddings "
        "are interpolated",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


DTYPES = ("float32", "float16", "bfloat16")


def foreign_config(folder: Path) -> tuple[str, dict[str, Any], str]:
    """Their architecture (a key of `FOREIGN`), its configuration and the file it is from."""
    path = folder / "config.json"
    open_clip = folder / "open_clip_config.json"
    table = read_json(path) if path.is_file() else {}
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a table, got {type(table).__name__}")
    if "model_type" not in table and open_clip.is_file():
        return "open_clip", read_json(open_clip), str(open_clip)
    if "architecture" in table:
        return "timm", table, str(path)
    if not table:
        raise UserError(
            f"{folder}: expected a Hugging Face, open_clip or timm checkpoint, found no "
            "config.json in it"
        )
    kind = table.get("model_type")
    if isinstance(kind, str) and kind in _VISION_HALF:
        kind, table = _VISION_HALF[kind], table.get("vision_config") or {}
    if not isinstance(kind, str) or kind not in FOREIGN:
        known = ", ".join([*_VISION_HALF, *FOREIGN])
        raise UserError(f"{path}: expected model_type {known}; got {kind!r}")
    return kind, table, str(path)


@contextmanager
def open_encoder(
    folder: Path, image_size: int | None = None, weights: Path | None = None
) -> Iterator[Converted]:
    """The encoder in a foreign checkpoint folder, its tensors read when they are evaluated.

    image_size: another input size than the checkpoint's. weights: a file or folder with the
    weights, when they lie elsewhere. ``UserError`` when anything does not fit.
    """
    kind, table, where = foreign_config(folder)
    foreign = FOREIGN[kind]
    config_class, _ = VISION_ENCODERS[foreign.model_type]
    own = {**foreign.config(table, where), "model_type": foreign.model_type}
    native = from_dict(config_class, own, where)
    config = asdict(native)
    preprocessor = pixels.read_preprocessing(folder, build_encoder(config).preprocessing)
    if image_size is None:
        preprocessor = _seen(config, replace(preprocessor, image_size=config["image_size"]), where)
    encoder = _resized(config, image_size)
    preprocessor = replace(preprocessor, image_size=config["image_size"])
    with source.open_tensors(weights or folder) as tensors:
        ours, dropped = renamed(tensors, foreign.rules(config), encoder, folder)
        yield Converted(ours, config, preprocessor, dropped)


def renamed(
    tensors: dict[str, mx.array], its_rules: Sequence[Rule], encoder: Any, where: object
) -> tuple[dict[str, mx.array], Counter[str]]:
    """A checkpoint's tensors as `encoder` has them, and what was left out (`apply_rules`);
    `tensors` is emptied, so that memory holds each of them once."""
    ours, dropped = apply_rules(tensors, its_rules, where)
    tensors.clear()
    for name in list(ours):
        ours[name] = fitted(encoder, name, ours[name])
    check_shapes(encoder, ours, where)
    return ours, dropped


def _seen(config: dict[str, Any], preprocessor: Preprocessor, where: str) -> Preprocessor:
    """Make the input of a tower whose patches do not fill it as large as what they cover.

    SigLIP so400m has 27 patches of 14 px in 384: six rows and columns are resized and never
    seen. Here the picture is resized as before and cut at the right and at the bottom, so that
    the tower sees the same pixels and each token's cell is exactly where the token looks.
    """
    size, patch = config["image_size"], config.get("patch_size", 1)
    seen = size - size % patch
    if seen == size:
        return preprocessor
    if preprocessor.resize != "stretch":
        raise UserError(
            f"{where}: expected an image_size that is a multiple of patch_size ({patch}), got "
            f"{size}; pass --image-size {seen}"
        )
    config["image_size"] = seen
    crop_pct = preprocessor.crop_pct * seen / size
    return replace(preprocessor, image_size=seen, crop_pct=crop_pct, convention="sam")


def _resized(config: dict[str, Any], image_size: int | None) -> Any:
    """The encoder of `config`, which gets the wanted input size, if one is."""
    if image_size is not None:
        unit = config.get("patch_size", 1)
        if image_size < 1 or image_size % unit:
            raise UserError(f"--image-size: expected a multiple of {unit}, got {image_size}")
        config["image_size"] = image_size
    return build_encoder(config)


@contextmanager
def open_vision(where: str, image_size: int | None = None) -> Iterator[Converted]:
    """The same for what a user names: a hub id, a foreign folder, a folder that `save` or
    ``scripts/train_encoder.py`` made, or "shipped"."""
    folder = shipped("encoder") if where == "shipped" else source.locate(where)
    path = folder / "config.json"
    table = read_json(path) if path.is_file() else {}
    embedded = isinstance(table, dict) and "model_type" not in table and _is_ours(folder)
    if embedded and isinstance(table.get("vision_config"), dict):
        table = table["vision_config"]
    elif not (
        isinstance(table, dict)
        and str(table.get("model_type")) in VISION_ENCODERS
        and (folder / "preprocessor_config.json").is_file()
        and _is_ours(folder)
    ):
        with open_encoder(folder, image_size) as converted:
            yield converted
        return
    kind = str(table.get("model_type"))
    if kind not in VISION_ENCODERS:
        known = ", ".join(VISION_ENCODERS)
        raise UserError(f"{path}: vision_config.model_type: expected one of {known}, got {kind!r}")
    config_class, _ = VISION_ENCODERS[kind]
    config = asdict(from_dict(config_class, table, str(path)))
    encoder = _resized(config, image_size)
    stored = folder / "preprocessor_config.json"
    settings = read_json(stored) if stored.is_file() else encoder.preprocessing
    preprocessor = Preprocessor.from_dict(settings, str(stored))
    preprocessor = replace(preprocessor, image_size=config["image_size"])
    weights = {k: fitted(encoder, k, v) for k, v in read_weights(folder).items()}
    check_shapes(encoder, weights, folder)
    yield Converted(weights, config, preprocessor, Counter())


def _is_ours(folder: Path) -> bool:
    """Whether an encoder folder is in MLX's layout: its weight file says so, as the hub's MLX
    checkpoints do. Hugging Face's own files have the same config and names."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return False
    return source.metadata(file).get("format") == "mlx"


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    with open_vision(args.hf_path, args.image_size) as converted:
        return save(converted, args)


def save(converted: Converted, args: argparse.Namespace) -> int:
    """Write an encoder folder, or with ``--dry-run`` say what it would be."""
    weights = converted.weights
    if args.dtype:
        dtype = getattr(mx, args.dtype)
        weights = {name: value.astype(dtype) for name, value in weights.items()}
        converted.weights.clear()
    count, size = len(weights), sum(array.nbytes for array in weights.values())
    encoder = build_encoder(converted.config)
    grid = "x".join(map(str, encoder.grid))
    if not args.dry_run:
        with source.new_folder(args.mlx_path) as folder:
            write_weights(folder, weights)
            for name, table in (
                ("config.json", converted.config),
                ("preprocessor_config.json", converted.preprocessor.to_dict()),
            ):
                text = json.dumps(table, indent=2, sort_keys=True) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
    left = "".join(f"; left out {n} of its {what}" for what, n in converted.dropped.items())
    would = " (dry run: nothing written)" if args.dry_run else ""
    print(
        f"{args.mlx_path}: {converted.config['model_type']}, {count} tensors, "
        f"{size / 1e6:.1f} MB, {grid} tokens of width {encoder.width} from "
        f"{converted.config['image_size']}x{converted.config['image_size']} pixels{left}{would}"
    )
    return 0
