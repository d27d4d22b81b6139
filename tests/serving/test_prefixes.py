"""Which text caches fit a prompt, with caches of plain numbers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from agevlm_mlx.serving.prefixes import Prefixes


def texts(ids: list[int], kind: type = KVCache, **options: int) -> list[KVCache]:
    """One layer's cache, whose keys are the ids."""
    cache = kind(**options)
    keys = mx.array(ids, mx.float32).reshape(1, 1, -1, 1)
    cache.update_and_fetch(keys, keys)
    return [cache]


def held(caches: list[KVCache]) -> list[int]:
    return [int(key) for key in np.array(caches[0].keys_and_values()[0]).ravel()]


@pytest.fixture
def prefixes() -> Prefixes:
    prefixes = Prefixes()
    prefixes.keep(((0, "a"),), [1, 2, 3, 4], texts([1, 2, 3, 4]))
    return prefixes


@pytest.mark.parametrize(
    ("seen", "ids", "cached"),
    [
        (((0, "a"),), [1, 2, 3, 4, 5], 4),
        (((0, "a"),), [1, 2, 3, 4], 3),  # the last one must be fed
        (((0, "a"),), [1, 2, 9, 9], 2),
        (((0, "a"),), [9, 2], 0),
        (((0, "a"),), [1], 0),
        (((0, "b"),), [1, 2, 3, 4, 5], 0),
        ((), [1, 2, 3, 4, 5], 0),
        (((1, "a"),), [1, 2, 3, 4, 5], 0),
        (((0, "a"), (4, "b")), [1, 2, 3, 4, 5], 4),
        (((0, "a"), (2, "b")), [1, 2, 3, 4, 5], 2),
    ],
)
def test_a_text_is_used_as_far_as_it_and_its_images_agree(prefixes, seen, ids, cached):
    caches, n = prefixes.fetch(seen, ids)
    assert n == cached
    if n:
        assert held(caches) == ids[:n]
        caches[0].update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
    else:
        assert caches == []
    assert held(prefixes._entries[0].texts) == [1, 2, 3, 4]  # a copy was changed


def test_the_image_of_a_later_turn_limits_what_can_be_used():
    prefixes = Prefixes()
    prefixes.keep(((0, "a"), (2, "b")), [1, 2, 3, 4], texts([1, 2, 3, 4]))
    assert prefixes.fetch(((0, "a"),), [1, 2, 3, 4, 5])[1] == 2
    assert prefixes.fetch(((0, "a"), (2, "b")), [1, 2, 3, 4, 5])[1] == 4


def test_the_longest_fit_is_used(prefixes):
    prefixes.keep(((0, "a"),), [1, 2, 9], texts([1, 2, 9]))
    assert prefixes.fetch(((0, "a"),), [1, 2, 9, 8])[1] == 3
    assert prefixes.fetch(((0, "a"),), [1, 2, 3, 4, 8])[1] == 4


def test_what_a_longer_text_begins_with_needs_no_entry(prefixes):
    prefixes.keep(((0, "a"),), [1, 2, 3, 4, 5], texts([1, 2, 3, 4, 5]))
    assert len(prefixes) == 1
    prefixes.keep(((0, "b"),), [1, 2, 3], texts([1, 2, 3]))
    prefixes.keep(((0, "a"),), [7], texts([7]))
    assert len(prefixes) == 3


def test_the_one_used_longest_ago_goes_first(prefixes):
    prefixes.max_size = 2
    prefixes.keep((), [5, 6], texts([5, 6]))
    prefixes.fetch(((0, "a"),), [1, 2])
    prefixes.keep((), [8, 9], texts([8, 9]))
    assert len(prefixes) == 2
    assert prefixes.fetch((), [5, 6, 7])[1] == 0
    assert prefixes.fetch(((0, "a"),), [1, 2, 0])[1] == 2


def test_bytes_are_limited(prefixes):
    one = prefixes.nbytes
    assert one > 0
    prefixes.max_bytes = 2 * one
    for n in range(5):
        prefixes.keep((), [n], texts([n]))
        assert prefixes.nbytes <= prefixes.max_bytes
    assert len(prefixes) == 2


@pytest.mark.parametrize("limits", [{"max_size": 0}, {"max_bytes": 0}, {"max_bytes": 1}])
def test_a_limit_of_nothing_keeps_nothing(limits):
    prefixes = Prefixes(**limits)
    prefixes.keep((), [1, 2], texts([1, 2]))
    assert len(prefixes) == 0


def test_a_cache_that_cannot_be_cut_is_used_whole_or_not():
    prefixes = Prefixes()
    full = texts([1, 2, 3, 4], RotatingKVCache, max_size=4)
    assert not full[0].is_trimmable()
    prefixes.keep((), [1, 2, 3, 4], full)
    assert prefixes.fetch((), [1, 2, 3, 9])[1] == 0
    assert prefixes.fetch((), [1, 2, 3, 4, 9])[1] == 4
