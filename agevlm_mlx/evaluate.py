"""`agevlm evaluate`: score a model on a benchmark, with controls and intervals."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from . import errors, weights
from .errors import UserError
from .evaluation import files, scenes
from .evaluation.benchmark import Benchmark, Result, Settings, flatten
from .evaluation.machine import machine, versions

#: name -> (benchmark, what it measures). A new benchmark is one file and one line here.
BENCHMARKS: dict[str, tuple[Benchmark, str]] = {
    "scenes": (
        scenes.run,
        "held-out embedded scenes: POPE, matching, hallucinated objects, grounding",
    ),
}

EXAMPLES = """
benchmarks:
{benchmarks}

examples:
  agevlm scenes --out data/test --n 500 --seed 7 --split test
  agevlm evaluate --benchmark scenes --data data/test
  agevlm evaluate --benchmark scenes --data data/test --model runs/demo/concat --limit 100

Writes OUT/BENCHMARK-MODEL.json (numbers, 95 % intervals, settings, versions) and a .jsonl
beside it with every single answer.
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    unknown = [name for name in args.benchmark if name not in BENCHMARKS]
    if unknown:
        raise UserError(f"--benchmark: expected one of {', '.join(BENCHMARKS)}, got {unknown[0]!r}")
    if not args.data.is_dir():
        raise UserError(
            f"{args.data}: no such folder; make one with 'agevlm scenes --out {args.data} "
            "--n 500 --split test'"
        )
    out = files.make_folder(args.out)
    loaded = weights.load(args.model)
    settings = Settings(
        limit=args.limit, seed=args.seed, batch_size=args.batch_size, progress=_progress
    )
    for name in args.benchmark:
        start = time.perf_counter()
        result = BENCHMARKS[name][0](loaded, args.data, settings)
        report = describe(name, loaded, result, time.perf_counter() - start, argv)
        print(table(report))
        stem = out / f"{name}-{loaded.path.resolve().name}"
        files.write_json_lines(stem.with_name(stem.name + ".jsonl"), result.answers)
        files.write_json(stem.with_name(stem.name + ".json"), report)
        print(f"written: {stem}.json, {stem.name}.jsonl ({len(result.answers)} answers)")
    return 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{text}" for name, (_, text) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES.format(benchmarks=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--benchmark",
        required=True,
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAME[,NAME]",
        help="what to measure (see below)",
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of the benchmark's data")
    parser.add_argument(
        "--model", help="checkpoint folder or hub id (default: the demo's model or the shipped one)"
    )
    parser.add_argument("--limit", type=int, help="a random sample of this many images")
    parser.add_argument("--seed", type=int, default=0, help="of samples, shuffles and draws")
    parser.add_argument("--batch-size", type=int, default=50, help="images looked at together")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of the results (default: results)"
    )
    return parser


def describe(
    name: str,
    loaded: weights.Loaded,
    result: Result,
    seconds: float,
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """Everything about one evaluation except its answers, as written to JSON."""
    command = sys.argv[1:] if argv is None else argv
    return {
        "benchmark": name,
        "command": shlex.join(["agevlm", "evaluate", *command]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "model": {
            "path": str(loaded.path),
            "fingerprint": weights.fingerprint(loaded.path),
            "fusion": loaded.model.fusion,
            "parameters": sum(
                v.size for v in dict(tree_flatten(loaded.model.parameters())).values()
            ),
            "grid": list(loaded.model.grid),
        },
        "versions": versions(),
        "machine": machine(),
        "settings": dict(result.settings),
        "counts": dict(result.counts),
        "metrics": dict(result.metrics),
        "intervals": {key: list(pair) for key, pair in result.intervals.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """The numbers of `describe` for a terminal, each with its interval."""
    lines = [
        f"{report['benchmark']} on {report['counts']['images']} images, {report['seconds']:.0f} s"
    ]
    model = report["model"]
    lines.append(f"model {model['path']} ({model['fingerprint']}, {model['fusion']})")
    flat, intervals = flatten(report["metrics"]), report["intervals"]
    width = max(map(len, flat)) + 2
    for name, value in flat.items():
        interval = ""
        if name in intervals:
            low, high = intervals[name]
            interval = f"   [{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:<{width}}{value:.3f}{interval}")
    return "\n".join(lines)


def _progress(task: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r  {task:<28}{done}/{total} ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
