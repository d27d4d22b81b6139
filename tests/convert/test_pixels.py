"""What the files beside a published vision tower say about its pixels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from convert.pixels import read_preprocessing

DEFAULT = {"image_size": 64, "resize": "pad", "image_mean": [0.5, 0.5, 0.5]}
OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CLIP = {"image_processor_type": "CLIPImageProcessor"}
SIGLIP = {"image_processor_type": "SiglipImageProcessor"}
SAM = {"image_processor_type": "SamImageProcessor"}
HF, NESTED, CONFIG = "preprocessor_config.json", "processor_config.json", "config.json"
OPEN_CLIP = "open_clip_config.json"


def read(folder: Path, **tables: Any) -> Preprocessor:
    """`tables`: a file's name without ".json" -> what is in it."""
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return read_preprocessing(folder, DEFAULT)


def clip(**fields: Any) -> Preprocessor:
    base: dict[str, Any] = {"image_size": 224, "resize": "crop", "resample": "bicubic", **OPENAI}
    return Preprocessor(**(base | {"convention": "transformers"} | fields))


def test_without_a_file_it_is_the_encoder_s_own(tmp_path: Path) -> None:
    assert read(tmp_path) == Preprocessor.from_dict(DEFAULT)
    assert read(tmp_path, config={"model_type": "clip"}) == Preprocessor.from_dict(DEFAULT)
    # A processor without images, and a checkpoint that is one file.
    assert read(tmp_path, processor_config={"a": 1}) == Preprocessor.from_dict(DEFAULT)
    assert read_preprocessing(tmp_path / CONFIG, DEFAULT) == Preprocessor.from_dict(DEFAULT)


OLD_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(OPENAI["image_mean"]),
    "image_std": list(OPENAI["image_std"]),
    "resample": 3,
    "size": 224,
}


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (OLD_CLIP, clip()),
        (CLIP, clip()),
        (CLIP | {"image_mean": None, "crop_size": None, "unheard_of": 3}, clip()),
        (
            {"image_processor_type": "CLIPImageProcessorFast", "resample": 2},
            clip(resample="bilinear"),
        ),
        (CLIP | {"size": {"shortest_edge": 256}}, clip(crop_pct=224 / 256)),
        (CLIP | {"size": [224, 224]}, clip(resize="stretch")),
        (CLIP | {"rescale_factor": 0.00392156862745098, "do_pad": False}, clip()),
        (
            CLIP | {"do_normalize": False},
            clip(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0)),
        ),
        (CLIP | {"image_mean": 0.5}, clip(image_mean=(0.5, 0.5, 0.5))),
        (
            SIGLIP | {"size": {"height": 384, "width": 384, "longest_edge": None}},
            Preprocessor(image_size=384, resize="stretch", resample="bicubic"),
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256},
            Preprocessor(image_size=64, resize="stretch", resample="bilinear"),
        ),
        (
            SAM,
            Preprocessor(image_size=1024, convention="sam", fill="zero", **IMAGENET),
        ),
    ],
)
def test_hugging_face(tmp_path: Path, table: dict[str, Any], wanted: Preprocessor) -> None:
    assert read(tmp_path, preprocessor_config=table) == wanted


def test_the_processor_s_file_comes_before_the_image_processor_s(tmp_path: Path) -> None:
    nested = {"image_processor": SIGLIP, "processor_class": "SiglipProcessor"}
    found = read(tmp_path, processor_config=nested, preprocessor_config=CLIP)
    assert found.resize == "stretch"


@pytest.mark.parametrize(
    ("side", "crop"), [(s, c) for s in (72, 256, 257, 438) for c in (7, 64, 72)]
)
def test_the_resized_side_survives_being_a_share(tmp_path: Path, side: int, crop: int) -> None:
    table = CLIP | {"size": {"shortest_edge": side}, "crop_size": crop}
    found = read(tmp_path, preprocessor_config=table)
    geometry = found.geometry(side, 2 * side)
    assert (found.image_size, geometry.scale_x) == (crop, 1)
    # At twice the input size, twice the picture is resized, to a pixel.
    assert replace(found, image_size=2 * crop).geometry(side, side).scale_x == pytest.approx(
        2, abs=1 / side
    )


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ({}, {"resize": "crop", "convention": "torchvision"}),
        (
            {"preprocess_cfg": {"mean": [0, 0, 0.5], "std": 0.5, "interpolation": "bilinear"}},
            {
                "resize": "crop",
                "convention": "torchvision",
                "resample": "bilinear",
                "image_mean": (0.0, 0.0, 0.5),
                "image_std": (0.5, 0.5, 0.5),
            },
        ),
        ({"preprocess_cfg": {"resize_mode": "squash", "fill_color": 9}}, {"resize": "stretch"}),
        (
            {"preprocess_cfg": {"resize_mode": "longest", "interpolation": "random"}},
            {"resize": "pad", "convention": "torchvision", "fill": "black"},
        ),
    ],
)
def test_open_clip(tmp_path: Path, table: dict[str, Any], fields: dict[str, Any]) -> None:
    wanted: dict[str, Any] = {"image_size": 64, "resample": "bicubic", **OPENAI} | fields
    assert read(tmp_path, open_clip_config=table) == Preprocessor(**wanted)
    # timm's copies of CLIP towers have both files, and are read as open_clip's.
    assert read(tmp_path, config={"architecture": "vit"}) == Preprocessor(**wanted)
    # A Hugging Face checkpoint beside it has its own processor.
    found = read(tmp_path, config={"model_type": "clip"}, preprocessor_config=CLIP)
    assert found.convention == "transformers"


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ({}, {"crop_pct": 0.875}),
        ({"crop_pct": 1, "crop_mode": "squash"}, {"crop_pct": 1.0, "resize": "stretch"}),
        (
            {"input_size": [3, 320, 320], "crop_pct": 0.9, "crop_mode": "border"},
            {"image_size": 320, "crop_pct": 0.9, "resize": "pad"},
        ),
        (
            {"interpolation": "lanczos", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": None},
            {
                "crop_pct": 0.875,
                "resample": "lanczos",
                "image_mean": (0.5, 0.5, 0.5),
                "image_std": (0.25, 0.25, 0.25),
            },
        ),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_timm(tmp_path: Path, table: dict[str, Any], fields: dict[str, Any], nested: bool) -> None:
    base: dict[str, Any] = {"image_size": 64, "resize": "crop", "resample": "bicubic", **IMAGENET}
    wanted = Preprocessor(**(base | {"convention": "torchvision"} | fields))
    config = {"architecture": "convnext_base"} | ({"pretrained_cfg": table} if nested else table)
    assert read(tmp_path, config=config) == wanted


@pytest.mark.parametrize(
    ("name", "table", "key", "message"),
    [
        (HF, CLIP | {"do_resize": False}, "do_resize", "expected true, got False"),
        (HF, CLIP | {"do_rescale": False}, "do_rescale", "expected true, got False"),
        (HF, CLIP | {"do_rescale": "yes"}, "do_rescale", "expected true or false, got 'yes'"),
        (HF, CLIP | {"rescale_factor": 1}, "rescale_factor", r"expected 1/255 \(0.0039.*\), got 1"),
        (HF, CLIP | {"do_pad": True}, "do_pad", "expected false, got True"),
        (HF, CLIP | {"do_center_crop": False}, "do_center_crop", "expected true, since size has"),
        (
            HF,
            CLIP | {"crop_size": {"height": 2, "width": 3}},
            "crop_size",
            "equal height and width",
        ),
        (HF, CLIP | {"crop_size": 225}, "crop_size", r"at most the side of size \(224\), got 225"),
        (HF, CLIP | {"size": {"shortest_edge": 9, "longest_edge": 9}}, "size", "equal height"),
        (HF, CLIP | {"size": "big"}, "size", "equal height and width, got 'big'"),
        (HF, CLIP | {"resample": 5}, "resample", "expected 0 or 1 or 2 or 3, got 5"),
        (HF, CLIP | {"resample": True}, "resample", "expected 0 or 1 or 2 or 3, got True"),
        (HF, CLIP | {"image_mean": [0.5]}, "image_mean", r"expected 3 numbers, got \[0.5\]"),
        (HF, CLIP | {"image_std": [0, 1, 1]}, "image_std", "3 numbers above 0, got"),
        (HF, SIGLIP | {"size": {"height": 384, "width": 256}}, "size", "equal height and width"),
        (HF, SIGLIP | {"size": {"height": 384}}, "size", "equal height and width"),
        (HF, SIGLIP | {"do_center_crop": True}, "crop_size", "got nothing"),
        (HF, SAM | {"size": 1024}, "size", "expected {'longest_edge': side}, got 1024"),
        (HF, SAM | {"pad_size": 512}, "pad_size", r"the side of size \(1024\), got 512"),
        (HF, SAM | {"do_pad": False}, "do_pad", "expected true, got False"),
        (HF, SAM | {"do_center_crop": True}, "do_center_crop", "expected false, got True"),
        (
            HF,
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type",
            "expected CLIPImageProcessor or .*, got 'ViTImageProcessor'",
        ),
        (HF, {"feature_extractor_type": "X"}, "feature_extractor_type", "got 'X'"),
        (HF, {"size": 224}, "image_processor_type", "got nothing"),
        (HF, [], "", r"expected a table, got \[\]"),
        (
            NESTED,
            {"image_processor": CLIP | {"do_rescale": False}},
            "image_processor: do_rescale",
            "expected true",
        ),
        (OPEN_CLIP, {"preprocess_cfg": {"mode": "L"}}, "preprocess_cfg: mode", "'RGB', got 'L'"),
        (OPEN_CLIP, {"preprocess_cfg": {"resize_mode": "wide"}}, "resize_mode", "'shortest' or"),
        (OPEN_CLIP, {"preprocess_cfg": {"interpolation": "box"}}, "interpolation", "'bicubic' or"),
        (
            OPEN_CLIP,
            {"preprocess_cfg": {"resize_mode": "longest", "fill_color": 127}},
            "fill_color",
            "expected 0, got 127",
        ),
        (OPEN_CLIP, {"preprocess_cfg": 3}, "preprocess_cfg", "expected a table, got 3"),
        (CONFIG, {"architecture": "x", "crop_pct": 1.1}, "crop_pct", "at most 1, got 1.1"),
        (CONFIG, {"architecture": "x", "crop_mode": "left"}, "crop_mode", "'center' or"),
        (CONFIG, {"architecture": "x", "interpolation": "box"}, "interpolation", "'nearest' or"),
        (
            CONFIG,
            {"architecture": "x", "pretrained_cfg": {"input_size": [3, 224, 288]}},
            "pretrained_cfg: input_size",
            r"expected \[3, side, side\], got \[3, 224, 288\]",
        ),
        (CONFIG, {"architecture": "x", "input_size": [1, 8, 8]}, "input_size", "3, side, side"),
        (CONFIG, {"architecture": "x", "mean": [0, 0, None]}, "mean", "3 numbers"),
    ],
)
def test_what_ours_cannot_do_is_one_line(
    tmp_path: Path, name: str, table: Any, key: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, **{name.removesuffix(".json"): table})
    assert name in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
