"""The vision side of a prompt cache under mlx-lm's batch operations."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from agevlm_mlx.models.cache import VisionCache, VisionKV
from agevlm_mlx.models.cross_attention import NEVER


def single(name: int, images: int, text: int, late: bool) -> VisionCache:
    """A cache whose every number is its name: `images` image slots, `text` text tokens."""
    cache = VisionCache(KVCache())

    def grow(n):
        if n:
            cache.update_and_fetch(*[mx.full((1, 2, n, 4), float(name))] * 2)

    grow(text if late else 0)
    if images:
        cache.add(*[mx.full((1, 2, images + 1, 4), float(name))] * 2)
    grow(0 if late else text)
    return cache


def seen(cache: VisionCache) -> tuple[int, int, int]:
    """(name, visible image slots, text tokens) of a single cache; checks that nothing mixes."""
    names = set()
    slots = 0
    if cache.vision is not None:
        v = cache.vision
        visible = np.array(v.starts()[0]) < NEVER
        slots = int(visible[v.null :].sum())
        names |= set(np.array(v.keys[0][:, mx.array(np.flatnonzero(visible))]).ravel().tolist())
        assert v.values.shape == v.keys.shape
    if cache.offset:
        names |= set(np.array(cache.keys_and_values()[0]).ravel().tolist())
    assert len(names) <= 1
    return int(names.pop()) if names else 0, slots, int(cache.offset)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_never_mix_under_random_schedules(data):
    """merge, filter, extend and extract in any order: each row keeps its own image."""
    counter = iter(range(1, 1000))
    make = st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans())

    def batch():
        specs = [(next(counter), *s) for s in data.draw(st.lists(make, min_size=1, max_size=3))]
        expected = [(n, i, t) for n, i, t, _ in specs]
        return VisionCache.merge([single(*s) for s in specs]), expected

    cache, rows = batch()
    for _ in range(data.draw(st.integers(0, 4))):
        if data.draw(st.booleans()):
            other, more = batch()
            cache.extend(other)
            rows = rows + more
        else:
            keep = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
            cache.filter(keep)
            rows = [rows[i] for i in keep]
    assert [seen(cache.extract(i)) for i in range(len(rows))] == rows
    round_trip = VisionCache.merge([cache.extract(i) for i in range(len(rows))])
    assert [seen(round_trip.extract(i)) for i in range(len(rows))] == rows


def test_a_batch_of_equal_images_needs_no_mask():
    merged = VisionCache.merge([single(1, 4, 2, False), single(2, 4, 3, False)])
    assert merged.vision is not None
    assert merged.vision.visible(0, 3) is None
    assert merged.vision.keys.shape == (2, 2, 5, 4)


def test_visibility_follows_each_rows_own_offset():
    zeros = mx.zeros((2, 1, 3, 4))
    vision = VisionKV(zeros, zeros, mx.array([[0, 2, NEVER], [0, 0, 5]]))
    mask = vision.visible(mx.array([1, 4]), 2)
    assert mask is not None
    assert mask.tolist() == [
        [[True, False, False], [True, True, False]],
        [[True, True, False], [True, True, True]],
    ]


def test_trim_and_bytes_concern_the_text_only():
    cache = single(3, 4, 5, False)
    vision = cache.vision
    assert cache.trim(2) == 2
    assert cache.offset == 3
    assert cache.vision is vision
    assert vision is not None
    assert cache.nbytes == cache.text.nbytes + vision.nbytes
