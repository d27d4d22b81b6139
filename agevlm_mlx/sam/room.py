"""How large a store will be, and whether the disk has room for it."""

import shutil
from pathlib import Path

from ..errors import UserError
from .index import StoreMeta
from .jobs import Survey
from .writer import SHARD_BYTES


def forecast(plan: Survey, meta: StoreMeta, out: Path) -> None:
    """Say how much there is to store, how large it will be, and what is free for it."""
    features = f", features of {meta.feature_channels} channels" if meta.feature_channels else ""
    print(
        f"{len(plan.todo)} images, {plan.prompts} prompts on a {meta.grid[0]}x{meta.grid[1]} "
        f"grid{features}: about {megabytes(plan.size)}; {megabytes(_free(out))} are free"
    )


def check_space(plan: Survey, out: Path) -> None:
    """``UserError`` if what is to be stored does not fit on the disk."""
    # While a shard is written its images are in the tail, too.
    check_free(out, plan.size + min(plan.size, SHARD_BYTES))


def check_free(out: Path, size: int) -> None:
    """``UserError`` if the disk of the folder `out`, made or not, has less than `size` bytes."""
    if size > _free(out):
        raise UserError(
            f"{out}: expected about {megabytes(size)} of free disk space, got "
            f"{megabytes(_free(out))}; free some or choose another --out"
        )


def _free(out: Path) -> int:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def disk(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def megabytes(size: int) -> str:
    """A number of bytes in words."""
    if size < 2**20:
        return f"{size / 2**10:.1f} kB"
    return f"{size / 2**20:.1f} MB" if size < 2**30 else f"{size / 2**30:.2f} GB"
