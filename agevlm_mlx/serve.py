"""`agevlm serve`: answer questions about images over HTTP, as OpenAI's chat completions do.

One thread owns the model and answers several conversations at once; images and conversations
that it has seen before are not read again.
"""

import argparse
import asyncio
import importlib.util
import ipaddress
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import UserError

if TYPE_CHECKING:
    from .serving.app import Rules
    from .serving.batch import Settings

EXAMPLES = """
examples:
  agevlm serve
  agevlm serve --model runs/demo/guided --port 8081 --image-root ~/Pictures
  agevlm serve --allow-domain upload.wikimedia.org --decode-concurrency 8
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Images are data URLs; addresses of allowed domains and files of one folder only if you say so.
"attention": true in a request returns for each word where the answer looked.
"""
#: Seconds that answers under way have left when the server is stopped.
GRACE = 3


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    _check(args)
    listener = _listen(args.host, args.port)
    # uvicorn hands a signal back when it has stopped: this is where SIGTERM then goes.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        _serve(args, listener)
    except _Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
    return 0


class _Stopped(BaseException):
    """SIGTERM."""


def _stop(*_: Any) -> None:
    raise _Stopped


def _serve(args: argparse.Namespace, listener: socket.socket) -> None:
    import uvicorn

    from . import weights
    from .serving.app import make_app
    from .serving.engine import Engine

    engine = Engine(lambda: weights.load(args.model), _settings(args), max_queue=args.max_queue)
    try:
        name = _model_name(args.model, engine.path)
        config = uvicorn.Config(
            make_app(engine, name, _rules(args)),
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=2 * GRACE,
        )

        class Server(uvicorn.Server):
            async def startup(self, *rest: Any, **options: Any) -> None:
                await super().startup(*rest, **options)
                # The line must not come before it answers and can be stopped.
                print(_announcement(args, name, listener), flush=True)

            async def shutdown(self, *rest: Any, **options: Any) -> None:
                # Who is not answered by then is told so, before uvicorn cuts the line.
                asyncio.get_running_loop().call_later(GRACE, engine.close, 0)
                await super().shutdown(*rest, **options)

        Server(config).run([listener])
    finally:
        engine.close(2 * GRACE)


def _model_name(asked: str | None, path: Path) -> str:
    """What the model is called in requests: its hub id or its folder's name, no whole path."""
    if asked is None:
        return "agevlm"
    return path.resolve().name if os.path.exists(os.path.expanduser(asked)) else asked


def _announcement(args: argparse.Namespace, name: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return (
        f"serving {name} at http://{host}:{port}/v1 ({args.decode_concurrency} answers at once, "
        f"{args.max_queue} may wait, up to {args.max_tokens} tokens and {args.max_images} images "
        "each); Ctrl-C stops"
    )


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded: who comes too early is told so at once."""
    listener = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or "no such address"
        raise UserError(
            f"--host, --port: cannot listen on {host}:{port}: {reason}; choose others"
        ) from None
    return listener


def _settings(args: argparse.Namespace) -> "Settings":
    from .serving.batch import Settings

    return Settings(
        decode_concurrency=args.decode_concurrency,
        prompt_concurrency=args.prompt_concurrency,
        prefill_step_size=args.prefill_step_size,
        image_cache_bytes=args.image_cache_bytes,
        prompt_cache_size=args.prompt_cache_size,
        prompt_cache_bytes=args.prompt_cache_bytes,
        max_pixels=args.max_pixels,
        max_prompt_tokens=args.max_prompt_tokens,
    )


def _rules(args: argparse.Namespace) -> "Rules":
    from .serving.api import Limits
    from .serving.app import Rules
    from .serving.images import ImageRules

    return Rules(
        limits=Limits(max_tokens=args.max_tokens, images=args.max_images),
        images=ImageRules(
            allow_domains=tuple(args.allow_domain),
            root=args.image_root,
            max_bytes=args.max_image_bytes,
        ),
        max_body_bytes=args.max_body_bytes,
        timeout=args.timeout,
        hosts=_own_names(args.host),
        origins=tuple(args.allowed_origins),
    )


def _own_names(host: str) -> frozenset[str] | None:
    """The Host headers of a server that only this machine can reach; None: anybody's."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
    return frozenset(names) if local else None


def _check(args: argparse.Namespace) -> None:
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"serve: {' and '.join(missing)} not installed; pip install 'agevlm-mlx[serve]'"
        )
    for name in ("decode_concurrency", "prompt_concurrency", "prefill_step_size", "max_tokens",
                 "max_prompt_tokens", "max_body_bytes", "max_image_bytes",
                 "max_pixels"):  # fmt: skip
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected at least 1, got {getattr(args, name)}")
    for name in ("max_queue", "max_images", "prompt_cache_size"):
        if getattr(args, name) < 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected at least 0, got {getattr(args, name)}")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port: expected 0 to 65535, got {args.port}")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout: expected more than 0 seconds, got {args.timeout}")
    if args.image_root is not None and not args.image_root.is_dir():
        raise UserError(f"--image-root: expected a folder, got {args.image_root}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub id (default: the demo's model or the shipped)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    add("--port", type=int, default=8080, help="port; 0 takes a free one (8080)")
    add("--allowed-origins", type=lambda text: text.split(","), default=[], metavar="ORIGIN[,...]",
        help="web pages that may use the server, * for all (none)")  # fmt: skip

    images = parser.add_argument_group("images").add_argument
    images("--allow-domain", type=_domain, action="append", default=[], metavar="HOST[:PORT]",
           help="fetch images from this host; repeat for several (none)")  # fmt: skip
    images("--image-root", type=lambda text: Path(os.path.expanduser(text)), metavar="DIR",
           help="open image files of this folder (none)")  # fmt: skip
    images("--image-cache-bytes", type=_size, default=256 << 20, metavar="SIZE",
           help="for images looked at before (256MB)")  # fmt: skip
    images("--max-images", type=int, default=8, metavar="N", help="in one request (8)")
    images("--max-image-bytes", type=_size, default=20 << 20, metavar="SIZE",
           help="of one image file (20MB)")  # fmt: skip
    images("--max-pixels", type=int, default=50_000_000, metavar="N", help="of one image (5e7)")

    limits = parser.add_argument_group("limits").add_argument
    limits("--max-tokens", type=int, default=512, metavar="N",
           help="longest answer, and the one of requests that do not say (512)")  # fmt: skip
    limits("--max-prompt-tokens", type=int, default=16384, metavar="N",
           help="longest conversation, in the model's context (16384)")  # fmt: skip
    limits("--max-body-bytes", type=_size, default=32 << 20, metavar="SIZE",
           help="of one request (32MB)")  # fmt: skip
    limits("--max-queue", type=int, default=64, metavar="N",
           help="requests that may wait for a place (64)")  # fmt: skip
    limits("--timeout", type=float, metavar="SECONDS", help="for one answer (no limit)")

    batch = parser.add_argument_group("batching, as in mlx-lm").add_argument
    batch("--decode-concurrency", type=int, default=32, metavar="N",
          help="answers made at the same time (32)")  # fmt: skip
    batch("--prompt-concurrency", type=int, default=8, metavar="N",
          help="prompts read at the same time (8)")  # fmt: skip
    batch("--prefill-step-size", type=int, default=2048, metavar="N",
          help="tokens of a prompt read in one step (2048)")  # fmt: skip
    batch("--prompt-cache-size", type=int, default=10, metavar="N",
          help="conversations that follow-up questions need not read again (10)")  # fmt: skip
    batch("--prompt-cache-bytes", type=_size, default=1 << 30, metavar="SIZE",
          help="for these (1GB)")  # fmt: skip
    return parser


def _size(text: str) -> int:
    """Bytes: "1000000", "256MB", "2GB"."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes such as 256MB, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _domain(text: str) -> str:
    """A host name as `ImageRules` compares it; no URL, no wildcard."""
    try:
        name, _, port = text.partition(":")
        host = name.encode("idna").decode("ascii").lower()
        good = re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9])?", host) and (
            not port or 0 < int(port) < 65536
        )
    except ValueError:
        good = False
    if not good or (":" in text and not port):
        raise argparse.ArgumentTypeError(f"expected a host such as images.example, got {text!r}")
    return f"{host}:{port}" if port else host


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
