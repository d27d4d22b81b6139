"""The app with a model that fails, dies or dawdles when a question asks for it.

`conftest.misbehaving` runs it as a program. On SIGUSR1 it prints how many sessions are open.
"""

import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from agevlm_mlx.conversation import Conversation
from app import __main__ as command
from app.sessions import Sessions

_opened: list[Sessions] = []
_ask, _init = Conversation.ask, Sessions.__init__


def _slowly(answer: Iterator[Any]) -> Iterator[Any]:
    for response in answer:
        time.sleep(0.5)
        yield response


def ask(self: Conversation, text: str, *args: Any, **options: Any) -> Iterator[Any]:
    if "Run out of memory" in text:
        raise MemoryError("/a/path/of/the/server")
    if "Die" in text:
        raise SystemExit  # passes every `except Exception`: the thread ends
    answer = _ask(self, text, *args, **options)
    return _slowly(answer) if "Slowly" in text else answer


def init(self: Sessions, *args: Any, **options: Any) -> None:
    _init(self, *args, **options)
    _opened.append(self)


def count(*_: Any) -> None:
    print(f"sessions {sum(len(sessions) for sessions in _opened)}", flush=True)


Conversation.ask, Sessions.__init__ = ask, init  # type: ignore[method-assign]
signal.signal(signal.SIGUSR1, count)
if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
