"""The lower layers' states of texts, kept from step to step while nothing trains these layers.

Below the first looking layer a text is read as if there were no image (`models.text_states`), so
while a stage leaves the embedding and these layers as they are, each different text goes through
them once. Questions about what is there come in a few hundred texts for any number of images.
"""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..data.bounded import Bounded
from ..data.text_rows import TextGroup
from ..models.agevlm import AgeVLM
from ..models.text_states import text_states, why_not_given
from .rules import parameter_scales
from .stages import Stage

#: Memory for the states; the least recently used are forgotten first.
MOST_BYTES = 1 << 29
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


class TextMemory:
    """States of texts by their tokens.

    Every text is computed on its own, so that its states are the same to the last bit whatever
    else is in the batch, in this run or in one that was resumed. most: bytes.
    """

    def __init__(self, model: AgeVLM, most: int = MOST_BYTES) -> None:
        self._model = model
        self._states = Bounded[mx.array](most)

    def of(self, group: TextGroup) -> mx.array | None:
        """What the first looking layer is given, [B*R T D]; zeros after the last position of a
        row that is asked for anything. None for packed rows, where a text starts anywhere."""
        if group.segments is not None:
            return None
        ids = group.ids.reshape(-1, group.ids.shape[-1])
        lengths = np.zeros(len(ids), int)
        rows, columns = asked(group)
        np.maximum.at(lengths, rows, columns + 1)
        texts = {row[:n].tobytes(): row[:n] for row, n in zip(ids, lengths, strict=True) if n}
        if not texts:
            return None
        states = {key: self._lazy(text) for key, text in texts.items()}
        mx.eval(*states.values())
        # One array of all different texts behind a row of zeros, and where each position is in it.
        first = dict(zip(states, np.cumsum([1, *map(len, texts.values())]), strict=False))
        at = np.zeros(ids.shape, np.int32)
        for row, n in enumerate(lengths):
            if n:
                at[row, :n] = first[ids[row, :n].tobytes()] + np.arange(n)
        some = next(iter(states.values()))
        return mx.concatenate([mx.zeros_like(some[:1]), *states.values()])[mx.array(at)]

    def of_text(self, ids: np.ndarray) -> mx.array:
        """The same of one text i32 [T]: [T D]."""
        states = self._lazy(ids)
        mx.eval(states)
        return states

    def _lazy(self, ids: np.ndarray) -> mx.array:
        def compute() -> mx.array:
            return text_states(self._model, mx.array(ids)[None])[0]

        return self._states.get(ids.tobytes(), compute, lambda states: states.nbytes)


def asked(group: TextGroup) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the positions that are supervised, or whose maps are."""
    kept = group.weight > 0
    if group.absent is not None:
        kept = kept | (group.absent > 0)
    rows, columns = group.supervised
    return np.append(rows, group.rows[kept]), np.append(columns, group.cols[kept])


def text_memory(model: AgeVLM, stage: Stage) -> TextMemory | None:
    """A memory for a stage, or None if it trains what the states depend on, or if the model
    cannot be given any."""
    first = model.looking_layers[0]
    for name in parameter_scales(model, stage):
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= first:
            continue
        if name.startswith("language_model.model."):
            return None
    below = [module for layer in model.layers[:first] for module in layer.modules()]
    if any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in below):
        return None
    return None if why_not_given(model) else TextMemory(model)
