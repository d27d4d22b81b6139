"""The questions about pictures measure seeing: no noun and no wording gives the answer away."""

import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from agevlm_mlx.data import painting
from agevlm_mlx.data.nouns import HELD_OUT, NOUNS, co_occurrence
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.data.records import Record
from agevlm_mlx.data.scene_texts import POPE_KINDS
from agevlm_mlx.data.scenes import write_scenes

HELD_OUT_NOUNS = {noun for noun, _ in HELD_OUT}


def noun_in(question: str) -> str:
    match = re.fullmatch(r"Is there an? (\w+)( in the image)?\?", question)
    assert match, question
    return match[1]


def pope(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / f"pope_{kind}.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


@cache
def present(index: int) -> tuple[str, ...]:
    """The nouns of a picture of the folder `scenes`."""
    return make_scene(3, "train", index).nouns


def companion(nouns: tuple[str, ...], noun: str) -> float:
    """How often the noun comes with what is in the picture."""
    return co_occurrence()[[NOUNS.index(n) for n in nouns], NOUNS.index(noun)].sum()


def test_popular_and_adversarial_negatives_are_what_the_bias_suggests(scenes: Path) -> None:
    frequency = np.diag(co_occurrence())
    common, likely = {}, {}
    for kind in POPE_KINDS:
        absent = [
            (present(int(Path(q["image"]).stem)), noun_in(q["text"]))
            for q in pope(scenes, kind)
            if q["label"] == "no"
        ]
        common[kind] = np.mean([frequency[NOUNS.index(noun)] for _, noun in absent])
        likely[kind] = np.mean([companion(nouns, noun) for nouns, noun in absent])
    assert common["popular"] > 1.4 * common["random"]
    assert likely["adversarial"] > 2 * likely["popular"]
    assert likely["adversarial"] > 2 * likely["random"]


def test_hard_negatives_for_training_are_likelier_than_random_ones(records: list[Record]) -> None:
    score = defaultdict(list)
    for record in records:
        if record.kind in ("presence", "presence_hard") and record.turns[1].text == "No":
            nouns = present(int(record.image.stem))
            score[record.kind].append(companion(nouns, noun_in(record.turns[0].text)))
    assert np.mean(score["presence_hard"]) > 2 * np.mean(score["presence"])


def test_a_held_out_noun_does_not_give_its_answer_away(tmp_path: Path) -> None:
    out = tmp_path / "nouns"
    write_scenes(out, 32, 1, "nouns")
    for kind in POPE_KINDS:
        said: dict[str, set[str]] = {"yes": set(), "no": set()}
        for question in pope(out, kind):
            said[question["label"]].add(noun_in(question["text"]))
        assert said["no"] | said["yes"] <= HELD_OUT_NOUNS
        assert len(said["no"] & said["yes"]) >= 5
        assert len(said["no"]) >= 8
    texts = (out / "llava.json").read_text()
    assert not set(re.findall(r"\w+", texts)) & set(NOUNS)


def test_every_answer_is_one_of_the_known_words(records: list[Record]) -> None:
    answers = {r.turns[1].text for r in records if r.kind != "caption"}
    corners = {f"{a} {b}" for a in ("Top", "Bottom") for b in ("left", "right")}
    assert answers == {"Yes", "No", "Big", "Small", "One", "Two", "Three", "Four"} | corners


def test_the_sprites_come_with_their_licence() -> None:
    atlas = Path(painting.__file__).parent.parent / "assets" / painting.ATLAS
    text = atlas.with_suffix(".LICENSE.txt").read_text()
    for part in (atlas.name, "OpenMoji", "CC BY-SA 4.0", "https://openmoji.org", "96 x 96"):
        assert part in text
