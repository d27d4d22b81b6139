"""From a recipe to things that can be trained: data, tokenizer, model, the teacher's labels."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import config, weights
from ..data import scenes
from ..data.batches import Batch, Batches, GroupSpec
from ..data.chat import build_tokenizer
from ..data.image import Preprocessor
from ..data.records import Record, read_records
from ..errors import UserError
from ..models.agevlm import AgeVLM
from ..sam.store import Store
from .labels import Labelling, root
from .objective import FeatureAdaptor
from .rules import parameter_scales
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

    def batches(self, stage: Stage, records: Sequence[Record] | None = None) -> Batches:
        """The training batches of a stage, of all records or the given ones."""
        return Batches(
            self.records if records is None else records,
            self.tokenizer,
            self.preprocessor,
            self.model.grid,
            batch_size=stage.batch_size,
            groups=stage.texts,
            seed=self.recipe.train.seed,
            store=self.store,
            flip=self.recipe.data.flip,
            root=root(self.recipe.data.train),
        )

    def validation(self) -> Iterator[Batch]:
        """The same batches at every call: `val_images` images with the texts of all stages."""
        batches, count = self._validation
        return (batches.batch(step) for step in range(math.ceil(count / batches.batch_size)))

    @cached_property
    def _validation(self) -> tuple[Batches, int]:
        """The batches of `data.val`, and how many images of them to look at."""
        assert self.recipe.data.val is not None
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
            root=root(self.recipe.data.val),
        )
        return batches, count


def prepare(
    recipe: Recipe, run: Path | None = None, say: Say = print, *, teach: bool = True
) -> Job:
    """Load or make what `recipe` names; writes nothing into the run's folder.

    Makes embedded scenes and the teacher's labels where the recipe asks for them and they do
    not exist (labels only with `teach`; without it training goes unguided). The tokenizer is
    read from `run`, a run to resume, or made. Raises ``UserError`` for anything that would fail
    later, in any stage.
    """
    _make_scenes(recipe.data, say)
    records = _records(recipe.data.train, "data.train")
    val_records = _records(recipe.data.val, "data.val") if recipe.data.val else []
    mx.random.seed(recipe.train.seed)
    model, tokenizer, preprocessor = _model(recipe.model, records, run)

    features = any(stage.losses.features > 0 for stage in recipe.stages)
    labelling = Labelling(recipe, preprocessor, model.grid, teach, say)
    store = labelling.open("store", recipe.data.store, recipe.data.train, records, features)
    val_store = labelling.open(
        "val_store", recipe.data.val_store, recipe.data.val, val_records, features=False
    )
    if features and store is not None:
        width, channels = model.vision_tower.width, store.meta.feature_channels
        model.sam_adaptor = FeatureAdaptor(width, channels, model.vision_grid, model.grid)
    mx.eval(model.parameters())
    model.train()
    job = Job(recipe, model, tokenizer, preprocessor, records, store, val_records, val_store)
    one_of_each_kind = list({record.kind: record for record in records}.values())
    for stage in recipe.stages:
        parameter_scales(model, stage)
        job.batches(stage, one_of_each_kind)  # are its texts there?
        _check_heads(model, stage)
    if val_records:
        job.validation()
    if teach or store is not None:
        labelling.check_guided(records, store)
    return job


def export(job: Job, folder: Path) -> None:
    """Write the model of a finished run as a folder that every command loads."""
    if "sam_adaptor" in job.model:
        del job.model.sam_adaptor
    weights.save_model(folder, job.model, job.tokenizer, job.preprocessor, _card(job, folder))


def _check_heads(model: AgeVLM, stage: Stage) -> None:
    wanted = stage.losses.attention.heads
    layer = model.layers[model.looking_layers[0]]
    there = layer["cross_attn"].n_heads if "cross_attn" in layer else model.args.num_attention_heads
    if wanted is not None and wanted > there:
        raise UserError(
            f"stage '{stage.name}': expected losses.attention.heads <= {there}, got {wanted}"
        )


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
    spec: ModelSpec, records: Sequence[Record], run: Path | None
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
        tokenizer = _tokenizer(records, vocabulary, run)
    if spec.encoder != "random":
        weights.load_encoder(model, spec.encoder)
    return model, tokenizer, preprocessor


def _tokenizer(records: Sequence[Record], vocabulary: int, run: Path | None) -> TokenizerWrapper:
    """The tokenizer of the run to resume, or one made from the training texts."""
    if run is not None:
        tokenizer = weights.load_tokenizer(run)
    else:
        texts = (turn.text for record in records for turn in record.turns)
        with tempfile.TemporaryDirectory() as folder:  # mlx-lm's wrapper reads a folder
            build_tokenizer(texts, vocabulary).save_pretrained(folder)
            tokenizer = weights.load_tokenizer(Path(folder))
    size = len(tokenizer)  # pyright: ignore[reportArgumentType]
    if size > vocabulary:
        raise UserError(
            f"model.text_config.vocab_size: expected at least {size}, the size of the tokenizer, "
            f"got {vocabulary}"
        )
    return tokenizer


def _card(job: Job, folder: Path) -> str:
    recipe = job.recipe
    stages = "\n".join(
        f"| {s.name} | {s.steps} | {s.batch_size} | {s.losses.attention.weight:g} |"
        for s in recipe.stages
    )
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
tags: [mlx, agevlm]
---

# {folder.name}

A vision-language model trained with agevlm-mlx ({job.model.fusion} fusion) on
`{recipe.data.train}` ({len(job.records)} records), {recipe.steps} steps, seed {recipe.train.seed}.

| stage | steps | images a step | attention weight |
|---|---|---|---|
{stages}

The whole recipe is in `config.toml`, every step in `metrics.jsonl`. Scores: run
`agevlm evaluate --model {folder}`. Use: `agevlm generate --model {folder} --image photo.png`.
The licence of the weights follows the data, the initial weights and your own choice.
"""
