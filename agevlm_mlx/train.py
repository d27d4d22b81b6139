"""`agevlm train`: train a model from a recipe."""

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from . import atomic, config, malloc, watch
from .errors import UserError, command
from .training import checkpoint, preview, toml, trackers
from .training.build import Job, export, prepare
from .training.observers import Lasting, Observer
from .training.ranks import GO_ON, LOST, LostRanks, Ranks
from .training.rules import named_parameters
from .training.stages import Recipe, read_recipe, shipped_recipes
from .training.trainer import Trainer

DEFAULT_RECIPE = "scenes"

EXAMPLES = """\
examples:
  agevlm train                                     the embedded recipe
  agevlm train --dry-run                           look before: parameters, memory, time, texts
  agevlm train --recipe mine.toml --out runs/mine  your own
  agevlm train stages.1.lr=5e-4 train.seed=1 --out runs/seed1
  agevlm train --resume runs/seed1                 go on after Ctrl-C, a crash or a full disk
  mlx.launch -n 2 -- $(which agevlm) train         two processes; --hosts IP,IP for two machines

Any key of the recipe can be given as key=value; [[stages]] are stages.0, stages.1 and so on.
Ctrl-C finishes the step, saves and leaves; twice leaves at once.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of ``agevlm train``."""
    p = argparse.ArgumentParser(
        prog="agevlm train",
        description="Train a model from a recipe: align, guide, instruct, refine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe")
    names = ", ".join(shipped_recipes())
    p.add_argument(
        "--recipe",
        metavar="FILE",
        help=f"a .toml file or one of: {names} (default {DEFAULT_RECIPE})",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: the recipe's)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    p.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder")
    p.add_argument("--dry-run", action="store_true", help="show what would be trained, and stop")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``agevlm train``; 0 when the model is written or a signal ended the run in order."""
    args = parser().parse_intermixed_args(argv)
    malloc.keep_freed()
    ranks = Ranks.start()
    try:
        with contextlib.redirect_stdout(cast(io.TextIOBase, Lasting(sys.stdout))):
            status = _run(args, ranks)
    except LostRanks as error:
        print(f"error: {LOST} ({error}); {GO_ON}", file=sys.stderr, flush=True)
        # MLX's threads of a broken ring cannot be ended in order.
        os._exit(2)
    ranks.goodbye()
    return status


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    say = print if ranks.first else _silent
    with ranks.together():
        recipe, run = _recipe(args) if ranks.first else (None, None)
        if run is not None and args.resume is None and not args.dry_run:
            _check_folder(run, args.overwrite)
    # What rank 0 has read counts: the others may lack the file, and the folder of the run.
    tables = ranks.share([config.to_dict(recipe), str(run)] if recipe else None)
    recipe, run = config.from_dict(Recipe, tables[0]), Path(tables[1])
    if args.dry_run:
        return _dry_run(recipe) if ranks.first else 0
    with ranks.together():
        if ranks.first:
            trackers.require(recipe.train.report_to)
    if ranks.size > 1:
        say(f"{ranks.size} processes train together")
    job = prepare(recipe, args.resume, say, ranks=ranks)
    with contextlib.ExitStack() as held:
        with ranks.together():
            if ranks.first:
                held.enter_context(checkpoint.alone(run))
                if args.resume is None:
                    _start(run, job)
        return _train(args, job, run, ranks, say)


def _train(
    args: argparse.Namespace, job: Job, run: Path, ranks: Ranks, say: Callable[..., None]
) -> int:
    recipe = job.recipe
    with ranks.together():
        saved = checkpoint.load(run) if ranks.first else None
        step = saved.step if saved else 0
        observers = _observers(run, job, step) if ranks.first else []
    trainer = Trainer(job, run, ranks=ranks, observers=observers)
    trainer.restore(saved)
    if saved is not None:
        say(f"going on from step {saved.step} of {recipe.steps} in {run}")
    elif args.resume is not None:
        say(f"{run} has no checkpoint yet: starting at step 1")
    if not trainer.train():
        say(
            f"stopped after step {trainer.step} of {recipe.steps}; "
            f"go on with: agevlm train --resume {run}"
        )
        return 0
    if trainer.step < recipe.steps:
        say(f"ended at step {trainer.step}: validation has not improved {trainer.stale} times")
    if ranks.first:
        trainer.finish()
        export(job, run)
        size = sum(value.size for value in named_parameters(job.model).values())
        say(f"wrote {run} ({size:,} parameters); try: agevlm evaluate --model {run}")
    return 0


def _silent(*args: object, **kwargs: object) -> None:
    """Says nothing: one process speaks for all."""


def _observers(run: Path, job: Job, step: int) -> list[Observer]:
    """Who is told of the run besides ``metrics.jsonl`` and the terminal."""
    train = job.recipe.train
    reports = trackers.open_trackers(train.report_to, run, config.to_dict(job.recipe), step)
    return [*([watch.Pictures(run, job)] if train.pictures_every else []), *reports]


def _recipe(args: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe to train and the folder of its run."""
    if args.resume is None:
        overrides = list(args.overrides)
        if args.out is not None:
            overrides.append(f"train.out={json.dumps(str(args.out))}")
        recipe = read_recipe(args.recipe or DEFAULT_RECIPE, overrides)
        return recipe, recipe.train.out
    if args.recipe or args.out or args.overwrite:
        raise UserError(
            "--resume takes the recipe of its run; leave out --recipe, --out and --overwrite"
        )
    stored = args.resume / "config.toml"
    if not stored.is_file():
        raise UserError(
            f"--resume {args.resume}: expected the folder of a run, found no config.toml in it"
        )
    return read_recipe(str(stored), args.overrides), args.resume


def _check_folder(run: Path, overwrite: bool) -> None:
    """``UserError`` unless a new run may be written to `run`."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: expected a folder for the run, found a file; choose another --out")
    if not run.is_dir() or not any(path.name != checkpoint.LOCK for path in run.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{run} is not empty; go on with --resume {run}, replace the run in it with "
            "--overwrite, or choose another folder with --out"
        )
    if not (run / "config.toml").is_file():
        raise UserError(f"--overwrite: {run} holds no run (no config.toml); choose another --out")


def _start(run: Path, job: Job) -> None:
    """Make the run's folder: what `--resume` needs, and nothing of an earlier run."""
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.clear(run)
    job.tokenizer.save_pretrained(str(run))
    atomic.write_text(run / "config.toml", toml.dumps(config.to_dict(job.recipe)))


def _dry_run(recipe: Recipe) -> int:
    job = prepare(recipe, teach=False)
    for line in preview.lines(job, sys.stdout.isatty()):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
