"""What a recipe says: the model, the data, and a list of stages, each with what it trains.

A recipe is a TOML file read by `read_recipe`. What a stage trains is in `rules`.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import config
from ..config import FusionConfig
from ..data.batches import GroupSpec
from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class AttentionLoss:
    """Guidance of the attention maps by the object masks."""

    weight: float = 0.0
    kind: Literal["mass", "one_minus_mass", "kl", "dice"] = "mass"
    #: Supervise the first `heads` heads of every layer and leave the others free; None is all.
    heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of the loss parts of a stage."""

    lm: float = 1.0
    attention: AttentionLoss = field(default_factory=AttentionLoss)
    #: Distillation of the teacher's image features; needs a store made with ``--features``.
    features: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what is trained, on which texts, with which losses and learning rate."""

    name: str
    steps: int
    #: Images in a batch; each brings the texts of every entry of `texts`.
    batch_size: int
    lr: float
    texts: tuple[GroupSpec, ...]
    #: Ordered ``[regex, scale of lr]`` rules over whole parameter names; scale 0 freezes.
    trainable: tuple[tuple[str, float], ...]
    #: Learning rate at the stage's end; `cosine` goes there from `lr`, `constant` stays at `lr`.
    lr_end: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    #: Steps of linear warm-up from 0 to `lr`.
    warmup: int = 0
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        where = f"stage '{self.name}'"
        _at_least(where, "steps", self.steps, 1)
        _at_least(where, "batch_size", self.batch_size, 1)
        _at_least(where, "warmup", self.warmup, 0)
        if self.lr <= 0 or self.lr_end < 0:
            raise UserError(
                f"{where}: expected lr > 0 and lr_end >= 0, got {self.lr}, {self.lr_end}"
            )
        if not self.texts:
            raise UserError(f"{where}: texts is empty; name at least one kind of text")
        attention = self.losses.attention
        if min(self.losses.lm, attention.weight, self.losses.features) < 0:
            raise UserError(f"{where}: expected loss weights >= 0")
        if attention.heads is not None:
            _at_least(where, "losses.attention.heads", attention.heads, 1)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where the model comes from: an existing folder (`init`), or the three configurations."""

    #: A model folder to start from; its tokenizer, preprocessing and configuration are kept.
    init: Path | None = None
    #: Initial weights of the vision tower: ``random`` (with `init`: those of its model),
    #: ``shipped``, or a folder with a model.safetensors of the tower's own names.
    encoder: str = "random"
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    fusion_config: FusionConfig | None = None

    def __post_init__(self) -> None:
        given = [k for k in ("text_config", "vision_config", "fusion_config") if getattr(self, k)]
        if self.init is not None and given:
            raise UserError(f"model: init brings its own configuration; remove {', '.join(given)}")
        if self.init is None and not (self.text_config and self.vision_config):
            raise UserError("model: expected either init, or text_config and vision_config")


@dataclass(frozen=True, kw_only=True)
class ScenesSpec:
    """Embedded pictures made on the fly where the `train` and `val` folders do not exist."""

    n: int
    #: Pictures of the `val` folder.
    val: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Records to train on and to validate with, and what the teacher said about them."""

    train: Path
    val: Path | None = None
    #: The teacher's store for `train`; without it the masks of the records themselves guide.
    store: Path | None = None
    #: The same for `val`.
    val_store: Path | None = None
    scenes: ScenesSpec | None = None
    #: Run ``agevlm teach`` (in its own process, with torch) for a store that does not exist.
    teach: bool = False
    #: Mirror images at random. Leave it off when texts say left and right.
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The run: where it goes, how often it looks up, and the optimiser's constants."""

    out: Path
    seed: int = 0
    checkpoint_every: int = 200
    #: Newest checkpoints kept, beside the best one.
    keep: int = 2
    val_every: int = 100
    #: Images of `data.val` a validation looks at.
    val_images: int = 128
    log_every: int = 20
    #: A loss or gradient that is not finite ends the run, or skips the batch (ten in a row end it).
    on_nan: Literal["stop", "skip"] = "stop"
    #: Largest global norm of the gradient.
    clip: float = 1.0
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    #: Which weights the finished model has: those of the last step or of the best validation.
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "val_every", "val_images", "log_every"):
            _at_least("train", name, getattr(self, name), 1)
        if self.clip <= 0:
            raise UserError(f"train.clip: expected a number > 0, got {self.clip}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run."""

    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages: expected at least one [[stages]] table")
        if self.train.export == "best" and self.data.val is None:
            raise UserError("train.export: 'best' needs data.val to tell which step is best")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """The stage of global step `step` (0-based), and the step within that stage."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(step)

    def fingerprint(self) -> str:
        """Hash of everything that decides the parameters; a run resumes only under the same one."""
        data = config.to_dict(self)
        for key in ("out", "checkpoint_every", "keep", "log_every", "val_every", "val_images"):
            data["train"].pop(key)
        data["train"].pop("export")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _at_least(where: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{where}: expected {name} >= {least}, got {value}")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, for ``--recipe``."""
    folder = importlib.resources.files("agevlm_mlx") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def recipe_tables(name: str) -> dict[str, Any]:
    """The tables of a recipe: a .toml file, or the name of a shipped one."""
    if name in shipped_recipes():
        resource = importlib.resources.files("agevlm_mlx") / "recipes" / f"{name}.toml"
        with importlib.resources.as_file(resource) as path:
            return config.read_toml(path)
    if not name.endswith(".toml"):
        known = ", ".join(shipped_recipes())
        raise UserError(f"recipe {name!r}: expected a path to a .toml file or one of: {known}")
    return config.read_toml(Path(name))


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe `name` (see `recipe_tables`) with ``key=value`` overrides applied."""
    return config.from_dict(Recipe, config.override(recipe_tables(name), overrides))
