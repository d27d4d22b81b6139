"""The pixels of every published preprocessing, against the library that it is from.

The weights were trained on Pillow's resizing, which is what ours uses: those references have
to agree exactly (but for the last bit of the normalisation). The processors of transformers
that resize with torchvision, its default today, differ by up to two steps of 8 bits.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.image import Preprocessor, load_image
from convert.pixels import read_preprocessing

pytestmark = pytest.mark.parity

#: 1/255 is what the project promises; where Pillow resizes on both sides, nothing but float32's
#: rounding is left.
STEP, EXACT = 1 / 255, 1e-6
#: Odd and even, tall and wide, one pixel thin, smaller and larger than the input.
SHAPES = [
    *((61, 40), (40, 61), (17, 211), (211, 17), (1, 60), (60, 1), (9, 7), (1, 1), (3, 100)),
    *((32, 32), (33, 32), (32, 33), (35, 32), (37, 32), (150, 149), (64, 48), (97, 131)),
]
SIZES = (32, 45)
BOTH = f"32 and 45 px, {len(SHAPES)} shapes"

Reference = Callable[[Image.Image], np.ndarray]


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with hard edges and noise, so that every filter and offset shows."""
    rng = np.random.default_rng([width, height])
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 3 % 256], -1)
    noise = rng.integers(0, 256, (height, width, 3))
    values = np.where(((x // 5 + y // 7) % 2)[..., None] == 0, smooth, noise)
    return Image.fromarray(values.astype(np.uint8))


def difference(preprocessor: Preprocessor, want: np.ndarray, image: Image.Image) -> float:
    """The largest difference of a pixel before normalisation, in 0..1."""
    got, _ = preprocessor(image)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    return float(np.abs((got - want) * np.array(preprocessor.image_std, np.float32)).max())


def worst(preprocessor: Preprocessor, reference: Reference) -> float:
    images = [picture(*shape) for shape in SHAPES]
    return max(difference(preprocessor, reference(image), image) for image in images)


# The references: a folder as published, its preprocessing as ours reads it, and theirs ---------


def processor(transformers: Any, folder: Path, name: str, **settings: Any) -> Reference:
    """A saved Hugging Face processor; `name` ends with "Pil" for the one that resizes with it."""
    made = getattr(transformers, name)(**settings)
    made.save_pretrained(folder)

    def reference(image: Image.Image) -> np.ndarray:
        return np.array(made(image, return_tensors="np").pixel_values[0]).transpose(1, 2, 0)

    return reference


def written(folder: Path, name: str, table: Any) -> Path:
    (folder / name).write_text(json.dumps(table))
    return folder


def tensors(transform: Any) -> Reference:
    return lambda image: transform(image).numpy().transpose(1, 2, 0)


def default(size: int) -> dict[str, Any]:
    """Of an encoder: all of it but the size is replaced by what the files say."""
    return {"image_size": size, "image_mean": [0.1] * 3, "image_std": [9.0] * 3}


NAMES = {"CLIP": "CLIP", "SigLIP": "Siglip", "SAM": "Sam"}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def clip(side: int, crop: int, **more: Any) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": square(crop), **more}


def sam(side: int) -> dict[str, Any]:
    return {"size": {"longest_edge": side}, "pad_size": square(side)}


@pytest.mark.parametrize(
    ("part", "case", "settings"),
    [
        ("CLIP", "32 px", clip(32, 32)),
        ("CLIP", "45 px", clip(45, 45)),
        ("CLIP", "32 px of 41", clip(41, 32)),
        ("CLIP", "45 px of 52", clip(52, 45)),
        ("CLIP", "32 px, Lanczos", clip(32, 32, resample=1)),
        ("CLIP", "32 px, nearest", clip(32, 32, resample=0)),
        ("CLIP", "32 px, not normalised", clip(32, 32, do_normalize=False)),
        ("CLIP", "32 px of 40x40", clip(0, 32) | {"size": square(40)}),
        ("SigLIP", "32 px", {"size": square(32)}),
        ("SigLIP", "45 px", {"size": square(45)}),
        ("SAM", "32 px", sam(32)),
        ("SAM", "45 px", sam(45)),
        ("SAM", "160 px", sam(160)),
    ],
)
def test_image_processors_of_transformers(
    transformers: Any, parity: Any, tmp_path: Path, part: str, case: str, settings: dict[str, Any]
) -> None:
    name = f"{NAMES[part]}ImageProcessorPil"
    reference = processor(transformers, tmp_path, name, **settings)
    ours = read_preprocessing(tmp_path, default(7))
    case = f"{case}, {len(SHAPES)} shapes"
    parity(f"Pixels: {part}", f"transformers.{name}", case, worst(ours, reference), EXACT)


@pytest.mark.parametrize(
    ("part", "settings"),
    [("CLIP", clip(45, 45)), ("SigLIP", {"size": square(45)}), ("SAM", sam(45))],
)
def test_torchvision_resizes_to_other_pixels_than_pillow(
    transformers: Any, tmp_path: Path, part: str, settings: dict[str, Any]
) -> None:
    """Not our difference: it is just as far between the two processors of transformers."""
    name = f"{NAMES[part]}ImageProcessor"
    reference = processor(transformers, tmp_path, name, **settings)
    pillow = processor(transformers, tmp_path / "pil", f"{name}Pil", **settings)
    ours = read_preprocessing(tmp_path, default(7))
    assert ours == read_preprocessing(tmp_path / "pil", default(7))
    std = np.array(ours.image_std)
    theirs = max(
        np.abs((reference(image) - pillow(image)) * std).max()
        for image in (picture(*shape) for shape in SHAPES)
    )
    assert theirs > EXACT
    assert worst(ours, reference) == pytest.approx(theirs, abs=EXACT)


@pytest.mark.parametrize("side", [32, 48])
def test_a_square_picture_of_naflex(
    transformers: Any, parity: Any, tmp_path: Path, side: int
) -> None:
    """Other aspect ratios get another grid there, which ours does not have."""
    made = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=(side // 8) ** 2)
    made.save_pretrained(tmp_path)
    ours = read_preprocessing(tmp_path, default(side))
    figure = 0.0
    for width in (9, 32, 48, 101):
        image = picture(width, width)
        patches = made(image, return_tensors="np").pixel_values[0]
        grid = patches.reshape(side // 8, side // 8, 8, 8, 3).transpose(0, 2, 1, 3, 4)
        figure = max(figure, difference(ours, grid.reshape(side, side, 3), image))
    reference = "transformers.Siglip2ImageProcessorPil"
    parity("Pixels: SigLIP 2 (NaFlex)", reference, f"{side} px, square pictures", figure, EXACT)


@pytest.mark.parametrize(
    ("resize_mode", "interpolation"),
    [("shortest", "bicubic"), ("shortest", "bilinear"), ("longest", "bicubic"), ("squash", None)],
)
def test_open_clip(
    torchvision: Any, parity: Any, tmp_path: Path, resize_mode: str, interpolation: str | None
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    given = {"mean": [0.4, 0.5, 0.6], "resize_mode": resize_mode, "interpolation": interpolation}
    table = {"model_cfg": {}, "preprocess_cfg": given}
    written(tmp_path, "open_clip_config.json", table)
    figure = 0.0
    for size in SIZES:
        ours = read_preprocessing(tmp_path, default(size))
        settings = merge_preprocess_dict(PreprocessCfg(size=size), given)
        reference = tensors(image_transform_v2(PreprocessCfg(**settings), is_train=False))
        figure = max(figure, worst(ours, reference))
    case = f"{resize_mode}, {interpolation or 'bicubic'}, {BOTH}"
    parity("Pixels: open_clip", "open_clip.image_transform_v2", case, figure, EXACT)


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct"),
    [
        *(("center", pct) for pct in (0.875, 0.9, 0.95, 1.0)),
        *((mode, pct) for mode in ("squash", "border") for pct in (0.9, 1.0)),
    ],
)
def test_timm(
    torchvision: Any, parity: Any, tmp_path: Path, crop_mode: str, crop_pct: float
) -> None:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    figure = 0.0
    for size in SIZES:
        given = {
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "std": [0.2, 0.3, 0.4],
        }
        table = {"architecture": "convnext_base", "pretrained_cfg": given}
        ours = read_preprocessing(written(tmp_path, "config.json", table), default(7))
        assert ours.image_size == size
        reference = tensors(create_transform(**resolve_data_config(pretrained_cfg=given)))
        figure = max(figure, worst(ours, reference))
    case = f"{crop_mode}, crop_pct {crop_pct}, {BOTH}"
    parity("Pixels: timm", "timm.create_transform", case, figure, EXACT)


def test_timm_at_another_image_size(torchvision: Any, parity: Any, tmp_path: Path) -> None:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    given = {"input_size": [3, 32, 32]}  # the rest: timm's own assumptions
    table = {"architecture": "convnext_base", **given}
    ours = read_preprocessing(written(tmp_path, "config.json", table), default(7))
    settings = resolve_data_config({"img_size": 51}, pretrained_cfg=given)
    figure = worst(replace(ours, image_size=51), tensors(create_transform(**settings)))
    case = f"32 px converted for 51 px, crop_pct 0.875, {len(SHAPES)} shapes"
    parity("Pixels: timm", "timm.create_transform", case, figure, EXACT)


@pytest.mark.parametrize("size", [32, 45, 64])
def test_segment_anything(torchvision: Any, parity: Any, size: int) -> None:
    """Meta's own: `ResizeLongestSide`, then `Sam.preprocess`, which normalises and pads."""
    import torch
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    encoder = torch.nn.Identity()
    encoder.img_size = size
    model = Sam(encoder, encoder, encoder, mean, std)  # pyright: ignore[reportArgumentType]
    resize = ResizeLongestSide(size)

    def reference(image: Image.Image) -> np.ndarray:
        pixels = torch.as_tensor(resize.apply_image(np.asarray(image))).permute(2, 0, 1)
        return model.preprocess(pixels[None].float())[0].numpy().transpose(1, 2, 0)

    ours = Preprocessor(
        image_size=size,
        resize="pad",
        convention="sam",
        fill="zero",
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )
    case = f"{size} px, {len(SHAPES)} shapes"
    parity("Pixels: SAM", "segment_anything.Sam.preprocess", case, worst(ours, reference), EXACT)


# From any file ------------------------------------------------------------------------------------


def files(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Kind, file, and whether their ``load_image`` decodes it to what ours does."""
    colour = picture(61, 40)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 61).astype(np.uint8), (40, 1)))
    deep = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    palette = colour.quantize(64)
    transparent = colour.copy()
    transparent.putalpha(alpha)
    for mode in ("RGB", "L", "1"):
        yield mode, _saved(folder / f"{mode}.png", colour.convert(mode)), True
    yield "CMYK", _saved(folder / "cmyk.tif", colour.convert("CMYK")), True
    yield "CMYK JPEG", _saved(folder / "cmyk.jpg", colour.convert("CMYK")), True
    yield "palette", _saved(folder / "palette.png", palette), True
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield "EXIF rotation 1 to 8", _saved(folder / f"exif{turn}.jpg", colour, exif=exif), True
    # Transparency: theirs drops it, ours shows it on white.
    yield "RGBA", _saved(folder / "rgba.png", transparent), False
    yield "LA", _saved(folder / "la.png", transparent.convert("LA")), False
    yield "palette, transparent", _saved(folder / "clear.png", palette, transparency=3), False
    # Theirs cuts 16 bits off at 255, ours scales them.
    yield "16-bit grey", _saved(folder / "deep.png", deep), False


def _saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("part", "settings"),
    [("CLIP", clip(41, 32)), ("SigLIP", {"size": square(32)}), ("SAM", sam(45))],
)
def test_any_file(
    transformers: Any, parity: Any, tmp_path: Path, part: str, settings: dict[str, Any]
) -> None:
    """From the file to the pixels. Where the decoders differ on purpose, the reference gets our
    decoded picture."""
    from transformers.image_utils import load_image as theirs

    name = f"{NAMES[part]}ImageProcessorPil"
    reference = processor(transformers, tmp_path, name, **settings)
    ours = read_preprocessing(tmp_path, default(7))
    figures: dict[bool, list[tuple[str, float]]] = {True: [], False: []}
    for kind, path, agree in files(tmp_path):
        image = load_image(path)
        decoded = theirs(str(path))
        assert (np.asarray(decoded) == np.asarray(image)).all() == agree, kind
        want = reference(decoded if agree else image)
        figures[agree].append((kind, difference(ours, want, image)))
    for agree, how in ((True, "from the file"), (False, "from the picture that ours decodes")):
        kinds, values = zip(*figures[agree], strict=True)
        case = f"{how}: {', '.join(dict.fromkeys(kinds))}"
        parity(f"Pixels: {part}", f"transformers.{name}", case, max(values), EXACT)
