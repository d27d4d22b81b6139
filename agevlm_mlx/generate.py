"""`agevlm generate`: ask a question about an image and see where the answer looked."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import conversation, errors, prompt_cache, sampling, weights
from .console import printable
from .conversation import Conversation
from .errors import UserError
from .evaluation import files, overlay
from .generation import Response

EXAMPLES = """
examples:
  agevlm generate --image photo.jpg --prompt "Describe the image."
  agevlm generate --image photo.jpg --prompt "Is there a dog?" --attention dog.png
  agevlm generate --model runs/demo/concat --image a.png --image b.png --json \\
      --prompt "Is there a cat?"
  agevlm generate --image photo.jpg --prompt "Describe it." --save-prompt-cache seen.safetensors
  agevlm generate --prompt-cache-file seen.safetensors --prompt "Is there a dog?"
"""


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    _check(args)
    choice = sampling.from_arguments(args)
    loaded = weights.load(args.model)
    options = conversation.options(args, loaded)
    if args.prompt_cache_file:
        if "system" in options:
            raise UserError("--system-prompt: the conversation of --prompt-cache-file has begun")
        chat = prompt_cache.load(args.prompt_cache_file, loaded, **options)
    else:
        chat = Conversation(loaded, **options)
    watch = bool(args.json and (args.image or chat.image_sources))
    pieces: list[Response] = []
    for piece in chat.ask(args.prompt, args.image, choice, attention=watch):
        pieces.append(piece)
        if not args.json:
            shown = printable(piece.text) if sys.stdout.isatty() else piece.text
            print(shown, end="", flush=True)
    if not args.json:
        print()
    if args.save_prompt_cache:
        prompt_cache.save(args.save_prompt_cache, chat)
        _tell(args, f"prompt cache: {args.save_prompt_cache}")
    # A cache file of a concat model has the image's place in the text, not its tokens.
    asked = args.attention or (
        args.json and (not args.prompt_cache_file or loaded.model.fusion == "cross")
    )
    words = chat.word_maps() if chat.image_sources and asked else []
    if args.attention:
        sheet = overlay.word_sheet(
            chat.pictures(), words, question=args.prompt, answer=chat.turns[-1].text
        )
        files.write_image(args.attention, sheet)
        _tell(args, f"attention maps: {args.attention}")
    if args.json:
        print(json.dumps(files.plain(_describe(args, chat, pieces, words))))
    return 0


def _tell(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    if not args.prompt.strip():
        raise UserError('--prompt: expected a question, got nothing; try "Describe the image."')
    if args.attention:
        if args.prompt_cache_file:
            raise UserError(
                "--attention: expected images to draw on; a saved cache keeps no pictures, ask "
                "with --image instead"
            )
        if not args.image:
            raise UserError("--attention: expected an image to show; pass one with --image")
        if args.attention.suffix.lower() != ".png":
            raise UserError(f"--attention: expected a name ending in .png, got {args.attention}")
        files.check_writable(args.attention)
    if args.save_prompt_cache:
        path = args.save_prompt_cache
        if path.suffix != ".safetensors":
            raise UserError(
                f"--save-prompt-cache: expected a name ending in .safetensors, got {path}"
            )
        if args.draft_model:
            raise UserError("--save-prompt-cache: not together with --draft-model")
        files.check_writable(path)


def _describe(
    args: argparse.Namespace,
    chat: Conversation,
    pieces: Sequence[Response],
    words: Sequence[overlay.WordMap],
) -> dict[str, Any]:
    last = pieces[-1]
    geometries = [chat.store.look(source).geometry for source in chat.image_sources]
    return {
        "text": chat.turns[-1].text,
        "model": str(chat.loaded.path),
        "prompt": args.prompt,
        "images": args.image,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "peak_memory_gb": last.peak_memory,
        "image_bytes": chat.loaded.model.image_bytes(chat.cache),
        "attention": args.attention,
        "words": [
            {"word": word.word, "role": word.role, **word.describe(geometries)} for word in words
        ],
        "tokens": [
            {
                "token": piece.token,
                "text": piece.text,
                **overlay.WordMap(piece.text, tuple(piece.attention.mean)).describe(geometries),
                "null": piece.attention.null,
            }
            for piece in pieces
            if piece.attention is not None
        ],
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
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="PNG",
        help="write the image with one attention map per content word",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end, with where each word and token looked",
    )
    parser.add_argument(
        "--save-prompt-cache",
        type=Path,
        metavar="FILE",
        help="keep the conversation with its images in one .safetensors file",
    )
    parser.add_argument(
        "--prompt-cache-file",
        type=Path,
        metavar="FILE",
        help="go on from such a file; its images are not looked at again",
    )
    sampling.add_arguments(parser)
    conversation.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
