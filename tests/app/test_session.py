"""One tab's conversation without its page: questions, streams, errors and what is forgotten."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import generate
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.weights import Loaded
from app import desk as desk_module
from app import export, jobs
from app import session as session_module
from app.catalogue import Choice
from app.desk import Desk
from app.session import Session
from app.sessions import Sessions
from app.worker import Worker

ROOT = Path(__file__).parents[2]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def crowd(tiny_talker) -> Iterator[Sessions]:
    """Sessions of a model with 512 tokens of context; Choice("concat") is another model."""
    loaded = {Choice(): tiny_talker("cross"), Choice("concat"): tiny_talker("concat")}

    def load(choice: Choice, progress) -> Loaded:
        progress(0.5, "half")
        progress(1.0, "ready")
        return loaded[choice]

    worker = Worker(lambda: Desk(load))
    yield Sessions(worker, Choice(), sampling=Sampling(max_tokens=8))
    worker.close()


@pytest.fixture
def session(crowd: Sessions) -> Iterator[Session]:
    yield crowd.open("tab")
    crowd.close("tab")


@pytest.fixture
def picture(noise) -> tuple[str, bytes]:
    return "noise.png", png(noise(1))


def ask(session: Session, text: str, *files: tuple[str, bytes]) -> dict:
    *_, state = session.ask(text, files)
    return state["exchanges"][-1]


def expected(it: Loaded, *turns: Turn) -> str:
    return generate(it.model, it.tokenizer, it.preprocessor, turns, max_tokens=8)


# --- asking


def test_an_answer_grows_and_is_the_models(session, picture, tiny_talker, noise):
    states = list(session.ask("Where is the car?", [picture]))
    assert [s["busy"] for s in states] == [True] * (len(states) - 1) + [False]
    assert states[0]["exchanges"][0]["answer"] == ""
    texts = [s["exchanges"][0]["answer"] for s in states]
    assert all(later.startswith(text.rstrip()) for text, later in pairwise(texts))
    done = states[-1]["exchanges"][0]
    turn = Turn("user", "Where is the car?", (picture[1],))
    assert done["answer"] == expected(tiny_talker("cross"), turn)
    assert done["state"] == "done"
    assert (done["error"], done["notes"]) == (None, [])
    stats = done["stats"]
    assert (stats["images_seen"], stats["images_known"]) == (1, 0)
    assert stats["image_ms"] > 0
    assert stats["first_ms"] >= stats["image_ms"]
    assert 0 < stats["tokens"] <= 8
    assert stats["image_bytes"] > 0
    json.dumps(states)


def test_a_follow_up_knows_the_image_already(session, picture, tiny_talker):
    first = ask(session, "Where is the car?", picture)
    second = ask(session, "Is there a dog?")
    stats = second["stats"]
    assert (stats["images_seen"], stats["images_known"], stats["image_ms"]) == (0, 1, 0)
    assert second["answer"] == expected(
        tiny_talker("cross"),
        Turn("user", "Where is the car?", (picture[1],)),
        Turn("assistant", first["answer"]),
        Turn("user", "Is there a dog?"),
    )


def test_pictures_and_looks_belong_together(session, noise):
    ask(session, "Where is the car?", ("a.png", png(noise(1))))
    second = ask(
        session, "Is there a dog, dog?", ("b.png", png(noise(2))), ("c.png", png(noise(3)))
    )
    looks = session.looks(second["id"])
    assert len(looks["pictures"]) == 3
    shown = session.pictures(looks["pictures"])
    assert [picture["name"] for picture in shown] == ["a.png", "b.png", "c.png"]
    assert all(picture["src"].startswith("data:image/") for picture in shown)
    assert [(p["width"], p["height"]) for p in shown] == [(30, 20)] * 3
    dogs = [w for w in looks["words"] if w["text"] == "dog" and w["role"] == "user"]
    assert [second["question"][w["start"] : w["end"]] for w in dogs] == ["dog", "dog"]
    assert all(len(w["layers"]) == 3 for w in looks["words"])
    assert 0 < looks["threshold"] < 1
    assert looks["note"] is None
    json.dumps(looks)


def test_a_layer_and_a_head_can_be_chosen(session, picture):
    done = ask(session, "Where is the car?", picture)
    mean, one = session.looks(done["id"]), session.looks(done["id"], 1, 3)
    other = session.looks(done["id"], 1, 2)
    layers = [[w["layers"] for w in looks["words"]] for looks in (mean, one, other)]
    assert layers[0] != layers[1] != layers[2]
    assert (one["layer"], one["head"]) == (2, 3)
    assert (mean["layer"], mean["head"]) == (None, None)
    for odd in [(7, 0), (-1, 0), (0, 99), ("1", 0), (1.5, None), (True, None)]:
        assert session.looks(done["id"], *odd)["words"], (
            "a request of the page's that makes no sense"
        )


def test_a_model_may_answer_without_a_picture(session, tiny_talker):
    done = ask(session, "Is there a dog?")
    assert done["answer"] == expected(tiny_talker("cross"), Turn("user", "Is there a dog?"))
    assert "language model answers alone" in done["notes"][0]
    assert "no picture" in session.looks(done["id"])["note"]


@pytest.mark.parametrize(
    ("text", "files", "told"),
    [
        ("", [], "The question is empty"),
        (" \n", [], "The question is empty"),
        ("x" * 8001, [], "Expected at most 8000 characters, got 8001"),
        ("dog " * 700, [], "512 tokens"),
        ("Is there a dog?", [("notes.png", b"hello")], "notes.png: "),
        ("Is there a dog?", [("a.png", b"")] * 9, "at most 8 pictures in a message, got 9"),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(session, picture, text, files, told):
    (first, *_) = states = list(session.ask(text, files))
    failed = states[-1]["exchanges"][-1]
    assert first["exchanges"][-1]["state"] == failed["state"] == "failed" or "tokens" in told
    assert failed["state"] == "failed"
    assert told in failed["error"]
    assert failed["error"].endswith(".")
    assert ask(session, "Is there a dog?", picture)["state"] == "done"


def test_too_many_pictures_in_all(session, picture, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_ALL_PICTURES", 2)
    ask(session, "Is there a dog?", picture, picture)
    refused = ask(session, "Is there a dog?", picture)
    assert "start a new one" in refused["error"]
    assert ask(session, "Is there a dog?")["state"] == "done"


def test_the_oldest_exchanges_are_forgotten_but_not_their_pictures(session, picture):
    ask(session, "Where is the car?", picture)
    long = " ".join(["house"] * 55)
    notes = []
    for _ in range(6):
        done = ask(session, long)
        assert done["state"] == "done"
        assert done["stats"]["image_bytes"] > 0
        notes += done["notes"]
    assert any("The oldest exchange was forgotten" in note for note in notes)
    looks = session.looks(done["id"])
    assert len(looks["pictures"]) == 1
    assert ask(session, "Is there a dog?")["stats"]["images_known"] == 1


# --- stopping, editing, asking again


def test_a_stopped_answer_stays_as_far_as_it_was_said(session, picture):
    session.sampling = Sampling(max_tokens=400)
    states = session.ask("Where is the car?", [picture])
    for state in states:
        if state["exchanges"][-1]["answer"]:
            session.stop()
    stopped = state["exchanges"][-1]
    assert stopped["state"] == "stopped"
    assert 0 < stopped["stats"]["tokens"] < 300
    assert stopped["stats"]["finish"] == "stopped"
    assert session.looks(stopped["id"])["words"]
    session.sampling = Sampling(max_tokens=8)
    assert ask(session, "Is there a dog?")["stats"]["images_known"] == 1


def test_a_question_stopped_before_its_turn_says_nothing(crowd, session, picture):
    go = threading.Event()
    blocking = crowd._worker.stream(lambda desk, send: go.wait(10))
    states = session.ask("Where is the car?", [picture])
    state = next(states)
    assert state["exchanges"][-1]["state"] == "waiting"
    assert state["exchanges"][-1]["ahead"] == 1
    session.stop()
    go.set()
    *_, state = states
    assert state["exchanges"][-1]["state"] == "stopped"
    assert state["exchanges"][-1]["answer"] == ""
    list(blocking)
    assert ask(session, "Is there a dog?", picture)["state"] == "done"


def test_stopping_what_waits_does_not_wait(crowd, session, picture):
    go = threading.Event()
    blocking = crowd._worker.stream(lambda desk, send: go.wait(10))
    states = session.ask("Where is the car?", [picture])
    next(states)
    session.reset()
    session.reset()
    assert list(states)[-1] == session.state()
    assert not session.busy
    again = session.ask("Is there a dog?", [picture])
    assert next(again)["exchanges"][-1]["ahead"] == 1
    go.set()
    assert list(again)[-1]["exchanges"][-1]["state"] == "done"
    list(blocking)


def test_reading_a_long_question_can_be_ended(crowd, session, picture, monkeypatch):
    monkeypatch.setattr(desk_module, "_STEP", 16)
    states = session.ask("dog " * 200, [picture])
    while next(states)["exchanges"][-1]["state"] != "reading":
        pass
    stream = session._stream
    for _ in range(3):
        while not isinstance(event := next(stream), jobs.Piece):
            pass
        assert event == jobs.Piece("")
    stream.close()
    read = crowd._worker.call(lambda desk: desk.talk(session.key, Choice()).conversation.cache)
    assert 0 < read[0].offset < 200
    assert list(states)[-1]["exchanges"][-1]["state"] == "stopped"
    assert ask(session, "Is there a dog?")["state"] == "done"


def test_a_new_conversation_while_a_picture_is_decoded(session, picture, monkeypatch):
    def slow(name, data):
        session.reset()
        return take(name, data)

    take = session_module.take
    monkeypatch.setattr(session_module, "take", slow)
    assert list(session.ask("Where is the car?", [picture]))[-1]["exchanges"] == []
    assert not session.busy
    assert "PNG" not in repr(take(*picture))


def test_a_closed_tab_leaves_nothing_behind(crowd, picture):
    tab = crowd.open("gone")
    crowd.close("gone")
    (state,) = tab.ask("Where is the car?", [picture])
    assert state["exchanges"] == []
    assert tab.key not in crowd._worker.call(lambda desk: desk._talks)


def test_a_page_that_goes_away_stops_the_model(session, picture):
    session.sampling = Sampling(max_tokens=100_000)
    states = session.ask("Where is the car?", [picture])
    for state in states:
        if state["exchanges"][-1]["answer"]:
            break
    states.close()
    assert not session.busy
    assert session.state()["exchanges"][-1]["state"] == "stopped"
    session.sampling = Sampling(max_tokens=8)
    assert ask(session, "Is there a dog?")["state"] == "done"


def test_one_question_at_a_time(session, picture):
    states = session.ask("Where is the car?", [picture])
    next(states)
    (refused,) = session.ask("Is there a dog?")
    assert refused["busy"]
    assert len(refused["exchanges"]) == 1
    assert list(states)[-1]["exchanges"][-1]["state"] == "done"


def test_an_edited_question_takes_the_place_of_all_that_followed(session, picture, tiny_talker):
    first = ask(session, "Where is the car?", picture)
    ask(session, "Is there a dog?")
    *_, state = session.edit(first["id"], "Describe the image.")
    (edited,) = state["exchanges"]
    assert edited["question"] == "Describe the image."
    assert len(edited["pictures"]) == 1
    turn = Turn("user", "Describe the image.", (picture[1],))
    assert edited["answer"] == expected(tiny_talker("cross"), turn)
    assert edited["stats"]["images_known"] == 1


def test_asked_again_the_answer_is_the_same_without_sampling(session, picture):
    first = ask(session, "Where is the car?", picture)
    *_, state = session.retry(first["id"])
    (again,) = state["exchanges"]
    assert again["answer"] == first["answer"]
    assert again["id"] != first["id"]
    assert again["notes"] == ["Asked again: the temperature is 0, so expect the same answer."]
    session.sampling = Sampling(max_tokens=8, temp=1.0)
    *_, sampled = session.retry(again["id"])
    assert sampled["exchanges"][0]["notes"] == []
    (unchanged,) = session.retry(99)
    assert unchanged["exchanges"] == sampled["exchanges"]


def test_a_new_conversation_knows_nothing(session, picture, tiny_talker):
    old = ask(session, "Where is the car?", picture)
    pictures = old["pictures"]
    assert session.reset()["exchanges"] == []
    assert session.pictures(pictures) == []
    assert session.looks(old["id"])["note"] == "No such answer."
    alone = ask(session, "Is there a dog?")
    assert alone["answer"] == expected(tiny_talker("cross"), Turn("user", "Is there a dog?"))


def test_a_new_conversation_in_the_middle_of_an_answer(session, picture):
    states = session.ask("Where is the car?", [picture])
    while not next(states)["exchanges"][-1]["answer"]:
        pass
    session.reset()
    assert list(states)[-1]["exchanges"] == []
    assert ask(session, "Is there a dog?", picture)["state"] == "done"


def test_pictures_that_could_not_be_read_are_not_left_out_in_silence(session, picture):
    ask(session, "Is there a dog?", picture)
    bad = ask(session, "Where is the car?", ("notes.png", b"hello"))
    *_, state = session.retry(bad["id"])
    assert "with others" in state["exchanges"][-1]["error"]
    assert len(state["exchanges"]) == 2


def test_text_that_is_no_text(session):
    done = ask(session, "Is there a \ud83d dog?")
    assert done["question"] == "Is there a ? dog?"
    assert json.dumps(session.state()).encode()


def test_a_picture_is_sent_once_however_often_it_is_asked_for(session, picture):
    (shown,) = ask(session, "Is there a dog?", picture)["pictures"]
    assert len(session.pictures([shown] * 1000 + [5, None, [shown]])) == 1
    assert session.looks(10**30)["exchange"] is None


def test_few_tokens_have_no_rate(session, picture):
    session.sampling = Sampling(max_tokens=7)
    assert ask(session, "Is there a dog?", picture)["stats"]["tokens_per_second"] is None
    session.sampling = Sampling(max_tokens=40)
    stats = ask(session, "Is there a dog?")["stats"]
    assert stats["tokens"] < 8 or stats["tokens_per_second"] > 0


def test_examples_can_be_asked(session):
    examples = session.state()["examples"]
    assert len(examples) == 4
    (shown,) = session.pictures([examples[1]["id"]])
    assert shown["width"] == 512
    *_, state = session.example(examples[1]["id"])
    assert state["exchanges"][-1]["question"] == examples[1]["question"]
    assert state["exchanges"][-1]["pictures"] == [examples[1]["id"]]
    *_, state = session.example("no such")
    assert state["exchanges"][-1]["state"] == "failed"


# --- models


def test_another_model_goes_on_with_the_conversation(session, picture, tiny_talker):
    first = ask(session, "Where is the car?", picture)
    assert list(session.switch(Choice("concat")))[-1][0] == 1
    second = ask(session, "Is there a dog?")
    assert second["answer"] == expected(
        tiny_talker("concat"),
        Turn("user", "Where is the car?", (picture[1],)),
        Turn("assistant", first["answer"]),
        Turn("user", "Is there a dog?"),
    )
    assert second["stats"]["images_seen"] == 1
    assert session.state()["model"]["layers"] == list(tiny_talker("concat").model.looking_layers)
    assert session.looks(first["id"], 1)["layer"] == 2
    assert session.facts()


def test_a_model_that_changes_while_a_picture_is_decoded(session, picture, monkeypatch):
    def slow(name, data):
        list(session.switch(Choice("concat")))
        return take(name, data)

    take = session_module.take
    monkeypatch.setattr(session_module, "take", slow)
    done = ask(session, "Where is the car?", picture)
    assert done["model"] == session.state()["model"]["name"]
    count = len(session.state()["model"]["layers"])
    assert count == 3
    assert session.looks(done["id"], count - 1)["layer"] == count - 1


def test_a_model_that_cannot_be_loaded_changes_nothing(session, picture):
    before = session.state()["model"]
    with pytest.raises(RuntimeError, match="KeyError"):
        list(session.switch(Choice("missing")))
    assert session.state()["model"] == before
    assert ask(session, "Is there a dog?", picture)["state"] == "done"


def test_a_system_message_is_heard(session, picture, tiny_talker):
    session.system = "Yes No"
    done = ask(session, "Where is the car?", picture)
    turns = Turn("system", "Yes No"), Turn("user", "Where is the car?", (picture[1],))
    assert done["answer"] == expected(tiny_talker("cross"), *turns)


def test_a_concat_model_says_which_pictures_have_maps(session, noise):
    list(session.switch(Choice("concat")))
    ask(session, "Is there a dog?")
    late = ask(session, "Where is the car?", ("a.png", png(noise(1))))
    assert "only images of the first message" in session.looks(late["id"])["note"]


def test_a_concat_model_shows_the_maps_that_it_has(session, noise):
    list(session.switch(Choice("concat")))
    ask(session, "Is there a dog?", ("a.png", png(noise(1))))
    late = ask(session, "Where is the car?", ("b.png", png(noise(2))))
    looks = session.looks(late["id"])
    assert [p["name"] for p in session.pictures(looks["pictures"])] == ["a.png"]
    assert {len(word["layers"]) for word in looks["words"]} == {1}
    assert "only pictures of the first message" in looks["note"]
    assert json.loads(export.as_json(session))["exchanges"][1]["words"]
    assert export.as_html(session)


def test_a_failing_model_is_a_sentence_and_the_next_question_works(session, picture, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_looks", lambda chat: 1 / 0)
        failed = ask(session, "Where is the car?", picture)
    assert failed["state"] == "failed"
    assert "ZeroDivisionError" in failed["error"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_look", lambda *a: (_ for _ in ()).throw(MemoryError()))
        failed = ask(session, "Where is the car?", picture)
    assert "not enough memory" in failed["error"]
    assert ask(session, "Where is the car?", picture)["state"] == "done"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_thread_loses_no_conversation(crowd, session, picture, tiny_talker):
    first = ask(session, "Where is the car?", picture)

    def die(desk, send):
        raise SystemExit

    with pytest.raises(RuntimeError, match="ask again"):
        list(crowd._worker.stream(die))
    second = ask(session, "Is there a dog?")
    assert second["answer"] == expected(
        tiny_talker("cross"),
        Turn("user", "Where is the car?", (picture[1],)),
        Turn("assistant", first["answer"]),
        Turn("user", "Is there a dog?"),
    )
    assert second["stats"]["images_seen"] == 1


def test_maps_of_old_answers_are_thinned(session, picture, monkeypatch):
    monkeypatch.setattr(session_module, "MAPS_KEPT", 1)
    first = ask(session, "Where is the car?", picture)
    before = session.looks(first["id"])["words"]
    ask(session, "Is there a dog?")
    looks = session.looks(first["id"], 1, 1)
    assert (looks["layer"], looks["head"]) == (None, None), "the page would say what is not so"
    after = looks["words"]
    assert [w["peak"] for w in after] == [w["peak"] for w in before]
    assert sum(look.values.nbytes for e in session._exchanges[:1] for look in e.looks) < 5000


# --- the other things to take away


def test_the_conversation_can_be_kept(session, picture):
    ask(session, "Where is the </script> car?", picture)
    kept = json.loads(export.as_json(session))
    assert kept["format"] == "agevlm-conversation"
    (exchange,) = kept["exchanges"]
    assert exchange["words"]
    page = export.as_html(session)
    assert page.count("</script>") == page.count("<script")
    for text in (page, json.dumps(kept)):
        assert session.key not in text


def test_words_can_be_looked_for(session, picture, noise):
    with pytest.raises(UserError, match="expected a picture"):
        next(session.presence("dog"))
    *_, table = session.presence("dog, car", picture)
    assert "<table" in table
    ask(session, "Where is the car?", picture)
    assert [*session.presence("dog, car")][-1] == table
    first = session.state()["exchanges"][0]["id"]
    assert session.answer(first) == session.state()["exchanges"][0]["answer"]
    ask(session, "Where is the car?", ("other.png", png(noise(2))))
    assert [*session.presence("dog, car")][-1] != table
    assert [*session.presence("dog, car", exchange=first)][-1] == table
    assert session.answer(99) == ""
    with pytest.raises(UserError):
        list(session.presence("  "))
    with pytest.raises(UserError, match=r"notes\.png"):
        list(session.presence("dog", ("notes.png", b"hello")))


# --- tabs


def test_tabs_share_nothing(crowd, noise):
    a, b = crowd.open("a"), crowd.open("b")
    mine = ask(a, "Where is the car?", ("a.png", png(noise(1))))
    theirs = ask(b, "Where is the car?", ("b.png", png(noise(2))))
    assert a.key != b.key
    assert crowd.by_key(a.key) is a
    assert crowd.by_key("") is crowd.by_key("made up") is None
    assert b.pictures(mine["pictures"]) == []
    assert [p["name"] for p in b.pictures(theirs["pictures"])] == ["b.png"]
    assert "a.png" not in json.dumps(b.state())
    crowd.close("a")
    assert crowd.by_key(a.key) is None
    crowd.close("b")


def test_many_tabs_at_once_get_their_own_answers(crowd, noise):
    questions = ["Is there a dog?", "Where is it?", "Describe the image.", "Is it big or small?"]
    alone, together = {}, {}

    def put(into: dict, n: int) -> None:
        tab = crowd.open(f"many-{n}")
        said = ask(tab, questions[n % 4], ("x.png", png(noise(n))))
        into[n] = (said["answer"], ask(tab, "Where is the car?")["answer"])
        crowd.close(f"many-{n}")

    for n in range(8):
        put(alone, n)
    threads = [threading.Thread(target=put, args=(together, n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_closing_a_tab_closes_its_sides_and_frees_the_model(crowd, picture):
    tab, side = crowd.get("two"), crowd.get("two/left")
    ask(tab, "Is there a dog?", picture)
    ask(side, "Is there a dog?", picture)
    keys = {tab.key, side.key}
    assert keys <= crowd._worker.call(lambda desk: set(desk._talks))
    count = len(crowd)
    crowd.close("two")
    assert len(crowd) == count - 2
    assert not keys & crowd._worker.call(lambda desk: set(desk._talks))


def test_an_idle_conversation_is_put_away_and_says_so(crowd, session, picture, monkeypatch):
    ask(session, "Is there a dog?", picture)
    crowd.free_idle()
    assert crowd.get("tab") is session
    monkeypatch.setattr(crowd, "_idle", 0.0)
    states = session.ask("Where is the car?")
    next(states)
    crowd.free_idle()  # not one that is being answered
    assert list(states)[-1]["exchanges"][-1]["state"] == "done"
    crowd.free_idle()
    monkeypatch.setattr(crowd, "_idle", 1800.0)
    fresh = crowd.get("tab")
    assert fresh is not session
    done = ask(fresh, "Is there a dog?", picture)
    assert "put away after 0 minutes" in done["notes"][0]
    crowd.close("tab")
    assert "not connected" in ask(crowd.get("tab"), "Is there a dog?", picture)["notes"][0]
    assert ask(crowd.open("tab"), "Is there a dog?", picture)["notes"] == []


def test_idle_tabs_are_freed_one_by_one(crowd, picture, monkeypatch):
    crowd.get("three")
    ask(crowd.get("three/left"), "Is there a dog?", picture)
    monkeypatch.setattr(crowd, "_idle", 0.0)
    monkeypatch.setattr(crowd.get("three/left"), "idle", lambda: -1.0)
    left = crowd.get("three/left")
    crowd.free_idle()
    assert crowd.get("three/left") is left
    crowd.close("three")


def test_whoever_loads_or_looks_is_not_idle(session, picture):
    for work in (session.switch(Choice("concat")), session.presence("dog", picture)):
        next(work)
        assert session.idle() == 0
        work.close()
        assert 0 < session.idle() < 10


def test_unused_models_are_let_go(tiny_talker):
    loads: list[str | None] = []

    def load(choice: Choice, progress) -> Loaded:
        loads.append(choice.source)
        return tiny_talker("cross")

    worker = Worker(lambda: Desk(load))
    sessions = Sessions(worker, Choice())
    session = sessions.get("tab")
    for name in "abcde":
        list(session.switch(Choice(name)))
        ask(session, "Is there a dog?")
    assert len(worker.call(lambda desk: list(desk._models))) <= 3
    list(session.switch(Choice("e")))
    assert loads == [None, *"abcde"]
    sessions.close_all()
    assert len(sessions) == 0
    worker.close()


@pytest.mark.e2e
def test_the_process_ends_well_after_threads_used_mlx(tiny_checkpoint):
    # Without `mx.clear_streams` in the thread, MLX 0.32 aborts one of four such processes.
    code = (
        "from app.catalogue import Choice, load_model\nfrom app.desk import Desk\n"
        "from app.sessions import Sessions\nfrom app.worker import Worker\n"
        "worker = Worker(lambda: Desk(load_model))\n"
        f"sessions = Sessions(worker, Choice({str(tiny_checkpoint)!r}))\n"
        "tab = sessions.get('tab')\n"
        "list(tab.example(tab.state()['examples'][0]['id']))\n"
        "sessions.close_all()\nworker.close()"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
