"""What a recipe says: the model, the data, and a list of stages, each with what it trains.

A recipe is a TOML file read by `read_recipe`. What a stage trains is in `rules`.
"""

import hashlib
import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .. import config
from ..config import FusionConfig
from ..data.batches import GroupSpec
from ..data.chat import POSITIONS, Position
from ..data.nouns import Split
from ..data.scenes import Texts
from ..data.styles import Style
from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class AttentionLoss:
    """Guidance of the attention maps by the object masks."""

    weight: float = 0.0
    #: What `weight` becomes in equal steps by the stage's end; None leaves it as it is.
    weight_end: float | None = None
    kind: Literal["mass", "one_minus_mass", "kl", "dice", "bce_dice"] = "mass"
    #: Supervise the first `heads` heads of every layer and leave the others free; None is all.
    heads: int | None = None
    #: Supervise these of the layers that look at the image, counted from 0; None is all.
    layers: tuple[int, ...] | None = None
    #: Which positions of a phrase are guided: its own tokens, the one before a phrase of an answer,
    #: where it is chosen, and the question's end, where the answer is chosen. With ``end`` the
    #: end of an answer with phrases looks at the null slot, as `absent` things do. ``rest``
    #: instead of ``before`` looks at all that the answer has yet to name.
    positions: tuple[Position, ...] = POSITIONS
    #: Weight of a loss of its own that has phrases about absent things look at the null slot.
    absent: float = 0.0

    @property
    def guides(self) -> bool:
        """Whether masks guide at any step."""
        return self.weight > 0 or bool(self.weight_end)

    def check(self, where: str) -> None:
        """``UserError``, beginning with `where`, for values that cannot be meant."""
        weights = (self.weight, self.weight_end or 0.0, self.absent)
        if not all(0 <= weight < math.inf for weight in weights):
            raise UserError(f"{where}: expected losses.attention weights >= 0, got {weights}")
        if self.heads is not None:
            _at_least(where, "losses.attention.heads", self.heads, 1)
        for name in ("layers", "positions"):
            chosen = getattr(self, name)
            if chosen is not None and not 0 < len(chosen) == len(set(chosen)):
                raise UserError(
                    f"{where}: expected at least one and none twice in losses.attention.{name}, "
                    f"got {list(chosen)}"
                )
        if {"before", "rest"} <= set(self.positions):
            raise UserError(
                f"{where}: expected 'before' or 'rest' in losses.attention.positions, which are "
                "the same place, got both"
            )
        if "end" in self.positions and not self.absent:
            raise UserError(
                f"{where}: expected losses.attention.absent > 0 with the position 'end', which is "
                "guided by it, got 0"
            )
        if self.layers is not None:
            _at_least(where, "losses.attention.layers", min(self.layers), 0)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of the loss parts of a stage."""

    lm: float = 1.0
    attention: AttentionLoss = field(default_factory=AttentionLoss)
    #: Distillation of the teacher's image features; needs a store made with ``--features``.
    features: float = 0.0

    def at(self, done: float) -> "Losses":
        """Those when `done` (0..1) of a stage's steps are done."""
        attention = self.attention
        if attention.weight_end is None:
            return self
        weight = attention.weight + (attention.weight_end - attention.weight) * done
        return replace(self, attention=replace(attention, weight=weight))


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
    #: Learning rate at the stage's end; `cosine` goes there from `lr`, `constant` stays at `lr`,
    #: `wsd` (warm-up, stable, decay) stays and goes there in the last `decay` of the steps.
    lr_end: float = 0.0
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay: float = 0.2
    #: Steps of linear warm-up from 0 to `lr`.
    warmup: int = 0
    #: Put the texts of an image into one row where they fit, each seeing only itself.
    pack: bool = False
    #: Share of the tokens of an answer that the model is not shown while it learns what follows
    #: them (word dropout, arXiv 1511.06349): what comes next has to be seen, not guessed.
    word_dropout: float = 0.0
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        where = f"stage '{self.name}'"
        _at_least(where, "steps", self.steps, 1)
        _at_least(where, "batch_size", self.batch_size, 1)
        _at_least(where, "warmup", self.warmup, 0)
        if not (0 < self.lr < math.inf and 0 <= self.lr_end < math.inf):
            raise UserError(
                f"{where}: expected lr > 0 and lr_end >= 0, got {self.lr}, {self.lr_end}"
            )
        if not 0 <= self.word_dropout < 1:
            raise UserError(f"{where}: expected 0 <= word_dropout < 1, got {self.word_dropout}")
        if not 0 < self.decay <= 1:
            raise UserError(f"{where}: expected 0 < decay <= 1, got {self.decay}")
        if not self.texts:
            raise UserError(f"{where}: texts is empty; name at least one kind of text")
        weights = (self.losses.lm, self.losses.features)
        if not all(0 <= weight < math.inf for weight in weights):
            raise UserError(f"{where}: expected loss weights >= 0, got {weights}")
        self.losses.attention.check(where)


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters on the language model, by mlx-lm's tuner; fused in the finished model."""

    rank: int = 8
    #: Factor of what an adapter adds (mlx-lm's `scale`; alpha / rank elsewhere).
    scale: float = 20.0
    dropout: float = 0.0
    #: Only the last so many decoder layers; None is all.
    num_layers: int | None = None
    #: Linear layers of a decoder layer by name; None is all of its own, cross-attention never.
    keys: tuple[str, ...] | None = None
    #: DoRA (arXiv 2402.09353) instead of LoRA.
    dora: bool = False

    def __post_init__(self) -> None:
        _at_least("model.lora", "rank", self.rank, 1)
        if self.num_layers is not None:
            _at_least("model.lora", "num_layers", self.num_layers, 1)
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora: expected 0 <= dropout < 1, got {self.dropout}")


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
    lora: LoraSpec | None = None

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
    #: Pictures of the `val` folder. They are of the split ``val`` where `split` is ``train``, else
    #: of the same split, and drawn with the seed after `seed`.
    val: int = 128
    seed: int = 0
    split: Split = "train"
    style: Style = "plain"
    texts: Texts = "short"
    #: The exact masks in the texts' phrases: they guide, and no teacher is needed.
    masks: bool = False
    #: Phrases about absent things, for ``losses.attention.absent``.
    absent: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Records to train on and to validate with, and what the teacher said about them."""

    train: Path
    val: Path | None = None
    #: The teacher's store for `train`; without it the masks of the records themselves guide.
    store: Path | None = None
    #: The same for `val`.
    val_store: Path | None = None
    #: Train on the first so many images only, in the order of their first record; None is all.
    #: The same store serves.
    images: int | None = None
    scenes: ScenesSpec | None = None
    #: Run ``agevlm teach`` (in its own process, with torch) for a store that does not exist.
    teach: bool = False
    #: What `teach` shows SAM: a phrase's box, a point (the middle of its box), or nothing, so that
    #: the phrase gets the automatic mask that fits its box.
    prompt: Literal["box", "point", "auto"] = "box"
    #: Mirror images at random. Leave it off when texts say left and right.
    flip: bool = False
    #: A control: every phrase is guided by the mask of a phrase of another, random image.
    shuffle_masks: bool = False
    #: What becomes of a bad record or image: end the run, or leave it out and list it in
    #: ``bad_records.jsonl``.
    on_error: Literal["stop", "skip"] = "stop"
    #: Images never to train on: names of shipped lists or files of image names.
    exclude: tuple[str, ...] = ("pope",)
    #: Batches of a window within which images are sorted by the length of their texts; 0 is off.
    bucket: int = 16
    #: A longer text is a bad record: one of a whole book would fill the memory.
    max_tokens: int = 2048
    #: Threads that decode and tokenise ahead of the step, and how many batches they may be ahead.
    workers: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        if self.images is not None:
            _at_least("data", "images", self.images, 1)
        _at_least("data", "bucket", self.bucket, 0)
        _at_least("data", "max_tokens", self.max_tokens, 1)
        _at_least("data", "workers", self.workers, 1)
        _at_least("data", "prefetch", self.prefetch, 1)


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
    #: Muon (momentum made orthogonal) for matrices inside layers, AdamW for the rest.
    optimizer: Literal["adamw", "muon"] = "adamw"
    #: Images at a time on one machine; a step adds up the gradients of its parts. None is all.
    micro_batch: int | None = None
    #: Of the forward and backward pass; the trained parameters are kept in float32 as well.
    #: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: mx.compile of the update; ``auto`` is on a GPU only.
    compile: Literal["auto", "on", "off"] = "auto"
    #: Compute the layers again in the backward pass instead of keeping what is in them.
    grad_checkpoint: bool = False
    #: Decay of a running mean of the weights, which is then validated and exported; 0 is off.
    ema: float = 0.0
    #: End the run after so many validations of the last stage without an improvement.
    patience: int | None = None
    #: Also report to these, through their own packages.
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    #: Draw curves, and where the model looks, each so many steps; 0 is never.
    pictures_every: int = 500
    #: Which weights the finished model has: those of the last step or of the best validation.
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "val_every", "val_images", "log_every"):
            _at_least("train", name, getattr(self, name), 1)
        _at_least("train", "pictures_every", self.pictures_every, 0)
        for name in ("micro_batch", "patience"):
            if getattr(self, name) is not None:
                _at_least("train", name, getattr(self, name), 1)
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema: expected 0 <= ema < 1, got {self.ema}")
        # Comparisons that nan fails, too.
        if not self.clip > 0:
            raise UserError(f"train.clip: expected a number > 0, got {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"train.weight_decay: expected a number >= 0, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas: expected two numbers 0 <= b < 1, got {self.betas}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"train.seed: expected 0 <= seed < 2^32, got {self.seed}")


#: Keys that decide nothing about the parameters, or only in the last bit: a run may be resumed
#: with other values of these.
_FREE = {
    "train": (
        "out", "checkpoint_every", "keep", "log_every", "val_every", "val_images", "export",
        "micro_batch", "compile", "grad_checkpoint", "patience", "report_to", "pictures_every",
        "on_nan",
    ),
    "data": ("on_error", "workers", "prefetch"),
}  # fmt: skip


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
        if self.train.patience is not None and self.data.val is None:
            raise UserError("train.patience: needs data.val to tell what is an improvement")

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
        for key in _FREE["train"]:
            data["train"].pop(key, None)
        for key in _FREE["data"]:
            data["data"].pop(key, None)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def compute_dtype(train: TrainSpec) -> mx.Dtype:
    """What the forward and backward pass of a run are computed in on this machine."""
    name = train.dtype
    if name == "auto":
        name = "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"
    return mx.bfloat16 if name == "bfloat16" else mx.float32


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
