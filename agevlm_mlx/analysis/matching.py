"""Does a model tell the caption of a picture from another? The first analysis of AGE-VLM.

arXiv 2511.17793 finds that models which concatenate image and text hardly separate matching from
mismatching pairs. Its exact definition of similarity is not public; here are four families: the
cosine between text and image states at every layer, raw and centred, how likely the caption is,
and how rather yes than no the model says when asked. Each image meets its own caption, those of
other images (distinct derangements of the sample), and its own with one noun exchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import CAPTION_PROMPT
from ..errors import UserError
from ..evaluation import metrics
from ..evaluation.respondent import Request
from .examples import Example
from .separation import distribution, mean, separation
from .subject import Subject

#: Of other captions whose hidden states are kept: they take layers x width numbers each.
STATES_OF = 7
#: name -> what a higher number says. The blind ones are the same without any image.
SCORES = {
    "log_p": "log p(caption | image), mean per token",
    "pmi": "log p(caption | image) - log p(caption | no image), mean per token",
    "yes": "log of P(yes) / P(no) when asked whether the caption describes the image",
    "yes_pmi": "the same minus what is answered without an image",
    "log_p_blind": "log p(caption | no image): what the words alone give away",
    "yes_blind": "log of P(yes) / P(no) without an image",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """others: captions of other images that each image meets, at most one less than there are.
    question: asks about a "{caption}"; batch_size: images shown together."""

    others: int = 31
    prompt: str = CAPTION_PROMPT
    question: str = "Does this describe the image? {caption}"
    batch_size: int = 8
    boots: int = 1000
    seed: int = 0
    progress: Callable[[str, int, int], None] = field(default=lambda *_: None, compare=False)

    def __post_init__(self) -> None:
        if self.others < 1:
            raise UserError(f"others: expected at least 1 other caption, got {self.others}")
        if "{caption}" not in self.question:
            raise UserError(f"question: expected '{{caption}}' in it, got {self.question!r}")


def partners(count: int, others: int, seed: int) -> np.ndarray:
    """i[count K], K = min(others, count - 1): for each image the images whose captions it meets.

    Every column is a derangement, and no row names an image twice.
    """
    order, place = np.random.default_rng(seed).permutation(count), np.empty(count, int)
    place[order] = np.arange(count)
    steps = np.arange(1, min(others, count - 1) + 1)
    return order[(place[:, None] + steps[None]) % count]


def measure(subject: Subject, examples: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """What `SCORES` and the hidden states separate.

    Returns JSON values: ``images``, ``others`` (K), ``hard`` (how many images have a hard
    negative), ``scores`` and ``layers``. ``scores[name]`` is ``{"random": separation, "hard":
    separation or None, "distribution"}``; ``layers[l]`` is ``{"raw": .., "centred": ..}`` of the
    same for the cosines, l = 0 being the embedding, and [] for a model that does not show its
    states. ``p_yes``: mean P(yes) of each kind of pair. ``rows``: each image's captions and
    scores. ``problems``: images that could not be read, with the reason.
    """
    table = partners(len(examples), settings.others, settings.seed)
    asked = [_captions(examples, n, row) for n, row in enumerate(table)]
    blind = _blind(subject, asked, settings)
    seen: list[tuple[int, np.ndarray, np.ndarray, States | str]] = []
    problems: list[str] = []
    for start in range(0, len(examples), settings.batch_size):
        chunk = range(start, min(start + settings.batch_size, len(examples)))
        bad = subject.show([examples[n].image for n in chunk])
        problems += bad.values()
        good = [n for n in chunk if examples[n].image not in bad]
        seen += zip(good, *_chunk(subject, examples, asked, good, settings), strict=True)
        settings.progress("which caption fits", chunk.stop, len(examples))
    if len(seen) < 2:
        raise UserError(
            f"expected at least 2 images that can be read, got {len(seen)}: {problems[0]}"
        )
    numbers, found = [n for n, *_ in seen], [one for *_, one in seen]
    states = [one for one in found if not isinstance(one, str)]
    silent = [one for one in found if isinstance(one, str)]
    problems += silent[:1]
    width = 1 + table.shape[1] + 1
    scores = {name: np.full((len(seen), width), np.nan) for name in SCORES}
    for at, (n, log_p, yes, _) in enumerate(seen):
        known = np.flatnonzero([text is not None for text in asked[n]])
        base = np.array([blind[asked[n][k]] for k in known])  # pyright: ignore[reportArgumentType]
        for name, values in zip(SCORES, _family(log_p, yes, base), strict=True):
            scores[name][at, known] = values
    draws = metrics.image_draws(len(seen), settings.boots, settings.seed)
    p_yes = 1 / (1 + np.exp(-np.clip(scores["yes"], -60, 60)))
    parts = (("matching", p_yes[:, 0]), ("mismatching", p_yes[:, 1:-1]), ("hard", p_yes[:, -1]))
    return {
        "images": len(seen),
        "others": int(table.shape[1]),
        "hard": int(np.isfinite(scores["log_p"][:, -1]).sum()),
        "prompt": settings.prompt,
        "question": settings.question,
        "scores": {name: _both(values, draws) for name, values in scores.items()},
        "layers": [] if silent else _layers(states, [asked[n] for n in numbers], draws),
        "p_yes": {name: mean(values, draws) for name, values in parts},
        "rows": [
            {
                "image": examples[n].image.name,
                "captions": list(asked[n]),
                **{name: scores[name][at].tolist() for name in SCORES},
            }
            for at, n in enumerate(numbers)
        ],
        "problems": problems,
    }


Captions = tuple[str | None, ...]
#: Hidden states of the captions of an image, and of the image; see `Subject.states`.
States = tuple[np.ndarray, np.ndarray]


def _captions(examples: Sequence[Example], n: int, others: Sequence[int]) -> Captions:
    """The caption of image n, those of the others, and the hard negative; None where there is
    none: another image's caption may be the same text."""
    own = examples[n].caption
    met = [examples[k].caption for k in others]
    different = [text if text.casefold() != own.casefold() else None for text in met]
    return (own, *different, examples[n].hard)


def _given(captions: Captions) -> list[str]:
    return [text for text in captions if text is not None]


def _question(settings: Settings, text: str) -> str:
    return settings.question.replace("{caption}", text)


def _log_odds(options: Sequence[tuple[float, ...]]) -> np.ndarray:
    return np.array([yes - no for yes, no in options])


def _blind(
    subject: Subject, asked: Sequence[Captions], settings: Settings
) -> dict[str, tuple[float, float]]:
    """For each caption its log-likelihood and log-odds of yes without an image."""
    texts = sorted({text for row in asked for text in _given(row)})
    found: dict[str, tuple[float, float]] = {}
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        (log_p,) = subject.log_likelihood([Request(None, settings.prompt)], [part])
        requests = [Request(None, _question(settings, text)) for text in part]
        yes = _log_odds(subject.options(requests, [("yes", "no")] * len(part)))
        found |= dict(zip(part, zip(log_p, yes.tolist(), strict=True), strict=True))
    return found


def _chunk(
    subject: Subject,
    examples: Sequence[Example],
    asked: Sequence[Captions],
    images: Sequence[int],
    settings: Settings,
) -> tuple[list[np.ndarray], list[np.ndarray], list[States | str]]:
    """Of each image shown: log-likelihoods, log-odds of yes, and (text, image) states."""
    if not images:
        return [], [], []
    texts = [_given(asked[n]) for n in images]
    prompts = [Request(examples[n].image, settings.prompt) for n in images]
    log_p = [np.array(row) for row in subject.log_likelihood(prompts, texts)]
    requests = [
        Request(examples[n].image, _question(settings, text))
        for n, row in zip(images, texts, strict=True)
        for text in row
    ]
    yes = _log_odds(subject.options(requests, [("yes", "no")] * len(requests)))
    ends = np.cumsum([len(row) for row in texts])[:-1]
    states = [
        _states(subject, examples[n].image, _given(_few(asked[n])), settings.prompt) for n in images
    ]
    return log_p, np.split(yes, ends), states


def _states(subject: Subject, image: Path, texts: Sequence[str], prompt: str) -> States | str:
    """(text, image) states, or the reason why a model does not show them."""
    try:
        text, seen = subject.states(image, texts, prompt)
    except UserError as error:
        return str(error)
    if seen is None:
        return "its image tokens cannot be told from the text's, so their states are not known"
    return text, seen


def _few(captions: Captions) -> Captions:
    """The captions whose hidden states are kept."""
    return (*captions[:-1][: 1 + STATES_OF], captions[-1])


def _family(log_p: np.ndarray, yes: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, ...]:
    """In the order of `SCORES`; base f[texts 2]: what is known without the image."""
    return log_p, log_p - base[:, 0], yes, yes - base[:, 1], base[:, 0], base[:, 1]


def _both(values: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """values f[n 1+K+1]: own, others, hard."""
    own, other, hard = values[:, 0], values[:, 1:-1], values[:, -1]
    kinds = {"matching": own, "mismatching": other, "hard": hard}
    return {
        "random": separation(own, other, draws),
        "hard": separation(own, hard, draws) if np.isfinite(hard).any() else None,
        "distribution": distribution(kinds),
    }


def _layers(
    states: Sequence[States], asked: Sequence[Captions], draws: metrics.Weights
) -> list[dict[str, Any]]:
    """Cosines at each layer; centred ones with the layer's mean taken off texts and images."""
    images = np.stack([image for _, image in states])  # n layers D
    known = [[text is not None for text in _few(row)] for row in asked]
    texts = np.full((len(states), len(known[0]), *images.shape[1:]), np.nan, np.float32)
    for at, (text, _) in enumerate(states):
        texts[at, known[at]] = text
    out = []
    for layer in range(images.shape[1]):
        v, t = images[:, None, layer].astype(np.float64), texts[:, :, layer].astype(np.float64)
        centred = _cosine(t - np.nanmean(t, (0, 1)), v - v.mean((0, 1)))
        out.append({"raw": _both(_cosine(t, v), draws), "centred": _both(centred, draws)})
    return out


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of f[.. D] and f[.. D]; nan where one of them has no direction (a closed gate)."""
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(length > 1e-12, (a * b).sum(-1) / np.maximum(length, 1e-12), np.nan)
