"""Many conversations in one batch of the model, in the tests' own thread."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import stream_generate

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import generate
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.cache import VisionCache
from agevlm_mlx.prompts import begin, read
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.serving.batch import Batch, Row, Settings
from agevlm_mlx.serving.exchange import Ask, Done, Failed, Piece


def question(text: str, *images: bytes, **options) -> Ask:
    sampling = Sampling(**{"max_tokens": 8, **options})
    return Ask((Turn("user", text, images),), sampling)


def alone(loaded, asked: Ask) -> str:
    """What mlx-lm's own generator answers to this prompt."""
    batch = Batch(loaded, Settings())
    prompt = read(loaded.tokenizer, asked.turns, batch.images)
    cache, rest = begin(loaded.model, prompt)
    pieces = stream_generate(
        loaded.model,
        loaded.tokenizer,
        rest,
        prompt_cache=cache,
        max_tokens=asked.sampling.max_tokens,
    )
    return "".join(piece.text for piece in pieces)


def run(batch: Batch, rows: list[Row] | None = None) -> dict[Row, tuple[str, Done]]:
    """Steps until every row has ended."""
    texts: dict[Row, str] = {}
    ended: dict[Row, tuple[str, Done]] = {}
    for _ in range(2000):
        for row, event in batch.step():
            if isinstance(event, Piece):
                texts[row] = texts.get(row, "") + event.text
            else:
                ended[row] = (texts.get(row, ""), event)
        if not len(batch):
            return ended
    pytest.fail("the batch does not end")


def answer(batch: Batch, asked: Ask) -> tuple[str, Done]:
    row = batch.add(asked)
    return run(batch)[row]


@pytest.fixture
def batch(loaded) -> Batch:
    return Batch(loaded, Settings())


def test_rows_with_different_images_answer_as_they_would_alone(loaded, batch, pictures):
    asks = [
        question("Where is the car?", pictures[0]),
        question("Where is the car?", pictures[1]),
        question("Is there a dog in the image?", pictures[0], max_tokens=3),
        question("Is there a dog in the image?"),
        question("A dog and a car and a dog and a car?", pictures[2], pictures[3], max_tokens=12),
    ]
    rows = [batch.add(asked) for asked in asks]
    said = run(batch)
    texts = [said[row][0] for row in rows]
    assert texts == [alone(loaded, asked) for asked in asks]
    assert texts[0] != texts[1]  # or the model is blind
    assert [said[row][1].completion_tokens for row in rows] == [8, 8, 3, 8, 12]
    assert {said[row][1].finish_reason for row in rows} == {"length"}


def test_the_answer_is_the_librarys(loaded, batch, pictures):
    text, _ = answer(batch, question("Where is the car?", pictures[0], max_tokens=10))
    parts = (loaded.model, loaded.tokenizer, loaded.preprocessor)
    assert text.strip() == generate(*parts, "Where is the car?", pictures[0], max_tokens=10)


def test_who_joins_or_leaves_in_the_middle_disturbs_nobody(loaded, batch, pictures):
    asks = [question("Where is the car?", p, max_tokens=12) for p in pictures[:4]]
    rows, said = [], {}
    for n in range(40):
        if n % 3 == 0 and n < 12:
            rows.append(batch.add(asks[n // 3]))
        if n == 7:
            batch.remove(rows[1])
        for row, event in batch.step():
            said.setdefault(row, []).append(event)
    assert not len(batch)
    assert not any(isinstance(event, Done) for event in said.get(rows[1], []))
    for k in (0, 2, 3):
        *pieces, last = said[rows[k]]
        assert isinstance(last, Done)
        assert "".join(p.text for p in pieces) == alone(loaded, asks[k])


def test_every_image_is_looked_at_once(batch, pictures):
    answer(batch, question("Where is the car?", pictures[0], pictures[1]))
    assert (batch.images.hits, batch.images.misses) == (0, 2)
    answer(batch, question("Is there a dog?", pictures[1]))
    assert (batch.images.hits, batch.images.misses) == (1, 2)
    answer(batch, question("Is there a dog?", pictures[2], pictures[0]))
    assert (batch.images.hits, batch.images.misses) == (2, 3)


# --- follow-up questions -----------------------------------------------------------------------


def conversation(said: str, follow_up: str, *images: bytes, later: tuple[bytes, ...] = ()) -> Ask:
    turns = (
        Turn("system", "Say what you see."),
        Turn("user", "Where is the car?", images),
        Turn("assistant", said),
        Turn("user", follow_up, later),
    )
    return Ask(turns, Sampling(max_tokens=10))


@pytest.mark.parametrize("later", [False, True], ids=["same image", "another image"])
def test_a_follow_up_reads_on_and_says_the_same(loaded, batch, pictures, later):
    first = Ask(conversation("", "", pictures[0]).turns[:2], Sampling(max_tokens=10))
    text, _ = answer(batch, first)
    more = (pictures[1],) if later else ()
    asked = conversation(text, "Is there a dog?", pictures[0], later=more)
    again, done = answer(batch, asked)
    first_prompt = read(loaded.tokenizer, first.turns, batch.images)
    assert done.cached_tokens >= len(first_prompt.ids) - 1
    assert done.cached_tokens < done.prompt_tokens
    fresh = Batch(loaded, Settings(prompt_cache_size=0))
    assert again == answer(fresh, asked)[0] == alone(loaded, asked)
    assert answer(fresh, asked)[1].cached_tokens == 0


def test_the_same_request_again_says_the_same(loaded, batch, pictures):
    asked = question("Where is the car?", pictures[0])
    first, again = answer(batch, asked), answer(batch, asked)
    assert first[0] == again[0] == alone(loaded, asked)
    assert again[1].cached_tokens == again[1].prompt_tokens - 1


def test_a_text_read_with_another_image_is_not_used(loaded, batch, pictures):
    answer(batch, question("Where is the car?", pictures[0]))
    asked = question("Where is the car?", pictures[1])
    text, done = answer(batch, asked)
    assert done.cached_tokens == 0
    assert text == alone(loaded, asked)


def test_remembered_texts_hold_no_image(batch, pictures):
    answer(batch, question("Where is the car?", pictures[0]))
    (entry,) = batch.prefixes._entries
    assert not any(isinstance(text, VisionCache) for text in entry.texts)
    assert batch.prefixes.nbytes == entry.nbytes > 0


def test_penalties_see_the_text_that_was_read_before(loaded, pictures):
    # A penalty over the whole context differs from one over the newly read part.
    options = {"repetition_penalty": 1.8, "repetition_context_size": 200, "max_tokens": 12}
    asked = question("Is there a dog or a hot dog in the image?", pictures[0], **options)
    batch = Batch(loaded, Settings())
    first, again = answer(batch, asked), answer(batch, asked)
    assert again[1].cached_tokens > 0
    assert again[0] == first[0]


# --- sampling, stop words, log probabilities ---------------------------------------------------


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(loaded, pictures):
    asked = question("Where is the car?", pictures[0], temp=2.0, seed=7)
    lonely, _ = answer(Batch(loaded, Settings()), asked)
    batch = Batch(loaded, Settings())
    rows = [batch.add(question("Is there a dog?", p, temp=2.0)) for p in pictures[1:4]]
    rows.append(batch.add(asked))
    assert run(batch)[rows[-1]][0] == lonely
    other, _ = answer(Batch(loaded, Settings()), question("Where is the car?", pictures[0],
                                                          temp=2.0, seed=8))  # fmt: skip
    assert other != lonely


def test_more_likely_tokens_than_there_are_are_all(batch, pictures):
    asked = question("Where is the car?", pictures[0], temp=1.0, seed=1)
    limited = question("Where is the car?", pictures[0], temp=1.0, seed=1, top_k=10**6)
    assert answer(batch, limited)[0] == answer(batch, asked)[0]


def test_a_stop_word_ends_the_answer_before_it(loaded, batch, pictures):
    whole = alone(loaded, question("Where is the car?", pictures[0], max_tokens=12))
    word = whole[4:7]
    before = whole[: whole.index(word)]
    asked = question("Where is the car?", pictures[0], max_tokens=12, stop=(word,))
    text, done = answer(batch, asked)
    assert text == before
    assert done.finish_reason == "stop"
    assert done.completion_tokens < 12
    assert not len(batch)
    # Its text is remembered, too.
    assert answer(batch, asked)[1].cached_tokens > 0


def test_what_might_begin_a_stop_word_is_said_in_the_end(loaded, batch, pictures):
    whole = alone(loaded, question("Where is the car?", pictures[0]))
    asked = question("Where is the car?", pictures[0], stop=(whole[-2:] + "never",))
    assert answer(batch, asked)[0] == whole


def test_log_probabilities_are_the_models(loaded, batch, pictures):
    asked = question("Where is the car?", pictures[0], max_tokens=3)
    row = batch.add(Ask(asked.turns, asked.sampling, top_logprobs=2))
    tokens = []
    while len(batch):
        tokens += [t for r, e in batch.step() if isinstance(e, Piece) for t in e.tokens if r is row]
    assert len(tokens) == 3
    prompt = read(loaded.tokenizer, asked.turns, batch.images)
    cache, rest = begin(loaded.model, prompt)
    logits = loaded.model(mx.array([rest]), cache=cache)[0, -1]
    expected = np.array(logits - mx.logsumexp(logits))
    assert tokens[0].logprob == pytest.approx(expected.max(), abs=1e-4)
    values = [value for _, value in tokens[0].top]
    assert values == pytest.approx(sorted(expected, reverse=True)[:2], abs=1e-4)
    assert tokens[0].top[0][0] == tokens[0].text


# --- limits ------------------------------------------------------------------------------------


def test_an_answer_ends_where_the_context_does(loaded, batch):
    text = "dog " * 60
    room = 256 - len(read(loaded.tokenizer, (Turn("user", text),), batch.images).ids)
    assert 0 < room < 250
    _, done = answer(batch, question(text, max_tokens=1000))
    assert done.completion_tokens <= room
    assert done.prompt_tokens + room == 256


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" ", {}, "prompt: expected a question"),
        ("dog " * 300, {}, "the model's context"),
        ("A dog?", {"logit_bias": {400: 1.0}}, "logit_bias: expected tokens from 0 to 399"),
    ],
)
def test_what_cannot_be_answered_never_joins(batch, text, options, message):
    with pytest.raises(UserError, match=message):
        batch.add(question(text, **options))
    assert not len(batch)


def test_a_model_without_a_context_has_a_limit_too(loaded):
    batch = Batch(loaded, Settings(max_prompt_tokens=20))
    batch.add(question("A dog?"))
    with pytest.raises(UserError, match="expected at most 20 tokens"):
        batch.add(question("A dog and a car. " * 4))


def test_maps_need_an_image(batch):
    asked = question("Where is the car?")
    with pytest.raises(UserError, match="attention: expected an image"):
        batch.add(Ask(asked.turns, asked.sampling, attention=True))


def test_after_a_reset_it_answers_again(loaded, batch, pictures):
    batch.add(question("Where is the car?", pictures[0]))
    list(batch.step())
    batch.reset()
    assert not len(batch)
    assert list(batch.step()) == []
    asked = question("Where is the car?", pictures[0])
    assert answer(batch, asked)[0] == alone(loaded, asked)


# --- where words looked ------------------------------------------------------------------------


def test_words_say_where_they_looked(loaded, batch, pictures):
    turns = (Turn("user", "Where is the car?", (pictures[0], pictures[1])),)
    row = batch.add(Ask(turns, Sampling(max_tokens=8), attention=True))
    text, done = run(batch)[row]
    conversation = Conversation(loaded)
    said = list(conversation.ask("Where is the car?", pictures[:2], Sampling(max_tokens=8)))
    assert "".join(piece.text for piece in said) == text
    expected = conversation.word_maps()
    assert [(w["word"], w["role"]) for w in done.words] == [(m.word, m.role) for m in expected]
    assert ("car", "user") in [(w["word"], w["role"]) for w in done.words]
    for word, attn in zip(done.words, expected, strict=True):
        assert word["on_image"] == pytest.approx([m.sum() for m in attn.maps], abs=1e-4)
        assert word["grounding"] == pytest.approx(attn.grounding, abs=1e-4)
        strongest = max(range(2), key=lambda n: attn.maps[n].max())
        assert word["image"] == strongest
        assert 0 <= word["peak"][0] <= 30
        assert 0 <= word["peak"][1] <= 20
        # The strongest cell, in the picture's own pixels.
        rows, columns = loaded.model.grid
        cell = np.unravel_index(attn.maps[strongest].argmax(), (rows, columns))
        _, geometry = loaded.preprocessor(load_image(pictures[strongest]))
        ((x, y),) = geometry.to_input(np.array([word["peak"]]))
        assert abs(x / 16 * columns - 0.5 - cell[1]) < 1
        assert abs(y / 16 * rows - 0.5 - cell[0]) < 1
    assert json.loads(json.dumps(done.words, allow_nan=False)) == list(done.words)


def test_maps_of_a_later_image(batch, pictures):
    asked = conversation("A dog", "Where is the car?", pictures[0], later=(pictures[1],))
    row = batch.add(Ask(asked.turns, asked.sampling, attention=True))
    _, done = run(batch)[row]
    assert ("car", "user") in [(w["word"], w["role"]) for w in done.words]


def test_maps_that_fail_concern_one_row(batch, pictures, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("agevlm_mlx.serving.batch.word_maps", fail)
    asked = question("Where is the car?", pictures[0])
    bad = batch.add(Ask(asked.turns, asked.sampling, attention=True))
    good = batch.add(asked)
    said = run(batch)
    assert isinstance(said[bad][1], Failed)
    assert isinstance(said[good][1], Done)


# --- concat ------------------------------------------------------------------------------------


def test_concat_is_served_too(tiny_model_config, loaded, pictures):
    mx.random.seed(1)
    model = AgeVLM(tiny_model_config(400, fusion="concat"))
    mx.eval(model.parameters())
    concat = replace(loaded, model=model)
    batch = Batch(concat, Settings())
    turns = (
        Turn("user", "Is there a dog?"),
        Turn("assistant", "A dog."),
        Turn("user", "Where is the car?", (pictures[0],)),
    )
    asks = [
        Ask(turns[2:], Sampling(max_tokens=6), attention=True),
        Ask(turns, Sampling(max_tokens=6), attention=True),
        question("Where is the car?", pictures[1], pictures[2], max_tokens=6),
        question("Is there a dog?", max_tokens=6),
    ]
    rows = [batch.add(asked) for asked in asks]
    said = run(batch)
    assert [said[row][0] for row in rows] == [alone(concat, asked) for asked in asks]
    assert said[rows[0]][1].words
    assert said[rows[1]][1].words == ()  # nothing can be told when text comes before the image
    assert len(batch.prefixes) == 0
