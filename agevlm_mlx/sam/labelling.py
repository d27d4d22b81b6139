"""What `agevlm teach` does to each image: read it, ask the teacher, pool to the student's grid."""

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..data.image import Preprocessor, load_image
from ..data.image_files import image_bytes
from ..data.prefetch import Prefetch
from ..data.record_set import OnError
from ..data.records import Problem
from ..errors import UserError
from .automatic import Automatic, find_masks
from .jobs import Job, image_key
from .protocol import Labels, Teacher
from .targets import pool_features, rle_decode

__all__ = ["Job", "Labelled", "Labeller", "image_key", "label_all", "pool", "read_image"]

T = TypeVar("T")
#: Threads that read and decode images while the teacher works.
READERS = 4
#: The largest number that the store's float16 can hold.
LARGEST = 65504.0
#: Bytes of masks in full size, one a pixel, that are made before they are pooled.
MASK_BYTES = 2**28


@dataclass(frozen=True)
class Labelled:
    """A job's result, ready for `StoreWriter.add`."""

    image_key: str
    sha256: str
    prompts: tuple[str, ...]
    coverage: np.ndarray
    iou: np.ndarray
    features: np.ndarray | None


@dataclass(frozen=True)
class Loaded:
    """A job's image u8 [h w 3], the SHA-256 of its file, and prompts that were left out of it."""

    job: Job
    image: np.ndarray
    sha256: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Labeller:
    """Runs jobs through a teacher and the student's own geometry.

    automatic: find masks with a grid of points, and give each phrase the one that fits it.
    on_error: "stop" raises ``UserError`` at an image or a prompt that cannot be used, "skip" leaves
    it out and gives a `Problem`, of an image in its place, of a prompt before its image's labels.
    """

    teacher: Teacher
    preprocessor: Preprocessor
    grid: tuple[int, int]
    features: bool = False
    automatic: Automatic | None = None
    on_error: OnError = "stop"

    def __call__(self, jobs: Sequence[Job]) -> list[Labelled | Problem]:
        """Label a batch of images."""
        return self.label([self.read(job) for job in jobs])

    def read(self, job: Job) -> Loaded | Problem:
        """Read a job's image, which needs no teacher: threads may do it."""
        try:
            image, sha256 = read_image(job.path)
        except UserError as error:
            return self._problem(job, error)
        wrong = dict(_wrong(job, *image.shape[:2]))
        problems = tuple(self._problem(job, error) for error in wrong.values())
        good = job.without(wrong)
        if problems and not (good.keys or self.features):
            return problems[0]
        return Loaded(good, image, sha256, problems)

    def label(self, loaded: Sequence[Loaded | Problem]) -> list[Labelled | Problem]:
        """Label images that are read already, so many together as their masks allow."""
        return [one for group in _fitting(loaded) for one in self._together(group)]

    def _together(self, loaded: Sequence[Loaded | Problem]) -> list[Labelled | Problem]:
        good = [one for one in loaded if isinstance(one, Loaded)]
        asked = [one for one in good if one.job.prompts or self.features]
        answers = iter(self._ask(asked))
        results: list[Labelled | Problem] = []
        for one in loaded:
            if isinstance(one, Problem):
                results.append(one)
                continue
            none = np.zeros((0, *one.image.shape[:2]), bool), np.zeros(0, np.float32), None
            labels = next(answers) if one.job.prompts or self.features else Labels(*none)
            results += [*one.problems, self._pool(one, labels)]
        return results

    def _ask(self, loaded: Sequence[Loaded]) -> Sequence[Labels]:
        if self.automatic is not None:
            return [self._find(one, self.automatic) for one in loaded]
        if not loaded:
            return []
        return self.teacher.label(
            [one.image for one in loaded],
            [list(one.job.prompts.values()) for one in loaded],
            features=self.features,
        )

    def _find(self, one: Loaded, settings: Automatic) -> Labels:
        """The automatic masks that fit a job's phrases; an empty one, of IoU 0, where none does."""
        height, width = one.image.shape[:2]
        look = self.teacher.look(one.image)
        masks = np.zeros((len(one.job.prompts), height, width), bool)
        iou = np.zeros(len(masks), np.float32)
        if len(masks):
            found = find_masks(look, height, width, settings)
            for row, prompt in enumerate(one.job.prompts.values()):
                chosen = found.choose(prompt, settings.match_thresh)
                if chosen is not None:
                    masks[row], iou[row] = found.mask(chosen), found.iou[chosen]
        return Labels(masks, iou, look.features if self.features else None)

    def _pool(self, one: Loaded, labels: Labels) -> Labelled | Problem:
        labelled = pool(one.job, one.image, one.sha256, labels, self.preprocessor, self.grid)
        numbers = [labelled.iou, *([] if labelled.features is None else [labelled.features])]
        if all((np.abs(n) <= LARGEST).all() for n in numbers):  # also not if one is NaN
            return labelled
        error = UserError(
            f"{one.job.path}: expected finite numbers up to {LARGEST:g} of the teacher, got "
            "others; check its weights, or run it in float32"
        )
        return self._problem(one.job, error)

    def _problem(self, job: Job, error: UserError) -> Problem:
        if self.on_error == "stop":
            raise error
        return Problem.of(error, str(job.path))


def _fitting(loaded: Sequence[Loaded | Problem]) -> Iterator[list[Loaded | Problem]]:
    """The images in groups, whose masks in full size take `MASK_BYTES`; one at least."""
    group: list[Loaded | Problem] = []
    size = 0
    for one in loaded:
        its = len(one.job.keys) * one.image[..., 0].size if isinstance(one, Loaded) else 0
        if group and size + its > MASK_BYTES:
            yield group
            group, size = [], 0
        group.append(one)
        size += its
    yield group


def _wrong(job: Job, height: int, width: int) -> Iterator[tuple[str, UserError]]:
    """The prompts that cannot be used, and why: a box or a point that leaves the image, as in
    training, or a mask that is none of the image's."""
    for name, prompt in job.prompts.items():
        if prompt[-2] > width or prompt[-1] > height:
            what = "box" if len(prompt) == 4 else "point"
            yield (
                name,
                UserError(
                    f"{job.path}: expected a {what} inside the image of {width} x {height} pixels, "
                    f"got {list(prompt)}; it belongs to another version of the image"
                ),
            )
    for name, rle in job.ready.items():
        try:
            _ready(job, rle, height, width)
        except UserError as error:
            yield name, error


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
    data = image_bytes(path)
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
    jobs: Iterable[Job], make: Callable[[], Labeller], *, workers: int, batch_size: int
) -> Generator[Labelled | Problem]:
    """Label every job in order, in `workers` processes of one thread each, or here if 1.

    `make` builds the labeller inside each process, so it must be picklable. Jobs are taken, and
    images read, a bounded number ahead.
    """
    if workers == 1:
        labeller = make()
        with Prefetch(labeller.read, jobs, READERS, batch_size + READERS) as loaded:
            for batch in _batches(loaded, batch_size):
                yield from labeller.label(batch)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make,))
    try:
        queue, waiting = deque(), _batches(jobs, batch_size)
        while True:
            while len(queue) < 2 * workers and (batch := next(waiting, None)):
                with _later_interrupts():  # a worker that this starts never sees one
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


@contextlib.contextmanager
def _later_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait here, and for ever in processes that are started meanwhile."""
    multiprocessing.resource_tracker.ensure_running()  # it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    ahead = iter(items)
    return iter(lambda: list(itertools.islice(ahead, size)), [])


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


def _work(batch: Sequence[Job]) -> list[Labelled | Problem]:
    assert _labeller is not None
    return _labeller(batch)
