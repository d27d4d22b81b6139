"""Tokens of conversations: what is learned, and which tokens look at a phrase's object."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agevlm_mlx.data.chat import Encoded, build_tokenizer, encode, prompt_ids
from agevlm_mlx.data.nouns import NOUNS
from agevlm_mlx.data.records import Phrase, Turn
from agevlm_mlx.errors import UserError

#: The system prompt holds words of the questions, which must not be taken for them.
SYSTEM = "Say where there is a dog. Is there a dog? Yes"
CHATML = (
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture(scope="session")
def chatml(micro: Any) -> Any:
    """The same words under a template with a system prompt and line breaks."""
    tokenizer = with_template(micro, CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture(scope="session", params=["micro", "chatml"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def end_of(tokenizer: Any) -> str:
    return "<|im_end|>" if "im_end" in tokenizer.chat_template else "<|end|>"


def conversation(*texts: str) -> tuple[Turn, ...]:
    """Question and answer in turn."""
    return tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


def mark(turns: Sequence[Turn], turn: int, text: str) -> Phrase:
    """The last place of `text` in a turn."""
    start = turns[turn].text.rindex(text)
    return Phrase(text, turn, start, start + len(text))


def learned(tokenizer: Any, encoded: Encoded) -> str:
    ids = [i for i, m in zip(encoded.ids, encoded.loss_mask, strict=True) if m]
    return tokenizer.decode(ids)


def words(tokenizer: Any, encoded: Encoded, span: Sequence[int]) -> list[str]:
    return [tokenizer.decode([encoded.ids[i]]) for i in span]


# The micro tokenizer --------------------------------------------------------------------------


def test_every_noun_is_one_token(micro: Any) -> None:
    pieces = {noun: len(micro.encode(f" {noun}")) for noun in NOUNS}
    assert {n: count for n, count in pieces.items() if count > 1} == {}


def test_the_vocabulary_keeps_its_size(micro: Any) -> None:
    assert len(micro) <= 768
    assert len(build_tokenizer(["a dog", "a cat"] * 5, vocab_size=300)) <= 300
    assert micro.eos_token == "<|end|>"
    assert micro.pad_token == "<|pad|>"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_any_text_comes_back(micro: Any, text: str) -> None:
    assert micro.decode(micro.encode(text, add_special_tokens=False)) == text


def test_training_is_repeatable(micro: Any) -> None:
    texts = ["Is there a dog?", "A dog, a car and a pizza.", "Yes", "No"]
    one, other = (build_tokenizer(texts, 300).get_vocab() for _ in range(2))
    assert one == other


# The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        ("Is there a dog?", "Yes"),
        ("Yes", "Yes"),
        ("system", "user"),
        ("Is there a dog?", "Yes", "Is the dog big or small?", "Big"),
        ("Yes", "No", "No", "Yes", "Yes", "No, there is a dog. Yes"),
        ("Où est la 🐕?", "Là-bas: 🐕🐕"),
    ],
)
def test_the_answers_are_learned_and_nothing_else(tokenizer: Any, texts: tuple[str, ...]) -> None:
    encoded = encode(tokenizer, conversation(*texts), ())
    wanted = "".join(f"{answer}{end_of(tokenizer)}" for answer in texts[1::2])
    assert learned(tokenizer, encoded) == wanted
    assert tokenizer.decode(encoded.ids).count(end_of(tokenizer)) >= len(texts) // 2


messages = st.text(st.sampled_from("Yes dog a?.\n<|>é🐕"), min_size=1, max_size=12).filter(
    str.strip
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(messages, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
def test_the_answers_of_any_conversation_are_found(
    micro: Any, chatml: Any, texts: list[str]
) -> None:
    for tokenizer in (micro, chatml):
        encoded = encode(tokenizer, conversation(*texts), ())
        wanted = "".join(f"{answer}{end_of(tokenizer)}" for answer in texts[1::2])
        said = learned(tokenizer, encoded)
        if tokenizer is micro:
            assert said == wanted
        else:  # a line break before an answer's first one shares its token
            assert said.replace("\n", "") == wanted.replace("\n", "")


def test_the_prompt_is_what_comes_before_the_answer(tokenizer: Any) -> None:
    turns = conversation("Is there a dog?", "Yes", "Is the dog big or small?", "Big")
    encoded = encode(tokenizer, turns, ())
    for asked in (1, 3):
        prompt = prompt_ids(tokenizer, turns[:asked])
        assert list(encoded.ids[: len(prompt)]) == prompt
        assert encoded.loss_mask[len(prompt) - 1] == 0
        assert encoded.loss_mask[len(prompt)] == 1


def test_a_conversation_that_ends_with_a_question_is_fine(tokenizer: Any) -> None:
    turns = conversation("Is there a dog?", "Yes", "And a car?")
    encoded = encode(tokenizer, turns, (mark(turns, 2, "car"),))
    assert learned(tokenizer, encoded) == "Yes" + end_of(tokenizer)
    assert words(tokenizer, encoded, encoded.spans[0]) == [" car"]


def test_padded_messages_keep_their_end_token(micro: Any) -> None:
    assert learned(micro, encode(micro, conversation(" Dog? ", " Yes \n"), ())) == " Yes \n<|end|>"


# The spans ------------------------------------------------------------------------------------


def test_a_word_of_an_answer_looks_before_it_is_said(tokenizer: Any) -> None:
    turns = conversation("Describe the image.", "A dog, a car and a pizza.")
    phrases = [mark(turns, 1, noun) for noun in ("dog", "car", "pizza")]
    encoded = encode(tokenizer, turns, phrases)
    assert [words(tokenizer, encoded, span) for span in encoded.spans] == [
        ["A", " dog"],
        [" a", " car"],
        [" a", " pizza"],
    ]


def test_a_word_of_a_question_looks_again_when_the_answer_is_due(tokenizer: Any) -> None:
    turns = conversation("Is there a dog?", "Yes", "Is the dog big or small?", "Big")
    encoded = encode(tokenizer, turns, [mark(turns, 0, "dog"), mark(turns, 2, "dog")])
    for span, asked in zip(encoded.spans, (1, 3), strict=True):
        *own, last = span
        assert words(tokenizer, encoded, own) == [" dog"]
        assert last == len(prompt_ids(tokenizer, turns[:asked])) - 1


def test_every_position_of_a_span_says_what_it_is(tokenizer: Any) -> None:
    turns = conversation("Is there a caravan dog?", "Yes, a dog", "dog?", "dog")
    marked = [(0, "caravan dog"), (1, "dog"), (2, "dog"), (3, "dog")]
    encoded = encode(tokenizer, turns, [mark(turns, *one) for one in marked])
    assert encoded.positions == (
        ("word", "word", "answer"),
        ("before", "word"),
        *[("word",) * (len(encoded.spans[2]) - 1) + ("answer",)],
        ("before", *("word",) * (len(encoded.spans[3]) - 1)),
    )
    assert encoded.spans[2][-1] == encoded.spans[3][0]  # where "dog" is the answer to "dog?"
    unanswered = encode(tokenizer, turns[:3], [mark(turns, 2, "dog")])
    assert set(unanswered.positions[0]) == {"word"}


def test_the_first_word_of_an_answer_looks_from_the_prompt(tokenizer: Any) -> None:
    turns = conversation("What is it?", "dog")
    encoded = encode(tokenizer, turns, [mark(turns, 1, "dog")])
    assert encoded.spans[0][0] == len(prompt_ids(tokenizer, turns[:1])) - 1


def test_a_word_of_many_tokens_is_known_at_its_last(tokenizer: Any) -> None:
    turns = conversation("Describe the image.", "A caravan.")
    encoded = encode(tokenizer, turns, [mark(turns, 1, "caravan")])
    pieces = tokenizer.encode(" caravan", add_special_tokens=False)
    assert len(pieces) > 2
    before, *own = encoded.spans[0]
    assert tokenizer.decode([encoded.ids[before]]) == "A"
    assert own == [before + len(pieces)]
    assert encoded.ids[own[0]] == pieces[-1]


def test_several_words_look_from_the_end_of_the_first(tokenizer: Any) -> None:
    turns = conversation("Describe the image.", "See the caravan dog car.")
    encoded = encode(tokenizer, turns, [mark(turns, 1, "caravan dog car")])
    before, *own = encoded.spans[0]
    assert tokenizer.decode([encoded.ids[before]]) == " the"
    last_piece = tokenizer.encode(" caravan", add_special_tokens=False)[-1]
    wanted = [tokenizer.decode([last_piece]), " dog", " car"]
    assert words(tokenizer, encoded, own) == wanted


def test_spans_count_characters_not_bytes(tokenizer: Any) -> None:
    turns = conversation("Äöü 🐕🐕 éé: is the dog big?", "Yes")
    encoded = encode(tokenizer, turns, [mark(turns, 0, "dog"), mark(turns, 0, "🐕")])
    assert words(tokenizer, encoded, encoded.spans[0][:-1]) == [" dog"]
    emoji = [encoded.ids[i] for i in encoded.spans[1][:-1]]
    assert emoji
    assert "🐕".endswith(tokenizer.decode(emoji)) or "\ufffd" in tokenizer.decode(emoji)


def test_padding_around_a_message_moves_no_span(micro: Any) -> None:
    trimmed = with_template(
        micro, micro.chat_template.replace("message['content']", "(message['content'] | trim)")
    )
    turns = conversation("  Is there a dog? ", "\n Yes, a dog ")
    phrases = [mark(turns, 0, "dog"), mark(turns, 1, "dog")]
    for tokenizer in (micro, trimmed):
        encoded = encode(tokenizer, turns, phrases)
        assert words(tokenizer, encoded, encoded.spans[0]) == [" dog", "<|assistant|>"]
        assert words(tokenizer, encoded, encoded.spans[1]) == [" a", " dog"]
    assert learned(trimmed, encode(trimmed, turns, phrases)) == "Yes, a dog<|end|>"


def test_mlx_lm_s_wrapper_gives_the_same(micro: Any) -> None:
    turns = conversation("Is there a dog?", "Yes")
    phrases = [mark(turns, 0, "dog")]
    wrapped = TokenizerWrapper(micro)
    assert encode(wrapped, turns, phrases) == encode(micro, turns, phrases)
    assert prompt_ids(wrapped, turns[:1]) == prompt_ids(micro, turns[:1])


# Templates that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "rewrites"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "drops"),
        ("{{ messages[-1]['content'] }}", "drops"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "drops or rewrites"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "changes earlier turns",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses .*roles must alternate"),
        ("{{ messages[0]['nothing']['at all'] }}", "refuses a conversation"),
    ],
)
def test_a_template_that_does_not_fit_is_named(
    micro: Any, template: str | None, message: str
) -> None:
    tokenizer = with_template(micro, template or "")
    with pytest.raises(UserError, match=message) as caught:
        encode(tokenizer, conversation("Is there a dog?", "Yes", "Big?", "No"), ())
    assert "\n" not in str(caught.value)


def test_what_no_template_takes_is_one_line(micro: Any) -> None:
    with pytest.raises(UserError, match="refuses a conversation of no turn"):
        encode(micro, [Turn("assistant", "Yes")], [])


def test_a_system_message_is_taken(micro: Any) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "A dog?"), Turn("assistant", "Yes")]
    assert "Be brief." in micro.decode(encode(micro, turns, []).ids)
