"""`agevlm analyze`: does a model tell captions apart, and does it look where the words are?"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import config, errors, weights
from .analysis import causal, figures, looking, matching, report
from .analysis.examples import Example, about_data, read_examples
from .analysis.subject import Subject, subject
from .atomic import write_text
from .errors import UserError
from .evaluation import files
from .evaluation.machine import machine, versions

#: name -> what it asks.
PARTS = {
    "matching": "does it tell the caption of a picture from another one, and at which layer?",
    "attention": "does it look where the thing is that it is asked about? Which heads do?",
    "causal": "does the answer change when the thing is blanked out of the picture?",
}

EXAMPLES = """
parts:
{parts}

data: a folder made by 'agevlm scenes', COCO's captions and instances with their images, or
records (.jsonl) with phrases and boxes or masks

examples:
  agevlm scenes --out data/test --n 200 --seed 7 --split test
  agevlm analyze --data data/test --limit 100
  agevlm analyze --data data/test --model runs/demo/concat --model runs/demo/guided
  agevlm analyze --data coco --model some/mlx-vlm-folder --only matching --others 7

Writes OUT/report.html, one page with everything in it, and the same numbers as OUT/report.json.
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    _check(args)
    figures.require()
    settings = matching.Settings(
        others=args.others,
        question=args.question,
        boots=args.boots,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=_progress,
    )
    examples = read_examples(args.data, args.limit, args.seed)
    sources = args.model or [None]
    for source in sources:
        weights.resolve(source)  # so that a wrong name is said before minutes of work
    parts = _possible(args, examples)
    out = files.make_folder(args.out)
    for name in ("report.html", "report.json"):
        files.check_writable(out / name)
    command = shlex.join(["agevlm", "analyze", *(sys.argv[1:] if argv is None else argv)])
    if not args.fresh:
        _check_same(out / "report.json", command)
    started = time.perf_counter()
    sources, models = args.model or [None], []

    def write() -> dict[str, Any]:
        result = {
            "command": command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - started,
            "data": {"path": str(args.data), "images": len(examples), **about_data(args.data)},
            "settings": {
                name: getattr(args, name)
                for name in ("limit", "seed", "boots", "others", "question", "batch_size")
            }
            | {"only": parts},
            "versions": versions(),
            "machine": machine(),
            "models": models,
        }
        captions = {str(example.image): example.caption for example in examples}
        files.write_json(out / "report.json", result)
        write_text(out / "report.html", report.render(result, captions))
        return result

    try:
        for source in sources:
            one = subject(source)
            print(f"{one.about['path']}: {len(examples)} pictures", file=sys.stderr)
            models.append({"about": dict(one.about), **_analyse(one, examples, parts, settings)})
            for line in report.problems(models[-1:]):
                print(f"left out: {line}", file=sys.stderr)
    except BaseException:
        if models:  # what is done is not lost with what fails
            write()
            print(
                f"\n{out / 'report.html'} has {len(models)} of {len(sources)} models",
                file=sys.stderr,
            )
        raise
    for sentence in report.sentences(write()):
        print(sentence)
    print(f"written: {out / 'report.html'}, report.json")
    return 0


def _check_same(path: Path, command: str) -> None:
    """``UserError`` rather than the loss of the report of another analysis."""
    if not path.is_file():
        return
    try:
        before = config.read_json(path)
    except UserError:
        return
    made = before.get("command") if isinstance(before, dict) else None
    if made != files.plain(command):
        raise UserError(
            f"{path.parent}: has the report of {made!r}; --fresh replaces it, another --out keeps "
            "both"
        )


def _possible(args: argparse.Namespace, examples: Sequence[Example]) -> list[str]:
    """The parts for which there is something in the data."""
    about_objects = [name for name in args.only if name != "matching"]
    if not about_objects or any(example.objects for example in examples):
        return args.only
    listed = " and ".join(about_objects)
    if about_objects == args.only:
        raise UserError(f"--only {listed}: expected objects with masks in {args.data}, got none")
    print(f"{args.data}: no objects with masks, so no {listed}", file=sys.stderr)
    return [name for name in args.only if name not in about_objects]


def _analyse(
    one: Subject, examples: Sequence[Example], parts: Sequence[str], settings: matching.Settings
) -> dict[str, Any]:
    """The parts that were asked for; the others are None."""
    options = {
        "batch_size": settings.batch_size,
        "boots": settings.boots,
        "seed": settings.seed,
        "progress": settings.progress,
    }
    measures: Mapping[str, Callable[[], dict[str, Any]]] = {
        "matching": lambda: matching.measure(one, examples, settings),
        "attention": lambda: looking.looking(one, examples, **options),
        "causal": lambda: causal.causal(one, examples, **options),
    }
    return {name: measures[name]() if name in parts else None for name in PARTS}


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<11}{text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES.format(parts=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        help="checkpoint folder or hub id of ours, or a folder that mlx-vlm loads; given several "
        "times, they stand side by side (default: the demo's model or the shipped one)",
    )
    parser.add_argument("--data", required=True, type=Path, help="pictures, captions and masks")
    parser.add_argument("--limit", type=int, help="a random sample of this many pictures")
    parser.add_argument("--seed", type=int, default=0, help="of samples, mismatches and draws")
    parser.add_argument(
        "--only",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=list(PARTS),
        metavar="PART[,PART]",
        help="some of the parts below (default: all)",
    )
    parser.add_argument(
        "--others",
        type=int,
        default=matching.Settings.others,
        help="captions of other pictures that each picture meets (default: %(default)s)",
    )
    parser.add_argument(
        "--question",
        default=matching.Settings.question,
        help="how to ask whether a caption fits (default: %(default)r)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=matching.Settings.batch_size, help="pictures together"
    )
    parser.add_argument("--boots", type=int, default=1000, help="bootstrap draws (default: 1000)")
    parser.add_argument(
        "--fresh", action="store_true", help="replace the report of another analysis"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/analysis"),
        help="folder of the report (default: results/analysis)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    unknown = [name for name in args.only if name not in PARTS]
    if unknown or not args.only:
        got = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"--only: expected some of {', '.join(PARTS)}, got {got}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed: expected 0 to 2^31 - 1, got {args.seed}")
    for name in ("batch_size", "boots", "others"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: expected 1 or more, got {getattr(args, name)}")
    if args.boots > 100_000:
        raise UserError(f"--boots: expected at most 100000, got {args.boots}")
    models = args.model or []
    if len(models) > figures.MODELS:
        raise UserError(f"--model: expected at most {figures.MODELS}, got {len(models)}")
    if len({os.path.realpath(os.path.expanduser(model)) for model in models}) < len(models):
        raise UserError("--model: expected different models, got the same one twice")


def _progress(task: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r  {task:<20}{done}/{total} ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
