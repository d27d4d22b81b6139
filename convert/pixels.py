"""The pixel preprocessing that a published vision tower was trained with.

Three families of files describe it: Hugging Face image processors, open_clip and timm. What a
file leaves out is what its library would assume.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from agevlm_mlx.config import read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError

_OPENAI = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
#: Pillow's codes, as preprocessor_config.json has them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
#: Image processors of Hugging Face, without "ImageProcessor" and the like: what each assumes
#: where its file says nothing.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {
        "size": {"shortest_edge": 224},
        "crop_size": 224,
        "do_center_crop": True,
        "resample": 3,
        "image_mean": _OPENAI["mean"],
        "image_std": _OPENAI["std"],
    },
    "Siglip": {
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    # NaFlex: no size. A square picture becomes a square; ours stretches the others to it too.
    "Siglip2": {
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "Sam": {
        "size": {"longest_edge": 1024},
        "do_pad": True,
        "pad_size": 1024,
        "resample": 2,
        "image_mean": _IMAGENET["mean"],
        "image_std": _IMAGENET["std"],
    },
}


def read_preprocessing(folder: Path, default: Mapping[str, Any]) -> Preprocessor:
    """The preprocessing in a checkpoint folder, or `default` when it has no file about it.

    ``UserError`` names the key of what this project cannot do exactly.
    """
    config = folder / "config.json"
    table = _table(config) if config.is_file() else {}
    open_clip = folder / "open_clip_config.json"
    if "model_type" not in table and open_clip.is_file():
        values = _open_clip(_Keys(_table(open_clip), open_clip).inside("preprocess_cfg"))
    elif "architecture" in table:
        keys = _Keys(table, config)
        values = _timm(keys.inside("pretrained_cfg") if "pretrained_cfg" in table else keys)
    else:
        keys = _image_processor(folder)
        values = _hugging_face(keys) if keys else {**default}
    return Preprocessor.from_dict({"image_size": default["image_size"]} | values)


class _Keys:
    """Values of a JSON table, with errors that say where they are."""

    def __init__(self, table: Any, where: Path | str) -> None:
        if not isinstance(table, Mapping):
            raise UserError(f"{where}: expected a table, got {table!r}")
        self.table, self.where = table, where

    def __contains__(self, key: str) -> bool:
        return self.table.get(key) is not None  # null is as good as absent in all of them

    def wrong(self, key: str, expected: str) -> UserError:
        found = repr(self.table[key]) if key in self.table else "nothing"
        return UserError(f"{self.where}: {key}: expected {expected}, got {found}")

    def inside(self, key: str) -> "_Keys":
        return _Keys(self.table[key] if key in self else {}, f"{self.where}: {key}")

    def choice(self, key: str, options: Mapping[Any, str], default: Any) -> str:
        value = self.table[key] if key in self else default
        if isinstance(value, bool | list | dict) or value not in options:
            raise self.wrong(key, " or ".join(map(repr, options)))
        return options[value]

    def flag(self, key: str, default: bool) -> bool:
        value = self.table[key] if key in self else default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def demand(self, key: str, value: bool) -> None:
        if self.flag(key, value) != value:
            raise self.wrong(key, "true" if value else "false")

    def colour(self, key: str, default: list[float], above: float = -math.inf) -> list[float]:
        value: Any = self.table[key] if key in self else default
        value = [value] * 3 if _is_number(value) else value
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise self.wrong(key, "3 numbers")
        if min(value) <= above:
            raise self.wrong(key, f"3 numbers above {above:g}")
        return value


def _table(path: Path) -> Mapping[str, Any]:
    return _Keys(read_json(path), path).table


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _open_clip(keys: _Keys) -> dict[str, Any]:
    """open_clip's ``image_transform`` for inference. It crops with torchvision."""
    keys.choice("mode", {"RGB": "RGB"}, "RGB")
    modes = {"shortest": "crop", "longest": "pad", "squash": "stretch"}
    resize = keys.choice("resize_mode", modes, "shortest")
    # "random" is for training; for inference it means bicubic.
    names = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
    values = {
        "resize": resize,
        "resample": keys.choice("interpolation", names, "bicubic"),
        "image_mean": keys.colour("mean", _OPENAI["mean"]),
        "image_std": keys.colour("std", _OPENAI["std"], above=0),
    }
    if resize == "pad":
        values["fill"] = keys.choice("fill_color", {0: "black"}, 0)
    if resize != "stretch":
        values["convention"] = "torchvision"
    return values


def _timm(keys: _Keys) -> dict[str, Any]:
    """timm's ``create_transform`` for evaluation. It crops with torchvision."""
    crop_pct = keys.table["crop_pct"] if "crop_pct" in keys else 0.875
    if not _is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise keys.wrong("crop_pct", "a number above 0, at most 1")
    values = {
        "resize": keys.choice(
            "crop_mode", {"center": "crop", "squash": "stretch", "border": "pad"}, "center"
        ),
        "resample": keys.choice(
            "interpolation", {name: name for name in _RESAMPLE.values()}, "bicubic"
        ),
        "crop_pct": crop_pct,
        "convention": "torchvision",
        "image_mean": keys.colour("mean", _IMAGENET["mean"]),
        "image_std": keys.colour("std", _IMAGENET["std"], above=0),
    }
    if "input_size" in keys:
        size = keys.table["input_size"]
        if (
            not isinstance(size, list)
            or len(size) != 3
            or not all(map(_is_side, size))
            or size[0] != 3
            or size[1] != size[2]
        ):
            raise keys.wrong("input_size", "[3, side, side]")
        values["image_size"] = size[1]
    return values


def _image_processor(folder: Path) -> _Keys | None:
    """The settings of a Hugging Face image processor; they may be inside the processor's."""
    path = folder / "processor_config.json"
    if path.is_file():
        keys = _Keys(_table(path), path)
        if "image_processor" in keys:  # comes first, as in transformers
            return keys.inside("image_processor")
    path = folder / "preprocessor_config.json"
    return _Keys(_table(path), path) if path.is_file() else None


def _hugging_face(keys: _Keys) -> dict[str, Any]:
    """Resize, crop, rescale, normalise and pad, in this order (transformers)."""
    assumed = _PROCESSORS[_processor(keys)]
    for key in ("do_resize", "do_rescale"):
        keys.demand(key, True)
    factor = keys.table["rescale_factor"] if "rescale_factor" in keys else 1 / 255
    if not _is_number(factor) or abs(factor * 255 - 1) > 1e-6:
        raise keys.wrong("rescale_factor", f"1/255 ({1 / 255})")
    values: dict[str, Any] = {
        "resample": keys.choice("resample", _RESAMPLE, assumed["resample"]),
        "image_mean": keys.colour("image_mean", assumed["image_mean"]),
        "image_std": keys.colour("image_std", assumed["image_std"], above=0),
    }
    if not keys.flag("do_normalize", True):
        values |= {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    if "size" not in assumed:
        return values | {"resize": "stretch"}
    kind, side = _size(keys, assumed["size"])
    crops = keys.flag("do_center_crop", assumed.get("do_center_crop", False))
    if kind == "longest_edge":
        keys.demand("do_center_crop", False)
        keys.demand("do_pad", True)
        if _square(keys, "pad_size", assumed.get("pad_size")) != side:
            raise keys.wrong("pad_size", f"the side of size ({side})")
        return values | {"image_size": side, "resize": "pad", "convention": "sam", "fill": "zero"}
    keys.demand("do_pad", False)
    if not crops:
        if kind == "shortest_edge":
            raise keys.wrong("do_center_crop", "true, since size has a shortest_edge")
        return values | {"image_size": side, "resize": "stretch"}
    crop = _square(keys, "crop_size", assumed.get("crop_size"))
    if crop > side:
        raise keys.wrong("crop_size", f"at most the side of size ({side})")
    return values | {
        "image_size": crop,
        "resize": "crop" if kind == "shortest_edge" else "stretch",
        "convention": "transformers",
        "crop_pct": _crop_pct(crop, side),
    }


def _processor(keys: _Keys) -> str:
    """Which of `_PROCESSORS` the file is for."""
    for key in ("image_processor_type", "feature_extractor_type"):
        name = keys.table.get(key)
        if name is not None:
            for known in _PROCESSORS:
                classes = [f"{known}{end}" for end in ("ImageProcessor", "FeatureExtractor")]
                if name in (*classes, f"{known}ImageProcessorFast", f"{known}ImageProcessorPil"):
                    return known
            break
    else:
        key = "image_processor_type"
    raise keys.wrong(key, " or ".join(f"{known}ImageProcessor" for known in _PROCESSORS))


def _size(keys: _Keys, assumed: Mapping[str, int]) -> tuple[str, int]:
    """What ``size`` fixes (its key; "square" for both sides) and to how many pixels."""
    size: Any = keys.table["size"] if "size" in keys else assumed
    # Only SAM's processor takes a longest_edge, and nothing else.
    alone = "longest_edge" if "longest_edge" in assumed else "shortest_edge"
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) == {alone} and _is_side(given[alone]):
            return alone, given[alone]
    if alone == "longest_edge":
        raise keys.wrong("size", "{'longest_edge': side}")
    if alone in assumed and _is_side(size):  # CLIP's old files
        return alone, size
    return "square", _square(keys, "size", assumed)


def _square(keys: _Keys, key: str, assumed: Any) -> int:
    """The side of ``key``, which says height and width."""
    value: Any = keys.table[key] if key in keys else assumed
    sides = [value, value]
    if isinstance(value, Mapping):
        given = {name: side for name, side in value.items() if side is not None}
        sides = [given.pop("height", None), given.pop("width", None), *given.values()]
    elif isinstance(value, list):
        sides = value
    if len(sides) != 2 or not all(map(_is_side, sides)) or sides[0] != sides[1]:
        raise keys.wrong(key, "equal height and width")
    return sides[0]


def _crop_pct(crop: int, side: int) -> float:
    """The largest share with floor(crop / share) == side: in floats, crop / side may miss it."""
    share = crop / side
    while math.floor(crop / share) < side:
        share = math.nextafter(share, 0)
    return share
