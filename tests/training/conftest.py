"""A job without files: the tiny model, and batches of noise that depend on the step alone."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx import config
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data.batches import Batch, TextGroup
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.sam.store import StoreMeta, StoreWriter, file_sha256, prompt_key
from agevlm_mlx.training.stages import Recipe, Stage, compute_dtype


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync guards against power cuts, which no test makes, and takes seconds on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


VOCABULARY, TOKENS, ROWS = 40, 6, 4


def noise_batch(step: int, images: int, groups: int, channels: int = 0) -> Batch:
    """`groups` groups of 2 texts an image; group g guides 3 - g rows, the rest is padding."""
    rng = np.random.default_rng([step, images])

    def group(number: int) -> TextGroup:
        tokens = rng.integers(VOCABULARY, size=(images, 2, TOKENS + 1)).astype(np.int32)
        target = np.zeros((ROWS, 16), np.float32)
        target[np.arange(ROWS), rng.integers(16, size=ROWS)] = 1
        return TextGroup(
            ids=tokens[..., :-1],
            labels=tokens[..., 1:],
            loss_mask=(rng.random((images, 2, TOKENS)) < 0.5).astype(np.float32),
            rows=rng.integers(images * 2, size=ROWS).astype(np.int32),
            cols=rng.integers(TOKENS, size=ROWS).astype(np.int32),
            target=target,
            weight=(np.arange(ROWS) < 3 - number).astype(np.float32),
        )

    features = rng.normal(size=(images, 16, channels)).astype(np.float32) if channels else None
    return Batch(
        pixels=rng.normal(size=(images, 16, 16, 3)).astype(np.float32),
        groups=tuple(group(number) for number in range(groups)),
        sam_features=features,
        record_ids=[f"record-{step}-{i}" for i in range(images)],
        step=step,
    )


def cut(batch: Batch, part: int, parts: int) -> Batch:
    """The images of one part, with the guided rows that are theirs."""
    images = len(batch.pixels)
    low, high = images * part // parts, images * (part + 1) // parts

    def group(whole: TextGroup) -> TextGroup:
        owner = whole.rows // 2
        own = (owner >= low) & (owner < high)
        return TextGroup(
            ids=whole.ids[low:high],
            labels=whole.labels[low:high],
            loss_mask=whole.loss_mask[low:high],
            rows=np.where(own, whole.rows - 2 * low, 0),
            cols=whole.cols,
            target=whole.target,
            weight=whole.weight * own,
        )

    features = batch.sam_features
    return Batch(
        pixels=batch.pixels[low:high],
        groups=tuple(group(whole) for whole in batch.groups),
        sam_features=None if features is None else features[low:high],
        record_ids=batch.record_ids[low:high],
        step=batch.step,
    )


class NoiseBatches:
    def __init__(self, stage: Stage):
        self.stage = stage

    def part(self, step: int, part: int, parts: int) -> Batch:
        return cut(noise_batch(step, self.stage.batch_size, len(self.stage.texts)), part, parts)

    def take_problems(self) -> list[Any]:
        return []


@dataclass
class NoiseJob:
    """Stands for `training.build.Job`."""

    recipe: Recipe
    model: AgeVLM
    val_records: bool = True
    data: list[int] = field(default_factory=list)
    problems: list[Any] = field(default_factory=list)
    masters: dict[str, mx.array] = field(default_factory=dict)

    def batches(self, stage: Stage) -> Any:
        return NoiseBatches(stage)

    def validation(self) -> Iterator[Batch]:
        return iter([noise_batch(999, 2, 1)])


def stage(name: str, steps: int, **changes: Any) -> dict[str, Any]:
    table = {
        "name": name,
        "steps": steps,
        "batch_size": 2,
        "lr": 0.01,
        "warmup": 2,
        "texts": [{"kinds": ["caption"], "n": 2}, {"kinds": ["presence"], "n": 2}],
        "trainable": [["vision_tower.*", 0], [".*", 1]],
    }
    return table | changes


@pytest.fixture
def noise_job(tiny_model_config: Callable[..., ModelConfig]) -> Callable[..., Any]:
    """``noise_job("key=value", ..., fusion="cross")``: a new job on a two-stage recipe."""

    def build(*overrides: str, fusion: str = "cross") -> Any:
        tables = {
            "model": {"text_config": {"model_type": "x"}, "vision_config": {"model_type": "x"}},
            "data": {"train": "-", "val": "-"},
            "train": {"out": "-", "checkpoint_every": 4, "val_every": 3, "log_every": 5},
            "stages": [
                stage("align", 5),
                stage(
                    "guide",
                    7,
                    losses={"attention": {"weight": 0.3, "heads": 2}},
                    trainable=[
                        ["vision_tower.*", 0.5],
                        ["language_model.model.embed.*", 0],
                        [".*", 1],
                    ],
                ),
            ],
        }
        recipe = config.from_dict(Recipe, config.override(tables, overrides))
        mx.random.seed(recipe.train.seed)
        layers = (1, 2) if fusion == "cross" else None
        model = AgeVLM(tiny_model_config(VOCABULARY, fusion=fusion, layers=layers))
        model.set_dtype(compute_dtype(recipe.train))
        mx.eval(model.parameters())
        return NoiseJob(recipe, model)

    return build


TINY = Path(__file__).with_name("tiny.toml")


def label(data: Path, store: Path, channels: int = 0, most: int | None = None) -> None:
    """What `agevlm teach` would do, with the boxes for masks and noise for features.

    With `most`, only that many images, as if it had been interrupted.
    """
    preprocessor, grid = Preprocessor(image_size=32), (4, 4)
    meta = StoreMeta(
        teacher="boxes",
        preprocessing=preprocessor.fingerprint(),
        grid=grid,
        feature_channels=channels,
    )
    boxes: dict[Path, set[tuple[float, ...]]] = {}
    for record in read_records(data):
        boxes.setdefault(record.image, set()).update(p.box for p in record.phrases if p.box)
    rng = np.random.default_rng(0)
    with StoreWriter(store, meta) as writer:
        for image, found in list(boxes.items())[:most]:
            coverage = np.zeros((len(found), 16), np.float32)
            for row, (x0, y0, x1, y1) in zip(coverage, sorted(found), strict=True):
                mask = np.zeros((128, 128), bool)
                mask[int(y0) : int(y1), int(x0) : int(x1)] = True
                row[:] = preprocessor.geometry(128, 128).mask_to_grid(mask, grid)
            writer.add(
                image.relative_to(data).as_posix(),
                file_sha256(image),
                [prompt_key(box) for box in sorted(found)],
                coverage,
                np.ones(len(found), np.float32),
                rng.normal(size=(16, channels)).astype(np.float32) if channels else None,
            )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scenes of ``tiny.toml``, and their labels with and without features."""
    folder = tmp_path_factory.mktemp("tiny")
    write_scenes(folder / "train", 12, 3, "train")
    write_scenes(folder / "val", 6, 4, "val")
    label(folder / "train", folder / "store")
    label(folder / "train", folder / "store-features", channels=6)
    label(folder / "val", folder / "val-store")
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> list[str]:
    """The arguments of ``agevlm train`` for the tiny recipe, all but ``--out``."""
    where = {"train": "train", "val": "val", "store": "store", "val_store": "val-store"}
    return [
        *("--recipe", str(TINY)),
        *(f"data.{key}={tiny_folder / name}" for key, name in where.items()),
    ]
