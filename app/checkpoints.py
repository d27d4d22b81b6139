"""Which folders of this computer are checkpoints of ours. Reads headers only, needs no MLX."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

#: Folders beyond which a place is not searched any further.
_MOST = 2000
#: Bytes of the JSON that is read of a file; no real one is larger.
_LARGEST_JSON = 16 << 20
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def megabytes(count: int) -> str:
    """Bytes for people: "393 kB", "5.2 MB", "1.3 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            value = count / size
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count / 1000:.0f} kB"


def folders(root: Path) -> Iterator[Path]:
    """`root`, the folders in it and the folders in those."""
    inner = _subfolders(root)
    yield from [root, *inner] if root.is_dir() else ()
    yield from islice((deep for folder in inner for deep in _subfolders(folder)), _MOST)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, _MOST) if entry.is_dir()]
    except (OSError, ValueError):  # not there, not a folder, not ours to read, a NUL in the name
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def cached() -> Iterator[tuple[str, Path]]:
    """(hub id, folder) of every model in the hub's cache, whatever its kind."""
    # Not scan_cache_dir: it looks at every file of the cache, which may be huge.
    for folder in _subfolders(Path(constants.HF_HUB_CACHE)):
        kind, _, rest = folder.name.partition("--")
        repo = rest.replace("--", "/", 1)
        if kind == "models" and (snapshot := _snapshot(repo)):
            yield repo, snapshot


def in_cache(repo: str) -> Path | None:
    """The folder of a hub id in the hub's cache if it is a whole checkpoint of ours."""
    folder = _snapshot(repo)
    return folder if folder and describe(folder) else None


def _snapshot(repo: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repo, "config.json", cache_dir=constants.HF_HUB_CACHE)
    except (OSError, ValueError):  # a damaged cache, an id that cannot be one
        return None
    return Path(found).parent if isinstance(found, str) else None


def describe(folder: Path) -> str | None:
    """Precision and size of a whole checkpoint of ours, "float32, 5.2 MB"; None for all else."""
    try:
        config = _json(folder / "config.json")
        if config.get("model_type") != "agevlm" or not all(
            (folder / name).is_file() for name in ("tokenizer.json", "preprocessor_config.json")
        ):
            return None
        numbers: Counter[str] = Counter()
        size = 0
        for name in _weight_files(folder):
            numbers += _numbers_by_dtype(folder / name)
            size += (folder / name).stat().st_size
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # damaged in one way or another
    if not numbers:
        return None
    quantization, most = config.get("quantization"), numbers.most_common(1)[0][0]
    precision = _DTYPES.get(most, most.lower())
    if isinstance(quantization, dict):
        precision = f"{quantization.get('bits')} bits"
    return f"{precision}, {megabytes(size)}"


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(_json(index)["weight_map"].values()))


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError
    return value


def _numbers_by_dtype(path: Path) -> Counter[str]:
    """How many numbers of each type a safetensors file holds; ``ValueError`` if it is damaged."""
    found: Counter[str] = Counter()
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                found[part.get_dtype()] += math.prod(part.get_shape())
    except SafetensorError as error:
        raise ValueError(error) from None
    return found
