"""Losses: gradients against finite differences in float64, optima, rows that must not matter."""

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.training import losses

P, S = 3, 6


def maps(rng: np.random.Generator) -> np.ndarray:
    """Attention shares f64[P S] that leave some mass for the null slot."""
    full = rng.dirichlet(np.ones(S + 1), size=P)
    return full[:, :S]


# The same formulas once more, in float64 numpy, written from the docstrings.


def numpy_soft_mask(target: np.ndarray) -> np.ndarray:
    return target / target.max(-1, keepdims=True)


def numpy_mass(attn: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -np.log((attn * numpy_soft_mask(target)).sum(-1) + losses.EPS)


def numpy_one_minus_mass(attn: np.ndarray, target: np.ndarray) -> np.ndarray:
    return (1 - (attn * numpy_soft_mask(target)).sum(-1)) ** 2


def numpy_kl(attn: np.ndarray, target: np.ndarray) -> np.ndarray:
    wanted = numpy_soft_mask(target)
    wanted = 0.95 * wanted / wanted.sum(-1, keepdims=True) + 0.05 / S
    given = attn / attn.sum(-1, keepdims=True)
    return (wanted * np.log(wanted / (given + losses.EPS))).sum(-1)


def numpy_dice(attn: np.ndarray, target: np.ndarray) -> np.ndarray:
    wanted, given = numpy_soft_mask(target), attn / attn.max(-1, keepdims=True)
    overlap = 2 * (wanted * given).sum(-1) + losses.EPS
    return 1 - overlap / ((given**2).sum(-1) + (wanted**2).sum(-1) + losses.EPS)


def numpy_bce_dice(attn: np.ndarray, target: np.ndarray) -> np.ndarray:
    wanted, given = numpy_soft_mask(target), attn / attn.max(-1, keepdims=True)
    w, g = 0.01 + 0.98 * wanted, 0.01 + 0.98 * given

    def cross_entropy(g: np.ndarray) -> np.ndarray:
        return -(w * np.log(g) + (1 - w) * np.log(1 - g)).mean(-1)

    return numpy_dice(attn, target) + cross_entropy(g) - cross_entropy(w)


REFERENCE = {
    "mass": numpy_mass,
    "one_minus_mass": numpy_one_minus_mass,
    "kl": numpy_kl,
    "dice": numpy_dice,
    "bce_dice": numpy_bce_dice,
}


def finite_differences(fn, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of the scalar function `fn` at `x`, float64."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        grad[i] = (fn(up) - fn(down)) / (2 * h)
    return grad


def test_every_loss_has_a_reference():
    assert set(REFERENCE) == set(losses.LOSSES)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_attention_loss_and_gradient_match_float64(kind: str):
    rng = np.random.default_rng(1)
    layers_heads = np.stack([maps(rng) for _ in range(4)], 1).reshape(P, 2, 2, S)
    target, weight = rng.random((P, S)), np.array([1.0, 0.5, 2.0])

    def reference(attn_map: np.ndarray) -> float:
        per_row = REFERENCE[kind](attn_map.mean((1, 2)), target)
        return (per_row * weight).sum() / weight.sum()

    def ours(attn_map: mx.array) -> mx.array:
        return losses.attention_loss(attn_map, mx.array(target), mx.array(weight), kind)

    value, grad = mx.value_and_grad(ours)(mx.array(layers_heads))
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(reference(layers_heads), rel=1e-5)
    np.testing.assert_allclose(
        np.array(grad), finite_differences(reference, layers_heads), rtol=2e-4, atol=1e-6
    )


def optimum(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A target and the map that fits it best."""
    target = np.array([[0.0, 0.8, 0.8, 0.0, 0.0, 0.0]])
    inside = np.array([[0.0, 0.9, 0.1, 0.0, 0.0, 0.0]])  # -log mass is free in how it spreads
    even = np.array([[0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    if kind == "kl":
        even = 0.95 * even + 0.05 / S
    return target, inside if kind in ("mass", "one_minus_mass") else even


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_attention_loss_is_zero_at_its_optimum_only(kind: str):
    target, best = optimum(kind)
    fn = losses.LOSSES[kind]
    assert fn(mx.array(best), mx.array(target)).item() == pytest.approx(0, abs=2e-5)
    for move in np.eye(S)[[0, 3]]:  # some attention goes astray
        worse = 0.8 * best + 0.2 * move
        assert np.array(fn(mx.array(worse), mx.array(target)))[0] > 0.005


def test_target_is_scaled_to_the_objects_own_fullest_cell():
    small, large = mx.array([[0.02, 0.2, 0.0]]), mx.array([[0.1, 1.0, 0.0]])
    assert mx.allclose(losses.soft_mask(small), losses.soft_mask(large), atol=1e-6)
    assert losses.soft_mask(small).max().item() == 1.0


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("filler", [0.0, 7.0, float("nan")])
def test_rows_of_weight_zero_do_not_matter(kind: str, filler: float):
    rng = np.random.default_rng(2)
    attn, target = maps(rng)[:, None, None], rng.random((P, S))
    weight = np.array([1.0, 1.0, 0.0])

    def loss(attn, target, weight):
        return losses.attention_loss(attn, target, weight, kind)

    expected = loss(mx.array(attn[:2]), mx.array(target[:2]), mx.array(weight[:2])).item()
    attn[2], target[2] = filler, filler
    value, grad = mx.value_and_grad(loss)(mx.array(attn), mx.array(target), mx.array(weight))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert np.array(grad)[2] == pytest.approx(0, abs=0)
    assert np.isfinite(np.array(grad)).all()


def test_bce_dice_stays_calm_where_a_map_peaks_outside_the_mask():
    """The logarithm of 1 - 1 is not taken, nor its slope."""
    attn = mx.array([[0.9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]])
    target = mx.array([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    value, slope = mx.value_and_grad(lambda a: losses.bce_dice(a, target).sum())(attn)
    assert 1 < value.item() < 5
    assert mx.abs(slope).max().item() < 1e3
    assert slope[0, 1].item() < -0.1  # pulled to where the object is


def absent_reference(attn_map: np.ndarray, weight: np.ndarray) -> float:
    null = 1 - attn_map.mean((1, 2)).sum(-1)
    return (-np.log(null + losses.EPS) * weight).sum() / weight.sum()


def test_absent_loss_and_gradient_match_float64():
    rng = np.random.default_rng(4)
    attn_map = np.stack([maps(rng) for _ in range(4)], 1).reshape(P, 2, 2, S)
    weight = np.array([1.0, 0.5, 2.0])
    value, slope = mx.value_and_grad(losses.absent_loss)(mx.array(attn_map), mx.array(weight))
    assert value.item() == pytest.approx(absent_reference(attn_map, weight), rel=1e-5)
    wanted = finite_differences(lambda a: absent_reference(a, weight), attn_map)
    np.testing.assert_allclose(np.array(slope), wanted, rtol=2e-4, atol=1e-6)


def test_absent_loss_is_least_where_nothing_is_looked_at():
    nothing, everything = mx.zeros((1, 1, 1, S)), mx.full((1, 1, 1, S), 1.00001 / S)
    one = mx.ones(1)
    assert losses.absent_loss(nothing, one).item() == pytest.approx(0, abs=1e-5)
    assert 13 < losses.absent_loss(everything, one).item() < 14  # finite
    assert losses.absent_loss(everything, mx.zeros(1)).item() == 0


@pytest.mark.parametrize("filler", [0.0, 7.0, float("nan")])
def test_rows_about_nothing_absent_do_not_matter(filler: float):
    attn, weight = maps(np.random.default_rng(2))[:, None, None], np.array([1.0, 1.0, 0.0])
    expected = absent_reference(attn[:2], weight[:2])
    attn[2] = filler
    value, slope = mx.value_and_grad(losses.absent_loss)(mx.array(attn), mx.array(weight))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert np.array(slope)[2] == pytest.approx(0, abs=0)
    assert np.isfinite(np.array(slope)).all()


def test_no_guided_row_is_no_loss():
    value = losses.attention_loss(mx.ones((2, 1, 1, S)) / S, mx.zeros((2, S)), mx.zeros(2))
    assert value.item() == 0


def test_lm_loss_is_the_mean_over_the_mask_and_its_gradient_matches():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(2, 3, 5)), rng.integers(5, size=(2, 3))
    mask = np.array([[0, 1, 1], [0, 0, 1]], np.float32)

    def reference(x: np.ndarray) -> float:
        nll = np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, labels[..., None], -1)[..., 0]
        return (nll * mask).sum() / mask.sum()

    value, grad = mx.value_and_grad(losses.lm_loss)(mx.array(logits), labels, mask)
    assert value.item() == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(np.array(grad), finite_differences(reference, logits), atol=1e-6)
    assert losses.lm_loss(mx.array(logits), labels, 0 * mask).item() == 0


def test_lm_loss_of_a_sure_right_answer_is_zero():
    logits = mx.array([[[50.0, 0.0], [0.0, 0.0]]])
    loss = losses.lm_loss(logits, np.array([[0, 1]]), np.array([[1, 0]]))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_lm_loss_keeps_half_precision_logits_accurate():
    logits = (mx.arange(8) / 4).astype(mx.bfloat16)[None, None]
    exact = losses.lm_loss(logits.astype(mx.float32), np.array([[3]]), np.array([[1]]))
    assert losses.lm_loss(logits, np.array([[3]]), np.array([[1]])).item() == exact.item()


def test_feature_loss_gradient_optimum_and_padding():
    rng = np.random.default_rng(4)
    predicted, target = rng.normal(size=(2, 3, 4)), 2 * rng.normal(size=(2, 3, 4))
    valid = np.array([[1, 1, 0], [1, 0, 0]], np.float32)

    def reference(x: np.ndarray) -> float:
        def norm(y):
            return np.sqrt((y**2).sum(-1) + losses.EPS)

        cosine = (x * target).sum(-1) / norm(x) / norm(target)
        gap = np.abs(x - target)
        smooth = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean(-1)
        return ((0.9 * (1 - cosine) + 0.1 * smooth) * valid).sum() / valid.sum()

    def ours(x: mx.array) -> mx.array:
        return losses.feature_loss(x, mx.array(target), mx.array(valid))

    value, grad = mx.value_and_grad(ours)(mx.array(predicted))
    assert value.item() == pytest.approx(reference(predicted), rel=1e-5)
    np.testing.assert_allclose(
        np.array(grad), finite_differences(reference, predicted), rtol=1e-3, atol=1e-6
    )
    assert np.array(grad)[valid == 0] == pytest.approx(0, abs=0)
    assert ours(mx.array(target)).item() == pytest.approx(0, abs=1e-5)
