"""`agevlm evaluate`: score a model on benchmarks, with controls and intervals."""

import argparse
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from . import benchmarks, errors, hub
from .benchmarks import benchmark
from .errors import UserError
from .evaluation import compare, files, result
from .evaluation.benchmark import Benchmark, Item
from .evaluation.run import Settings, prompted, sample
from .evaluation.source import Source
from .evaluation.summary import table
from .parallel import terminate_as_interrupt

#: Characters of a question with its options; published ones have hundreds.
_LONGEST = 8000

EXAMPLES = """
benchmarks:
{benchmarks}

examples:
  agevlm scenes --out data/test --n 500 --seed 7 --split test
  agevlm evaluate --benchmark scenes --data data/test
  agevlm evaluate --benchmark pope,chair --data coco --model runs/mine --limit 100
  agevlm evaluate --benchmark pope --data lmms-lab/POPE --dry-run
  agevlm evaluate --compare results/pope-mine.json results/pope-other.json

Beside each number stand the same one without an image (blind), with another image (shuffled),
for always the same answer, and for the commonest answer to each question (majority, which knows
the labels). Writes OUT/BENCHMARK-MODEL.json (numbers, 95 % intervals, settings, versions) and a
.jsonl beside it with every answer, as it comes: a run that was broken off goes on where it was, and
a result is not replaced by one of other settings or another model unless --fresh is given.
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    settings = Settings(
        limit=args.limit,
        seed=args.seed,
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        skip_bad=args.skip_bad,
    )
    if args.compare:
        return _compare(args)
    chosen = _benchmarks(args)
    folder = _folder(args.data)
    with ExitStack() as stack:
        stack.enter_context(terminate_as_interrupt())  # nothing is left in the temporary folder
        # All of them first: what is missing is told before hours of work, not after.
        read = [(one, *_read(one, folder, settings, stack)) for one in chosen]
        if args.dry_run:
            for one, items, problems in read:
                print(_plan(one, items, problems, settings))
            return 0
        out = files.make_folder(args.out)
        from .respondents import respondent  # MLX only once there is something to ask

        model = respondent(args.model)
        command = shlex.join(["agevlm", "evaluate", *(sys.argv[1:] if argv is None else argv)])
        for one, items, problems in read:
            to = result.Out(out, folder, model, command, problems, args.fresh)
            _evaluate(one, items, to, settings, args.all)
    return 0


def _read(
    one: Benchmark, folder: Path, settings: Settings, stack: ExitStack
) -> tuple[list[Item], list[str]]:
    """What is to be asked, and what was left out."""
    source = stack.enter_context(Source(folder, settings.skip_bad))
    items = []
    for item in one.read(source):
        size = len(item.prompt) + sum(map(len, item.options))
        if size > _LONGEST:  # it would take the memory of all others together
            source.bad(item.key, f"expected at most {_LONGEST} characters to ask, got {size}")
        else:
            items.append(item)
    source.check(one.needs)
    if not items:
        raise UserError(f"{folder}: expected something to ask, got nothing; {one.needs}")
    settings.check_prompt(items)
    return sample(items, settings), source.problems


def _benchmarks(args: argparse.Namespace) -> list[Benchmark]:
    if not args.benchmark:
        raise UserError(f"--benchmark: expected one of {', '.join(benchmarks.NAMES)}, got nothing")
    for name in args.benchmark:
        if name not in benchmarks.NAMES:
            raise UserError(
                f"--benchmark: expected one of {', '.join(benchmarks.NAMES)}, got {name!r}"
            )
    return [benchmark(name) for name in dict.fromkeys(args.benchmark)]


def _folder(data: str | None) -> Path:
    """The folder itself, or that of a hub id."""
    if not data:
        raise UserError("--data: expected the benchmark's folder or a hub id, got nothing")
    try:
        folder = Path(data).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a ~user unknown here, a NUL
        raise UserError(
            f"--data: expected a folder or a hub id like org/name: {errors.one_line(error)}"
        ) from None
    if is_file:
        raise UserError(f"--data: expected a folder, got the file {data}; pass the folder it is in")
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(
            f"--data: {data}: no such folder; pass the benchmark's folder or a hub id like "
            "org/name, or make scenes with `agevlm scenes --out "
            f"{shlex.quote(data)} --n 500 --split test`"
        )
    return hub.download_dataset(data)


def _evaluate(
    one: Benchmark, items: Sequence[Item], out: result.Out, settings: Settings, everything: bool
) -> None:
    bar = _Progress(one.name)
    try:
        report = result.evaluate(one, items, settings, out, bar.show)
    except KeyboardInterrupt:
        bar.end()
        kept = f"{bar.done} of {len(items)} items are answered and kept"
        print(f"\n{one.name}: {kept}; the same command goes on from there", file=sys.stderr)
        raise
    finally:
        bar.end()
    before, total = report["answered_before"], report["counts"]["items"]
    if before:
        print(f"{one.name}: {before} of {total} items were answered before")
    if report["asked_again"]:
        print(f"{one.name}: {report['asked_again']} were asked again, as their data have changed")
    print(table(report, one, everything))
    print(
        f"written: {out.result(one)}, {out.answers(one).name} ({report['counts']['items']} answers)"
    )


def _plan(
    one: Benchmark, items: Sequence[Item], problems: Sequence[str], settings: Settings
) -> str:
    """What would be asked, for --dry-run."""
    images = {item.image for item in items} - {None}
    kinds = Counter(item.kind for item in items)
    asked = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    first = items[0]
    prompt = first.prompt
    if first.kind in prompted(items):
        prompt = (settings.prompt or one.prompt).replace("{question}", prompt)
    lines = [
        f"{one.name}: {len(items)} items ({asked}) about {len(images)} images, "
        f"{len({item.unit for item in items})} units",
        f"  the first is {first.key}: {prompt!r}, right: {first.label!r}",
        f"  at most {settings.max_tokens or one.max_tokens} tokens an answer, greedy",
    ]
    lines += [f"  left out: {problem}" for problem in problems]
    return "\n".join(lines)


def _compare(args: argparse.Namespace) -> int:
    paths = [Path(path) for path in args.compare]
    (a, first), (b, second) = map(compare.read_result, paths)
    if a["benchmark"] != b["benchmark"]:
        raise UserError(
            f"--compare: expected results of one benchmark, got {a['benchmark']} and "
            f"{b['benchmark']}"
        )
    if a["benchmark"] not in benchmarks.NAMES:
        raise UserError(f"--compare: {a['benchmark']!r} is no benchmark of this version")
    one = benchmark(a["benchmark"])
    for path, found, rows in ((paths[0], a, first), (paths[1], b, second)):
        compare.check(one, found, rows, path)
    differences = compare.differences(one, first, second, seed=args.seed)
    common = len({row["key"] for row in first} & {row["key"] for row in second})
    print(f"{one.name}: {common} items answered by both, of {len(first)} and {len(second)}")
    for line in compare.unlike(a, b):
        print(f"  not the same: {line}")
    print(compare.table((str(paths[0]), str(paths[1])), differences))
    return 0


class _Progress:
    """One line on a terminal: how many of how many, and how long it will take."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[int, float] | None = None
        self._shown = False
        self.done = 0

    def show(self, done: int, total: int) -> None:
        now, self.done = time.perf_counter(), done
        if self._first is None:
            self._first = done, now
        before, start = self._first
        if not sys.stderr.isatty():
            return
        left = "" if done <= before else (now - start) / (done - before) * (total - done)
        text = f"{self._name}: {done} of {total}" + (f", {_duration(left)} left" if left else "")
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
        self._shown = False


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<16}{benchmark(name).about}" for name in benchmarks.NAMES)
    parser = argparse.ArgumentParser(
        prog="agevlm evaluate",
        description="Score a model on benchmarks, with controls and intervals.",
        epilog=EXAMPLES.format(benchmarks=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--benchmark",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAME[,NAME]",
        help="what to measure (see below)",
    )
    add("--data", help="folder of the benchmark's data as published, or a hub id")
    add("--model", help="checkpoint folder or hub id (default: the demo's or the shipped one)")
    add("--limit", type=int, help="a random sample of this many images (or pairs, or sets)")
    add("--seed", type=int, default=0, help="of samples, shuffles and draws (default: 0)")
    add(
        "--prompt",
        help="put around every question, as '{question} Answer yes or no.', or in place of the "
        "one question of a captioning benchmark",
    )
    add("--max-tokens", type=int, help="of an answer (default: the benchmark's own)")
    add("--batch-size", type=int, default=50, help="images at once (default: 50)")
    add("--skip-bad", action="store_true", help="leave out and count what cannot be used")
    add("--fresh", action="store_true", help="ask everything again, replace what is there")
    add("--dry-run", action="store_true", help="say what would be asked, and stop")
    add("--all", action="store_true", help="print every number, not only the main ones")
    add("--out", type=Path, default=Path("results"), help="folder to write (default: results)")
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two results: the difference of every number, with its interval",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
