"""Asking a model many questions about many images, in few passes.

Each image is encoded once; all of its questions share that image's keys and values and run in
one padded batch (`AgeVLM.look` with ``texts``).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..data import chat
from ..data.image import Geometry
from ..data.records import Phrase, Turn
from ..errors import UserError
from ..weights import Loaded

Ids = Sequence[int]
#: Logits that one pass may compute, and pairs of positions whose attention it may (times heads),
#: fp32: half a gigabyte, a gigabyte.
_MOST_LOGITS, _MOST_PAIRS = 1 << 27, 1 << 28
#: Tokens of a text that is read together with others.
_SHORT = 512


class _Pass:
    """Some texts about some images, padded into one batch.

    images: their numbers; R: texts an image; rows: the ids of each row, () where an image has
    fewer texts; ids: i32[B*R T].
    """

    def __init__(
        self, images: list[int], numbers: Sequence[Sequence[int]], texts: Sequence[Sequence[Ids]]
    ) -> None:
        self.images, self._numbers = images, numbers
        self.R = max(map(len, numbers))
        self.rows: list[Ids] = []
        for i, row in zip(images, numbers, strict=True):
            self.rows += [texts[i][r] for r in row] + [()] * (self.R - len(row))
        self.ids = _padded(self.rows)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(row of the batch, image, number of its text) of every text."""
        for b, (i, row) in enumerate(zip(self.images, self._numbers, strict=True)):
            for k, r in enumerate(row):
                yield b * self.R + k, i, r


class Asker:
    """A loaded model with some images in front of it.

    `images` are opened one by one by `open_image`, so that only their tokens stay in memory; one
    that it refuses is left out and told to `refused`, without which its ``UserError`` is raised.
    z_img: [M S D] of the others; geometries: how each was resized.
    """

    def __init__(
        self,
        loaded: Loaded,
        images: Sequence[Any],
        open_image: Callable[[Any], Image.Image],
        batch_size: int = 50,
        refused: Callable[[Any, UserError], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.batch_size = batch_size
        self.geometries: list[Geometry] = []
        self._prompts: dict[str, list[int]] = {}
        chunks, waiting = [], []

        def encode() -> None:
            chunks.append(self.model.project(self.model.encode(mx.array(np.stack(waiting)))))
            mx.eval(chunks[-1])
            waiting.clear()

        for image in images:
            try:
                pixels, geometry = loaded.preprocessor(open_image(image))
            except UserError as error:
                if refused is None:
                    raise
                refused(image, error)
                continue
            waiting.append(pixels)
            self.geometries.append(geometry)
            if len(waiting) == batch_size:
                encode()
        if waiting:
            encode()
        self.z_img = mx.concatenate(chunks) if chunks else mx.zeros((0, 1, 1))
        self.yes, self.no = self.first_token("Yes"), self.first_token("No")
        if self.yes == self.no:
            raise UserError(
                "expected 'Yes' and 'No' to start with different tokens in this tokenizer"
            )

    def first_token(self, answer: str) -> int:
        """The first token the model would say to answer `answer`."""
        question = Turn("user", "?")
        start = len(chat.prompt_ids(self.tokenizer, (question,)))
        return chat.encode(self.tokenizer, (question, Turn("assistant", answer)), ()).ids[start]

    def prompt(self, question: str) -> list[int]:
        """The ids of a question, up to where its answer begins; the same questions recur."""
        if question not in self._prompts:
            self._prompts[question] = chat.prompt_ids(self.tokenizer, (Turn("user", question),))
        return self._prompts[question]

    def _passes(self, texts: Sequence[Sequence[Ids]], logits: bool = False) -> Iterator[_Pass]:
        """Every text of every image, in passes of bounded memory.

        logits: those of every position will be computed, so that fewer fit into one pass. A text
        much longer than the others is read alone, or all would be padded to its length.
        """
        args = self.model.args
        most = _MOST_LOGITS // args.vocab_size if logits else 1 << 62
        pairs = _MOST_PAIRS // args.num_attention_heads
        short = [
            [r for r, ids in enumerate(row) if len(ids) <= _SHORT and len(row) * len(ids) <= most]
            for row in texts
        ]
        for i, row in enumerate(texts):
            for r in sorted(set(range(len(row))) - set(short[i])):
                yield _Pass([i], [[r]], texts)
        # An image of which nothing is asked costs nothing.
        left = [i for i, row in enumerate(short) if row]
        while left:
            n, R, T = 0, 0, 0
            for i in left[: self.batch_size]:
                r = max(R, len(short[i]))
                t = max([T, *(len(texts[i][k]) for k in short[i])])
                rows = (n + 1) * r
                if n and (rows * t > most or rows * t * t > pairs):
                    break
                n, R, T = n + 1, r, t
            yield _Pass(left[:n], [short[i] for i in left[:n]], texts)
            left = left[n:]

    def _look(self, images: Sequence[int], texts: int, order: np.ndarray | None) -> list[Any]:
        shown = np.array(images) if order is None else order[list(images)]
        return self.model.look(self.z_img[mx.array(shown)], texts=texts)

    def next_log_p(
        self,
        texts: Sequence[Sequence[Ids]],
        tokens: Sequence[int],
        order: np.ndarray | None = None,
    ) -> list[list[np.ndarray]]:
        """For each image and each of its texts the log-probabilities f32[tokens] of what comes
        next.

        `order` shows image ``order[i]`` with the texts of image i (the shuffled control).
        """
        out: list[list[Any]] = [[None] * len(row) for row in texts]
        for one in self._passes(texts):
            last = [max(len(ids) - 1, 0) for ids in one.rows]
            found = self._next(one.ids, self._look(one.images, one.R, order), last, tokens)
            for row, i, r in one.places():
                out[i][r] = found[row]
        return out

    def blind_log_p(self, texts: Sequence[Ids], tokens: Sequence[int]) -> list[np.ndarray]:
        """`next_log_p` without any image."""
        out: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        pairs = _MOST_PAIRS // self.model.args.num_attention_heads
        start = 0
        while start < len(order):
            size = 8 * self.batch_size
            while size > 1 and size * len(texts[order[start : start + size][-1]]) ** 2 > pairs:
                size //= 2
            part = order[start : start + size]
            rows = [texts[n] for n in part]
            last = [len(ids) - 1 for ids in rows]
            found = self._next(_padded(rows), self.model.make_cache(), last, tokens)
            for n, log_p in zip(part, found, strict=True):
                out[n] = log_p
            start += size
        return out

    def _next(
        self, ids: np.ndarray, cache: list[Any], last: Sequence[int], tokens: Sequence[int]
    ) -> np.ndarray:
        """f32[B tokens], after the position `last` of each row."""
        logits = self.model.last_logits(mx.array(ids), cache, mx.array(list(last)))[:, 0]
        logits = logits.astype(mx.float32)
        log_p = logits[:, mx.array(list(tokens))] - mx.logsumexp(logits, -1, keepdims=True)
        return np.array(log_p)

    def margins(
        self, texts: Sequence[Sequence[Ids]], order: np.ndarray | None = None
    ) -> list[list[float]]:
        """The logit of Yes minus that of No; see `next_log_p`."""
        found = self.next_log_p(texts, (self.yes, self.no), order)
        return [[float(yes - no) for yes, no in row] for row in found]

    def blind_margins(self, questions: Sequence[str]) -> dict[str, float]:
        """Logit of Yes minus No without any image, for each different question."""
        unique = sorted(set(questions))
        texts = [self.prompt(question) for question in unique]
        found = self.blind_log_p(texts, (self.yes, self.no))
        return {q: float(yes - no) for q, (yes, no) in zip(unique, found, strict=True)}

    def log_likelihood(
        self,
        prompts: str | Sequence[str],
        answers: Sequence[Sequence[str]],
        order: np.ndarray | None = None,
    ) -> list[list[float]]:
        """Mean log-probability per token of given answers, for each image and each of its answers.

        prompts: one for all images, or one for each. The token that ends an answer counts as one
        of it. `order` as in `next_log_p`.
        """
        each = [prompts] * len(answers) if isinstance(prompts, str) else prompts
        encoded = [
            [self._answered(prompt, answer) for answer in row]
            for prompt, row in zip(each, answers, strict=True)
        ]
        out = [[0.0] * len(row) for row in answers]
        for one in self._passes([[e.ids for e in row] for row in encoded], True):
            log_p = self._log_p(one.ids, self._look(one.images, one.R, order))
            for row, i, r in one.places():
                out[i][r] = _mean_over_answer(log_p[row], encoded[i][r])
        return out

    def confidence(
        self, said: Sequence[Sequence[tuple[str, str, Sequence[tuple[int, int]]]]]
    ) -> list[list[tuple[float, ...]]]:
        """For each image and each (prompt, answer, spans of the answer) about it the
        log-probability of the first token of each span, given all before it."""
        encoded = [[self._spoken(*one) for one in row] for row in said]
        out: list[list[tuple[float, ...]]] = [[()] * len(row) for row in said]
        for one in self._passes([[e.ids for e in row] for row in encoded], True):
            log_p = self._log_p(one.ids, self._look(one.images, one.R, None))
            for row, i, r in one.places():
                # A phrase's first position is the one before it, which predicts its first token.
                spans = encoded[i][r].spans
                out[i][r] = tuple(float(log_p[row][span[0]]) for span in spans)
        return out

    def _spoken(self, prompt: str, answer: str, spans: Sequence[tuple[int, int]]) -> chat.Encoded:
        turns = (Turn("user", prompt), Turn("assistant", answer))
        return chat.encode(self.tokenizer, turns, [Phrase(answer[a:b], 1, a, b) for a, b in spans])

    def blind_log_likelihood(self, prompt: str, answers: Sequence[str]) -> np.ndarray:
        """The same without any image, in one pass: f64[answers]."""
        encoded = [self._answered(prompt, answer) for answer in answers]
        log_p = self._log_p(_padded([e.ids for e in encoded]), self.model.make_cache())
        return np.array([_mean_over_answer(*pair) for pair in zip(log_p, encoded, strict=True)])

    def _answered(self, prompt: str, answer: str) -> chat.Encoded:
        turns = (Turn("user", prompt), Turn("assistant", answer))
        return chat.encode(self.tokenizer, turns, ())

    def _log_p(self, ids: np.ndarray, cache: list[Any]) -> np.ndarray:
        """Log-probability of each token but the first, given those before it: f64[B T-1]."""
        logits = self.model(mx.array(ids[:, :-1]), cache=cache).astype(mx.float32)
        said = mx.take_along_axis(logits, mx.array(ids[:, 1:, None]), -1)[..., 0]
        return np.array(said - mx.logsumexp(logits, -1), np.float64)

    def phrase_maps(self, questions: Sequence[Sequence[tuple[str, str]]]) -> list[list[np.ndarray]]:
        """Where each (question, phrase in it) looks: per image, maps f32[L N S].

        Taken at the phrase's own tokens and averaged over them; for each looking layer and head,
        without the null slot.
        """
        placed = [[self._place(*pair) for pair in row] for row in questions]
        out: list[list[Any]] = [[None] * len(row) for row in questions]
        for one in self._passes([[ids for ids, _ in row] for row in placed]):
            rows, cols = [], []
            for row, i, r in one.places():
                rows += [row] * len(placed[i][r][1])
                cols += placed[i][r][1]
            cache = self._look(one.images, one.R, None)
            _, maps = self.model.attend(mx.array(one.ids), cache, mx.array(rows), mx.array(cols))
            found, at = np.array(maps, np.float32), 0
            for _, i, r in one.places():
                columns = placed[i][r][1]
                out[i][r] = found[at : at + len(columns)].mean(0)
                at += len(columns)
        return out

    def _place(self, question: str, noun: str) -> tuple[list[int], list[int]]:
        """Token ids of the question as asked, and the positions of the noun in them."""
        # Not \b, which finds no "C++": both ends of a word need not be letters. The last one, as
        # questions end with what they are about ("Where is the where?").
        found = [*re.finditer(rf"(?<!\w){re.escape(noun)}(?!\w)", question, re.IGNORECASE)][-1:]
        if not found:
            raise ValueError(f"{noun!r} is not in {question!r}")
        phrase = Phrase(found[0].group(), 0, *found[0].span())
        encoded = chat.encode(
            self.tokenizer, (Turn("user", question), Turn("assistant", "Yes")), (phrase,)
        )
        prompt = self.prompt(question)
        # The prompt's last token is guided too when training; it is not the noun.
        own = [column for column in encoded.spans[0] if column < len(prompt) - 1]
        return prompt, own


def _padded(rows: Sequence[Ids]) -> np.ndarray:
    """i32[rows T], each row padded on the right with 0."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
    return ids


def _mean_over_answer(log_p: np.ndarray, encoded: chat.Encoded) -> float:
    mask = np.asarray(encoded.loss_mask[1:], bool)
    return float(log_p[: len(mask)][mask].mean())
