"""From a recipe to things that can be trained: data, teacher's store, tokenizer, model."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from .. import config, weights
from ..data import scenes
from ..data.batches import Batch, Batches, GroupSpec
from ..data.chat import build_tokenizer
from ..data.image import Preprocessor
from ..data.records import Record, read_records
from ..errors import UserError
from ..models.agevlm import AgeVLM
from ..sam.labelling import image_key
from ..sam.store import Store, file_sha256
from .objective import FeatureAdaptor
from .stages import DataSpec, ModelSpec, Recipe, Stage

Say = Callable[[str], None]


@dataclass
class Job:
    """A recipe with everything it names loaded and checked."""

    recipe: Recipe
    model: AgeVLM
    tokenizer: TokenizerWrapper
    preprocessor: Preprocessor
    records: list[Record]
    store: Store | None
    val_records: list[Record]
    val_store: Store | None

    def batches(self, stage: Stage) -> Batches:
        """The training batches of a stage; a function of the global step."""
        return Batches(
            self.records,
            self.tokenizer,
            self.preprocessor,
            self.model.grid,
            batch_size=stage.batch_size,
            groups=stage.texts,
            seed=self.recipe.train.seed,
            store=self.store,
            flip=self.recipe.data.flip,
            root=_root(self.recipe.data.train),
        )

    def validation(self) -> Iterator[Batch]:
        """The same batches at every call: `val_images` images with the texts of all stages."""
        groups: dict[tuple[str, ...], GroupSpec] = {}
        for spec in (spec for stage in self.recipe.stages for spec in stage.texts):
            known = groups.get(spec.kinds)
            groups[spec.kinds] = spec if known is None or spec.n > known.n else known
        images = len({record.image for record in self.val_records})
        count = min(self.recipe.train.val_images, images)
        size = min(max(stage.batch_size for stage in self.recipe.stages), count)
        batches = Batches(
            self.val_records,
            self.tokenizer,
            self.preprocessor,
            self.model.grid,
            batch_size=size,
            groups=tuple(groups.values()),
            seed=0,
            store=self.val_store,
            root=_root(self.recipe.data.val) if self.recipe.data.val else None,
        )
        return (batches.batch(step) for step in range(math.ceil(count / size)))


def prepare(recipe: Recipe, folder: Path, say: Say = print) -> Job:
    """Load or make what `recipe` names. The tokenizer is kept in `folder`, the run's.

    Makes embedded scenes and the teacher's store where the recipe asks for them and they do not
    exist. Raises ``UserError`` for anything that would fail later: parameters without a rule,
    texts of a kind the data has not, a store of other images or preprocessing.
    """
    _make_scenes(recipe.data, say)
    records = _records(recipe.data.train, "data.train")
    val_records = _records(recipe.data.val, "data.val") if recipe.data.val else []
    mx.random.seed(recipe.train.seed)
    model, tokenizer, preprocessor = _model(recipe.model, records, folder)
    features = any(stage.losses.features > 0 for stage in recipe.stages)
    store = _store(recipe.data, preprocessor, model.grid, records, features, say)
    val_store = _open_store(
        recipe.data.val_store, preprocessor, model.grid, val_records, recipe.data.val
    )
    if features:
        if store is None or not store.meta.feature_channels:
            raise UserError(
                "losses.features > 0: expected data.store to hold features; make it with "
                "`agevlm teach --features`"
            )
        width, channels = model.vision_tower.width, store.meta.feature_channels
        model.sam_adaptor = FeatureAdaptor(width, channels, model.vision_grid, model.grid)
    mx.eval(model.parameters())
    model.train()
    return Job(recipe, model, tokenizer, preprocessor, records, store, val_records, val_store)


def export(job: Job, folder: Path) -> None:
    """Write the model of a finished run as a folder that every command loads."""
    if "sam_adaptor" in job.model:
        del job.model.sam_adaptor
    job.model.unfreeze()
    weights.save_model(folder, job.model, job.tokenizer, job.preprocessor, _card(job, folder))


def _make_scenes(data: DataSpec, say: Say) -> None:
    if data.scenes is None:
        return
    wanted: list[tuple[Path, int, int, scenes.Split]] = [
        (data.train, data.scenes.n, data.scenes.seed, "train")
    ]
    if data.val is not None:
        wanted.append((data.val, data.scenes.val, data.scenes.seed + 1, "val"))
    for folder, n, seed, split in wanted:
        whole = (folder / "scenes.json").exists()
        if folder.exists() and not whole and not (folder / ".unfinished").exists():
            continue  # other data: the user has set data.train
        if not whole:
            say(f"drawing {n} scenes in {folder}")
        scenes.write_scenes(folder, n, seed, split)


def _records(path: Path, key: str) -> list[Record]:
    if not path.exists():
        raise UserError(
            f"{key}: {path} does not exist; make it with `agevlm scenes --out {path}`, add "
            "data.scenes to the recipe, or name your own data"
        )
    records = read_records(path)
    if not records:
        raise UserError(f"{key}: {path} holds no records")
    return records


def _model(
    spec: ModelSpec, records: list[Record], folder: Path
) -> tuple[AgeVLM, TokenizerWrapper, Preprocessor]:
    if spec.init is not None:
        loaded = weights.load(spec.init)
        model, tokenizer, preprocessor = loaded.model, loaded.tokenizer, loaded.preprocessor
    else:
        table = {
            "text_config": spec.text_config,
            "vision_config": spec.vision_config,
            "fusion_config": config.to_dict(spec.fusion_config) if spec.fusion_config else {},
        }
        model_config = config.from_dict(config.ModelConfig, table, "model")
        vocabulary = model_config.text_config.get("vocab_size")
        if not isinstance(vocabulary, int):
            raise UserError(f"model.text_config.vocab_size: expected a number, got {vocabulary!r}")
        model = AgeVLM(model_config)
        preprocessor = Preprocessor.from_dict(model.vision_tower.preprocessing)
        tokenizer = _tokenizer(records, vocabulary, folder)
    if spec.encoder != "random":
        weights.load_encoder(model, spec.encoder)
    return model, tokenizer, preprocessor


def _tokenizer(records: list[Record], vocabulary: int, folder: Path) -> TokenizerWrapper:
    """The run's tokenizer, made once from the training texts; a resumed run reads it back."""
    if not (folder / "tokenizer.json").is_file():
        texts = (turn.text for record in records for turn in record.turns)
        build_tokenizer(texts, vocabulary).save_pretrained(str(folder))
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocabulary:  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"model.text_config.vocab_size: expected at least {len(tokenizer)}, the size of the "  # pyright: ignore[reportArgumentType]
            f"tokenizer, got {vocabulary}"
        )
    return tokenizer


def _store(
    data: DataSpec,
    preprocessor: Preprocessor,
    grid: tuple[int, int],
    records: list[Record],
    features: bool,
    say: Say,
) -> Store | None:
    if data.store is None:
        return None
    if not (data.store / "index.json").is_file():
        if not data.teach:
            raise UserError(
                f"data.store: {data.store} does not exist; make it with `agevlm teach --data "
                f"{data.train} --out {data.store}`, or set data.teach=true"
            )
        say(f"teaching: SAM labels {data.train} for {data.store}")
        _teach(data, preprocessor, grid, features)
    return _open_store(data.store, preprocessor, grid, records, data.train)


def _teach(
    data: DataSpec, preprocessor: Preprocessor, grid: tuple[int, int], features: bool
) -> None:
    # In its own process: the teacher needs torch, training never imports it.
    command = [sys.executable, "-m", "agevlm_mlx.teach", "--data", str(data.train)]
    command += ["--out", str(data.store), "--image-size", str(preprocessor.image_size)]
    command += ["--resize", preprocessor.resize, "--grid", f"{grid[0]}x{grid[1]}"]
    command += ["--features"] if features else []
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(
            f"the teacher failed (exit {status}); see above, or run: {' '.join(command)}"
        )


def _root(data: Path) -> Path:
    """The folder that image keys are relative to."""
    return data if data.is_dir() else data.parent


def _open_store(
    path: Path | None,
    preprocessor: Preprocessor,
    grid: tuple[int, int],
    records: list[Record],
    data: Path | None,
) -> Store | None:
    if path is None or data is None:
        return None
    store = Store(path)
    root = _root(data)
    sample = {root / record.image for record in records[:: max(len(records) // 8, 1)]}
    keys = {image_key(image, root): file_sha256(image) for image in sample}
    store.check(preprocessor.fingerprint(), grid, keys)
    return store


def _card(job: Job, folder: Path) -> str:
    recipe = job.recipe
    stages = "\n".join(
        f"| {s.name} | {s.steps} | {s.batch_size} | {s.losses.attention.weight:g} |"
        for s in recipe.stages
    )
    fusion: Any = job.model.config.fusion_config.fusion
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
tags: [mlx, agevlm]
---

# {folder.name}

A vision-language model trained with agevlm-mlx ({fusion} fusion) on `{recipe.data.train}`
({len(job.records)} records), {recipe.steps} steps, seed {recipe.train.seed}.

| stage | steps | images a step | attention weight |
|---|---|---|---|
{stages}

The whole recipe is in `config.toml`, every step in `metrics.jsonl`. Scores: run
`agevlm evaluate --model {folder}`. Use: `agevlm generate --model {folder} --image photo.png`.
The licence of the weights follows the data, the initial weights and your own choice.
"""
