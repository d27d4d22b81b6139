"""The kernels on a real GPU: the cases that tests/kernels runs on the CPU."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.kernels import decode_attention, guided_attention
from tests.kernels.cases import DECODE, DTYPES, GUIDED, assert_close, name

decode = import_module("agevlm_mlx.kernels.decode_attention")
guided = import_module("agevlm_mlx.kernels.guided_attention")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not mx.metal.is_available(),
        reason="needs a Mac with Metal; tests/kernels runs the same kernels and cases on the CPU",
    ),
]
masks = pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.delenv("AGEVLM_KERNELS", raising=False)
    with mx.stream(mx.gpu):
        yield


@masks
@dtypes
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, dtype, masked):
    arrays = case.arrays(dtype, masked)
    out, weights = decode.kernel(*arrays)
    right = case.right(*arrays)
    assert_close(out, right[0], dtype)
    assert_close(weights, right[1])
    again = decode.kernel(*arrays)  # deterministic: the same bits
    assert mx.array_equal(again[0], out)
    assert mx.array_equal(again[1], weights)


@masks
@dtypes
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_guided(case, dtype, masked):
    q, keys, *rest = case.arrays(dtype, masked)

    def run(form):
        maps, gradients = mx.vjp(
            lambda q, keys: form(q, keys, *rest), [q, keys], [case.cotangent()]
        )
        return *maps, *gradients

    got, again = run(guided.kernel), run(guided.kernel)
    right = case.right(case.cotangent(), q, keys, *rest)
    for mine, wanted, its in zip(got, right, (mx.float32, dtype, dtype), strict=True):
        assert_close(mine, wanted, its)
    assert all(mx.array_equal(a, b) for a, b in zip(got, again, strict=True))


def test_a_compiled_training_step():
    q, keys, *rest = GUIDED[1].arrays(mx.bfloat16, True)

    def gradient(form):
        return mx.grad(lambda q, k: form(q, k, *rest)[..., 1:].square().sum(), (0, 1))

    with_kernels = mx.compile(gradient(guided_attention))(q, keys)
    # In fp32, so that only the kernels round.
    plain = gradient(guided.twin)(*(x.astype(mx.float32) for x in (q, keys)))
    for mine, theirs in zip(with_kernels, plain, strict=True):
        assert_close(mine, np.array(theirs), mx.bfloat16)


def test_the_public_functions_take_the_kernels(monkeypatch):
    for module in (decode, guided):
        monkeypatch.setattr(module, "twin", None)
    decode_attention(*DECODE[0].arrays(mx.bfloat16, True))
    guided_attention(*GUIDED[0].arrays(mx.bfloat16, True))
