"""Answers about images, in Python: whole, piece by piece, or many at once.

Everything that chooses words is mlx-lm's; what is added here is that the images are in the
prompt cache, and that each token can say where it looked.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import GenerationResponse as TextResponse
from mlx_lm.generate import stream_generate as stream_text
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PIL import Image

from .data.image import ImageSource, Preprocessor
from .data.records import Turn
from .errors import UserError
from .evaluation.grounding import TokenAttention
from .image_store import ImageStore, Sight
from .prompts import Prompt, Reader, as_turns, begin, read, room
from .sampling import Sampling, StopWords

if TYPE_CHECKING:
    from .models.agevlm import AgeVLM

#: One image or several; a `Sight` is one that a store has looked at.
Images = ImageSource | Sight | Sequence[ImageSource | Sight]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class Response(TextResponse):
    """mlx-lm's response for one token, and where the model looked for it (if asked).

    attention: of the position that chose the token; None for the piece that ends an answer.
    """

    attention: TokenAttention | None = None


def as_list(images: Images) -> list[ImageSource | Sight]:
    """One image or several, as a list."""
    if isinstance(images, str | bytes | Image.Image | Sight):
        return [images]
    return list(_several(images))


def _several(images: Any) -> Sequence[ImageSource]:
    return [images] if hasattr(images, "__fspath__") else images


def stream_generate(
    model: "AgeVLM",
    tokenizer: Any,
    preprocessor: Preprocessor,
    prompt: str | Sequence[Turn],
    images: Images = (),
    *,
    attention: bool = False,
    prompt_cache: list[Any] | None = None,
    sampling: Sampling | None = None,
    **options: Any,
) -> Generator[Response, None, None]:
    """Answer `prompt` about `images`, piece by piece, as mlx-lm's ``stream_generate`` does.

    prompt: a question, or the turns of a conversation that ends with the user's; turns may bring
    images of their own. images: paths, bytes or PIL images that belong to the first message of
    the user; none asks the language model alone. attention: each piece says where its token
    looked. prompt_cache: one that has already seen the images (`AgeVLM.see`) or read the
    conversation so far; then `prompt` is only what comes next, without images.

    Further `options`: the fields of `Sampling` (``max_tokens``, ``temp``, ``seed``, ``stop`` ...)
    unless `sampling` is given, and mlx-lm's own (``draft_model``, ``num_draft_tokens``,
    ``kv_bits``, ``kv_group_size``, ``quantized_kv_start``, ``max_kv_size``,
    ``prefill_step_size``, ``sampler``, ``logits_processors``). Raises ``UserError`` for images
    that cannot be read, a prompt beyond the model's context and options that are wrong.
    """
    sampling = sampling or _take_sampling(options)
    max_kv_size = options.pop("max_kv_size", None)
    check_options(model, options, max_kv_size)
    store = ImageStore(model, preprocessor)
    turns = as_turns(prompt, as_list(images))
    if prompt_cache is not None:
        if any(turn.images for turn in turns):
            raise UserError("images: expected none beside a prompt_cache that has seen them")
        asked = read(tokenizer, turns, store)
        rest = list(asked.ids)
    else:
        asked = read(tokenizer, turns, store)
        reader = Reader(model, max_kv_size, options.get("draft_model"))
        rest = reader.prepare(asked)
        prompt_cache = reader.cache
    yield from stream(
        model,
        tokenizer,
        rest,
        prompt_cache,
        sampling,
        room(model, asked),
        before=asked.ids[: len(asked.ids) - len(rest)],
        attention=attention,
        **options,
    )


def _take_sampling(options: dict[str, Any]) -> Sampling:
    names = {field.name for field in fields(Sampling)} & options.keys()
    chosen = {name: options.pop(name) for name in names}
    if isinstance(chosen.get("stop"), str):
        chosen["stop"] = (chosen["stop"],)
    elif "stop" in chosen:
        chosen["stop"] = tuple(chosen["stop"])
    return Sampling(**chosen)


def check_options(model: "AgeVLM", options: dict[str, Any], max_kv_size: int | None = None) -> None:
    """Check mlx-lm's options, and complete those of KV quantisation: from the first token on, in
    the largest groups that the heads allow.

    ``UserError`` for what is wrong or cannot be combined, before any work.
    """
    bits, size = options.get("kv_bits"), max_kv_size
    drafts = options.get("draft_model") is not None
    if bits not in (None, 4, 8):
        raise UserError(f"kv_bits: expected 4 or 8, got {bits}")
    if size is not None and size < 8:
        raise UserError(f"max_kv_size: expected at least 8 tokens, got {size}")
    if bits and size:
        raise UserError("kv_bits: a rotating cache (max_kv_size) cannot be quantised; choose one")
    if drafts and size:
        raise UserError("draft_model: it needs a cache that can be rewound; drop max_kv_size")
    if drafts and bits:
        raise UserError("draft_model: its cache cannot be quantised; drop kv_bits")
    if drafts and options.get("num_draft_tokens", 2) < 1:
        raise UserError(f"num_draft_tokens: expected 1 or more, got {options['num_draft_tokens']}")
    if options.get("prefill_step_size", 1) < 1:
        raise UserError(f"prefill_step_size: expected 1 or more: {options['prefill_step_size']}")
    if bits:
        dims = _head_dim(model)
        fitting = [group for group in (64, 32, 128) if dims % group == 0]
        group = options.setdefault("kv_group_size", fitting[0] if fitting else None)
        options.setdefault("quantized_kv_start", 0)
        if group not in fitting:
            raise UserError(
                f"kv_group_size: expected 32, 64 or 128 that divides the head dimension {dims}, "
                f"got {group}"
                + ("" if fitting else "; this model's cache cannot be quantised, drop kv_bits")
            )


def _head_dim(model: "AgeVLM") -> int:
    args = model.args
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def stream(
    model: "AgeVLM",
    tokenizer: Any,
    ids: Sequence[int],
    cache: list[Any],
    sampling: Sampling,
    room: int | None = None,
    *,
    before: Sequence[int] = (),
    attention: bool = False,
    **options: Any,
) -> Generator[Response, None, None]:
    """The answer after `ids`, which `cache` has yet to read.

    room: at most so many tokens, whatever `sampling` allows. before: the text that the cache has
    read, for penalties. See `stream_generate`.
    """
    sampling.check_vocabulary(vocabulary(model))
    options.setdefault("sampler", sampling.sampler())
    processors = [_after(before, p) for p in sampling.logits_processors()]
    options.setdefault("logits_processors", processors or None)
    max_tokens = sampling.max_tokens if room is None else min(sampling.max_tokens, room)
    stop = StopWords(sampling.stop)
    reading = model if options.get("draft_model") is not None else ReadOnce(model, ids)
    pieces = stream_text(
        reading, tokenizer, list(ids), max_tokens=max_tokens, prompt_cache=cache, **options
    )
    if not attention:
        yield from _until(stop, (Response(**vars(piece)) for piece in pieces))
        return
    looking = cache[model.looking_layers[0]]
    if looking.vision is None and not looking.prefix:
        raise UserError("attention: expected an image that the answer can look at, got none")
    # The last id chooses the first token; each token chooses the next one.
    first = looking.offset + len(ids) - 1
    newest = options.get("num_draft_tokens", 2) + 1 if options.get("draft_model") else 1
    with model.record(cache, first, newest) as recorder:

        def with_maps() -> Iterator[Response]:
            position = first
            for piece in pieces:
                response = Response(**vars(piece))
                if piece.finish_reason != "stop":
                    values = np.array(recorder.take(position)[0], np.float32)
                    response.attention = TokenAttention(values, model.grid, _has_null(model))
                yield response
                position += 1

        yield from _until(stop, with_maps())


class ReadOnce(nn.Module):
    """The model as mlx-lm's ``generate_step`` should call it: without a reading too many.

    ``generate_step`` reads a prompt in two calls, all but its last token and then that token, so
    that every weight is read once more before the first word. Here the call before takes the last
    token along, and the call for it is answered with the logits that are known by then.
    """

    def __init__(self, model: "AgeVLM", ids: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self._unread = list(ids)
        self._last: mx.array | None = None

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        if self._last is not None:
            last, self._last = self._last, None
            return last
        read, self._unread = inputs.shape[1], self._unread[inputs.shape[1] :]
        if read and len(self._unread) == 1:
            end = mx.array([self._unread], inputs.dtype)
            self._unread = []
            last = self.model.last_logits(mx.concatenate([inputs, end], axis=1), cache)
            self._last = last
            return last
        return self.model(inputs, cache=cache)


def _after(before: Sequence[int], processor: LogitsProcessor) -> LogitsProcessor:
    """`processor` for mlx-lm, which shows it only the tokens that it feeds itself."""
    if not before:
        return processor
    known = mx.array(list(before))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([known.astype(tokens.dtype), tokens]), logits)

    return process


def vocabulary(model: "AgeVLM") -> int:
    """V, the tokens that the model can choose among."""
    return model.args.vocab_size


def _has_null(model: "AgeVLM") -> bool:
    return model.fusion == "cross" and model.config.fusion_config.null_slot


def _until(stop: StopWords, responses: Iterator[Response]) -> Generator[Response, None, None]:
    """The responses up to a stop word, which is cut off."""
    for response in responses:
        response.text = stop.feed(response.text)
        if stop.stopped:
            response.finish_reason = "stop"
            yield response
            return
        if response.finish_reason is not None:
            response.text += stop.finish()
        yield response


def generate(
    model: "AgeVLM",
    tokenizer: Any,
    preprocessor: Preprocessor,
    prompt: str | Sequence[Turn],
    images: Images = (),
    **options: Any,
) -> str:
    """The whole answer to `prompt` about `images`; options as for `stream_generate`."""
    pieces = stream_generate(model, tokenizer, preprocessor, prompt, images, **options)
    return "".join(piece.text for piece in pieces).strip()


def batch_generate(
    model: "AgeVLM",
    tokenizer: Any,
    preprocessor: Preprocessor,
    prompts: Sequence[str | Sequence[Turn]],
    images: Sequence[Images] | None = None,
    *,
    sampling: Sampling | None = None,
    completion_batch_size: int = 32,
    prefill_batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """The answers to many prompts, in their order, several at a time.

    images: for each prompt its image or images, as for `stream_generate`; the same image is
    looked at once. Options: the fields of `Sampling`. An answer is the one that the prompt gets
    alone, up to the rounding of a matrix product of another size.
    """
    sampling = sampling or _take_sampling(options)
    if options:
        raise UserError(f"options: batch_generate takes no {', '.join(sorted(options))}")
    sampling.check_vocabulary(vocabulary(model))
    given = [()] * len(prompts) if images is None else images
    if len(given) != len(prompts):
        raise UserError(f"images: expected {len(prompts)}, one entry a prompt, got {len(given)}")
    store = ImageStore(model, preprocessor)
    asked = [
        read(tokenizer, as_turns(p, as_list(i)), store) for p, i in zip(prompts, given, strict=True)
    ]
    texts = dict(
        batch_answers(model, tokenizer, asked, sampling, completion_batch_size, prefill_batch_size)
    )
    return [texts[n] for n in range(len(asked))]


def batch_answers(
    model: "AgeVLM",
    tokenizer: Any,
    asked: Sequence[Prompt],
    sampling: Sampling,
    completion_batch_size: int = 32,
    prefill_batch_size: int = 8,
) -> Generator[tuple[int, str], None, None]:
    """(number, answer) of each prompt, in the order in which the answers end; see
    `batch_generate`. Closing the generator stops it."""
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    batch = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=completion_batch_size,
        prefill_batch_size=prefill_batch_size,
    )
    try:
        yield from _run(batch, model, tokenizer, asked, sampling)
    finally:
        batch.close()


def _run(
    batch: BatchGenerator,
    model: "AgeVLM",
    tokenizer: Any,
    asked: Sequence[Prompt],
    sampling: Sampling,
) -> Iterator[tuple[int, str]]:
    answers: dict[int, _Answer] = {}
    rows: dict[int, int] = {}
    waiting = list(range(len(asked)))[::-1]
    while waiting or rows:
        # Caches are made as room comes free, so that thousands of prompts need no more memory.
        while waiting and len(rows) < batch.completion_batch_size:
            n = waiting.pop()
            cache, rest = begin(model, asked[n])
            limit = room(model, asked[n])
            longest = sampling.max_tokens if limit is None else min(sampling.max_tokens, limit)
            (uid,) = batch.insert(
                [rest],
                [longest],
                caches=[cache],
                all_tokens=[list(asked[n].ids[: len(asked[n].ids) - len(rest)])],
                samplers=[sampling.sampler()],
                logits_processors=[sampling.logits_processors()],
            )
            rows[uid], answers[uid] = n, _Answer(tokenizer, sampling.stop)
        for reply in batch.next_generated():
            answer = answers[reply.uid]
            if reply.finish_reason != "stop":
                answer.add(reply.token)
            if reply.finish_reason is None and answer.stop.stopped:
                batch.remove([reply.uid])
            elif reply.finish_reason is None:
                continue
            del answers[reply.uid]
            yield rows.pop(reply.uid), answer.whole()


class _Answer:
    """The text of one answer as its tokens come."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.detokenizer
        self.stop = StopWords(stop)
        self._text = ""

    def add(self, token: int) -> None:
        self._detokenizer.add_token(token)
        self._text += self.stop.feed(self._detokenizer.last_segment)

    def whole(self) -> str:
        self._detokenizer.finalize()
        self._text += self.stop.feed(self._detokenizer.last_segment) + self.stop.finish()
        return self._text.strip()
