"""What the layers below the first looking one make of a text: the image does not change it.

With ``fusion = "cross"`` these layers read the text alone. Their last hidden states can be computed
once for a text and given to the model again, for whatever image the text is about.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .agevlm import AgeVLM
from .graft import language_model_width
from .hidden_states import hidden_states, reclassed

#: The text that is tried.
_TOKENS = 24


def text_states(model: AgeVLM, ids: mx.array) -> mx.array:
    """ids int32 [B T] -> what the first looking layer is given, [B T D], from an empty cache."""
    below = _below(model)
    with hidden_states(below) as states, reclassed(model.layers[len(below) :], _passing(None)):
        model(ids)
    return states[len(below)]


@contextlib.contextmanager
def given_states(model: AgeVLM, states: mx.array) -> Iterator[None]:
    """One call of `model` inside the block takes `states` [B T D] of its text, as `text_states`
    makes them, instead of running the layers below the first looking one."""
    with reclassed(_below(model), _passing(states)):
        yield


def why_not_given(model: AgeVLM) -> str | None:
    """The reason why `model` cannot be given the states of a text, or None if it can.

    Found by trying: layers that hand on more than their hidden states, or whose input goes to
    later layers too, cannot be left out. Dropout is switched off for it.
    """
    if model.fusion != "cross":
        return f"fusion '{model.fusion}' sends the image through every layer"
    if not _below(model):
        return "its first layer looks at the image"
    ids = (mx.arange(_TOKENS)[None] * 7 + 3) % model.args.vocab_size
    width = language_model_width(model.language_model)
    seen = model.look(mx.random.normal((1, model.num_image_tokens, width), key=mx.random.key(0)))
    training = model.training
    model.eval()
    try:
        whole = model(ids, model.share(seen, 1))
        with given_states(model, text_states(model, ids)):
            parts = model(ids, model.share(seen, 1))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return f"its layers cannot be left out: {error}"
    finally:
        model.train(training)
    # The same arithmetic in the same order: nothing but another architecture's way differs.
    same = mx.allclose(whole, parts, rtol=1e-3, atol=1e-3 * float(mx.abs(whole).max()))
    return None if same else "a layer reads more than what the layer before it hands on"


def _below(model: AgeVLM) -> list[Any]:
    """The layers before the first looking one."""
    return list(model.layers[: model.looking_layers[0]])


def _passing(states: mx.array | None) -> Callable[[type], type]:
    """A layer's class that hands on `states`, or without them what it is given."""

    def change(kind: type) -> type:
        def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return x if states is None else states

        return type(kind.__name__, (kind,), {"__call__": call})

    return change
