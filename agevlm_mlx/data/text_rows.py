"""Texts with the places they should look at, and the arrays that hold rows of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .chat import Encoded

#: Lengths are padded to multiples of these, so that few different shapes occur.
TOKENS, ROWS = 4, 32


@dataclass(frozen=True)
class Text:
    """A record drawn for a batch. guided: columns of its row, and f32 [S], where they look.
    absent: columns that are about something absent. hidden: columns whose token is not shown."""

    record_id: str
    kind: str
    encoded: Encoded
    guided: tuple[tuple[int, np.ndarray], ...]
    absent: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Positions in a row: the last token is predicted, but predicts nothing."""
        return len(self.encoded.ids) - 1


@dataclass
class TextGroup:
    """R rows of texts for each of B images. P guided positions, padded with weight 0.

    ids, labels (the next token): i32 [B R T]; loss_mask: f32 [B R T], 1 where the label counts.
    rows (b*R + r), cols: i32 [P]; target: f32 [P S], mask coverage 0..1; weight: f32 [P].
    absent: f32 [P], 1 for positions (of weight 0) that are about something absent; None without.
    kinds: of each of the B*R rows, those of its texts, one after another.
    segments: i32 [B R T], for packed rows the number of the text that a position belongs to,
    -1 for padding; None where a row is one text.
    """

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    segments: np.ndarray | None = None
    absent: np.ndarray | None = None
    kinds: tuple[tuple[str, ...], ...] = ()

    @property
    def supervised(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (b*R + r) and columns i64 [n] of the positions whose label counts, in order."""
        rows, columns = np.nonzero(self.loss_mask.reshape(-1, self.loss_mask.shape[-1]))
        return rows, columns


def hide(text: Text, share: float, rng: np.random.Generator) -> Text:
    """`text` with about a `share` of its answers' tokens hidden; what is hidden guides nothing."""
    said = np.flatnonzero(text.encoded.loss_mask[: len(text)])
    hidden = {int(column) for column in said[rng.random(len(said)) < share]}
    return replace(
        text,
        guided=tuple((column, mask) for column, mask in text.guided if column not in hidden),
        absent=tuple(column for column in text.absent if column not in hidden),
        hidden=tuple(sorted(hidden)),
    )


def round_up(n: int, step: int = TOKENS) -> int:
    """The next multiple of `step`, at least one."""
    return max(step, -(-n // step) * step)


def text_group(
    rows: Sequence[Sequence[Sequence[Text]]], T: int, cells: int, pad: int, *, packed: bool
) -> TextGroup:
    """The arrays of the texts of B images x R rows, those of a row one after another.

    T: columns, cells: S, pad: the id of unused columns, which have no loss.
    """
    B, R = len(rows), len(rows[0])
    ids, labels = (np.full((B * R, T), pad, np.int32) for _ in range(2))
    loss_mask = np.zeros((B * R, T), np.float32)
    segments = np.full((B * R, T), -1, np.int32)
    guided: list[tuple[int, int, np.ndarray | None]] = []
    for row, texts in enumerate(texts for image in rows for texts in image):
        start = 0
        for number, text in enumerate(texts):
            encoded, here = text.encoded, slice(start, start + len(text))
            ids[row, here], labels[row, here] = encoded.ids[:-1], encoded.ids[1:]
            ids[row, [start + column for column in text.hidden]] = pad
            loss_mask[row, here] = encoded.loss_mask[1:]
            segments[row, here] = number
            guided += [(row, start + column, target) for column, target in text.guided]
            guided += [(row, start + column, None) for column in text.absent]
            start += len(text)
    P = round_up(len(guided), ROWS)
    place = np.zeros((2, P), np.int32)
    target = np.zeros((P, cells), np.float32)
    weight, absent = np.zeros(P, np.float32), np.zeros(P, np.float32)
    for p, (row, column, coverage) in enumerate(guided):
        place[:, p] = row, column
        if coverage is None:
            absent[p] = 1
        else:
            target[p], weight[p] = coverage, 1
    shape = (B, R, T)
    return TextGroup(
        ids.reshape(shape),
        labels.reshape(shape),
        loss_mask.reshape(shape),
        place[0],
        place[1],
        target,
        weight,
        segments.reshape(shape) if packed else None,
        absent if absent.any() else None,
        tuple(tuple(text.kind for text in texts) for image in rows for texts in image),
    )
