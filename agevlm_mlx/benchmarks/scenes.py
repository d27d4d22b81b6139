"""The embedded benchmark: does the model see what is there, and look where it is?

On held-out scenes: POPE (random, popular, adversarial), caption matching, caption hallucination
(CHAIR), and where the attention lies for the noun that a question asks for.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from ..data.noun_vocabulary import NounVocabulary
from ..data.records import CAPTION_PROMPT
from ..data.scene_texts import presence_question
from ..evaluation import metrics, yes_no
from ..evaluation.benchmark import Benchmark, Given, Item, Scores, mask_key
from ..evaluation.mentions import chair_at_recall, mentions
from ..evaluation.scene_folder import (
    NEEDS,
    POPE_SPLITS,
    SceneFolder,
    SceneItem,
    read_scenes,
    swap_noun,
)
from ..evaluation.source import Source
from ..evaluation.yes_no import Question

#: Of the captions that are told apart: the same ones for every model and every run.
_SEED = 1

#: Shares of the objects at which captions are compared.
RECALLS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: Score -> what it is the mean of, of `pointing.measures`.
_LOOKS = {
    "pointing_game": "hit",
    "pointing_game_tolerance": "near",
    "pointing_game_half_heads": "hit_half_heads",
    "energy_in_mask": "energy",
    "energy_in_mask_half_heads": "energy_half_heads",
    "uniform_energy": "uniform",
    "centre_pointing_game": "centre_hit",
    "ideal_pointing_game": "ideal_hit",
    "centre_energy": "centre",
    "attention_on_image": "on_image",
}


def read(source: Source) -> list[Item]:
    """Each picture's questions, captions to tell apart, own caption, and nouns to look for."""
    folder = read_scenes(source)
    nouns = NounVocabulary(list(folder.themes))
    told_apart = {item.unit: item for item in _matching(folder)}
    items: list[Item] = []
    for scene in folder.items:
        items += _pope(scene)
        items += [told_apart[scene.name]] if scene.name in told_apart else []
        about = {"task": "caption", "objects": sorted(scene.objects), "nouns": [*folder.themes]}
        key = f"caption:{scene.name}"
        items.append(_item(scene, key, CAPTION_PROMPT, kind="text", about=about))
        items += _looks(scene, nouns)
    return items


def _item(scene: SceneItem, key: str, prompt: str, **rest: Any) -> Item:
    return Item(key=key, unit=scene.name, image=scene.path, prompt=prompt, **rest)


def _pope(scene: SceneItem) -> Iterator[Item]:
    """The questions of each split; what stands in several is asked once all the same."""
    for split in POPE_SPLITS:
        for question in scene.questions[split]:
            yield _item(
                scene,
                question.where,
                question.text,
                label=question.label,
                options=yes_no.OPTIONS,
                about={"task": "pope", "split": split},
            )


def _matching(folder: SceneFolder) -> Iterator[Item]:
    """The true caption, another picture's, and the true one with one noun exchanged."""
    scenes = [scene for scene in folder.items if scene.caption]
    if len(scenes) < 2:
        return
    rng, order = np.random.default_rng(_SEED), metrics.derangement(len(scenes), _SEED)
    for n, scene in enumerate(scenes):
        hard = swap_noun(scene.caption, list(scene.objects), folder.themes, rng)
        yield _item(
            scene,
            f"matching:{scene.name}",
            CAPTION_PROMPT,
            kind="likelihood",
            label=scene.caption,
            options=(scene.caption, scenes[order[n]].caption, *([hard] if hard else [])),
            about={"task": "matching", "nouns": [*folder.themes]},
        )


def _looks(scene: SceneItem, nouns: NounVocabulary) -> Iterator[Item]:
    """The noun of each question about something that is there; and another thing of the picture,
    which is not scored but shows where another word looks (the control)."""
    there: dict[str, Question] = {}
    for question in (q for split in POPE_SPLITS for q in scene.questions[split]):
        if question.label == "yes":
            there.setdefault(question.text, question)
    asked = set()
    for question in there.values():
        for noun in nouns.mentions(question.text)[:1]:
            as_it_is = rf"(?<!\w){re.escape(noun)}(?!\w)"  # not its plural
            if noun in scene.objects and re.search(as_it_is, question.text, re.IGNORECASE):
                asked.add(noun)
                yield _look(scene, question.where, question.text, noun, "grounding")
    others = [noun for noun in scene.objects if noun not in asked]
    if asked and others:
        question = presence_question(others[0], True)
        yield _look(scene, f"{scene.name}:{others[0]}", question, others[0], "another word")


def _look(scene: SceneItem, where: str, question: str, noun: str, task: str) -> Item:
    return _item(
        scene,
        f"look:{where}",
        question,
        kind="look",
        phrase=noun,
        mask=partial(scene.mask, noun),
        mask_key=mask_key(scene.objects[noun]),
        about={"task": task},
    )


def score(given: Sequence[Given], scores: Scores) -> None:
    """Every score of the tasks that were answered."""
    for split in POPE_SPLITS:
        if mine := [g for g in _of(given, "pope") if g.item.about["split"] == split]:
            yes_no.score(f"pope.{split}", mine, scores)
    if mine := [g for g in _of(given, "matching") if g.scores]:
        _score_matching(mine, scores)
    if mine := _of(given, "caption"):
        _score_captions(mine, scores)
    if mine := [g for g in _of(given, "grounding") if g.look]:
        for name, key in _LOOKS.items():
            if all(key in g.look for g in mine):  # answers of an earlier version may lack some
                scores.mean(name, mine, [float(g.look[key]) for g in mine])
        scores.derive("energy_gain", np.divide, "energy_in_mask", "uniform_energy")


def _of(given: Iterable[Given], task: str) -> list[Given]:
    return [one for one in given if one.item.about["task"] == task]


def _score_matching(given: Sequence[Given], scores: Scores) -> None:
    for column, suffix in ((1, ""), (2, "_hard")):
        if pairs := [g for g in given if len(g.scores) > column]:
            true, other = (np.array([g.scores[n] for g in pairs]) for n in (0, column))
            scores.auroc(f"matching_auroc{suffix}", pairs, true, pairs, other)
            wins = (true > other) + 0.5 * (true == other)
            scores.mean(f"matching_win_rate{suffix}", pairs, wins)
            if all(len(g.confirmed) == len(g.scores) for g in pairs):
                true, other = (np.array([g.confirmed[n] for g in pairs]) for n in (0, column))
                scores.auroc(f"matching_confirmed_auroc{suffix}", pairs, true, pairs, other)


def _score_captions(given: Sequence[Given], scores: Scores) -> None:
    counts = [metrics.caption_counts(_mentions(g), g.item.about["objects"]) for g in given]
    for name, (top, bottom) in metrics.caption_ratios(np.array(counts)).items():
        scores.ratio(name, given, top, bottom)
    said, there = [_mentions(g) for g in given], [g.item.about["objects"] for g in given]
    for name, sure in (
        ("chair_i_at_recall", [g.log_p for g in given]),
        ("chair_i_confirmed_at_recall", [g.confirmed for g in given]),
    ):
        if all(len(values) == len(nouns) for values, nouns in zip(sure, said, strict=True)):
            found = mentions(said, sure, there)
            for recall in RECALLS:
                chair = partial(chair_at_recall, found, list(map(len, there)), recall)
                scores.drawn_from(f"{name}.{round(100 * recall)}", given, chair)


def _mentions(given: Given) -> list[str]:
    """The nouns that a caption names, in order."""
    return _vocabulary(tuple(given.item.about["nouns"])).mentions(given.answer)


def _spans(item: Item, said: str) -> list[tuple[int, int]]:
    """Where they are."""
    found = _vocabulary(tuple(item.about["nouns"])).find(said)
    return [(start, end) for _, start, end in found]


def _confirm(item: Item, said: str) -> list[str]:
    """Whether each of them is there, as TIFA (arXiv 2303.11897) asks about captions."""
    nouns = _vocabulary(tuple(item.about["nouns"])).mentions(said)
    return [presence_question(noun, True) for noun in nouns]


@cache
def _vocabulary(nouns: tuple[str, ...]) -> NounVocabulary:
    return NounVocabulary(nouns)


BENCHMARK = Benchmark(
    name="scenes",
    about="held-out embedded scenes: POPE, matching, hallucinated objects, grounding",
    needs=NEEDS,
    read=read,
    score=score,
    parse=yes_no.parse,
    mentions=_spans,
    confirm=_confirm,
    headline=(
        "pope.adversarial.accuracy",
        "pope.popular.accuracy",
        "pope.random.accuracy",
        "matching_auroc",
        "matching_auroc_hard",
        "chair_i",
        "caption_f1",
        "pointing_game",
        "energy_in_mask",
        "uniform_energy",
        "centre_pointing_game",
        "ideal_pointing_game",
        "centre_energy",
    ),
    max_tokens=48,
)
