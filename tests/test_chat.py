"""`agevlm chat`: what a person types, what the conversation gets, and what is printed."""

import builtins
import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import chat, console, weights
from agevlm_mlx.chat import Chat
from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.overlay import Picture, WordMap
from agevlm_mlx.sampling import Sampling

ROOT = Path(__file__).parents[1]
GNU_READLINE = console.readline is not None and not console._is_libedit()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a few pictures whose names need care."""
    colours = {
        "cat.png": 40,
        "my cat.png": 60,
        "my dog.png": 80,
        "it's.png": 120,
        "odd $(1) & [2].png": 160,
    }
    for name, grey in colours.items():
        Image.new("RGB", (60, 40), (grey, 0, 0)).save(tmp_path / name)
    (tmp_path / "sub folder").mkdir()
    Image.new("RGB", (40, 60)).save(tmp_path / "sub folder" / "x.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# --- file names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat.png", ["cat.png"]),
        ("my dog.png", ["my dog.png"]),
        ("my cat.png", ["my cat.png"]),
        ("my\\ dog.png", ["my dog.png"]),
        ("'my dog.png'", ["my dog.png"]),
        ('"my dog.png" ', ["my dog.png"]),
        ("it's.png", ["it's.png"]),
        ("it\\'s.png", ["it's.png"]),
        ("odd $(1) & [2].png", ["odd $(1) & [2].png"]),
        ("odd\\ \\$\\(1\\)\\ \\&\\ \\[2\\].png", ["odd $(1) & [2].png"]),
        ("~/cat.png", ["HOME/cat.png"]),
        ("~/my\\ dog.png", ["HOME/my dog.png"]),
        ("file://HOME/my%20dog.png", ["HOME/my dog.png"]),
        ("file://localhostHOME/cat.png", ["HOME/cat.png"]),
        ("cat.png my\\ dog.png", ["cat.png", "my dog.png"]),
        ("cat.png missing.png", ["cat.png", "missing.png"]),
        ("not there.png", ["not there.png"]),
        ("it's not there.png", ["it's not there.png"]),
        ("sub folder/x.png", ["sub folder/x.png"]),
        ("~nobody-here/x.png", ["~nobody-here/x.png"]),
        ("a" * 5000, ["a" * 5000]),
        ("nul\0.png", ["nul\0.png"]),
        ("''", [""]),
    ],
)
def test_names_are_read_as_typed_or_dropped(folder, text, names):
    home = str(folder)
    wanted = [name.replace("HOME", home) for name in names]
    assert console.file_names(text.replace("HOME", home)) == wanted


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_completed_name_is_the_file(folder, quote):
    for name in ("cat.png", "my dog.png", "it's.png", "odd $(1) & [2].png", "sub folder/"):
        # As a person goes on: every beginning leads to the whole name.
        for length in range(1, len(name) - 1):
            found = console.complete_file_name(
                quote + name[:length] if quote else escaped(name, length)
            )
            assert any(read(whole) == name for whole in found), name[:length]


def escaped(name: str, length: int) -> str:
    return "".join("\\" + c if c in " '$()&[]" else c for c in name[:length])


def read(typed: str) -> str:
    """The name that completed text stands for (a folder's quote is still open)."""
    closed = typed + '"' if typed.count('"') == 1 else typed
    return console.file_names(closed)[0]


def test_completion_goes_into_folders_and_hides_hidden_files(folder):
    assert console.complete_file_name("su") == ["sub\\ folder/"]
    assert console.complete_file_name("sub\\ folder/") == ["sub\\ folder/x.png"]
    assert console.complete_file_name("~/ca") == ["~/cat.png"]
    assert console.complete_file_name('"my d') == ['"my dog.png"']
    assert ".hidden.png" not in console.complete_file_name("")
    assert console.complete_file_name(".h") == [".hidden.png"]
    assert console.complete_file_name("nowhere/x") == []


# --- lines -----------------------------------------------------------------------------------


def test_pasted_lines_are_one_message_but_commands_stand_alone():
    text = "Is there\na dog?\n/look dog\n\nAnd\na cat?\n  /exit"
    assert list(console.messages(text)) == ["Is there\na dog?", "/look dog", "And\na cat?", "/exit"]
    assert list(console.messages("  ")) == []


class Keys:
    """Stands in for `input`: gives texts, raises exceptions, then is at the end of the file."""

    def __init__(self, *events: str | type[BaseException]) -> None:
        self.events = list(events)

    def __call__(self, prompt: str = "") -> str:
        event = self.events.pop(0) if self.events else EOFError
        if isinstance(event, str):
            return event
        raise event


@pytest.mark.parametrize(
    ("events", "lines"),
    [
        (["a", "", "b"], ["a", "b"]),
        ([KeyboardInterrupt, "a", KeyboardInterrupt, "b"], ["a", "b"]),
        (["a", KeyboardInterrupt, KeyboardInterrupt, "never"], ["a"]),
    ],
)
def test_control_c_twice_or_control_d_leaves(events, lines, monkeypatch):
    monkeypatch.setattr(builtins, "input", Keys(*events))
    monkeypatch.setattr(console, "_cleared", lambda: False)
    assert list(console.typed("> ", lambda _: [])) == lines


def test_control_c_on_a_line_that_holds_something_only_clears_it(monkeypatch):
    monkeypatch.setattr(builtins, "input", Keys(*[KeyboardInterrupt] * 5, "a"))
    monkeypatch.setattr(console, "_cleared", lambda: True)
    assert list(console.typed("> ", lambda _: [])) == ["a"]


def test_lines_that_libedit_gives_one_by_one_are_put_together(monkeypatch):
    waiting = [True, True, False, False]
    monkeypatch.setattr(builtins, "input", Keys("Is", "there", "a dog?", "Yes?"))
    monkeypatch.setattr(console, "_more_pasted", lambda: waiting.pop(0))
    assert list(console.typed("> ", lambda _: [])) == ["Is\nthere\na dog?", "Yes?"]


def test_answers_cannot_command_the_terminal():
    assert console.printable("a\x1b[2Jb\x07\x9b1m\tc\né👩\u200d🚀\r") == "a[2Jb1m\tc\né👩\u200d🚀"


# --- commands, with a conversation that only pretends -------------------------------------------


class Pretended:
    """A `Conversation` that answers what it is told to."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.answers = list(answers)
        self.turns: tuple[Turn, ...] = ()
        self.store = SimpleNamespace(misses=0)
        self.words: list[WordMap] = []
        self.reads = 0

    def ask(self, text, images=(), sampling=None) -> Iterator[SimpleNamespace]:
        answer = self.answers.pop(0) if self.answers else ["Yes"]
        if isinstance(answer, Exception):
            raise answer
        self.store.misses += len(images)
        turns = (*self.turns, Turn("user", text, tuple(images)))
        return self._answer(turns, answer)

    def _answer(self, turns, pieces) -> Iterator[SimpleNamespace]:
        said = ""
        try:
            for n, piece in enumerate(pieces, 1):
                said += piece
                yield SimpleNamespace(
                    text=piece, finish_reason="stop" if n == len(pieces) else None,
                    generation_tokens=n, generation_tps=10.0, prompt_tokens=5,
                )  # fmt: skip
        finally:
            self.turns = (*turns, Turn("assistant", said.strip()))

    @property
    def image_sources(self) -> list[bytes]:
        return [source for turn in self.turns for source in turn.images]

    def reset(self) -> None:
        self.turns = ()

    def word_maps(self) -> list[WordMap]:
        self.reads += 1
        return self.words

    def pictures(self) -> list[Picture]:
        images = [load_image(source) for source in self.image_sources]
        return [Picture(i, Preprocessor(image_size=16).geometry(*i.size)) for i in images]


def talk(*answers: list[str] | Exception, **options) -> tuple[Chat, Pretended]:
    pretended = Pretended(*answers)
    return Chat(pretended, Sampling(**options.pop("sampling", {})), **options), pretended


def peak_map(row: int, column: int, share: float = 0.9) -> np.ndarray:
    attn_map = np.zeros((4, 4), np.float32)
    attn_map[row, column] = share
    return attn_map


def test_the_answer_is_printed_piece_by_piece(capsys):
    it, pretended = talk([" A", " dog", ".\n"])
    assert it.run(iter(["What is it?", "", "  "])) == 0
    assert capsys.readouterr().out == "A dog.\n"
    assert [turn.text for turn in pretended.turns] == ["What is it?", "A dog."]


def test_a_picture_goes_with_the_next_message_only(folder, capsys):
    it, pretended = talk()
    it.run(iter(["/image cat.png", "/image my\\ dog.png", "First?", "Second?", "/image it's.png",
                 "Third?", "/status"]))  # fmt: skip
    asked = [turn for turn in pretended.turns if turn.role == "user"]
    data = {name: (folder / name).read_bytes() for name in ("cat.png", "my dog.png", "it's.png")}
    assert asked[0].images == (data["cat.png"], data["my dog.png"])
    assert asked[1].images == ()
    assert asked[2].images == (data["it's.png"],)
    printed = capsys.readouterr()
    assert "cat.png (60x40) goes with your next message" in printed.err
    assert printed.out.splitlines()[3:] == [
        "1  cat.png  60x40  message 1",
        "2  my dog.png  60x40  message 1",
        "3  it's.png  60x40  message 3",
    ]


def test_a_file_dropped_on_the_window_is_a_picture(folder, capsys):
    it, pretended = talk()
    dropped = f"{folder}/my\\ dog.png"
    it.run(iter([dropped, f"'{folder}/it'\\''s.png'", "What?", '"cat.png" is what?', "~/x", "~"]))
    asked = [turn for turn in pretended.turns if turn.role == "user"]
    assert [(turn.text, len(turn.images)) for turn in asked] == [
        ("What?", 2), ('"cat.png" is what?', 0), ("~/x", 0), ("~", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["/image missing.png", "/image text.png", "/image sub folder", "/image", "/image ~",
     "/image https://example.com/a.png", "/image cat.png missing.png", "/bogus", "/loook dog",
     "/retry", "/look", "/look dog", "/", f"/image {'a' * 5000}", "/image nul\0.png"],
)  # fmt: skip
def test_what_goes_wrong_is_one_line_and_the_chat_goes_on(line, folder, capsys):
    it, pretended = talk()
    it.take("/image cat.png")
    capsys.readouterr()
    assert it.run(iter([line, "Is there a dog?"])) == 1
    printed = capsys.readouterr()
    assert printed.out == "Yes\n"
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert len(pretended.turns[0].images) == 1  # the one added before, nothing of the bad line


def test_a_misspelt_command_names_the_closest(capsys):
    it, _ = talk()
    it.run(iter(["/loook dog"]))
    assert "did you mean /look?" in capsys.readouterr().err


def test_commands_are_found_in_any_case_and_the_rest_is_not_read_after_exit(folder):
    it, pretended = talk()
    it.run(iter(["/IMAGE cat.png", "/Exit", "never"]))
    assert len(it.waiting) == 1
    assert pretended.turns == ()


def test_a_refused_message_keeps_its_pictures_for_the_next(folder, capsys):
    it, pretended = talk(UserError("prompt: too long"), ["Yes"])
    assert it.run(iter(["/image cat.png", "Long", "Short", "/status"])) == 1
    assert [len(turn.images) for turn in pretended.turns] == [1, 0]
    assert "cat.png  60x40  message 1" in capsys.readouterr().out


def test_a_picture_is_read_once(folder, capsys):
    it, pretended = talk()
    pretended.words = [WordMap("dog", (peak_map(1, 1),), "user")]
    it.take("/image cat.png")
    (folder / "cat.png").unlink()
    assert it.run(iter(["A dog?", "/look dog"])) == 0
    assert "cat.png" in capsys.readouterr().out


def test_retry_asks_again_in_place_of_the_last_answer(folder, capsys):
    it, pretended = talk(["One"], ["Two"], ["Three"], sampling={"temp": 1.0})
    it.run(iter(["/image cat.png", "First?", "/image it's.png", "Second?", "/retry", "/status"]))
    assert [turn.text for turn in pretended.turns] == ["First?", "One", "Second?", "Three"]
    assert [len(turn.images) for turn in pretended.turns] == [1, 0, 1, 0]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == [
        "1  cat.png  60x40  message 1", "2  it's.png  60x40  message 2",
    ]  # fmt: skip
    assert "same answer" not in printed.err


@pytest.mark.parametrize("sampling", [{}, {"temp": 1.0, "seed": 3}])
def test_retry_says_when_the_answer_cannot_change(sampling, capsys):
    it, _ = talk(sampling=sampling)
    it.run(iter(["First?", "/retry"]))
    assert "expect the same answer" in capsys.readouterr().err


def test_a_retry_that_fails_keeps_the_old_answer(folder, capsys):
    it, pretended = talk(["One"], UserError("no"), UserError("no"), ["Two"], sampling={"temp": 1})
    it.run(iter(["/image cat.png", "First?", "Refused?", "/retry", "/status"]))
    assert [turn.text for turn in pretended.turns] == ["First?", "One"]
    assert "cat.png  60x40  message 1" in capsys.readouterr().out
    it.run(iter(["/retry"]))
    assert [turn.text for turn in pretended.turns] == ["First?", "Two"]


def test_reset_forgets_messages_and_pictures(folder, capsys):
    it, pretended = talk()
    it.run(iter(["/image cat.png", "First?", "/image it's.png", "/reset", "/status"]))
    assert (pretended.turns, it.shown, it.waiting) == ((), [], [])
    assert it.run(iter(["/retry", "/look"])) == 2


# --- /look -------------------------------------------------------------------------------------


@pytest.fixture
def looked(folder, monkeypatch) -> Chat:
    """After a question about two pictures, answered."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    it, pretended = talk(["A dog and a car."])
    low = peak_map(0, 0, 0.1)
    pretended.words = [
        WordMap("dog", (peak_map(1, 1), low), "user"),
        WordMap("dog", (peak_map(2, 3), low)),
        WordMap("car", (low, peak_map(1, 0))),
        WordMap("sofa", (peak_map(1, 3), low), "user"),
    ]
    it.run(iter(["/image cat.png", "/image sub\\ folder/x.png", "Is there a dog on the sofa?"]))
    return it


def densest(drawing: str) -> tuple[float, float]:
    """Where the densest letter of a framed drawing is: x, y from 0 to 1."""
    lines = [line[1:-1] for line in drawing.splitlines() if line.startswith("|")]
    places = [(x, y) for y, line in enumerate(lines) for x, c in enumerate(line) if c == "@"]
    x, y = np.mean(places, 0) + 0.5
    return x / len(lines[0]), y / len(lines)


def test_look_draws_the_picture_that_the_word_looked_at(looked, capsys):
    capsys.readouterr()
    looked.take("/look Dog,")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("dog (answered): attention 90% on cat.png, 10% on x")
    assert printed.splitlines()[-1].endswith("most in cat.png, strongest at (52, 29) of 60x40 px")
    x, y = densest(printed)
    assert (x, y) == (pytest.approx(52.5 / 60, abs=0.08), pytest.approx(27.5 / 40, abs=0.1))
    looked.take("/look car")
    printed = capsys.readouterr().out
    assert "most in x.png" in printed
    assert densest(printed)[0] < 0.35  # a high picture: its left fourth is half padding
    assert looked.conversation.reads == 1


def test_look_alone_lists_the_words(looked, capsys):
    capsys.readouterr()
    looked.take("/look")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["dog", "asked"], ["dog", "answered"], ["car", "answered"], ["sofa", "asked"],
    ]  # fmt: skip
    assert "90% of its attention on cat.png" in lines[0]
    assert "90% of its attention on x.png" in lines[2]


@pytest.mark.parametrize(
    ("word", "said"), [("dgo", "did you mean dog?"), ("zebra", "it has dog, sofa, car")]
)
def test_an_unknown_word_is_told_what_there_is(looked, word, said):
    with pytest.raises(UserError, match=re.escape(said)):
        looked.take(f"/look {word}")


def test_a_new_answer_has_new_maps(looked):
    looked.take("/look dog")
    looked.take("And now?")
    looked.conversation.words = []
    with pytest.raises(UserError, match="got none"):
        looked.take("/look dog")


def test_maps_of_the_first_picture_only_are_enough(looked, capsys):
    # As with fusion "concat", which reads pictures of later messages inside the text.
    looked.conversation.words = [WordMap("dog", (peak_map(1, 1),))]
    looked.take("/look dog")
    assert "on cat.png, strongest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/lo", ["/look "]),
        ("/re", ["/retry", "/reset"]),
        ("/look ", ["/look car", "/look dog", "/look sofa"]),
        ("/look D", ["/look dog"]),
        ("/image ca", ["/image cat.png"]),
        ("/image my", ["/image my\\ cat.png", "/image my\\ dog.png"]),
        ("Is there", []),
        ("", []),
        ("/exit now", []),
    ],
)
def test_completion(looked, line, found):
    assert looked.complete(line) == found


# --- Ctrl-C ------------------------------------------------------------------------------------


class Press(str):
    """A piece of an answer during which Ctrl-C is pressed."""


class Interrupted(Pretended):
    def _answer(self, turns, pieces):
        for piece in super()._answer(turns, pieces):
            yield piece
            if isinstance(piece.text, Press):
                signal.raise_signal(signal.SIGINT)


def stopped_chat(*answers, interactive=True) -> Chat:
    return Chat(Interrupted(*answers), Sampling(), interactive=interactive)


def test_control_c_stops_the_answer_and_keeps_what_was_said(capsys):
    before = signal.getsignal(signal.SIGINT)
    it = stopped_chat(["A", Press(" dog"), " and", " never"], ["Yes"])
    assert it.run(iter(["What?", "Sure?"])) == 0
    printed = capsys.readouterr()
    assert printed.out == "A dog and\nYes\n"
    assert printed.err == "(stopped)\n"
    assert [t.text for t in it.conversation.turns] == ["What?", "A dog and", "Sure?", "Yes"]
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_twice_stops_an_answer_that_does_not_come(capsys):
    class Stuck(Pretended):
        def _answer(self, turns, pieces):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            yield from super()._answer(turns, pieces)

    it = Chat(Stuck(["never"]), Sampling(), interactive=True)
    assert it.run(iter(["What?"])) == 0
    assert capsys.readouterr().err == "(stopped)\n"
    assert it.conversation.turns == ()


def test_control_c_ends_a_chat_without_a_person():
    with pytest.raises(KeyboardInterrupt):
        stopped_chat(["A", Press(" dog"), " and"], interactive=False).run(iter(["What?"]))


# --- the command, on a tiny model --------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, lines: bytes, *args: str | Path) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    return chat.main([*map(str, args)])


def test_piped_lines_are_answered_as_the_conversation_would(
    tiny_checkpoint, folder, monkeypatch, capsys
):
    lines = b"Is there a dog?\n\n/image my dog.png\nAnd now?\n"
    args = ["--model", tiny_checkpoint, "--image", "~/cat.png", "--max-tokens", "6", "--verbose"]
    assert run(monkeypatch, lines, *args) == 0
    printed = capsys.readouterr()
    expected = Conversation(weights.load(tiny_checkpoint))
    answers = []
    for text, name in [("Is there a dog?", "cat.png"), ("And now?", "my dog.png")]:
        pieces = expected.ask(text, [folder / name], Sampling(max_tokens=6))
        answers.append(console.printable("".join(piece.text for piece in pieces).lstrip()))
    assert printed.out == "".join(answer + "\n" for answer in answers)
    assert printed.err.count("tokens/s") == 2
    assert printed.err.count("image newly seen") == 2


def test_a_picture_is_seen_once_and_words_have_maps(tiny_checkpoint, folder, monkeypatch, capsys):
    lines = b"Is there a dog?\nIs there a dog?\n/retry\n/look\n/look dog\n"
    args = ["--model", tiny_checkpoint, "--image", "cat.png", "--max-tokens", "3", "--verbose"]
    assert run(monkeypatch, lines, *args) == 0
    printed = capsys.readouterr()
    assert "image newly seen" in printed.err.splitlines()[2]
    assert printed.err.count("image already seen") == 2
    assert printed.out.splitlines()[1] == printed.out.splitlines()[2]
    assert re.search(r"^dog +asked +grounding 0\.\d\d +\d+% of its", printed.out, re.M)
    assert "dog (asked): " in printed.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("lines", "status"), [(b"", 0), (b"\n \n/exit\n/bogus\n", 0), (b"/bogus\n", 2), (b"\xff\n", 0)]
)
def test_the_exit_status_of_a_script_says_whether_all_went_well(
    tiny_checkpoint, lines, status, monkeypatch, capsys
):
    assert run(monkeypatch, lines, "--model", tiny_checkpoint, "--max-tokens", "1") == status


@pytest.mark.parametrize(
    "args", [["--image", "missing.png"], ["--image", "text.png"], ["--temp", "-1"],
             ["--model", "nowhere/x/y"], ["--image", "~/missing.png"]],
)  # fmt: skip
def test_bad_arguments_are_one_line(args, folder, monkeypatch, capsys):
    monkeypatch.setattr("agevlm_mlx.weights.load", refuse)
    assert run(monkeypatch, b"", *args) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def refuse(model: str) -> None:
    raise UserError(f"{model}: no such checkpoint")


# --- a person at a terminal --------------------------------------------------------------------


class Terminal:
    """The command in a pseudo-terminal of 80 x 30 characters."""

    def __init__(self, *args: str | Path) -> None:
        self._end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, b"\x1e\0\x50\0\0\0\0\0")
        environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agevlm_mlx.chat", *map(str, args)],
            cwd=ROOT,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environ
            | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"},
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(other)

    def send(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def read(self, until: str, seconds: float = 60) -> str:
        """What is shown from now on, up to an end that matches."""
        shown, late = b"", time.monotonic() + seconds
        while not re.search(until.encode() + rb"\Z", shown):
            assert time.monotonic() < late, f"expected {until!r}, got {shown[-2000:]!r}"
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    shown += os.read(self._end, 1 << 16)
                except OSError:  # Linux: the other end is closed
                    break
        return shown.decode(errors="replace").replace("\r\n", "\n")

    def prompt(self) -> str:
        """What is shown up to the next prompt; the keyboard is read from then on."""
        shown = self.read(r"(^|\n|\r|\x1b\[\?2004h)> ")
        time.sleep(0.3)
        return shown

    def command(self, line: str) -> str:
        self.send(line + "\n")
        return self.prompt()

    def leave(self) -> int:
        """The exit status; what is still shown is read, so that nothing waits for it."""
        late = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < late:
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    os.read(self._end, 1 << 16)
                except OSError:
                    break
        return self._process.wait(timeout=10)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: str | Path) -> Terminal:
        opened.append(Terminal(*args))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.e2e
def test_a_conversation_with_the_shipped_model(terminal):
    it = terminal("--model", "agevlm_mlx/assets/model", "--verbose")
    assert "/help lists the commands" in it.prompt()
    it.send("/image docs/exam\t")
    it.read("ple.png")
    assert "example.png (128x128) goes with your next message" in it.command("")
    shown = it.command("Describe the image.")
    assert "dog" in shown
    assert "image newly seen" in shown
    # libedit (macOS) knows no bracketed paste: there the lines come one by one.
    pasted = "\x1b[200~Is there\na dog?\x1b[201~" if GNU_READLINE else "Is there\na dog?"
    assert "image already seen" in it.command(pasted)
    assert it.command("/look").count(" asked ") == 1
    drawn = it.command("/look do\t")
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", drawn)
    rows = [line for line in plain.split("\n") if "\u2580" in line]
    assert 18 <= len(rows) <= 26
    assert {len(row) for row in rows} == {2 * len(rows)}  # a square picture
    (row,) = [n for n, line in enumerate(rows) if "+" in line]
    # The dog stands at the left, below the middle.
    assert rows[row].index("+") < len(rows[0]) * 0.4
    assert row > len(rows) * 0.5
    assert re.search(r"dog \(asked\): \d+% of the attention on example.png, strongest at", plain)
    if GNU_READLINE:  # libedit does not tell what Ctrl-C cleared
        it.send("half a question")
        it.read("half a question")
        it.send("\x03")
        assert "Ctrl-C again" not in it.prompt()
    it.send("\x03")
    assert "Ctrl-C again leaves" in it.prompt()
    assert "a new conversation" in it.command("/reset")
    assert "no picture yet" in it.command("/status")
    it.send("/exit\n")
    assert it.leave() == 0


@pytest.mark.e2e
def test_control_c_stops_an_endless_answer(terminal, tiny_checkpoint):
    # Its weights are random: it repeats itself and never comes to an end.
    it = terminal("--model", tiny_checkpoint, "--max-tokens", "1000000")
    it.prompt()
    for question in ("Is there a dog?", "And a cat?"):
        it.send(question + "\n")
        time.sleep(1)
        it.send("\x03")
        assert "(stopped)" in it.prompt()
    it.send("\x04")
    assert it.leave() == 0
