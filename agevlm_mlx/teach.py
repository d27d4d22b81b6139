"""`agevlm teach`: run the SAM teacher over a data folder and store what it sees.

The store holds, for every box or point of the data's phrases, the share of each of the
student's token cells that SAM's mask covers, and optionally SAM's image features on the
same grid. Training reads the store and never runs SAM. Interrupt and repeat at will: the
same command continues where it stopped.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import errors, openblas
from .data.image import Preprocessor
from .data.record_set import OnError, read_problems, read_records, write_problems
from .data.records import Problem
from .errors import UserError, one_line
from .launchers import launched
from .sam.automatic import Automatic
from .sam.jobs import Job, Jobs, survey
from .sam.labelling import Labelled, Labeller, label_all
from .sam.merging import merge_stores
from .sam.progress import Progress
from .sam.protocol import Teacher
from .sam.room import check_free, check_space, disk, forecast, megabytes
from .sam.store import Store, StoreMeta, StoreWriter
from .sam.writer import BAD_RECORDS, FLUSH_SECONDS, SHARD_BYTES

EXAMPLES = """
examples:
  agevlm scenes --out data/scenes --n 5000
  agevlm teach --data data/scenes --out data/scenes-sam
  agevlm teach --data coco --out coco-sam --checkpoint sam_vit_b_01ec64.pth --features
  agevlm teach --data coco --out coco-sam --checkpoint ./sam-vit-base --grid 24x24 --dry-run
  agevlm teach --data photos --out photos-sam --prompt auto --points-per-side 32
  agevlm teach --data photos --out photos-sam --on-error skip
  agevlm teach --data photos --out photos-sam --verify

on two machines, each with the data; the second line on the other one, the third on any:
  agevlm teach --data coco --out coco-sam-1 --shard 1/2
  agevlm teach --data coco --out coco-sam-2 --shard 2/2
  agevlm teach --merge coco-sam-1 coco-sam-2 --out coco-sam
or all at once, into coco-sam-1-of-2 and coco-sam-2-of-2:
  mlx.launch --hostfile hosts.json -- agevlm teach --data coco --out coco-sam --shard auto

Meta's checkpoints: https://github.com/facebookresearch/segment-anything#model-checkpoints
"""

#: Automatic masks of the embedded teacher, whose estimates are lower than those of Meta's models.
SMALL_AUTOMATIC = {"points_per_side": 16, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5}

Backend = Literal["torch", "mlx"]


@dataclass(frozen=True, kw_only=True)
class MakeLabeller:
    """Builds the labeller; picklable, so that every worker process can build its own."""

    preprocessor: Preprocessor
    grid: tuple[int, int]
    features: bool = False
    checkpoint: Path | None = None
    model_type: str | None = None
    backend: Backend = "mlx"
    device: str | None = None
    automatic: Automatic | None = None
    on_error: OnError = "stop"
    threads: int | None = None

    def __call__(self) -> Labeller:
        """Load the teacher. ``UserError`` if torch is missing or the checkpoint is wrong."""
        return Labeller(
            self._teacher(),
            self.preprocessor,
            self.grid,
            self.features,
            self.automatic,
            self.on_error,
        )

    def _teacher(self) -> Teacher:
        if self.backend == "mlx":
            from .sam.mlx_teacher import MlxTeacher

            if self.threads:
                openblas.set_threads(self.threads)
            return MlxTeacher(self.checkpoint, self.model_type)
        from .sam.teacher import Teacher, set_threads

        if self.threads:
            set_threads(self.threads)
        return Teacher(self.checkpoint, self.model_type, self.device)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.merge:
        return merge(args.merge, args.out)
    if args.verify:
        return verify(args.out, args.data)
    if args.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if args.data is None:
        parser.error("--data is required (or --verify, or --merge)")
    shard, shards = launched(os.environ) if args.shard == "auto" else args.shard
    out = args.out
    if args.shard == "auto" and shards > 1:
        out = _shard_of(args.out, shard, shards)
    jobs, problems = _jobs(args, shard, shards)
    preprocessor, grid = student(args)
    make = MakeLabeller(
        preprocessor=preprocessor,
        grid=grid,
        features=args.features,
        checkpoint=args.checkpoint,
        model_type=args.model_type,
        backend=choose_backend(args.backend, args.device),
        device=args.device,
        automatic=_automatic(args),
        on_error=args.on_error,
    )
    status = teach(
        jobs,
        make,
        out,
        prompt=args.prompt,
        workers=args.workers,
        dry_run=args.dry_run,
        problems=problems,
        part=shards > 1,
    )
    if shards > 1 and not args.dry_run:
        print(
            f"{out}: shard {shard} of {shards}; when all are made: {_merge_command(args, shards)}"
        )
    return status


def _end_with_stdin() -> None:
    """End this process when whoever holds the other end of its standard input is gone. The store
    bears that, and so do the worker processes."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def teach(
    jobs: Jobs,
    make: MakeLabeller,
    out: Path,
    *,
    prompt: str = "box",
    workers: int | None = None,
    dry_run: bool = False,
    labeller: Labeller | None = None,
    problems: Sequence[Problem] = (),
    part: bool = False,
) -> int:
    """Label `jobs` into the store `out`, those that it lacks. Returns the exit status.

    `labeller` replaces the one that `make` would build, and then no process is started.
    `problems` are records left out already, to be listed with the images that are.
    `part`: the jobs are one shard of the data's, in which there may be nothing to label.
    """
    here = labeller or make()
    teacher = here.teacher
    meta = StoreMeta(
        teacher=teacher.fingerprint,
        preprocessing=make.preprocessor.fingerprint(),
        grid=make.grid,
        feature_channels=teacher.feature_channels if make.features else 0,
        prompt=prompt if make.automatic is None else str(make.automatic),
    )
    counting = Progress(len(jobs), "images counted", brief=True)
    if dry_run:
        forecast(survey(jobs, meta, progress=counting.show_of), meta, out)
        print("dry run: nothing written")
        return 0
    with StoreWriter(out, meta) as writer:
        plan = survey(jobs, meta, writer, counting.show_of)
        if not plan.total and not part:
            raise UserError(f"{out}: expected phrases with a box or a point, got none to label")
        if len(plan.todo) < plan.total:
            print(f"{out}: {plan.total - len(plan.todo)} of {plan.total} images are done already")
        forecast(plan, meta, out)
        check_space(plan, out)
        count = 1 if labeller else _workers(workers, teacher)
        results = label_all(
            _lacking(jobs, plan.todo, writer),
            (lambda: here) if count == 1 else dataclasses.replace(make, threads=1),
            workers=count,
            batch_size=teacher.batch_size,
        )
        bad = _BadRecords(out / BAD_RECORDS, [*problems, *jobs.problems])
        progress, done, empty = Progress(len(plan.todo)), 0, 0
        try:
            with contextlib.closing(results), bad:
                for result in results:
                    if isinstance(result, Labelled):
                        writer.add(**vars(result))
                        empty += int((result.iou == 0).sum()) if make.automatic else 0
                        done += 1
                        progress.show(done)
                    else:
                        bad.add(result)
                if done < len(plan.todo):
                    progress.show(len(plan.todo))  # with the images that were left out
        except KeyboardInterrupt:
            print(f"\n{out}: run the same command again to continue", file=sys.stderr)
            raise
        images = len(writer.done)
    if empty:
        print(
            f"{out}: no automatic mask fits {empty} of {plan.prompts} phrases; those guide nothing"
        )
    if bad.problems:
        print(f"{out}: {len(bad.problems)} left out, listed in {bad.path}")
    print(f"{out}: {images} images, {megabytes(disk(out))} on disk")
    return 0


def _lacking(jobs: Jobs, numbers: Iterable[int], writer: StoreWriter) -> Iterator[Job]:
    """These jobs, without the prompts that the store has masks for."""
    for number in numbers:
        job = jobs[int(number)]
        yield job.without(writer.prompts(job.key) if job.key in writer.done else ())


def verify(out: Path, data: Path | None) -> int:
    """Hash a store, and the images of `data`, again."""
    store = Store(out)
    root = None if data is None else read_records(data, on_error="skip").root
    store.verify(root, Progress(0, "files").show_of)
    images = "its images too" if data is not None else "pass --data to check its images too"
    print(f"{out}: {len(store)} images verified ({images})")
    return 0


def merge(parts: Sequence[Path], out: Path) -> int:
    """Put the images of several stores into one. ``UserError`` if they do not fit together."""
    size = sum(disk(part) for part in parts if part.is_dir())
    # What an earlier try has put there is not needed again; a shard's images are in the tail, too.
    held = disk(out) if out.is_dir() else 0
    check_free(out, max(size - held, 0) + min(size, SHARD_BYTES))
    images = merge_stores(parts, out, Progress(0, "images merged", brief=True).show_of)
    lists = [path for path in (folder / BAD_RECORDS for folder in (out, *parts)) if path.exists()]
    problems = dict.fromkeys(problem for path in lists for problem in read_problems(path))
    if problems:
        write_problems(out / BAD_RECORDS, problems)
        print(f"{out}: {len(problems)} left out, listed in {out / BAD_RECORDS}")
    print(f"{out}: {images} images from {len(parts)} stores, {megabytes(disk(out))} on disk")
    return 0


class _BadRecords:
    """The list of what was left out; on disk now and then, and at the end if there is any."""

    def __init__(self, path: Path, problems: list[Problem]):
        self.path, self.problems = path, problems
        self._written = 0.0

    def __enter__(self) -> "_BadRecords":
        return self

    def __exit__(self, *_: object) -> None:
        if self.problems:
            write_problems(self.path, self.problems)
        else:
            self.path.unlink(missing_ok=True)

    def add(self, problem: Problem) -> None:
        self.problems.append(problem)
        if time.monotonic() - self._written > FLUSH_SECONDS:
            write_problems(self.path, self.problems)
            self._written = time.monotonic()


def _jobs(args: argparse.Namespace, shard: int, shards: int) -> tuple[Jobs, list[Problem]]:
    if not args.data.exists():
        raise UserError(
            f"{args.data}: no such data folder; make one with `agevlm scenes --out {args.data}` "
            "or pass your own"
        )
    records = read_records(args.data, on_error=args.on_error)
    for note in records.notes():
        print(note)
    jobs = Jobs(records, args.prompt, every_image=args.features, on_error=args.on_error)
    if not jobs:
        raise UserError(f"{args.data}: expected phrases with a box or a point, got none to label")
    return jobs.part(shard - 1, shards, args.limit), records.problems


def _shard_of(out: Path, shard: int, shards: int) -> Path:
    return out.with_name(f"{out.name}-{shard}-of-{shards}")


def _merge_command(args: argparse.Namespace, shards: int) -> str:
    parts = [str(_shard_of(args.out, k + 1, shards)) for k in range(shards)]
    if args.shard != "auto":
        parts = [str(args.out), "OTHERS"]
    out = str(args.out) if args.shard == "auto" else "OUT"
    return "agevlm teach --merge " + shlex.join([*parts, "--out", out])


def choose_backend(wanted: str, device: str | None) -> Backend:
    """What computes the teacher: MLX on a Mac's GPU or where torch is missing, else torch.

    A device is torch's. ``UserError`` if it is asked of MLX.
    """
    if wanted == "mlx":
        if device is not None:
            raise UserError(f"--device {device}: is for --backend torch; drop one of them")
        return "mlx"
    if wanted == "torch" or device is not None:
        return "torch"
    needs = ("torch", "torchvision", "segment_anything")
    if any(importlib.util.find_spec(name) is None for name in needs):
        return "mlx"
    import mlx.core as mx

    return "mlx" if mx.metal.is_available() else "torch"


def _automatic(args: argparse.Namespace) -> Automatic | None:
    names = [field.name for field in dataclasses.fields(Automatic)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.prompt == "auto":
        return Automatic(**({} if args.checkpoint else SMALL_AUTOMATIC) | given)
    if given:
        flag = next(iter(given)).replace("_", "-")
        raise UserError(f"--{flag}: is for --prompt auto, got --prompt {args.prompt}; drop one")
    return None


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """What `student` reads."""
    add = parser.add_argument_group("student (default: the embedded model's)").add_argument
    add("--model", help="checkpoint folder whose preprocessing and grid to use")
    add("--image-size", type=_positive, metavar="PIXELS", help="side of the student's input")
    add("--resize", choices=("pad", "crop", "stretch"), help="how images become square")
    add("--grid", type=_grid, metavar="ROWSxCOLS", help="the student's token grid (default 8x8)")
    add("--preprocessing", metavar="JSON", help="all of a preprocessor_config.json, in its place")


def student(args: argparse.Namespace) -> tuple[Preprocessor, tuple[int, int]]:
    """The student's preprocessing and token grid, from its folder or from flags."""
    if args.preprocessing is not None:
        if args.model or args.image_size or args.resize:
            raise UserError(
                "--preprocessing already says all that --model, --image-size and --resize say; "
                "drop those flags"
            )
        try:
            table = json.loads(args.preprocessing)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--preprocessing: expected JSON, got {one_line(error)}") from None
        return Preprocessor.from_dict(table, "--preprocessing"), args.grid or (8, 8)
    if args.model is None:
        chosen = {"image_size": args.image_size, "resize": args.resize}
        given = {name: value for name, value in chosen.items() if value is not None}
        return Preprocessor(**given), args.grid or (8, 8)
    if args.image_size or args.resize or args.grid:
        raise UserError("--model already says image size, resize and grid; drop those flags")
    from . import weights

    loaded = weights.load(args.model)
    return loaded.preprocessor, loaded.model.grid


def _workers(wanted: int | None, teacher: Teacher) -> int:
    """How many processes: one per core for a small teacher on the CPU, else one."""
    if wanted is not None:
        return wanted
    if not teacher.light:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _grid(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS like 8x8, got {text!r}") from None
    return height, width


def _shard(text: str) -> tuple[int, int] | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        shard, shards = (int(piece) for piece in text.split("/"))
    except ValueError:
        shard, shards = 0, 0
    if not 1 <= shard <= shards:
        raise argparse.ArgumentTypeError(f"expected K/N like 1/2, or auto, got {text!r}")
    return shard, shards


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="the data: whatever `agevlm train` reads, file or folder")
    add("--out", type=Path, required=True, help="folder of the store")
    teacher = parser.add_argument_group("teacher")
    add = teacher.add_argument
    add(
        "--checkpoint",
        type=Path,
        help="SAM's weights: Meta's .pth, or the folder of a Hugging Face SamModel "
        "(default: the embedded small teacher)",
    )
    add("--model-type", choices=("vit_b", "vit_l", "vit_h"), help="check that it is this one")
    add(
        "--backend",
        choices=("auto", "torch", "mlx"),
        default="auto",
        help="what runs it (auto: mlx on a Mac or where torch is missing, else torch)",
    )
    add("--device", help="torch's mps, cuda or cpu (default: the first of them that is there)")
    add(
        "--prompt",
        choices=("box", "point", "auto"),
        default="box",
        help="show SAM boxes, or points only, or a grid of points; with auto a phrase gets the "
        "mask that fits its box or contains its point",
    )
    add("--features", action="store_true", help="store SAM's image features as well")
    _add_automatic_arguments(parser)
    add_student_arguments(parser)
    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--workers", type=_positive, help="processes (default: one per core, or one on a GPU)")
    add("--limit", type=_positive, metavar="N", help="only the first N images")
    add(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="K/N",
        help="only every Nth image, from the Kth on; auto: as mlx.launch or mpirun says, into "
        "OUT-K-of-N",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help=f"at a record or an image that cannot be used: stop, or list it in {BAD_RECORDS}",
    )
    add(
        "--end-with-stdin",
        action="store_true",
        help="end when standard input does, that is with the process that started this one",
    )
    add("--dry-run", action="store_true", help="count and forecast, write nothing")
    add("--verify", action="store_true", help="hash a finished store (and --data) again")
    add("--merge", type=Path, nargs="+", metavar="STORE", help="join stores into --out")
    return parser


def _add_automatic_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "automatic masks, for --prompt auto (default: Meta's settings; embedded teacher's)"
    ).add_argument
    add("--points-per-side", type=_positive, metavar="N", help="of the grid (32; 16)")
    add(
        "--pred-iou-thresh",
        type=float,
        metavar="SHARE",
        help="masks of a lower estimated IoU are dropped (0.88; 0.5)",
    )
    add(
        "--stability-score-thresh",
        type=float,
        metavar="SHARE",
        help="masks that change more with the threshold are dropped (0.95; 0.5)",
    )
    add(
        "--box-nms-thresh",
        type=float,
        metavar="SHARE",
        help="masks whose boxes' IoU with a better one is higher are dropped (0.7)",
    )
    add(
        "--min-mask-region-area",
        type=_positive,
        metavar="PIXELS",
        help="smaller holes and islands of a mask are filled and dropped (none)",
    )
    add(
        "--match-thresh",
        type=float,
        metavar="SHARE",
        help="a phrase takes the mask whose box has the highest IoU with its own, if not lower "
        "(0.5)",
    )


if __name__ == "__main__":
    sys.exit(main())
