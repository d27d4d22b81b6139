"""Bytes that a token moves, the memory bandwidth here, and what other chips could reach.

Decoding one sequence is limited by memory: every weight, and the keys and values of all that
was said and seen, are read once a token. Dense models; a mixture of experts reads less.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..models.agevlm import AgeVLM
from ..models.cache import VisionCache
from .timing import seconds

#: GB/s that Apple publishes for its chips.
CHIPS = {
    "M1": 68.25,
    "M1 Pro": 200.0,
    "M1 Max": 400.0,
    "M1 Ultra": 800.0,
    "M2": 100.0,
    "M2 Pro": 200.0,
    "M2 Max": 400.0,
    "M2 Ultra": 800.0,
    "M3": 100.0,
    "M3 Pro": 150.0,
    "M3 Max (30-core GPU)": 300.0,
    "M3 Max (40-core GPU)": 400.0,
    "M3 Ultra": 819.0,
    "M4": 120.0,
    "M4 Pro": 273.0,
    "M4 Max (32-core GPU)": 410.0,
    "M4 Max (40-core GPU)": 546.0,
    "M5": 153.0,
    "M5 Pro": 307.0,
    "M5 Max (40-core GPU)": 614.0,
}

#: Format -> bytes a weight in a quantisable layer; MLX keeps a 16-bit scale and bias for every
#: 64 weights. Everything else (norms, gates, keys and values) takes two bytes.
FORMATS = {"bfloat16": 2.0, "8 bit": 1 + 4 / 64, "4 bit": 0.5 + 4 / 64}

ASSUMPTION = (
    "Upper bound: published bandwidth / bytes a token moves, keys and values in bfloat16. "
    "Programs reach part of it; launching kernels, which is not counted, limits small models."
)

#: A token that moves less is limited by the launching of kernels: no prediction is made.
LEAST_PREDICTED = 50_000_000

#: Children of a cross-attention block that only looking needs, not decoding.
_LOOKING = ("k_proj", "v_proj", "k_norm", "null_key", "null_value")


@dataclass(frozen=True)
class Traffic:
    """Bytes that are read for one token of one sequence."""

    weights: int
    text: int
    image: int

    @property
    def total(self) -> int:
        return self.weights + self.text + self.image

    def describe(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def text_arrays(cache: list[Any]) -> list[mx.array]:
    """The text's own keys and values [B K T H] in a prompt cache, with room for later tokens."""
    texts = [entry.text if isinstance(entry, VisionCache) else entry for entry in cache]
    arrays = [a for text in texts for _, a in tree_flatten(text.state)]
    return [a for a in arrays if isinstance(a, mx.array) and a.ndim == 4]


def bytes_per_text_token(cache: list[Any]) -> int:
    """What one token of text takes in a prompt cache that holds at least one."""
    return sum(array.nbytes // array.shape[2] for array in text_arrays(cache))


def read_when_decoding(lm: nn.Module) -> dict[str, mx.array]:
    """The parameters of a language model, grafted or not, that one token needs as a whole.

    Of an input embedding that is not also the output layer one row is read: none is counted.
    """
    found = {}
    tied = not any(name.startswith("lm_head.") for name, _ in tree_flatten(lm.parameters()))
    for name, array in tree_flatten(lm.parameters()):
        parts = name.split(".")
        if "cross_attn" in parts and any(child in _LOOKING for child in parts):
            continue
        if not tied and ("embed_tokens" in parts or "wte" in parts):
            continue
        found[name] = array
    return found


def weight_bytes(lm: nn.Module, format: str | None = None) -> int:
    """Bytes of what `read_when_decoding` names, as stored or as they would be in `format`."""
    arrays = read_when_decoding(lm)
    if format is None:
        return sum(array.nbytes for array in arrays.values())
    modules = dict(lm.named_modules())
    total = 0.0
    for name, array in arrays.items():
        owner, _, kind = name.rpartition(".")
        module = modules[owner]
        bits = getattr(module, "bits", None)
        if bits and kind in ("scales", "biases"):
            continue  # counted with the weights
        if bits and kind == "weight":
            total += array.size * 32 // bits * FORMATS[format]
        elif kind == "weight" and hasattr(module, "to_quantized") and array.shape[-1] % 64 == 0:
            total += array.size * FORMATS[format]
        else:
            total += array.size * 2
    return round(total)


def predicted(model: AgeVLM, now: Traffic, itemsize: int) -> dict[str, dict[str, Any]]:
    """Tokens/s that bandwidth allows on Apple's chips, for each format; nothing is measured.

    now: what a token moves here, where a number in keys and values takes `itemsize` bytes.
    Empty for models of a few megabytes (`LEAST_PREDICTED`).
    """
    told: dict[str, dict[str, Any]] = {}
    if now.total < LEAST_PREDICTED:
        return told
    for format in FORMATS:
        traffic = Traffic(
            weight_bytes(model.language_model, format),
            now.text * 2 // itemsize,
            now.image * 2 // itemsize,
        )
        told[format] = {
            "bytes_per_token": traffic.describe(),
            "tokens_per_second": {
                chip: bandwidth * 1e9 / traffic.total for chip, bandwidth in CHIPS.items()
            },
        }
    return told


def bandwidth(trials: int, size: int = 256 << 20) -> dict[str, float]:
    """GB/s of large arrays: read by a matrix-vector product, copied, and ``best`` of all.

    The product is what decoding does; a copy reads and writes. Where MLX computes on the CPU, its
    matrix-vector product (a general BLAS product) is no measure of the memory: numpy reads, too.
    """
    rows = size // 4 // 4096
    matrix = mx.random.uniform(shape=(rows, 4096))
    vector = mx.random.uniform(shape=(1, 4096))
    mx.eval(matrix, vector)
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "read": (matrix.nbytes, lambda: mx.eval(vector @ matrix.T)),
        "copy": (2 * matrix.nbytes, lambda: mx.eval(mx.abs(matrix))),
    }
    if mx.default_device() == mx.Device(mx.cpu):
        host = np.ones(size // 4, np.float32)
        works["numpy_read"] = (host.nbytes, lambda: host.dot(host))
    found = {
        name: moved / min(seconds(work) for _ in range(trials + 1)) / 1e9
        for name, (moved, work) in works.items()
    }
    return {**found, "best": max(found.values())}
