"""The plain-MLX twins against float64, and the choice between a twin and its kernel."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.kernels import chooser, decode_attention, guided_attention
from tests.kernels.cases import DECODE, DTYPES, GUIDED, Decode, Guided, assert_close, name, normal

decode = import_module("agevlm_mlx.kernels.decode_attention")
guided = import_module("agevlm_mlx.kernels.guided_attention")
masks = pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)


@masks
@dtypes
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_is_attention(case, dtype, masked):
    arrays = case.arrays(dtype, masked)
    out, weights = decode.twin(*arrays)
    right = case.right(*arrays)
    assert_close(out, right[0], dtype)
    assert_close(weights, right[1])
    if masked:  # the last row sees one slot only
        assert_close(weights[-1], np.eye(1, case.S)[0])


@masks
@dtypes
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_guided_maps_and_their_gradients(case, dtype, masked):
    q, keys, *rest = case.arrays(dtype, masked)
    maps, gradients = mx.vjp(
        lambda q, keys: guided.twin(q, keys, *rest), [q, keys], [case.cotangent()]
    )
    right = case.right(case.cotangent(), q, keys, *rest)
    assert_close(maps[0], right[0])
    for gradient, wanted in zip(gradients, right[1:], strict=True):
        assert_close(gradient, wanted, dtype)


def test_the_gradients_in_float64_are_finite_differences():
    # Of the reference that everything above and every kernel is compared with.
    case = Guided(B=2, N=3, K=1, C=2, S=4, H=32, heads=2, P=4)
    q, keys, *rest = case.arrays(mx.float32, True)
    cotangent = np.array(case.cotangent()).astype(np.float64)
    _, *gradients = case.right(case.cotangent(), q, keys, *rest)
    rng = np.random.default_rng(0)
    for which, gradient in enumerate(gradients):
        along = normal(rng, gradient.shape, mx.float32)
        losses = []
        for step in (0.01, -0.01):
            moved = [q, keys]
            moved[which] = moved[which] + step * along
            losses.append(
                (case.right(case.cotangent(), moved[0], moved[1], *rest)[0] * cotangent).sum()
            )
        slope = (losses[0] - losses[1]) / 0.02
        assert slope == pytest.approx((gradient * np.array(along)).sum(), rel=1e-3)


@pytest.mark.kernels  # on the CPU the compiler takes seconds the first time
def test_equal_inside_compile():
    q, keys, values, scale, mask = DECODE[1].arrays(mx.float32, True)
    compiled = mx.compile(lambda q, k, v, m: decode_attention(q, k, v, scale, m))
    plain = decode.twin(q, keys, values, scale, mask)
    for a, b in zip(compiled(q, keys, values, mask), plain, strict=True):
        assert mx.allclose(a, b, atol=1e-6)
    q, keys, *rest = GUIDED[1].arrays(mx.float32, True)

    def loss(q, keys):
        return guided_attention(q, keys, *rest)[..., 1:].square().sum()

    plain = mx.grad(loss, (0, 1))(q, keys)
    for a, b in zip(mx.compile(mx.grad(loss, (0, 1)))(q, keys), plain, strict=True):
        assert mx.allclose(a, b, atol=1e-6)


def test_no_rows_are_no_maps():
    q, keys, *_ = GUIDED[0].arrays(mx.float32, False)
    none = mx.zeros((0,), mx.int32)
    assert guided_attention(q, keys, none, none, 4, 0.2).shape == (0, 4, keys.shape[2])


@pytest.mark.parametrize(
    ("module", "case"), [(decode, DECODE[0]), (guided, GUIDED[0])], ids=["decode", "guided"]
)
class TestChoice:
    @pytest.fixture(autouse=True)
    def record(self, module, monkeypatch):
        """Which form was called; a kernel cannot run without Metal, so its twin answers."""
        self.called, twin = [], module.twin
        for form in ("kernel", "twin"):

            def call(*arrays, form=form):
                self.called.append(form)
                return twin(*arrays)

            monkeypatch.setattr(module, form, call)

    @staticmethod
    def metal(monkeypatch, device: mx.DeviceType = mx.gpu):
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))

    def choose(self, module, case, dtype=mx.float32) -> str:
        public = {decode: decode_attention, guided: guided_attention}[module]
        public(*case.arrays(dtype, True))
        return self.called.pop()

    @pytest.mark.parametrize("value", [None, "", "on", "auto"])
    def test_metal_takes_the_kernel(self, module, case, monkeypatch, value):
        monkeypatch.delenv(chooser.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(chooser.VARIABLE, value)
        self.metal(monkeypatch)
        assert [self.choose(module, case, dtype) for dtype in DTYPES] == ["kernel"] * 3

    def test_off_takes_the_twin(self, module, case, monkeypatch):
        self.metal(monkeypatch)
        monkeypatch.setenv(chooser.VARIABLE, "off")
        assert self.choose(module, case) == "twin"

    def test_without_metal_the_twin(self, module, case, monkeypatch):
        monkeypatch.setenv(chooser.VARIABLE, "on")
        self.metal(monkeypatch)
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
        assert self.choose(module, case) == "twin"

    def test_on_the_cpu_of_a_mac_the_twin(self, module, case, monkeypatch):
        self.metal(monkeypatch, mx.cpu)
        assert self.choose(module, case) == "twin"

    def test_another_value_is_refused(self, module, case, monkeypatch):
        monkeypatch.setenv(chooser.VARIABLE, "yes")
        with pytest.raises(UserError, match=r"AGEVLM_KERNELS.*'yes'") as error:
            self.choose(module, case)
        assert "\n" not in str(error.value)


def test_other_shapes_and_types_take_the_twin(monkeypatch):
    TestChoice.metal(monkeypatch)
    monkeypatch.setattr(decode, "kernel", None)
    monkeypatch.setattr(guided, "kernel", None)
    rng = np.random.default_rng(0)
    for H in (16, 48, 80, 160, 256):
        out, _ = decode_attention(*Decode(B=1, N=2, K=1, S=5, H=H).arrays(mx.float32, False))
        assert out.shape == (1, 2, H)
    q, keys, values, *rest = DECODE[0].arrays(mx.float16, False)
    for odd in range(3):
        mixed = [q, keys, values]
        mixed[odd] = mixed[odd].astype(mx.float32)
        assert decode_attention(*mixed, *rest)[0].dtype == mixed[0].dtype
    with pytest.raises(ValueError, match="reshape"):  # N is no multiple of K
        decode_attention(q[:, :3], keys[:, :2], values[:, :2], *rest)
    assert not chooser.eligible(q.astype(mx.int32), keys.astype(mx.int32))
    case = Guided(B=1, N=2, K=1, C=2, S=3, H=64, heads=2, P=3)
    q, keys, *rest = case.arrays(mx.float32, True)
    assert guided_attention(q, keys.astype(mx.float16), *rest).shape == (3, 2, 3)
    none = mx.zeros((0,), mx.int32)
    q, keys = normal(rng, (1, 2, 2, 64), mx.float32), normal(rng, (1, 1, 3, 64), mx.float32)
    assert guided_attention(q, keys, none, none, 2, 0.1).shape == (0, 2, 3)
