"""`agevlm evaluate`: score a model on benchmarks, with controls and intervals."""

import argparse
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import benchmarks, config, errors, hub
from .benchmarks import benchmark
from .errors import UserError
from .evaluation import compare, files, scoring
from .evaluation.answers import AnswerFile
from .evaluation.benchmark import Benchmark, Item
from .evaluation.machine import machine, versions
from .evaluation.run import Run, Settings, digest, sample
from .evaluation.source import Source
from .evaluation.summary import table

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
.jsonl beside it with every answer, as it comes: a run that was broken off goes on where it was.
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    if args.compare:
        return _compare(args)
    chosen = _benchmarks(args)
    settings = Settings(
        limit=args.limit,
        seed=args.seed,
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        skip_bad=args.skip_bad,
    )
    if args.data is None:
        raise UserError("--data: expected the benchmark's folder or a hub id, got nothing")
    folder = _folder(args.data)
    out = None if args.dry_run else files.make_folder(args.out)
    model = None
    for one in chosen:
        with Source(folder, args.skip_bad) as source:
            items = one.read(source)
            source.check(one.needs)
            if not items:
                raise UserError(f"{folder}: expected something to ask, got nothing; {one.needs}")
            settings.check_prompt(items)
            items = sample(items, settings)
            if out is None:
                print(_plan(one, items, source.problems, settings))
                continue
            if model is None:
                from .respondents import respondent  # MLX only once there is something to ask

                model = respondent(args.model)
            _evaluate(one, items, source.problems, model, settings, out, args, argv)
    return 0


def _benchmarks(args: argparse.Namespace) -> list[Benchmark]:
    if not args.benchmark:
        raise UserError(f"--benchmark: expected one of {', '.join(benchmarks.NAMES)}, got nothing")
    for name in args.benchmark:
        if name not in benchmarks.NAMES:
            raise UserError(
                f"--benchmark: expected one of {', '.join(benchmarks.NAMES)}, got {name!r}"
            )
    return [benchmark(name) for name in dict.fromkeys(args.benchmark)]


def _folder(data: str) -> Path:
    """The folder itself, or that of a hub id."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"--data: expected a folder, got the file {data}; pass the folder it is in")
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(
            f"--data: {data}: no such folder; pass the benchmark's folder or a hub id like "
            "org/name, or make scenes with `agevlm scenes --out "
            f"{shlex.quote(data)} --n 500 --split test`"
        )
    return hub.download_dataset(data)


def _evaluate(
    one: Benchmark,
    items: Sequence[Item],
    problems: Sequence[str],
    model: Any,
    settings: Settings,
    out: Path,
    args: argparse.Namespace,
    argv: list[str] | None,
) -> None:
    stem = out / f"{one.name}-{model.about['name']}"
    result_file, answer_file = (stem.with_name(stem.name + end) for end in (".json", ".jsonl"))
    begun = {
        "benchmark": one.name,
        "items": digest(items),
        "model": dict(model.about),
        "settings": {
            "limit": settings.limit,
            "seed": settings.seed,
            "prompt": settings.prompt or one.prompt,
            "max_tokens": settings.max_tokens or one.max_tokens,
            "text_tokens": settings.max_tokens or one.text_tokens or one.max_tokens,
            "decoding": "greedy",
            "batch_size": settings.batch_size,
            "boots": settings.boots,
        },
    }
    fresh = args.fresh or not _goes_on(result_file, answer_file, begun)
    start = time.perf_counter()
    with AnswerFile(answer_file, fresh) as answers:
        before = len(answers.rows)
        if before:
            print(f"{one.name}: {before} of {len(items)} items answered before, kept")
        files.write_json(result_file, {**begun, "finished": None})
        bar = _Progress(one.name, before)
        run = Run(model, one, settings, answers, bar.show)
        try:
            run.ask(items)
        except KeyboardInterrupt:
            print(
                f"\n{len(answers.rows)} of {len(items)} items are answered and kept; the same "
                "command goes on from there",
                file=sys.stderr,
            )
            raise
        finally:
            bar.end()
        rows = [answers.rows[item.key] for item in items if item.key in answers.rows]
    if not rows:
        raise UserError(f"{one.name}: expected at least one item that can be asked, got none")
    scored = scoring.score(one, rows, scoring.units(rows), settings.boots, settings.seed)
    left_out = [*problems, *run.problems]
    report = {
        **begun,
        "command": shlex.join(["agevlm", "evaluate", *(sys.argv[1:] if argv is None else argv)]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - start,
        "answered_before": before,
        "versions": versions(),
        "machine": machine(),
        "counts": {
            "items": len(rows),
            "images": len({row["image"] for row in rows} - {None}),
            "units": len(scoring.units(rows)),
            "bad": len(left_out),
        },
        "problems": left_out,
        **scoring.report(scored),
    }
    print(table(report, one, args.all))
    files.write_json(result_file, report)
    print(f"written: {result_file}, {answer_file.name} ({len(rows)} answers)")


def _goes_on(result_file: Path, answer_file: Path, begun: Mapping[str, Any]) -> bool:
    """Whether the answers there are to the same questions by the same model.

    ``UserError`` rather than the loss of a run of another kind that is not finished.
    """
    if not answer_file.is_file() or not answer_file.stat().st_size:
        return False
    try:
        before = config.read_json(result_file)
    except UserError:  # none, or a damaged one: nothing is known of the answers
        return False
    before = before if isinstance(before, dict) else {}
    changed = [key for key in begun if before.get(key) != files.plain(begun[key])]
    if changed and before and before.get("finished") is None:
        raise UserError(
            f"{answer_file}: expected the answers of the same evaluation, but {changed[0]} "
            "differs from that of a run that was broken off here; finish it, pass --fresh to "
            "drop its answers, or choose another --out"
        )
    return not changed


def _plan(
    one: Benchmark, items: Sequence[Item], problems: Sequence[str], settings: Settings
) -> str:
    """What would be asked, for --dry-run."""
    images = {item.image for item in items} - {None}
    kinds = Counter(item.kind for item in items)
    asked = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    first = items[0]
    prompt = first.prompt
    if first.kind != "look":
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
    found = compare.differences(one, first, second, seed=args.seed)
    common = len({row["key"] for row in first} & {row["key"] for row in second})
    print(compare.table((str(paths[0]), str(paths[1])), found, common))
    return 0


class _Progress:
    """One line on a terminal: how many of how many, and how long it will take."""

    def __init__(self, name: str, before: int) -> None:
        self._name, self._before, self._start = name, before, time.perf_counter()
        self._shown = False

    def show(self, done: int, total: int) -> None:
        new = done - self._before
        if not sys.stderr.isatty() or (new <= 0 and done < total):
            return
        left = (time.perf_counter() - self._start) / new * (total - done) if new > 0 else 0.0
        text = f"{self._name}: {done} of {total}, {_duration(left)} left"
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)


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
    add("--fresh", action="store_true", help="ask everything again")
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
