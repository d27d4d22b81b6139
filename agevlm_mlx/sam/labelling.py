"""What `agevlm teach` does to each image: find its prompts, ask the teacher, pool to the grid."""

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.image import Preprocessor, load_image
from ..data.records import Phrase, Record
from ..errors import UserError
from .store import prompt_key
from .targets import pool_features, rle_decode

Prompt = tuple[float, ...]


class Labels(Protocol):
    """The teacher's answer for one image."""

    @property
    def masks(self) -> np.ndarray: ...
    @property
    def iou(self) -> np.ndarray: ...
    @property
    def features(self) -> np.ndarray | None: ...


class Teacher(Protocol):
    """What labelling needs of `sam.teacher.Teacher`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def feature_channels(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def light(self) -> bool: ...
    def label(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        *,
        features: bool = False,
    ) -> Sequence[Labels]: ...


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


@dataclass(frozen=True)
class Labelled:
    """A job's result, ready for `StoreWriter.add`."""

    image_key: str
    sha256: str
    prompts: tuple[str, ...]
    coverage: np.ndarray
    iou: np.ndarray
    features: np.ndarray | None


def collect(records: Sequence[Record], root: Path, prompt: str = "box") -> list[Job]:
    """The distinct prompts of every image, in the order of the records.

    A phrase is stored under its box, or under its point if it has no box. With `prompt`
    "point" SAM is shown the phrase's point, or the middle of its box, instead of the box.
    A phrase with a mask of its own needs no SAM. ``UserError`` for a phrase with nothing.
    """
    jobs: dict[Path, Job] = {}
    for record in records:
        job = jobs.get(record.image)
        if job is None:
            job = Job(image_key(record.image, root), record.image)
            jobs[record.image] = job
        for phrase in record.phrases:
            shown = phrase.box or phrase.point
            if shown is None:
                if phrase.mask is None:
                    raise UserError(
                        f"record {record.id}: the phrase {phrase.text!r} has no box, point or "
                        "mask; give it one or drop the phrase"
                    )
                continue  # training reads the mask itself: nothing to look up by
            name = prompt_key(shown)
            if phrase.mask is not None:
                job.ready[name] = phrase.mask
            else:
                job.prompts[name] = _shown(phrase, prompt)
    for job in jobs.values():
        for name in job.ready:
            job.prompts.pop(name, None)
    return list(jobs.values())


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
class Labeller:
    """Runs jobs through a teacher and the student's own geometry."""

    teacher: Teacher
    preprocessor: Preprocessor
    grid: tuple[int, int]
    features: bool = False

    def __call__(self, jobs: Sequence[Job]) -> list[Labelled]:
        """Label a batch of images. ``UserError`` names an image that cannot be read."""
        loaded = [read_image(job.path) for job in jobs]
        answers = self.teacher.label(
            [image for image, _ in loaded],
            [list(job.prompts.values()) for job in jobs],
            features=self.features,
        )
        return [
            pool(job, image, sha256, labels, self.preprocessor, self.grid)
            for job, (image, sha256), labels in zip(jobs, loaded, answers, strict=True)
        ]


def pool(
    job: Job,
    image: np.ndarray,
    sha256: str,
    labels: Labels,
    preprocessor: Preprocessor,
    grid: tuple[int, int],
) -> Labelled:
    """The labels of an image, and the masks that the data brings along, on the student's grid.

    image, sha256: what `read_image` gave. ``UserError`` for a mask of another size.
    """
    height, width = image.shape[:2]
    geometry = preprocessor.geometry(width, height)
    masks = [*(_ready(job, rle, height, width) for rle in job.ready.values()), *labels.masks]
    coverage = [geometry.mask_to_grid(mask, grid) for mask in masks]
    return Labelled(
        job.key,
        sha256,
        job.keys,
        np.stack(coverage) if coverage else np.zeros((0, math.prod(grid)), dtype=np.float32),
        np.concatenate([np.ones(len(job.ready), np.float32), labels.iou]),
        None if labels.features is None else pool_features(labels.features, geometry, grid),
    )


def read_image(path: Path) -> tuple[np.ndarray, str]:
    """The image uint8[h w 3] and the SHA-256 of its file, read once. ``UserError`` if it
    cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        image = load_image(data)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('image: ')}") from None
    return np.asarray(image), hashlib.sha256(data).hexdigest()


def _ready(job: Job, rle: Any, height: int, width: int) -> np.ndarray:
    try:
        mask = rle_decode(rle)
    except UserError as error:
        raise UserError(f"{job.path}: {error}") from None
    if mask.shape != (height, width):
        raise UserError(
            f"{job.path}: expected masks of {height} x {width} pixels, got "
            f"{mask.shape[0]} x {mask.shape[1]}; they belong to another version of the image"
        )
    return mask


def label_all(
    jobs: Sequence[Job], make: Callable[[], Labeller], *, workers: int, batch_size: int
) -> Generator[Labelled]:
    """Label every job in order, in `workers` processes of one thread each, or here if 1.

    `make` builds the labeller inside each process, so it must be picklable.
    """
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    if workers == 1:
        labeller = make()
        for batch in batches:
            yield from labeller(batch)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make,))
    try:
        queue, waiting = deque(), iter(batches)
        while True:
            while len(queue) < 2 * workers and (batch := next(waiting, None)) is not None:
                queue.append(pool.submit(_work, batch))
            if not queue:
                return
            yield from queue.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, probably for want of memory; run the same command again "
            "with fewer --workers (finished images are kept)"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_labeller: Labeller | None = None


def _start_worker(make: Callable[[], Labeller]) -> None:
    global _labeller
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    _labeller = make()


def _exit_with(sentinel: int) -> None:
    """End this worker when its parent is gone, even by kill -9: nobody would wake it."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(batch: Sequence[Job]) -> list[Labelled]:
    assert _labeller is not None
    return _labeller(batch)
