"""The harness that runs Metal kernels on the CPU (tests/kernels/msl): its values and its tools.

Which bugs its passes catch is in test_harness_bugs.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.kernels import msl
from tests.kernels.msl.build import build

pytestmark = pytest.mark.kernels

PASSES = [("fast", 0), ("fast", 1), ("fast", 7), ("asan", 0), ("check", 0)]


def metal_kernel(*args: Any, **options: Any) -> Any:
    """The one that is in force now: `msl.emulate` replaces it."""
    return mx.fast.metal_kernel(*args, **options)


def call(
    source: str,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, ...],
    threadgroup: tuple[int, ...] | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """Call a kernel, and return its outputs as NumPy arrays (bfloat16 as float32)."""
    at_construction = {"header", "ensure_row_contiguous", "atomic_outputs"}
    kernel = metal_kernel(
        name="probe",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        **{key: options.pop(key) for key in at_construction & options.keys()},
    )
    results = kernel(
        inputs=list(inputs.values()),
        grid=(*grid, 1, 1)[:3],
        threadgroup=(*(threadgroup or grid), 1, 1)[:3],
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        **options,
    )
    return [np.array(r.astype(mx.float32) if r.dtype == mx.bfloat16 else r) for r in results]


def emulated(*args: Any, mode: str = "fast", order: int = 0, **options: Any) -> list[np.ndarray]:
    with msl.emulate(mode, order):
        return call(*args, **options)


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [mx.float32, mx.float16, mx.bfloat16, mx.bool_, mx.uint8, mx.int16, mx.int32, mx.int64],
    ids=str,
)
def test_copies_every_type(dtype: mx.Dtype) -> None:
    x = (mx.random.normal((50,)) * 100).astype(dtype)
    source = "uint i = thread_position_in_grid.x; o[i] = x[i];"
    [got] = emulated(source, {"x": x}, {"o": ((50,), dtype)}, grid=(50,), threadgroup=(32,))
    np.testing.assert_array_equal(got, np.array(x.astype(mx.float32)))


@pytest.mark.parametrize(("mode", "order"), PASSES)
def test_sums_rows_with_simd_sum(mode: str, order: int) -> None:
    x = mx.random.normal((5, 70))
    source = """
        uint row = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;
        float sum = 0;
        for (int i = lane; i < x_shape[1]; i += 32) sum += x[row * x_shape[1] + i];
        sum = simd_sum(sum);
        if (lane == 0) o[row] = sum;
    """
    outputs = {"o": ((5,), mx.float32)}
    [got] = emulated(source, {"x": x}, outputs, (160,), (32,), mode=mode, order=order)
    np.testing.assert_allclose(got, np.array(x).sum(1), rtol=1e-5)


TREE = """
    threadgroup float partial[N];
    uint t = thread_index_in_threadgroup;
    partial[t] = x[thread_position_in_grid.x];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint half_ = N / 2; half_ > 0; half_ /= 2) {
        if (t < half_) partial[t] += partial[t + half_];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (t == 0) o[threadgroup_position_in_grid.x] = partial[0];
"""


@pytest.mark.parametrize(("mode", "order"), PASSES)
def test_sums_in_a_tree_with_barriers(mode: str, order: int) -> None:
    x = mx.random.normal((3, 128))
    options = {"template": [("N", 128)], "mode": mode, "order": order}
    [got] = emulated(TREE, {"x": x}, {"o": ((3,), mx.float32)}, (384,), (128,), **options)
    np.testing.assert_allclose(got, np.array(x).sum(1), rtol=1e-5, atol=1e-5)


def test_every_half_becomes_float_and_back() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    source = "uint i = thread_position_in_grid.x; f[i] = float(x[i]); h[i] = half(f[i]);"
    outputs = {"f": (halves.shape, mx.float32), "h": (halves.shape, mx.float16)}
    wide, back = emulated(source, {"x": mx.array(halves)}, outputs, halves.shape, (1024,))
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    np.testing.assert_array_equal(back, halves)


def test_float_rounds_to_half_and_bfloat_like_everywhere_else() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)
    ties = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000  # half way between two bfloats
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2  # and between two halves
    limits = np.array([65519.9, 65520, 1e30, -1e30, 3e-8, 2.9e-8, 1e-45, np.inf, -0.0])
    limits = limits.astype(np.float32)
    x = np.concatenate([bits.view(np.float32), ties.view(np.float32), between, limits])
    source = "uint i = thread_position_in_grid.x; h[i] = half(x[i]); b[i] = bfloat(x[i]);"
    outputs = {"h": (x.shape, mx.float16), "b": (x.shape, mx.bfloat16)}
    half, bfloat = emulated(source, {"x": mx.array(x)}, outputs, x.shape, (1024,))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, x.astype(np.float16))
    np.testing.assert_array_equal(
        bfloat, np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))
    )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_arithmetic_of_16_bits_rounds_each_step(dtype: mx.Dtype) -> None:
    x = mx.random.normal((64,)).astype(dtype)
    y = mx.random.normal((64,)).astype(dtype)
    source = """
        uint i = thread_position_in_grid.x;
        T a = x[i], b = y[i];
        a *= b;
        o[i] = a + b * T(3.0f);
        f[i] = float(b) * 2.0f + a;
    """
    outputs = {"o": ((64,), dtype), "f": ((64,), mx.float32)}
    got = emulated(source, {"x": x, "y": y}, outputs, (64,), template=[("T", dtype)])
    a = x * y
    expected = (a + y * mx.array(3, dtype), y.astype(mx.float32) * 2 + a.astype(mx.float32))
    for result, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(result, np.array(wanted.astype(mx.float32)))


def test_tiny_inputs_are_constant_and_scalars_references() -> None:
    tiny = mx.array([2.0, 3.0])
    source = """
        auto pointer = tiny + 1;
        o[thread_position_in_grid.x] = pointer[0] * scale + tiny_shape[0] + tiny_ndim + F;
    """
    options = {"template": [("F", True)]}
    outputs = {"o": ((3,), mx.float32)}
    [got] = emulated(source, {"tiny": tiny, "scale": 0.5}, outputs, (3,), **options)
    np.testing.assert_array_equal(got, [3 * 0.5 + 2 + 1 + 1] * 3)


LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T,
    "every other": lambda x: x[:, ::2],
    "from the middle": lambda x: x[1:, 2:],
    "backwards": lambda x: x[::-1, ::-2],
    "broadcast": lambda x: mx.broadcast_to(x[:, None], (x.shape[0], 3, x.shape[1])),
}


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, contiguous: bool, mode: str) -> None:
    x = LAYOUTS[layout](mx.random.normal((6, 8)).astype(mx.bfloat16))
    mx.eval(x)
    plain = "uint i = thread_position_in_grid.x; o[i] = x[i];"
    strided = """
        uint i = thread_position_in_grid.x;
        o[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];
    """
    options = {"ensure_row_contiguous": contiguous, "mode": mode}
    outputs = {"o": (x.shape, mx.bfloat16)}
    source = plain if contiguous else strided
    [got] = emulated(source, {"x": x}, outputs, (x.size,), (64,), **options)
    np.testing.assert_array_equal(got, np.array(x.astype(mx.float32)))


def test_simd_operations() -> None:
    x = np.random.default_rng(0).integers(-50, 50, 32)
    source = """
        uint i = thread_position_in_grid.x;
        int v = x[i];
        int out[] = {
            simd_sum(v), simd_max(v), simd_min(v), simd_prefix_inclusive_sum(v),
            simd_prefix_exclusive_sum(v), simd_shuffle_xor(v, 3), simd_shuffle_up(v, 2),
            simd_shuffle_down(v, 5), simd_shuffle(v, (i + 7) % 32), simd_broadcast(v, 9),
            simd_broadcast_first(v), simd_all(v > -51), simd_any(v > 51),
        };
        for (int k = 0; k < 13; k++) o[k * 32 + i] = out[k];
    """
    [got] = emulated(
        source, {"x": mx.array(x.astype(np.int32))}, {"o": ((13, 32), mx.int32)}, (32,)
    )
    i = np.arange(32)
    expected = [
        *(x.sum(), x.max(), x.min(), x.cumsum(), x.cumsum() - x, x[i ^ 3]),
        *(np.where(i < 2, x, x[i - 2]), np.where(i > 26, x, x[(i + 5) % 32])),
        *(x[(i + 7) % 32], x[9], x[0], 1, 0),
    ]
    for row, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(row, np.broadcast_to(wanted, 32))


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_positions_in_a_ragged_grid(mode: str) -> None:
    source = """
        uint3 p = thread_position_in_grid, g = threadgroup_position_in_grid;
        uint3 l = thread_position_in_threadgroup;
        uint i = p.y * threads_per_grid.x + p.x;
        ok[i] = all_equal(p.x, g.x * 4 + l.x) && all_equal(p.y, g.y * 3 + l.y)
            && threads_per_threadgroup.x == min(4u, 10 - g.x * 4)
            && thread_index_in_threadgroup == l.y * threads_per_threadgroup.x + l.x;
    """
    header = "inline bool all_equal(uint a, uint b) { return a == b; }\n"
    x = mx.zeros((8,))
    outputs = {"ok": ((7, 10), mx.bool_)}
    [got] = emulated(source, {"x": x}, outputs, (10, 7), (4, 3), header=header, mode=mode)
    assert got.all()


def test_vectors() -> None:
    x = mx.random.normal((8, 4)).astype(mx.float16)
    source = """
        uint i = thread_position_in_grid.x;
        float4 v = float4(((const device half4*)x)[i]);
        v += float4(1.0f, 2.0f, 3.0f, 4.0f) * v.x;
        o[i] = dot(v, float4(1.0f)) + v[3] * 0.5f;
    """
    [got] = emulated(source, {"x": x}, {"o": ((8,), mx.float32)}, (8,))
    v = np.array(x).astype(np.float32)
    v = v + np.array([1, 2, 3, 4], np.float32) * v[:, :1]
    np.testing.assert_allclose(got, v.sum(1) + v[:, 3] / 2, rtol=1e-5, atol=1e-6)


def test_threadgroup_declarations_of_every_form() -> None:
    source = """
        threadgroup float a[N], b[2][N], c;   // threadgroup float unused[4];
        threadgroup metal::vec<float, 4> d[N];
        threadgroup atomic<uint> count;
        const uint t = thread_index_in_threadgroup;
        threadgroup float* pa = a;
        pa[t] = t; b[1][t] = 2; d[t] = float4(3.0f);
        if (t == 0) { c = 4; atomic_store_explicit(&count, 0u, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint n = N - 1 - t;
        o[t] = a[n] + b[1][n] + c + d[n].w + atomic_load_explicit(&count, memory_order_relaxed);
    """
    outputs = {"o": ((40,), mx.float32)}
    for mode in msl.MODES:
        options = {"template": [("N", 40)], "mode": mode}
        [got] = emulated(source, {"x": mx.zeros((8,))}, outputs, (40,), **options)
        np.testing.assert_array_equal(got, 39 - np.arange(40) + 2 + 4 + 3 + 40)


@pytest.mark.parametrize("mode", msl.MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.uint32, mx.int32], ids=str)
def test_atomic_outputs(dtype: mx.Dtype, mode: str) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&o[i % 3], T(i), memory_order_relaxed);
    """
    options = {"atomic_outputs": True, "init_value": 5, "template": [("T", dtype)]}
    outputs = {"o": ((3,), dtype)}
    [got] = emulated(source, {"x": mx.zeros(8)}, outputs, (90,), (32,), mode=mode, **options)
    i = np.arange(90)
    np.testing.assert_array_equal(got, [5 + i[i % 3 == k].sum() for k in range(3)])


def test_order_of_the_threads() -> None:
    source = """
        uint t = atomic_fetch_add_explicit(&o[0], 1u, memory_order_relaxed);
        atomic_store_explicit(&o[1 + t], thread_position_in_grid.x, memory_order_relaxed);
    """
    options = {"atomic_outputs": True, "init_value": 0}
    outputs = {"o": ((65,), mx.uint32)}

    def sequence(order: int) -> list[int]:
        arguments = (source, {"x": mx.zeros((8,))}, outputs, (64,), (32,))
        return emulated(*arguments, order=order, **options)[0][1:].tolist()

    forwards = list(range(64))
    assert sequence(0) == forwards
    assert sequence(1) == forwards[::-1]
    assert sequence(2) == sequence(2) != sequence(3)
    assert sorted(sequence(2)) == forwards


# Tools ------------------------------------------------------------------------------------------

COPY = "uint i = thread_position_in_grid.x; o[i] = x[i];"


def copy(x: mx.array, source: str = COPY) -> mx.array:
    kernel = metal_kernel("copy", ["x"], ["o"], source)
    [out] = kernel(
        inputs=[x],
        grid=(x.size, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return out


def test_trace_run_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSL_CACHE", str(tmp_path))
    small, large = mx.arange(10.0), mx.arange(100.0)
    [traced] = msl.trace(copy, small)
    assert traced.grid == (10, 1, 1)
    with ThreadPoolExecutor(2) as pool:  # two processes may want the same kernel at once
        programs = list(pool.map(lambda _: build(traced, "fast"), range(2)))
    assert programs[0].path == programs[1].path
    assert max(program.compile_seconds for program in programs) > 0  # one may find the other's
    assert len(list(tmp_path.iterdir())) == 2  # the runtime and the kernel, nothing half-built
    for x in (small, large):
        [traced] = msl.trace(copy, x)
        [got], timings = msl.run(traced, [x])
        assert mx.array_equal(got, x)
        assert timings["compile_s"] == 0  # another shape, the same program
    with pytest.raises(ValueError, match="expected 1 input arrays, got 2"):
        msl.run(traced, [small, large])


def test_a_kept_kernel_follows_the_emulation_that_is_on() -> None:
    real = mx.fast.metal_kernel
    log: list = []
    options = {
        "inputs": [mx.arange(10.0)],
        "grid": (10, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(10,)],
        "output_dtypes": [mx.float32],
    }
    with msl.emulate("check"):
        kernel = metal_kernel("copy", ["x"], ["o"], COPY + " o[0] = 0;")
        with pytest.raises(msl.KernelError, match="RACE write after write"):
            kernel(**options)
        with msl.emulate("fast", log=log):
            kernel(**options)
        with pytest.raises(msl.KernelError, match="RACE write after write"):
            kernel(**options)
    assert mx.fast.metal_kernel is real
    assert len(log) == 1


def test_emulation_inside_a_gradient() -> None:
    @mx.custom_function
    def twice(x: mx.array) -> mx.array:
        return copy(x, COPY + " o[i] *= 2;")

    @twice.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent * output

    with msl.emulate():
        gradient = mx.grad(lambda x: twice(x).sum())(mx.arange(10.0))
    assert mx.array_equal(gradient, 2 * mx.arange(10.0))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    message = r"^no C\+\+ compiler \(no-such-compiler\) found: install g\+\+ or clang\+\+, or set"
    with pytest.raises(msl.ToolError, match=message), msl.emulate():
        copy(mx.arange(10.0))


def test_a_kernel_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.msl.launch.SECONDS", 0.5)
    with pytest.raises(msl.KernelError, match=r"still running after 0\.5 s"), msl.emulate():
        copy(mx.arange(10.0), "for (uint i = 0; i < 10; i %= 10) o[i] = x[i];")


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_the_portable_switch_of_fibres(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSL_CXXFLAGS", "-DMSL_USE_UCONTEXT")
    test_sums_in_a_tree_with_barriers(mode, 7)
