"""PyTorch's checkpoint files, read without PyTorch: a zip of raw numbers beside a pickle.

The pickle says which numbers are which tensor. It is read by a machine of our own that knows the
few opcodes that ``torch.save`` writes for a table of tensors and the few names that such a table
needs. Nothing of the file is ever run, and all sizes that it says are checked against the file.
Format: ``torch.serialization`` and ``caffe2/serialize/inline_container.h`` of PyTorch 1.6 to 2.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.pickled import BROKEN
from ..errors import UserError, one_line

#: Bytes of the pickle of a table; that of vit_h is 0.1 MB.
_MAX_PICKLE = 16 << 20
#: Signature and fixed part of the header that stands before a file in a zip.
_LOCAL = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class _Stored:
    """A storage or a tensor: a view of numbers that are still in the file."""

    numbers: np.ndarray
    dtype: mx.Dtype | None

    def array(self) -> mx.array:
        """The numbers in memory."""
        loaded = mx.array(np.require(self.numbers, None, ["C", "A"]))
        return loaded if self.dtype is None else loaded.view(self.dtype)


def read_checkpoint(path: Path) -> dict[str, mx.array]:
    """The tensors of a file that ``torch.save`` made of a state dict, alone or as the ``model`` or
    ``state_dict`` of a table. ``UserError`` for any other file."""
    try:
        files = _Files(path)
        state = _unpickle(files)
        return {name: value.array() for name, value in _tensors(state, files.size).items()}
    except UserError:
        raise
    except (*BROKEN, OSError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a readable checkpoint of tensors ({one_line(error)[:200]}); download it "
            "again"
        ) from None


def _tensors(state: Any, size: int) -> dict[str, _Stored]:
    """The table of tensors in what a pickle gave; `size` is that of the file in bytes."""
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise pickle.UnpicklingError(f"expected a table of tensors, got a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Stored):
            raise pickle.UnpicklingError(f"expected tensors only, but {str(name)[:80]} is none")
    # Tensors may share numbers, but a small file must not unfold into a large memory.
    if sum(value.numbers.nbytes for value in state.values()) > 2 * size:
        raise pickle.UnpicklingError("its tensors are larger than the file")
    return state


class _Files:
    """The files in a checkpoint's zip; of their numbers none is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: expected a checkpoint of PyTorch 1.6 or later (a zip), got a file that "
                "was cut short or has the format before that; download it again, or load and save "
                "it once with torch"
            )
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self.size = len(self._bytes)
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
        self._found = {info.filename: info for info in found}
        pickles = [name for name in self._found if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(self._found) < len(found):
            raise zipfile.BadZipFile("a zip, but none that torch.save makes")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = (
            self.read("byteorder").tobytes() if self._folder + "byteorder" in self._found else b""
        )
        if order not in (b"", b"little"):
            raise zipfile.BadZipFile("it was written on a big-endian machine")

    def read(self, name: str) -> np.ndarray:
        """The bytes of a file as a view u8 [n] of the checkpoint."""
        info = self._found[self._folder + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"{name[:80]} is compressed or encrypted")
        header = self._bytes[info.header_offset : info.header_offset + _LOCAL.size].tobytes()
        signature, name_length, extra_length = _LOCAL.unpack(header)
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        if signature != b"PK\3\4" or start + info.file_size > self.size:
            raise zipfile.BadZipFile(f"{name[:80]} is not where the zip says")
        return self._bytes[start : start + info.file_size]


@dataclass(frozen=True)
class _Kind:
    """A class of PyTorch's storages: how its numbers are read, and what they are if numpy has no
    such numbers."""

    numbers: str
    dtype: mx.Dtype | None = None


class _Known(Enum):
    """The functions that a pickle may name."""

    TABLE = "collections OrderedDict"
    TENSOR = "torch._utils _rebuild_tensor_v2"


_NAMES: dict[str, _Kind | _Known] = {
    **{known.value: known for known in _Known},
    "torch FloatStorage": _Kind("<f4"),
    "torch HalfStorage": _Kind("<f2"),
    "torch BFloat16Storage": _Kind("<u2", mx.bfloat16),
    "torch LongStorage": _Kind("<i8"),
    "torch IntStorage": _Kind("<i4"),
    "torch ShortStorage": _Kind("<i2"),
    "torch CharStorage": _Kind("|i1"),
    "torch ByteStorage": _Kind("|u1"),
}


def _unpickle(files: _Files) -> Any:
    """What a checkpoint's pickle holds: tables, lists and tuples of tensors and plain values."""
    data = files.read("data.pkl")
    if len(data) > _MAX_PICKLE:
        raise pickle.UnpicklingError(f"its pickle has {len(data)} bytes, more than any SAM's")
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def taken(count: int) -> list[Any]:
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def since_mark() -> list[Any]:
        return taken(len(stack) - marks.pop())

    for opcode, argument, _ in pickletools.genops(data.tobytes()):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken(int(opcode.name[-1]))))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = taken(1) if opcode.name == "APPEND" else since_mark()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = taken(2) if opcode.name == "SETITEM" else since_mark()
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(argument))
            case "BINPERSID":
                stack.append(_storage(files, stack.pop()))
            case "REDUCE":
                stack.append(_call(*taken(2)))
            case "BUILD":
                stack.pop()  # attributes of a table (versions of modules): nobody needs them
            case name:
                raise pickle.UnpicklingError(f"it holds a {name}, which no table of tensors does")


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise pickle.UnpicklingError("it adds to something that is no list")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    # A tuple of tuples of tuples ... as a name would be too deep for Python to hash.
    if type(target) is not dict or not all(isinstance(name, str | int) for name in items[::2]):
        raise pickle.UnpicklingError("it holds a table whose names are no texts")
    target.update(zip(items[::2], items[1::2], strict=True))


def _named(name: Any) -> _Kind | _Known:
    if name not in _NAMES:
        raise pickle.UnpicklingError(f"it names {str(name)[:80]!r}, which no table of tensors does")
    return _NAMES[name]


def _call(function: Any, arguments: Any) -> Any:
    if function is _Known.TENSOR and isinstance(arguments, tuple):
        return _tensor(*arguments)
    if function is _Known.TABLE and isinstance(arguments, tuple) and not arguments:
        return {}
    raise pickle.UnpicklingError("it calls something that no table of tensors does")


def _storage(files: _Files, reference: Any) -> _Stored:
    """reference: ("storage", its class, the name of its file, a device, how many numbers)."""
    what, kind, key, _, count = reference
    if what != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str):
        raise pickle.UnpicklingError("it refers to something that is no storage of numbers")
    data = files.read(f"data/{key}")
    if not _is_size(count) or count * np.dtype(kind.numbers).itemsize != len(data):
        raise pickle.UnpicklingError(f"storage {key[:80]} has another size than is said of it")
    return _Stored(data.view(kind.numbers), kind.dtype)


def _tensor(
    storage: Any, start: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, *_: Any
) -> _Stored:
    """``torch._utils._rebuild_tensor_v2``; nothing outside the storage can be reached."""
    fits = (
        isinstance(storage, _Stored)
        and _is_size(start)
        and all(
            isinstance(n, tuple) and len(n) <= 8 and all(map(_is_size, n)) for n in (shape, strides)
        )
        and len(shape) == len(strides)
        and math.prod(shape) <= storage.numbers.size
    )
    if not fits:
        raise pickle.UnpicklingError("it holds a tensor of impossible size")
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.numbers.size:
        raise pickle.UnpicklingError("it holds a tensor that is larger than its numbers")
    step = storage.numbers.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.numbers[start:], shape, [stride * step for stride in strides], writeable=False
    )
    return _Stored(view, storage.dtype)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 48
