"""The language model's passes over the texts of a batch, with no work done twice.

The images are looked at once; what all texts begin with (a system prompt) is read once for each
image; the layers below the first looking one may be left out (`text_memory`); and the output layer
is computed for the supervised positions only. All of it is exact.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.text_rows import TextGroup
from ..models.agevlm import AgeVLM
from ..models.text_states import given_states
from .losses import token_loss
from .text_memory import TextMemory

#: A shorter beginning is not worth a pass of its own.
LEAST_BEGINNING = 8


class Reader:
    """Reads texts about a batch's images.

    z_img [B S D]: the projected tokens of the images; groups: all texts that will be read.
    """

    def __init__(
        self,
        model: AgeVLM,
        z_img: mx.array,
        groups: Sequence[TextGroup],
        memory: TextMemory | None = None,
    ) -> None:
        self._model, self._memory = model, memory
        self._seen = model.look(z_img)
        beginning = common_beginning(groups)
        #: How many tokens were read for all texts.
        self.begun = 0
        if len(beginning) >= LEAST_BEGINNING and model.can_begin(self._seen):
            ids = mx.broadcast_to(mx.array(beginning)[None], (z_img.shape[0], len(beginning)))
            states = None
            if memory is not None:
                states = memory.of_text(beginning)[None]
                states = mx.broadcast_to(states, (z_img.shape[0], *states.shape[1:]))
            with self._given(states):
                self._seen = model.begin(self._seen, ids)
            self.begun = len(beginning)

    def read(
        self,
        group: TextGroup,
        *,
        guided: bool = False,
        heads: int | None = None,
        layers: Collection[int] | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """logits [n V] of a group's supervised positions (`TextGroup.supervised`) and, if `guided`,
        attn_map [P L heads S] of its rows, of these heads and layers (see ``AgeVLM.attend``)."""
        states = None if self._memory is None else self._memory.of(group)
        if self.begun:
            group = _after(group, self.begun)
            states = None if states is None else states[:, self.begun :]
        segments = None if group.segments is None else mx.array(group.segments).flatten(0, 1)
        cache = self._model.share(self._seen, group.ids.shape[1], segments)
        ids = mx.array(group.ids).flatten(0, 1)  # [B*R T]
        at = tuple(map(mx.array, group.supervised))

        def keep(out: mx.array) -> mx.array:
            return out[at][None]

        with self._given(states):
            if not guided:
                return self._model(ids, cache, keep=keep)[0], None
            rows, cols = mx.array(group.rows), mx.array(group.cols)
            logits, maps = self._model.attend(ids, cache, rows, cols, heads, layers, keep=keep)
            return logits[0], maps

    def _given(self, states: mx.array | None) -> AbstractContextManager[Any]:
        return nullcontext() if states is None else given_states(self._model, states)


def text_loss(logits: mx.array, group: TextGroup) -> tuple[mx.array, float]:
    """`token_loss` of a group from its logits [n V], as `Reader.read` gives them."""
    at, shape = group.supervised, (-1, group.ids.shape[-1])
    return token_loss(logits, group.labels.reshape(shape)[at], group.loss_mask.reshape(shape)[at])


def common_beginning(groups: Sequence[TextGroup]) -> np.ndarray:
    """i32 [n], the tokens that all texts begin with, as far as nothing is asked of them: no label,
    no map. None where rows hold several texts, or where there is one text an image only."""
    first: np.ndarray | None = None
    n = min(group.ids.shape[-1] for group in groups) - 1
    if any(g.segments is not None for g in groups) or sum(g.ids.shape[1] for g in groups) < 2:
        return np.zeros(0, np.int32)
    for group in groups:
        ids = group.ids.reshape(-1, group.ids.shape[-1])
        rows, columns = asked(group)
        n = min(n, int(columns.min(initial=n)))
        texts = ids[np.unique(rows)]  # not the rows that no text fills
        if not len(texts):
            continue
        first = texts[0] if first is None else first
        differ = (texts[:, :n] != first[:n]).any(axis=0)
        n = int(differ.argmax()) if differ.any() else n
    return np.zeros(0, np.int32) if first is None else first[:n]


def asked(group: TextGroup) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the positions that are supervised, or whose maps are."""
    kept = group.weight > 0
    if group.absent is not None:
        kept = kept | (group.absent > 0)
    rows, columns = group.supervised
    return np.append(rows, group.rows[kept]), np.append(columns, group.cols[kept])


def _after(group: TextGroup, n: int) -> TextGroup:
    """A group without its first `n` columns."""
    return replace(
        group,
        ids=group.ids[..., n:],
        labels=group.labels[..., n:],
        loss_mask=group.loss_mask[..., n:],
        cols=np.maximum(group.cols - n, 0),  # rows of weight 0 are anywhere
    )
