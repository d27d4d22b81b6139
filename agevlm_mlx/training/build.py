"""From a recipe to things that can be trained: data, tokenizer, model, the teacher's labels."""

import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import config, hub, weights
from ..data import scenes
from ..data.batches import Batch, Batches, GroupSpec
from ..data.chat import build_tokenizer
from ..data.exclude import exclusions
from ..data.image import Preprocessor
from ..data.image_check import check_images
from ..data.record_set import Records, read_records
from ..data.records import Problem
from ..errors import UserError
from ..models.agevlm import AgeVLM
from ..models.packing import why_not_packed
from ..models.recompute import check_recomputable
from ..sam.store import Store
from . import adapters
from .labels import Labelling
from .objective import FeatureAdaptor
from .ranks import Ranks
from .rules import named_parameters, parameter_scales
from .stages import DataSpec, ModelSpec, Recipe, Stage, compute_dtype

Say = Callable[[str], None]

#: A data set of the Hugging Face hub: ``hf:owner/name`` or ``hf:owner/name/PATTERN`` of its files.
_HUB = "hf:"
#: Records that a tokenizer is made from, evenly spread; more change it little.
TOKENIZER_RECORDS = 200_000


@dataclass
class Job:
    """A recipe with everything it names loaded and checked."""

    recipe: Recipe
    model: AgeVLM
    tokenizer: TokenizerWrapper
    preprocessor: Preprocessor
    records: Records
    store: Store | None
    val_records: Records | None
    val_store: Store | None
    #: What is trained as it was before it was rounded to what the model computes in; empty where
    #: that is float32.
    masters: dict[str, mx.array] = field(default_factory=dict)
    #: Records and images that are left out (``data.on_error = "skip"``), as far as known.
    problems: list[Problem] = field(default_factory=list)

    def batches(self, stage: Stage) -> Batches:
        """The training batches of a stage."""
        data = self.recipe.data
        return Batches(
            self.records,
            self.tokenizer,
            self.preprocessor,
            self.model.grid,
            batch_size=stage.batch_size,
            groups=stage.texts,
            seed=self.recipe.train.seed,
            store=self.store,
            flip=data.flip,
            bucket=data.bucket,
            pack=stage.pack,
            word_dropout=stage.word_dropout,
            shuffle_masks=data.shuffle_masks,
            positions=stage.losses.attention.positions,
            absent=stage.losses.attention.absent > 0,
            on_error=data.on_error,
            max_tokens=data.max_tokens,
        )

    def validation(self) -> Iterator[Batch]:
        """The same batches at every call: `val_images` images with the texts of all stages."""
        batches, count = self._validation
        return (batches.batch(step) for step in range(math.ceil(count / batches.batch_size)))

    @cached_property
    def data(self) -> list[int]:
        """What a run to be resumed has to have been trained on; see `_signature`."""
        return _signature(self.records)

    @cached_property
    def _validation(self) -> tuple[Batches, int]:
        """The batches of `data.val`, and how many images of them to look at."""
        assert self.recipe.data.val is not None
        groups: dict[tuple[str, ...], GroupSpec] = {}
        for spec in (spec for stage in self.recipe.stages for spec in stage.texts):
            known = groups.get(spec.kinds)
            groups[spec.kinds] = spec if known is None or spec.n > known.n else known
        assert self.val_records is not None
        count = min(self.recipe.train.val_images, len(self.val_records.images))
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
            on_error=self.recipe.data.on_error,
        )
        return batches, count


def prepare(
    recipe: Recipe,
    run: Path | None = None,
    say: Say = print,
    *,
    teach: bool = True,
    ranks: Ranks | None = None,
) -> Job:
    """Load or make what `recipe` names; writes nothing into the run's folder.

    Makes embedded scenes and the teacher's labels where the recipe asks for them and they do
    not exist (labels only with `teach`; without it training goes unguided). The tokenizer is
    read from `run`, a run to resume, or made. Raises ``UserError`` for anything that would fail
    later, in any stage, and where the processes of `ranks` do not see the same data.
    """
    ranks = ranks or Ranks()
    recipe = _downloaded(recipe, ranks)
    with ranks.in_turn():
        _make_scenes(recipe.data, say)
    with ranks.together():
        records = _records(recipe.data, "train", say)
        val_records = _records(recipe.data, "val", say) if recipe.data.val else None
        _check_same(ranks, records)
        mx.random.seed(recipe.train.seed)
        model, tokenizer, preprocessor = _model(recipe, records, run, ranks)

    features = any(stage.losses.features > 0 for stage in recipe.stages)
    labelling = Labelling(recipe, preprocessor, model.grid, teach, say)
    with ranks.in_turn():
        store = labelling.open("store", recipe.data.store, recipe.data.train, records, features)
        val_store = labelling.open(
            "val_store", recipe.data.val_store, recipe.data.val, val_records, features=False
        )
    with ranks.together():
        if features and store is not None:
            width, channels = model.vision_tower.width, store.meta.feature_channels
            model.sam_adaptor = FeatureAdaptor(width, channels, model.vision_grid, model.grid)
        masters = _masters(recipe, model)
        model.set_dtype(compute_dtype(recipe.train))
        mx.eval(model.parameters(), masters)
        model.train()
        job = Job(
            recipe, model, tokenizer, preprocessor, records, store, val_records, val_store, masters
        )
        for stage in recipe.stages:
            parameter_scales(model, stage)
            job.batches(stage)  # are its texts there?
            _check_attention(model, stage)
            reason = why_not_packed(model) if stage.pack else None
            if reason:
                raise UserError(f"stage '{stage.name}': pack: {reason}; set pack = false")
        if val_records:
            job.validation()
        if teach or store is not None:
            labelling.check_guided(records, store)
        job.problems += _problems(recipe, records, val_records)
    return job


def _masters(recipe: Recipe, model: AgeVLM) -> dict[str, mx.array]:
    if compute_dtype(recipe.train) == mx.float32:
        return {}
    names = {name for stage in recipe.stages for name in parameter_scales(model, stage)}
    own = named_parameters(model)
    return {name: own[name].astype(mx.float32) for name in names}


def _downloaded(recipe: Recipe, ranks: Ranks) -> Recipe:
    """The recipe with the data sets that it names as ``hf:owner/name`` downloaded."""
    found = {}
    for key in ("train", "val"):
        name = str(getattr(recipe.data, key) or "")
        if name.startswith(_HUB):
            owner, _, rest = name.removeprefix(_HUB).partition("/")
            repository, _, pattern = rest.partition("/")
            with ranks.in_turn():
                found[key] = hub.download(f"{owner}/{repository}", [pattern or "*"], "dataset")
    return replace(recipe, data=replace(recipe.data, **found)) if found else recipe


def _signature(records: Records) -> list[int]:
    """Records, images, and a sum of their names: equal for equal data."""
    names = "\n".join([*records.kinds, *(image.name for image in records.images)])
    return [len(records), len(records.images), zlib.crc32(names.encode())]


def _check_same(ranks: Ranks, records: Records) -> None:
    """``UserError`` unless every process reads what rank 0 reads."""
    own = _signature(records)
    wanted = ranks.share(own)
    with ranks.together():
        if own != wanted:
            raise UserError(
                f"rank {ranks.rank}: expected the data of rank 0 ({wanted[0]:,} records of "
                f"{wanted[1]:,} images), got {own[0]:,} records of {own[1]:,} images, or other "
                "names; copy the same data to every machine"
            )


def _problems(recipe: Recipe, *sets: Records | None) -> list[Problem]:
    """What is bad in these records and left out; ``UserError`` if bad images are an error."""
    problems = []
    for records in sets:
        if records is not None:
            broken = check_images(records)
            if broken and recipe.data.on_error == "stop":
                more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
                raise UserError(
                    f"{broken[0].error()}{more}; mend or remove these, or set data.on_error=skip "
                    "(`agevlm data check` lists all that is wrong with the data)"
                )
            problems += [*records.problems, *broken]
    return problems


def export(job: Job, folder: Path) -> None:
    """Write the model of a finished run as a folder that every command loads."""
    if "sam_adaptor" in job.model:
        del job.model.sam_adaptor
    if job.recipe.model.lora is not None:
        adapters.save(folder / "adapters", job.model, job.recipe.model.lora)
        adapters.fuse(job.model)
    weights.save_model(folder, job.model, job.tokenizer, job.preprocessor, _card(job, folder))


def _check_attention(model: AgeVLM, stage: Stage) -> None:
    attention = stage.losses.attention
    wanted, looking = attention.heads, len(model.looking_layers)
    if attention.layers is not None and max(attention.layers) >= looking:
        raise UserError(
            f"stage '{stage.name}': losses.attention.layers: expected numbers below {looking}, the "
            f"layers that look at the image, got {list(attention.layers)}"
        )
    fusion = model.config.fusion_config
    if attention.absent > 0 and not (fusion.fusion == "cross" and fusion.null_slot):
        raise UserError(
            f"stage '{stage.name}': losses.attention.absent > 0 needs cross-attention with a null "
            'slot (model.fusion_config: fusion = "cross", null_slot = true); set it to 0'
        )
    layer = model.layers[model.looking_layers[0]]
    there = layer["cross_attn"].n_heads if "cross_attn" in layer else model.args.num_attention_heads
    if wanted is not None and wanted > there:
        raise UserError(
            f"stage '{stage.name}': expected losses.attention.heads <= {there}, got {wanted}"
        )


def _make_scenes(data: DataSpec, say: Say) -> None:
    spec = data.scenes
    if spec is None:
        return
    wanted: list[tuple[Path, int, int, scenes.Split]] = [
        (data.train, spec.n, spec.seed, spec.split)
    ]
    if data.val is not None:
        split = "val" if spec.split == "train" else spec.split
        wanted.append((data.val, spec.val, spec.seed + 1, split))
    for folder, n, seed, split in wanted:
        whole = (folder / "scenes.json").exists()
        if folder.exists() and not whole and not (folder / ".unfinished").exists():
            continue  # other data: the user has set data.train
        if not whole:
            say(f"drawing {n} scenes in {folder}")
        scenes.write_scenes(
            folder, n, seed, split, style=spec.style, texts=spec.texts, masks=spec.masks,
            absent=spec.absent,
        )  # fmt: skip


def _records(data: DataSpec, key: Literal["train", "val"], say: Say) -> Records:
    path = getattr(data, key)
    if not path.exists():
        raise UserError(
            f"data.{key}: {path} does not exist; make it with `agevlm scenes --out {path}`, add "
            "data.scenes to the recipe, or name your own data"
        )
    # What a model may be judged by is kept out of what it learns from, not out of validation.
    exclude = exclusions(data.exclude) if key == "train" else None
    records = read_records(path, on_error=data.on_error, exclude=exclude)
    for note in records.notes():
        say(f"data.{key}: {note}")
    if key == "train" and data.images is not None:
        if data.images > len(records.images):
            raise UserError(
                f"data.images: expected at most {len(records.images):,}, the images of {path}, "
                f"got {data.images:,}"
            )
        return records.first_images(data.images)
    return records


def _model(
    recipe: Recipe, records: Records, run: Path | None, ranks: Ranks
) -> tuple[AgeVLM, TokenizerWrapper, Preprocessor]:
    spec = recipe.model
    if spec.init is not None:
        loaded = weights.load(spec.init)
        model, tokenizer, preprocessor = loaded.model, loaded.tokenizer, loaded.preprocessor
    else:
        model_config = _model_config(spec)
        vocabulary = model_config.text_config.get("vocab_size")
        if not isinstance(vocabulary, int):
            raise UserError(f"model.text_config.vocab_size: expected a number, got {vocabulary!r}")
        model = AgeVLM(model_config)
        preprocessor = Preprocessor.from_dict(model.vision_tower.preprocessing)
        tokenizer = _tokenizer(records, vocabulary, run, ranks)
    if spec.encoder != "random":
        weights.load_encoder(model, spec.encoder)
    if spec.lora is not None:
        adapters.add(model, spec.lora)
    if recipe.train.grad_checkpoint:
        check_recomputable(model)
    return model, tokenizer, preprocessor


def _model_config(spec: ModelSpec) -> config.ModelConfig:
    table = {
        "text_config": spec.text_config,
        "vision_config": spec.vision_config,
        "fusion_config": config.to_dict(spec.fusion_config) if spec.fusion_config else {},
    }
    return config.from_dict(config.ModelConfig, table, "model")


def _tokenizer(
    records: Records, vocabulary: int, run: Path | None, ranks: Ranks
) -> TokenizerWrapper:
    """The tokenizer of the run to resume, or one made from the training texts; rank 0's."""
    with tempfile.TemporaryDirectory() as folder:  # mlx-lm's wrapper reads a folder
        aside = Path(folder)
        if ranks.first:
            if run is not None:
                weights.load_tokenizer(run).save_pretrained(folder)
            else:
                some = range(0, len(records), -(-len(records) // TOKENIZER_RECORDS))
                texts = (turn.text for number in some for turn in records[number].turns)
                build_tokenizer(texts, vocabulary).save_pretrained(folder)
        for name, text in ranks.share(
            {f.name: f.read_text("utf-8") for f in aside.iterdir()}
        ).items():
            if not ranks.first:
                (aside / name).write_text(text, "utf-8")
        tokenizer = weights.load_tokenizer(aside)
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
