"""What a command says when its input cannot be used, and how it leaves."""

import errno
import functools
import io
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

#: Numbers of a full disk: no space, over quota, over the size that a file may have.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Bad input. The message is one line: what was expected, what was found, what to do."""


def one_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Turn the errors a user can cause into one line on stderr and an exit status.

    ``UserError`` and a full disk exit with 2, Ctrl-C with 130. Anything else is a bug of
    ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            return 0
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            where = f" writing {error.filename}" if error.filename else ""
            print(
                f"error: no space left on the disk{where}; free some and run the same "
                "command again, finished parts are kept",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130

    return run
