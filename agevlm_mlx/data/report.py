"""What is in a data set, counted: the numbers of `agevlm data check`, as data and as text."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import Problem

#: Problems, phrases and odd pictures that are shown one by one.
SHOWN, FREQUENT, ODD = 20, 12, 5
_BAR = 30
#: A picture this many times longer than wide, or the reverse, is odd; so is one with a side
#: below this many pixels.
_STRETCHED, _SMALL_SIDE = 4.0, 16


@dataclass(frozen=True)
class Picture:
    """The size of a picture, upright, and where it lies."""

    path: str
    width: int
    height: int

    @property
    def odd(self) -> float:
        """How odd its shape is: above 1 it is worth a look."""
        long, short = max(self.width, self.height), min(self.width, self.height)
        return max(long / short / _STRETCHED, _SMALL_SIDE / short)

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.path}"


@dataclass
class Pictures:
    """The pictures that could be opened, and the files that could not."""

    opened: int = 0
    broken: int = 0
    missing: int = 0
    #: Files whose bytes another picture has, too; None: not compared.
    copies: int | None = None
    #: The same picture under two names, a few of them.
    copied: list[tuple[str, str]] = field(default_factory=list)
    smallest: Picture | None = None
    largest: Picture | None = None
    odd: int = 0
    oddest: list[Picture] = field(default_factory=list)

    def add(self, picture: Picture) -> None:
        """Count one that could be opened."""
        self.opened += 1
        area = picture.width * picture.height
        if self.smallest is None or area < self.smallest.width * self.smallest.height:
            self.smallest = picture
        if self.largest is None or area > self.largest.width * self.largest.height:
            self.largest = picture
        if picture.odd > 1:
            self.odd += 1
            self.oddest = sorted([*self.oddest, picture], key=lambda p: -p.odd)[:ODD]


@dataclass
class Texts:
    """The records' texts, in tokens."""

    records: int = 0
    turns: int = 0
    #: Tokens of a whole conversation -> how many have so many.
    lengths: Counter[int] = field(default_factory=Counter)
    #: Tokens that the language model takes at most; None: it does not say.
    limit: int | None = None
    too_long: int = 0
    #: Texts that cannot be tokenised, or have a phrase that no token covers.
    unaligned: int = 0
    copies: int = 0
    yes: int = 0
    no: int = 0
    answers: int = 0

    def at(self, share: float) -> int:
        """The length that this share of the texts does not exceed."""
        left = share * sum(self.lengths.values())
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left <= 0:
                return length
        return max(self.lengths, default=0)

    def histogram(self) -> list[tuple[int, int]]:
        """(at most so many tokens, texts) in steps of powers of two."""
        bins: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bins[1 << max(length - 1, 0).bit_length()] += count
        if not bins:
            return []
        first, last = min(bins).bit_length(), max(bins).bit_length()
        return [(1 << k - 1, bins[1 << k - 1]) for k in range(first, last + 1)]


@dataclass
class Phrases:
    """Words of the texts that are somewhere in their picture."""

    total: int = 0
    #: Those with a mask of their own.
    masks: int = 0
    #: Records with a phrase that has a box, a point or a mask.
    guided_records: int = 0
    #: With a place that is not in the picture, or a mask that is not of it.
    misplaced: int = 0
    #: Whose mask guides nothing on the token grid; for boxes it is the box that is measured.
    too_small: int = 0
    too_large: int = 0
    #: Rows and columns of that grid.
    grid: tuple[int, int] = (0, 0)
    frequent: Counter[str] = field(default_factory=Counter)


@dataclass
class Labels:
    """What a teacher's store has for this data."""

    path: str
    missing_images: int = 0
    missing_prompts: int = 0
    other_files: int = 0
    #: What else is wrong with it, in sentences.
    problems: list[str] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        """Whether training can use it."""
        lacks = self.missing_images or self.missing_prompts or self.other_files
        return not (lacks or self.problems)


@dataclass
class Report:
    """All that is known of a data set after a check."""

    data: str
    records: int
    images: int
    kinds: Mapping[str, int]
    problems: list[Problem] = field(default_factory=list)
    excluded: int = 0
    text_only: int = 0
    #: Images that were looked at, when these are not all.
    looked_at: int | None = None
    decoded: bool = True
    pictures: Pictures = field(default_factory=Pictures)
    texts: Texts = field(default_factory=Texts)
    phrases: Phrases = field(default_factory=Phrases)
    labels: Labels | None = None

    @property
    def fails(self) -> bool:
        """Whether training on it ends with an error where ``data.on_error`` is "stop"."""
        return bool(self.problems or not self.records or (self.labels and not self.labels.fit))

    @property
    def advice(self) -> str:
        """One sentence: what to do now."""
        if not self.records:
            return "training fails: there is nothing to train on; mend the records or name others"
        if self.labels and not self.labels.fit:
            also = ", and mend what is listed as bad" if self.problems else ""
            return (
                "training fails: the store does not fit the data; run `agevlm teach` on it for "
                f"your model{also}"
            )
        if self.problems:
            return (
                f"training fails: mend the {_n(len(self.problems), 'problem')} above, or set "
                'data.on_error="skip" to leave them out'
            )
        if warnings := list(self.warnings()):
            return f"training can start; first look at the {_n(len(warnings), 'warning')} above"
        return "training can start"

    def warnings(self) -> Iterator[str]:
        """What does not stop training and yet is worth a look."""
        texts, pictures, phrases = self.texts, self.pictures, self.phrases
        if texts.too_long:
            yield (
                f"{_n(texts.too_long, 'text')} longer than the {texts.limit:,} tokens that the "
                "language model was made for"
            )
        if texts.copies:
            yield f"{_n(texts.copies, 'record')} with the same text on the same image as another"
        if pictures.copies:
            yield f"{_n(pictures.copies, 'image file')} identical to another image"
        if pictures.odd:
            yield f"{_n(pictures.odd, 'picture')} of an odd shape"
        if phrases.too_small or phrases.too_large:
            yield (
                f"{_n(phrases.too_small, 'phrase')} too small and {phrases.too_large:,} too large "
                f"to guide on a grid of {phrases.grid[0]}x{phrases.grid[1]} tokens"
            )
        if self.excluded:
            yield f"{_n(self.excluded, 'record')} left out, about images of an exclusion list"
        if self.text_only:
            yield f"{_n(self.text_only, 'record')} left out, about no image"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        texts, phrases, pictures = self.texts, self.phrases, self.pictures
        labels = self.labels
        return {
            "data": self.data,
            "fails": self.fails,
            "advice": self.advice,
            "warnings": list(self.warnings()),
            "records": self.records,
            "images": self.images,
            "looked_at": self.images if self.looked_at is None else self.looked_at,
            "decoded": self.decoded,
            "kinds": dict(self.kinds),
            "left_out": {
                "bad": len(self.problems),
                "excluded": self.excluded,
                "text_only": self.text_only,
            },
            "problems": [vars(problem) for problem in self.problems[:SHOWN]],
            "pictures": vars(pictures)
            | {name: _plain(getattr(pictures, name)) for name in ("smallest", "largest")}
            | {"oddest": [vars(picture) for picture in pictures.oddest]},
            "texts": vars(texts)
            | {
                "lengths": {str(n): texts.lengths[n] for n in sorted(texts.lengths)},
                "histogram": texts.histogram(),
            },
            "phrases": vars(phrases) | {"frequent": phrases.frequent.most_common(FREQUENT)},
            "store": None if labels is None else vars(labels) | {"fit": labels.fit},
        }

    def lines(self) -> Iterator[str]:
        """The report for a terminal."""
        yield f"{self.data}: {_n(self.records, 'record')} about {_n(self.images, 'image')}"
        if self.looked_at is not None:
            yield f"  looked at {_n(self.looked_at, 'image')}, evenly spread, and their texts"
        yield from self._pictures()
        yield from self._texts()
        yield from self._phrases()
        yield from self._labels()
        if self.problems:
            yield f"bad: {_n(len(self.problems), 'problem')}"
            yield from (f"  {p.where}: {p.problem}" for p in self.problems[:SHOWN])
            more = len(self.problems) - SHOWN
            if more > 0:
                yield f"  and {more:,} more; --bad FILE lists all"
        warnings = list(self.warnings())
        if warnings:
            yield "warnings:"
            yield from (f"  {warning}" for warning in warnings)
        yield self.advice

    def _pictures(self) -> Iterator[str]:
        found = self.pictures
        how = "decoded" if self.decoded else "opened (not decoded)"
        yield (
            f"pictures: {found.opened:,} {how}, {found.broken:,} broken, {found.missing:,} missing"
        )
        if found.smallest is not None and found.largest is not None:
            yield f"  smallest {found.smallest}"
            yield f"  largest  {found.largest}"
        yield from (f"  odd      {picture}" for picture in found.oddest)
        yield from (f"  same     {one} = {other}" for one, other in found.copied)

    def _texts(self) -> Iterator[str]:
        found = self.texts
        if not found.records:
            return
        yield f"texts: {_n(found.records, 'record')}, {_n(found.turns, 'turn')}"
        yield from _table(sorted(self.kinds.items(), key=lambda kind: -kind[1])[:FREQUENT])
        if len(self.kinds) > FREQUENT:
            yield f"  and {_n(len(self.kinds) - FREQUENT, 'other kind')}"
        if found.answers:
            yes, no = found.yes / found.answers, found.no / found.answers
            yield f"  answers: {yes:.1%} yes, {no:.1%} no, {1 - yes - no:.1%} other"
        if found.unaligned:
            yield f"  {_n(found.unaligned, 'text')} whose phrases cannot be found in the tokens"
        if found.lengths:
            limit = f", the language model takes {found.limit:,}" if found.limit else ""
            yield (
                f"tokens: median {found.at(0.5):,}, 95 % up to {found.at(0.95):,}, longest "
                f"{max(found.lengths):,}{limit}"
            )
            yield from _table([(f"<= {edge:,}", count) for edge, count in found.histogram()])

    def _phrases(self) -> Iterator[str]:
        found, records = self.phrases, self.texts.records
        if not found.total:
            yield "phrases: none; guidance of attention has nothing to learn from"
            return
        share = found.guided_records / max(records, 1)
        yield (
            f"phrases: {found.total:,}; {_n(found.guided_records, 'record')} ({share:.1%}) with a "
            "box, point or mask to guide"
        )
        if found.guided_records and not found.masks and self.labels is None:
            yield "  none has a mask: they guide once `agevlm teach` has labelled them"
        if found.misplaced:
            yield f"  {found.misplaced:,} outside their picture, or with a mask that is not of it"
        yield from _table(found.frequent.most_common(FREQUENT))

    def _labels(self) -> Iterator[str]:
        found = self.labels
        if found is None:
            return
        yield f"store: {found.path} {'fits' if found.fit else 'does not fit'}"
        if found.missing_images:
            yield f"  {_n(found.missing_images, 'image')} without labels"
        if found.missing_prompts:
            yield f"  {_n(found.missing_prompts, 'box or point', 'boxes or points')} without a mask"
        if found.other_files:
            yield f"  {_n(found.other_files, 'image')} changed since the teacher saw them"
        yield from (f"  {problem}" for problem in found.problems)


def _n(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _plain(picture: Picture | None) -> dict[str, Any] | None:
    return None if picture is None else vars(picture)


def _table(rows: list[tuple[str, int]]) -> Iterator[str]:
    """Names and counts with bars in proportion."""
    most = max((count for _, count in rows), default=0)
    width = min(max((len(name) for name, _ in rows), default=0), 32)
    for name, count in rows:
        bar = "#" * round(_BAR * count / max(most, 1))
        yield f"  {_short(name, width):<{width}}  {count:>9,}  {bar}".rstrip()


def _short(text: str, width: int) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else text[: width - 3] + "..."
