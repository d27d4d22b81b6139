"""Reading other people's checkpoints, and writing ours in one move."""

import errno
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
from agevlm_mlx.parallel import terminate_as_interrupt
from agevlm_mlx.weights import write_safetensors

#: Weight files in the order of preference: safetensors first, open_clip's own names last.
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)

#: No space, over quota, over the size that a file may have.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def locate(source: str, *more: str) -> Path:
    """The folder of a checkpoint: a path, or a hub id that is downloaded.

    more: patterns of the files wanted besides configs and weights.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: expected a checkpoint folder, got a file; pass its folder")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such folder; pass a folder or a hub id like org/name")
    from huggingface_hub import snapshot_download

    safe = ["*.json", "model*.safetensors", "open_clip_model.safetensors", *more]
    pickled = ["*.json", "pytorch_model*.bin", "open_clip_pytorch_model.bin", *more]
    try:
        folder = Path(snapshot_download(source, allow_patterns=safe))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=pickled))
    except Exception as error:  # the hub's client raises a dozen kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source}: not a folder here, and not downloaded from the hub ({reason}); offline, "
            "pass the path of a folder with its config.json and model.safetensors"
        ) from None
    return folder


@contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, mx.array]]:
    """Every tensor of a checkpoint, read from disk only when it is evaluated.

    path: a folder with one of `WEIGHT_FILES` or its shards, or one weight file. PyTorch
    pickles need torch, are read as tensors only, and go through a temporary safetensors file,
    one shard at a time. Entries should be taken out of the dictionary as they are used, so
    that memory never holds more than one of them.
    """
    with tempfile.TemporaryDirectory(prefix="agevlm-convert-") as scratch:
        tensors: dict[str, mx.array] = {}
        for file in _weight_files(path):
            part = file
            if file.suffix != ".safetensors":
                part = Path(scratch) / f"{file.name}.safetensors"
                write_safetensors(part, _pickle(file))
            for key, value in _safetensors(part, file).items():
                if key in tensors:
                    raise UserError(f"{file}: {key} is also in another shard")
                tensors[key] = value
        yield tensors


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in WEIGHT_FILES:
        index = path / f"{name}.index.json"
        if index.is_file():
            table = read_json(index)
            if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
                raise UserError(f"{index}: expected a weight_map of tensor names to files")
            names = sorted(set(map(str, table["weight_map"].values())))
            for shard in names:
                if Path(shard).name != shard or not (path / shard).is_file():
                    raise UserError(
                        f"{path / shard}: missing; the index names it, so the folder is incomplete"
                    )
            return [path / shard for shard in names]
        if (path / name).is_file():
            return [path / name]
    raise UserError(f"{path}: expected {' or '.join(WEIGHT_FILES)}, found none of them")


def _safetensors(path: Path, original: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{original}: not a readable safetensors file: {error}") from None
    assert isinstance(loaded, dict)
    return loaded


def metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file: ``{"format": "mlx"}`` for MLX's layout."""
    try:
        _, table = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    return dict(table)


def unpickle(path: Path) -> Any:
    """What a PyTorch pickle holds, if that is tensors and plain containers alone; anything
    that would run code is refused unread."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading {path.suffix} needs torch; pip install torch, "
            "or take the safetensors file"
        ) from None
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of torch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors alike: the file is not usable
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a file of plain tensors: {reason}") from None


def _pickle(path: Path) -> dict[str, mx.array]:
    import torch

    state = unpickle(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # a training checkpoint of open_clip or timm
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")

    def array(tensor: Any) -> mx.array:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has none
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())

    # Taken out one by one: a file of torch before 1.6 is in memory, and shrinks as ours grows.
    return {str(key): array(state.pop(key)) for key in list(state)}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes if not, also
    when the process is told to end (Ctrl-C, SIGTERM).

    ``UserError`` when `path` already holds something, cannot be made, or the disk is full.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:  # a file where a folder should be, no rights, a read-only disk
        raise UserError(f"{path}: cannot be made: {error.strerror}; pass another folder") from None
    try:
        with terminate_as_interrupt():
            aside.chmod(0o755)  # mkdtemp makes it private
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as opened:
                        os.fsync(opened.fileno())
            os.replace(aside, path)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{path}: no room on the disk ({error.strerror}); free some or pass a folder on "
            "another one; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(path: Path) -> None:
    """``UserError`` unless `path` is absent or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: already there; pass another --mlx-path or remove it")


def read_card(folder: Path) -> str:
    """The model card of a checkpoint folder, or a title when it has none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8").rstrip() if path.is_file() else "# AgeVLM model"
