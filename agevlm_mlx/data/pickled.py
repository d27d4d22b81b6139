"""Pickles of untrusted files, of which only plain data is read."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from ..errors import UserError, one_line

#: What a broken or hostile pickle makes the reader stumble over.
BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


# Python's own reader: that of C makes room for any memo number that a file names, which can be
# all memory there is. It takes 7 s for 150,000 sentences.
class _Plain(pickle._Unpickler):
    """Makes lists, tuples, sets, dicts, numbers and strings; nothing that needs a name."""

    #: Without byte arrays: the reader makes room for as many bytes as a file says there are.
    dispatch: ClassVar = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"it names extension {code}")


def read_pickle(path: Path) -> Any:
    """The value of a pickle of plain containers, numbers and strings, those of Python 2 included
    (as UTF-8). ``UserError`` for anything else; nothing of the file is ever run."""
    try:
        return _Plain(io.BytesIO(path.read_bytes()), encoding="utf-8", errors="replace").load()
    except BROKEN as error:
        raise UserError(
            f"{path}: expected a pickle of lists, dicts, numbers and strings, got one that cannot "
            f"be read so ({one_line(error)}); download it again"
        ) from None
