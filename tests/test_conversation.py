"""A chat: images stay with their turns, nothing is read twice, and errors change nothing."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.chat import prompt_ids
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import as_list, batch_generate, generate
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.models.agevlm import AgeVLM
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


def test_penalties_count_what_was_said_before(talker, noise):
    """mlx-lm's processors see only what is fed: a follow-up would be penalised less."""
    sampling = Sampling(max_tokens=12, repetition_penalty=1.8, repetition_context_size=500)
    chat = Conversation(talker)
    for question, images in [("Is there a dog?", noise(1)), ("Where?", ()), ("Yes?", noise(2))]:
        turns = (*chat.turns, Turn("user", question, tuple(as_list(images))))
        said = "".join(p.text for p in chat.ask(question, images, sampling)).strip()
        options = (talker.model, talker.tokenizer, talker.preprocessor)
        assert said == generate(*options, turns, sampling=sampling)
        assert [said] == batch_generate(*options, [turns], sampling=sampling)
    plain = "".join(
        p.text for p in Conversation(talker).ask("Yes?", noise(2), Sampling(max_tokens=12))
    )
    assert plain.strip() != said


def test_a_quantised_cache_is_one_from_the_first_token_on(talker_of_width_64, noise):
    chat = Conversation(talker_of_width_64, kv_bits=4)
    for question, images in [("Is there a dog?", noise(1)), ("Where?", ())]:
        list(chat.ask(question, images, SHORT, attention=True))
        kinds = {type(getattr(entry, "text", entry)).__name__ for entry in chat.cache}
        assert kinds == {"QuantizedKVCache"}
    assert {entry.bits for entry in chat.cache} == {4}


@pytest.fixture(params=["cross", "concat"])
def talker_of_width_64(tiny_talker, request):
    it = tiny_talker(request.param)
    config = it.model.config
    mx.random.seed(3)
    return replace(
        it, model=AgeVLM(replace(config, text_config={**config.text_config, "head_dim": 64}))
    )


def test_an_interrupted_look_leaves_no_image_behind(talker, noise, monkeypatch):
    """Ctrl-C while the second of two pictures is read: the next question is about neither."""
    chat = Conversation(talker)
    ask(chat, "Is there a dog?", noise(1))
    place, calls = type(talker.model).place, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return place(self, *args, **options)

    before = chat.turns
    chat.turns = ()
    with monkeypatch.context() as patch:
        patch.setattr(type(talker.model), "place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask("Where is the car?", [noise(2), noise(3)], SHORT))
    chat.turns = before
    asked = (*before, Turn("user", "Where is the car?"))
    assert ask(chat, "Where is the car?") == fresh(talker, asked)


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


def test_every_word_has_its_own_look(tiny_talker, noise):
    chat = Conversation(tiny_talker("cross"))
    ask(chat, "Describe the image.", noise(1))
    ask(chat, "The dog is a dog, yes?", noise(2))
    looks = chat.looks()
    asked = [look for look in looks if look.role == "user"]
    assert [look.word for look in asked] == ["The", "dog", "is", "a", "dog", "yes"]
    assert [look.names for look in asked] == [False, True, False, False, True, False]
    for look in looks:
        turn = chat.turns[-2 if look.role == "user" else -1]
        assert turn.text[look.start : look.end] == look.word
        assert look.values.shape == (2, 4, 2, 4, 4)
    spoken = chat.turns[-1].text.split()
    assert len(looks) > len(asked) or not spoken


def test_looks_are_the_maps_head_by_head(talker, noise):
    chat = Conversation(talker)
    ask(chat, "Where is the car?", noise(1))
    (car,) = [look for look in chat.looks() if look.word == "car" and look.role == "user"]
    (whole,) = [m for m in chat.word_maps(["car"]) if m.role == "user"]
    assert np.allclose(car.attention(), whole.maps, atol=1e-3)
    assert car.on_image == pytest.approx(whole.on_image, abs=1e-3)
    assert car.grounding == pytest.approx(whole.grounding, abs=1e-3)
    layers, heads = car.values.shape[:2]
    one = [car.attention(n, h) for n in range(layers) for h in range(heads)]
    assert np.allclose(sum(one) / len(one), whole.maps, atol=1e-3)
    assert not np.allclose(car.attention(0), car.attention(1), atol=1e-3)


def test_the_oldest_exchanges_make_room_and_leave_their_images(talker, noise):
    chat = Conversation(talker, system="Yes No")
    first = Turn("user", "Is there a dog?", (noise(1),))
    filler = [t for n in range(8) for t in (Turn("user", f"{n} " * 40), Turn("assistant", "Yes"))]
    chat.turns = (*chat.turns, first, Turn("assistant", "Yes"), *filler)
    with pytest.raises(UserError, match="512 tokens"):
        chat.ask("Where is the car?")
    before = len(chat.turns)
    gone, images = chat.make_room("Where is the car?", tokens=40)
    assert gone >= 1
    assert images == ()
    assert len(chat.turns) == before - 2 * gone
    assert chat.turns[0] == Turn("system", "Yes No")
    assert chat.turns[1].images == first.images
    assert chat.turns[1].text == filler[2 * (gone - 1)].text
    *_, last = chat.ask("Where is the car?", (), Sampling(max_tokens=40))
    assert last.finish_reason in ("stop", "length")
    chat.reset()
    ask(chat, "Is there a dog?", noise(1))
    second = noise(2)
    assert chat.make_room("Where is the car?", second) == (0, (second,))
    gone, images = chat.make_room("dog " * 240, second, tokens=300)
    assert (gone, len(images), images[1]) == (1, 2, second)
    assert chat.turns == (Turn("system", "Yes No"),)


def test_a_question_that_is_too_long_alone_is_an_error(talker, noise):
    chat = Conversation(talker)
    ask(chat, "Is there a dog?", noise(1))
    before = chat.turns
    with pytest.raises(UserError, match="512 tokens"):
        chat.make_room("dog " * 600)
    assert chat.turns == before
