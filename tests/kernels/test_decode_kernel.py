"""The Metal source of decode_attention, run on the CPU."""

from importlib import import_module

import mlx.core as mx
import pytest

from tests.kernels.cases import DECODE, DTYPES, Decode, assert_close, name
from tests.kernels.emulation import caught_by, check_types, emulated, mutate

decode = import_module("agevlm_mlx.kernels.decode_attention")
pytestmark = pytest.mark.kernels


def check(case: Decode, dtype: mx.Dtype, masked: bool, got) -> None:
    out, weights = case.right(*case.arrays(dtype, masked))
    assert_close(got[0], out, dtype)
    assert_close(got[1], weights)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_values_in_every_order_of_the_threads(case, dtype, masked):
    arrays = case.arrays(dtype, masked)
    results = []
    for order in (0, 1, 7):
        with emulated("fast", order):
            results.append(decode.kernel(*arrays))
    check(case, dtype, masked, results[0])
    for out, weights in results[1:]:  # deterministic: the same bits
        assert mx.array_equal(out, results[0][0])
        assert mx.array_equal(weights, results[0][1])


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [DECODE[1], DECODE[6]], ids=str)
def test_types(case, dtype, masked):
    q, keys, values, scale, mask = case.arrays(dtype, masked)
    check_types(
        lambda q, k, v, m=None: decode.kernel(q, k, v, scale, m),
        *(q, keys, values, *([] if mask is None else [mask])),
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_no_race_and_nothing_out_of_bounds_or_uninitialised(case, dtype):
    masked = case.B > 1
    with emulated("check", order=7):
        got = decode.kernel(*case.arrays(dtype, masked))
    check(case, dtype, masked, got)


@pytest.mark.parametrize("case", [DECODE[3], DECODE[4], DECODE[6], DECODE[7]], ids=str)
def test_no_overflow_inside_a_thread(case):
    masked = case.B > 1
    with emulated("asan"):
        got = decode.kernel(*case.arrays(mx.float16, masked))
    check(case, mx.float16, masked, got)


def test_large_scores_stay_finite():
    q, keys, values, _, mask = DECODE[0].arrays(mx.float32, True)
    with emulated():
        got = decode.kernel(q, keys, values, 300.0, mask)
    for mine, theirs in zip(got, decode.twin(q, keys, values, 300.0, mask), strict=True):
        assert mx.allclose(mine, theirs, atol=1e-3)  # exp() of scores near 1e4, in fp32


#: A tile of five heads and one of four, and three rounds of the simdgroups over the slots.
CASE = Decode(B=2, N=18, K=2, S=69, H=64)
#: A name -> what to replace by what.
BUGS = {
    "keys of the next slot": ("keys[base + s * H + e]", "keys[base + (s + 1) * H + e]"),
    "values from the keys": ("float(values[base", "float(keys[base"),
    "reads beyond the last slot": ("metal::min(start + j, S - 1)", "start + j"),
    "counts slots beyond the end": ("start + j < S && (!M", "(!M"),
    "no mask": ("(!MASKED || mask[seen + s])", "true"),
    "mask of another row": ("int64_t(row / K) * S", "int64_t(row % K) * S"),
    "query of another tile": ("(int64_t(row) * group + first) * H", "int64_t(row) * group * H"),
    "heads of the last tile": ("metal::min(TILE, group - first)", "TILE"),
    "keys of another head": (
        "int64_t(row) * S * H + lane * E",
        "int64_t(row / K) * S * H + lane * E",
    ),
    "elements not by lane": ("h * H + lane * E + e]) * scale", "h * H + lane + e]) * scale"),
    "sum not rescaled": ("sum[h][e] *= keep;", ""),
    "total not rescaled": ("total[h] *= keep;", ""),
    "starts from -INFINITY": ("LOWEST = -3.4e38f", "LOWEST = -INFINITY"),
    "maximum left out in the merge": ("its_total * metal::exp(its_top - highest)", "its_total"),
    "own maximum left out": ("metal::exp(top[h] - highest) / whole", "1.0f / whole"),
    "merge by maximum of the simdgroup": (
        "        top[h] = highest;\n        total[h] = whole",
        "        total[h] = whole",
    ),
    "mean of the tile": ("share / N", "share / heads"),
    "no barrier after the walk": (
        "threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);",
        "",
    ),
    "barrier without mem_device": (" | mem_flags::mem_device", ""),
    "simdgroup_barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup | ",
        "simdgroup_barrier(mem_flags::mem_threadgroup | ",
    ),
    "no barrier before the sum": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n        if (h < heads)",
        "if (h < heads)",
    ),
    "no barrier after the sum": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n        top[h]",
        "top[h]",
    ),
    "barrier in a branch": (
        "threadgroup_barrier(mem_flags::mem_threadgroup | ",
        "if (walker < 2) threadgroup_barrier(mem_flags::mem_threadgroup | ",
    ),
    "lanes leave early": (
        "threadgroup_barrier(mem_flags::mem_threadgroup | ",
        "if (lane > 20) return; threadgroup_barrier(mem_flags::mem_threadgroup | ",
    ),
    "simd_sum in a divergent loop": ("start < S; start +=", "start < S - (lane > 9); start +="),
    "total never published": ("tg_total[h][walker] = total[h];", ""),
    "threadgroup array too short": ("tg_total[TILE][SIMDS]", "tg_total[TILE][SIMDS - 1]"),
    "too much threadgroup memory": ("tg_sum[SIMDS][H]", "tg_sum[SIMDS * 16][H]"),
    "private array overflow": ("        total[h] = 0.0f;", "        total[h + (S > 30)] = 0.0f;"),
    "score of another slot": ("mine = lane == j ? dot[j]", "mine = lane == 0 ? dot[j]"),
    "all lanes write scores": ("lane < STEP && start", "start"),
    "map not complete": ("s < S; s += SIMDS * 32", "s < S - 1; s += SIMDS * 32"),
    "tiles share a map": ("parts[int64_t(part)", "parts[int64_t(row)"),
    "tiles share the scores": ("int64_t(part) * TILE * S", "int64_t(row) * TILE * S"),
    "bare pointer": ("const int64_t seen", "const T* bare = keys; const int64_t seen"),
    "wrong address space": (
        "const int64_t seen",
        "const constant T* wrong = keys; const int64_t seen",
    ),
    "writes an input": ("const int64_t seen", "q[0] = 0; const int64_t seen"),
    "float becomes bfloat unasked": ("static_cast<T>(value)", "value"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug, monkeypatch):
    dtype = mx.bfloat16 if "bfloat" in bug else mx.float32
    q, keys, values, scale, mask = CASE.arrays(dtype, True)
    monkeypatch.setattr(decode, "SOURCE", mutate(decode.SOURCE, *BUGS[bug]))
    found = caught_by(
        lambda q, k, v, mask: decode.kernel(q, k, v, scale, mask),
        [q, keys, values, mask],
        lambda got: check(CASE, dtype, True, got),
    )
    assert found is not None, f"nothing finds: {bug}"
    print(f"{bug}: found by {found[0]}: {found[1]}")
