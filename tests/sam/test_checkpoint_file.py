"""PyTorch's files without PyTorch: what is read, and what is refused before anything happens."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.sam import checkpoint_file
from agevlm_mlx.sam.checkpoint_file import read_checkpoint

NUMBERS = np.arange(6, dtype=np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "torch\nFloatStorage") -> bytes:
    """Opcodes that refer to the numbers of a file."""
    return (
        b"("
        + text("storage")
        + f"c{kind}\n".encode()
        + text(key)
        + text("cpu")
        + (number(count) + b"tQ")
    )


def tensor(
    of: bytes = b"", start: int = 0, shape: tuple = (2, 3), strides: tuple = (3, 1)
) -> bytes:
    """Opcodes that make a tensor, as ``torch.save`` writes them."""
    hooks = b"ccollections\nOrderedDict\n)R"
    places = number(start) + numbers(*shape) + numbers(*strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (of or storage())
        + places
        + b"\x89"
        + (hooks + b"tR")
    )


def table(**tensors: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in tensors.items()) + b"u"


def write(path: Path, code: bytes, files: dict[str, bytes] | None = None, **options) -> Path:
    """A checkpoint whose pickle consists of these opcodes."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + code + b".")
        for name, data in ({"data/0": NUMBERS.tobytes()} | (files or {})).items():
            archive.writestr(f"archive/{name}", data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_tensors_are_read_as_they_are(tmp_path):
    of_halves = storage("h", 3, "torch\nHalfStorage")
    of_brains = storage("b", 2, "torch\nBFloat16Storage")
    brains = mx.array([1.5, -2.0], mx.bfloat16)
    path = write(
        tmp_path / "a.pth",
        table(
            whole=tensor(),
            turned=tensor(shape=(3, 2), strides=(1, 3)),
            last=tensor(start=4, shape=(2,), strides=(1,)),
            one=tensor(start=5, shape=(), strides=()),
            none=tensor(shape=(0, 3), strides=(3, 1)),
            halves=tensor(of_halves, shape=(3,), strides=(1,)),
            brains=tensor(of_brains, shape=(2,), strides=(1,)),
        ),
        {
            "data/h": np.array([1, 2, 3], np.float16).tobytes(),
            "data/b": np.array(brains.view(mx.uint16)).tobytes(),
            "byteorder": b"little",
        },
    )
    got = read_checkpoint(path)
    whole = NUMBERS.reshape(2, 3)
    for name, wanted in {
        "whole": whole,
        "turned": whole.T,
        "last": NUMBERS[4:],
        "one": NUMBERS[5],
        "none": np.zeros((0, 3), np.float32),
        "halves": np.array([1, 2, 3], np.float16),
    }.items():
        np.testing.assert_array_equal(np.array(got.pop(name)), wanted, strict=True)
    assert got["brains"].dtype == mx.bfloat16
    assert got["brains"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_training_checkpoint_gives_its_weights(tmp_path, key):
    code = table(epoch=number(3), **{key: table(a=tensor())}, rate=b"G" + struct.pack(">d", 0.1))
    assert list(read_checkpoint(write(tmp_path / "a.pth", code))) == ["a"]


def test_attributes_of_a_table_change_nothing(tmp_path):
    # As torch pickles a state dict: an OrderedDict that is filled, and given _metadata.
    filled = b"ccollections\nOrderedDict\n)R(" + text("a") + tensor() + b"u"
    build = b"}" + text("items") + number(1) + b"sb"
    assert list(read_checkpoint(write(tmp_path / "a.pth", filled + build))) == ["a"]


@pytest.mark.parity
def test_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).state_dict()
    state |= {"turned": torch.randn(3, 4).T, "brains": torch.randn(5).bfloat16()}
    state |= {"tied": state["turned"], "bytes": torch.arange(9, dtype=torch.uint8)[3:]}
    torch.save(state, tmp_path / "a.pth")
    got = read_checkpoint(tmp_path / "a.pth")
    assert list(got) == list(state)
    for name, value in state.items():
        exact = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        own = got[name].astype(mx.float32) if got[name].dtype == mx.bfloat16 else got[name]
        np.testing.assert_array_equal(np.array(own), exact, strict=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "PyTorch 1.6 or later" in refusal(tmp_path / "old.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "names 'torch.nn.modules.linear Linear'" in refusal(tmp_path / "module.pth")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_run(tmp_path, protocol):
    code = pickle.dumps({"a": Evil(tmp_path / "pwned")}, protocol)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    assert "no table of tensors does" in refusal(tmp_path / "a.pth")
    assert not (tmp_path / "pwned").exists()


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple ...


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (table(a=tensor(shape=(2, 4), strides=(3, 1))), "impossible size"),
        (table(a=tensor(shape=(10**9, 10**9), strides=(0, 0))), "impossible size"),
        (table(a=tensor(shape=(1 << 70,), strides=(0,))), "impossible size"),
        (table(a=tensor(start=-1)), "impossible size"),
        (table(a=tensor(shape=(-2, -3))), "impossible size"),
        (table(a=tensor(shape=(2,), strides=(1, 1))), "impossible size"),
        (table(a=tensor(start=1)), "larger than its numbers"),
        (table(a=tensor(shape=(2,), strides=(6,))), "larger than its numbers"),
        (table(a=tensor(storage(count=5))), "another size than is said"),
        (table(a=tensor(storage(count=-6))), "another size than is said"),
        (table(a=tensor(storage(key="1"))), "archive/data/1"),
        (table(a=tensor(storage(key="../../../etc/passwd"))), "etc/passwd"),
        (table(a=tensor(storage(kind="torch\nQInt8Storage"))), "names 'torch QInt8Storage'"),
        (table(a=tensor(storage(kind="collections\nOrderedDict"))), "no storage of numbers"),
        (table(a=tensor(number(1))), "impossible size"),
        (table(a=number(1)), "expected tensors only, but a is none"),
        (table(), "expected a table of tensors"),
        (tensor(), "expected a table of tensors"),
        (b"}" + DEEP + number(1) + b"s", "names are no texts"),
        (DEEP, "expected a table of tensors, got a tuple"),
        (b"ccollections\nOrderedDict\n(]" + b"tR", "calls something"),
        (number(1) + b")R", "calls something"),
        (b"}(" + text("a") + b"u", "zip() argument"),
        (b")(" + text("a") + number(1) + b"u", "names are no texts"),
        (b"}" + number(1) + b"a", "no list"),
        (b"u", "pop from empty list"),
        (b"j\xff\xff\xff\xff", "4294967295"),
        (b"\x96" + struct.pack("<Q", 1 << 40) + b"abc", "not a readable checkpoint"),
        (b"X" + struct.pack("<I", 1 << 31) + b"abc", "not a readable checkpoint"),
        (b"\xff", "not a readable checkpoint"),
    ],
)
def test_pickles_that_say_what_is_not_so(tmp_path, code, message):
    assert message in refusal(write(tmp_path / "a.pth", code))


def test_a_file_does_not_unfold_into_more_memory_than_it_is(tmp_path):
    whole = tensor(storage("big", 10_000), shape=(10_000,), strides=(1,))
    for count, accepted in ((2, True), (3, False)):
        code = table(**{f"copy {i}": whole for i in range(count)})
        path = write(tmp_path / "a.pth", code, {"data/big": bytes(40_000)})
        if accepted:
            assert len(read_checkpoint(path)) == count
        else:
            assert "larger than the file" in refusal(path)


def test_a_pickle_without_an_end(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}")
    assert "not a readable checkpoint" in refusal(tmp_path / "a.pth")


def test_a_pickle_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "_MAX_PICKLE", 50)
    assert "more than any SAM's" in refusal(write(tmp_path / "a.pth", table(a=tensor())))


def test_zips_that_are_no_checkpoints(tmp_path):
    good = table(a=tensor())
    squeezed = write(tmp_path / "a.pth", good, compression=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in refusal(squeezed)
    assert "big-endian" in refusal(write(tmp_path / "b.pth", good, {"byteorder": b"big"}))
    assert "none that torch.save makes" in refusal(
        write(tmp_path / "c.pth", good, {"x/data.pkl": b""})
    )
    twice = write(tmp_path / "d.pth", good)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    assert "none that torch.save makes" in refusal(twice)
    with zipfile.ZipFile(tmp_path / "e.pth", "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "none that torch.save makes" in refusal(tmp_path / "e.pth")


def test_files_that_are_no_zips(tmp_path):
    path = write(tmp_path / "a.pth", table(a=tensor()))
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-30], whole[: len(whole) // 2], pickle.dumps(1)):
        path.write_bytes(content)
        assert "cut short or has the format before" in refusal(path)


def test_every_flipped_byte_is_refused_or_read(tmp_path):
    path = write(tmp_path / "a.pth", table(a=tensor(), b=tensor(start=3, shape=(3,), strides=(1,))))
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert all(value.size <= len(NUMBERS) for value in read_checkpoint(path).values())
        except UserError:
            refused += 1
    assert refused > len(whole) / 4
