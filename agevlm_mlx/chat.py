"""`agevlm chat`: a conversation about images in the terminal.

Answers come as they are made. /image adds pictures to the next message, /look shows where a word
looked; /help lists everything. Lines can also come through a pipe, one message each: answers then
go to stdout and everything else to stderr.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import console, conversation, errors, sampling, weights
from .conversation import Conversation
from .data.image import load_image
from .errors import UserError
from .evaluation import terminal
from .evaluation.overlay import WordMap
from .evaluation.words import content_words
from .generation import Response

EXAMPLES = """
examples:
  agevlm chat --image photo.jpg
  agevlm chat --model runs/demo/guided --temp 0.7 --verbose
  printf '/image a.png\\nIs there a dog?\\n/look dog\\n' | agevlm chat
"""

HELP = """\
/image PATH   add a picture to your next message; a file dropped on the window does the same
/status       the pictures of this conversation, and which message each belongs to
/look WORD    draw where a word of the last question or answer looked; alone: list its words
/retry        ask the last question again
/reset        forget the conversation and its pictures
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer and keeps what was said so far. Tab completes commands and file names."""


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture of the conversation: the bytes of its file, read once."""

    name: str
    data: bytes
    size: tuple[int, int]


@dataclass
class Chat:
    """One conversation and the commands that a person can give in it.

    Answers and what a command was asked for go to stdout, remarks to stderr.
    """

    conversation: Conversation
    sampling: sampling.Sampling
    verbose: bool = False
    #: Whether a person is there to press Ctrl-C; otherwise it ends the whole command.
    interactive: bool = False
    #: Pictures that the conversation has, with the number of their message, and those to come.
    shown: list[tuple[int, Shown]] = field(default_factory=list)
    waiting: list[Shown] = field(default_factory=list)
    _asked: tuple[str, tuple[Shown, ...]] | None = None
    _words: list[WordMap] | None = None

    def run(self, lines: Iterator[str]) -> int:
        """Take lines until they end or say /exit; the number of those that were refused."""
        refused = 0
        for line in lines:
            try:
                if line.strip() and not self.take(line.strip()):
                    break
            except UserError as error:
                refused += 1
                _remark(f"error: {error}")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                _remark("(stopped)")
        return refused

    def take(self, line: str) -> bool:
        """Obey a command or send a message; False when it is time to leave. ``UserError``s."""
        name, *rest = line.split(maxsplit=1)
        command = self._commands().get(name.lower())
        if command is not None:
            return command(" ".join(rest)) is not False
        if console.is_dropped(line):
            self.image(line)
        elif line.startswith("/"):
            close = difflib.get_close_matches(name, self._commands(), n=1, cutoff=0.5)
            advice = f"did you mean {close[0]}?" if close else "/help lists the commands"
            raise UserError(f"unknown command {name!r}; {advice}")
        else:
            self.ask(line)
        return True

    def _commands(self) -> dict[str, Callable[[str], Any]]:
        return {
            "/image": self.image,
            "/status": self.status,
            "/look": self.look,
            "/retry": self.retry,
            "/reset": self.reset,
            "/clear": self.reset,
            "/help": lambda _: print(HELP),
            "/exit": lambda _: False,
            "/quit": lambda _: False,
        }

    # --- messages ----------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a message with the pictures that wait for it, and print the answer as it comes."""
        self._send(text, tuple(self.waiting))

    def retry(self, _: str = "") -> None:
        """Forget the last answer and ask again; if that fails, the old answer stays."""
        if self._asked is None:
            raise UserError("/retry: expected a question to ask again; ask something first")
        if self.sampling.temp == 0 or self.sampling.seed is not None:
            why = "--seed is given" if self.sampling.temp else "--temp is 0"
            _remark(f"({why}: expect the same answer)")
        text, pictures = self._asked
        turns, shown, messages = self.conversation.turns, self.shown, self._messages()
        self.conversation.turns = turns[:-2]
        self.shown = [entry for entry in shown if entry[1] not in pictures]
        try:
            self._send(text, pictures)
        finally:
            if self._messages() < messages:
                self.conversation.turns, self.shown = turns, shown

    def _send(self, text: str, pictures: tuple[Shown, ...]) -> None:
        self._words = None
        messages = self._messages()
        try:
            self._answer(text, pictures)
        finally:
            if self._messages() > messages:  # otherwise the message was refused
                self._asked = text, pictures
                self.shown = self.shown + [(messages + 1, picture) for picture in pictures]
                self.waiting = [p for p in self.waiting if p not in pictures]

    def _answer(self, text: str, pictures: Sequence[Shown]) -> None:
        images = [picture.data for picture in pictures]
        store = self.conversation.store
        start, first, before = time.monotonic(), 0.0, store.misses
        said, last = "", None
        # Refused messages raise here.
        pieces: Any = self.conversation.ask(text, images, self.sampling)
        try:
            with closing(pieces), console.stoppable(self.interactive) as stopped:
                for last in pieces:
                    first = first or time.monotonic() - start
                    piece = console.printable(last.text if said else last.text.lstrip())
                    said += piece
                    print(piece, end="", flush=True)
                    if stopped():
                        break
        finally:
            print(end="" if said.endswith("\n") else "\n")
        if last is None or last.finish_reason is None:
            _remark("(stopped)")
        elif last.finish_reason == "length":
            _remark(f"(cut off after {last.generation_tokens} tokens)")
        elif not said.strip():
            _remark("(an empty answer)")
        if self.verbose and last is not None:
            sight = ""
            if self.conversation.image_sources:
                sight = "; image newly seen" if store.misses > before else "; image already seen"
            _remark(f"[{_statistics(last, first)}{sight}]")

    def _messages(self) -> int:
        return sum(turn.role == "user" for turn in self.conversation.turns)

    # --- pictures ----------------------------------------------------------------------------

    def image(self, text: str) -> None:
        """Add the pictures that `text` names to the next message; all or none."""
        if not text:
            raise UserError("/image: expected the name of an image file after it")
        self.add([_open(name) for name in console.file_names(text)])

    def add(self, pictures: Sequence[Shown]) -> None:
        """Have pictures wait for the next message."""
        self.waiting += pictures
        for picture in pictures:
            _remark(f"{picture.name} ({_size(picture)}) goes with your next message")

    def status(self, _: str = "") -> None:
        """List the pictures and the messages that they belong to."""
        listed = [(f"message {n}", picture) for n, picture in self.shown]
        listed += [("next message", picture) for picture in self.waiting]
        if not listed:
            _remark("no picture yet; /image PATH adds one")
        for n, (where, picture) in enumerate(listed, 1):
            print(f"{n}  {console.printable(picture.name)}  {_size(picture)}  {where}")

    def look(self, text: str) -> None:
        """Draw where a word of the last exchange looked, or list its words."""
        if not self.shown:
            raise UserError("/look: expected a question about a picture; /image PATH adds one")
        if self._words is None:
            self._words = self.conversation.word_maps()
        words = self._words
        if not words:
            raise UserError("/look: expected words that name something to see, got none of them")
        if not text:
            self._list_words(words)
            return
        word = _find(words, text)
        at = terminal.strongest(word)
        pictures = self.conversation.pictures()
        how, shown = terminal.rendering(sys.stdout), pictures[at]
        print(terminal.draw(shown.image, word.maps[at], shown.geometry, how, terminal.room()))
        # With fusion "concat" only pictures that came first have maps.
        print(terminal.caption(word, pictures, self._names()[: len(word.maps)]))

    def _list_words(self, words: Sequence[WordMap]) -> None:
        width, names = max(len(word.word) for word in words), self._names()
        for word in words:
            said, at = "asked" if word.role == "user" else "answered", terminal.strongest(word)
            share = float(word.maps[at].sum())
            print(
                f"{word.word:<{width}}  {said:<8}  grounding {word.grounding:.2f}  "
                f"{share:4.0%} of its attention on {names[at]}"
            )

    def _names(self) -> list[str]:
        return [console.printable(picture.name) for _, picture in self.shown]

    # --- the rest ----------------------------------------------------------------------------

    def reset(self, _: str = "") -> None:
        """Begin again without messages and pictures."""
        self.conversation.reset()
        self.shown, self.waiting, self._asked, self._words = [], [], None, None
        _remark("a new conversation, without pictures")

    def complete(self, line: str) -> list[str]:
        """What the line up to the cursor could become."""
        name, space, rest = line.partition(" ")
        if not space:
            names = [name for name in self._commands() if line and name.startswith(line)]
            return [name + " " if name in ("/image", "/look") else name for name in names]
        if name == "/image":
            return [f"/image {found}" for found in console.complete_file_name(rest)]
        if name == "/look":
            texts = [turn.text for turn in self.conversation.turns[-2:]]
            words = {word.lower() for text in texts for word, _, _ in content_words(text)}
            return [f"/look {w}" for w in sorted(words) if w.startswith(rest.lower())]
        return []


def _find(words: Sequence[WordMap], text: str) -> WordMap:
    """The word as the answer says it, or else the question."""
    wanted = text.strip("\"'.,;:!?").lower()
    said = {word.word.lower(): word for word in sorted(words, key=lambda w: w.role != "user")}
    if wanted in said:
        return said[wanted]
    close = difflib.get_close_matches(wanted, said, n=3, cutoff=0.6)
    advice = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(said)}"
    raise UserError(f"/look: no word {text!r} in the last exchange; {advice}")


def _open(name: str) -> Shown:
    if "://" in name:
        raise UserError(f"{name}: expected a file of this computer; download it first")
    path = Path(os.path.expanduser(name))
    size = load_image(path).size
    return Shown(path.name, path.read_bytes(), size)


def _size(picture: Shown) -> str:
    return f"{picture.size[0]}x{picture.size[1]}"


def _remark(text: str) -> None:
    print(console.printable(text), file=sys.stderr, flush=True)


def _statistics(last: Response, first: float) -> str:
    return (
        f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s; first after "
        f"{first:.2f} s, {last.prompt_tokens} tokens of prompt read"
    )


# --- the command -----------------------------------------------------------------------------


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    choice = sampling.from_arguments(args)
    first = [_open(name) for name in args.image]
    loaded = weights.load(args.model)
    talk = Conversation(loaded, **conversation.options(args, loaded))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(talk, choice, args.verbose, interactive)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    if interactive:
        print(
            f"{loaded.path}\n/image PATH adds a picture, /help lists the commands, Ctrl-D leaves."
        )
    chat.add(first)
    if not interactive:
        return 2 if chat.run(console.piped()) else 0
    chat.run(console.typed("> ", chat.complete))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="checkpoint folder or hub id (default: the demo's model or the shipped one)"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="a picture for the first message; repeat for several",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="after each answer a line of figures, on stderr"
    )
    sampling.add_arguments(parser)
    conversation.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
