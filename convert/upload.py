"""Publish a checkpoint on the Hugging Face hub: the files of one, and nothing else.

The folder is checked first (everything but the values of the weights), the card's front matter is
completed, and all files go up in one commit. Files whose name begins with a dot stay here.

examples:
  agevlm-convert upload --path guided-8bit --upload-repo me/guided-8bit --dry-run
  agevlm-convert upload --path smol-siglip --upload-repo me/smol-siglip --license apache-2.0 \\
    --base-model HuggingFaceTB/SmolLM2-360M-Instruct
"""

import argparse
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import UserError, one_line
from agevlm_mlx.weights import load

from . import source

#: Files of a checkpoint besides its weights.
_EXPECTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
_TAGS = ("mlx", "agevlm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", required=True, type=Path, help="checkpoint folder")
    parser.add_argument("--upload-repo", required=True, help="org/name, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--license", help="for the card, such as apache-2.0 (default: as it says)")
    parser.add_argument(
        "--base-model",
        action="append",
        default=[],
        help="hub id of a part, for the card; repeat for several (default: as it says)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would go up")


def checked_files(folder: Path) -> list[Path]:
    """The files to publish; ``UserError`` when `folder` is no complete checkpoint, holds the
    teacher's side of the training, or files that do not belong to one."""
    load(folder, lazy=True)  # refuses the teacher's heads, as any tensor that is not the model's
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        weights = set(read_json(index)["weight_map"].values())
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    strange = [
        path.name + "/" * path.is_dir()
        for path in files
        if not path.is_file()
        or not (path.name in weights or any(fnmatch.fnmatchcase(path.name, p) for p in _EXPECTED))
    ]
    if strange:
        raise UserError(
            f"{folder}: expected the files of a checkpoint, found also {', '.join(strange)}; "
            "move them elsewhere"
        )
    return files


def completed_card(text: str, license: str | None = None, bases: Sequence[str] = ()) -> str:
    """The card with what the hub needs in its front matter; its own entries and text are kept.

    ``UserError`` when the front matter cannot be read.
    """
    from huggingface_hub.repocard import RepoCard
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it remarks on a card without front matter
    try:
        card = RepoCard(text)
    except Exception as error:  # not YAML, or no table
        reason = " ".join(str(error).split())
        raise UserError(f"README.md: its front matter cannot be read: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    front = card.data
    tags = front.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    front["library_name"] = "mlx"
    front["pipeline_tag"] = "image-text-to-text"
    front["tags"] = tags + [tag for tag in _TAGS if tag not in tags]
    if license:
        front["license"] = license
    if bases:
        front["base_model"] = list(bases)
    body = card.text
    return f"---\n{front.to_yaml()}\n---\n{body if body.startswith(chr(10)) else chr(10) + body}"


def run(args: argparse.Namespace) -> int:
    folder, repo = args.path, args.upload_repo
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise UserError(f"--upload-repo: expected org/name, got {repo!r}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass that of a checkpoint")
    files = checked_files(folder)
    card = completed_card(source.read_card(folder) + "\n", args.license, args.base_model)
    sizes = {path.name: path.stat().st_size for path in files} | {"README.md": len(card.encode())}
    if args.dry_run:
        for name in sorted(sizes):
            print(f"{sizes[name] / 1e6:10.3f} MB  {name}")
        print(f"\n{card}")
    else:
        _publish(args, files, card)
    total = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB"
    if "\nlicense:" not in card.partition("\n---\n")[0]:
        print("the card names no licence; pass --license")
    would = " (dry run: nothing sent)" if args.dry_run else ""
    print(f"https://huggingface.co/{repo}: {total}{would}")
    return 0


def _publish(args: argparse.Namespace, files: Sequence[Path], card: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    contents: dict[str, str | bytes] = {path.name: str(path) for path in files}
    contents["README.md"] = card.encode()
    repo, folder = args.upload_repo, args.path
    hub = huggingface_hub.HfApi()
    try:
        if not huggingface_hub.get_token():
            raise UserError("no Hugging Face token; `hf auth login` stores one, HF_TOKEN passes it")
        hub.create_repo(repo, private=args.private or None, exist_ok=True)
        hub.create_commit(
            repo,
            [
                huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in sorted(contents.items())
            ],
            commit_message="Upload an AgeVLM checkpoint",
        )
    except UserError as error:
        raise UserError(f"{repo}: not uploaded: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the token is not valid; `hf auth login` stores another",
            403: "the token may not write there; make one with write access to it",
        }.get(status, "try again later")
        raise UserError(f"{repo}: not uploaded (HTTP {status}): {advice}") from None
    except Exception as error:  # the hub's client raises a dozen kinds of its own
        raise UserError(
            f"{repo}: not uploaded ({one_line(error)}); without a network, copy {folder} to a "
            f"machine that has one and run there: hf upload {repo} {folder.name}"
        ) from None
