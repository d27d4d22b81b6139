"""What is made before the first run: once for all of them."""

from dataclasses import replace

from agevlm_mlx.experiments import prepare


def test_the_same_data_are_prepared_once_and_those_with_features_first(plan, monkeypatch):
    made, drawn = [], []
    monkeypatch.setattr(prepare.build, "prepare", lambda recipe, say: made.append(recipe))
    monkeypatch.setattr(prepare, "write_scenes", lambda *args: drawn.append(args[:4]))
    runs = plan.queue(plan.cells({}))
    prepare.prepare(plan, runs)
    assert len(made) == 1  # all arms, seeds, lengths and numbers of images
    assert drawn == [(plan.test_folder("test"), 12, 11, "test")]
    recipe = runs[-1].recipe
    stages = tuple(replace(s, losses=replace(s.losses, features=1.0)) for s in recipe.stages)
    made.clear()
    distilled = replace(runs[-1], recipe=replace(recipe, stages=stages))
    prepare.prepare(plan, [*runs, distilled])
    assert made == [distilled.recipe]  # the others use its store, too


def test_other_data_or_another_student_are_prepared_apart(plan, monkeypatch):
    made = []
    monkeypatch.setattr(prepare.build, "prepare", lambda recipe, say: made.append(recipe))
    monkeypatch.setattr(prepare, "write_scenes", lambda *args: False)
    run = plan.cells({})[0].runs[0]
    scenes = replace(run.recipe.data.scenes, seed=9)
    other = replace(run.recipe, data=replace(run.recipe.data, scenes=scenes))
    vision = {**run.recipe.model.vision_config, "image_size": 48}
    larger = replace(run.recipe, model=replace(run.recipe.model, vision_config=vision))
    runs = [run, replace(run, recipe=other), replace(run, recipe=larger), run]
    prepare.prepare(plan, runs)
    assert made == [run.recipe, other, larger]
