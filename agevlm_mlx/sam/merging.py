"""Several stores become one: what machines labelled apart, or an older format."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .index import short
from .store import Store, StoreWriter


def merge_stores(
    parts: Sequence[Path], out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Put the images of `parts` into the store `out`; how many it holds then.

    The first image of each part comes first, then the second ones: the shards 1/n to n/n of a data
    set make the store that one machine would have made. An image of several parts gets the masks
    of all of them, and keeps those that `out` has. Killed, the same call continues. ``UserError``
    before anything is written if parts were made otherwise, or hold different files under one
    image key.
    """
    stores = [Store(part) for part in parts]
    _check(stores)
    meta = stores[0].meta
    stores = [store for store in stores if store.path.resolve() != out.resolve()]
    total = sum(len(store) for store in stores)
    with StoreWriter(out, meta) as writer:
        for number, key in enumerate(_keys(stores), start=1):
            owners = [store for store in stores if key in store]
            if key in writer.done:
                _check_same(key, owners[0], writer.path, writer.sha256(key))
            names = dict.fromkeys(name for store in owners for name in store.prompts(key))
            if key not in writer.done or not set(names) <= set(writer.prompts(key)):
                writer.add(key, **_rows(key, owners))
            if progress:
                progress(number, total)
        return len(writer.done)


def _check(stores: Sequence[Store]) -> None:
    """``UserError`` if the stores cannot be one."""
    for number, store in enumerate(stores):
        difference = stores[0].meta.difference(store.meta)
        if difference:
            raise UserError(f"{store.path}: cannot be merged with {stores[0].path}: {difference}")
        for key in store:
            first = next((other for other in stores[:number] if key in other), None)
            if first is not None:
                _check_same(key, store, first.path, first.sha256(key))


def _check_same(key: str, store: Store, other: Path, sha256: str) -> None:
    if store.sha256(key) != sha256:
        raise UserError(
            f"{store.path}: image {key} is another file (SHA-256 {short(store.sha256(key))}) than "
            f"in {other} ({short(sha256)}); label the same files on all machines"
        )


def _keys(stores: Sequence[Store]) -> Iterator[str]:
    """Every image key of every store, in turn from each."""
    for row in itertools.zip_longest(*stores):
        yield from (key for key in row if key is not None)


def _rows(key: str, owners: Sequence[Store]) -> dict:
    """What the stores know of an image, as `StoreWriter.add` takes it."""
    rows = owners[0].rows(key)
    for store in owners[1:]:
        more = store.rows(key)
        new = [i for i, name in enumerate(more["prompts"]) if name not in rows["prompts"]]
        rows["prompts"] = (*rows["prompts"], *(more["prompts"][i] for i in new))
        for name in ("coverage", "iou"):
            rows[name] = np.concatenate([rows[name], more[name][new]])
    return rows
