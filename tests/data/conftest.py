"""A small scenes folder, its records, and a tokenizer trained on them."""

from pathlib import Path
from typing import Any

import pytest

from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.data.coco import read_coco
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.records import Record
from agevlm_mlx.data.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of the train split, seed 3. Do not write in it."""
    out = tmp_path_factory.mktemp("scenes") / "train"
    assert write_scenes(out, 48, 3)
    return out


@pytest.fixture(scope="session")
def records(scenes: Path) -> Records:
    return read_records(scenes)


@pytest.fixture(scope="session")
def micro(records: Records) -> Any:
    """The micro language model's tokenizer."""
    return build_tokenizer(turn.text for record in records for turn in record.turns)


@pytest.fixture(scope="session")
def masked(scenes: Path) -> Records:
    """The captions of the scenes, whose phrases bring their masks."""
    found = read_coco(scenes / "captions.json", scenes / "instances.json", scenes / "images")
    return Records.from_list(record for record in found if isinstance(record, Record))
