"""`agevlm-convert quantize` and `verify`."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.weights import load, read_weights
from convert import __main__ as cli
from convert.verify import differences


@pytest.fixture
def copy(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def quantize(model: Path, out: Path, bits: int = 8, group: int = 32) -> int:
    flags = ["--q-bits", str(bits), "--q-group-size", str(group)]
    return cli.main(["quantize", "--model", str(model), "--mlx-path", str(out), *flags])


def disagreement(a: Path, b: Path) -> float:
    """How far apart two models' next-token distributions are on the same image (0..1)."""
    first, second = load(a), load(b)
    pixels = mx.random.normal((2, *[first.preprocessor.image_size] * 2, 3))
    ids = mx.random.randint(4, 200, (2, 12))
    p, q = (
        mx.softmax(m(ids, cache=m.see(pixels)).astype(mx.float32), -1)
        for m in (first.model, second.model)
    )
    return float(mx.abs(p - q).sum(-1).mean().item()) / 2  # pyright: ignore[reportArgumentType]


def test_more_bits_are_closer_and_fewer_are_smaller(copy, tmp_path):
    assert quantize(copy, tmp_path / "q8", 8) == 0
    assert quantize(copy, tmp_path / "q4", 4) == 0
    far, near = disagreement(copy, tmp_path / "q4"), disagreement(copy, tmp_path / "q8")
    assert 0 < near < far < 0.5
    sizes = [(p / "model.safetensors").stat().st_size for p in (copy, tmp_path / "q8")]
    assert sizes[1] < 0.8 * sizes[0]
    assert (tmp_path / "q4/model.safetensors").stat().st_size < sizes[1]


def test_only_the_language_model_changes(copy, tmp_path):
    assert quantize(copy, tmp_path / "q8") == 0
    before, after = read_weights(copy), read_weights(tmp_path / "q8")
    kept = [k for k in before if not k.startswith("language_model.")]
    assert kept
    assert all(mx.array_equal(before[k], after[k]) for k in kept)
    assert any(k.endswith("q_proj.scales") for k in after)
    assert load(tmp_path / "q8").model.config.quantization == {"bits": 8, "group_size": 32}


def test_quantised_twice_is_an_error(copy, tmp_path, capsys):
    assert quantize(copy, tmp_path / "q8") == 0
    assert quantize(tmp_path / "q8", tmp_path / "again") == 2
    assert "already quantised" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_an_interrupted_save_leaves_nothing(copy, tmp_path, monkeypatch):
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.quantize.save_model", full_disk)
    assert quantize(copy, tmp_path / "q8") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_verify_finds_a_copy_equal(copy, tiny_checkpoint, capsys):
    assert cli.main(["verify", str(tiny_checkpoint), str(copy)]) == 0
    assert capsys.readouterr().out.startswith("equal: ")


def test_verify_reports_one_changed_number(copy, tiny_checkpoint, capsys):
    weights = read_weights(copy)
    key = sorted(weights)[0]
    weights[key] = weights[key] + mx.zeros_like(weights[key]).at[0].add(0.25)
    mx.eval(weights)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    arguments = ["verify", str(tiny_checkpoint), str(copy)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert f"value: {key} differs by up to 0.25" in out
    assert "different: " in out
    assert cli.main([*arguments, "--atol", "0.3"]) == 0


def test_verify_names_keys_shapes_and_dtypes():
    a = {"both": mx.zeros(2), "shape": mx.zeros(2), "dtype": mx.zeros(2), "a": mx.zeros(1)}
    b = {"both": mx.zeros(2), "shape": mx.zeros(3), "dtype": mx.zeros(2, mx.int32)}
    lines, largest = differences(a, b | {"b": mx.zeros(1)})
    assert lines == [
        "only in A: a",
        "only in B: b",
        "shape: shape is (2,) in A and (3,) in B",
        "dtype: dtype is mlx.core.float32 in A and mlx.core.int32 in B",
    ]
    assert largest == 0


@pytest.mark.parametrize(("x", "y", "equal"), [("nan", "nan", 1), ("nan", 0, 0), ("inf", "inf", 1)])
def test_verify_and_numbers_that_are_none(x, y, equal):
    lines, _ = differences({"k": mx.array([float(x)])}, {"k": mx.array([float(y)])})
    assert (not lines) == equal


def test_verify_needs_two_checkpoints(copy, tmp_path, capsys):
    assert cli.main(["verify", str(copy), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_sizes_are_told(copy, tmp_path, capsys):
    assert quantize(copy, tmp_path / "q4", 4) == 0
    told = capsys.readouterr().out
    assert "MB became" in told
    parameters = dict(tree_flatten(load(tmp_path / "q4").model.parameters()))
    assert f"{sum(a.nbytes for a in parameters.values()) / 1e6:.1f} MB" in told
