"""`agevlm generate`: ask a question about an image and see where the answer looked.

In Python: `generate` for the text, `stream_generate` for its pieces as they come.
"""

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse
from mlx_lm.generate import stream_generate as stream_text
from mlx_lm.sample_utils import make_sampler
from PIL import Image

from . import errors, weights
from .data import chat
from .data.image import Geometry, Preprocessor, load_image
from .data.records import Turn
from .errors import UserError
from .evaluation import files, overlay
from .evaluation.words import word_maps

if TYPE_CHECKING:
    from .models.agevlm import AgeVLM

ImageSource = str | Path | bytes | Image.Image

EXAMPLES = """
examples:
  agevlm generate --image photo.jpg --prompt "Describe the image."
  agevlm generate --image photo.jpg --prompt "Is there a dog?" --attention dog.png
  agevlm generate --model runs/demo/concat --image a.png --image b.png --json \\
      --prompt "Is there a cat?"
"""


def look(
    preprocessor: Preprocessor, images: Sequence[ImageSource]
) -> tuple[mx.array, list[overlay.Picture]]:
    """Open and prepare images: pixels f32 [1 Hi Wi 3] (or [1 M Hi Wi 3]) for `AgeVLM.see`."""
    pictures, pixels = [], []
    for source in images:
        image = load_image(source)
        prepared, geometry = preprocessor(image)
        pixels.append(prepared)
        pictures.append(overlay.Picture(image, geometry))
    stacked = mx.array(np.stack(pixels))
    return stacked if len(pixels) == 1 else stacked[None], pictures


def stream_generate(
    model: "AgeVLM",
    tokenizer: Any,
    preprocessor: Preprocessor,
    prompt: str | Sequence[Turn],
    images: ImageSource | Sequence[ImageSource] = (),
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answer `prompt` about `images`, piece by piece, as mlx-lm's ``stream_generate`` does.

    prompt: a question, or the turns of a conversation that ends with the user's. images: paths,
    bytes or PIL images; none asks the language model alone. temp 0 is greedy; `seed` makes
    sampling repeatable. Further `options` (``logits_processors``, ``kv_bits``, a
    ``prompt_cache`` that already saw the images ...) go to mlx-lm as they are. Raises
    ``UserError`` for images that cannot be read.
    """
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    ids = chat.prompt_ids(tokenizer, turns)
    if "prompt_cache" not in options:
        if isinstance(images, str | Path | bytes | Image.Image):
            images = [images]
        cache = model.see(look(preprocessor, images)[0]) if images else model.make_cache()
        options["prompt_cache"] = cache
    if seed is not None:
        mx.random.seed(seed)
    options.setdefault("sampler", make_sampler(temp=temp, top_p=top_p))
    yield from stream_text(model, tokenizer, list(ids), max_tokens=max_tokens, **options)


def generate(
    model: "AgeVLM",
    tokenizer: Any,
    preprocessor: Preprocessor,
    prompt: str | Sequence[Turn],
    images: ImageSource | Sequence[ImageSource] = (),
    **sampling: Any,
) -> str:
    """The whole answer to `prompt` about `images`; options as for `stream_generate`."""
    pieces = stream_generate(model, tokenizer, preprocessor, prompt, images, **sampling)
    return "".join(piece.text for piece in pieces).strip()


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    _check(args)
    loaded = weights.load(args.model)
    pixels, pictures = look(loaded.preprocessor, args.image) if args.image else (None, [])
    model = loaded.model
    answer, last = "", None
    for last in stream_generate(
        model,
        loaded.tokenizer,
        loaded.preprocessor,
        args.prompt,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        seed=args.seed,
        prompt_cache=model.make_cache() if pixels is None else model.see(pixels),
    ):
        answer += last.text
        if not args.json:
            print(last.text, end="", flush=True)
    if not args.json:
        print()
    answer = answer.strip()
    words = []
    if pixels is not None and (args.attention or args.json):
        words = word_maps(model, loaded.tokenizer, pixels, args.prompt, answer)
    if args.attention:
        sheet = overlay.word_sheet(pictures, words, question=args.prompt, answer=answer)
        files.write_image(args.attention, sheet)
        if not args.json:
            print(f"attention maps: {args.attention}", file=sys.stderr)
    if args.json and last is not None:
        print(json.dumps(files.plain(_describe(args, loaded, answer, last, words, pictures))))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.prompt.strip():
        raise UserError('--prompt: expected a question, got nothing; try "Describe the image."')
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens: expected at least 1, got {args.max_tokens}")
    if args.temp < 0:
        raise UserError(f"--temp: expected 0 (greedy) or more, got {args.temp}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p: expected more than 0 and at most 1, got {args.top_p}")
    if args.attention:
        if not args.image:
            raise UserError("--attention: expected an image to show; pass one with --image")
        if args.attention.suffix.lower() != ".png":
            raise UserError(f"--attention: expected a name ending in .png, got {args.attention}")
        files.check_writable(args.attention)


def _describe(
    args: argparse.Namespace,
    loaded: weights.Loaded,
    answer: str,
    last: GenerationResponse,
    words: Sequence[overlay.WordMap],
    pictures: Sequence[overlay.Picture],
) -> dict[str, Any]:
    return {
        "text": answer,
        "model": str(loaded.path),
        "prompt": args.prompt,
        "images": args.image,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "peak_memory_gb": last.peak_memory,
        "attention": args.attention,
        "words": [_describe_word(word, [p.geometry for p in pictures]) for word in words],
    }


def _describe_word(word: overlay.WordMap, geometries: Sequence[Geometry]) -> dict[str, Any]:
    strongest = int(np.argmax([m.max() for m in word.maps]))
    return {
        "word": word.word,
        "role": word.role,
        "image": strongest,
        "peak": overlay.peak_point(word.maps[strongest], geometries[strongest]),
        "on_image": [float(m.sum()) for m in word.maps],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="checkpoint folder or hub id (default: the demo's model or the shipped one)"
    )
    parser.add_argument(
        "--image", action="append", default=[], help="an image file; repeat for several"
    )
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temp", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (1)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="PNG",
        help="write the image with one attention map per content word",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
