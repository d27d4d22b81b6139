"""What a teacher is to be asked about each image of a data set, and how much that comes to."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.record_set import OnError, Records
from ..data.records import Phrase, Problem
from ..errors import UserError
from .index import StoreMeta, entry_text
from .protocol import Prompt
from .store import Store, StoreWriter, image_sha256, prompt_key
from .writer import SHARD_BYTES

#: Finished images whose files are hashed again when a run continues.
SAMPLE = 64
#: Bytes of a shard beside its images.
_HEADER = 400


@dataclass
class Job:
    """One image and everything to be stored for it, by prompt key."""

    key: str
    path: Path
    #: What SAM is shown: a box or a point, in source pixels.
    prompts: dict[str, Prompt] = field(default_factory=dict)
    #: Masks that the data brings along (COCO RLE); SAM is not asked for these.
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All prompt keys, the ready masks first."""
        return (*self.ready, *self.prompts)

    def without(self, names: Collection[str]) -> "Job":
        """The same image without the prompts that are in `names`."""
        prompts = {name: prompt for name, prompt in self.prompts.items() if name not in names}
        ready = {name: mask for name, mask in self.ready.items() if name not in names}
        return Job(self.key, self.path, prompts, ready)


class Jobs:
    """The distinct prompts of every image, in the data's order, read when they are asked for.

    A phrase is stored under its box, or under its point if it has no box. With `prompt` "point"
    SAM is shown the phrase's point, or the middle of its box, instead of the box. A phrase with a
    mask of its own needs no SAM. Images without such phrases are left out unless `every_image`
    (for features). A phrase with nothing is a ``UserError``, or with `on_error` "skip" left out
    and put into `problems`.
    """

    def __init__(
        self,
        records: Records,
        prompt: str = "box",
        *,
        every_image: bool = False,
        on_error: OnError = "stop",
    ):
        self._records, self._prompt = records, prompt
        self._on_error: OnError = on_error
        wanted = np.full(len(records.images), every_image)
        wanted[records.image_of[records.guided]] = True
        self._images = np.flatnonzero(wanted)
        self._problems: dict[Problem, None] = {}

    @property
    def problems(self) -> list[Problem]:
        """Phrases of the images asked for so far that have nothing to label."""
        return list(self._problems)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Job:
        image = int(self._images[number])
        path = self._records.images[image]
        job = Job(image_key(path, self._records.root), path)
        for i in self._records.of_image(image):
            if not self._records.guided[i]:
                continue
            record = self._records[int(i)]
            for phrase in record.phrases:
                where = phrase.box or phrase.point
                if where is None:
                    if phrase.mask is None and not phrase.absent:
                        self._refuse(record.id, phrase)
                    continue  # training reads the mask itself: nothing to look up by
                name = prompt_key(where)
                if phrase.mask is not None:
                    job.ready[name] = phrase.mask
                else:
                    job.prompts[name] = _shown(phrase, self._prompt)
        for name in job.ready:
            job.prompts.pop(name, None)
        return job

    def __iter__(self) -> Iterator[Job]:
        return (self[i] for i in range(len(self)))

    def part(self, shard: int, shards: int, limit: int | None = None) -> "Jobs":
        """Every image whose place in the data is `shard` modulo `shards`; `limit` at most."""
        part = Jobs(self._records, self._prompt, on_error=self._on_error)
        part._images = self._images[shard::shards][:limit]
        return part

    def _refuse(self, record: str, phrase: Phrase) -> None:
        problem = Problem(
            f"record {record}",
            f"the phrase {phrase.text!r} has no box, point or mask; give it one or drop the phrase",
            record,
        )
        if self._on_error == "stop":
            raise problem.error()
        self._problems[problem] = None


def complete(store: Store, jobs: Jobs, left_out: Collection[str] = ()) -> bool:
    """Whether the store holds masks for all prompts of all jobs.

    left_out: where the problems are that the teacher met, among them the paths of images that it
    could not use, perhaps from another folder of theirs. Nothing is wanted of those.
    """

    def lacks(job: Job) -> bool:
        if job.key not in store:
            return bool(job.keys or store.meta.feature_channels)
        return not set(job.keys) <= set(store.prompts(job.key))

    return not any(lacks(job) and not _is_among(job.key, left_out) for job in jobs)


def _is_among(key: str, paths: Collection[str]) -> bool:
    return any(path == key or path.endswith(f"/{key}") for path in paths)


def image_key(image: Path, root: Path) -> str:
    """An image's path relative to the data folder, with forward slashes.

    Links are not followed: an image may be a link to somewhere else.
    """
    try:
        return Path(os.path.abspath(image)).relative_to(os.path.abspath(root)).as_posix()
    except ValueError:
        raise UserError(
            f"{image}: expected an image inside the data folder {root}; move it there or link it"
        ) from None


def _shown(phrase: Phrase, prompt: str) -> Prompt:
    if prompt == "point" and phrase.point:
        return tuple(phrase.point)
    if prompt == "point" and phrase.box:
        x0, y0, x1, y1 = phrase.box
        return ((x0 + x1) / 2, (y0 + y1) / 2)
    return tuple(phrase.box or phrase.point or ())


@dataclass(frozen=True)
class Survey:
    """The images that a store lacks, or lacks masks of: their numbers among the jobs, and what
    they come to.

    total: images with anything to store. prompts: masks to be made. size: bytes in the store,
    known to a percent.
    """

    todo: np.ndarray
    total: int
    prompts: int
    size: int


def survey(
    jobs: Jobs | Sequence[Job],
    meta: StoreMeta,
    writer: StoreWriter | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Go through all jobs once. `progress` is called with (images seen, images in all).

    An image is done if the store of `writer` holds masks for all its prompts, and is otherwise
    stored anew with those that it has and those that it lacks. ``UserError`` if finished images
    have changed.
    """
    todo: list[int] = []
    finished: list[int] = []
    total = prompts = kept = size = 0
    done = writer.done if writer is not None else ()
    for number in range(len(jobs)):
        job = jobs[number]
        if progress:
            progress(number + 1, len(jobs))
        if not job.keys and not meta.feature_channels:
            continue
        total += 1
        held: tuple[str, ...] = ()
        if writer is not None and job.key in done:
            finished.append(number)
            held = writer.prompts(job.key)
            job = job.without(held)
            if not job.keys:
                continue
        todo.append(number)
        prompts += len(job.keys)
        kept += len(held)
        size += len(entry_text(job.key, "0" * 64, [*held, *job.keys])) + 1
    if writer is not None:
        _check_unchanged(jobs, finished, writer)
    size += (prompts + kept) * (meta.cells + 2) + len(todo) * meta.cells * meta.feature_channels * 2
    size += _HEADER + size // SHARD_BYTES * _HEADER
    return Survey(np.array(todo, np.int64), total, prompts, size)


def _check_unchanged(jobs: Jobs | Sequence[Job], finished: list[int], writer: StoreWriter) -> None:
    for number in finished[:: max(len(finished) // SAMPLE, 1)]:
        job = jobs[number]
        if image_sha256(job.path) != writer.sha256(job.key):
            raise UserError(
                f"{writer.path}: image {job.key} changed since it was labelled; delete the store "
                "or choose another --out"
            )
