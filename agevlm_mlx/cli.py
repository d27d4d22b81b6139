"""`agevlm <command>`: one table of commands, each a module with ``main(argv) -> int``."""

import difflib
import importlib
import sys

from . import __version__, errors

#: command -> (module, what it does). Modules are imported only when their command runs.
COMMANDS = {
    "demo": ("demo", "train, compare and report the embedded example, end to end"),
    "generate": ("generate", "ask a question about an image and see where the answer looked"),
    "chat": ("chat", "talk about images in the terminal, and draw where a word looked"),
    "serve": ("serve", "answer over HTTP, as OpenAI's chat completions do"),
    "benchmark": ("benchmark", "measure speed and memory here, next to the language model alone"),
    "train": ("train", "train a model from a recipe (the embedded one by default)"),
    "experiment": ("experiment", "train arms x seeds, compare them, draw table and figures"),
    "evaluate": ("evaluate", "score a model on a benchmark"),
    "analyze": ("analyze", "see where a model looks, and whether it tells captions apart"),
    "teach": ("teach", "run the SAM teacher over images and store its masks and features"),
    "data": ("data_command", "check a data set before training, or write it as JSONL"),
    "scenes": ("scenes", "draw pictures of known objects with masks, captions and questions"),
}


def usage() -> str:
    """The text of ``agevlm --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: agevlm <command> [options]",
            "",
            "Small vision-language models that show where they looked for every word.",
            "",
            "commands:",
            *lines,
            "",
            "`agevlm <command> --help` explains a command; `agevlm --version` names this version.",
        ]
    )


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command named by the first argument and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"agevlm {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        advice = f"did you mean '{close[0]}'?" if close else f"expected {', '.join(COMMANDS)}"
        raise errors.UserError(f"unknown command {name!r}; {advice}")
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    # So that the command's own --help and errors say how it was called.
    sys.argv[0] = f"agevlm {name}"
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
