"""Training batches: images, the texts drawn for them, and what their phrases should look at.

A batch is a pure function of the seed and the step number, so that a resumed run sees
exactly what an undisturbed one would have seen. Everything here may be called by several threads.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .bounded import Bounded
from .chat import POSITIONS, Encoded, Position, encode
from .guidance import Guidance, Targets
from .image import Geometry, Preprocessor, load_image
from .image_files import image_bytes
from .order import Order
from .packing import packed_rows
from .record_set import Records
from .records import Phrase, Problem, Record
from .text_rows import Text, TextGroup, hide, round_up, text_group

__all__ = ["Batch", "Batches", "GroupSpec", "TextGroup"]

#: Memory for decoded pictures and for tokenised texts.
_PIXEL_BYTES, _TEXT_BYTES = 1 << 30, 1 << 27
#: With ``on_error = "skip"``: so many images in a row that cannot be used are no accident.
_MOST_SKIPPED = 1000
#: With `shuffle_masks`: so many images without a mask that guides are none either.
_MOST_DRAWN = 200


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """`n` texts an image, drawn from these kinds; texts of one group are padded together."""

    kinds: tuple[str, ...]
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1 or not self.kinds:
            raise UserError(
                f"texts: expected kinds and n >= 1, got {list(self.kinds)} and {self.n}"
            )


@dataclass
class Batch:
    """pixels f32 [B Hi Wi 3]; sam_features f32 [B S C] or None."""

    pixels: np.ndarray
    groups: tuple[TextGroup, ...]
    sam_features: np.ndarray | None
    record_ids: list[str]
    step: int


@dataclass
class _Slot:
    """One image of a batch: pixels f32 [Hi Wi 3], its texts by group, features f32 [S C]."""

    pixels: np.ndarray
    texts: list[list[Text]]
    features: np.ndarray | None


class Batches:
    """Draws batches from records.

    Each epoch goes once through the images in a random order; each image brings `n` texts of
    every group. Targets come from the records' own masks, else from `store`.

    bucket: so many batches' images are sorted by the length of their texts, see `Order`. pack:
    all texts of an image in as few rows as they fit into, as one group. on_error: what
    becomes of an image or record that cannot be used: a ``UserError`` (``stop``), or the next
    usable one of the order takes its place (``skip``), the same whenever the step is made. A text
    of more than `max_tokens` cannot be used. shuffle_masks: every phrase that is guided is guided
    by the mask of a random phrase of another image instead, which is drawn anew each time.
    positions: which positions of a phrase are guided. absent: mark those of absent things, too.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Any,
        preprocessor: Preprocessor,
        grid: tuple[int, int],
        *,
        batch_size: int,
        groups: Sequence[GroupSpec],
        seed: int,
        store: Targets | None = None,
        flip: bool = False,
        bucket: int = 0,
        pack: bool = False,
        word_dropout: float = 0.0,
        shuffle_masks: bool = False,
        positions: Collection[Position] = POSITIONS,
        absent: bool = False,
        on_error: Literal["stop", "skip"] = "stop",
        max_tokens: int | None = None,
    ) -> None:
        self.records, self.tokenizer, self.preprocessor = records, tokenizer, preprocessor
        self.batch_size, self.groups, self.seed = batch_size, tuple(groups), seed
        self.flip, self.pack, self.on_error = flip, pack, on_error
        self.word_dropout = word_dropout
        self.max_tokens, self.positions, self.absent = max_tokens, positions, absent
        self._cells = grid[0] * grid[1]
        self._guidance = Guidance(store, records.root, grid)
        #: For each group the numbers of its kinds, in the order in which they are drawn from.
        self._kinds = [
            [records.kinds.index(kind) for kind in group.kinds if kind in records.kinds]
            for group in self.groups
        ]
        for group, kinds in zip(self.groups, self._kinds, strict=True):
            if not kinds:
                raise UserError(
                    f"texts: the data has no texts of kind {' or '.join(group.kinds)}; "
                    f"it has {', '.join(sorted(records.kinds)) or 'none'}"
                )
        lengths = _expected_lengths(records, self._kinds, [group.n for group in self.groups])
        #: Numbers of the images that have texts of these kinds.
        self.images = np.flatnonzero(lengths)
        #: Those that lend their masks to others.
        self._lenders: np.ndarray | None = None
        if shuffle_masks:
            self._lenders = np.unique(records.image_of[records.guided])
            if len(self._lenders) < 2:
                raise UserError(
                    "data.shuffle_masks: expected at least two images with phrases, "
                    f"got {len(self._lenders)}; set it to false"
                )
        self._order = Order(lengths[self.images], batch_size, seed, bucket)
        self._pixels = Bounded[tuple[np.ndarray, Geometry]](_PIXEL_BYTES)
        self._encoded = Bounded[Encoded](_TEXT_BYTES)
        self._lock = Lock()
        self._tokenizing = Lock()  # a fast tokenizer serves one thread at a time
        self._unusable: dict[str, Problem] = {}
        self._told = 0

    def batch(self, step: int) -> Batch:
        """Batch number `step`, the same for the same seed."""
        return self.part(step, 0, 1)

    def part(self, step: int, part: int, parts: int) -> Batch:
        """The images of one of `parts` parts of that batch, in every part the same as in the
        whole; padding is as each part needs it. ``UserError`` if there are none in it."""
        first, end = (self.batch_size * cut // parts for cut in (part, part + 1))
        if first == end:
            raise UserError(
                f"batch_size: expected an image for each of {parts} parts of a step, "
                f"got {self.batch_size}"
            )
        slots = [self._slot(step, slot) for slot in range(first, end)]
        features = [slot.features for slot in slots if slot.features is not None]
        by_group = [[slot.texts[g] for slot in slots] for g in range(len(self.groups))]
        return Batch(
            np.stack([slot.pixels for slot in slots]),
            self._packed(slots) if self.pack else self._padded(by_group),
            np.stack(features) if features else None,
            [text.record_id for group in by_group for texts in group for text in texts],
            step,
        )

    def take_problems(self) -> list[Problem]:
        """What could not be used since the last call, each image and record once for all calls."""
        with self._lock:
            found = list(self._unusable.values())[self._told :]
            self._told = len(self._unusable)
        return found

    def _padded(self, by_group: list[list[list[Text]]]) -> tuple[TextGroup, ...]:
        """A row a text; a row that no text fills has no loss."""
        groups = []
        for spec, images in zip(self.groups, by_group, strict=True):
            rows = [[texts[r : r + 1] for r in range(spec.n)] for texts in images]
            T = round_up(max((len(text) for texts in images for text in texts), default=0))
            groups.append(text_group(rows, T, self._cells, self._pad_id(), packed=False))
        return tuple(groups)

    def _packed(self, slots: list[_Slot]) -> tuple[TextGroup, ...]:
        rows, T = packed_rows([[text for group in slot.texts for text in group] for slot in slots])
        return (text_group(rows, T, self._cells, self._pad_id(), packed=True),)

    def _pad_id(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) else 0

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _slot(self, step: int, slot: int) -> _Slot:
        """What is in a slot of a batch: its image, or the next one that can be used."""
        place = step * self.batch_size + slot
        for later in range(min(len(self.images), _MOST_SKIPPED)):
            image = int(self.images[self._order.image(place, later)])
            filled = self._filled(step, slot, image)
            if filled is not None:
                return filled
        problem = next(iter(self._unusable.values()))
        raise UserError(
            f"data: none of {later + 1} images in a row can be used; "  # pyright: ignore[reportPossiblyUnboundVariable]
            f"the first problem: {problem.where}: {problem.problem}"
        )

    def _filled(self, step: int, slot: int, image: int) -> _Slot | None:
        """A slot with this image; None if it, or every text of it, is to be left out."""
        path = self.records.images[image]
        if str(path) in self._unusable:
            return None
        flip = self.flip and bool(self._rng(step, slot, 0).random() < 0.5)
        try:
            squeezed, geometry = self._look(image)
            features = self._guidance.features(path, flip)
        except UserError as error:
            first = self.records[int(self.records.of_image(image)[0])]
            return self._leave_out(str(path), first, error)
        pixels = self.preprocessor.normalise(squeezed, geometry)
        texts = [
            self._texts(step, slot, group, image, geometry, flip)
            for group in range(len(self.groups))
        ]
        if not any(texts):
            return None
        return _Slot(pixels[:, ::-1] if flip else pixels, texts, features)

    def _look(self, image: int) -> tuple[np.ndarray, Geometry]:
        """uint8 pixels in the input's size, and their geometry."""

        def decode() -> tuple[np.ndarray, Geometry]:
            path = self.records.images[image]
            decoded = load_image(image_bytes(path), name=str(path))
            squeezed, geometry = self.preprocessor.resized(decoded)
            return np.asarray(squeezed), geometry

        return self._pixels.get(image, decode, lambda looked: looked[0].nbytes)

    def _texts(
        self, step: int, slot: int, group: int, image: int, geometry: Geometry, flip: bool
    ) -> list[Text]:
        own = self.records.of_image(image)
        kinds = self.records.kind_of[own]
        pool = np.concatenate([own[kinds == kind] for kind in self._kinds[group]])
        texts: list[Text] = []
        for number in self._rng(step, slot, group + 1).permutation(len(pool)):
            if len(texts) == self.groups[group].n:
                break
            record = self.records[int(pool[number])]
            try:
                encoded = self._encode(record)
                targets = [
                    self._guidance.target(phrase, record.image, geometry, flip)
                    for phrase in record.phrases
                ]
            except UserError as error:
                self._leave_out(f"{record.image} {record.id}", record, error)
                continue
            key = (step, slot, group + 1, int(pool[number]))
            if self._lenders is not None:
                targets = [
                    None if target is None else self._borrowed(self._rng(*key, at), image, flip)
                    for at, target in enumerate(targets)
                ]
            text = self._text(record, encoded, targets)
            if self.word_dropout:
                text = hide(text, self.word_dropout, self._rng(*key, len(targets)))
            texts.append(text)
        return texts

    def _encode(self, record: Record) -> Encoded:
        # Boxes differ from picture to picture, the tokens of a text do not.
        bare = tuple(Phrase(p.text, p.turn, p.start, p.end) for p in record.phrases)

        def tokenize() -> Encoded:
            with self._tokenizing:
                return encode(self.tokenizer, record.turns, bare)

        encoded = self._encoded.get((record.turns, bare), tokenize, _size)
        if self.max_tokens and len(encoded.ids) > self.max_tokens:
            raise UserError(
                f"expected a text of at most {self.max_tokens:,} tokens (data.max_tokens), "
                f"got {len(encoded.ids):,}"
            )
        return encoded

    def _text(self, record: Record, encoded: Encoded, targets: Sequence[np.ndarray | None]) -> Text:
        last = len(encoded.ids) - 1  # is predicted, but predicts nothing
        guided: list[tuple[int, np.ndarray]] = []
        absent: list[int] = []
        for number, (phrase, target) in enumerate(zip(record.phrases, targets, strict=True)):
            where = zip(encoded.spans[number], encoded.positions[number], strict=True)
            known = [(at, position) for at, position in where if at < last]
            kept = [at for at, position in known if position in self.positions]
            if target is not None:
                guided += [(at, target) for at in kept]
                if "rest" in self.positions:
                    rest = _rest(record.phrases, targets, phrase)
                    guided += [(at, rest) for at, position in known if position == "before"]
            elif phrase.absent and self.absent:
                absent += kept
        if "end" in self.positions and self.absent:
            absent += encoded.ends
        return Text(record.id, record.kind, encoded, tuple(guided), tuple(absent))

    def _borrowed(self, rng: np.random.Generator, image: int, flip: bool) -> np.ndarray:
        """f32 [S], the mask of a random phrase of a random image other than `image`."""
        assert self._lenders is not None
        for _ in range(_MOST_DRAWN):
            other = int(rng.choice(self._lenders))
            if other == image:
                continue
            own = self.records.of_image(other)
            record = self.records[int(rng.choice(own[self.records.guided[own]]))]
            phrase = record.phrases[int(rng.integers(len(record.phrases)))]
            try:
                geometry = self._look(other)[1]
                target = self._guidance.target(phrase, record.image, geometry, flip)
            except UserError as error:
                if self.on_error == "stop":
                    raise UserError(f"record {record.id}: {error}") from None
                continue  # it is told when its own turn comes
            if target is not None:
                return target
        raise UserError(
            f"data.shuffle_masks: none of {_MOST_DRAWN} phrases of random images has a mask that "
            "guides; set it to false, or label the data with `agevlm teach`"
        )

    def _leave_out(self, key: str, record: Record, error: UserError) -> None:
        """Remember what is wrong with an image or record, or with ``stop`` say so and end."""
        if self.on_error == "stop":
            raise UserError(f"record {record.id}: {error}") from None
        problem = Problem.of(error, str(record.image), record.id)
        with self._lock:
            self._unusable.setdefault(key, problem)


def _rest(
    phrases: Sequence[Phrase], targets: Sequence[np.ndarray | None], phrase: Phrase
) -> np.ndarray:
    """f32 [S], where `phrase` or any later one of its turn is."""
    yet = [
        target
        for other, target in zip(phrases, targets, strict=True)
        if target is not None and other.turn == phrase.turn and other.start >= phrase.start
    ]
    return np.maximum.reduce(yet)


def _expected_lengths(
    records: Records, kinds: Sequence[Sequence[int]], counts: Sequence[int]
) -> np.ndarray:
    """f64 [images], characters of the texts drawn for an image on average; 0 without any."""
    lengths = np.zeros(len(records.images))
    for group, n in zip(kinds, counts, strict=True):
        own = np.isin(records.kind_of, group)
        image = records.image_of[own]
        there = np.bincount(image, minlength=len(lengths))
        total = np.bincount(image, records.length_of[own], minlength=len(lengths))
        lengths += np.minimum(n, there) * total / np.maximum(there, 1)
    return lengths


def _size(encoded: Encoded) -> int:
    """About the bytes that a tokenised text takes in memory, with the text itself."""
    return 1000 + 60 * len(encoded.ids)
