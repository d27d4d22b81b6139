"""Conversations as token ids: chat template, loss mask, and the tokens that phrases guide."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from ..errors import UserError
from .records import Phrase, Turn

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
#: The template of the embedded language model.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


#: What a position has to do with a phrase: it is one of its tokens; or the one before a phrase of
#: an answer, where its first token is chosen; or the last one before the answer to a question with
#: the phrase, where the answer is chosen. The end is that of an answer that has phrases, where the
#: model chooses to stop. The rest is another thing to look at before a phrase: it and all that
#: its answer names later.
Position = Literal["word", "before", "answer", "end", "rest"]
#: Those that masks guide; nothing is left to look at in the end.
POSITIONS: tuple[Position, ...] = get_args(Position)[:3]


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    ids: the whole sequence. loss_mask: 1 on the tokens of the answers, with the one that ends
    each. spans: for each phrase, the positions in `ids` whose attention should go to it.
    positions: what each of these is. ends: where the answers with phrases end.
    """

    ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    spans: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[Position, ...], ...]
    ends: tuple[int, ...] = ()


def build_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> Any:
    """A byte-level BPE tokenizer for a language model trained from scratch on `texts`.

    Returns a ``transformers.PreTrainedTokenizerFast`` with at most `vocab_size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompt_ids(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """The ids of a conversation that waits for an answer (with the generation prompt)."""
    return _fast(tokenizer)(_render(tokenizer, turns, True), add_special_tokens=False)["input_ids"]


def turn_starts(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """For each turn, the position in `prompt_ids` at which it begins."""
    text = _render(tokenizer, turns, True)
    starts = [0]
    for k in range(1, len(turns)):
        before = _render(tokenizer, turns[:k], False)
        if text.startswith(before):
            starts.append(len(before))
        else:  # a template that changes earlier turns: right after the words of the last one
            starts.append(_places(tokenizer, turns, text, True)[k - 1][1])
    if len(turns) == 1:
        return starts
    batch = _fast(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    lows = [low for low, _ in batch["offset_mapping"]]
    return [next((i for i, low in enumerate(lows) if low >= s), len(lows)) for s in starts]


def encode(tokenizer: Any, turns: Sequence[Turn], phrases: Sequence[Phrase]) -> Encoded:
    """Tokenise a whole conversation.

    A phrase guides its own tokens, from the last sub-token of its first word on; in an answer
    also the token before it, where the word is chosen; in a question also the last token of
    the prompt, where the answer is chosen. ``UserError`` if the chat template rewrites texts so
    that they cannot be found again.
    """
    text = _render(tokenizer, turns, False)
    batch = _fast(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = batch["input_ids"], batch["offset_mapping"]
    loss_mask = [0] * len(ids)
    places = _places(tokenizer, turns, text)
    answer_at: dict[int, int] = {}
    ends: list[int] = []
    named = {phrase.turn for phrase in phrases}
    for k, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = _render(tokenizer, turns[:k], True)
        if not text.startswith(prompt):
            raise UserError(
                "tokenizer: its chat template changes earlier turns, so that the loss cannot "
                "be limited to the answers; use another template"
            )
        first = next(i for i, (_, high) in enumerate(offsets) if high > len(prompt))
        answer_at[k] = first
        for i in range(first, len(ids)):
            loss_mask[i] = 1
            if offsets[i][0] >= places[k][1]:  # the token that ends the turn, nothing after it
                ends += [i - 1] if k in named else []
                break
    found = [_span(p, places[p.turn][0], turns, offsets, answer_at) for p in phrases]
    spans = tuple(tuple(at for at, _ in span) for span in found)
    positions: tuple[tuple[Position, ...], ...] = tuple(
        tuple(position for _, position in span) for span in found
    )
    return Encoded(tuple(ids), tuple(loss_mask), spans, positions, tuple(ends))


def _places(
    tokenizer: Any, turns: Sequence[Turn], text: str, add_generation_prompt: bool = False
) -> list[tuple[int, int]]:
    """Where each turn's first character is in the rendered `text`, and where the turn ends.

    The template is rendered a second time with marks instead of messages: a search for the
    messages themselves could find their words in a system prompt.
    """
    marks = [f"\ue000{k}\ue001" for k in range(len(turns))]
    marked = [Turn(turn.role, mark) for turn, mark in zip(turns, marks, strict=True)]
    pieces = re.split("\ue000[0-9]+\ue001", _render(tokenizer, marked, add_generation_prompt))
    if len(pieces) == len(turns) + 1:
        # Templates may strip messages, some only those of one side.
        for user, assistant in product((str, str.strip, str.rstrip, str.lstrip), repeat=2):
            places, built = [], pieces[0]
            for turn, piece in zip(turns, pieces[1:], strict=True):
                kept = (assistant if turn.role == "assistant" else user)(turn.text)
                places.append((len(built) - turn.text.index(kept), len(built) + len(kept)))
                built += kept + piece
            if built == text:
                return places
    raise UserError(
        "tokenizer: its chat template drops or rewrites messages, so that their words cannot be "
        "found again; use another template"
    )


def _span(
    phrase: Phrase,
    place: int,
    turns: Sequence[Turn],
    offsets: Sequence[tuple[int, int]],
    answer_at: dict[int, int],
) -> list[tuple[int, Position]]:
    low, high = place + phrase.start, place + phrase.end
    own = [i for i, (a, b) in enumerate(offsets) if a < high and b > low and b > a]
    if not own:
        raise UserError(f"tokenizer: no token covers the phrase {phrase.text!r}")
    first_word = low + len(phrase.text.split()[0])
    known = max(i for i in own if offsets[i][0] < first_word)
    kept: list[tuple[int, Position]] = [(i, "word") for i in own if i >= known]
    if turns[phrase.turn].role == "assistant":
        return [(own[0] - 1, "before"), *kept] if own[0] else kept
    answer = next(
        (answer_at[k] for k in range(phrase.turn + 1, len(turns)) if k in answer_at), None
    )
    return kept if answer is None else [*kept, (answer - 1, "answer")]


def _fast(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper."""
    return tokenizer if callable(tokenizer) else tokenizer._tokenizer


def _render(tokenizer: Any, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    fast = _fast(tokenizer)
    if not fast.chat_template:
        raise UserError("tokenizer: it has no chat template; use an instruction-tuned model's")
    try:
        return fast.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(turn.role for turn in turns) or "no turn"
        raise UserError(
            f"tokenizer: its chat template refuses a conversation of {roles}: {error}"
        ) from None
