"""Recipes are checked before anything runs; rules decide exactly what is trained."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx import config
from agevlm_mlx.errors import UserError
from agevlm_mlx.training import rules, stages, toml
from agevlm_mlx.training.losses import LOSSES
from agevlm_mlx.training.rules import match_rules
from agevlm_mlx.training.stages import Recipe

NAMES = ["vision_tower.fc.weight", "vision_tower.fc.bias", "layers.0.gate", "layers.1.gate"]


def tables() -> dict:
    return {
        "model": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "x"}},
        "data": {"train": "data"},
        "train": {"out": "run"},
        "stages": [
            {
                "name": name,
                "steps": steps,
                "batch_size": 2,
                "lr": 0.1,
                "texts": [{"kinds": ["caption"], "n": 1}],
                "trainable": [[".*", 1]],
            }
            for name, steps in (("align", 3), ("guide", 5))
        ],
    }


def recipe(*overrides: str) -> Recipe:
    return config.from_dict(Recipe, config.override(tables(), overrides))


def test_the_first_rule_that_matches_a_whole_name_decides():
    ordered = [("layers\\.0\\..*", 0.0), (".*gate", 2.0), ("vision_tower.*", 0.5)]
    assert match_rules(NAMES, ordered, "stage") == {
        "vision_tower.fc.weight": 0.5,
        "vision_tower.fc.bias": 0.5,
        "layers.0.gate": 0.0,
        "layers.1.gate": 2.0,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([(".*gate", 1.0)], "no rule matches 2 parameters: vision_tower.fc.weight, vision_tower"),
        ([(".*", 1.0), ("visoin.*", 0.0)], "'visoin.*' matches no parameter"),
        ([(".*", 1.0), ("gate", 0.0)], "'gate' matches no parameter; rules match whole names"),
        ([("(", 1.0)], "not a regular expression"),
        ([(".*", -1.0)], "scales >= 0"),
    ],
)
def test_rules_that_cannot_be_meant_are_errors(wrong, message: str):
    with pytest.raises(UserError, match="stage: ") as error:
        match_rules(NAMES, wrong, "stage")
    assert message in str(error.value)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = [nn.Linear(64, 64) for _ in range(3)]
        self.gate = mx.zeros(1)


def stage_with(*given: tuple[str, float]) -> stages.Stage:
    data = tables()["stages"][0] | {"trainable": [list(rule) for rule in given]}
    return config.from_dict(stages.Stage, data)


def test_exactly_the_named_parameters_are_trainable():
    net = Net()
    names = rules.trainable_names(net, stage_with(("blocks.1.*|gate", 1), (".*", 0)))
    assert names == ["blocks.1.weight", "blocks.1.bias", "gate"]
    rules.set_trainable(net, names)
    assert [n for n, _ in tree_flatten(net.trainable_parameters())] == names
    rules.set_trainable(net, ["first.bias"])  # a later stage forgets the earlier one
    assert [n for n, _ in tree_flatten(net.trainable_parameters())] == ["first.bias"]


def test_a_stage_that_trains_nothing_is_an_error():
    with pytest.raises(UserError, match="every parameter is frozen"):
        rules.parameter_scales(Net(), stage_with((".*", 0)))


def test_quantised_weights_cannot_be_trained_but_what_is_beside_them_can():
    net = Net()
    nn.quantize(net, class_predicate=lambda path, _: path == "first")
    with pytest.raises(UserError, match=r"first\.weight is quantised"):
        rules.parameter_scales(net, stage_with((".*", 1)))
    names = rules.trainable_names(net, stage_with(("first.*", 0), (".*", 1)))
    rules.set_trainable(net, names)
    assert [n for n, _ in tree_flatten(net.trainable_parameters())] == names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.learning_rate=1", "stages[1].learning_rate: unknown key"),
        ("stages.0.losses.atention=1", "did you mean 'attention'?"),
        ("stages.0.lr=0", "stage 'align': expected lr > 0"),
        ("stages.0.steps=0", "stage 'align': expected steps >= 1, got 0"),
        ("stages.0.texts=[]", "texts is empty"),
        ("stages.0.losses.lm=-1", "expected loss weights >= 0"),
        ("stages.0.losses.attention.heads=0", "expected losses.attention.heads >= 1"),
        ("stages.0.losses.attention.kind=focal", "expected 'mass' or"),
        ("stages=[]", "at least one [[stages]]"),
        ("train.keep=0", "train: expected keep >= 1"),
        ("train.export=best", "'best' needs data.val"),
        ("model.init=folder", "remove text_config, vision_config"),
        ("train.clip=0", "train.clip: expected a number > 0"),
        ("train.clip=nan", "train.clip: expected a number > 0"),
        ("stages.0.lr=inf", "stage 'align': expected lr > 0"),
        ("stages.0.losses.features=nan", "expected loss weights >= 0"),
        ("stages.0.losses.attention.weight=nan", "expected losses.attention weights >= 0"),
        ("stages.0.losses.attention.weight_end=-1", "expected losses.attention weights >= 0"),
        ("stages.0.losses.attention.absent=-0.1", "expected losses.attention weights >= 0"),
        ("stages.0.losses.attention.layers=[]", "at least one and none twice in losses.attention"),
        ("stages.0.losses.attention.layers=[1, 1]", "none twice in losses.attention.layers"),
        ("stages.0.losses.attention.layers=[-1]", "expected losses.attention.layers >= 0, got -1"),
        ("stages.0.losses.attention.positions=[]", "none twice in losses.attention.positions"),
        ("stages.0.losses.attention.positions=['after']", "'end' or 'rest', got"),
        ("stages.0.losses.attention.positions=['before', 'rest']", "same place, got both"),
        ("stages.0.losses.attention.positions=['end']", "losses.attention.absent > 0 with the pos"),
        ("stages.0.word_dropout=1", "stage 'align': expected 0 <= word_dropout < 1"),
        ("data.scenes={n=4, style='cubist'}", "data.scenes.style: expected 'plain' or"),
        ("data.scenes={n=4, texts='long'}", "data.scenes.texts: expected 'short' or 'rich'"),
        ("stages.0.decay=0", "stage 'align': expected 0 < decay <= 1"),
        ("train.betas=[1.0, 0.9]", "train.betas: expected two numbers"),
        ("train.weight_decay=-3", "train.weight_decay: expected a number >= 0"),
        ("train.seed=-1", "train.seed: expected 0 <= seed"),
        ("train.ema=1", "train.ema: expected 0 <= ema < 1"),
        ("train.micro_batch=0", "train: expected micro_batch >= 1"),
        ("train.patience=2", "train.patience: needs data.val"),
        ("train.optimizer=sgd", "expected 'adamw' or 'muon'"),
        ("train.report_to=['mlflow']", "train.report_to"),
        ("model.lora.rank=0", "model.lora: expected rank >= 1"),
        ("data.workers=0", "data: expected workers >= 1"),
        ("data.on_error=ignore", "expected 'stop' or 'skip'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_key(override: str, message: str):
    with pytest.raises(UserError) as error:
        recipe(override)
    assert message in str(error.value)


def test_losses_and_their_names_in_recipes_agree():
    for kind in LOSSES:
        assert recipe(f"stages.0.losses.attention.kind={kind}")
    with pytest.raises(UserError):
        recipe("stages.0.losses.attention.kind=other")


def test_locate_finds_the_stage_of_a_step():
    assert recipe().steps == 8
    assert [recipe().locate(s) for s in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (1, 4)]


def test_fingerprint_covers_what_decides_the_parameters_only():
    same = recipe("train.log_every=3", "train.keep=9", "train.out=elsewhere")
    assert same.fingerprint() == recipe().fingerprint()
    for override in ("train.seed=1", "stages.1.lr=0.2", "data.flip=true", "train.clip=2.0",
        "data.images=9", "data.shuffle_masks=true", "stages.0.losses.attention.absent=0.1",
    ):  # fmt: skip
        assert recipe(override).fingerprint() != recipe().fingerprint()


def test_the_resolved_recipe_survives_being_written(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(toml.dumps(config.to_dict(recipe())))
    assert stages.read_recipe(str(path)) == recipe()


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(UserError, match=r"one of: .*scenes, scenes-concat"):
        stages.read_recipe("scene")
