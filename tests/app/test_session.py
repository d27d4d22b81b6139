"""The app without its page: questions, streams, errors and threads. No Gradio."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.errors import UserError
from agevlm_mlx.weights import load
from app import __main__ as command
from app import session as session_module
from app.session import Done, Piece, Session

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Session]:
    session = Session(lambda: load(tiny_checkpoint))
    yield session
    session.close()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    return Image.fromarray(pixels)


def answer(session: Session, image: Image.Image, question: str, max_tokens: int = 8) -> Done:
    *_, done = session.ask(image, question, max_tokens=max_tokens)
    assert isinstance(done, Done)
    return done


def test_an_answer_is_its_pieces_and_then_the_maps(shared, image):
    *pieces, done = shared.ask(image, "Is there a dog by the house?", max_tokens=8)
    assert pieces
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert done.text == "".join(piece.text for piece in pieces).strip()
    assert [w.word for w in done.words if w.role == "user"] == ["dog", "house"]
    for word in done.words:
        assert 0 < word.share <= 1 + 1e-5
        assert word.picture.width > word.picture.height  # the shape of the source image
    assert done.seconds_to_first > 0
    assert done.tokens_per_second > 0


def test_no_question_changes_the_next_answer(shared, image):
    first = answer(shared, image, "Is there a dog?")
    answer(shared, image.rotate(180), "Where is the cat and the house?")
    assert answer(shared, image, "Is there a dog?").text == first.text


def test_many_threads_get_their_own_answers(shared, image):
    questions = ["Is there a dog?", "Where is it?", "Describe the image.", "Is it big or small?"]
    alone = {q: answer(shared, image, q).text for q in questions}
    together: dict[str, str] = {}

    def ask(question: str) -> None:
        together[question] = answer(shared, image, question).text

    threads = [threading.Thread(target=ask, args=(q,)) for q in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_closing_the_stream_stops_the_model(shared, image):
    stream = shared.ask(image, "Is there a dog?", max_tokens=100_000)
    next(stream)
    stream.close()
    start = time.monotonic()
    answer(shared, image, "Is there a dog?", max_tokens=1)
    assert time.monotonic() - start < 20, "the abandoned answer was made to its end"


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(shared, image, question):
    with pytest.raises(UserError, match="question is empty"):
        shared.ask(image, question)


def test_no_image(shared):
    with pytest.raises(UserError, match="no image yet"):
        shared.ask(None, "Is there a dog?")


def test_a_file_that_is_no_image(shared, image, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("hello")
    with pytest.raises(UserError, match="not an image"):
        list(shared.ask(path, "Is there a dog?"))
    assert answer(shared, image, "Is there a dog?")


def test_a_failing_model_is_a_sentence_and_the_next_question_works(
    shared, image, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Conversation, "word_maps", lambda *a: 1 / 0)
        with pytest.raises(RuntimeError, match=r"the model failed \(ZeroDivisionError\)"):
            list(shared.ask(image, "Is there a dog?", max_tokens=2))
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert answer(shared, image, "Is there a dog?")


def test_a_model_that_does_not_load_is_the_callers_error(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        Session(lambda: load(tmp_path))


def test_a_closed_session_answers_nobody(tiny_checkpoint, image):
    session = Session(lambda: load(tiny_checkpoint))
    stream = session.ask(image, "Is there a dog?", max_tokens=100_000)
    waiting = session.ask(image, "Is there a cat?")
    next(stream)
    session.close()
    for unanswered in (stream, waiting):
        with pytest.raises(RuntimeError, match=r"stopped|closed"):
            list(unanswered)
    with pytest.raises(RuntimeError, match="closed"):
        session.ask(image, "Is there a dog?")


@pytest.mark.e2e
def test_the_process_ends_well_after_threads_used_mlx(tiny_checkpoint):
    # Without `mx.clear_streams` in the thread, MLX 0.32 aborts one of four such processes.
    code = (
        "from pathlib import Path; from PIL import Image; from agevlm_mlx.weights import load\n"
        "from app.session import Session\n"
        f"session = Session(lambda: load({str(tiny_checkpoint)!r}))\n"
        "list(session.ask(Image.new('RGB', (20, 20)), 'Is there a dog?', max_tokens=3))\n"
        "session.close()"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error


def test_help_says_how_to_start_it(capsys):
    with pytest.raises(SystemExit) as leaving:
        command.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.count("agevlm-app") >= 2
    for flag in ("--model", "--port", "--share"):
        assert flag in text


def test_without_gradio_it_names_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert 'pip install "agevlm-mlx[app]"' in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_port_that_cannot_be(port, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    assert command.main(["--port", port]) == 2
    assert "--port: expected 1 to 65535" in capsys.readouterr().err
