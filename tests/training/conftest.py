"""A job without files: the tiny model, and batches of noise that depend on the step alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx import config
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data.batches import Batch, TextGroup
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training.stages import Recipe, Stage

VOCABULARY, TOKENS, ROWS = 40, 6, 4


def noise_batch(step: int, images: int, groups: int, channels: int = 0) -> Batch:
    """`groups` groups of 2 texts an image; guided rows 0..2, row 3 is padding."""
    rng = np.random.default_rng([step, images])

    def group() -> TextGroup:
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
            weight=np.array([1, 1, 1, 0], np.float32),
        )

    features = rng.normal(size=(images, 16, channels)).astype(np.float32) if channels else None
    return Batch(
        pixels=rng.normal(size=(images, 16, 16, 3)).astype(np.float32),
        groups=tuple(group() for _ in range(groups)),
        sam_features=features,
        record_ids=[f"record-{step}-{i}" for i in range(images)],
        step=step,
    )


class NoiseBatches:
    def __init__(self, stage: Stage):
        self.stage = stage

    def batch(self, step: int) -> Batch:
        return noise_batch(step, self.stage.batch_size, len(self.stage.texts))


@dataclass
class NoiseJob:
    """Stands for `training.build.Job`."""

    recipe: Recipe
    model: AgeVLM
    val_records: bool = True

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
        mx.eval(model.parameters())
        return NoiseJob(recipe, model)

    return build
