"""The language model's passes over the texts of a batch, with no work done twice.

What all texts begin with (a system prompt) is read once for each image, the layers below the first
looking one may be left out (`text_memory`), and the output layer is computed for the supervised
positions only. All of it is exact.
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
from .text_memory import TextMemory, asked

#: A shorter beginning is not worth a pass of its own.
LEAST_BEGINNING = 8


def begin_texts(
    model: AgeVLM, seen: list[Any], groups: Sequence[TextGroup], memory: TextMemory | None = None
) -> tuple[list[Any], int]:
    """`seen` (of ``model.look``) after the beginning that all texts of `groups` share, and the
    tokens of that: 0, and `seen` itself, where it would not help."""
    beginning = common_beginning(groups)
    if len(beginning) < LEAST_BEGINNING or not model.can_begin(seen):
        return seen, 0
    B = groups[0].ids.shape[0]
    states = None
    if memory is not None:
        own = memory.of_text(beginning)
        states = mx.broadcast_to(own[None], (B, *own.shape))
    with _given(model, states):
        ids = mx.broadcast_to(mx.array(beginning)[None], (B, len(beginning)))
        return model.begin(seen, ids), len(beginning)


def read_texts(
    model: AgeVLM,
    seen: list[Any],
    group: TextGroup,
    *,
    guided: bool,
    heads: int | None,
    layers: Collection[int] | None = None,
    memory: TextMemory | None = None,
    begun: int = 0,
) -> tuple[mx.array, mx.array | None]:
    """logits [n V] of a group's supervised positions (`TextGroup.supervised`) and, if `guided`,
    attn_map [P L heads S] of its rows, of these heads and layers (see ``AgeVLM.attend``).

    `seen` is what ``model.look`` gave for the batch's images; or, with `begun`, what `begin_texts`
    made of it. Most tokens are prompt or padding: with a large vocabulary their logits would cost
    more than layers. With a `memory` the layers below the first looking one are left out.
    """
    states = None if memory is None else memory.of(group)
    if begun:
        group = _after(group, begun)
        states = None if states is None else states[:, begun:]
    segments = None if group.segments is None else mx.array(group.segments).flatten(0, 1)
    cache = model.share(seen, group.ids.shape[1], segments)
    ids = mx.array(group.ids).flatten(0, 1)  # [B*R T]
    at = tuple(map(mx.array, group.supervised))

    def keep(out: mx.array) -> mx.array:
        return out[at][None]

    with _given(model, states):
        if not guided:
            return model(ids, cache, keep=keep)[0], None
        rows, cols = mx.array(group.rows), mx.array(group.cols)
        logits, maps = model.attend(ids, cache, rows, cols, heads, layers, keep=keep)
        return logits[0], maps


def text_loss(logits: mx.array, group: TextGroup) -> tuple[mx.array, float]:
    """`token_loss` of a group from its logits [n V], as `read_texts` gives them."""
    at, shape = group.supervised, (-1, group.ids.shape[-1])
    return token_loss(logits, group.labels.reshape(shape)[at], group.loss_mask.reshape(shape)[at])


def common_beginning(groups: Sequence[TextGroup]) -> np.ndarray:
    """i32 [n], the tokens that all texts begin with, as far as nothing is asked of them: no label,
    no map. Empty for packed rows, and for one text an image, to which nothing is common."""
    nothing = np.zeros(0, np.int32)
    if any(g.segments is not None for g in groups) or sum(g.ids.shape[1] for g in groups) < 2:
        return nothing
    texts: list[np.ndarray] = []
    n = min(group.ids.shape[-1] for group in groups) - 1
    for group in groups:
        rows, columns = asked(group)
        n = min(n, int(columns.min(initial=n)))
        # Not the rows that no text fills.
        texts += list(group.ids.reshape(-1, group.ids.shape[-1])[np.unique(rows)])
    if not texts:
        return nothing
    same = np.stack([text[:n] == texts[0][:n] for text in texts]).all(axis=0)
    return texts[0][: n if same.all() else int(same.argmin())]


def _after(group: TextGroup, n: int) -> TextGroup:
    """A group without its first `n` columns."""
    return replace(
        group,
        ids=group.ids[..., n:],
        labels=group.labels[..., n:],
        loss_mask=group.loss_mask[..., n:],
        cols=np.maximum(group.cols - n, 0),  # rows of weight 0 are anywhere
    )


def _given(model: AgeVLM, states: mx.array | None) -> AbstractContextManager[Any]:
    return nullcontext() if states is None else given_states(model, states)
