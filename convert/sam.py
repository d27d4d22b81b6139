"""Convert SAM's image encoder: Meta's .pth files and Hugging Face SamModel folders.

The result is an encoder folder as `agevlm-convert vision` makes it. The prompt encoder and the
mask decoder are left out: `agevlm teach` runs those, from the same files.

examples:
  agevlm-convert sam --checkpoint sam_vit_b_01ec64.pth --mlx-path sam-vit-b
  agevlm-convert sam --hf-path facebook/sam-vit-huge --mlx-path sam-vit-h --dtype float16
  agevlm-convert sam --checkpoint sam_vit_l_0b3195.pth --image-size 512 --mlx-path sam-512
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from agevlm_mlx.config import from_dict
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.models.vision.sam import SamConfig
from agevlm_mlx.sam.names import as_hugging_face

from . import sam_weights, source, vision


@contextmanager
def open_meta(checkpoint: Path, image_size: int | None = None) -> Iterator[vision.Converted]:
    """`vision.open_encoder` for a file of Meta's, .pth or the same tensors as .safetensors."""
    if not checkpoint.is_file():
        advice = (
            "pass a folder as --hf-path"
            if checkpoint.is_dir()
            else f"expected {sam_weights.META_FILES}"
        )
        raise UserError(f"{checkpoint}: no such file; {advice}")
    with source.open_tensors(checkpoint) as tensors:
        native = from_dict(SamConfig, sam_weights.meta_config(tensors, checkpoint), str(checkpoint))
        own = asdict(native) | ({} if image_size is None else {"image_size": image_size})
        encoder = build_encoder(own)
        theirs = as_hugging_face(tensors, checkpoint)
        tensors.clear()  # so that memory holds each of them once
        ours, dropped = vision.renamed(theirs, sam_weights.rules(own), encoder, checkpoint)
        preprocessor = Preprocessor.from_dict(encoder.preprocessing)
        yield vision.Converted(ours, own, preprocessor, dropped)


@contextmanager
def open_hugging_face(where: str, image_size: int | None = None) -> Iterator[vision.Converted]:
    """`vision.open_encoder` for SAM alone."""
    folder = source.locate(where)
    kind, _, path = vision.foreign_config(folder)
    if kind != "sam_vision_model":
        raise UserError(
            f"{path}: expected model_type sam or sam_vision_model, got {kind}; "
            "`agevlm-convert vision` converts other encoders"
        )
    with vision.open_encoder(folder, image_size) as converted:
        yield converted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--checkpoint", type=Path, help="Meta's file, for example sam_vit_b_01ec64.pth"
    )
    given.add_argument("--hf-path", help="folder or hub id of a Hugging Face SamModel")
    vision.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    opened: AbstractContextManager[vision.Converted] = (
        open_meta(args.checkpoint, args.image_size)
        if args.checkpoint
        else open_hugging_face(args.hf_path, args.image_size)
    )
    with opened as converted:
        return vision.save(converted, args)
