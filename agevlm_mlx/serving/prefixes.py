"""Texts that the model has read before, so that a follow-up question is not read from the start."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..prompts import Seen, agreement


@dataclass(frozen=True)
class _Entry:
    seen: Seen
    ids: tuple[int, ...]
    texts: list[Any]
    nbytes: int

    def usable(self, seen: Seen, ids: Sequence[int]) -> int:
        """How many of `ids` these caches hold as a text with the images `seen` would have them."""
        n = agreement(self.ids, self.seen, ids, seen)
        return n if n == len(self.ids) or can_trim_prompt_cache(self.texts) else 0


class Prefixes:
    """The text caches of the last answers, the one used longest ago goes first. For one thread.

    mlx-lm's LRUPromptCache does this for text alone: it wants one key for all the images and
    keeps something of every key for ever. With a few entries a list will do.
    """

    def __init__(self, max_size: int = 10, max_bytes: int = 1 << 30) -> None:
        self.max_size, self.max_bytes = max_size, max_bytes
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def fetch(self, seen: Seen, ids: Sequence[int]) -> tuple[list[Any], int]:
        """Text caches, one a layer, that hold the first n of `ids`, and n.

        n is less than len(ids), because the last token must be fed; 0 and no caches if nothing
        fits.
        """
        found = [(entry.usable(seen, ids[:-1]), entry) for entry in self._entries]
        n, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or not n:
            return [], 0
        self._entries.remove(best)
        self._entries.append(best)
        texts = copy.deepcopy(best.texts)
        if n < len(best.ids):
            trim_prompt_cache(texts, len(best.ids) - n)
        return texts, n

    def keep(self, seen: Seen, ids: Sequence[int], texts: list[Any]) -> None:
        """Remember the text caches of `ids`; what they begin with needs no entry of its own."""
        if not self.max_size or not self.max_bytes:
            return
        # A row taken out of a batch would otherwise hold on to the whole batch.
        mx.eval([text.state for text in texts])
        new = _Entry(seen, tuple(ids), texts, sum(text.nbytes for text in texts))
        self._entries = [
            entry for entry in self._entries if new.usable(entry.seen, entry.ids) < len(entry.ids)
        ]
        self._entries.append(new)
        while self._entries and (
            len(self._entries) > self.max_size or self.nbytes > self.max_bytes
        ):
            del self._entries[0]
