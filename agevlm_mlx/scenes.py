"""``agevlm scenes``: make a folder of embedded pictures with captions, questions and masks."""

import argparse
import sys
import time
from pathlib import Path

from .data.nouns import SPLITS
from .data.scenes import TEXTS, write_scenes
from .data.styles import STYLES
from .errors import command

EXAMPLES = """splits:
  train, val, test   the same bias: some nouns are frequent, themes come together
  uniform            no bias: any noun with any other
  balanced           the same without the pairs of combos, to train on
  pairs              every picture of train's bias twice, with one noun exchanged for any other
  combos             pairs of nouns that never share a picture in train
  nouns              nouns that train does not have

styles (the same nouns in another look):
  plain              what train looks like
  varied             to train with: each object plain, grey, in two colours, flat or embossed
to test with:
  recoloured         every object in other colours
  outlined           line drawings on paper
  blurred            out of focus
  scaled             objects smaller and larger than any of train, in other places

examples:
  agevlm scenes --out runs/scenes/train --n 5000 --seed 1
  agevlm scenes --out runs/scenes/test --n 500 --seed 2 --split test
  agevlm scenes --out runs/scenes/outlined --n 500 --seed 2 --split test --style outlined
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Write scenes and say what was written."""
    parser = argparse.ArgumentParser(
        prog="agevlm scenes",
        description="Make pictures of emoji on procedural backgrounds, with exact masks, "
        "captions and questions, in LLaVA, COCO and POPE formats. Same arguments, same bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--n", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--style", choices=STYLES, default="plain", help="default: plain")
    parser.add_argument(
        "--texts",
        choices=TEXTS,
        default="short",
        help="rich: also many wordings, conversations of several turns, whole sentences "
        "(default: short)",
    )
    parser.add_argument(
        "--masks",
        action="store_true",
        help="give the phrases of the texts their exact masks, which then guide training instead "
        "of a teacher's",
    )
    parser.add_argument(
        "--absent-phrases",
        action="store_true",
        help="also mark the nouns that a text names and the picture does not show, for "
        "losses.attention.absent",
    )
    args = parser.parse_args(argv)

    started = time.time()

    def progress(done: int, n: int) -> None:
        if sys.stderr.isatty():
            left = (time.time() - started) * (n - done) / done
            print(f"\rscenes {done}/{n}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    made = write_scenes(
        args.out, args.n, args.seed, args.split, progress, args.style, args.texts,
        masks=args.masks, absent=args.absent_phrases,
    )  # fmt: skip
    if sys.stderr.isatty() and made:
        print(file=sys.stderr)
    kind = args.split if args.style == "plain" else f"{args.style} {args.split}"
    if made:
        print(f"{args.out}: {args.n} {kind} scenes in {time.time() - started:.1f} s")
    else:
        print(f"{args.out}: already there, {args.n} {kind} scenes with this seed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
