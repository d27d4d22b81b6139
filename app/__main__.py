"""The command line of `agevlm-app`."""

import argparse
import importlib.util
import sys

from agevlm_mlx.errors import UserError, command

_EXAMPLES = """examples:
  agevlm-app                              the model of `make demo`, or the shipped one
  agevlm-app --model my-model --port 8000
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Serve the chat until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="agevlm-app",
        description="Ask about an image in the browser and see where each word looked.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="checkpoint folder or hub id (default: the demo's model or the shipped one)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (7860)")
    parser.add_argument(
        "--share", action="store_true", help="also open a public gradio.live address (off)"
    )
    args = parser.parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the app needs gradio; pip install "agevlm-mlx[app]"')
    if not 0 < args.port < 65536:
        raise UserError(f"--port: expected 1 to 65535, got {args.port}")

    from agevlm_mlx.weights import load

    from . import ui
    from .session import Session

    session = Session(lambda: load(args.model))
    try:
        ui.serve(session, port=args.port, share=args.share)
    finally:
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
