"""A chat: images stay with their turns, nothing is read twice, and errors change nothing."""

import pytest

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.chat import prompt_ids
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import generate
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.sampling import Sampling

SHORT = Sampling(max_tokens=6)


def ask(chat, text, images=()):
    return "".join(p.text for p in chat.ask(text, images, SHORT)).strip()


def fresh(it, turns):
    return generate(it.model, it.tokenizer, it.preprocessor, turns, max_tokens=6)


def test_every_answer_is_that_of_a_fresh_conversation(talker, noise):
    """Images A, then B in a later turn, then text alone: no turn loses or moves an image."""
    chat = Conversation(talker)
    for question, images in [
        ("Is there a dog?", noise(1)),
        ("Where is the car?", ()),
        ("Describe the image.", [noise(2), noise(3)]),
        ("Is there a dog?", ()),
        ("Describe the image.", noise(1)),
    ]:
        before = chat.turns
        said = ask(chat, question, images)
        images = [images] if not isinstance(images, list | tuple) else images
        assert said == fresh(talker, (*before, Turn("user", question, tuple(images))))
        assert chat.turns[-2:] == (
            Turn("user", question, tuple(images)),
            Turn("assistant", said),
        )
    assert chat.store.misses == 3


def test_a_follow_up_is_fed_only_what_is_new(talker, noise):
    chat = Conversation(talker)
    (first, *_) = list(chat.ask("Is there a dog?", noise(1), SHORT))
    (again, *_) = list(chat.ask("Where is the car?", (), SHORT))
    whole = len(prompt_ids(talker.tokenizer, chat.turns[:-1]))
    assert again.prompt_tokens <= whole - first.prompt_tokens


def test_a_stopped_answer_stays_as_far_as_it_was_said(talker, noise):
    chat = Conversation(talker)
    answer = chat.ask("Describe the image.", noise(1), Sampling(max_tokens=50))
    said = next(answer).text + next(answer).text
    answer.close()
    assert chat.turns[-1] == Turn("assistant", said.strip())
    before = chat.turns
    assert ask(chat, "Is there a dog?") == fresh(talker, (*before, Turn("user", "Is there a dog?")))


def test_an_error_leaves_the_conversation_as_it_was(talker, noise, tmp_path):
    chat = Conversation(talker)
    ask(chat, "Is there a dog?", noise(1))
    before = chat.turns
    broken = tmp_path / "a.png"
    broken.write_text("no picture")
    for text, images in [("What?", broken), ("  ", ()), ("dog " * 600, ())]:
        with pytest.raises(UserError):
            chat.ask(text, images, SHORT)
        assert chat.turns == before
    unstarted = chat.ask("Where is the car?", (), SHORT)
    del unstarted
    assert chat.turns == before
    asked = (*before, Turn("user", "Where is the car?"))
    assert ask(chat, "Where is the car?") == fresh(talker, asked)


def test_reset_forgets_what_was_said_but_not_the_image(talker, noise):
    chat = Conversation(talker, system="Yes No")
    first = ask(chat, "Is there a dog?", noise(1))
    ask(chat, "Where is the car?")
    chat.reset()
    assert chat.turns == (Turn("system", "Yes No"),)
    assert ask(chat, "Is there a dog?", noise(1)) == first
    assert chat.store.misses == 1


def test_two_chats_share_a_store_and_nothing_else(talker, noise):
    store = ImageStore(talker.model, talker.preprocessor)
    one, two = (Conversation(talker, store=store) for _ in range(2))
    alone = [ask(Conversation(talker), "Is there a dog?", noise(n)) for n in (1, 2)]
    answers = [
        one.ask("Is there a dog?", noise(1), SHORT),
        two.ask("Is there a dog?", noise(2), SHORT),
    ]
    said = ["", ""]
    for pair in zip(*answers, strict=False):  # word by word in turn
        said = [text + piece.text for text, piece in zip(said, pair, strict=True)]
    shorter = min(map(len, alone))
    assert [text.strip()[:shorter] for text in said] == [text[:shorter] for text in alone]
    ask(two, "Where is the car?", noise(1))
    assert store.misses == 2


def test_a_draft_model_follows_the_conversation(tiny_talker, noise):
    it = tiny_talker("cross")
    chat = Conversation(it, draft_model=it.model.language_model, num_draft_tokens=3)
    plain = Conversation(it)
    fed = []
    for question, images in [("Is there a dog?", noise(1)), ("Where?", ()), ("Yes?", noise(2))]:
        pieces = list(chat.ask(question, images, SHORT))
        fed.append(pieces[0].prompt_tokens)
        assert "".join(p.text for p in pieces).strip() == ask(plain, question, images)
    assert len(chat.cache) == 6
    whole = len(prompt_ids(it.tokenizer, chat.turns[:-1]))
    assert fed[2] < whole - fed[0]  # the draft model reads nothing twice, either


def test_a_bounded_text_keeps_its_images(tiny_talker, noise):
    it = tiny_talker("cross")
    chat = Conversation(it, max_kv_size=16)
    for n in range(6):
        ask(chat, "Describe the image.", noise(n % 2))
    entry = chat.cache[1]
    assert entry.text.state[0].shape[2] <= 64
    assert entry.vision.keys.shape[2] == 1 + 6 * 16


def test_word_maps_are_those_of_the_last_exchange(talker, noise):
    chat = Conversation(talker, system="Yes No")
    with pytest.raises(UserError, match="ask something first"):
        chat.word_maps()
    ask(chat, "Describe the cat.")
    with pytest.raises(UserError, match="show one first"):
        chat.word_maps()
    chat = Conversation(talker, system="Yes No")
    ask(chat, "Is there a dog?", noise(1))
    ask(chat, "Where is the car?")
    maps = {m.word: m for m in chat.word_maps() if m.role == "user"}
    assert set(maps) == {"car"}
    assert maps["car"].maps[0].shape == (4, 4)
    assert 0 < maps["car"].on_image <= 1
    assert [m.word for m in chat.word_maps(["CAR"])] == ["car"]
    assert chat.word_maps(["zebra"]) == []
    (picture,) = chat.pictures()
    assert picture.image.size == (30, 20)


def test_a_concat_model_shows_only_images_of_the_first_message(tiny_talker, noise):
    chat = Conversation(tiny_talker("concat"))
    ask(chat, "Is there a dog?")
    ask(chat, "Where is the car?", noise(1))
    with pytest.raises(UserError, match="only images of the first message"):
        chat.word_maps()


def test_maps_of_two_images_are_two(tiny_talker, noise):
    chat = Conversation(tiny_talker("cross"))
    ask(chat, "Is there a dog?", noise(1))
    ask(chat, "Where is the car?", noise(2))
    (car,) = [m for m in chat.word_maps(["car"]) if m.role == "user"]
    assert [m.shape for m in car.maps] == [(4, 4)] * 2
    told = car.describe([p.geometry for p in chat.pictures()])
    assert told["image"] == int(car.maps[1].max() > car.maps[0].max())
    assert sum(told["on_image"]) == pytest.approx(car.on_image)
    assert 0 <= told["peak"][0] <= 30
    assert 0 <= told["peak"][1] <= 20
