"""Which texts share a row, where rows may hold several (``pack``)."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from .text_rows import round_up

#: The length of a row at which self-attention over it counts as much as all else. Measured with
#: small models (``scripts/measure_batches.py``); for wide ones it is longer, to little effect.
_ATTENTION = 512


class Sized(Protocol):
    def __len__(self) -> int: ...


T = TypeVar("T", bound=Sized)


def packed_rows(images: Sequence[Sequence[T]]) -> tuple[list[list[list[T]]], int]:
    """The texts of each image in as few rows as they fit into, and the length of all rows.

    Every image gets the same number of rows, some of them empty. Of the row lengths
    from the longest text to all texts in one row the one is taken that costs the least.
    """
    longest = max((len(text) for texts in images for text in texts), default=1)
    most = max((sum(map(len, texts)) for texts in images), default=1)
    cuts = range(1, max((len(texts) for texts in images), default=1) + 1) or (1,)
    lengths = {round_up(max(longest, -(-most // cut))) for cut in cuts}
    filled = {length: [first_fit(texts, length) for texts in images] for length in lengths}
    counts = {length: max(1, *map(len, rows)) for length, rows in filled.items()}
    length = min(sorted(lengths), key=lambda length: counts[length] * _cost(length))
    return [
        [*rows, *([] for _ in range(counts[length] - len(rows)))] for rows in filled[length]
    ], length


def first_fit(texts: Sequence[T], length: int) -> list[list[T]]:
    """`texts`, the longest first, each in the first row of `length` where it fits."""
    rows: list[list[T]] = []
    room: list[int] = []
    for text in sorted(texts, key=len, reverse=True):
        row = next((row for row, left in enumerate(room) if len(text) <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(text)
        room[row] -= len(text)
    return rows


def _cost(length: int) -> float:
    """What a row costs, in positions: its self-attention grows with the square of its length."""
    return length * (1 + length / _ATTENTION)
