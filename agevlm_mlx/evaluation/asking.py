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
Step = Callable[[], None]


class Asker:
    """A loaded model with the images of a benchmark in front of it.

    `images` are opened one by one by `open_image`, so that only their tokens stay in memory.
    """

    def __init__(
        self,
        loaded: Loaded,
        images: Sequence[Any],
        open_image: Callable[[Any], Image.Image],
        batch_size: int = 50,
        step: Step = lambda: None,
    ) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.batch_size = batch_size
        self.geometries: list[Geometry] = []
        self._prompts: dict[str, list[int]] = {}
        chunks = []
        for start in range(0, len(images), batch_size):
            pairs = [loaded.preprocessor(open_image(i)) for i in images[start : start + batch_size]]
            self.geometries += [geometry for _, geometry in pairs]
            pixels = mx.array(np.stack([pixels for pixels, _ in pairs]))
            chunks.append(self.model.project(self.model.encode(pixels)))
            mx.eval(chunks[-1])
            step()
        self._z_img = mx.concatenate(chunks)
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

    def _batches(self, texts: Sequence[Sequence[Ids]]) -> Iterator[tuple[range, int, np.ndarray]]:
        """Image numbers, texts per image R, and ids i32[B*R T] padded on the right with 0."""
        for start in range(0, len(texts), self.batch_size):
            images = range(start, min(start + self.batch_size, len(texts)))
            R = max(len(texts[i]) for i in images)
            if not R:
                continue
            rows = [[*texts[i], *[()] * (R - len(texts[i]))] for i in images]
            yield images, R, _padded([ids for row in rows for ids in row])

    def _look(self, images: range, texts: int, order: np.ndarray | None) -> list[Any]:
        shown = np.arange(images.start, images.stop) if order is None else order[list(images)]
        return self.model.look(self._z_img[mx.array(shown)], texts=texts)

    def next_logits(
        self,
        texts: Sequence[Sequence[Ids]],
        order: np.ndarray | None = None,
        step: Step = lambda: None,
    ) -> list[list[tuple[float, int]]]:
        """For each image and each of its texts: (logit of Yes minus No, most likely token) next.

        `order` shows image ``order[i]`` with the texts of image i (the shuffled control).
        """
        out: list[list[tuple[float, int]]] = [[] for _ in texts]
        for images, R, ids in self._batches(texts):
            logits = self.model(mx.array(ids), cache=self._look(images, R, order))
            last = np.array(
                [len(texts[i][r]) - 1 if r < len(texts[i]) else 0 for i in images for r in range(R)]
            )
            margin, best = self._read(logits[mx.arange(len(last)), mx.array(last)])
            for b, i in enumerate(images):
                rows = range(b * R, b * R + len(texts[i]))
                out[i] = [(float(margin[r]), int(best[r])) for r in rows]
            step()
        return out

    def _read(self, logits: mx.array) -> tuple[np.ndarray, np.ndarray]:
        logits = logits.astype(mx.float32)
        margin, best = logits[:, self.yes] - logits[:, self.no], mx.argmax(logits, -1)
        mx.eval(margin, best)
        return np.array(margin), np.array(best)

    def blind_margin(self, questions: Sequence[str], step: Step = lambda: None) -> dict[str, float]:
        """Logit of Yes minus No without any image, for each different question."""
        unique, margins = sorted(set(questions)), {}
        for start in range(0, len(unique), 8 * self.batch_size):
            part = unique[start : start + 8 * self.batch_size]
            rows = [self.prompt(question) for question in part]
            logits = self.model(mx.array(_padded(rows)), cache=self.model.make_cache())
            last = mx.array([len(row) - 1 for row in rows])
            margin, _ = self._read(logits[mx.arange(len(rows)), last])
            margins |= dict(zip(part, margin.tolist(), strict=True))
            step()
        return margins

    def answers(
        self,
        texts: Sequence[Sequence[Ids]],
        firsts: Sequence[Sequence[int]],
        max_tokens: int = 8,
        step: Step = lambda: None,
    ) -> list[list[str]]:
        """The greedy answers to prompts of mixed lengths whose first tokens are known.

        Answers are a word or two, so each further token is one more padded pass over the
        answers that have not ended.
        """
        ends = set(self.tokenizer.eos_token_ids)
        said = [[[first] for first in row] for row in firsts]
        for _ in range(max_tokens - 1):
            open_rows = [
                [r for r, tokens in enumerate(row) if tokens[-1] not in ends] for row in said
            ]
            if not any(open_rows):
                break
            longer = [
                [[*texts[i][r], *said[i][r]] for r in rows] for i, rows in enumerate(open_rows)
            ]
            after = self.next_logits(longer, step=step)
            for i, rows in enumerate(open_rows):
                for r, (_, token) in zip(rows, after[i], strict=True):
                    said[i][r].append(token)
        return [[self._text(tokens, ends) for tokens in row] for row in said]

    def _text(self, tokens: Sequence[int], ends: set[int]) -> str:
        kept = []
        for token in tokens:
            if token in ends:
                break
            kept.append(token)
        return self.tokenizer.decode(kept).strip()

    def greedy(self, question: str, max_tokens: int, step: Step = lambda: None) -> list[str]:
        """The greedy answer to one question for every image, decoded in batches with a cache."""
        prompt, ends = np.array(self.prompt(question), np.int32), set(self.tokenizer.eos_token_ids)
        texts = []
        for start in range(0, self._z_img.shape[0], self.batch_size):
            images = range(start, min(start + self.batch_size, self._z_img.shape[0]))
            cache = self._look(images, 1, None)
            tokens = mx.array(np.broadcast_to(prompt, (len(images), len(prompt))))
            said = np.zeros((len(images), 0), np.int32)
            ended = np.zeros(len(images), bool)
            while said.shape[1] < max_tokens and not ended.all():
                best = mx.argmax(self.model(tokens, cache=cache)[:, -1], -1)
                said = np.concatenate([said, np.array(best)[:, None]], 1)
                ended |= np.isin(said[:, -1], list(ends))
                tokens = best[:, None]
            texts += [self._text(row, ends) for row in said.tolist()]
            step()
        return texts

    def log_likelihood(
        self,
        prompt: str,
        answers: Sequence[Sequence[str]],
        order: np.ndarray | None = None,
        step: Step = lambda: None,
    ) -> np.ndarray:
        """Mean log-probability per token of given answers: f64[images answers].

        The token that ends an answer counts as one of it. `order` as in `next_logits`.
        """
        encoded = [[self._answered(prompt, answer) for answer in row] for row in answers]
        out = np.zeros((len(answers), len(answers[0]) if answers else 0))
        for images, R, ids in self._batches([[e.ids for e in row] for row in encoded]):
            log_p = self._log_p(ids, self._look(images, R, order))
            for b, i in enumerate(images):
                for r, one in enumerate(encoded[i]):
                    out[i, r] = _mean_over_answer(log_p[b * R + r], one)
            step()
        return out

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

    def noun_maps(
        self, questions: Sequence[Sequence[tuple[str, str]]], step: Step = lambda: None
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Where each (question, noun in it) looks: per image, pairs of maps f64[S].

        Taken at the noun's own tokens and averaged over them and the layers; the first map is
        the mean over all heads, the second over the first half of them.
        """
        placed = [[self._place(*pair) for pair in row] for row in questions]
        out: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in questions]
        for images, R, ids in self._batches([[ids for ids, _ in row] for row in placed]):
            rows, cols, owner = [], [], []
            for b, i in enumerate(images):
                for r, (_, columns) in enumerate(placed[i]):
                    rows += [b * R + r] * len(columns)
                    cols += columns
                    owner += [(i, r)] * len(columns)
            cache = self._look(images, R, None)
            _, maps = self.model.attend(mx.array(ids), cache, mx.array(rows), mx.array(cols))
            half = max(1, maps.shape[2] // 2)
            pairs = mx.stack([maps.mean((1, 2)), maps[:, :, :half].mean((1, 2))], 1)
            pairs = np.array(pairs, np.float64)
            where = np.array(owner)
            for i in images:
                for r in range(len(placed[i])):
                    mine = pairs[(where == (i, r)).all(1)].mean(0)
                    out[i].append((mine[0], mine[1]))
            step()
        return out

    def _place(self, question: str, noun: str) -> tuple[list[int], list[int]]:
        """Token ids of the question as asked, and the positions of the noun in them."""
        # Not \b, which finds no "C++": both ends of a word need not be letters.
        found = re.search(rf"(?<!\w){re.escape(noun)}(?!\w)", question, re.IGNORECASE)
        if found is None:
            raise ValueError(f"{noun!r} is not in {question!r}")
        phrase = Phrase(found.group(), 0, *found.span())
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
