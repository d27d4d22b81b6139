"""Reading other people's checkpoints, and writing ours in one move."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import UserError


def locate(source: str) -> Path:
    """The folder of a Hugging Face checkpoint: a path, or a hub id that is downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: expected a checkpoint folder, got a file; pass its folder")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such folder; pass a folder or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # the hub's client raises a dozen kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source}: not a folder here, and not downloaded from the hub ({reason}); offline, "
            "pass the path of a folder with its config.json and model.safetensors"
        ) from None
    return folder


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a folder: safetensors (one file or shards), else PyTorch ``.bin``."""
    for stem, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickle)):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
        elif (folder / stem).is_file():
            names = [stem]
        else:
            continue
        tensors: dict[str, mx.array] = {}
        for name in names:
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{path}: missing; the index names it, so the folder is incomplete")
            for key, value in read(path).items():
                if key in tensors:
                    raise UserError(f"{path}: {key} is also in another shard")
                tensors[key] = value
        return tensors
    raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin, found neither")


def _safetensors(path: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    assert isinstance(loaded, dict)
    return loaded


def _pickle(path: Path) -> dict[str, mx.array]:
    """A PyTorch pickle, read as tensors only: anything else in it is refused unread."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading .bin needs torch; pip install torch, or take the safetensors file"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors alike: the file is not usable
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a file of plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")

    def array(tensor: Any) -> mx.array:
        if tensor.dtype == torch.bfloat16:  # numpy has none
            return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())

    return {str(key): array(value) for key, value in state.items()}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes if not.

    ``UserError`` when `path` already holds something.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        aside.chmod(0o755)  # mkdtemp makes it private
        yield aside
        for file in aside.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(path: Path) -> None:
    """``UserError`` unless `path` is absent or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: already there; pass another --mlx-path or remove it")
