"""GGUF files: metadata and tensors as they are stored, checked against the file's end.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `mx.load` reads the
tensors; the header is read here, since it does not say how each one was stored.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agevlm_mlx.errors import UserError, one_line


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file, and how it is stored there."""

    name: str
    shape: tuple[int, ...]  # rows first
    kind: str
    start: int  # bytes from the start of the file


@dataclass(frozen=True)
class _Type:
    name: str
    values: int  # of a block
    bytes: int


#: ``ggml_type`` -> what `mx.load` reads exactly. It also turns some k-quants into float16, of
#: which Q4_K came out wrong (mlx 0.32), so none of them is let through.
_TYPES = {
    0: _Type("F32", 1, 4),
    1: _Type("F16", 1, 2),
    2: _Type("Q4_0", 32, 18),
    3: _Type("Q4_1", 32, 20),
    8: _Type("Q8_0", 32, 34),
    30: _Type("BF16", 1, 2),
}
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
#: Names of the other types for messages.
_OTHER_TYPES = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0"},
    **{35: "TQ2_0", 39: "MXFP4"},
}
#: ``gguf_metadata_value_type`` -> struct's letter; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}


class _Reader:
    """Values one after another from a mapped file, none of them beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise UserError(
                f"{self.path}: ends within its header, after {len(self.data)} bytes; the file "
                "is incomplete or damaged, download it again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, letter: str, count: int) -> list[Any]:
        """`count` values, float32 as the shortest decimal that means them (1e-05)."""
        values = struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter)))
        return [float(str(np.float32(v))) for v in values] if letter == "f" else list(values)

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, count = self.number("I"), self.number("Q")
            if kind in _SCALARS:
                return self.numbers(_SCALARS[kind], count)
            if kind == 8:
                return [self.text() for _ in range(count)]
        raise UserError(f"{self.path}: metadata of unknown type {kind}; the file is damaged")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and where each tensor lies; checks types and that the file is whole."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a GGUF file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path}: expected a GGUF file, got one that starts with {magic!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data, path)
            reader.take(4)
            version = reader.number("I")
            if version not in (2, 3):
                raise UserError(f"{path}: expected GGUF version 2 or 3, got {version}")
            tensor_count, value_count = reader.numbers("Q", 2)
            metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(value_count)}
            table = []
            for _ in range(tensor_count):
                name, dimensions = reader.text(), reader.number("I")
                shape = tuple(reversed(reader.numbers("Q", dimensions)))
                table.append((name, shape, reader.number("I"), reader.number("Q")))
            align = metadata.get("general.alignment", 32)
            if not isinstance(align, int) or align < 1:
                raise UserError(f"{path}: general.alignment: expected 1 or more, got {align!r}")
            start = -(-reader.at // align) * align
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts; merge them first with "
            "llama-gguf-split --merge"
        )
    tensors = {}
    for name, shape, number, offset in table:
        if number not in _TYPES:
            kind = _OTHER_TYPES.get(number, f"type {number}")
            raise UserError(
                f"{path}: {name} is stored as {kind}, expected {', '.join(_names())}; take the "
                "Q8_0 or F16 file of this model, or its original checkpoint"
            )
        kind = _TYPES[number]
        end = start + offset + math.prod(shape) // kind.values * kind.bytes
        if end > size:
            raise UserError(
                f"{path}: expected at least {end} bytes, got {size}: {name} is not all there; "
                "the file is incomplete, download it again"
            )
        tensors[name] = Tensor(name, shape, kind.name, start + offset)
    return metadata, tensors


def _names() -> list[str]:
    return [kind.name for kind in _TYPES.values()]


def read_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, mx.array]:
    """Each tensor in its own shape, quantised ones still packed until they are evaluated."""
    try:
        stored: Any = mx.load(str(path), format="gguf")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable GGUF file: {one_line(error)}") from None
    dense = {}
    for name, tensor in tensors.items():
        array = stored.pop(name)
        if tensor.kind == "BF16":  # mx.load rounds it to float16
            raw = np.memmap(path, np.uint16, "r", tensor.start, tensor.shape)
            array = mx.array(raw).view(mx.bfloat16)
        elif tensor.kind in _BITS:
            # The scales are float16: widened first, every value is exactly ggml's own.
            scales, biases = (
                stored.pop(name.removesuffix("weight") + part).astype(mx.float32)
                for part in ("scales", "biases")
            )
            bits = _BITS[tensor.kind]
            array = mx.dequantize(array, scales, biases, group_size=32, bits=bits)
        dense[name] = array.reshape(tensor.shape)
    return dense
