"""An image is a prompt cache: a layer's text cache together with its view of the images.

`VisionCache` wraps any mlx-lm cache (growing, rotating, quantised, batched) and adds the
cross-attention keys and values of the images, so that mlx-lm's generation, batching and
prompt-cache files carry the image along without knowing of it. Trimming and KV
quantisation touch the text only.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from .cross_attention import NEVER, MapRequest, Recorder, VisionKV


def _pad(vision: VisionKV, size: int) -> VisionKV:
    """The same images with hidden slots added up to `size`."""
    extra = size - vision.keys.shape[2]
    wide = [(0, 0), (0, 0), (0, extra), (0, 0)]
    start = mx.pad(vision.starts(), [(0, 0), (0, extra)], constant_values=NEVER)
    return VisionKV(
        mx.pad(vision.keys, wide), mx.pad(vision.values, wide), start, vision.texts, vision.null
    )


def _blind(like: VisionKV, rows: int) -> VisionKV:
    """`rows` rows without an image, in the shape of `like`."""
    shape = (rows, *like.keys.shape[1:])
    start = mx.full((rows, shape[2]), NEVER, mx.int32)
    zeros = mx.zeros(shape, like.keys.dtype)
    return VisionKV(zeros, zeros, start, like.texts, like.null)


def stack(parts: Sequence[tuple[VisionKV | None, int]]) -> VisionKV | None:
    """Rows of images on top of each other; a part without images counts its rows."""
    present = [v for v, _ in parts if v is not None]
    if not present:
        return None
    size = max(v.keys.shape[2] for v in present)
    aligned = all(v is not None and v.start is None and v.keys.shape[2] == size for v, _ in parts)
    full = [_blind(present[0], n) if v is None else v for v, n in parts]
    if not aligned:
        full = [_pad(v, size) for v in full]
    return VisionKV(
        mx.concatenate([v.keys for v in full]),
        mx.concatenate([v.values for v in full]),
        None if aligned else mx.concatenate([v.starts() for v in full]),
        present[0].texts,
        present[0].null,
    )


class VisionCache:
    """One layer's mlx-lm cache (`text`) and what the layer sees (`vision`, or None).

    With ``fusion = "concat"`` the image lies in the text cache itself, as its first
    `prefix` tokens, and `vision` stays None.
    """

    def __init__(self, text: Any, vision: VisionKV | None = None, prefix: int = 0) -> None:
        self.text = text
        self.vision = vision
        self.prefix = prefix
        #: Set for one call by ``AgeVLM.attend``, for all calls by ``AgeVLM.record``.
        self.request: MapRequest | Recorder | None = None

    def __getattr__(self, name: str) -> Any:
        # Everything that concerns the text (update_and_fetch, make_mask, trim, bits, ...).
        if name in (
            "text",
            "vision",
            "prefix",
            "request",
        ):  # not yet set: copy and from_state get here
            raise AttributeError(name)
        value = getattr(self.text, name)
        if name == "to_quantized":
            return lambda *args, **kw: self._with_text(value(*args, **kw))
        return value

    def _with_text(self, text: Any) -> "VisionCache":
        other = VisionCache(text, self.vision, self.prefix)
        other.request = self.request
        return other

    @property
    def offset(self) -> Any:
        return self.text.offset

    @offset.setter
    def offset(self, value: Any) -> None:
        self.text.offset = value

    @property
    def nbytes(self) -> int:
        return self.text.nbytes + (self.vision.nbytes if self.vision else 0)

    def add(
        self, keys: mx.array, values: mx.array, *, null: int = 1, start: int | None = None
    ) -> None:
        """Let the text from here on see images with these keys and values [B K S H].

        start: the first text position that sees them, if that is not the next one. The null
        slot, if any, must come with the first images only.
        """
        seen, B, S = self.vision, keys.shape[0], keys.shape[2]
        at = self.text.offset if start is None else start
        from_the_beginning = isinstance(at, int) and at == 0
        now = None
        if not from_the_beginning or (seen is not None and seen.start is not None):
            now = mx.broadcast_to(mx.reshape(mx.array(at), (-1, 1)), (B, S)).astype(mx.int32)
        if seen is None:
            self.vision = VisionKV(keys, values, now, 1, null)
            return
        if seen.keys.shape[:2] + seen.keys.shape[3:] != keys.shape[:2] + keys.shape[3:]:
            raise ValueError(
                f"expected image keys [{seen.keys.shape[0]} {seen.keys.shape[1]} S "
                f"{seen.keys.shape[3]}] as the cache has, got {list(keys.shape)}; "
                "were they made by another model?"
            )
        self.vision = VisionKV(
            mx.concatenate([seen.keys, keys], axis=2),
            mx.concatenate([seen.values, values], axis=2),
            None if now is None else mx.concatenate([seen.starts(), now], axis=1),
            seen.texts,
            seen.null,
        )

    # What mlx-lm's batch generator asks of a cache.

    @classmethod
    def merge(cls, caches: Sequence["VisionCache"]) -> "VisionCache":
        """One batched cache of several single ones."""
        text = caches[0].text.merge([c.text for c in caches])
        # Left padding moves the prefix of all but the longest row.
        prefix = caches[0].prefix if len({(c.prefix, c.text.size()) for c in caches}) == 1 else 0
        return cls(text, stack([(c.vision, 1) for c in caches]), prefix)

    def _rows(self) -> int:
        return self.text.offset.shape[0]

    def filter(self, batch_indices: Any) -> None:
        self.text.filter(batch_indices)
        if self.vision is not None:
            v, keep = self.vision, mx.array(batch_indices)
            start = None if v.start is None else v.start[keep]
            self.vision = VisionKV(v.keys[keep], v.values[keep], start, v.texts, v.null)

    def extend(self, other: "VisionCache") -> None:
        rows = self._rows(), other._rows()
        self.text.extend(other.text)
        self.vision = stack([(self.vision, rows[0]), (other.vision, rows[1])])
        self.prefix = 0

    def extract(self, idx: int) -> "VisionCache":
        text, v = self.text.extract(idx), self.vision
        if v is None:
            return VisionCache(text)
        row = slice(idx, idx + 1)
        if v.start is None:
            return VisionCache(text, VisionKV(v.keys[row], v.values[row], None, v.texts, v.null))
        start = np.array(v.start[idx])
        keep = mx.array(np.flatnonzero(start < NEVER))
        if keep.size == 0:
            return VisionCache(text)
        vision = VisionKV(
            v.keys[row][:, :, keep],
            v.values[row][:, :, keep],
            v.start[row][:, keep] if start[np.array(keep)].any() else None,
            v.texts,
            v.null,
        )
        return VisionCache(text, vision)

    # Files (mlx-lm's save_prompt_cache / load_prompt_cache).

    @property
    def state(self) -> tuple:
        v = self.vision
        vision = (None, None, None, 1, 1)
        if v is not None:
            vision = (v.keys, v.values, v.start, v.texts, v.null)
        return type(self.text).__name__, self.text.state, self.prefix, *vision

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        name, text, self.prefix, keys, values, start, texts, null = value
        self.text = getattr(mlx_lm_cache, name).from_state(text)
        self.vision = None if keys is None else VisionKV(keys, values, start, texts, null)
        self.request = None

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "VisionCache":
        obj = cls.__new__(cls)
        obj.state = state
        return obj


class PackedCache(mlx_lm_cache.ConcatenateKVCache):
    """Keys and values of rows that hold several texts one after another, for one pass.

    segments: int32 [B*R T], the number of the text that each position belongs to. A position
    sees its own text only. Rotary positions are relative, so they need not restart.
    """

    def __init__(self, segments: mx.array) -> None:
        super().__init__()
        self.segments = segments

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """bool [B*R 1 T T], also where mlx-lm would do without an array."""
        if self.offset or self.segments.shape[1] != N:
            raise ValueError(
                f"expected all {self.segments.shape[1]} positions of packed rows in one pass, "
                f"got {N} after {self.offset}"
            )
        own = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return own & create_causal_mask(N, window_size=window_size)


# load_prompt_cache looks classes up by name in its own module.
mlx_lm_cache.VisionCache = VisionCache  # pyright: ignore[reportAttributeAccessIssue]
