"""Every shipped recipe loads, builds its model, and trains exactly what it says."""

import dataclasses
import re
from pathlib import Path

import pytest

from agevlm_mlx import config
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training.rules import match_rules, named_parameters, trainable_names
from agevlm_mlx.training.stages import Losses, Recipe, read_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
#: These start from a pretrained language model: `test_smollm2_recipes`.
PRETRAINED = {"smollm2-scenes", "smollm2-scenes-lora", "smollm2-scenes-concat"}
FROM_SCRATCH = {"language_model", "multi_modal_projector"}
ALL = FROM_SCRATCH | {"vision_tower"}
#: (recipe, stage) -> the parts of the model it trains, whole.
TRAINED = {
    (name, stage): parts
    for name in ("scenes", "scenes-concat")
    for stage, parts in {
        "align": FROM_SCRATCH,
        "guide": ALL,
        "instruct": ALL,
        "refine": FROM_SCRATCH,
    }.items()
} | {
    ("default", "align"): FROM_SCRATCH,
    ("default", "guide"): ALL,
    ("default", "instruct"): ALL,
}


def build(recipe: Recipe) -> AgeVLM:
    assert recipe.model.fusion_config is not None
    table = {
        "text_config": recipe.model.text_config,
        "vision_config": recipe.model.vision_config,
        "fusion_config": config.to_dict(recipe.model.fusion_config),
    }
    return AgeVLM(config.from_dict(ModelConfig, table))


def test_these_are_the_shipped_recipes():
    assert shipped_recipes() == sorted({name for name, _ in TRAINED} | PRETRAINED)


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - PRETRAINED))
def test_a_shipped_recipe_trains_exactly_what_it_says(name: str):
    recipe = read_recipe(name)
    model = build(recipe)
    names = list(named_parameters(model))
    assert [(name, s.name) for s in recipe.stages] == [key for key in TRAINED if key[0] == name]
    for stage in recipe.stages:
        parts = TRAINED[name, stage.name]
        expected = [n for n in names if n.partition(".")[0] in parts]
        assert trainable_names(model, stage) == expected


def test_the_two_arms_differ_in_fusion_and_guidance_only():
    guided, concat = read_recipe("scenes"), read_recipe("scenes-concat")
    assert build(guided).fusion == "cross"
    assert build(concat).fusion == "concat"
    assert all(stage.losses == Losses() for stage in concat.stages)
    assert any(stage.losses.attention.weight > 0 for stage in guided.stages)

    fusions = guided.model.fusion_config, concat.model.fusion_config
    assert fusions[0] is not None
    assert fusions[1] is not None
    assert fusions[0].projector == fusions[1].projector

    def common(recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, fusion_config=fusions[0]),
            data=dataclasses.replace(recipe.data, store=None),
            train=dataclasses.replace(recipe.train, out=guided.train.out),
            stages=tuple(dataclasses.replace(s, losses=Losses()) for s in recipe.stages),
        )

    assert common(guided) == common(concat)


def test_the_recipe_in_the_documentation_is_one(tmp_path: Path):
    text = (ROOT / "docs/training.md").read_text()
    (tmp_path / "coco.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    recipe = read_recipe(str(tmp_path / "coco.toml"))
    assert [stage.name for stage in recipe.stages] == ["align", "guide"]
    names = (
        "vision_tower.patch.weight",
        "multi_modal_projector.fc1.weight",
        "language_model.model.layers.2.cross_attn.gate",
        "language_model.model.layers.2.self_attn.q_proj.lora_a",
        "language_model.model.layers.2.self_attn.q_proj.linear.weight",
    )
    scales = [match_rules(names, stage.trainable, "x") for stage in recipe.stages]
    assert [list(own.values()) for own in scales] == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
