"""Reading other people's checkpoints, and writing ours in one move."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import NO_ROOM, UserError, one_line
from agevlm_mlx.hub import download
from agevlm_mlx.models.tensors import unreadable
from agevlm_mlx.weights import write_safetensors

#: Weight files in the order of preference. Those of the repository's config.json come first:
#: open_clip's own have other keys, and LAION's repositories hold both kinds.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
#: The same with their shards, as patterns of a download.
_WEIGHT_PATTERNS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


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
    folder = path
    for pattern in _WEIGHT_PATTERNS:  # one kind: a repository may hold the same weights thrice
        folder = download(source, ["*.json", *more, pattern])
        if list(folder.glob(pattern)):
            break
    return folder


@contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, mx.array]]:
    """Every tensor of a checkpoint, read from disk only when it is evaluated.

    path: a folder with one of `WEIGHT_FILES` or its shards, or one weight file. PyTorch
    pickles need torch, are read as tensors only, and go through a temporary safetensors file,
    one shard at a time. Entries should be taken out of the dictionary as they are used, so
    that memory never holds more than one of them.
    """
    with ExitStack() as stack:
        scratch: Path | None = None
        tensors: dict[str, mx.array] = {}
        for file in _weight_files(path):
            part = file
            if file.suffix != ".safetensors":
                scratch = scratch or stack.enter_context(_scratch(file))
                part = _unpacked(file, scratch)
            for key, value in _safetensors(part, file).items():
                if key in tensors:
                    raise UserError(f"{file}: {key} is also in another shard")
                tensors[key] = value
        yield tensors


@contextmanager
def _scratch(file: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="agevlm-convert-")
    except OSError as error:
        raise UserError(
            f"{file}: is unpacked in the temporary folder, which cannot be written "
            f"({error.strerror}); set TMPDIR to one that can"
        ) from None
    with folder as name:
        yield Path(name)


def _unpacked(file: Path, scratch: Path) -> Path:
    """A pickle's tensors as a safetensors file."""
    part = scratch / f"{file.name}.safetensors"
    tensors = _pickle(file)
    try:
        write_safetensors(part, tensors)
    except OSError as error:
        if not _no_room(error):
            raise
        raise UserError(
            f"{file}: no room to unpack it in {scratch.parent} ({error.strerror}); free some or "
            "set TMPDIR to a folder on another disk; nothing was left behind"
        ) from None
    return part


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
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    _, table = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
    return table


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
        raise UserError(f"{path}: not a file of plain tensors: {one_line(error)}") from None


def _pickle(path: Path) -> dict[str, mx.array]:
    import torch

    state = unpickle(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # a training checkpoint of open_clip or timm
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")

    def array(key: object, tensor: Any) -> mx.array:
        if tensor.dtype == torch.bfloat16:  # numpy has none
            bits = tensor.detach().contiguous().view(torch.int16)
            return mx.array(bits.numpy()).view(mx.bfloat16)
        try:
            if tensor.is_complex():
                raise TypeError
            return mx.array(tensor.detach().contiguous().numpy())
        except TypeError:  # FP8, sparse, quantised by torch
            raise unreadable(path, key, tensor.dtype) from None

    # Taken out one by one: a file of torch before 1.6 is in memory, and shrinks as ours grows.
    return {str(key): array(key, state.pop(key)) for key in list(state)}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes if not.

    ``UserError`` when `path` already holds something, cannot be made, or the disk is full.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:  # a file where a folder should be, no rights, a read-only disk
        raise UserError(f"{path}: cannot be made: {error.strerror}; pass another folder") from None
    try:
        aside.chmod(0o755)  # mkdtemp makes it private
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        _move(aside, path)
    except Exception as error:
        if not _no_room(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: no room on the disk ({reason}); free some or pass a folder on another one; "
            "nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(aside: Path, path: Path) -> None:
    try:
        os.replace(aside, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY):
            raise
        raise UserError(
            f"{path}: was made by someone else meanwhile, and is left as it is; run again with "
            "another --mlx-path"
        ) from None


def _no_room(error: Exception) -> bool:
    """Whether a disk was full: in Python's words, or those of the tokenizers' library."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(str(error).endswith(f"(os error {number})") for number in NO_ROOM)


def check_free(path: Path) -> None:
    """``UserError`` unless `path` is absent or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: already there; pass another --mlx-path or remove it")


def read_card(folder: Path) -> str:
    """The model card of a checkpoint folder, or a title when it has none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8").rstrip() if path.is_file() else "# AgeVLM model"
