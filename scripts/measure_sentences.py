"""How often a model says what scenes' own answers say, word for word, for each kind of question.

  agevlm scenes --out runs/smollm2/test --n 60 --seed 2006 --split test --texts rich
  python scripts/measure_sentences.py --model runs/smollm2/guided --data runs/smollm2/test

Of every picture one text of each of --kinds is drawn and its question asked, greedily: where a
thing is, how big it is, how many there are, whether it is there. An answer is right if it is the
scene's own, but for letters' case and spaces; a list of things may have any order. Beside it stands
how often the model says the same with another picture before it (shuffled).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from agevlm_mlx import errors  # before mlx: it opens a fast BLAS on Linux
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.evaluation.respondent import Request
from agevlm_mlx.respondents import respondent

KINDS = (
    "sentence_caption",
    "sentence_presence",
    "sentence_hard",
    "sentence_attribute",
    "sentence_position",
    "sentence_count",
)
#: Of each kind this many answers are printed.
SHOWN = 2


def draw(data: Path, kinds: Sequence[str], seed: int) -> dict[str, list[tuple[Request, str]]]:
    """Kind -> for each picture that has texts of the kind, the question and answer of one."""
    found: dict[str, dict[Path, list[tuple[Request, str]]]] = {kind: {} for kind in kinds}
    for record in read_records(data):
        if record.kind in found:
            question, answer = (turn.text for turn in record.turns[:2])
            texts = found[record.kind].setdefault(record.image, [])
            texts.append((Request(record.image, question), answer))
    rng = Random(seed)
    return {kind: [rng.choice(t) for t in texts.values()] for kind, texts in found.items()}


def same(said: str, answer: str) -> bool:
    """Whether two sentences have the same words; those of a list in any order."""

    def words(text: str) -> list[str]:
        parts = text.lower().replace(",", " ").replace(".", " ").split()
        return sorted(parts) if " and " in text or "," in text else parts

    return words(said) == words(answer)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Measure; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of scenes, --texts rich")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="of texts (those of sentences)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer (48)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts that are drawn (0)")
    args = parser.parse_args(argv)
    drawn = draw(args.data, args.kinds, args.seed)
    model = respondent(args.model)
    if bad := model.show([r.image for asked in drawn.values() for r, _ in asked if r.image]):
        raise errors.UserError("; ".join(bad.values()))
    print(f"{'':20} right  shuffled  questions")
    for kind, asked in drawn.items():
        if not asked:
            raise errors.UserError(f"{args.data}: no texts of kind {kind}; --texts rich makes them")
        pictures = [request.image for request, _ in asked]
        others = pictures[1:] + pictures[:1]
        own = [request for request, _ in asked]
        swapped = [Request(o, r.prompt) for o, r in zip(others, own, strict=True)]
        said = dict(model.generate(own + swapped, args.max_tokens))
        right = [same(said[n], asked[n % len(asked)][1]) for n in range(2 * len(asked))]
        shares = [sum(part) / len(asked) for part in (right[: len(asked)], right[len(asked) :])]
        print(f"{kind:20} {shares[0]:5.3f}  {shares[1]:8.3f}  {len(asked):9}")
        for n in range(min(SHOWN, len(asked))):
            told = "" if right[n] else f"  (expected: {asked[n][1]})"
            print(f"  {own[n].prompt}\n    {said[n]}{told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
