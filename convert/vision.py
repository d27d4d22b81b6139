"""Convert a Hugging Face vision tower (SigLIP) to this project's encoder weights.

Reads safetensors, or .bin as plain tensors only. The result is a folder with
model.safetensors, config.json and preprocessor_config.json. A two-tower checkpoint gives its
vision half.

example:
  agevlm-convert vision --hf-path google/siglip-base-patch16-224 --mlx-path siglip
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from agevlm_mlx.config import from_dict, read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.vision import VISION_ENCODERS, build_encoder
from agevlm_mlx.weights import assign

from . import rules, source

#: Two-tower ``model_type`` -> the one of its vision half.
_VISION_HALF = {"siglip": "siglip_vision_model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-path", required=True, help="folder or hub id of the checkpoint")
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")


def vision_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Our ``vision_config`` of a Hugging Face ``config.json``.

    Keys that do not change the forward pass (dropout, dtype, versions) are left out.
    """
    kind = config.get("model_type")
    if kind in _VISION_HALF:
        kind, config = _VISION_HALF[kind], config.get("vision_config") or {}
    if kind not in rules.RULES:
        known = ", ".join([*_VISION_HALF, *rules.RULES])
        raise UserError(f"{where}: expected model_type {known}; got {kind!r}")
    config_class, _ = VISION_ENCODERS[kind]
    names = {field.name for field in dataclasses.fields(config_class)}
    table = {name: value for name, value in config.items() if name in names}
    return dataclasses.asdict(from_dict(config_class, {**table, "model_type": kind}, where))


def convert(folder: Path) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The encoder of a Hugging Face folder, its config, and the numbers of keys left out."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected a Hugging Face checkpoint, found no config.json in it")
    config = vision_config(read_json(path), str(path))
    encoder = build_encoder(config)
    tensors = source.read_tensors(folder)
    try:
        kept, dropped = rules.sort_keys(tensors, rules.RULES[config["model_type"]])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    weights = encoder.sanitize({key: tensors[key] for key in kept})
    if len(weights) != len(kept):
        raise UserError(f"{folder}: {len(kept)} keys became {len(weights)}; two name one tensor")
    assign(encoder, weights, folder)
    return encoder, config, dict(dropped)


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    encoder, config, dropped = convert(source.locate(args.hf_path))
    weights = dict(tree_flatten(encoder.parameters()))
    preprocessor = Preprocessor.from_dict(encoder.preprocessing, "preprocessing")
    with source.new_folder(args.mlx_path) as folder:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        for name, table in (
            ("config.json", config),
            ("preprocessor_config.json", preprocessor.to_dict()),
        ):
            text = json.dumps(table, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    size = sum(array.nbytes for array in weights.values())
    left = "".join(f", left out {count} of its {what}" for what, count in dropped.items())
    print(f"{args.mlx_path}: {len(weights)} tensors, {size / 1e6:.1f} MB{left}")
    return 0
