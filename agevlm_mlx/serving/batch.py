"""The model and the rows that it answers together. No HTTP, no threads: one thread owns it.

Continuous batching is mlx-lm's BatchGenerator: a conversation joins between two steps and
leaves when its answer ends or nobody wants it any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from ..data.image import MAX_PIXELS
from ..data.records import Turn
from ..errors import UserError
from ..evaluation.files import plain
from ..evaluation.words import word_maps
from ..generation import vocabulary
from ..image_store import ImageStore
from ..models.cache import VisionCache
from ..prompts import Prompt, begin, read, room
from ..sampling import StopWords
from ..weights import Loaded
from .exchange import Ask, Done, Event, Failed, Piece, Token
from .prefixes import Prefixes


@dataclass(frozen=True)
class Settings:
    """How much the model does at once and remembers; names and defaults are mlx-lm's."""

    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    image_cache_bytes: int = 256 << 20
    prompt_cache_size: int = 10
    prompt_cache_bytes: int = 1 << 30
    max_pixels: int = MAX_PIXELS
    max_prompt_tokens: int = 16384


@dataclass(eq=False)
class Row:
    """One conversation in the batch."""

    ask: Ask
    prompt: Prompt
    cached: int
    detokenizer: Any
    stop: StopWords
    uid: int = -1
    answer: str = ""
    tokens: int = 0


class Batch:
    """Answers several conversations at once. Whatever it raises but ``UserError`` from `add`
    leaves it unusable until `reset`."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._settings = settings
        self.images = ImageStore(
            loaded.model, loaded.preprocessor, settings.image_cache_bytes, settings.max_pixels
        )
        self.prefixes = Prefixes(settings.prompt_cache_size, settings.prompt_cache_bytes)
        self._rows: dict[int, Row] = {}
        self._generator = self._new_generator()

    def _new_generator(self) -> BatchGenerator:
        return BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._tokenizer.eos_token_ids],
            completion_batch_size=self._settings.decode_concurrency,
            prefill_batch_size=self._settings.prompt_concurrency,
            prefill_step_size=self._settings.prefill_step_size,
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many more conversations may join."""
        return self._settings.decode_concurrency - len(self._rows)

    def add(self, ask: Ask) -> Row:
        """Let a conversation join; its images are looked at here.

        ``UserError`` for images, texts and sampling that this model can do nothing with.
        """
        ask.sampling.check_vocabulary(vocabulary(self._model))
        prompt = read(self._tokenizer, ask.turns, self.images)
        _check_length(prompt, self._settings.max_prompt_tokens)
        if ask.attention and not prompt.sights:
            raise UserError("attention: expected an image that the answer can look at, got none")
        cache, rest = begin(self._model, prompt)
        texts, cached = self._read_before(prompt)
        if texts:
            cache = [_with_text(entry, text) for entry, text in zip(cache, texts, strict=True)]
            rest = list(prompt.ids[cached:])
        row = Row(ask, prompt, cached, self._tokenizer.detokenizer, StopWords(ask.sampling.stop))
        left = room(self._model, prompt)
        most = ask.sampling.max_tokens
        (row.uid,) = self._generator.insert(
            [rest],
            [most if left is None else min(most, left)],
            caches=[cache],
            all_tokens=[list(prompt.ids[: len(prompt.ids) - len(rest)])],
            samplers=[ask.sampling.sampler()],
            logits_processors=[ask.sampling.logits_processors()],
        )
        self._rows[row.uid] = row
        return row

    def _read_before(self, prompt: Prompt) -> tuple[list[Any], int]:
        # With concat the images lie in the text: `begin` has read it up to the last of them.
        if self._model.fusion != "cross":
            return [], 0
        return self.prefixes.fetch(prompt.seen, prompt.ids)

    def remove(self, row: Row) -> None:
        """Nobody wants the answer any more."""
        if self._rows.pop(row.uid, None) is not None:
            self._generator.remove([row.uid])

    def reset(self) -> None:
        """After a failure: forget all conversations and what they may have left behind."""
        self._rows.clear()
        self.prefixes.clear()
        self._generator.close()
        self._generator = self._new_generator()
        mx.clear_cache()

    def close(self) -> None:
        """Give back what mlx-lm has asked of the machine, in the thread that owns the model."""
        self._generator.close()

    def step(self) -> Iterator[tuple[Row, Event]]:
        """One token for each row that has read its prompt, and a part of the prompt for others."""
        if not self._rows:
            return
        _, replies = self._generator.next()
        for reply in replies:
            row = self._rows[reply.uid]
            row.tokens += 1
            piece = self._piece(row, reply)
            row.answer += piece.text
            if piece.text or piece.tokens:
                yield row, piece
            if reply.finish_reason is not None or row.stop.stopped:
                yield row, self._finish(row, reply)

    def _piece(self, row: Row, reply: Any) -> Piece:
        text, tokens = "", ()
        if reply.finish_reason != "stop":  # the token that ends an answer is no part of it
            row.detokenizer.add_token(reply.token)
            text = row.stop.feed(row.detokenizer.last_segment)
            if row.ask.top_logprobs is not None:
                tokens = (self._token(reply, row.ask.top_logprobs),)
        if reply.finish_reason is not None:
            row.detokenizer.finalize()
            text += row.stop.feed(row.detokenizer.last_segment) + row.stop.finish()
        return Piece(text, tokens)

    def _token(self, reply: Any, top: int) -> Token:
        logprobs = np.array(reply.logprobs.astype(mx.float32))
        likely = np.argsort(-logprobs, kind="stable")[:top]
        decode = self._tokenizer.decode
        return Token(
            decode([reply.token]),
            float(logprobs[reply.token]),
            tuple((decode([int(i)]), float(logprobs[i])) for i in likely),
        )

    def _finish(self, row: Row, reply: Any) -> Done | Failed:
        del self._rows[row.uid]
        if reply.finish_reason is not None:
            cache, tokens = reply.prompt_cache, reply.all_tokens
        else:  # a stop word, of which the generator knows nothing
            removed = self._generator.remove([row.uid], return_prompt_caches=True)
            cache, tokens = removed[row.uid]
        if self._model.fusion == "cross":
            # Only the text's own: the images are remembered once for all texts.
            texts = [c.text if isinstance(c, VisionCache) else c for c in cache]
            self.prefixes.keep(row.prompt.seen, tokens, texts)
        try:
            words = self._words(row) if row.ask.attention else ()
        except Exception as error:  # a pass of its own: it concerns no other row
            return Failed(error)
        return Done(
            "stop" if row.stop.stopped else str(reply.finish_reason),
            len(row.prompt.ids),
            row.tokens,
            row.cached,
            words,
        )

    def _words(self, row: Row) -> tuple[dict[str, Any], ...]:
        cache, rest = begin(self._model, row.prompt)
        if not any(
            getattr(entry, "vision", None) or getattr(entry, "prefix", 0) for entry in cache
        ):
            return ()  # concat, and text before the image: where it looked cannot be told
        turns = (*row.ask.turns, Turn("assistant", row.answer.strip()))
        skip = len(row.prompt.ids) - len(rest)
        geometries = [sight.geometry for sight in row.prompt.sights]
        found = word_maps(self._model, self._tokenizer, cache, turns, skip)
        return tuple(
            plain({"word": word.word, "role": word.role, **word.describe(geometries)})
            for word in found
        )


def _with_text(entry: Any, text: Any) -> Any:
    """A layer's fresh cache, with the images that it sees, after a text read before."""
    return VisionCache(text, entry.vision) if isinstance(entry, VisionCache) else text


def _check_length(prompt: Prompt, most: int) -> None:
    if len(prompt.ids) > most:
        raise UserError(
            f"prompt: expected at most {most} tokens, got {len(prompt.ids)}; shorten it or start "
            "the server with a larger --max-prompt-tokens"
        )
