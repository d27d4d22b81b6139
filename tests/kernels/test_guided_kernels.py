"""The Metal sources of guided_attention and its two gradients, run on the CPU."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from tests.kernels.cases import DTYPES, GUIDED, Guided, assert_close, name
from tests.kernels.emulation import caught_by, check_types, emulated, mutate

guided = import_module("agevlm_mlx.kernels.guided_attention")
pytestmark = pytest.mark.kernels


def maps_and_gradients(case: Guided, dtype: mx.Dtype, masked: bool):
    """What the kernels give, through MLX's own differentiation."""
    q, keys, *rest = case.arrays(dtype, masked)
    maps, gradients = mx.vjp(
        lambda q, keys: guided.kernel(q, keys, *rest), [q, keys], [case.cotangent()]
    )
    return *maps, *gradients


def check(case: Guided, dtype: mx.Dtype, masked: bool, got) -> None:
    right = case.right(case.cotangent(), *case.arrays(dtype, masked))
    for mine, wanted, its in zip(got, right, (mx.float32, dtype, dtype), strict=True):
        assert_close(mine, wanted, its)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_values_in_every_order_of_the_threads(case, dtype, masked):
    results = []
    for order in (0, 1, 7):
        with emulated("fast", order):
            results.append(maps_and_gradients(case, dtype, masked))
    check(case, dtype, masked, results[0])
    for others in results[1:]:  # deterministic: the same bits
        assert all(mx.array_equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name)
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_gradients_are_those_of_the_twin(case, dtype):
    q, keys, *rest = case.arrays(dtype, True)

    def loss(form):
        return lambda q, keys: (form(q, keys, *rest)[..., 1:].mean(axis=1) ** 2).sum()

    with emulated():
        mine = mx.grad(loss(guided.kernel), (0, 1))(q, keys)
        mx.eval(mine)
    # In fp32, so that only the kernel rounds.
    theirs = mx.grad(loss(guided.twin), (0, 1))(*(x.astype(mx.float32) for x in (q, keys)))
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, np.array(b), dtype)


def test_the_gradient_is_taken_inside_compile(monkeypatch):
    # Kernels cannot run there without Metal: plain operations stand in for the launches.
    q, keys, image, column, heads, scale, mask = GUIDED[2].arrays(mx.float32, True)

    def backward(q, keys, image, column, slope, scale):
        slope = (slope * scale)[..., None]
        asked = (image[:, None], mx.arange(heads), column[:, None])
        dq = mx.zeros_like(q).at[asked].add((slope * keys[image, :1]).sum(axis=2))
        dkeys = (slope * q[asked][:, :, None]).sum(axis=1)
        return dq, mx.zeros_like(keys).at[image, 0].add(dkeys)

    assert heads <= q.shape[1] // keys.shape[1]  # they all belong to the first key head
    monkeypatch.setattr(guided, "forward", guided.twin)
    monkeypatch.setattr(guided, "backward", backward)

    def gradient(form):
        def loss(q, keys, image, column):
            maps = form(q * 2, keys * 2, image, column, heads, scale, mask)
            return maps[..., 1:].square().sum()

        return mx.grad(loss, (0, 1))

    compiled = mx.compile(gradient(guided.kernel))(q, keys, image, column)
    for a, b in zip(compiled, gradient(guided.twin)(q, keys, image, column), strict=True):
        assert mx.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [GUIDED[2], GUIDED[4]], ids=str)
def test_types(case, dtype, masked):
    q, keys, image, column, heads, scale, mask = case.arrays(dtype, masked)
    check_types(
        lambda q, k, i, c, m=None: guided.forward(q, k, i, c, heads, scale, m),
        *(q, keys, image, column, *([] if mask is None else [mask])),
    )
    check_types(
        lambda q, k, i, c, slope: guided.backward(q, k, i, c, slope, scale),
        *(q, keys, image, column, case.cotangent()),
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name)
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_no_race_and_nothing_out_of_bounds_or_uninitialised(case, dtype):
    with emulated("check", order=7):
        got = maps_and_gradients(case, dtype, True)
    check(case, dtype, True, got)


@pytest.mark.parametrize("case", [GUIDED[2], GUIDED[3], GUIDED[4], GUIDED[5]], ids=str)
def test_no_overflow_inside_a_thread(case):
    with emulated("asan"):
        got = maps_and_gradients(case, mx.float16, True)
    check(case, mx.float16, True, got)


#: A name -> what to replace by what.
FORWARD_BUGS = {
    "keys of the next slot": ("keys[base + s * H + e]", "keys[base + (s + 1) * H + e]"),
    "keys of another head": ("head / (N / K)", "head % K"),
    "keys of another image": ("(b * K + head", "(row * K + head"),
    "query of another head": ("(b * N + head)", "(b * heads + head)"),
    "query of another column": ("* C + column[row]", "* C + row"),
    "scale left out": ("float(q[query + e]) * scale", "float(q[query + e])"),
    "mask of another row": ("mask[int64_t(row) * S + s]", "mask[s]"),
    "no mask": ("MASKED && ", "false && "),
    "starts from -INFINITY": ("LOWEST = -3.4e38f", "LOWEST = -INFINITY"),
    "total not rescaled": ("total = total * metal::exp(top - highest) +", "total = total +"),
    "maximum left out in the merge": ("its_total * metal::exp(its_top - highest)", "its_total"),
    "own maximum": ("- highest) / whole", "- top) / whole"),
    "no barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);",
        "",
    ),
    "barrier without mem_device": (" | mem_flags::mem_device", ""),
    "simdgroup_barrier": ("threadgroup_barrier(", "simdgroup_barrier("),
    "barrier in a branch": ("threadgroup_barrier(", "if (walker < 2) threadgroup_barrier("),
    "lanes leave early": ("threadgroup_barrier(", "if (lane > 20) return; threadgroup_barrier("),
    "simd_sum in a divergent loop": ("s < S; s += SIMDS) {", "s < S - (lane > 9); s += SIMDS) {"),
    "total never published": ("tg_total[walker] = total;", ""),
    "threadgroup array too short": ("tg_total[SIMDS]", "tg_total[SIMDS - 1]"),
    "private array overflow": ("x[e] = float(q", "x[e + (S > 30)] = float(q"),
    "heads share a map": ("(int64_t(row) * heads + head) * S", "int64_t(row) * heads * S"),
    "map not complete": ("s < S; s += SIMDS * 32", "s < S - 1; s += SIMDS * 32"),
    "bare pointer": ("float top =", "const float* bare = maps; float top ="),
    "wrong address space": ("float top =", "const threadgroup float* wrong = maps; float top ="),
}

QUERY_BUGS = {
    "slope of the sorted row": ("int64_t(order[i]) * heads", "int64_t(i) * heads"),
    "slope of another head": ("* heads + head) * S", "* heads) * S"),
    "first of the repeated rows only": ("i = from; i < to;", "i = from; i < from + 1;"),
    "one row too many": ("i < to; i++", "i <= to; i++"),
    "heads beyond the asked": ("from < to && head < heads", "from < to"),
    "keys of another head": ("head / (N / K)", "head % K"),
    "keys of another image": ("(b * K + head", "(head"),
    "column of the place left out": ("here % C", "here"),
    "one slot too many": ("s < S; s += SIMDS)", "s < S + 1; s += SIMDS)"),
    "simdgroups walk the same slots": ("int s = walker; s < S", "int s = 0; s < S"),
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "simdgroup_barrier": ("threadgroup_barrier(", "simdgroup_barrier("),
    "lanes leave early": ("threadgroup_barrier(", "if (lane > 20) return; threadgroup_barrier("),
    "barrier in a branch": ("threadgroup_barrier(", "if (walker < 2) threadgroup_barrier("),
    "threadgroup array too short": ("tg_sum[SIMDS][H]", "tg_sum[SIMDS - 1][H]"),
    "scale left out": ("value * scale", "value"),
    "not all written": ("d < H; d +=", "d < H - 1; d +="),
    "sum never cleared": ("sum[e] = 0.0f;", ""),
    "private array overflow": ("sum[e] = 0.0f;", "sum[e + (S > 30)] = 0.0f;"),
    "writes an input": ("const int64_t target", "slope[0] = 0.0f; const int64_t target"),
    "bare pointer": ("const int64_t target", "const T* bare = q; const int64_t target"),
    "float becomes bfloat unasked": ("static_cast<T>(value * scale)", "value * scale"),
}

KEY_BUGS = {
    "slope of the sorted row": ("int64_t(order[i]) * heads", "int64_t(i) * heads"),
    "slope of another head": ("* heads + head) * S", "* heads) * S"),
    "rows of the next image too": ("begin[(b + 1) * C]", "begin[(b + 2) * C]"),
    "rows of the earlier images too": ("i = begin[b * C]", "i = begin[0]"),
    "rows of the first column only": ("begin[(b + 1) * C]", "begin[b * C + 1]"),
    "column of the place left out": ("place[i] % C", "place[i]"),
    "heads beyond the asked": ("metal::min(heads, (kv + 1) * group)", "(kv + 1) * group"),
    "heads of another group": ("int head = kv * group;", "int head = kv;"),
    "query of another image": ("(int64_t(b) * N + head)", "(head)"),
    "slots beyond the end": (
        "first + j < S ? slope[row + first + j] : 0.0f",
        "slope[row + first + j]",
    ),
    "writes beyond the end": ("if (first + j < S)", "if (true)"),
    "tiles overlap": ("* SIMDS + walker) * SLOTS", "* SIMDS + walker)"),
    "simdgroups of one tile only": ("* SIMDS + walker) * SLOTS", "* SIMDS) * SLOTS"),
    "sum of the last row only": ("sum[j][e] += weight", "sum[j][e] = weight"),
    "scale left out": ("sum[j][e] * scale", "sum[j][e]"),
    "sum never cleared": ("sum[j][e] = 0.0f;", ""),
    "private array overflow": ("float x[E];", "float x[E - 1];"),
    "gradient of another head": ("(int64_t(b) * K + kv) * S", "int64_t(b) * K * S"),
    "elements not by lane": (
        "* H + lane * E;\n            const int64_t row",
        "* H + lane;\n            const int64_t row",
    ),
    "wrong address space": ("const int group", "const constant T* wrong = q; const int group"),
    "float becomes bfloat unasked": ("static_cast<T>(sum[j][e] * scale)", "sum[j][e] * scale"),
}
BUGS = [
    (source, bug, *change)
    for source, bugs in [
        ("FORWARD", FORWARD_BUGS),
        ("QUERY_GRADIENT", QUERY_BUGS),
        ("KEY_GRADIENT", KEY_BUGS),
    ]
    for bug, change in bugs.items()
]
#: Three images, groups of three heads, half of the heads asked for, two tiles of slots.
CASE = Guided(B=3, N=6, K=2, C=3, S=37, H=64, heads=4, P=8)


@pytest.mark.parametrize(
    ("source", "bug", "old", "new"), BUGS, ids=[f"{s}-{b}" for s, b, *_ in BUGS]
)
def test_bugs_are_found(source, bug, old, new, monkeypatch):
    dtype = mx.bfloat16 if "bfloat" in bug else mx.float32
    q, keys, image, column, heads, scale, mask = CASE.arrays(dtype, True)
    right = CASE.right(CASE.cotangent(), q, keys, image, column, heads, scale, mask)
    monkeypatch.setattr(guided, source, mutate(getattr(guided, source), old, new))
    if source == "FORWARD":
        found = caught_by(
            lambda q, k, i, c, m: guided.forward(q, k, i, c, heads, scale, m),
            [q, keys, image, column, mask],
            lambda maps: assert_close(maps, right[0]),
        )
    else:
        maps = guided.twin(q, keys, image, column, heads, scale, mask)
        wanted = CASE.cotangent()
        slope = maps * (wanted - (maps * wanted).sum(-1, keepdims=True))
        mx.eval(slope)

        def verify(got):
            assert_close(got[0], right[1], dtype)
            assert_close(got[1], right[2], dtype)

        found = caught_by(
            lambda q, k, i, c, slope: guided.backward(q, k, i, c, slope, scale),
            [q, keys, image, column, slope],
            verify,
        )
    assert found is not None, f"nothing finds: {bug}"
    print(f"{bug}: found by {found[0]}: {found[1]}")
