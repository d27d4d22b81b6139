"""From any image file to the model's pixels, and from there back to the picture.

One `Geometry` describes the resize, crop or padding of an image exactly, so that masks,
boxes and attention maps take the same way as the pixels, in both directions. PIL and numpy
only.
"""

import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ..config import from_dict
from ..errors import UserError, one_line

#: What a picture may be given as: a path, the bytes of a file, or a PIL image.
ImageSource = str | Path | bytes | Image.Image
#: What is opened, whatever a file is called. Not all that Pillow can: its EPS, for one, runs
#: Ghostscript on the program that such a file is.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
#: Pixels beyond which an image is refused before it is decoded.
MAX_PIXELS = 50_000_000
#: Pixels that are converted to RGB at a time.
_BAND = 4_000_000
#: What an iPhone's photos are called in their first bytes.
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Decode an image as upright RGB.

    Any mode becomes 8-bit RGB (transparency over white, 16-bit and float scaled), EXIF
    rotation is applied, an animation gives its first frame. ``UserError`` for what is
    missing, no image, truncated, empty or larger than `max_pixels`; it begins with `name`
    (default: the path, or "image").
    """
    if isinstance(source, Image.Image):
        return _upright(source, name or "image", max_pixels)
    name = name or ("image" if isinstance(source, bytes) else str(source))
    with open_image(source, name) as image:  # closes the file, also of a damaged one
        return _upright(image, name, max_pixels)


def _upright(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise UserError(f"{name}: expected an image with pixels, got {width}x{height}")
    if width * height > max_pixels:
        raise UserError(
            f"{name}: expected at most {max_pixels / 1e6:g} megapixels, got {width}x{height}; "
            "make it smaller first"
        )
    try:
        image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except Exception as error:  # on damaged data a decoder may raise anything
        raise UserError(f"{name}: damaged or truncated image: {one_line(error)}") from None


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """`FORMATS`, as far as this Pillow was built with them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_heic(source: str | Path | bytes) -> bool:
    """Whether these are the first bytes of a HEIC or HEIF photo, which Pillow cannot read."""
    try:
        if isinstance(source, bytes):
            head = source[:64]
        else:
            with Path(source).expanduser().open("rb") as file:
                head = file.read(64)
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a ~user unknown here
        return False
    if head[4:8] != b"ftyp":
        return False
    # Its own brand, a version, then the brands that it is compatible with.
    brands = head[8 : int.from_bytes(head[:4], "big")]
    return any(brands[at : at + 4] in _HEIC for at in range(0, len(brands), 4))


def open_image(source: str | Path | bytes, name: str) -> Image.Image:
    """A file as Pillow opens it, its pixels not yet read; beware of its size.

    ``UserError``, which begins with `name`, for what is missing, no image, or a bomb.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit is checked right after, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, bytes):
                return Image.open(io.BytesIO(source), formats=_formats())
            path = Path(source).expanduser()
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{name}: expected an image file, got a pipe or a device")
            return Image.open(path, formats=_formats())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{name}: expected an image file, got a folder") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name}: too many pixels to decode safely; make it smaller first"
        ) from None
    except PermissionError:
        raise UserError(f"{name}: not readable (permission denied)") from None
    except Exception:  # on damaged data a decoder may raise anything
        if _is_heic(source):
            raise UserError(f"{name}: a HEIC photo cannot be read yet; export it as JPEG") from None
        raise UserError(
            f"{name}: not an image that can be read (expected PNG, JPEG, ...)"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB: transparency over white, 16-bit and float scaled."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in ("I", "F"):  # no fixed range: 8-bit, 16-bit or 0..1 numbers
        values = np.asarray(image, np.float64)
        values = np.where(np.isfinite(values), values, 0)
        peak = float(values.max())
        top = next((t for t in (1.0, 255.0, 65535.0) if peak <= t), peak)
        return _scaled(values, 255.0 if image.mode == "I" and peak <= 255 else top)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        return _in_bands(image, lambda band: _scaled(np.asarray(band, np.float64), 65535.0))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _in_bands(image, _over_white)
    return image.convert("RGB")


def _scaled(values: np.ndarray, top: float) -> Image.Image:
    return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` some rows at a time: what it needs in between is many times the picture."""
    whole = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(convert(band), (0, top))
    return whole


@lru_cache(maxsize=64)
def _area_weights(source: int, scale: float, offset: float, size: int, cells: int) -> np.ndarray:
    """f32 [cells source]: the share of each cell of the input that each source pixel covers."""
    edges = np.arange(source + 1) * scale + offset
    borders = np.linspace(0, size, cells + 1)
    low = np.maximum(edges[:-1][None], borders[:-1][:, None])
    high = np.minimum(edges[1:][None], borders[1:][:, None])
    return (np.maximum(high - low, 0) / (size / cells)).astype(np.float32)


@dataclass(frozen=True)
class Geometry:
    """How a picture of width x height px became image_size x image_size input px:
    ``input = source * scale + offset`` along each axis."""

    width: int
    height: int
    image_size: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    @property
    def filled(self) -> float:
        """The share of the input's area that shows the picture; padding is the rest."""
        wide, high = self.width * self.scale_x, self.height * self.scale_y
        return min(wide / self.image_size, 1) * min(high / self.image_size, 1)

    @property
    def shown(self) -> tuple[int, int, int, int]:
        """x0 y0 x1 y1, whole input px: the part of the input that shows the picture."""
        (corners,) = self.input_boxes(np.array([[0, 0, self.width, self.height]]))
        x0, y0, x1, y1 = (round(corner) for corner in corners)
        return x0, y0, x1, y1

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """[n 2] x, y in the picture -> the same in the model's input."""
        scale, offset = (self.scale_x, self.scale_y), (self.offset_x, self.offset_y)
        return np.asarray(points, np.float64) * scale + offset

    def to_source(self, points: np.ndarray) -> np.ndarray:
        """[n 2] x, y in the model's input -> the same in the picture."""
        scale, offset = (self.scale_x, self.scale_y), (self.offset_x, self.offset_y)
        return (np.asarray(points, np.float64) - offset) / scale

    def input_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """[n 4] x0 y0 x1 y1 in the picture -> the same in the model's input, cut to it."""
        corners = self.to_input(np.asarray(boxes, np.float64).reshape(-1, 2))
        return np.clip(corners, 0, self.image_size).reshape(-1, 4)

    def mask_to_grid(self, mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """bool [height width] -> f32 [Gh*Gw]: how much of each token's cell the mask covers."""
        if mask.shape != (self.height, self.width):
            raise ValueError(
                f"expected a mask of {self.height}x{self.width} (rows x columns), got {mask.shape}"
            )
        Gh, Gw = grid
        down = _area_weights(self.height, self.scale_y, self.offset_y, self.image_size, Gh)
        across = _area_weights(self.width, self.scale_x, self.offset_x, self.image_size, Gw)
        return np.clip(down @ mask.astype(np.float32) @ across.T, 0, 1).reshape(-1)

    def grid_to_source(self, values: np.ndarray) -> np.ndarray:
        """f32 [Gh Gw] over the input -> f32 [height width] over the picture, bilinear between
        the cells' centres; padding is cut off, what a crop removed gets the nearest value."""
        Gh, Gw = values.shape
        rows = self._cells(self.height, self.scale_y, self.offset_y, Gh)
        columns = self._cells(self.width, self.scale_x, self.offset_x, Gw)
        return (rows @ values.astype(np.float32) @ columns.T).astype(np.float32)

    def _cells(self, length: int, scale: float, offset: float, cells: int) -> np.ndarray:
        """f32 [length cells] interpolation weights of the picture's pixel centres."""
        at = ((np.arange(length) + 0.5) * scale + offset) / self.image_size * cells - 0.5
        at = np.clip(at, 0, cells - 1)
        low = np.minimum(np.floor(at).astype(int), max(cells - 2, 0))
        weights = np.zeros((length, cells), np.float32)
        weights[np.arange(length), np.minimum(low + 1, cells - 1)] = at - low
        weights[np.arange(length), low] = 1 - (at - low) if cells > 1 else 1
        return weights


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """The pixels a vision encoder was trained with (``preprocessor_config.json``).

    resize: ``pad`` fits the longer side and pads the rest, ``crop`` fits the shorter side and
    cuts the rest, ``stretch`` ignores the aspect ratio.

    convention: whose rounding to whole pixels and whose placing. ``agevlm`` centres and rounds
    sides half up; ``transformers`` and ``torchvision`` (which open_clip and timm use) centre too,
    but cut decimals off the longer side of a crop and round the rest in ways of their own;
    ``sam`` rounds sides half up and puts the picture into the top left corner.

    crop_pct: the picture is resized to floor(image_size / crop_pct), of which the middle
    image_size remains (timm).

    fill: what padding shows. ``mean`` is the mean colour rounded to 8 bits, ``black`` is 0 before
    and ``zero`` 0 after normalisation.
    """

    image_size: int = 64
    resize: Literal["pad", "crop", "stretch"] = "pad"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    convention: Literal["agevlm", "transformers", "torchvision", "sam"] = "agevlm"
    crop_pct: float = 1.0
    fill: Literal["mean", "black", "zero"] = "mean"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.image_size < 1 or not min(self.image_std) > 0:
            raise UserError(
                "preprocessor: expected image_size >= 1 and image_std > 0, got "
                f"{self.image_size} and {list(self.image_std)}"
            )
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"preprocessor: expected crop_pct in (0, 1], got {self.crop_pct}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "preprocessor") -> "Preprocessor":
        """The settings of a ``preprocessor_config.json``; ``UserError`` for unknown keys."""
        return from_dict(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """Changes whenever masks would fall on other cells; colours do not matter for that."""
        key = f"{self.image_size} {self.resize}"
        # What these two say by default goes without saying: stores were made before them.
        if self.convention != "agevlm":
            key += f" {self.convention}"
        if self.crop_pct != 1:
            key += f" {self.crop_pct}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def geometry(self, width: int, height: int) -> Geometry:
        """Where the pixels of a width x height picture go."""
        # Whole pixels, as PIL resizes to them; the exact scale follows from the rounding.
        new = self._resized_size(width, height)
        x, y = (self._offset(self.image_size - side) for side in new)
        return Geometry(width, height, self.image_size, new[0] / width, new[1] / height, x, y)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        fitted = math.floor(self.image_size / self.crop_pct)
        if self.resize == "stretch":
            return fitted, fitted
        reference = (max if self.resize == "pad" else min)(width, height)

        def new(side: int) -> int:
            if side == reference:
                return fitted
            if self.convention == "torchvision" and self.resize == "pad":
                # Divided in this order and rounded half to even, as timm and open_clip do.
                return max(1, round(side / (reference / fitted)))
            if self.convention in ("transformers", "torchvision"):
                return max(1, fitted * side // reference)
            return max(1, math.floor(side * (fitted / reference) + 0.5))

        return new(width), new(height)

    def _offset(self, gap: int) -> int:
        """Of the picture in the input, where it is `gap` px narrower (negative: wider)."""
        if self.convention == "sam":
            return 0
        if self.convention == "transformers":
            return int(gap / 2)  # towards zero
        if self.convention == "torchvision" and gap < 0:
            return round(gap / 2)  # half to even
        return math.floor(gap / 2)

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, Geometry]:
        """An RGB image -> normalised pixels f32 [Hi Wi 3], and their geometry."""
        squeezed, geometry = self.resized(image)
        return self.normalise(np.asarray(squeezed), geometry), geometry

    def normalise(self, values: np.ndarray, geometry: Geometry) -> np.ndarray:
        """uint8 [Hi Wi 3] input pixels and their geometry -> f32, as the call does."""
        mean, std = (np.array(v, np.float32) for v in (self.image_mean, self.image_std))
        pixels = (values.astype(np.float32) / 255 - mean) / std
        if self.fill == "zero":
            x0, y0, x1, y1 = geometry.shown
            shown = pixels[y0:y1, x0:x1]
            pixels = np.zeros_like(pixels)
            pixels[y0:y1, x0:x1] = shown
        return pixels

    def resized(self, image: Image.Image) -> tuple[Image.Image, Geometry]:
        """The RGB image in the input's size, before normalisation."""
        size, geometry = self.image_size, self.geometry(*image.size)
        new = self._resized_size(*image.size)
        if new[0] * new[1] > MAX_PIXELS:  # the whole strip of which a crop keeps the middle
            raise UserError(
                f"image: {image.width}x{image.height} is too long and thin to crop to a square; "
                'cut it first, or use a model with resize = "pad"'
            )
        squeezed = image.resize(new, Image.Resampling[self.resample.upper()])
        if new == (size, size):
            return squeezed, geometry
        means = self.image_mean if self.fill != "black" else (0.0, 0.0, 0.0)
        canvas = Image.new("RGB", (size, size), tuple(round(255 * m) for m in means))
        canvas.paste(squeezed, (int(geometry.offset_x), int(geometry.offset_y)))
        return canvas, geometry
