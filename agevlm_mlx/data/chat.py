"""Conversations as token ids: chat template, loss mask, and the tokens that phrases guide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    ids: the whole sequence. loss_mask: 1 on the tokens of the answers, with the one that ends
    each. spans: for each phrase, the positions in `ids` whose attention should go to it.
    """

    ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    spans: tuple[tuple[int, ...], ...]


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
    places, answer_at, cursor = [], {}, 0
    for k, turn in enumerate(turns):
        if turn.role == "assistant":
            prompt = _render(tokenizer, turns[:k], True)
            if not text.startswith(prompt):
                raise UserError(
                    "tokenizer: its chat template changes earlier turns, so that the loss cannot "
                    "be limited to the answers; use another template"
                )
            cursor = len(prompt)
        place = text.find(turn.text.strip(), cursor)
        if place < 0:
            raise UserError(f"tokenizer: its chat template drops or rewrites {turn.text[:40]!r}")
        places.append(place - (len(turn.text) - len(turn.text.lstrip())))
        if turn.role == "assistant":
            first = next(i for i, (low, high) in enumerate(offsets) if high > cursor)
            answer_at[k] = first
            end = place + len(turn.text.strip())
            for i in range(first, len(ids)):
                loss_mask[i] = 1
                if offsets[i][0] >= end:  # the token that ends the turn, and no template after it
                    break
        cursor = place + len(turn.text.strip())
    spans = tuple(_span(p, places[p.turn], turns, offsets, answer_at) for p in phrases)
    return Encoded(tuple(ids), tuple(loss_mask), spans)


def _span(
    phrase: Phrase,
    place: int,
    turns: Sequence[Turn],
    offsets: Sequence[tuple[int, int]],
    answer_at: dict[int, int],
) -> tuple[int, ...]:
    low, high = place + phrase.start, place + phrase.end
    own = [i for i, (a, b) in enumerate(offsets) if a < high and b > low and b > a]
    if not own:
        raise UserError(f"tokenizer: no token covers the phrase {phrase.text!r}")
    first_word = low + len(phrase.text.split(" ")[0])
    known = max(i for i in own if offsets[i][0] < first_word)
    kept = [i for i in own if i >= known]
    if turns[phrase.turn].role == "assistant":
        return tuple(([own[0] - 1] if own[0] else []) + kept)
    answer = next(
        (answer_at[k] for k in range(phrase.turn + 1, len(turns)) if k in answer_at), None
    )
    return tuple(kept + ([answer - 1] if answer is not None else []))


def _fast(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper."""
    return tokenizer if callable(tokenizer) else tokenizer._tokenizer


def _render(tokenizer: Any, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    fast = _fast(tokenizer)
    if not fast.chat_template:
        raise UserError("tokenizer: it has no chat template; use an instruction-tuned model's")
    return fast.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
