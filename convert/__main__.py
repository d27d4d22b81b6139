"""The command line of `agevlm-convert`: one module per sub-command."""

import argparse
import sys

from agevlm_mlx.errors import command

from . import quantize, verify, vision

_COMMANDS = {"vision": vision, "quantize": quantize, "verify": verify}

_EXAMPLES = """examples:
  agevlm-convert vision --hf-path google/siglip-base-patch16-224 --mlx-path siglip
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
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
