"""Files of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .errors import NO_ROOM, UserError


def download(
    repo: str, patterns: Sequence[str], kind: Literal["model", "dataset"] = "model"
) -> Path:
    """The folder with those files of a repository that match one of the `patterns`; they come
    from the hub's cache when they are in it.

    ``UserError`` says which file could not be had, why, and how to do without the hub.
    """
    from huggingface_hub import errors, snapshot_download

    what, page, flag = "its config.json was", repo, ""
    if kind == "dataset":
        what, page, flag = "its files were", f"datasets/{repo}", " --repo-type dataset"
    wanted = f"{repo}: no such folder here, so {what} wanted from the hub"
    try:
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))
    except errors.HFValidationError:
        raise UserError(
            f"{repo}: no such folder; pass a folder or a hub id like org/name"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{wanted}, which asks for its conditions to be accepted: do so on "
            f"https://huggingface.co/{page}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{wanted}, which shows no such repository; check its name, or `hf auth login` if "
            "it is private"
        ) from None
    except Exception as error:  # the hub's client raises a dozen kinds of its own
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # not the hub: the disk is full
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            reason = "is switched off by HF_HUB_OFFLINE"
        else:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"cannot be reached ({lines[0]})"
        raise UserError(
            f"{wanted}, which {reason}; pass a folder: where there is a network, "
            f"`hf download {repo}{flag} --local-dir {repo.partition('/')[2]}` makes one"
        ) from None


def download_dataset(repo: str) -> Path:
    """The folder with all files of a dataset's repository; the same errors."""
    return download(repo, ["*"], "dataset")
