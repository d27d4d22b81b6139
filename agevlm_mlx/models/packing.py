"""Whether a language model can read several texts in one row, each as if it were alone."""

import mlx.core as mx

from .agevlm import AgeVLM
from .graft import language_model_width

#: Tokens of the two texts that are tried.
_FIRST, _SECOND = 33, 9
#: The share of the logits' spread by which they may differ. Rounding stays far below it also in
#: bfloat16; positions that count from the row's start, or a look at the neighbour, do not.
_MOST = 0.2


def why_not_packed(model: AgeVLM) -> str | None:
    """The reason why `model` cannot be trained on packed rows, or None if it can.

    Found by trying, on the second of two texts in a row. So learned positions, states that run
    on through a row, and masks of an architecture's own show, whatever it is called.
    """
    if model.fusion != "cross":
        return f"fusion '{model.fusion}' puts the image into each text's own row"
    ids = (mx.arange(_FIRST + _SECOND) * 7 + 3) % model.args.vocab_size
    other = mx.where(mx.arange(len(ids)) < _FIRST, ids[::-1], ids)
    segments = (mx.arange(len(ids)) >= _FIRST).astype(mx.int32)[None]
    width = language_model_width(model.language_model)
    seen = model.look(mx.zeros((1, model.num_image_tokens, width)))
    try:
        packed, beside = (
            model(row[None], model.share(seen, 1, segments))[0, _FIRST:] for row in (ids, other)
        )
    except ValueError as error:
        return str(error)
    alone = model(ids[None, _FIRST:], model.share(seen, 1))[0]
    spread = float(alone.astype(mx.float32).std())

    def differ(logits: mx.array) -> bool:
        return float(mx.abs(packed - logits).max()) > _MOST * spread

    if differ(beside):
        return "its language model lets a text see what stands before it in its row"
    return "its language model counts positions from the row's start" if differ(alone) else None
