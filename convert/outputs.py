"""How far apart two models' outputs are on the same inputs.

The inputs need no files: held-out pictures of the embedded benchmark with their captions,
questions and answers, and random tokens, which also reach the rows of the vocabulary that no
text does. The same seeds give the same inputs every time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from agevlm_mlx.config import read_json
from agevlm_mlx.data.chat import encode
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.data.records import Turn
from agevlm_mlx.data.scene_texts import scene_records
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import assign
from agevlm_mlx.models.vision import VISION_ENCODERS, build_encoder
from agevlm_mlx.weights import Loaded, read_weights

#: Of the pictures, which no recipe trains on ("val"), and of the random tokens.
_SEED = 20_260
#: Texts that are asked about a picture: its caption and these many of its questions.
_QUESTIONS = 7
#: Pictures that are looked at together, fewer where their logits would be more than so many;
#: about as many tokens has a text.
_BATCH, _LOGITS, _ROW = 20, 1 << 28, 64
#: Rows and length of the random tokens.
_RANDOM = (4, 32)


@dataclass
class Difference:
    """Next-token predictions of B beside those of A, over all `positions` of a case.

    top1: share where both choose the same token. largest: absolute difference of a logit.
    kl: mean Kullback-Leibler divergence of B's distribution from A's, in nats.
    """

    case: str
    positions: int = 0
    top1: float = 0.0
    largest: float = 0.0
    kl: float = 0.0

    def add(self, a: mx.array, b: mx.array) -> None:
        """Count the logits [P V] of further positions."""
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        gap = mx.abs(a - b)
        # A number against none (or against infinity) is a difference of any size.
        gap = mx.where((a == b) | (mx.isnan(a) & mx.isnan(b)), 0.0, gap)
        gap = mx.where(mx.isnan(gap), mx.inf, gap)
        p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
        same = mx.sum(a.argmax(-1) == b.argmax(-1))
        kl = (mx.exp(p) * (p - q)).sum(-1).mean()
        old, new = self.positions, self.positions + len(a)
        self.top1 = (self.top1 * old + cast(int, same.item())) / new
        self.kl = (self.kl * old + cast(float, kl.item()) * len(a)) / new
        self.largest = max(self.largest, cast(float, gap.max().item()))
        self.positions = new


def pictures(n: int) -> Iterator[tuple[Image.Image, list[tuple[Turn, ...]]]]:
    """`n` held-out scenes, each with its caption and some questions with answers."""
    for index in range(n):
        scene = make_scene(_SEED, "val", index)
        rng = np.random.default_rng([_SEED, index])
        caption, *questions = scene_records(scene, str(index), "", rng)
        chosen = rng.permutation(len(questions))[:_QUESTIONS]
        texts = [caption, *(questions[i] for i in chosen)]
        yield Image.fromarray(scene.image), [_turns(text) for text in texts]


def _turns(record: dict[str, Any]) -> tuple[Turn, ...]:
    roles: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
    return tuple(
        Turn(roles[m["from"]], m["value"].replace("<image>\n", "")) for m in record["conversations"]
    )


def compare_logits(a: Loaded, b: Loaded, n: int) -> list[Difference]:
    """Teacher-forced, at the positions that predict a token of an answer, over `n` pictures with
    and without seeing them; and at every position of random tokens.

    Each model prepares the pictures in its own way, A's tokenizer encodes for both.
    ``UserError`` when vocabularies or image sizes differ.
    """
    _same("vocab_size", *(m.model.args.vocab_size for m in (a, b)))
    _same("image_size", *(m.preprocessor.image_size for m in (a, b)))
    seen, blind, random = map(
        Difference, ("answers, image seen", "answers, text alone", "random tokens, image seen")
    )
    vocabulary = a.model.args.vocab_size
    size = max(1, min(_BATCH, _LOGITS // (vocabulary * _ROW * (1 + _QUESTIONS))))
    held_out = pictures(n)
    for start in range(0, n, size):
        images, groups = zip(*islice(held_out, size), strict=True)
        pixels = [mx.array(np.stack([m.preprocessor(i)[0] for i in images])) for m in (a, b)]
        if start == 0:
            noise = mx.array(np.random.default_rng(_SEED).integers(0, vocabulary, _RANDOM))
            random.add(
                *(
                    _logits(m.model, p[:1], noise).flatten(0, 1)
                    for m, p in zip((a, b), pixels, strict=True)
                )
            )
        ids, answered = _batch(a.tokenizer, [text for texts in groups for text in texts])
        seen.add(*(_logits(m.model, p, ids)[answered] for m, p in zip((a, b), pixels, strict=True)))
        blind.add(*(m.model(ids)[answered] for m in (a, b)))
    return [seen, blind, random]


def _logits(model: Any, pixels: mx.array, ids: mx.array) -> mx.array:
    z_img = model.project(model.encode(pixels))
    return model(ids, cache=model.look(z_img, texts=len(ids) // len(pixels)))


def _batch(tokenizer: Any, texts: list[tuple[Turn, ...]]) -> tuple[mx.array, tuple]:
    """ids [R T], padded at the end, and the (rows, columns) that predict an answer's token."""
    rows = [encode(tokenizer, turns, ()) for turns in texts]
    ids = np.zeros((len(rows), max(len(row.ids) for row in rows)), np.int32)
    at: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = row.ids
        at += [(r, c - 1) for c, counts in enumerate(row.loss_mask) if counts and c]
    return mx.array(ids), tuple(mx.array(axis) for axis in zip(*at, strict=True))


def compare_tokens(a: Path, b: Path, n: int) -> tuple[float, float]:
    """Two encoder folders on `n` pictures: the largest absolute difference of a value, and that
    of a token relative to A's largest value in it."""
    encoders, preprocessors = [], []
    for folder in (a, b):
        encoder = build_encoder(read_json(folder / "config.json"))
        assign(encoder, read_weights(folder), folder)
        encoders.append(encoder)
        path = folder / "preprocessor_config.json"
        preprocessors.append(Preprocessor.from_dict(read_json(path), str(path)))
    _same("image_size", *(p.image_size for p in preprocessors))
    _same("grid", *(e.grid for e in encoders))
    _same("width", *(e.width for e in encoders))
    largest = relative = 0.0
    for picture, _ in pictures(n):
        x, y = (
            e(mx.array(p(picture)[0])[None]).astype(mx.float32)
            for e, p in zip(encoders, preprocessors, strict=True)
        )
        gap = mx.abs(x - y).max(-1)
        gap = mx.where(mx.isnan(gap), mx.inf, gap)
        largest = max(largest, cast(float, gap.max().item()))
        relative = max(relative, cast(float, (gap / mx.abs(x).max(-1)).max().item()))
    return largest, relative


def is_encoder(folder: Path) -> bool:
    """Whether this is a folder that `agevlm-convert vision` made."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in VISION_ENCODERS


def _same(what: str, a: object, b: object) -> None:
    if a != b:
        raise UserError(
            f"{what}: A has {a} and B has {b}; outputs can only be compared where they are the same"
        )
