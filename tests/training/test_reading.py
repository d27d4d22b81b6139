"""Work that is not done twice: the same losses and gradients as when everything is computed."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.data.batches import Batch, GroupSpec, TextGroup
from agevlm_mlx.models import text_states as of_models
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.text_states import why_not_given
from agevlm_mlx.training import adapters, checkpoint, reading, text_memory
from agevlm_mlx.training.objective import loss_and_gradients
from agevlm_mlx.training.reading import LEAST_BEGINNING, common_beginning
from agevlm_mlx.training.rules import named_parameters, parameter_scales, set_trainable
from agevlm_mlx.training.stages import AttentionLoss, LoraSpec, Losses, Stage
from agevlm_mlx.training.text_memory import TextMemory
from agevlm_mlx.training.trainer import Trainer

from .conftest import VOCABULARY, noise_batch

COMMON = dict(hidden_size=32, num_hidden_layers=4, intermediate_size=64, num_attention_heads=4,
              num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCABULARY)  # fmt: skip
#: What differs: positions, windows, norms after the layers, a scaled embedding, learned positions.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=8),
    "qwen3": dict(head_dim=8, max_position_embeddings=512, rope_theta=1e4,
                  tie_word_embeddings=True),
    "smollm3": dict(no_rope_layer_interval=4),
    "gemma2": dict(head_dim=8, sliding_window=8),
    "gemma3_text": dict(head_dim=8, sliding_window=8, sliding_window_pattern=3),
    "olmo2": dict(tie_word_embeddings=False),
}  # fmt: skip
LOSSES = Losses(attention=AttentionLoss(weight=0.3, heads=2))
FROZEN_BELOW = (
    ("language_model\\.model\\.layers\\.[23]\\..*", 1.0),
    ("multi_modal_projector\\..*", 1.0),
    (".*", 0.0),
)


def build(kind: str = "llama", fusion: str = "cross", **options: Any) -> AgeVLM:
    options = {"layers": (2, 3), "gate_init": 0.5, **options} if fusion == "cross" else options
    mx.random.seed(7)
    vision = {
        "model_type": "agevlm_vit", "image_size": 16, "patch_size": 4, "hidden_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    model = AgeVLM(
        ModelConfig(
            text_config={"model_type": kind, **COMMON, **LANGUAGE_MODELS[kind]},
            vision_config=vision,
            fusion_config=FusionConfig(fusion=fusion, **options),  # pyright: ignore
        )
    )
    mx.eval(model.parameters())
    return model


def stage(trainable: Any = FROZEN_BELOW) -> Stage:
    texts = (GroupSpec(kinds=("caption",)),)
    rules = tuple(trainable)
    return Stage(name="s", steps=1, batch_size=2, lr=1e-3, texts=texts, trainable=rules)


def begun_batch(tokens: int = 11, seed: int = 0, images: int = 2) -> Batch:
    """Two groups of two texts an image that begin with the same `tokens`; one row is no text."""
    batch = noise_batch(seed, images, 2)
    same = np.random.default_rng(1).integers(VOCABULARY, size=tokens).astype(np.int32)

    def begin(group: TextGroup, empty: int | None) -> TextGroup:
        wide = [(0, 0), (0, 0), (tokens, 0)]
        ids, labels = np.pad(group.ids, wide), np.pad(group.labels, wide)
        ids[..., :tokens] = same
        loss_mask = np.pad(group.loss_mask, wide)
        weight = group.weight.copy()
        if empty is not None:
            ids[0, empty], loss_mask[0, empty] = 0, 0
            weight[group.rows == empty] = 0
        return replace(
            group,
            ids=ids,
            labels=labels,
            loss_mask=loss_mask,
            weight=weight,
            cols=np.where(weight > 0, group.cols + tokens, 0).astype(np.int32),
        )

    return replace(batch, groups=(begin(batch.groups[0], None), begin(batch.groups[1], 1)))


def computed(model: AgeVLM, batch: Batch, memory: TextMemory | None = None) -> dict[str, mx.array]:
    params = named_parameters(model, trainable=True)
    (loss, parts), grads = loss_and_gradients(model, params, batch, LOSSES, memory=memory)
    mx.eval(loss, parts, grads)
    return {"loss": loss, "parts": parts, **grads}


def agree(a: dict[str, mx.array], b: dict[str, mx.array], share: float = 2e-4) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        most = max(float(mx.abs(value).max()), 1e-3)
        np.testing.assert_allclose(b[name], value, atol=share * most, err_msg=name)


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


# What all texts begin with ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fusion"),
    [
        (kind, fusion)
        for kind in LANGUAGE_MODELS
        for fusion in ("cross", "concat")
        if fusion == "cross" or kind not in ("gemma2", "olmo2")  # these cannot be grafted so
    ],
)
def test_a_beginning_that_is_read_once_changes_nothing(kind, fusion, monkeypatch):
    model, batch = build(kind, fusion), begun_batch()
    begun = []
    begin = AgeVLM.begin
    monkeypatch.setattr(
        AgeVLM, "begin", lambda self, seen, ids: begun.append(ids.shape) or begin(self, seen, ids)
    )
    once = computed(model, batch)
    assert begun == [(2, 11)]
    monkeypatch.setattr(reading, "LEAST_BEGINNING", 1000)
    agree(computed(model, batch), once)
    assert len(begun) == 1


def test_a_beginning_ends_where_something_is_asked_or_differs():
    groups = begun_batch().groups
    assert len(common_beginning(groups)) == 11  # the row without a text does not count
    assert len(common_beginning(begun_batch(0).groups)) == 0
    group = groups[0]
    for name, change in {
        "a label": {"loss_mask": group.loss_mask.copy()},
        "a guided token": {"cols": group.cols.copy()},
        "an absent thing": {"absent": np.zeros_like(group.weight), "cols": group.cols.copy()},
        "another token": {"ids": group.ids.copy()},
    }.items():
        for array in change.values():
            if array.ndim == 3:
                array[1, 1, 4] += 1
        if "cols" in change:
            at = 3 if "absent" in change else 0  # of weight 0, or guided
            change["cols"][at] = 4
            if "absent" in change:
                change["absent"][at] = 1
        assert len(common_beginning([replace(group, **change), groups[1]])) == 4, name
    assert len(common_beginning([replace(group, segments=group.ids), groups[1]])) == 0
    one = {k: getattr(group, k)[:, :1] for k in ("ids", "labels", "loss_mask")}
    alone = replace(group, **one, rows=group.rows // 2)
    assert len(common_beginning([alone])) == 0
    assert len(common_beginning([alone, alone])) == 11


def test_a_short_beginning_is_not_worth_a_pass(monkeypatch):
    monkeypatch.setattr(AgeVLM, "begin", lambda *_: pytest.fail("begun"))
    computed(build(), begun_batch(LEAST_BEGINNING - 1))


# States of texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_remembered_states_change_neither_loss_nor_gradients(kind, begin):
    model, batch = build(kind), begun_batch() if begin else noise_batch(0, 2, 2)
    set_trainable(model, parameter_scales(model, stage()))
    memory = text_memory.text_memory(model, stage())
    assert memory is not None
    whole = computed(model, batch)
    assert any("layers.2.self_attn" in name for name in whole)
    first = computed(model, batch, memory)
    agree(whole, first)
    assert equal(computed(model, batch, memory), first)


def test_a_text_is_computed_once_and_the_same_in_any_company(monkeypatch):
    model, (group, other) = build(), begun_batch().groups
    computations = []
    monkeypatch.setattr(
        text_memory,
        "text_states",
        lambda model, ids: computations.append(ids.shape) or of_models.text_states(model, ids),
    )
    memory = TextMemory(model)
    states = memory.of(group)
    assert states is not None
    assert states.shape == (4, 17, 32)
    assert len(computations) == 4
    twice = replace(group, ids=group.ids[:, ::-1], loss_mask=group.loss_mask[:, ::-1],
                    weight=0 * group.weight)  # fmt: skip
    plain = replace(group, weight=0 * group.weight)
    again, turned = memory.of(plain), memory.of(twice)
    assert again is not None
    assert turned is not None
    assert mx.array_equal(again[mx.array([1, 0, 3, 2])], turned)
    count = len(computations)
    assert memory.of(other) is not None
    assert memory.of(group) is not None
    assert len(computations) == count + 3  # the row without a text is none
    forgetful = TextMemory(model, most=0)
    assert mx.array_equal(forgetful.of(group), states)
    assert mx.array_equal(forgetful.of(group), states)
    assert len(forgetful._states) == 0


def test_rows_of_several_texts_are_not_remembered():
    group = noise_batch(0, 2, 1).groups[0]
    assert TextMemory(build()).of(replace(group, segments=np.zeros_like(group.ids))) is None


def test_forgotten_states_come_back_bit_for_bit():
    model = build()
    set_trainable(model, parameter_scales(model, stage()))
    one, two = begun_batch(), begun_batch(seed=1)
    small = TextMemory(model, most=4 * 17 * 32 * 4)
    first = computed(model, one, small)
    computed(model, two, small)
    assert len(small._states) < 5
    assert equal(computed(model, one, small), first)
    assert equal(computed(model, one, TextMemory(model)), first)


@pytest.mark.parametrize(
    ("rules", "used"),
    [
        ([("language_model\\..*layers\\.3\\..*", 1.0), (".*", 0.0)], True),
        ([("vision_tower\\..*", 1.0), (".*", 0.0)], True),
        ([("language_model\\..*layers\\.1\\..*", 1.0), (".*", 0.0)], False),
        ([("language_model\\..*embed_tokens\\..*", 1.0), (".*", 0.0)], False),
        ([(".*", 1.0)], False),
    ],
)
def test_only_layers_that_stay_as_they_are_are_remembered(rules, used):
    assert (text_memory.text_memory(build(), stage(rules)) is not None) == used


@pytest.mark.parametrize(
    ("num_layers", "dropout", "rules", "used"),
    [
        (2, 0.0, "language_model\\..*lora_[ab]", True),
        (2, 0.5, "language_model\\..*lora_[ab]", True),
        (3, 0.0, "language_model\\..*lora_[ab]", False),
        (3, 0.5, "language_model\\..*layers\\.3\\..*lora_[ab]", False),
        (3, 0.0, "language_model\\..*layers\\.3\\..*lora_[ab]", True),
    ],
)
def test_adapters_below_the_first_looking_layer_turn_it_off(num_layers, dropout, rules, used):
    model = build()
    adapters.add(model, LoraSpec(num_layers=num_layers, dropout=dropout))
    model.train()
    memory = text_memory.text_memory(model, stage([(rules, 1.0), (".*", 0.0)]))
    assert (memory is not None) == used
    assert model.training
    assert model.layers[3].mlp.up_proj.training


def test_models_that_cannot_be_given_states_say_why():
    assert why_not_given(build()) is None
    assert "every layer" in str(why_not_given(build(fusion="concat")))
    assert "first layer looks" in str(why_not_given(build(layers=(0, 2))))
    assert text_memory.text_memory(build(layers=(0, 2)), stage()) is None

    model = build()
    layer = type(model.layers[0])

    class Pair(layer):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [super().__call__(*args, **kwargs)]

    class Skipping(type(model.language_model.model)):
        """The embedding goes to a later layer, too."""

        def __call__(self, inputs: mx.array, cache: Any = None, more: Any = None) -> mx.array:
            return super().__call__(inputs, cache, more) + self.layers[0](self.embed_tokens(inputs))

    model.language_model.model.__class__ = Skipping
    assert "reads more" in str(why_not_given(model))


# In training -----------------------------------------------------------------------------------


def frozen_below(job: Any) -> Any:
    """The job with stages that leave the embedding and layer 0 as they are."""
    rules = (
        ("vision_tower.*", 0.0),
        ("language_model\\.model\\.(embed_tokens|norm|layers\\.0)\\..*", 0.0),
        (".*", 1.0),
    )
    stages = tuple(replace(s, trainable=rules) for s in job.recipe.stages)
    job.recipe = replace(job.recipe, stages=stages)
    return job


def train(job: Any, run: Path) -> Trainer:
    run.mkdir(exist_ok=True)
    trainer = Trainer(job, run, stream=io.StringIO())
    saved = checkpoint.load(run)
    if saved:
        trainer.restore(saved)
    trainer.train()
    return trainer


def test_a_resumed_run_that_has_to_learn_the_texts_again_is_the_same(tmp_path, noise_job):
    whole = train(frozen_below(noise_job()), tmp_path / "whole")
    assert whole.memory is not None
    assert len(whole.memory._states) > 8

    class Killed(Exception):
        pass

    job = frozen_below(noise_job())
    batches = job.batches

    def dying(stage: Any) -> Any:
        source = batches(stage)
        part = source.part

        def until(step: int, *which: int) -> Any:
            if step == 10:
                raise Killed
            return part(step, *which)

        source.part = until
        return source

    job.batches = dying
    with pytest.raises(Killed):
        train(job, tmp_path / "killed")
    resumed = train(frozen_below(noise_job()), tmp_path / "killed")
    assert resumed.step == whole.step == 12
    assert equal(named_parameters(resumed.model), named_parameters(whole.model))


def test_what_is_known_of_texts_is_kept_while_it_holds(tmp_path, noise_job):
    """From a stage to the next, unless that trains what the states depend on."""
    memories = []

    class Watching(Trainer):
        def _train_stage(self, *args: Any) -> None:
            super()._train_stage(*args)
            memories.append(self.memory)

    Watching(frozen_below(noise_job()), tmp_path, stream=io.StringIO()).train()
    assert memories[0] is not None
    assert memories[0] is memories[1]
    job = frozen_below(noise_job())
    job.recipe = replace(
        job.recipe,
        stages=(job.recipe.stages[0], noise_job().recipe.stages[1]),
    )
    other = tmp_path / "other"
    other.mkdir()
    Watching(job, other, stream=io.StringIO()).train()
    assert memories[2] is not None
    assert memories[3] is None
