"""The command line of `agevlm-convert`: one module per sub-command."""

import argparse
import sys

from agevlm_mlx.errors import command
from agevlm_mlx.parallel import terminate_as_interrupt

from . import (
    assemble,
    dequantize,
    export,
    quantize,
    sam,
    teacher_features,
    upload,
    verify,
    vision,
)

_COMMANDS = {
    "assemble": assemble,
    "vision": vision,
    "sam": sam,
    "teacher-features": teacher_features,
    "quantize": quantize,
    "dequantize": dequantize,
    "export": export,
    "verify": verify,
    "upload": upload,
}

_EXAMPLES = """examples:
  agevlm-convert assemble --lm HuggingFaceTB/SmolLM2-360M-Instruct \\
    --vision google/siglip-base-patch16-224 --mlx-path smol-siglip
  agevlm-convert vision --hf-path google/siglip-base-patch16-224 --mlx-path siglip
  agevlm-convert sam --checkpoint sam_vit_b_01ec64.pth --mlx-path sam-vit-b
  agevlm-convert teacher-features --features sam-features --data coco --mlx-path coco-sam
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
  agevlm-convert export --to mlx-vlm --model runs/demo/guided --mlx-path guided-mlx-vlm
  agevlm-convert verify runs/demo/guided guided-8bit --logits
  agevlm-convert upload --path guided-8bit --upload-repo me/guided-8bit --dry-run
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="agevlm-convert",
        description="Convert, quantise and compare checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    with terminate_as_interrupt():  # what was begun in a temporary folder goes
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
