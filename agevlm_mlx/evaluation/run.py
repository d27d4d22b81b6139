"""Asks a model everything a benchmark holds, with controls, and keeps every answer.

Beside the question about its own image each item is asked about another one (shuffled) and about
none (blind). Images go through in chunks, and each image's partner is in its chunk, so that memory
is bounded and a run that was broken off goes on where it stopped and ends with the same answers
(likelihoods up to rounding, as they are computed beside others).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..errors import UserError
from . import pointing, yes_no
from .answers import AnswerFile, Row
from .benchmark import Benchmark, Item, Kind
from .respondent import Looked, Request, Respondent, Said

#: (items done, all items)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark is run with.

    limit: a random sample of so many units (images, pairs, sets); seed: of the sample, the
    shuffled images and the bootstrap. prompt, max_tokens: in place of the benchmark's own.
    batch_size: images at once. skip_bad: leave out and count what cannot be used.
    """

    limit: int | None = None
    seed: int = 0
    prompt: str | None = None
    max_tokens: int | None = None
    batch_size: int = 50
    boots: int = 1000
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 2), ("max_tokens", 1), ("boots", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag}: expected at least {least}, got {value}")
        if self.max_tokens is not None and self.max_tokens >= 2**31:
            raise UserError(f"--max-tokens: expected less than 2^31, got {self.max_tokens}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed: expected 0 to 2^31 - 1, got {self.seed}")
        if self.prompt is not None and any("\ud800" <= c <= "\udfff" for c in self.prompt):
            raise UserError("--prompt: expected text, got bytes that are not UTF-8")

    def check_prompt(self, items: Sequence[Item]) -> None:
        """``UserError`` for a `prompt` that would ask the same of different questions."""
        kinds = prompted(items)
        asked = {item.prompt for item in items if item.kind in kinds}
        if self.prompt is not None and "{question}" not in self.prompt and len(asked) > 1:
            raise UserError(f"--prompt: expected '{{question}}' in it, got {self.prompt!r}")


def prompted(items: Sequence[Item]) -> tuple[str, ...]:
    """The kinds of items that a prompt is put around: questions with options, or captions where
    there are no such questions. What a phrase is looked for in stays as it is."""
    return ("choice",) if any(i.kind == "choice" for i in items) else ("text", "likelihood")


def sample(items: Sequence[Item], settings: Settings) -> list[Item]:
    """The items of at most `limit` units, in their order."""
    units = list(dict.fromkeys(item.unit for item in items))
    if settings.limit is None or settings.limit >= len(units):
        return list(items)
    rng = np.random.default_rng(settings.seed)
    chosen = {units[n] for n in rng.choice(len(units), settings.limit, replace=False)}
    return [item for item in items if item.unit in chosen]


def digest(items: Sequence[Item]) -> str:
    """A fingerprint of what was asked: two results with the same one are about the same items."""
    told = hashlib.sha256()
    for item in items:
        told.update(repr((item.key, item.kind, item.prompt, item.options, item.phrase)).encode())
    return told.hexdigest()[:16]


def chunks(items: Sequence[Item], images: int) -> Iterator[list[Item]]:
    """The items of about so many images at a time, in their order; last those about no image.

    The images of a unit stay together, and no chunk has a single unit if there are two, since
    each needs another one beside it.
    """
    by_unit: dict[str, list[Path]] = {}
    by_image: dict[Path | None, list[Item]] = {}
    for item in items:
        if item.image is not None and item.image not in by_image:
            by_unit.setdefault(item.unit, []).append(item.image)
        by_image.setdefault(item.image, []).append(item)
    made: list[list[list[Path]]] = [[]]
    for unit in by_unit.values():
        if len(made[-1]) > 1 and sum(map(len, made[-1])) >= images:
            made.append([])
        made[-1].append(unit)
    if len(made) > 1 and len(made[-1]) == 1:
        last = made.pop()
        made[-1] += last
    for units in made:
        if units:
            yield [item for unit in units for image in unit for item in by_image[image]]
    without = by_image.get(None, [])
    for start in range(0, len(without), 8 * images):
        yield without[start : start + 8 * images]


def partners(units: Mapping[Path, str], seed: Sequence[int]) -> dict[Path, Path]:
    """For each image another one, of another unit, at random; none where there is none.

    Within a unit another image may be the very counter-question (MMVP, Winoground).
    """
    rng, images = np.random.default_rng(list(seed)), list(units)
    order = rng.permutation(len(images))

    def clash(k: int, other: int) -> bool:
        return units[images[k]] == units[images[other]]

    for _ in range(100):
        wrong = [k for k, other in enumerate(order) if clash(k, other)]
        if not wrong:
            break
        for k in wrong:
            j = int(rng.integers(len(images)))
            if not clash(k, order[j]) and not clash(j, order[k]):
                order[k], order[j] = order[j], order[k]
    pairs = [(k, other) for k, other in enumerate(order) if not clash(k, other)]
    return {images[k]: images[other] for k, other in pairs}


@dataclass(eq=False)
class _Asked:
    """An item on its way to a row."""

    item: Item
    prompt: str
    partner: Path | None
    row: Row
    left: int = 0

    def ways(self, what: str) -> Iterator[tuple[str, Request]]:
        """Under which name of the row an answer is kept, and what it answers."""
        yield what, Request(self.item.image, self.prompt)
        if self.partner is not None:
            yield f"shuffled_{what}", Request(self.partner, self.prompt)
        if self.item.image is not None:
            yield f"blind_{what}", Request(None, self.prompt)


#: What is asked: the request, and the options it is asked with.
Asked = tuple[Request, tuple[str, ...]]


@dataclass
class Run:
    """One benchmark asked of one model.

    folder: of the data, from which rows name their images. problems: images that could not be
    read and were left out, with `skip_bad`.
    """

    respondent: Respondent
    benchmark: Benchmark
    settings: Settings
    answers: AnswerFile
    folder: Path = Path()
    progress: Progress = lambda done, total: None
    problems: list[str] = field(default_factory=list)
    #: Answers without an image: the same questions recur.
    _blind: dict[tuple[str, Asked], Any] = field(default_factory=dict)
    _prompted: tuple[str, ...] = ()
    _done: int = 0
    _total: int = 0

    def ask(self, items: Sequence[Item]) -> None:
        """Answer what has no answer yet. ``UserError`` for an image that cannot be read, unless
        bad ones are skipped; the answers so far are kept."""
        self._total, self._prompted = len(items), prompted(items)
        self._done = sum(item.key in self.answers.rows for item in items)
        for number, chunk in enumerate(chunks(items, self.settings.batch_size)):
            waiting = [item for item in chunk if item.key not in self.answers.rows]
            if waiting:
                self._ask_chunk(number, chunk, waiting)
                self.answers.sync()
        self._tell()

    def _tell(self) -> None:
        self.progress(self._done, self._total)

    def _add(self, row: Row) -> None:
        self.answers.add(row)
        self._done += 1

    def _ask_chunk(self, number: int, chunk: Sequence[Item], waiting: Sequence[Item]) -> None:
        images = list(dict.fromkeys(item.image for item in chunk if item.image is not None))
        bad = self.respondent.show(images)
        for image, reason in bad.items():
            lost = sum(item.image == image for item in waiting)
            self._done += lost
            if not self.settings.skip_bad:
                raise UserError(f"{reason}; --skip-bad leaves its {lost} items out")
            self.problems.append(f"{reason} ({lost} items)")
        units = {item.image: item.unit for item in reversed(chunk) if item.image is not None}
        good = {image: units[image] for image in images if image not in bad}
        partner: dict[Path | None, Path] = {**partners(good, (self.settings.seed, number))}
        asked = [
            _Asked(item, self._prompt(item), partner.get(item.image), begin_row(item, self.folder))
            for item in waiting
            if item.image not in bad
        ]
        for one in asked:
            if one.partner is not None:
                one.row["shuffled_image"] = shown(one.partner, self.folder)
        by_kind = {kind: [one for one in asked if one.item.kind == kind] for kind in get_args(Kind)}
        self._look(by_kind["look"], chunk)
        self._score(by_kind["choice"], self.respondent.options)
        self._score(by_kind["likelihood"], self.respondent.log_likelihood)
        self._confirm_options(by_kind["likelihood"])
        for one in by_kind["look"] + by_kind["likelihood"]:
            self._add(one.row)
        self._tell()
        short = self.benchmark.max_tokens
        self._say(by_kind["choice"], self.settings.max_tokens or short)
        long = self.benchmark.text_tokens or short
        self._say(by_kind["text"], self.settings.max_tokens or long)

    def _prompt(self, item: Item) -> str:
        if item.kind not in self._prompted:
            return item.prompt
        template = self.settings.prompt or self.benchmark.prompt
        return template.replace("{question}", item.prompt)

    def _look(self, asked: Sequence[_Asked], chunk: Sequence[Item]) -> None:
        """Where phrases look, and for the control where another phrase about the same image does.

        All phrases of an image are asked for, also where only some have no answer yet.
        """
        wanted = {one.item.image for one in asked}
        items = [item for item in chunk if item.kind == "look" and item.image in wanted]
        requests = [Request(item.image, item.prompt) for item in items]
        found = self.respondent.look(requests, [i.phrase for i in items]) if items else []
        looked = dict(zip((item.key for item in items), found, strict=True))
        for one in asked:
            alike = [i for i in items if i.image == one.item.image]
            start = alike.index(one.item)
            others = (i for i in alike[start:] + alike[:start] if i.phrase != one.item.phrase)
            other = next(others, None)
            one.row["look"] = _measured(one.item, looked[one.item.key])
            if other is not None:
                one.row["shuffled_phrase"] = other.phrase
                one.row["shuffled_look"] = _measured(one.item, looked[other.key])

    def _score(
        self,
        asked: Sequence[_Asked],
        ask: Callable[[list[Request], list[tuple[str, ...]]], Sequence[Sequence[float]]],
    ) -> None:
        """Log-probabilities of the options."""
        places = self._places(asked, "scores")
        if places:
            found = ask([request for request, _ in places], [options for _, options in places])
            for wanted, scores in zip(list(places), found, strict=True):
                if not np.isfinite(scores).all():
                    name = self.respondent.about["path"]
                    raise UserError(
                        f"{name}: expected likelihoods, got {list(scores)} for "
                        f"{wanted[0].prompt[:60]!r}; its weights are damaged, or its precision is "
                        "too low"
                    )
                self._keep(places, wanted, list(scores), "scores")

    def _say(self, asked: Sequence[_Asked], max_tokens: int) -> None:
        """Answers in words; each row is written as soon as it has all of its own."""
        places = self._places(asked, "answer")
        for one in asked:
            if not one.left:
                self._add(one.row)
        wanted = list(places)
        said = self.respondent.generate([request for request, _ in wanted], max_tokens)
        for n, text in said if wanted else ():
            for one in self._keep(places, wanted[n], text, "answer"):
                if not one.left:
                    self._confide(one)
                    self._add(one.row)
                    self._tell()

    def _confide(self, one: _Asked) -> None:
        """Add how sure the model was of what its answer mentions, and what it says when it is
        asked about that, where these are wanted."""
        item = one.item
        if item.kind != "text" or item.image is None:
            return
        said = one.row["answer"]
        if self.benchmark.mentions and (spans := tuple(self.benchmark.mentions(item, said))):
            request = Request(item.image, self._prompt(item))
            found = self.respondent.confidence([Said(request, said, spans)])[0]
            one.row["answer_log_p"] = list(found)
        if odds := self._confirmed([(item, said)])[0]:
            one.row["answer_confirmed"] = odds

    def _confirm_options(self, asked: Sequence[_Asked]) -> None:
        """Add how well each option is confirmed, where all have something to ask about."""
        found = iter(self._confirmed([(one.item, o) for one in asked for o in one.item.options]))
        for one in asked:
            odds = [next(found) for _ in one.item.options]
            if all(odds):
                one.row["scores_confirmed"] = [min(values) for values in odds]

    def _confirmed(self, texts: Sequence[tuple[Item, str]]) -> list[list[float]]:
        """For each text about an item's image log P(yes) - log P(no) of every question about what
        it says; [] where there is none."""
        confirm = self.benchmark.confirm
        questions = [confirm(item, text) if confirm and item.image else () for item, text in texts]
        requests = [
            Request(item.image, question)
            for (item, _), own in zip(texts, questions, strict=True)
            for question in own
        ]
        if not requests:
            return [[] for _ in texts]
        odds = iter(self.respondent.options(requests, [yes_no.OPTIONS] * len(requests)))
        return [[yes - no for yes, no in islice(odds, len(own))] for own in questions]

    def _places(self, asked: Sequence[_Asked], what: str) -> dict[Asked, list[tuple[_Asked, str]]]:
        """Every different thing to ask, and where its answer belongs."""
        places: dict[Asked, list[tuple[_Asked, str]]] = {}
        for one in asked:
            options = one.item.options if what == "scores" else ()
            for name, request in one.ways(what):
                known = self._blind.get((what, (request, options)))
                if known is None:
                    places.setdefault((request, options), []).append((one, name))
                    one.left += what == "answer"
                else:
                    one.row[name] = known
        return places

    def _keep(
        self, places: dict[Asked, list[tuple[_Asked, str]]], asked: Asked, value: Any, what: str
    ) -> list[_Asked]:
        """Put an answer where it belongs."""
        if asked[0].image is None:
            self._blind[what, asked] = value
        for one, name in places[asked]:
            one.row[name] = value
            one.left -= what == "answer"
        return [one for one, _ in places[asked]]


def begin_row(item: Item, folder: Path) -> Row:
    """The part of a row that says what was asked and what is right; `scoring.as_item` reads it."""
    row: Row = {
        "key": item.key,
        "unit": item.unit,
        "image": None if item.image is None else shown(item.image, folder),
        "image_sha256": None if item.image is None else _sha256(item.image),
        "kind": item.kind,
        "prompt": item.prompt,
        "label": item.label,
        "options": list(item.options),
        "about": dict(item.about),
    }
    looked = {"phrase": item.phrase, "mask": item.mask_key}
    return row | (looked if item.kind == "look" else {})


def _sha256(image: Path) -> str | None:
    """The first 16 hex digits; None for a file that is gone."""
    try:
        about = image.stat()
        return _digest_of(image, about.st_size, about.st_mtime_ns)
    except OSError:
        return None


@cache
def _digest_of(image: Path, size: int, changed: int) -> str:
    with open(image, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


#: What of a row decides its answer; the rest may be mended without asking again.
_ASKED = ("kind", "prompt", "options", "phrase", "mask", "image", "image_sha256")


def still_asked(row: Row, item: Item, folder: Path) -> bool:
    """Whether a kept row is the answer to this item, whatever is right about it now."""
    now = begin_row(item, folder)
    return all(row.get(name) == now.get(name) for name in _ASKED)


def shown(image: Path, folder: Path) -> str:
    """An image's name in its folder; one from a table goes by its hash."""
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.name


def _measured(item: Item, looked: Looked | None) -> dict[str, Any]:
    """A look against the item's mask; {} where the model cannot say, or sees nothing of it."""
    if looked is None or item.mask is None:
        return {}
    found = pointing.measures(looked.attention, item.mask(), looked.geometry, looked.null)
    if found:
        mean = looked.attention.mean((0, 1)).ravel()
        found["map"] = [round(float(value), 5) for value in mean]
    return found
