"""The command line of `agevlm-convert`: one module per sub-command."""

import argparse
import sys

from agevlm_mlx.errors import command

from . import assemble, export, quantize, sam, verify, vision

_COMMANDS = {
    "assemble": assemble,
    "vision": vision,
    "sam": sam,
    "quantize": quantize,
    "export": export,
    "verify": verify,
}

_EXAMPLES = """examples:
  agevlm-convert assemble --lm HuggingFaceTB/SmolLM2-360M-Instruct \\
    --vision google/siglip-base-patch16-224 --mlx-path smol-siglip
  agevlm-convert vision --hf-path google/siglip-base-patch16-224 --mlx-path siglip
  agevlm-convert sam --checkpoint sam_vit_b_01ec64.pth --mlx-path sam-vit-b
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
  agevlm-convert export --to mlx-vlm --model runs/demo/guided --mlx-path guided-mlx-vlm
  agevlm-convert verify runs/demo/guided guided-copy
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
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
