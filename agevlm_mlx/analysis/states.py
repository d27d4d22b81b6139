"""Hidden states of our models, layer by layer, and what the image is in the same coordinates.

With ``fusion = "concat"`` the image is a part of the sequence: its states are the mean over its
tokens at each layer. With ``"cross"`` the image is not in the text's stream; what stands for it is
what a layer's cross-attention would write into the stream if it looked evenly at the whole image:
the mean of its values through ``o_proj``, times the tanh of its gate (the attention alone, without
the gated MLP, where there is one). Such a state exists where a layer is grafted; the states below
the next grafted layer repeat it, and those below the first have the first one's.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import chat
from ..data.records import Turn
from ..models.agevlm import AgeVLM
from ..models.hidden_states import hidden_states


def answer_states(
    model: AgeVLM, tokenizer: Any, z_img: mx.array | None, texts: Sequence[str], prompt: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Hidden states of answers to `prompt` about one image; see ``subject.Subject.states``.

    z_img: the image's projected tokens [1 S D], or None. The means are over the answer's own
    tokens, without the one that ends it.
    """
    encoded = [
        chat.encode(tokenizer, (Turn("user", prompt), Turn("assistant", text)), ())
        for text in texts
    ]
    length = max(len(one.ids) for one in encoded)
    ids, mask = np.zeros((2, len(texts), length), np.int32)
    for n, one in enumerate(encoded):
        ids[n, : len(one.ids)] = one.ids
        own = np.flatnonzero(one.loss_mask)
        mask[n, own[:-1] if len(own) > 1 else own] = 1
    image = None
    if z_img is None:
        cache = model.make_cache()
    else:
        with hidden_states(model.layers) as states:
            cache = model.look(z_img, texts=len(texts))
        image = _image_states(model, z_img, states)
    with hidden_states(model.layers) as states:
        model(mx.array(ids), cache=cache)
    text = _pooled(states, mx.array(mask).astype(mx.float32)).swapaxes(0, 1)
    return np.array(text), None if image is None else np.array(image)


def _image_states(model: AgeVLM, z_img: mx.array, states: Sequence[mx.array]) -> mx.array:
    """f32 [layers+1 D]; see the module's text."""
    if model.fusion == "concat":
        return _pooled(states, mx.ones(z_img.shape[:2]))[:, 0]
    written = {}
    for i in model.looking_layers:
        block = model.language_model.layers[i].cross_attn
        _, values = block.project(z_img, null=False)  # [1 K S H]
        mean = mx.repeat(values.mean(2), block.n_heads // block.n_kv_heads, axis=1)  # [1 N H]
        written[i] = (block.o_proj(mean.reshape(1, -1)) * mx.tanh(block.gate))[0]
    first = model.looking_layers[0]
    # The block comes before its layer: what layer i hands on has it.
    below = [[i for i in model.looking_layers if i < n] for n in range(len(model.layers) + 1)]
    rows = [written[own[-1] if own else first] for own in below]
    return mx.stack(rows).astype(mx.float32)


def _pooled(states: Sequence[mx.array], mask: mx.array) -> mx.array:
    """f32 [layers+1 B D]: means of states [B T D] over the positions where `mask` [B T] is 1."""
    weights = mask / mx.maximum(mask.sum(-1, keepdims=True), 1)
    return mx.stack([weights[:, None] @ s.astype(mx.float32) for s in states])[:, :, 0]
