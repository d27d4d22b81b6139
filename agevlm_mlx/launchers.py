"""What mlx.launch and the MPI launchers tell the processes that they start."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import UserError

#: What launchers call a process's number, and how many there are, in its environment.
RANKS = (
    ("MLX_RANK", "MLX_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", ""),
)
#: Files with a list of the processes, from the launchers that do not say how many there are.
HOST_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, maybe with others."""
    return any(rank in environ for rank, _ in RANKS)


def launched(environ: Mapping[str, str]) -> tuple[int, int]:
    """The number (from 1) of this process and how many the launcher started.

    ``UserError`` if mlx.launch or an MPI launcher did not start it.
    """
    for rank, size in RANKS:
        if rank not in environ:
            continue
        counts = [int(environ[size])] if environ.get(size, "").isdecimal() else []
        counts += [n for n in map(_hosts, _files(environ)) if n]
        if environ[rank].isdecimal() and counts and int(environ[rank]) < counts[0]:
            return int(environ[rank]) + 1, counts[0]
    raise UserError(
        "--shard auto: expected to be started by mlx.launch or mpirun, got no number of this "
        "process in the environment; pass --shard K/N"
    )


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    return (Path(environ[name]) for name in HOST_LISTS if environ.get(name))


def _hosts(path: Path) -> int:
    """How many machines a launcher's list has; an empty file is this one alone."""
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if text.strip() else [""]
    except (OSError, ValueError):
        return 0
    return len(listed) if isinstance(listed, list) else 0
