"""The losses: next token, attention inside the mask, features like the teacher's.

Attention losses take one map per guided row, ``attn`` f32[P S] (a share of attention for each
image token, summing to at most 1), and how much of each token's cell the object covers,
``target`` f32[P S] in 0..1. They return f32[P], are 0 (up to ``EPS``) at their optimum, and are
combined by `attention_loss`. Sources: -log mass and its weight from our own trials; KL from
KLAL (arXiv 2511.12738); Dice from F-LMM and LISA, on maps divided by their maximum because
softmax maps are far below 1; (1 - E)^2 from TokenCompose and layout guidance; the sum of BCE and
Dice from F-LMM (arXiv 2406.05821) and LISA (arXiv 2308.00692), BCE of attention maps from
TokenCompose (arXiv 2312.03626).
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

#: Keeps logarithms and divisions finite; the -log mass of a map with no mass is 13.8.
EPS = 1e-6
#: Share of the KL target spread evenly over all tokens, so that no token has probability 0.
SMOOTHING = 0.05
#: How far from 0 and 1 the numbers stay that `bce_dice` takes logarithms of: a map divided by its
#: maximum is 0 in most places, and 1 in one wherever that is.
EDGE = 0.01


Array = mx.array | np.ndarray


def token_loss(logits: mx.array, labels: Array, loss_mask: Array) -> tuple[mx.array, float]:
    """The summed cross-entropy of the tokens in `loss_mask`, and their summed weight.

    `logits` [.. V], one row for each of `labels` i32 and `loss_mask` f32 (0 leaves a token out),
    in any shape. Rows outside the mask are dropped first: the exponentials of a log-sum-exp over
    the vocabulary are what is slow here on a CPU.
    """
    weights = np.asarray(loss_mask, dtype=np.float32).reshape(-1)
    rows = np.flatnonzero(weights)
    if not rows.size:
        return mx.array(0.0), 0.0
    picked = logits.reshape(-1, logits.shape[-1])
    if rows.size < weights.size:
        picked = picked[mx.array(rows)]
    picked = picked.astype(mx.float32)
    wanted = mx.array(labels).reshape(-1)[mx.array(rows)]
    chosen = mx.take_along_axis(picked, wanted[:, None], axis=-1)[:, 0]
    cross_entropy = mx.logsumexp(picked, axis=-1) - chosen
    return (cross_entropy * mx.array(weights[rows])).sum(), float(weights[rows].sum())


def lm_loss(logits: mx.array, labels: Array, loss_mask: Array) -> mx.array:
    """Mean cross-entropy over the tokens in `loss_mask`, 0 without any; see `token_loss`."""
    total, weight = token_loss(logits, labels, loss_mask)
    return total / max(weight, EPS)


def soft_mask(target: mx.array) -> mx.array:
    """Coverage [P S] divided by that of the object's own fullest cell.

    A small object covers no cell fully: unscaled, the best reachable mass would depend on its
    size. Cells at the object's rim count less, so that the peak lies well inside.
    """
    return target / mx.maximum(target.max(axis=-1, keepdims=True), EPS)


def minus_log_mass(attn: mx.array, target: mx.array) -> mx.array:
    """-log of the attention inside the mask: free to spread there, steep when it is outside."""
    return -mx.log((attn * soft_mask(target)).sum(-1) + EPS)


def one_minus_mass(attn: mx.array, target: mx.array) -> mx.array:
    """(1 - mass)^2, whose gradient fades with the mass.

    It can therefore hardly pull back a map that is all outside.
    """
    return (1.0 - (attn * soft_mask(target)).sum(-1)).square()


def kl(attn: mx.array, target: mx.array) -> mx.array:
    """KL(smoothed mask || attention) over the image tokens: asks for the mask's own shape."""
    wanted = soft_mask(target)
    wanted = wanted / mx.maximum(wanted.sum(-1, keepdims=True), EPS)
    wanted = (1.0 - SMOOTHING) * wanted + SMOOTHING / target.shape[-1]
    given = attn / mx.maximum(attn.sum(-1, keepdims=True), EPS)
    return (wanted * (mx.log(wanted) - mx.log(given + EPS))).sum(-1)


def dice(attn: mx.array, target: mx.array) -> mx.array:
    """1 - Dice overlap of the mask and the map divided by its maximum; 0 when they are equal."""
    wanted = soft_mask(target)
    given = attn / mx.maximum(attn.max(-1, keepdims=True), EPS)
    overlap = 2.0 * (given * wanted).sum(-1) + EPS
    return 1.0 - overlap / (given.square().sum(-1) + wanted.square().sum(-1) + EPS)


def bce_dice(attn: mx.array, target: mx.array) -> mx.array:
    """`dice` plus the mean binary cross-entropy of the same two, beyond that of the mask itself.

    The cross-entropy judges every token by itself: unlike a share of mass it also says where in
    the object nothing looks. What a soft mask costs even at its best is subtracted, so that 0 is
    the optimum. Both are kept within `EDGE` .. 1 - `EDGE`.
    """
    wanted = EDGE + (1.0 - 2.0 * EDGE) * soft_mask(target)
    given = attn / mx.maximum(attn.max(-1, keepdims=True), EPS)
    given = EDGE + (1.0 - 2.0 * EDGE) * given
    beyond = wanted * mx.log(wanted / given) + (1.0 - wanted) * mx.log(
        (1.0 - wanted) / (1.0 - given)
    )
    return dice(attn, target) + beyond.mean(-1)


LOSSES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "mass": minus_log_mass,
    "one_minus_mass": one_minus_mass,
    "kl": kl,
    "dice": dice,
    "bce_dice": bce_dice,
}


def attention_loss(
    attn_map: mx.array, target: mx.array, weight: mx.array, kind: str = "mass"
) -> mx.array:
    """Mean of an attention loss over guided rows, weighted by `weight` f32[P].

    `attn_map` [P L N' S] holds the supervised layers and heads only and is averaged over both,
    in fp32, before the loss: a phrase is found when the heads find it together. Rows of weight 0
    (padding) change neither the value nor any gradient, whatever they hold.
    """
    kept = weight > 0
    attn = mx.where(kept[:, None], attn_map.astype(mx.float32).mean(axis=(1, 2)), 1.0)
    target = mx.where(kept[:, None], target.astype(mx.float32), 1.0)
    per_row = LOSSES[kind](attn, target)
    return (per_row * weight).sum() / mx.maximum(weight.sum(), EPS)


def absent_loss(attn_map: mx.array, weight: mx.array) -> mx.array:
    """Mean of -log of what does not go to the image over rows weighted by `weight` f32[P].

    `attn_map` [P L N' S] as for `attention_loss`, of layers with a null slot, to which the rest of
    their attention goes: a word about nothing in the picture should look at nothing in it.
    """
    kept = weight > 0
    attn = mx.where(kept[:, None], attn_map.astype(mx.float32).mean(axis=(1, 2)), 0.0)
    null = mx.maximum(1.0 - attn.sum(-1), 0.0)  # a sum of shares may round to above 1
    return (-mx.log(null + EPS) * weight).sum() / mx.maximum(weight.sum(), EPS)


def feature_loss(predicted: mx.array, target: mx.array, valid: mx.array) -> mx.array:
    """0.9 (1 - cosine) + 0.1 smooth-L1 between predicted and teacher features.

    `predicted`, `target` [B S C], the teacher's centred and scaled (uncentred SAM features share
    one large component, which alone gives a high cosine); `valid` [B S], 0 on the teacher's
    padding. Shares from AM-RADIO.
    """
    predicted, target = predicted.astype(mx.float32), target.astype(mx.float32)
    valid = valid.astype(mx.float32)
    norms = mx.rsqrt(predicted.square().sum(-1) + EPS) * mx.rsqrt(target.square().sum(-1) + EPS)
    cosine = (predicted * target).sum(-1) * norms
    gap = mx.abs(predicted - target)
    smooth = mx.where(gap < 1.0, 0.5 * gap.square(), gap - 0.5).mean(-1)
    per_token = 0.9 * (1.0 - cosine) + 0.1 * smooth
    return (per_token * valid).sum() / mx.maximum(valid.sum(), EPS)
