"""The cases that every form of a kernel must pass, and what is right, in float64.

Shared by the twins, the kernels on the CPU and the kernels on a real GPU (tests/metal).
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

#: Type -> the error of rounding to it, relative: half a unit in its last place. Everything is
#: computed in fp32, whose own errors `ATOL` and `RTOL` cover: sums of some hundred terms of size
#: 1 lose a few times 2**-24 of them.
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
DTYPES = list(ROUNDING)
ATOL, RTOL = 2e-6, 1e-5


def name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def open_slots(rng: np.random.Generator, rows: int, S: int) -> mx.array:
    """bool [rows S]: the null slot and the last one are open, in the last row only the null."""
    mask = rng.random((rows, S)) < 0.5
    mask[:, [0, -1]] = True
    mask[-1, 1:] = False
    return mx.array(mask)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def assert_close(got: mx.array, wanted: np.ndarray, dtype: mx.Dtype = mx.float32) -> None:
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    rtol = RTOL + ROUNDING[dtype]
    np.testing.assert_allclose(as_float64(got), wanted, rtol=rtol, atol=ATOL)


@dataclass(frozen=True)
class Decode:
    """Shapes of one `decode_attention`."""

    B: int
    N: int
    K: int
    S: int
    H: int

    def arrays(self, dtype: mx.Dtype, masked: bool) -> tuple[Any, ...]:
        """The arguments: q, keys, values, scale, mask."""
        rng = np.random.default_rng(self.S)
        q = normal(rng, (self.B, self.N, self.H), dtype)
        keys, values = (normal(rng, (self.B, self.K, self.S, self.H), dtype) for _ in range(2))
        mask = open_slots(rng, self.B, self.S) if masked else None
        return q, keys, values, 0.2, mask

    @staticmethod
    def right(q, keys, values, scale, mask) -> tuple[np.ndarray, np.ndarray]:
        """out [B N H] and map [B S]."""
        group = q.shape[1] // keys.shape[1]
        keys, values = (np.repeat(as_float64(x), group, axis=1) for x in (keys, values))
        scores = np.einsum("bnh,bnsh->bns", as_float64(q), keys) * scale
        if mask is not None:
            scores = np.where(np.array(mask)[:, None], scores, -np.inf)
        weights = softmax(scores)
        return np.einsum("bns,bnsh->bnh", weights, values), weights.mean(axis=1)


#: Groups of 1, 3, 4, 8 and 9 (in tiles) heads; S odd, below 32, 1; H 32 to 128.
DECODE = [
    Decode(B=2, N=4, K=4, S=37, H=64),
    Decode(B=1, N=9, K=3, S=65, H=64),
    Decode(B=2, N=8, K=2, S=100, H=64),
    Decode(B=1, N=16, K=2, S=33, H=128),
    Decode(B=2, N=18, K=2, S=31, H=64),
    Decode(B=1, N=9, K=1, S=45, H=128),
    Decode(B=3, N=3, K=3, S=1, H=32),
    Decode(B=1, N=6, K=2, S=3, H=96),
    Decode(B=1, N=8, K=1, S=70, H=32),
    Decode(B=1, N=2, K=1, S=517, H=32),
]


@dataclass(frozen=True)
class Guided:
    """Shapes of one `guided_attention`."""

    B: int
    N: int
    K: int
    C: int
    S: int
    H: int
    heads: int
    P: int

    def arrays(self, dtype: mx.Dtype, masked: bool) -> tuple[Any, ...]:
        """The arguments: q, keys, image, column, heads, scale, mask. The rows are in no order,
        and one of them comes three times."""
        rng = np.random.default_rng(self.S)
        q = normal(rng, (self.B, self.N, self.C, self.H), dtype)
        keys = normal(rng, (self.B, self.K, self.S, self.H), dtype)
        rows = np.stack([rng.integers(0, n, self.P) for n in (self.B, self.C)]).astype(np.int32)
        rows[:, [1, -1]] = rows[:, :1]
        mask = open_slots(rng, self.P, self.S) if masked else None
        return q, keys, mx.array(rows[0]), mx.array(rows[1]), self.heads, 0.2, mask

    def cotangent(self) -> mx.array:
        """A gradient of the maps, [P heads S]."""
        rng = np.random.default_rng(self.P)
        return normal(rng, (self.P, self.heads, self.S), mx.float32)

    @staticmethod
    def right(
        cotangent, q, keys, image, column, heads, scale, mask
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """maps [P heads S] and the gradients of q and keys for a cotangent of the maps."""
        q, keys, cotangent = (as_float64(x) for x in (q, keys, cotangent))
        image, column = np.array(image), np.array(column)
        group = q.shape[1] // keys.shape[1]
        kv = np.arange(heads) // group
        rows = q[image, :heads, column]  # P heads H
        of_rows = keys[image][:, kv]  # P heads S H
        scores = np.einsum("phd,phsd->phs", rows, of_rows) * scale
        if mask is not None:
            scores = np.where(np.array(mask)[:, None], scores, -np.inf)
        maps = softmax(scores)
        slope = maps * (cotangent - (maps * cotangent).sum(-1, keepdims=True)) * scale
        dq, dkeys = np.zeros_like(q), np.zeros_like(keys)
        head = np.arange(heads)
        np.add.at(
            dq,
            (image[:, None], head[None], column[:, None]),
            np.einsum("phs,phsd->phd", slope, of_rows),
        )
        np.add.at(dkeys, (image[:, None], kv[None]), slope[..., None] * rows[:, :, None])
        return maps, dq, dkeys


GUIDED = [
    Guided(B=2, N=4, K=4, C=3, S=37, H=64, heads=4, P=5),
    Guided(B=2, N=9, K=3, C=5, S=65, H=64, heads=9, P=8),
    Guided(B=1, N=8, K=2, C=4, S=33, H=128, heads=3, P=6),
    Guided(B=2, N=9, K=1, C=3, S=31, H=64, heads=9, P=6),
    Guided(B=4, N=4, K=1, C=2, S=1, H=32, heads=2, P=4),
    Guided(B=2, N=6, K=2, C=4, S=3, H=96, heads=4, P=9),
    Guided(B=1, N=2, K=1, C=2, S=517, H=32, heads=2, P=3),
]
