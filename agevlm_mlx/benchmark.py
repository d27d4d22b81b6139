"""`agevlm benchmark`: how fast a model is here, next to its language model without images.

Times start at the vision encoder's output; every comparison takes turns in this process.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from . import errors, weights
from .benchmarking import report, shapes, traffic
from .benchmarking.measure import Bench, Settings
from .config import to_dict
from .errors import UserError
from .evaluation import files
from .evaluation.machine import on_metal, versions
from .models.agevlm import AgeVLM

#: One picture, nine and seventeen of them (or tiles of one), as SmolVLM cuts them.
SHAPE_IMAGE_TOKENS = (64, 576, 1088)

#: More of anything than a machine can hold.
MOST = 1_000_000

EXAMPLES = """
examples:
  agevlm benchmark                                       the demo's model or the shipped one
  agevlm benchmark --shape smollm2-135m --json speed.json    known sizes, random weights
  agevlm benchmark --shape llama-3.2-1b --dtype bfloat16 -q --q-bits 4
  agevlm benchmark --shape smollm2-360m --dry-run        bytes and predictions only

Sending in figures of your Mac: run the second example with nothing else running and attach
speed.json, which names the chip and all versions, to an issue.
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    _check(args)
    mx.random.seed(args.seed)
    model, name = _model(args)
    settings = _settings(args, model)
    about = {
        "command": shlex.join(["agevlm", "benchmark", *(sys.argv[1:] if argv is None else argv)]),
        "model": _describe(model, name),
        "settings": vars(settings),
        "machine": report.facts(),
        "versions": versions(),
    }
    print(f"{report.model_line(about['model'])}\n{report.machine_line(about['machine'])}\n")
    bench = Bench(model, settings, report.progress)
    memory = bench.memory()
    moved = bench.moved(memory)
    measured = {
        "memory": memory,
        "bytes_per_token": {which: t.describe() for which, t in moved.items()},
    }
    print(report.memory_lines(measured))
    about |= {"measured": measured, "targets": []}
    if not args.dry_run:
        measured |= _time(bench, moved)
        report.progress("")
        print(f"\n{report.measured_tables(measured)}")
        if args.shape:  # what a checkpoint should reach depends on its sizes
            about["targets"] = report.targets(measured)
            print(f"\n{report.target_table(about['targets'])}")
    about["predicted"] = {
        "assumption": traffic.ASSUMPTION,
        "gigabytes_per_second": traffic.CHIPS,
        "formats": traffic.predicted(model, moved["agevlm"], memory["bytes_a_number"]),
    }
    print(f"\n{report.predicted_table(about['predicted'])}")
    about["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    if args.json:
        files.write_json(args.json, about)
        print(f"\nwritten: {args.json}")
    return 0


def _time(bench: Bench, moved: Mapping[str, traffic.Traffic]) -> dict[str, Any]:
    """Everything that takes time to find out."""
    decode = bench.decode()
    bandwidth = traffic.bandwidth(bench.settings.trials)
    best = bandwidth["best"] * 1e9
    limit = {}
    for name, rate in decode["tokens_per_second"].items():
        total = moved["text_only" if name == "text_only" else "agevlm"].total
        limit[name] = {
            "tokens_per_second": best / total,
            "share_of_bandwidth": rate["median"] * total / best,
        }
    return {
        "first_token": {n: bench.first_token(n) for n in bench.settings.image_tokens},
        "decode": decode,
        "batch": bench.batch(),
        "bandwidth": bandwidth,
        "limit": limit,
    }


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("prompt_tokens", 2),
        ("generation_tokens", 1),
        ("batch_size", 1),
        ("trials", 1),
    ):
        value = getattr(args, name)
        if not least <= value <= MOST:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected from {least} to {MOST}, got {value}")
    for tokens in args.image_tokens or ():
        if tokens > MOST:
            raise UserError(f"--image-tokens: expected at most {MOST}, got {tokens}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: expected from 0 to 2^63 - 1, got {args.seed}")
    if args.q_bits is not None and not args.quantize:
        raise UserError("--q-bits: expected together with -q")
    if args.json:
        files.check_writable(args.json)


def _model(args: argparse.Namespace) -> tuple[AgeVLM, str]:
    """The model to measure and what it is called."""
    if args.shape:
        default = "bfloat16" if on_metal() else "float32"
        dtype = shapes.DTYPES[args.dtype or default]
        model = shapes.random_model(shapes.SHAPES[args.shape], shapes.VISION, dtype=dtype)
        name = f"{args.shape} with random weights"
    else:
        loaded = weights.load(args.model)
        model, name = loaded.model, str(loaded.path)
        if args.dtype:
            model.set_dtype(shapes.DTYPES[args.dtype])
            mx.eval(model.parameters())
    if args.quantize:
        shapes.quantize(model, args.q_bits or 4, args.q_group_size)
    return model, name


def _settings(args: argparse.Namespace, model: AgeVLM) -> Settings:
    default = SHAPE_IMAGE_TOKENS if args.shape else (model.num_image_tokens,)
    image_tokens = tuple(sorted(set(args.image_tokens or default)))
    for tokens in image_tokens:
        shapes.pictures(model, tokens)
    longest = args.prompt_tokens + args.generation_tokens
    if model.fusion == "concat":
        longest += image_tokens[-1]
    room = getattr(model.args, "max_position_embeddings", None)
    if room and longest > room:
        raise UserError(
            f"--prompt-tokens, --generation-tokens: expected at most the {room} tokens that the "
            f"model was made for, got {longest}"
        )
    return Settings(
        image_tokens, args.prompt_tokens, args.generation_tokens, args.batch_size, args.trials
    )


def _describe(model: AgeVLM, name: str) -> dict[str, Any]:
    told = dict(tree_flatten(model.language_model.parameters()))
    return {
        "name": name,
        "text_config": model.config.text_config,
        "fusion_config": to_dict(model.config.fusion_config),
        "looking_layers": list(model.looking_layers),
        "image_tokens_a_picture": model.num_image_tokens,
        "language_model_bytes": sum(array.nbytes for array in told.values()),
        "dtypes": sorted({str(array.dtype).removeprefix("mlx.core.") for array in told.values()}),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", help="checkpoint folder or hub id (default: the demo's model or the shipped one)"
    )
    which.add_argument(
        "--shape", choices=tuple(shapes.SHAPES), help="random weights of this size instead"
    )
    parser.add_argument(
        "--image-tokens",
        type=int,
        nargs="+",
        metavar="S",
        help="tokens of the images asked about, multiples of one picture's (default: one picture; "
        "for a shape 64 576 1088)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of the question (32)")
    parser.add_argument("--generation-tokens", type=int, default=48, help="of the answer (48)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (8)")
    parser.add_argument(
        "--trials",
        type=int,
        default=5,
        help="of every measurement (5), three times as many of the first token",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(shapes.DTYPES),
        help="of the weights (default: the checkpoint's; for a shape bfloat16 on a Mac's GPU, else "
        "float32)",
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the language model")
    parser.add_argument("--q-bits", type=int, choices=(4, 8), help="with -q: bits (4)")
    parser.add_argument(
        "--q-group-size", type=int, choices=(32, 64), default=64, help="with -q: group size (64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and tokens (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and fact")
    parser.add_argument(
        "--dry-run", action="store_true", help="only count bytes and predict; nothing is timed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
