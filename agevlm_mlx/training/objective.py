"""The loss of a batch: one pass of the encoder, one of the language model per group of texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..data.batches import Batch, TextGroup
from ..errors import UserError
from ..models.agevlm import AgeVLM
from .losses import EPS, absent_loss, attention_loss, feature_loss, soft_mask
from .reading import begin_texts, read_texts, text_loss
from .stages import AttentionLoss, Losses
from .text_memory import TextMemory

#: The parts of a loss, in the order `batch_loss` returns them.
PARTS = ("lm", "attention", "absent", "features")
#: Kinds of texts that describe the whole picture; all others are questions with an answer.
CAPTIONS = ("caption", "describe", "sentence_caption")


class FeatureAdaptor(nn.Module):
    """Predicts the teacher's features on the token grid from the vision encoder's tokens.

    Lives in ``model.sam_adaptor`` while a run distils features and is not part of the finished
    model. z_vis [B S' Dv] -> [B S C]; where the grids differ, whole blocks of cells are averaged.
    """

    def __init__(
        self, width: int, channels: int, vision_grid: tuple[int, int], grid: tuple[int, int]
    ):
        super().__init__()
        if any(fine % coarse for fine, coarse in zip(vision_grid, grid, strict=True)):
            raise UserError(
                f"losses.features: expected a token grid that divides the encoder's {vision_grid}, "
                f"got {grid}"
            )
        self._vision_grid, self._grid = vision_grid, grid
        self.fc1 = nn.Linear(width, 2 * width)
        self.norm = nn.RMSNorm(2 * width)
        self.fc2 = nn.Linear(2 * width, channels)

    def __call__(self, z_vis: mx.array) -> mx.array:
        (gh, gw), (Gh, Gw) = self._vision_grid, self._grid
        if (gh, gw) != (Gh, Gw):
            blocks = z_vis.reshape(z_vis.shape[0], Gh, gh // Gh, Gw, gw // Gw, -1)
            z_vis = blocks.mean(axis=(2, 4)).flatten(1, 2)
        return self.fc2(nn.relu(self.norm(self.fc1(z_vis))))


@dataclass(frozen=True)
class Totals:
    """What the means of a step's loss are taken over: all of its batch, in however many parts.

    tokens: summed weight of the supervised tokens; guided: of the guided rows; absent: of those
    about absent things; cells: feature cells that are not the teacher's padding.
    """

    tokens: float
    guided: float
    absent: float
    cells: float

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "Totals":
        """Those of these parts."""
        tokens = guided = absent = cells = 0.0
        for batch in batches:
            tokens += sum(float(group.loss_mask.sum()) for group in batch.groups)
            guided += sum(float(group.weight.sum()) for group in batch.groups)
            absent += sum(_absent(group) for group in batch.groups)
            if batch.sam_features is not None:
                cells += float(_inside(batch.sam_features).sum())
        return cls(tokens, guided, absent, cells)


def _absent(group: TextGroup) -> float:
    return 0.0 if group.absent is None else float(group.absent.sum())


def _inside(features: np.ndarray) -> np.ndarray:
    """bool [B S]: the store marks the teacher's padding by features that are all exactly 0."""
    return (features != 0).any(axis=-1)


def batch_loss(
    model: AgeVLM,
    batch: Batch,
    losses: Losses,
    totals: Totals | None = None,
    memory: TextMemory | None = None,
) -> tuple[mx.array, mx.array]:
    """The weighted loss f32 [] of a batch, and its unweighted parts f32 [4] (see `PARTS`).

    The next-token loss is a mean over all supervised tokens of the step, the attention loss over
    all its guided rows, that of absent things over theirs, that of the features over all cells;
    none depends on how the texts are grouped. With the `totals` of a step of which `batch` is a
    part, this is the part's share: losses and gradients of the parts add up to those of the whole.
    With a `memory` of texts, of this model as it is, they are the same for less work.
    """
    totals = totals or Totals.of([batch])
    z_vis = model.encode(mx.array(batch.pixels))
    seen, begun = begin_texts(model, model.look(model.project(z_vis)), batch.groups, memory)
    wanted = losses.attention
    lm, attention, absent = mx.array(0.0), mx.array(0.0), mx.array(0.0)
    for group in batch.groups:
        weight = float(group.weight.sum()) if wanted.weight > 0 else 0.0
        nowhere = _absent(group) if wanted.absent > 0 else 0.0
        guided = weight > 0 or nowhere > 0
        logits, attn_map = read_texts(
            model,
            seen,
            group,
            guided=guided,
            heads=wanted.heads,
            layers=wanted.layers,
            memory=memory,
            begun=begun,
        )
        lm = lm + text_loss(logits, group)[0]
        if attn_map is not None and weight > 0:
            mean = attention_loss(
                attn_map, mx.array(group.target), mx.array(group.weight), wanted.kind
            )
            attention = attention + mean * weight
        if attn_map is not None and group.absent is not None and nowhere > 0:
            absent = absent + absent_loss(attn_map, mx.array(group.absent)) * nowhere
    lm, attention = lm / max(totals.tokens, EPS), attention / max(totals.guided, EPS)
    absent, features = absent / max(totals.absent, EPS), mx.array(0.0)
    if losses.features > 0:
        features = _distillation(model, z_vis, batch, totals)
    total = losses.lm * lm + wanted.weight * attention + losses.features * features
    if wanted.absent > 0:
        total = total + wanted.absent * absent
    return total, mx.stack([lm, attention, absent, features])


def loss_and_gradients(
    model: AgeVLM,
    params: dict[str, mx.array],
    batch: Batch,
    losses: Losses,
    totals: Totals | None = None,
    dtype: mx.Dtype = mx.float32,
    memory: TextMemory | None = None,
) -> tuple[tuple[mx.array, mx.array], dict[str, mx.array]]:
    """`batch_loss`, and its gradients by the names of `params`; all still to be evaluated.

    `params` f32 are what is differentiated; the model computes with them as `dtype`. Only what
    leads to them is differentiated: a frozen encoder costs its forward pass.
    """

    def loss(params: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        place(model, params, dtype)
        return batch_loss(model, batch, losses, totals, memory)

    result = mx.value_and_grad(loss)(params)
    place(model, params, dtype)  # instead of the tracers
    return result


def place(model: AgeVLM, params: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Give the model these parameters by name, as `dtype`."""
    model.update(tree_unflatten([(name, value.astype(dtype)) for name, value in params.items()]))


def _distillation(model: AgeVLM, z_vis: mx.array, batch: Batch, totals: Totals) -> mx.array:
    assert batch.sam_features is not None  # checked when the store was opened
    inside = _inside(batch.sam_features)
    mean = feature_loss(model["sam_adaptor"](z_vis), mx.array(batch.sam_features), mx.array(inside))
    return mean * (float(inside.sum()) / max(totals.cells, EPS))


def validate(
    model: AgeVLM,
    batches: Iterable[Batch],
    attention: AttentionLoss,
    add_up: Callable[[Sequence[float]], list[float]] = list,
) -> dict[str, Any]:
    """Next-token loss, pointing rate and right answers over validation batches.

    Pointing: the share of guided rows whose most attended token (mean over the layers and heads
    that `attention` supervises) has a `soft_mask` of at least one half. Answers: the share of
    texts other than captions (those of packed rows apart) of which every supervised token is the
    most likely one, given all before it; and the same of kinds called ``.._hard``. None without
    any. `add_up` sums what several processes have counted, each in batches of its own.
    """
    nll, tokens, hits, rows = 0.0, 0.0, 0.0, 0.0
    right, asked = np.zeros(2), np.zeros(2)  # of all, and of the hard ones
    for batch in batches:
        seen = model.look(model.project(model.encode(mx.array(batch.pixels))))
        seen, begun = begin_texts(model, seen, batch.groups)
        for group in batch.groups:
            guided = bool(group.weight.any())
            logits, attn_map = read_texts(
                model,
                seen,
                group,
                guided=guided,
                heads=attention.heads,
                layers=attention.layers,
                begun=begun,
            )
            loss, weight = text_loss(logits, group)
            nll, tokens = nll + float(np.array(loss)), tokens + weight
            for kind, is_right in _answers(logits, group):
                which = np.array([1, kind.endswith("_hard")])
                asked, right = asked + which, right + which * is_right
            if attn_map is not None:
                kept = group.weight > 0
                mean_map = attn_map.astype(mx.float32).mean(axis=(1, 2))
                peak = np.array(mean_map.argmax(-1))[kept]
                mask = np.array(soft_mask(mx.array(group.target)))[kept]
                hits += float((mask[np.arange(len(peak)), peak] >= 0.5).sum())
                rows += len(peak)
    nll, tokens, hits, rows, right, right_hard, asked, asked_hard = add_up(
        [nll, tokens, hits, rows, *right.tolist(), *asked.tolist()]
    )
    return {
        "val_lm": nll / max(tokens, EPS),
        "val_pointing": hits / rows if rows else None,
        "val_answers": right / asked if asked else None,
        "val_answers_hard": right_hard / asked_hard if asked_hard else None,
    }


def _answers(logits: mx.array, group: TextGroup) -> Iterator[tuple[str, bool]]:
    """Of each text in a row of its own that is no caption its kind, and whether it is right.

    `logits` [n V] of the supervised positions.
    """
    texts = [
        (row, kinds[0])
        for row, kinds in enumerate(group.kinds)
        if len(kinds) == 1 and kinds[0] not in CAPTIONS
    ]
    if not texts:
        return  # saves the search for the most likely tokens
    rows, columns = group.supervised
    labels = group.labels.reshape(-1, group.ids.shape[-1])[rows, columns]
    wrong = set(rows[np.array(logits.argmax(axis=-1)) != labels].tolist())
    for row, kind in texts:
        yield kind, row not in wrong
