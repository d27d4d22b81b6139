"""`agevlm teach`: run the SAM teacher over a data folder and store what it sees.

The store holds, for every box or point of the data's phrases, the share of each of the
student's token cells that SAM's mask covers, and optionally SAM's image features on the
same grid. Training reads the store and never runs SAM. Interrupt and repeat at will: the
same command continues where it stopped.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import errors
from .data.image import Preprocessor
from .data.records import read_records
from .errors import UserError
from .sam.labelling import Job, Labeller, Teacher, collect, label_all
from .sam.store import Store, StoreMeta, StoreWriter, file_sha256

EXAMPLES = """
examples:
  agevlm scenes --out data/scenes --n 5000
  agevlm teach --data data/scenes --out data/scenes-sam
  agevlm teach --data photos --out photos-sam --checkpoint sam_vit_b_01ec64.pth --features
  agevlm teach --data photos --out photos-sam --model runs/mine --dry-run
  agevlm teach --data photos --out photos-sam --verify
  agevlm teach --data photos --out part1 --part 1/2     (and part 2/2 on another machine)
  agevlm teach --merge part1 part2 --out photos-sam

Meta's checkpoints: https://github.com/facebookresearch/segment-anything#model-checkpoints
"""

#: Finished images whose files are hashed again when a run continues.
SAMPLE = 64
#: Seconds between progress lines where the output is not a terminal.
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class MakeLabeller:
    """Builds the labeller; picklable, so that every worker process can build its own."""

    checkpoint: Path | None
    model_type: str | None
    device: str | None
    preprocessor: Preprocessor
    grid: tuple[int, int]
    features: bool
    threads: int | None = None

    def __call__(self) -> Labeller:
        """Load the teacher. ``UserError`` if torch is missing or the checkpoint is wrong."""
        from .sam.teacher import Teacher, set_threads

        if self.threads:
            set_threads(self.threads)
        teacher = Teacher(self.checkpoint, self.model_type, self.device)
        return Labeller(teacher, self.preprocessor, self.grid, self.features)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.merge:
        return merge(args.merge, args.out)
    if args.verify:
        return verify(args.out, args.data)
    if args.data is None:
        parser.error("--data is required (or --verify, or --merge)")
    jobs = _jobs(args)
    preprocessor, grid = student(args)
    make = MakeLabeller(
        args.checkpoint, args.model_type, args.device, preprocessor, grid, args.features
    )
    return teach(
        jobs, make, args.out, prompt=args.prompt, workers=args.workers, dry_run=args.dry_run
    )


def teach(
    jobs: Sequence[Job],
    make: MakeLabeller,
    out: Path,
    *,
    prompt: str = "box",
    workers: int | None = None,
    dry_run: bool = False,
    labeller: Labeller | None = None,
) -> int:
    """Label `jobs` into the store `out`, those that it lacks. Returns the exit status.

    `labeller` replaces the one that `make` would build, and then no process is started.
    """
    here = labeller or make()
    teacher = here.teacher
    meta = StoreMeta(
        teacher=teacher.fingerprint,
        preprocessing=make.preprocessor.fingerprint(),
        grid=make.grid,
        feature_channels=teacher.feature_channels if make.features else 0,
        prompt=prompt,
    )
    if dry_run:
        forecast(jobs, meta)
        print("dry run: nothing written")
        return 0
    with StoreWriter(out, meta) as writer:
        todo = unfinished(jobs, writer)
        if len(todo) < len(jobs):
            print(f"{out}: {len(jobs) - len(todo)} of {len(jobs)} images are done already")
        forecast(todo, meta)
        count = 1 if labeller else _workers(workers, teacher)
        if count == 1:
            results = label_all(todo, lambda: here, workers=1, batch_size=teacher.batch_size)
        else:
            one = dataclasses.replace(make, threads=1)
            results = label_all(todo, one, workers=count, batch_size=teacher.batch_size)
        progress = Progress(len(todo))
        try:
            with contextlib.closing(results):
                for done, result in enumerate(results, start=1):
                    writer.add(**vars(result))
                    progress.show(done)
        except KeyboardInterrupt:
            print(f"\n{out}: run the same command again to continue", file=sys.stderr)
            raise
    print(f"{out}: {len(Store(out))} images, {_megabytes(_disk(out))} on disk")
    return 0


def verify(out: Path, data: Path | None) -> int:
    """Hash a store, and the images of `data`, again."""
    store = Store(out)
    store.verify(None if data is None else _root(data), Progress(0, "files").show_of)
    images = "its images too" if data is not None else "pass --data to check its images too"
    print(f"{out}: {len(store)} images verified ({images})")
    return 0


def merge(parts: Sequence[Path], out: Path) -> int:
    """Put the images of several stores into one. ``UserError`` if they do not fit together."""
    stores = [Store(part) for part in parts]
    for store in stores[1:]:
        difference = stores[0].meta.difference(store.meta)
        if difference:
            raise UserError(f"{store.path}: cannot be merged with {stores[0].path}: {difference}")
    with StoreWriter(out, stores[0].meta) as writer:
        done = writer.done
        for store in stores:
            for key in store:
                if key not in done:
                    writer.add(key, **store.rows(key))
                    done.add(key)
    print(f"{out}: {len(Store(out))} images from {len(parts)} stores")
    return 0


@dataclass
class Progress:
    """A line with rate and time left: rewritten on a terminal, else one every ten seconds."""

    total: int
    what: str = "images"
    first: float = 0.0
    shown: float = 0.0

    def show(self, done: int) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        self.first = self.first or now  # not before: loading the teacher says nothing of its pace
        live = sys.stderr.isatty()
        pause = 0.2 if live else PROGRESS_SECONDS
        if done < self.total and now - (self.shown or self.first) < pause:
            return
        self.shown = now
        line = f"{self.what} {done}/{self.total}"
        if done > 1 and now > self.first:
            rate = (done - 1) / (now - self.first)
            line += f"  {rate:.1f}/s"
            line += f"  {(self.total - done) / rate:.0f} s left" if done < self.total else ""
        end = "\r" if live and done < self.total else "\n"
        print(f"{line:<60}" if live else line, end=end, file=sys.stderr, flush=True)

    def show_of(self, done: int, total: int) -> None:
        """`show` for a caller that knows the total."""
        self.total = total
        self.show(done)


def _jobs(args: argparse.Namespace) -> list[Job]:
    if not args.data.exists():
        raise UserError(
            f"{args.data}: no such data folder; make one with `agevlm scenes --out {args.data}` "
            "or pass your own"
        )
    jobs = collect(read_records(args.data), _root(args.data), args.prompt)
    jobs = [job for job in jobs if args.features or job.keys]
    if not jobs:
        raise UserError(f"{args.data}: expected phrases with a box or a point, got none to label")
    part, parts = args.part
    return jobs[part - 1 :: parts][: args.limit]


def _root(data: Path) -> Path:
    return data if data.is_dir() else data.parent


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """What `student` reads."""
    add = parser.add_argument_group("student (default: the embedded model's)").add_argument
    add("--model", help="checkpoint folder whose preprocessing and grid to use")
    add("--image-size", type=_positive, metavar="PIXELS", help="side of the student's input")
    add("--resize", choices=("pad", "crop", "stretch"), help="how images become square")
    add("--grid", type=_grid, metavar="ROWSxCOLS", help="the student's token grid (default 8x8)")


def student(args: argparse.Namespace) -> tuple[Preprocessor, tuple[int, int]]:
    """The student's preprocessing and token grid, from its folder or from flags."""
    if args.model is None:
        chosen = {"image_size": args.image_size, "resize": args.resize}
        given = {name: value for name, value in chosen.items() if value is not None}
        return Preprocessor(**given), args.grid or (8, 8)
    if args.image_size or args.resize or args.grid:
        raise UserError("--model already says image size, resize and grid; drop those flags")
    from . import weights

    loaded = weights.load(args.model)
    return loaded.preprocessor, loaded.model.grid


def unfinished(jobs: Sequence[Job], writer: StoreWriter) -> list[Job]:
    """The jobs that the store lacks. ``UserError`` if finished images have changed."""
    done = writer.done
    finished = [job for job in jobs if job.key in done]
    for job in finished[:: max(len(finished) // SAMPLE, 1)]:
        if file_sha256(job.path) != writer.sha256(job.key):
            raise UserError(
                f"{writer.path}: image {job.key} changed since it was labelled; delete the store "
                "or choose another --out"
            )
    complete = {job.key for job in finished if set(job.keys) <= set(writer.prompts(job.key))}
    return [job for job in jobs if job.key not in complete]


def _workers(wanted: int | None, teacher: Teacher) -> int:
    """How many processes: one per core for a small teacher on the CPU, else one."""
    if wanted is not None:
        return wanted
    if not teacher.light:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def forecast(jobs: Sequence[Job], meta: StoreMeta) -> None:
    """Say how much there is to store and how large it will be."""
    prompts = sum(len(job.keys) for job in jobs)
    keys = sum(len(job.key) + 130 + sum(len(key) + 4 for key in job.keys) for job in jobs)
    size = prompts * (meta.cells + 2) + len(jobs) * meta.cells * meta.feature_channels * 2 + keys
    features = f", features of {meta.feature_channels} channels" if meta.feature_channels else ""
    print(
        f"{len(jobs)} images, {prompts} prompts on a {meta.grid[0]}x{meta.grid[1]} grid{features}: "
        f"about {_megabytes(size)}"
    )


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB" if size < 2**30 else f"{size / 2**30:.2f} GB"


def _grid(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS like 8x8, got {text!r}") from None
    return height, width


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(piece) for piece in text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"expected PART/PARTS like 1/2, got {text!r}")
    return part, parts


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="data folder, or one .json/.jsonl file of records")
    add("--out", type=Path, required=True, help="folder of the store")
    teacher = parser.add_argument_group("teacher")
    add = teacher.add_argument
    add("--checkpoint", type=Path, help="a SAM checkpoint (default: the embedded small teacher)")
    add("--model-type", choices=("vit_b", "vit_l", "vit_h"), help="check that it is this one")
    add("--device", help="mps, cuda or cpu (default: the first of them that is there)")
    add("--prompt", choices=("box", "point"), default="box", help="show SAM boxes or points only")
    add("--features", action="store_true", help="store SAM's image features as well")
    add_student_arguments(parser)
    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--workers", type=_positive, help="processes (default: one per core, or one on a GPU)")
    add("--limit", type=_positive, metavar="N", help="only the first N images")
    add("--part", type=_part, default=(1, 1), metavar="K/N", help="only every Nth image, from K")
    add("--dry-run", action="store_true", help="count and forecast, write nothing")
    add("--verify", action="store_true", help="hash a finished store (and --data) again")
    add("--merge", type=Path, nargs="+", metavar="STORE", help="join stores into --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
