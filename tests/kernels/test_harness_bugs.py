"""Which bugs the passes of the harness (tests/kernels/msl) catch, each seeded in a right kernel.

The table is also the reason for each pass: some bugs are seen by one of them only.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from tests.kernels import msl
from tests.kernels.test_harness import metal_kernel

pytestmark = pytest.mark.kernels

# Each threadgroup sums a row of x, by way of private, SIMD and threadgroup memory, and adds what
# another thread of the group wrote to device memory: a bit of all that can go wrong.
SOURCE = """
    constexpr uint NT = 32 * NS;
    threadgroup float partial[NS];
    uint row = threadgroup_position_in_grid.x, t = thread_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    auto x_row = x + row * NT * E;
    float mine[E];
    for (int e = 0; e < E; e++) mine[e] = float(x_row[t * E + e]);
    float sum = 0;
    for (int e = 0; e < E; e++) sum += mine[e];
    sum = simd_sum(sum);
    if (lane == 0) partial[sg] = sum;
    first[row * NT + t] = mine[0];
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    float total = 0;
    for (int i = 0; i < NS; i++) total += partial[i];
    out[row * NT + t] = T(total + first[row * NT + NT - 1 - t]);
"""
ROWS, NS, E = 3, 3, 2
NT = 32 * NS

TYPES, FORWARDS, BACKWARDS, ASAN, CHECK = "types", "forwards", "backwards", "asan", "check"
PASSES = {
    FORWARDS: ("fast", 0),
    BACKWARDS: ("fast", 1),
    "shuffled": ("fast", 7),
    ASAN: ("asan", 0),
    CHECK: ("check", 0),
    "check, backwards": ("check", 1),
    "check, shuffled": ("check", 7),
}


def sums(x: mx.array, source: str = SOURCE) -> list[mx.array]:
    kernel = metal_kernel("sums", ["x"], ["first", "out"], source)
    return kernel(
        inputs=[x],
        template=[("T", x.dtype), ("NS", NS), ("E", E)],
        grid=(ROWS * NT, 1, 1),
        threadgroup=(NT, 1, 1),
        output_shapes=[(ROWS, NT), (ROWS, NT)],
        output_dtypes=[mx.float32, x.dtype],
    )


def findings(source: str, dtype: mx.Dtype, passes: list[str]) -> dict[str, str]:
    """Pass -> what it says about the kernel, for those that say anything."""
    x = mx.random.normal((ROWS, NT * E)).astype(dtype)
    values = np.array(x.astype(mx.float32)).astype(np.float64)
    expected = values.sum(1, keepdims=True) + values[:, ::E][:, ::-1]
    [call] = msl.trace(lambda x: sums(x, source), x)
    found = {}
    for name in passes:
        try:
            if name == TYPES:
                msl.check_types(call)
                continue
            [_, out], _ = msl.run(call, [x], *PASSES[name])
            np.testing.assert_allclose(
                np.array(out.astype(mx.float32)), expected, rtol=1e-2, atol=1e-4
            )
        except msl.KernelError as error:
            found[name] = str(error)
        except AssertionError:
            found[name] = "wrong values"
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_no_pass_complains_about_the_right_kernel(dtype: mx.Dtype) -> None:
    assert findings(SOURCE, dtype, [TYPES, *PASSES]) == {}


@dataclass(frozen=True)
class Bug:
    old: str
    new: str
    #: Pass -> what it must say. The line of the source is part of it where the pass knows it.
    caught: dict[str, str]
    #: Passes that cannot see it.
    unseen: tuple[str, ...] = ()
    dtype: mx.Dtype = mx.float32


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);"
RACE = "RACE read after write: threadgroup partial["
WRONG = "wrong values"
BUGS = {
    "device read out of bounds": Bug(
        "x_row[t * E + e])",
        "x_row[t * E + e + 1])",
        {
            FORWARDS: WRONG,
            ASAN: "heap-buffer-overflow",
            CHECK: "OUT OF BOUNDS read: x[576] of 576 by threadgroup 2 thread 95 "
            "(simdgroup 2 lane 31) at line 17: for (int e = 0; e < E; e++) mine[e]",
        },
    ),
    "device write out of bounds": Bug(
        "first[row * NT + t] =",
        "first[row * NT + t + 1] =",
        {ASAN: "heap-buffer-overflow", CHECK: "OUT OF BOUNDS write: first[288] of 288"},
    ),
    "device address far away": Bug(
        "x_row[t * E + e])",
        "x_row[t * E + e + (row == 1 ? 1 << 28 : 0)])",
        {FORWARDS: "CRASH: SIGSEGV", CHECK: "OUT OF BOUNDS read"},
    ),
    "threadgroup array out of bounds": Bug(
        "+= partial[i]",
        "+= partial[i + 1]",
        {
            FORWARDS: WRONG,
            ASAN: "index 3 out of bounds",
            CHECK: "OUT OF BOUNDS read: threadgroup partial[3] of 3",
        },
    ),
    "private array overflow": Bug(
        "float sum = 0;",
        "float sum = 0; mine[row == 2 ? E : 0] += 0;",
        {ASAN: "runtime error: "},
        unseen=(TYPES, CHECK),
    ),
    "barrier removed": Bug(BARRIER, "", {FORWARDS: WRONG, ASAN: WRONG, CHECK: RACE}),
    "barrier of the simdgroup only": Bug(
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);",
        {BACKWARDS: WRONG, CHECK: RACE},
        unseen=(TYPES,),
    ),
    "barrier without mem_device": Bug(
        " | mem_flags::mem_device",
        "",
        {
            CHECK: "RACE read after write: first[95] of 288 by threadgroup 0 thread 0 (simdgroup "
            "0 lane 0) against threadgroup 0 thread 95 (simdgroup 2 lane 31) at line 26: out["
        },
        unseen=(TYPES, FORWARDS, BACKWARDS, "shuffled", ASAN),
    ),
    "barrier without mem_threadgroup": Bug(
        "mem_flags::mem_threadgroup | ",
        "",
        {CHECK: RACE},
        unseen=(TYPES, FORWARDS, BACKWARDS, "shuffled", ASAN),
    ),
    "wrong address space": Bug(
        "auto x_row = x +",
        "const constant T* x_row = x +",
        {TYPES: "cannot initialize"},
        unseen=tuple(PASSES),
    ),
    "missing address space": Bug(
        "auto x_row = x +",
        "const T* x_row = x +",
        {TYPES: "cannot initialize"},
        unseen=tuple(PASSES),
    ),
    "bare pointer to private memory": Bug(
        "float sum = 0;",
        "float sum = 0; float* p = mine;",
        {TYPES: ":18: no address space: p"},
        unseen=tuple(PASSES),
    ),
    "bare reference to private memory": Bug(
        "float sum = 0;",
        "float sum = 0; const float& p = mine[0];",
        {TYPES: ":18: no address space: p"},
        unseen=tuple(PASSES),
    ),
    "uninitialised threadgroup memory": Bug(
        "if (lane == 0) partial",
        "if (lane == 0 && sg > 0) partial",
        {FORWARDS: WRONG, ASAN: WRONG, CHECK: "UNINITIALISED read: threadgroup partial[0] of 3"},
    ),
    "uninitialised output": Bug(
        "first[row * NT + t] =",
        "if (t > 0) first[row * NT + t] =",
        {FORWARDS: WRONG, ASAN: WRONG, CHECK: "UNINITIALISED read: first["},
    ),
    "barrier in divergent code": Bug(
        BARRIER,
        f"if (sg > 0) {BARRIER}",
        dict.fromkeys(
            (FORWARDS, ASAN, CHECK),
            "64 of 96 threads wait for ever, the first (thread 32) in threadgroup_barrier at line",
        ),
    ),
    "two barriers in divergent code": Bug(
        BARRIER,
        f"if (sg > 0) {BARRIER}\nelse {BARRIER}",
        dict.fromkeys((FORWARDS, ASAN, CHECK), "DIVERGENCE: threads are at different barriers"),
    ),
    "simd_sum in divergent code": Bug(
        "sum = simd_sum(sum);",
        "if (lane < 20) sum = simd_sum(sum);",
        dict.fromkeys(
            (FORWARDS, ASAN, CHECK),
            "60 at a SIMD operation",
        ),
    ),
    "different SIMD operations meet": Bug(
        "sum = simd_sum(sum);",
        "if (lane < 20) sum = simd_sum(sum);\nelse sum = simd_max(sum);",
        dict.fromkeys(
            (FORWARDS, ASAN, CHECK),
            "DIVERGENCE: lanes of simdgroup 0 are at different operations, simd_sum at line",
        ),
    ),
    "early return": Bug(
        "sum = simd_sum(sum);",
        "if (lane > 20) return; sum = simd_sum(sum);",
        dict.fromkeys((FORWARDS, ASAN, CHECK), "DIVERGENCE: 63 of 96 threads wait for ever"),
    ),
    "two threadgroups write one address": Bug(
        "out[row * NT + t] =",
        "out[t] =",
        {
            FORWARDS: WRONG,
            ASAN: WRONG,
            CHECK: "RACE write after write: out[0] of 288 by threadgroup 1 thread 0",
        },
    ),
    "threads of one threadgroup write one address": Bug(
        "if (lane == 0) partial[sg] = sum;",
        "partial[sg] = sum;",
        {CHECK: "RACE write after write: threadgroup partial[0] of 3"},
        unseen=(TYPES, FORWARDS, BACKWARDS, ASAN),
    ),
    "threadgroup memory written while others still read it": Bug(
        "float total = 0;",
        "float total = 0; if (t == 40) partial[0] = partial[0] + 0;",
        {CHECK: "RACE"},
        unseen=(TYPES, FORWARDS, BACKWARDS, ASAN),
    ),
    "over 32 KB of threadgroup memory": Bug(
        "threadgroup float partial[NS];",
        "threadgroup float partial[NS], more[8190]; more[0] = 1;",
        dict.fromkeys(
            (FORWARDS, ASAN, CHECK),
            "THREADGROUP MEMORY: 32784 bytes with more, more than 32768",
        ),
    ),
    "float to bfloat without a cast": Bug(
        "= T(total + first[row * NT + NT - 1 - t]);",
        "= total + first[row * NT + NT - 1 - t];",
        dict.fromkeys((FORWARDS, ASAN, CHECK), "error: "),
        unseen=(TYPES,),
        dtype=mx.bfloat16,
    ),
    "write to an input": Bug(
        "float sum = 0;",
        "float sum = 0; ((device T*)x_row)[t] = x_row[t] + 0.0f;",
        {CHECK: "WRITE TO INPUT: x["},
        unseen=(TYPES, FORWARDS, ASAN),
    ),
    "another row, in bounds": Bug(
        "auto x_row = x + row *",
        "auto x_row = x + (row + 1) % 3 *",
        dict.fromkeys(PASSES, WRONG),
        unseen=(TYPES,),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bug(name: str) -> None:
    bug = BUGS[name]
    assert SOURCE.count(bug.old) == 1
    source = SOURCE.replace(bug.old, bug.new)
    found = findings(source, bug.dtype, [*bug.caught, *bug.unseen])
    for pass_, wanted in bug.caught.items():
        assert wanted in found.get(pass_, "")
    assert not set(bug.unseen) & set(found), found


# What looks wrong and is not ----------------------------------------------------------------------

SHARED = """
    threadgroup float box[64];
    uint t = thread_index_in_threadgroup;
    float sum = 0;
    for (int k = 0; k < 3; k++) {
        box[t] = x[t] * k;
        BARRIER_A
        sum += box[t ^ 5];
        BARRIER_B
    }
    out[t] = sum;
"""


def shared(x: mx.array, a: str, b: str) -> mx.array:
    source = SHARED.replace("BARRIER_A", a).replace("BARRIER_B", b)
    kernel = metal_kernel("shared", ["x"], ["out"], source)
    [out] = kernel(
        inputs=[x],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )
    return out


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("scope", ["threadgroup", "simdgroup"])
def test_memory_that_is_used_again_needs_both_barriers(scope: str, order: int) -> None:
    barrier = f"{scope}_barrier(mem_flags::mem_threadgroup);"
    x = mx.random.normal((64,))
    with msl.emulate("check", order):
        out = shared(x, barrier, barrier)  # lanes t and t ^ 5 are of one simdgroup
        with pytest.raises(msl.KernelError, match="RACE write after read: threadgroup box"):
            shared(x, barrier, "")
        with pytest.raises(msl.KernelError, match=r"RACE|UNINITIALISED"):
            shared(x, "", barrier)
    np.testing.assert_allclose(np.array(out), 3 * np.array(x)[np.arange(64) ^ 5], rtol=1e-6)


def test_atomics_race_with_plain_accesses_only() -> None:
    def count(source: str) -> mx.array:
        kernel = metal_kernel("count", ["x"], ["o"], source, atomic_outputs=True)
        [out] = kernel(
            inputs=[mx.zeros((8,))],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(2,)],
            output_dtypes=[mx.int32],
            init_value=0,
        )
        return out

    add = "atomic_fetch_add_explicit(&o[0], 1, memory_order_relaxed);"
    with msl.emulate("check"):
        assert count(add).tolist() == [64, 0]
        with pytest.raises(msl.KernelError, match=r"RACE .*: o\[0\] of 2"):
            count(add + "((device int*)o)[0] = 3;")


@pytest.mark.parametrize(("threads", "fits"), [(1024, True), (1056, False)])
def test_a_threadgroup_has_1024_threads_at_most(threads: int, fits: bool) -> None:
    kernel_options = {
        "inputs": [mx.zeros((8,))],
        "grid": (threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(threads,)],
        "output_dtypes": [mx.uint32],
    }
    with msl.emulate():
        kernel = metal_kernel(
            "index", ["x"], ["o"], "uint i = thread_index_in_threadgroup; o[i] = i;"
        )
        if fits:
            assert kernel(**kernel_options)[0].tolist() == list(range(threads))
        else:
            with pytest.raises(msl.KernelError, match="THREADGROUP SIZE: 1056 threads"):
                kernel(**kernel_options)


def test_threadgroup_memory_of_32_kb_fits() -> None:
    source = SOURCE.replace("float partial[NS];", "float partial[NS], more[8188]; more[0] = 0;")
    x = mx.ones((ROWS, NT * E))
    with msl.emulate():
        assert sums(x, source)[1].tolist() == [[NT * E + 1] * NT] * ROWS
