"""Images that a model has looked at, so that it looks once however often it is asked."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from .data.image import MAX_PIXELS, Geometry, ImageSource, Preprocessor, load_image
from .errors import UserError
from .models.agevlm import AgeVLM, SeenImage

#: Bytes of an image file beyond which it is refused unread.
MAX_BYTES = 200 << 20


@dataclass(frozen=True)
class Sight:
    """One image as a model remembers it. key: sha256 of the image; equal keys, equal images."""

    key: str
    seen: SeenImage
    geometry: Geometry


class ImageStore:
    """The sights of the images asked about last, in at most `max_bytes` of keys and values.

    Belongs to the thread that owns the model.
    """

    def __init__(
        self,
        model: AgeVLM,
        preprocessor: Preprocessor,
        max_bytes: int = 256 << 20,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model = model
        self._preprocessor, self._max_pixels = preprocessor, max_pixels
        self.max_bytes = max_bytes
        self._sights: OrderedDict[str, Sight] = OrderedDict()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._sights)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(sight.seen.nbytes for sight in self._sights.values())

    def look(self, source: "ImageSource | Sight") -> Sight:
        """The sight of an image, from memory or through the encoder (a sight is its own).

        ``UserError`` for what cannot be read as an image or is too large.
        """
        if isinstance(source, Sight):
            return source
        key = _key(source)
        if key is not None and key in self._sights:
            self.hits += 1
            self._sights.move_to_end(key)
            return self._sights[key]
        image = load_image(source, max_pixels=self._max_pixels)
        assert key is not None  # what cannot be read has raised by now
        pixels, geometry = self._preprocessor(image)
        model = self.model
        seen = model.remember(model.project(model.encode(mx.array(pixels[None]))))
        mx.eval(seen.arrays)
        self.misses += 1
        return self.add(Sight(key, seen, geometry))

    def add(self, sight: Sight) -> Sight:
        """Keep a sight; the ones used longest ago make room. One larger than all is not kept."""
        if sight.seen.nbytes <= self.max_bytes:
            self._sights[sight.key] = sight
            while self.nbytes > self.max_bytes:
                self._sights.popitem(last=False)
        return sight


def _key(source: ImageSource) -> str | None:
    """sha256 of the image's bytes; None for a file that cannot be read."""
    if isinstance(source, Image.Image):
        # A picture in memory is no file: its pixels, and what changes how they are read.
        about = f"{source.mode} {source.size} {dict(source.getexif())}".encode()
        palette = bytes(source.getpalette() or ()) if source.mode in ("P", "PA") else b""
        return hashlib.sha256(about + palette + np.asarray(source).tobytes()).hexdigest()
    if isinstance(source, bytes):
        size, data = len(source), source
    else:
        try:
            path = Path(source).expanduser()
            if not path.is_file():
                return None
            size = path.stat().st_size
            data = path.read_bytes() if size <= MAX_BYTES else b""
        except (OSError, ValueError, RuntimeError):  # a NUL in the name, a ~user unknown here
            return None
    if size > MAX_BYTES:
        name = "image" if isinstance(source, bytes) else str(source)
        raise UserError(
            f"{name}: expected an image of at most {MAX_BYTES >> 20} MB, got {size >> 20} MB; "
            "make it smaller first"
        )
    return hashlib.sha256(data).hexdigest()
