"""An upload becomes a picture of the conversation: checked, named, and not too large.

No Gradio, no MLX. What a stranger's file may do is bounded before it is decoded.
"""

import base64
import io
import math
import re
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from agevlm_mlx.data.image import MAX_PIXELS, load_image, open_image, to_rgb
from agevlm_mlx.errors import UserError, one_line

#: Bytes of a file beyond which an upload is refused.
MAX_UPLOAD = 64 << 20
#: Pixels of a picture that had more than the model takes, after it was reduced.
_REDUCED = 12_000_000
#: What is reduced; the decoders of other formats need many times the memory of the picture.
_REDUCIBLE = ("JPEG", "MPO", "PNG", "BMP", "PPM", "GIF")
#: Pixels that are reduced at a time.
_STRIP = 4_000_000
#: The longest side of a JPEG.
_LONGEST = 65_500
#: The longer side of a picture on the page.
_PAGE = 768
#: Pixels up to which the page gets a PNG: it is small then, and exact.
_SMALL = 256 * 256
_MAX_NAME = 80
#: Decoding takes up to a gigabyte: one at a time.
_LARGE = threading.Lock()


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture of a conversation.

    id: unguessable. name: what the file was called, printable, without a path. data: the file
    that the model gets. size: (width, height) in pixels, upright. note: what was done to it.
    """

    id: str
    name: str
    data: bytes = field(repr=False)
    size: tuple[int, int]
    note: str | None = None
    _urls: dict[int, str] = field(default_factory=dict, repr=False)


def take(name: str, data: bytes) -> Shown:
    """Check an uploaded file; one with more than MAX_PIXELS is reduced.

    ``UserError``, which begins with the file's name, for what is no image, damaged or too large.
    """
    name = _clean(name)
    if not data:
        raise UserError(f"{name}: the file is empty; choose another one")
    if len(data) > MAX_UPLOAD:
        raise UserError(
            f"{name}: expected a file of at most {MAX_UPLOAD >> 20} MB, got "
            f"{len(data) / (1 << 20):.0f} MB; make it smaller first"
        )
    with open_image(data, name) as image:
        try:
            return _checked(image, name, data)
        except UserError:
            raise
        except Exception as error:  # on damaged data a decoder may raise anything
            raise UserError(f"{name}: damaged or truncated image: {one_line(error)}") from None


def _checked(image: Image.Image, name: str, data: bytes) -> Shown:
    before, notes, urls = image.size, _frames(image), {}
    if math.prod(before) > MAX_PIXELS:
        with _LARGE:
            data, after = _reduced(image, name)
    else:
        # Damaged data end here, and what is decoded already serves the page.
        urls[_PAGE] = _url(load_image(_drafted(image, _PAGE), name=name), _PAGE)
        after = before
    if _orientation(image) >= 5:  # a quarter turn
        before, after = (before[1], before[0]), (after[1], after[0])
    if after != before:
        notes.append("{}x{} pixels, reduced to {}x{}".format(*before, *after))
    note = f"{name}: {'; '.join(notes)}" if notes else None
    return Shown(secrets.token_urlsafe(16), name, data, after, note, urls)


def data_url(shown: Shown, longest: int = _PAGE) -> str:
    """The picture for the page: upright, over white, its longer side at most `longest` pixels.

    It carries nothing of the file but the pixels: no place, no date.
    """
    if longest not in shown._urls:
        with open_image(shown.data, shown.name) as image:
            picture = load_image(_drafted(image, longest), name=shown.name)
        shown._urls[longest] = _url(picture, longest)
    return shown._urls[longest]


def _url(picture: Image.Image, longest: int) -> str:
    scale = min(1, longest / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    # A new picture: the old one may bring metadata along.
    plain = Image.fromarray(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)))
    kind = "PNG" if math.prod(size) <= _SMALL else "JPEG"
    content = base64.b64encode(_encoded(plain, kind, quality=85)).decode()
    return f"data:image/{kind.lower()};base64,{content}"


def _clean(name: str) -> str:
    """A file's name as it can be shown: no folders, nothing that moves or hides text, not long."""
    base = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    # All kinds of white space become spaces; what is invisible or turns the text around goes.
    base = "".join(c for c in " ".join(base.split()) if c.isprintable()).strip()
    if len(base) > _MAX_NAME:
        base = f"{base[: _MAX_NAME - 21]}…{base[-20:]}"
    return base if base.strip(".") else "picture"


def _frames(image: Image.Image) -> list[str]:
    """A note if the file has more than the picture that is looked at."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []  # MPO: the same photo in other sizes
    if image.format == "TIFF":
        return ["of its pages the first is looked at"]
    return ["of the animation the first frame is looked at"]


def _drafted(image: Image.Image, longest: int) -> Image.Image:
    """A JPEG is decoded at a half, quarter or eighth of its size if that is still enough."""
    image.draft(None, (longest, longest))
    return image


def _orientation(image: Image.Image) -> int:
    """How a decoded file says that it is to be turned, 1 (not) to 8."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(value) if value in range(1, 9) else 1


def _reduced(image: Image.Image, name: str) -> tuple[bytes, tuple[int, int]]:
    """A picture with more than MAX_PIXELS as a JPEG of at most _REDUCED, and its size before it
    is turned upright.

    At no time is there more in memory than the decoded file and a few strips of it.
    """
    if image.format not in _REDUCIBLE or image.mode in ("I", "F"):
        raise UserError(
            f"{name}: expected at most {MAX_PIXELS / 1e6:g} megapixels, got "
            f"{image.width}x{image.height}; make it smaller first"
        )
    scale = min(math.sqrt(_REDUCED / math.prod(image.size)), _LONGEST / max(image.size))
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    image.draft(None, size)
    image.load()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = _orientation(image)
    return _encoded(_resized(image, size), "JPEG", quality=92, exif=exif), size


def _resized(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """A decoded picture of any mode, in RGB and smaller."""
    width, height = image.size
    # First by a whole number, strip after strip, then the rest of the way.
    factor = max(1, min(width // target[0], height // target[1]))
    rows = factor * max(1, _STRIP // (factor * width))
    smaller = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        smaller.paste(to_rgb(strip).reduce(factor), (0, top // factor))
    box = (0, 0, width / factor, height / factor)
    return smaller.resize(target, Image.Resampling.LANCZOS, box)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
