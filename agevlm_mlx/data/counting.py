"""One pass over a data set's images and texts, in flat memory, that counts a `report.Report`."""

import contextlib
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..sam.jobs import Jobs
from ..sam.store import Store, prompt_key
from .bounded import Bounded
from .chat import encode
from .guidance import unfit
from .image import Geometry, Preprocessor, load_image, open_image
from .image_check import place
from .image_files import image_bytes
from .record_scan import NOT_FOUND
from .record_set import Records
from .records import Phrase, Problem, Record, Turn
from .report import Labels, Picture, Report

#: Images that threads look at before their results are taken.
_CHUNK = 64
#: Bytes of texts whose tokens are remembered, for data that asks the same of every picture.
_TEXT_BYTES = 16 << 20
#: Different phrases that are counted; beyond it the rare ones are forgotten.
_PHRASES = 100_000
_COPIES = 5
#: Formats whose camera may have been turned, and the Exif tag that says so.
_TURNED, _ORIENTATION = ("JPEG", "MPO", "WEBP", "TIFF"), 0x0112


@dataclass(frozen=True)
class Student:
    """What the model to be trained makes of data.

    limit: tokens that its language model takes; None: it does not say. preprocessor and grid: how
    pictures come to its token grid.
    """

    tokenizer: Any
    limit: int | None
    preprocessor: Preprocessor
    grid: tuple[int, int]


@dataclass
class _Seen:
    """What a thread found out about an image and the places of its phrases."""

    image: int
    size: tuple[int, int] | None = None
    digest: bytes | None = None
    problems: list[Problem] = field(default_factory=list)
    misplaced: int = 0
    unfit: Counter[str] = field(default_factory=Counter)
    missing_prompts: int = 0
    missing: bool = False
    other_file: bool = False
    #: Why the store cannot be asked about it.
    refused: str = ""


def count(
    name: str,
    records: Records,
    student: Student,
    *,
    store: Store | None = None,
    decode: bool = True,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every image and text of `records`, which were read with ``on_error="skip"``.

    store: a teacher's, to be compared with the data. decode: also read all pixels and compare
    files; else only their headers are read. most: images to look at, evenly spread. `progress` is
    called with (images done, images in all).

    Raises: ``UserError`` where the tokenizer can read no text at all.
    """
    encode(student.tokenizer, (Turn("user", "a"), Turn("assistant", "b")), ())
    images = len(records.images)
    chosen = np.arange(images)
    if most is not None and most < images:
        chosen = np.unique(np.linspace(0, images - 1, most).round().astype(int))
    kinds = np.bincount(records.kind_of, minlength=len(records.kinds))
    report = Report(
        name,
        len(records),
        images,
        {kind: int(n) for kind, n in zip(records.kinds, kinds, strict=True)},
        list(records.problems),
        records.excluded,
        records.text_only,
        len(chosen) if len(chosen) < images else None,
        decode,
    )
    report.pictures.missing = missing_files(records.problems)
    report.phrases.grid = student.grid
    look = _Look(records, student, store, decode)
    if store is not None:
        report.labels = Labels(str(store.path))
    texts = _Texts(report, student)
    digests = array("Q")
    seen_images = array("i")
    for done, seen in enumerate(_in_threads(look, chosen), 1):
        _add(report, records.images[seen.image], seen)
        if seen.digest is not None:
            digests.append(int.from_bytes(seen.digest[:8]))
            seen_images.append(seen.image)
        for number in records.of_image(seen.image):
            texts.add(records[int(number)], seen.image)
        if progress:
            progress(done, len(chosen))
    texts.finish()
    if decode:
        found = list(_same(np.frombuffer(digests, np.uint64)))
        report.pictures.copies = len(found)
        report.pictures.copied = [
            (str(records.images[seen_images[one]]), str(records.images[seen_images[other]]))
            for one, other in found[:_COPIES]
        ]
    report.problems += look.jobs.problems if look.jobs is not None else []
    return report


def missing_files(problems: Sequence[Problem]) -> int:
    """How many different images are not there, among what is wrong with records."""
    return len({p.problem for p in problems if p.problem.startswith(NOT_FOUND)})


class _Look:
    """Finds out about an image, in any thread."""

    def __init__(
        self, records: Records, student: Student, store: Store | None, decode: bool
    ) -> None:
        self.records, self.student, self.store, self.decode = records, student, store, decode
        self.jobs = None
        if store is not None:
            self.jobs = Jobs(records, every_image=True, on_error="skip")

    def __call__(self, image: int) -> _Seen:
        seen = _Seen(image)
        path, numbers = self.records.images[image], self.records.of_image(image)
        sha256 = ""
        try:
            if self.decode:
                data = image_bytes(path)
                digest = hashlib.sha256(data)
                sha256, seen.digest = digest.hexdigest(), digest.digest()
                width, height = load_image(data, name=str(path)).size
            else:
                width, height = _header(path)
        except UserError as error:
            seen.digest = None
            seen.problems.append(Problem.of(error, str(path), self.records[int(numbers[0])].id))
            return seen
        seen.size = width, height
        held = self._compare(image, seen, sha256)
        geometry = self.student.preprocessor.geometry(width, height)
        for number in numbers[self.records.guided[numbers]]:
            self._phrases(self.records[int(number)], (width, height), geometry, held, seen)
        return seen

    def _compare(self, image: int, seen: _Seen, sha256: str) -> tuple[str, frozenset[str]]:
        """Whether the store has the image; its key there, and the prompts that it has."""
        if self.store is None or self.jobs is None:
            return "", frozenset()
        try:
            job = self.jobs[image]
        except UserError as error:
            seen.refused = str(error)
            return "", frozenset()
        if job.key not in self.store:
            seen.missing = bool(job.keys or self.store.meta.feature_channels)
            return job.key, frozenset()
        held = frozenset(self.store.prompts(job.key))
        seen.missing_prompts = len(set(job.keys) - held)
        seen.other_file = bool(sha256) and self.store.sha256(job.key) != sha256
        return job.key, held

    def _phrases(
        self,
        record: Record,
        size: tuple[int, int],
        geometry: Geometry,
        held: tuple[str, frozenset[str]],
        seen: _Seen,
    ) -> None:
        """Where the phrases of a record are, and how much of the grid they cover."""
        first = None
        for phrase in record.phrases:
            try:
                mask = place(phrase, record.image, *size)
            except UserError as error:
                seen.misplaced += 1
                first = first or Problem.of(error, str(record.image), record.id)
                continue
            seen.unfit[self._unfit(phrase, mask, geometry, held) or ""] += 1
        if first is not None:
            seen.problems.append(first)

    def _unfit(
        self,
        phrase: Phrase,
        mask: np.ndarray | None,
        geometry: Geometry,
        held: tuple[str, frozenset[str]],
    ) -> str | None:
        """Why a phrase guides nothing: "small", "large"; None if it does, or nobody knows."""
        grid, where = self.student.grid, phrase.box or phrase.point
        cells = grid[0] * grid[1]
        if self.store is not None and where and prompt_key(where) in held[1]:
            if self.store.meta.grid != grid:
                return None
            target = self.store.target(held[0], prompt_key(where))
            return unfit(float(target.sum()), geometry, cells)
        if mask is not None:
            return unfit(float(geometry.mask_to_grid(mask, grid).sum()), geometry, cells)
        if phrase.box is None:
            return None
        # Its mask covers less than the box, so that only the small ones are known.
        ((x0, y0, x1, y1),) = geometry.input_boxes(np.array([phrase.box]))
        covered = float((x1 - x0) * (y1 - y0)) / geometry.image_size**2 * cells
        return "small" if unfit(covered, geometry, cells) == "small" else None


class _Texts:
    """Counts the records' texts and phrases, one after the other."""

    def __init__(self, report: Report, student: Student) -> None:
        self._report, self._tokenizer = report, student.tokenizer
        self._limit = report.texts.limit = student.limit
        self._hashes = array("q")
        self._lengths = Bounded[int](_TEXT_BYTES)

    def add(self, record: Record, image: int) -> None:
        """Count a record about that image."""
        texts, phrases = self._report.texts, self._report.phrases
        texts.records += 1
        texts.turns += len(record.turns)
        self._hashes.append(hash((image, record.kind, record.turns)))
        phrases.total += len(record.phrases)
        phrases.masks += sum(p.mask is not None for p in record.phrases)
        phrases.guided_records += any(
            p.box or p.point or p.mask is not None for p in record.phrases
        )
        phrases.frequent.update(" ".join(p.text.lower().split()) for p in record.phrases)
        if len(phrases.frequent) > _PHRASES:
            phrases.frequent = Counter(dict(phrases.frequent.most_common(_PHRASES // 2)))
        for turn in record.turns:
            if turn.role == "assistant":
                texts.answers += 1
                word = turn.text.split(maxsplit=1)[0].strip(".,;:!?\"'").lower()
                texts.yes += word == "yes"
                texts.no += word == "no"
        try:
            length = self._length(record)
        except UserError as error:
            texts.unaligned += 1
            self._report.problems.append(Problem.of(error, str(record.image), record.id))
            return
        texts.lengths[length] += 1
        texts.too_long += self._limit is not None and length > self._limit

    def finish(self) -> None:
        """Count what can be counted only at the end."""
        hashes = np.frombuffer(self._hashes, np.int64)
        self._report.texts.copies = len(hashes) - len(np.unique(hashes))

    def _length(self, record: Record) -> int:
        bare = tuple(Phrase(p.text, p.turn, p.start, p.end) for p in record.phrases)
        return self._lengths.get(
            (record.turns, bare),
            lambda: len(encode(self._tokenizer, record.turns, bare).ids),
            lambda _: 2000 + 4 * sum(len(turn.text) for turn in record.turns) + 200 * len(bare),
        )


def _add(report: Report, path: Path, seen: _Seen) -> None:
    """Count what a thread has found."""
    report.problems += seen.problems
    if seen.size is None:
        report.pictures.broken += 1
        return
    report.pictures.add(Picture(str(path), *seen.size))
    report.phrases.misplaced += seen.misplaced
    report.phrases.too_small += seen.unfit["small"]
    report.phrases.too_large += seen.unfit["large"]
    if report.labels is not None:
        report.labels.missing_images += seen.missing
        report.labels.missing_prompts += seen.missing_prompts
        report.labels.other_files += seen.other_file
        if seen.refused and not report.labels.problems:
            report.labels.problems.append(seen.refused)


def _in_threads(look: _Look, images: np.ndarray) -> Iterator[_Seen]:
    """What is found out about each image, in their order; a few are ahead of who asks."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        ahead = [pool.submit(look, int(image)) for image in images[:_CHUNK]]
        for number in range(len(images)):
            seen = ahead[number % _CHUNK].result()
            if number + _CHUNK < len(images):
                ahead[number % _CHUNK] = pool.submit(look, int(images[number + _CHUNK]))
            yield seen
    finally:  # also after Ctrl-C: what has not begun never does
        pool.shutdown(cancel_futures=True)


def _same(digests: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first place of a value, later place of it) for each that was there before."""
    order = np.argsort(digests, kind="stable")
    repeated = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
    first: dict[int, int] = {}
    for at in repeated:
        one, other = int(order[at]), int(order[at + 1])
        first[other] = first.get(one, one)
        yield first[other], other


def _header(path: Path) -> tuple[int, int]:
    """(width, height) of an upright picture, by its file's first bytes."""
    with open_image(path if path.is_file() else image_bytes(path), str(path)) as image:
        width, height = image.size
        if image.format in _TURNED:
            with contextlib.suppress(Exception):  # on damaged data it may raise anything
                if image.getexif().get(_ORIENTATION, 1) >= 5:
                    return height, width
    return width, height
