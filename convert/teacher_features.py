"""Make a training store of SAM image embeddings that were computed elsewhere.

One file an image: .npy, .npz, or .pt as PyTorch saves a tensor, with SAM's embedding [C G G] or
[1 C G G] (256 x 64 x 64 for Meta's checkpoints) of the upright picture, resized and padded to the
right and below as SAM does it (`SamPredictor.get_image_embedding`). A file is found by its name:
for images/cat.jpg it is images/cat.npy, images/cat.jpg.npy, cat.npy or cat.jpg.npy.

Masks are those of the data's own phrases. Where a box or a point has none, pass --masks with the
store that `agevlm teach` made of this data: all masks come from there, and it is left as it is.
Interrupt and repeat at will: the same command continues where it stopped.

examples:
  agevlm-convert teacher-features --features sam-features --data coco --model runs/mine \\
    --mlx-path coco-sam
  agevlm-convert teacher-features --features sam-features --data photos --model runs/mine \\
    --masks photos-sam --mlx-path photos-sam-features
"""

import argparse
import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from agevlm_mlx import teach
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.pickled import BROKEN
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.errors import UserError, one_line
from agevlm_mlx.sam.jobs import Job, Jobs, survey
from agevlm_mlx.sam.labelling import Labelled, pool, read_image
from agevlm_mlx.sam.progress import Progress
from agevlm_mlx.sam.protocol import Labels
from agevlm_mlx.sam.room import check_space, forecast
from agevlm_mlx.sam.store import Store, StoreMeta, StoreWriter, file_sha256

from . import source

SUFFIXES = (".npy", ".npz", ".pt", ".pth")
#: The largest number that the store's float16 can hold.
_LARGEST = 65504.0
#: Bytes of the arrays of an .npz: an embedding of Meta's has 4 MiB.
_LARGEST_ARCHIVE = 2**28
#: What a broken or hostile file makes numpy and zipfile stumble over.
_BROKEN = (*BROKEN, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--features", required=True, type=Path, help="folder of the files, one an image")
    add("--array", metavar="NAME", help="the array to take where a file holds several")
    add("--data", required=True, type=Path, help="data folder, or .json/.jsonl file of records")
    add("--masks", type=Path, metavar="STORE", help="store to take the masks from")
    add("--mlx-path", required=True, type=Path, help="folder of the store to make or continue")
    add("--dry-run", action="store_true", help="count and forecast, write nothing")
    teach.add_student_arguments(parser)


def match(folder: Path, jobs: Jobs) -> dict[str, Path]:
    """The feature file of every image key.

    ``UserError`` if an image has none, or if two images or two files have the same name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of files {' '.join(SUFFIXES)}")
    files: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{path}: {files[name].name} is there too; expected one file an image")
        files[name] = path
    found: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    missing = []
    for key in (job.key for job in jobs):
        path = next((files[name] for name in _names(key) if name in files), None)
        if path is None:
            missing.append(key)
        elif path in owners:
            raise UserError(
                f"{path}: is meant for {owners[path]} and for {key}; name the files by the "
                "images' paths, folder and suffix included"
            )
        else:
            found[key], owners[path] = path, key
    if missing:
        looked = " or ".join(dict.fromkeys(f"{name}.npy" for name in _names(missing[0])))
        raise UserError(
            f"{folder}: expected a file for each of {len(jobs)} images, found none for "
            f"{len(missing)}; the first is {missing[0]} ({looked}, or {', '.join(SUFFIXES[1:])})"
        )
    return found


def _names(key: str) -> tuple[str, ...]:
    """What the file of an image may be called, the most exact name first."""
    path = PurePosixPath(key)
    return key, path.with_suffix("").as_posix(), path.name, path.stem


def read(path: Path, array: str | None = None) -> np.ndarray:
    """f32[G G C] of a feature file.

    array: the name to take where the file holds several. Nothing in a file is executed.
    ``UserError`` for anything but finite [C G G] or [1 C G G].
    """
    value = _load(path)
    if isinstance(value, Mapping):
        arrays = {str(name): item for name, item in value.items()}
        wanted = array or (next(iter(arrays)) if len(arrays) == 1 else None)
        if wanted not in arrays:
            raise UserError(
                f"{path}: expected {repr(array) if array else 'one array'}, got "
                f"{', '.join(list(arrays)[:8]) or 'none'}; pass --array NAME"
            )
        value = arrays[wanted]
    if not isinstance(value, np.ndarray):
        value = _from_torch(value, path)
    shape = value.shape
    if value.ndim == 4 and shape[0] == 1:
        value = value[0]
    if value.ndim != 3 or value.shape[1] != value.shape[2] or value.dtype.kind != "f":
        raise UserError(
            f"{path}: expected SAM's image embedding, floats of shape [C G G] such as "
            f"[256, 64, 64], got {value.dtype} {list(shape)}"
        )
    value = value.astype(np.float32)
    peak = float(np.abs(value).max(initial=0))
    if not 0 < peak <= _LARGEST:  # also not if it is NaN
        raise UserError(
            f"{path}: expected finite numbers up to {_LARGEST:g} that are not all zero, got "
            f"{peak:g}; compute this image's features again"
        )
    return value.transpose(1, 2, 0)


def _load(path: Path) -> Any:
    """An array, or the arrays of a file by name."""
    if path.suffix not in (".npy", ".npz"):
        return source.unpickle(path)
    try:
        if path.suffix == ".npy":
            # Mapped: a header that claims more than the file holds takes no memory.
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > _LARGEST_ARCHIVE:
            raise ValueError(f"unpacked it would have {size} bytes, expected {_LARGEST_ARCHIVE}")
        with np.load(path, allow_pickle=False) as loaded:
            return dict(loaded)
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable {path.suffix} file: {one_line(error)}") from None


def _from_torch(value: Any, path: Path) -> np.ndarray:
    if not hasattr(value, "detach"):
        raise UserError(f"{path}: expected a tensor, got {type(value).__name__}")
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16


def label(
    job: Job,
    features: np.ndarray,
    masks: Store | None,
    preprocessor: Preprocessor,
    grid: tuple[int, int],
) -> Labelled:
    """What the store gets for an image. ``UserError`` if it changed since `masks` were made."""
    image, sha256 = read_image(job.path)
    labels = Labels(np.zeros((0, *image.shape[:2]), bool), np.zeros(0, np.float32), features)
    own = Job(job.key, job.path, ready={} if masks else job.ready)
    labelled = pool(own, image, sha256, labels, preprocessor, grid)
    if masks is None or job.key not in masks:  # a picture without phrases has no masks
        return labelled
    if masks.sha256(job.key) != sha256:
        raise UserError(
            f"{job.path}: changed since its masks in {masks.path} were made; run `agevlm teach` "
            "on this data again"
        )
    rows = masks.rows(job.key)
    return replace(labelled, **{name: rows[name] for name in ("prompts", "coverage", "iou")})


def _masks(
    path: Path | None, jobs: Jobs, preprocessor: Preprocessor, grid: tuple[int, int]
) -> Store | None:
    """The store of masks. ``UserError`` unless every phrase of the data has its mask."""
    if path is None:
        without = [job for job in jobs if job.prompts]
        if without:
            raise UserError(
                f"{without[0].path}: expected a mask for every box and point of the data, got "
                f"{next(iter(without[0].prompts))} without one ({len(without)} images in all); "
                "pass --masks STORE, made of this data by `agevlm teach`"
            )
        return None
    store = Store(path)
    store.check(preprocessor.fingerprint(), grid)
    for job in jobs:
        lacking = set(job.keys) - set(store.prompts(job.key) if job.key in store else ())
        if lacking:
            raise UserError(
                f"{path}: expected masks of all this data, got none for {min(lacking)} in "
                f"{job.key}; run `agevlm teach` on it again"
            )
    return store


def _meta(
    features: np.ndarray,
    file: Path,
    masks: Store | None,
    preprocessor: Preprocessor,
    grid: tuple[int, int],
) -> StoreMeta:
    # The teacher's weights are not known: the first image's features stand for them, so that
    # a store is not continued with those of another teacher.
    teacher = hashlib.sha256(file_sha256(file).encode())
    if masks is not None:
        teacher.update(masks.meta.teacher.encode())
    return StoreMeta(
        teacher=teacher.hexdigest(),
        preprocessing=preprocessor.fingerprint(),
        grid=grid,
        feature_channels=features.shape[-1],
        prompt="box" if masks is None else masks.meta.prompt,
    )


def run(args: argparse.Namespace) -> int:
    preprocessor, grid = teach.student(args)
    jobs = Jobs(read_records(args.data), every_image=True)
    files = match(args.features, jobs)
    masks = _masks(args.masks, jobs, preprocessor, grid)
    first = read(files[jobs[0].key], args.array)
    meta = _meta(first, files[jobs[0].key], masks, preprocessor, grid)
    if args.dry_run:
        forecast(survey(jobs, meta), meta, args.mlx_path)
        print("dry run: nothing written")
        return 0
    with StoreWriter(args.mlx_path, meta) as writer:
        plan = survey(jobs, meta, writer)
        if len(plan.todo) < len(jobs):
            print(f"{args.mlx_path}: {len(jobs) - len(plan.todo)} of {len(jobs)} images are done")
        forecast(plan, meta, args.mlx_path)
        check_space(plan, args.mlx_path)
        progress = Progress(len(plan.todo))
        for done, number in enumerate(plan.todo, 1):
            job = jobs[int(number)]
            features = read(files[job.key], args.array)
            if features.shape != first.shape:
                side, _, channels = first.shape
                raise UserError(
                    f"{files[job.key]}: expected {channels} x {side} x {side} as in "
                    f"{files[jobs[0].key].name}, got {features.shape[-1]} x "
                    f"{features.shape[0]} x {features.shape[1]}; use features of one teacher"
                )
            writer.add(**vars(label(job, features, masks, preprocessor, grid)))
            progress.show(done)
    side, _, channels = first.shape
    print(
        f"{args.mlx_path}: {len(Store(args.mlx_path))} images, features {channels} x {side} x "
        f"{side} on a {grid[0]}x{grid[1]} grid"
    )
    return 0
