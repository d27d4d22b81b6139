"""`agevlm-app`: ask about images in the browser and see where every word looks.

Everything stays on this computer: the page is for this computer alone, unless --share says else.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from agevlm_mlx import sampling
from agevlm_mlx.errors import UserError, command

if TYPE_CHECKING:
    from .sessions import Sessions
    from .ui import Addresses

_EXAMPLES = """
examples:
  agevlm-app
  agevlm-app --model runs/demo/concat --bits 4 --port 8000
  agevlm-app --model org/name --models ~/checkpoints --temp 0.7 --max-tokens 512
  agevlm-app --window
  AGEVLM_APP_AUTH=me:secret agevlm-app --share
"""
#: Ports that are tried, in this order, if none is asked for.
PORTS = range(7860, 7880)
#: NAME:PASSWORD, one in a line: a command's arguments can be seen by everyone on a computer.
AUTH_VARIABLE = "AGEVLM_APP_AUTH"


@command
def main(argv: list[str] | None = None) -> int:
    """Show the page until Ctrl-C, or until its window is closed."""
    args = _parser().parse_args(argv)
    auth = _auth(args)
    _check(args)
    chosen = sampling.from_arguments(args)
    _port(args.port)  # before anything is loaded
    # Leaving as Ctrl-C does: with nothing left behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _show(args, chosen, auth)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _show(args: argparse.Namespace, chosen: sampling.Sampling, auth: list[tuple[str, str]]) -> None:
    from . import window

    with ExitStack() as stack:
        sessions, name = stack.enter_context(_sessions(args, chosen))
        addresses = _serve(stack, args, sessions, auth)
        ends = "closing the window ends it" if args.window else "Ctrl-C ends it"
        print(f"AgeVLM is at {addresses.local} with {name}; {ends}.", flush=True)
        if addresses.public:
            _warn(addresses.public, bool(auth))
        if args.window:
            window.show(addresses.local)
        else:
            if args.browser:
                webbrowser.open(addresses.local)
            _wait()


def _serve(
    stack: ExitStack, args: argparse.Namespace, sessions: "Sessions", auth: list[tuple[str, str]]
) -> "Addresses":
    """Open the page, until `stack` is left; a free port that another program was faster to take
    is passed over, unless it was asked for."""
    from . import ui

    page = {"share": args.share, "auth": auth, "extra_models": args.models}
    attempts = len(PORTS) if args.port is None else 1
    while True:
        port, attempts = _port(args.port), attempts - 1
        try:
            addresses = stack.enter_context(ui.running(sessions, port=port, **page))
            break
        except ui.PortTaken:
            if not attempts:
                raise
    if args.port is None and port != PORTS[0]:
        print(f"Port {PORTS[0]} is taken by another program; this is {port}.", file=sys.stderr)
    return addresses


@contextmanager
def _sessions(
    args: argparse.Namespace, chosen: sampling.Sampling
) -> "Iterator[tuple[Sessions, str]]":
    """The conversations with the loaded model, and its name; at the end its thread is ended."""
    from .catalogue import Choice, load_model, name
    from .desk import Desk
    from .sessions import Sessions
    from .worker import Worker

    choice = Choice(args.model, args.bits)
    worker = Worker(lambda: Desk(load_model))
    try:
        try:
            sessions = Sessions(
                worker,
                choice,
                idle=60 * args.idle,
                sampling=chosen,
                system=args.system_prompt,
                progress=_progress,
            )
        except RuntimeError as error:  # a sentence; what led to it is on the terminal already
            raise UserError(str(error)) from None
        finally:
            _progress_ends()
        try:
            yield sessions, worker.call(lambda desk: name(choice, desk.model(choice).path))
        finally:
            sessions.close_all()
    finally:
        worker.close()


def _wait() -> None:
    """Until Ctrl-C."""
    threading.Event().wait()


def _progress(part: float, step: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kmodel: {100 * part:3.0f} %, {step}", end="", file=sys.stderr, flush=True)


def _progress_ends() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _warn(address: str, auth: bool) -> None:
    """Say what a public address means."""
    print(f"Anyone on the internet can open {address}", end="", file=sys.stderr)
    print(
        " and log in with the password; give it to those you trust."
        if auth
        else " and use this computer's model; --auth NAME:PASSWORD asks them for a password.",
        file=sys.stderr,
        flush=True,
    )


def _port(asked: int | None) -> int:
    """A free port, for now; ``UserError`` if there is none."""
    if asked is not None:
        if not _is_free(asked):
            raise UserError(
                f"--port: {asked} is taken by another program; pass another one, or leave it out"
            )
        return asked
    for port in PORTS:
        if _is_free(port):
            return port
    raise UserError(f"--port: {PORTS[0]} to {PORTS[-1]} are taken; pass one that is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # What a server left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _auth(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, password) of everyone who may log in; no error repeats a password."""
    given = [("--auth", text) for text in args.auth]
    lines = os.environ.get(AUTH_VARIABLE, "").splitlines()
    given += [(AUTH_VARIABLE, line) for line in lines if line.strip()]
    pairs = []
    for where, text in given:
        name, colon, password = text.strip().partition(":")
        if not (name and colon and password):
            raise UserError(f"{where}: expected NAME:PASSWORD, neither of them empty")
        pairs.append((name, password))
    return pairs


def _check(args: argparse.Namespace) -> None:
    needs = [("gradio", "app", "the app")]
    if args.window:
        needs.append(("webview", "window", "--window"))
    for module, extra, what in needs:
        if find_spec(module) is None:
            package = "pywebview" if module == "webview" else module
            raise UserError(f'{what} needs {package}; pip install "agevlm-mlx[{extra}]"')
    if args.port is not None and not 0 < args.port < 65536:
        raise UserError(f"--port: expected 1 to 65535, got {args.port}")
    if not args.idle > 0:
        raise UserError(f"--idle: expected more than 0 minutes, got {args.idle:g}")
    for folder in args.models:
        if not folder.is_dir():
            raise UserError(f"--models: expected a folder, got {folder}")


def _folder(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agevlm-app",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub id (default: the demo's model or the shipped)")
    add("--bits", type=int, choices=(4, 8), help="quantise its language model after loading")
    add("--models", type=_folder, action="append", default=[], metavar="FOLDER",
        help="offer the checkpoints in this folder, too; repeat for several")  # fmt: skip
    add("--port", type=int, metavar="N",
        help=f"port on 127.0.0.1 (the first free one from {PORTS[0]} on)")  # fmt: skip
    add("--system-prompt", default="", metavar="TEXT", help="a first message that is no question")
    add("--idle", type=float, default=30, metavar="MINUTES",
        help="free a conversation in which nothing was asked for so long (30)")  # fmt: skip

    shown = parser.add_argument_group("how it is shown").add_mutually_exclusive_group().add_argument
    shown("--browser", action="store_true", help="open the page in the browser")
    shown("--window", action="store_true", help="open it in a window of its own")

    others = parser.add_argument_group("for others").add_argument
    others("--share", action="store_true",
           help="also open a public gradio.live address, for whoever knows it (off)")  # fmt: skip
    others("--auth", action="append", default=[], metavar="NAME:PASSWORD",
           help=f"ask for a password; repeat for several people. Also read from {AUTH_VARIABLE}, "
           "one in a line, which other users of this computer cannot see")  # fmt: skip
    sampling.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
