"""Reading a conversation from where an earlier reading left off gives what a fresh one gives."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm_mlx.data import chat
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.prompts import Prompt, Reader, as_turns, begin, context_length, read, room

TOLERANCE = 2e-4


def logits(model, cache, ids):
    """Of the last position, the answer's first token."""
    return model(mx.array([ids]), cache=cache)[0, -1]


def difference(a, b):
    return mx.abs(a - b).max().item()


def test_a_turn_starts_after_the_words_of_the_one_before(tiny_talker):
    it = tiny_talker("cross")
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "Yes"), Turn("user", "Where?"))
    ids, starts = chat.prompt_ids(it.tokenizer, turns), chat.turn_starts(it.tokenizer, turns)
    spelled = it.tokenizer.convert_ids_to_tokens(ids)
    assert [spelled[s] for s in starts] == ["<|user|>", "<|assistant|>", "<|user|>"]
    assert starts[0] == 0
    assert chat.turn_starts(it.tokenizer, turns[:1]) == [0]


def test_each_image_is_seen_from_its_own_turn_on(tiny_talker, noise):
    it = tiny_talker("cross")
    store = ImageStore(it.model, it.preprocessor)
    turns = (
        Turn("user", "Is there a dog?", (noise(1), noise(2))),
        Turn("assistant", "Yes"),
        Turn("user", "Where?", (noise(3),)),
    )
    prompt = read(it.tokenizer, turns, store)
    at = chat.turn_starts(it.tokenizer, turns)[2]
    assert prompt.starts == (0, 0, at)
    cache, ids = begin(it.model, prompt)
    whole = it.model(mx.array([ids]), cache=cache)
    # Up to the third image the text is that of a conversation without it.
    two = Prompt(prompt.ids, prompt.sights[:2], prompt.starts[:2])
    cache, ids = begin(it.model, two)
    without = it.model(mx.array([ids]), cache=cache)
    assert difference(whole[:, :at], without[:, :at]) < TOLERANCE
    assert difference(whole[:, at], without[:, at]) > 1e-3


steps = st.lists(
    st.tuples(
        st.sampled_from(["Is there a dog?", "Where is the car?", "Describe"]),
        st.lists(st.integers(0, 3), max_size=2),  # images of the turn
        st.sampled_from(["Yes", "No. Top left", "Top"]),  # the answer, as it was said
        st.integers(0, 3),  # how many turns are taken back before the next question
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(plan=steps, fusion=st.sampled_from(["cross", "concat"]), rotating=st.booleans())
def test_any_conversation_reads_as_if_it_were_new(tiny_talker, noise, plan, fusion, rotating):
    """Questions with and without images, taken back and asked again in any order: no image of
    another turn or of a turn taken back changes a logit."""
    it = tiny_talker(fusion)
    store = ImageStore(it.model, it.preprocessor)
    size = 24 if rotating and fusion == "cross" else None
    reader = Reader(it.model, size)
    turns: tuple[Turn, ...] = ()
    for question, images, answer, back in plan:
        turns = (*turns, Turn("user", question, tuple(noise(n) for n in images)))
        prompt = read(it.tokenizer, turns, store)
        ids = reader.prepare(prompt)
        cache, fresh = begin(it.model, prompt, max_kv_size=size)
        assert fresh[-len(ids) :] == ids
        if size is None:
            expected = logits(it.model, cache, fresh)
            assert difference(logits(it.model, reader.cache, ids), expected) < TOLERANCE
        else:  # the tokens that a rotating cache has dropped depend on how it was fed
            logits(it.model, reader.cache, ids)
        said = it.tokenizer.encode(answer, add_special_tokens=False)
        it.model(mx.array([said]), cache=reader.cache)
        reader.wrote(said)
        turns = (*turns, Turn("assistant", answer))
        turns = turns[: len(turns) - 2 * back] if back else turns


def test_a_follow_up_reads_only_what_is_new(talker, noise):
    store = ImageStore(talker.model, talker.preprocessor)
    reader = Reader(talker.model)
    first = (Turn("user", "Is there a dog?", (noise(1),)),)
    prompt = read(talker.tokenizer, first, store)
    ids = reader.prepare(prompt)
    assert ids == list(prompt.ids)
    talker.model(mx.array([ids]), cache=reader.cache)
    said = talker.tokenizer.encode("Yes<|end|>", add_special_tokens=False)
    talker.model(mx.array([said]), cache=reader.cache)
    reader.wrote(said)
    turns = (*first, Turn("assistant", "Yes"), Turn("user", "Where is the car?"))
    follow_up = read(talker.tokenizer, turns, store)
    rest = reader.prepare(follow_up)
    assert len(rest) == len(follow_up.ids) - len(prompt.ids) - len(said)
    assert (store.hits, store.misses) == (1, 1)


def test_a_reading_that_failed_half_way_is_not_trusted(talker, noise):
    store = ImageStore(talker.model, talker.preprocessor)
    reader = Reader(talker.model)
    prompt = read(talker.tokenizer, (Turn("user", "Describe the image.", (noise(1),)),), store)
    ids = reader.prepare(prompt)
    talker.model(mx.array([ids[:3]]), cache=reader.cache)  # and then the process ran out of memory
    ids = reader.prepare(prompt)
    cache, fresh = begin(talker.model, prompt)
    expected = logits(talker.model, cache, fresh)
    assert difference(logits(talker.model, reader.cache, ids), expected) < TOLERANCE


def test_the_context_is_a_limit_for_text_and_for_concat_images(talker, noise):
    store = ImageStore(talker.model, talker.preprocessor)
    assert context_length(talker.model) == 512
    with pytest.raises(UserError, match=r"prompt: expected fewer than 512 tokens.* got \d+;"):
        read(talker.tokenizer, (Turn("user", "dog " * 600, (noise(1),)),), store)
    assert store.misses == 0  # found before any image is looked at
    images = (noise(1),) * 40
    asked = (Turn("user", "Is there a dog?", images),)
    if talker.model.fusion == "concat":
        with pytest.raises(UserError, match="expected fewer than 512 tokens"):
            read(talker.tokenizer, asked, store)
    else:
        prompt = read(talker.tokenizer, asked, store)
        assert room(talker.model, prompt) == 512 - len(prompt.ids)


def test_what_does_not_wait_for_an_answer_is_refused(tiny_talker):
    it = tiny_talker("cross")
    store = ImageStore(it.model, it.preprocessor)
    for turns, got in [
        ((), "got no message"),
        ((Turn("user", "A dog?"), Turn("assistant", "Yes")), "got one of the assistant"),
        ((Turn("user", " \n"),), "expected a question, got nothing"),
    ]:
        with pytest.raises(UserError, match=got):
            read(it.tokenizer, turns, store)
    with pytest.raises(UserError, match="message of the user that they belong to"):
        as_turns((Turn("system", "Be brief."),), ["a.png"])


def test_a_tokenizer_of_another_model_is_found_before_it_reads_past_the_end(tiny_talker):
    it = tiny_talker("cross")
    text = "Pack my box with five dozen liquor jugs, said the quick brown fox to the lazy dog."
    other = chat.build_tokenizer([text] * 3, 500)
    assert len(other) > it.model.args.vocab_size
    store = ImageStore(it.model, it.preprocessor)
    with pytest.raises(UserError, match="tokenizer belongs to another model"):
        read(other, (Turn("user", text),), store)


def test_a_concat_model_cannot_rotate(tiny_talker):
    with pytest.raises(UserError, match="would forget its image"):
        Reader(tiny_talker("concat").model, 32)


def test_an_image_of_another_model_is_refused(tiny_talker, noise, tiny_model):
    it = tiny_talker("cross")
    sight = ImageStore(it.model, it.preprocessor).look(noise(1))
    other = type(sight.seen)(sight.seen.layers[:1])
    with pytest.raises(ValueError, match="expected an image of 2 looking layers, got 1"):
        it.model.place(it.model.make_cache(), other)
    wide = type(sight.seen)(tuple((k[..., :4], v[..., :4]) for k, v in sight.seen.layers))
    with pytest.raises(ValueError, match="remembered by another model"):
        it.model.place(it.model.make_cache(), wide)
