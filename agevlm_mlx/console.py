"""What a person types into a terminal, or a pipe brings: lines, commands and file names."""

import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

try:
    import readline  # line editing, history of this session, completion; not in every Python
except ImportError:
    readline = None

#: Characters that a shell, and so a terminal into which a file is dropped, escapes.
_ESCAPED = re.compile(r"([\s\\'\"()\[\]{}&;|<>*?!$`#])")
#: Everything but newline and tab that a terminal would obey instead of show.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without control characters: an answer may not move the cursor or set colours."""
    return _CONTROL.sub("", text)


def piped() -> Iterator[str]:
    """The lines of stdin, one message each."""
    for line in sys.stdin:
        yield line.strip()


def typed(prompt: str, complete: Callable[[str], list[str]]) -> Iterator[str]:
    """What a person enters, until Ctrl-D or the second Ctrl-C on an empty line.

    Lines that are pasted together are one message, apart from commands among them. `complete`
    gives what the line up to the cursor could become.
    """
    _set_up(complete)
    interrupted = False
    while True:
        try:
            text = input(prompt)
            while _more_pasted():
                text += "\n" + input()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if _cleared():
                continue
            if interrupted:
                return
            interrupted = True
            print("Ctrl-C again leaves, as Ctrl-D does.", file=sys.stderr)
            continue
        interrupted = False
        yield from messages(text)


def messages(text: str) -> Iterator[str]:
    """The messages in a pasted `text`: each command alone, other lines together."""
    for part in re.split(r"(?m)^(\s*/.*)$", text):
        if part.strip():
            yield part.strip()


@contextmanager
def stoppable(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; pressed again it is a KeyboardInterrupt as ever.

    Without a person there is nothing to go on with, and the first is one.
    """
    pressed = []

    def stop(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if not interactive:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _set_up(complete: Callable[[str], list[str]]) -> None:
    library, found = readline, []
    if library is None:
        return

    def completer(_: str, state: int) -> str | None:
        if state == 0:
            line = library.get_line_buffer()[: library.get_endidx()]
            # It replaces the last word only, so that is what it gets.
            found[:] = [whole[library.get_begidx() :] for whole in complete(line)]
        return found[state] if state < len(found) else None

    library.set_completer(completer)
    library.set_completer_delims(" \t\n")
    if _is_libedit():
        library.parse_and_bind("bind ^I rl_complete")
    else:
        library.parse_and_bind("tab: complete")
        library.parse_and_bind("set enable-bracketed-paste on")


def _is_libedit() -> bool:
    """Whether the library is the one of macOS, which does less."""
    return readline is not None and "libedit" in (readline.__doc__ or "")


def _cleared() -> bool:
    """Whether the line that Ctrl-C has just ended held something. libedit does not tell."""
    return readline is not None and not _is_libedit() and bool(readline.get_line_buffer())


def _more_pasted() -> bool:
    """Whether another line is there already. GNU readline gives what is pasted as one."""
    return _is_libedit() and bool(select.select([sys.stdin], [], [], 0.02)[0])


# --- file names ------------------------------------------------------------------------------


def file_names(text: str) -> list[str]:
    """The files that `text` names, as it is typed or as a terminal writes what is dropped on it:
    bare, with ``~``, quotes, ``\\ `` for a space, or as file:// addresses; several with spaces
    between them. A bare name may hold spaces if that file exists."""
    text = text.strip()
    if _exists(text):
        return [_home(text)]
    try:
        parts = [_home(_from_address(part)) for part in shlex.split(text)]
    except ValueError:  # a lone quote
        return [_home(text)]
    return parts if len(parts) == 1 or any(map(_exists, parts)) else [_home(text)]


def is_dropped(line: str) -> bool:
    """Whether a line is nothing but files, as a terminal writes what is dropped on it."""
    begins = line.startswith(("/", "~", "file:/", "'", '"'))
    return begins and all(map(os.path.isfile, file_names(line)))


def _exists(name: str) -> bool:
    """Whether there is such a file or folder; False, too, for what cannot be a name."""
    return os.path.exists(_home(name))


def _home(name: str) -> str:
    return os.path.expanduser(name)


def _from_address(name: str) -> str:
    return unquote(urlsplit(name).path) if name.lower().startswith("file:/") else name


def complete_file_name(start: str) -> list[str]:
    """What the beginning of a file name could become, quoted or escaped as it is."""
    quote = start[:1] if start[:1] in ("'", '"') else ""
    name = start[1:] if quote else re.sub(r"\\(.)", r"\1", start)
    folder, slash, begun = name.rpartition("/")
    try:
        entries = sorted(Path(_home(folder + slash) or ".").iterdir())
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(begun) or entry.name.startswith(".") > begun.startswith("."):
            continue
        whole = folder + slash + entry.name
        end = "/" if entry.is_dir() else quote
        found.append(quote + whole + end if quote else _ESCAPED.sub(r"\\\1", whole) + end)
    return found
