"""Attention as data: where a token looked, and how definite that look was."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenAttention:
    """Where the model looked when it chose a token; the mean over the heads.

    values: f32 [L S'], one row a looking layer, S' = S image tokens of each image in order.
    grid: Gh, Gw of an image's tokens. has_null: whether what is missing from a row's sum went to
    a null slot (else, with fusion "concat", to the text).
    """

    values: np.ndarray
    grid: tuple[int, int]
    has_null: bool

    @property
    def maps(self) -> np.ndarray:
        """f32 [L M Gh Gw] for M images."""
        return self.values.reshape(len(self.values), -1, *self.grid)

    @property
    def mean(self) -> np.ndarray:
        """f32 [M Gh Gw]: the mean over the layers."""
        return self.maps.mean(0)

    @property
    def on_image(self) -> float:
        """The share of the attention that went to the images, 0..1."""
        return float(self.values.sum(-1).mean())

    @property
    def null(self) -> float | None:
        """The share that went to the null slot; None for a model without one."""
        return 1 - self.on_image if self.has_null else None

    @property
    def grounding(self) -> float:
        """0..1: how much of the attention is on the images, and how concentrated it is there."""
        return grounding_score(self.values.mean(0))


#: A word that names something and scores less is shown as "not grounded". Chosen on 300 held-out
#: scenes near the threshold (0.265) with the largest Youden's J for the nouns that adversarial
#: questions ask for. On 200 other scenes it flags 92 % [88, 96] of those that are not there; of
#: what is there 4 % [2, 7] when asked for and 0.4 % [0, 1] when the shipped model says it in a
#: caption. It said nothing there that was not (502 nouns), so that captions cannot tell what the
#: mark is worth in them. P(yes) of a noun asked for by itself does better: AUROC 1.000 against
#: 0.990 [0.983, 0.995]. ``python scripts/measure_grounding.py``
NOT_GROUNDED = 0.26
#: The same for a person who sees such a mark.
NOT_GROUNDED_MEANS = (
    f"A word is marked as not grounded when its grounding score is below {NOT_GROUNDED}. On 200 "
    "embedded test scenes that marks 92 % of the absent things a question asks for, and 0 to 4 % "
    "of what is there. By itself the shipped model named nothing there that was not, so what a "
    "mark is worth in its answers could not be measured. A mark is a reason to look twice; no mark "
    "proves nothing. Asking for the word in “Is it in the picture?” tells more. For other "
    "models and pictures the threshold is not calibrated."
)


def grounding_score(attn_map: np.ndarray) -> float:
    """The share of attention on the images times one minus its normalised entropy there.

    attn_map: f32 [S'], what each image token got. 0: all of it on nothing, or spread evenly; 1: all
    of it on one token. It says how definite the look was, not that the answer is right.
    """
    values = np.asarray(attn_map, np.float64).ravel()
    share = float(values.sum())
    if share <= 0 or values.size < 2:
        return max(share, 0.0)
    p = values[values > 0] / share
    return float(share * (1 + (p * np.log(p)).sum() / np.log(values.size)))
