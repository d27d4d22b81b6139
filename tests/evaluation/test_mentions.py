"""Hallucination at a chosen recall."""

from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.evaluation.asking import Asker
from agevlm_mlx.evaluation.mentions import Mention, chair_at_recall, mentions
from agevlm_mlx.evaluation.respondent import Request, Said
from agevlm_mlx.evaluation.scene_folder import read_scene_folder
from agevlm_mlx.respondents import Ours
from agevlm_mlx.weights import load

ONCE = np.ones((1, 2))
#: Two pictures with two objects each; in the order of confidence: right, wrong, right, right.
FOUND = [
    Mention(0, -0.1, True, True),
    Mention(1, -0.5, True, True),
    Mention(0, -0.2, False, False),
    Mention(1, -0.9, True, True),
    Mention(0, -2.0, False, False),
]


@pytest.mark.parametrize(
    ("recall", "chair"), [(0.25, 0.0), (0.5, 1 / 3), (0.75, 1 / 4), (0.76, np.nan)]
)
def test_the_surest_mentions_are_kept_until_enough_is_recalled(recall: float, chair: float) -> None:
    assert np.allclose(chair_at_recall(FOUND, [2, 2], recall, ONCE), [chair], equal_nan=True)


def test_a_noun_said_twice_recalls_once() -> None:
    found = mentions([["dog", "dog", "car"]], [[-0.1, -0.2, -0.3]], [["dog", "cat"]])
    assert [(m.right, m.new) for m in found] == [(True, True), (True, False), (False, False)]
    assert chair_at_recall(found, [2], 0.5, np.ones((1, 1))) == [0.0]
    assert np.isnan(chair_at_recall(found, [2], 1.0, np.ones((1, 1)))).all()


def test_draws_count_pictures_as_often_as_they_are_drawn() -> None:
    draws = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    # The first picture alone never recalls three quarters; the second needs both of its own.
    found = chair_at_recall(FOUND, [2, 2], 0.75, draws)
    assert np.allclose(found, [1 / 4, np.nan, 0.0], equal_nan=True)
    many = chair_at_recall(FOUND, [2, 2], 0.75, np.tile(draws, (100, 1)))
    assert np.allclose(many, np.tile(found, 100), equal_nan=True)


def test_nothing_said_recalls_nothing() -> None:
    assert np.isnan(chair_at_recall([], [2, 2], 0.1, ONCE)).all()


def test_confidence_is_what_the_model_gives_the_noun_where_it_says_it(tmp_path: Path) -> None:
    write_scenes(tmp_path / "s", 4, 11, "test")
    items = read_scene_folder(tmp_path / "s").items
    loaded, prompt, said = load(None), "Describe the image.", "A dog and a car."
    respondent = Ours(loaded)
    paths = [item.path for item in items]
    respondent.show(paths)
    spans = ((2, 5), (12, 15))
    asked = zip(paths, (spans, spans[1:], spans, ()), strict=True)
    found = respondent.confidence([Said(Request(path, prompt), said, part) for path, part in asked])
    assert [len(one) for one in found] == [2, 1, 2, 0]
    asker = Asker(loaded, paths, load_image)
    start = asker.prompt(prompt)
    words = asker._answered(prompt, said).ids[len(start) :]
    for before, at in (("A", 0), ("A dog and a", 1)):
        # By hand: the prompt and the words before, then the noun's first token.
        n = next(k for k in range(9) if asker.tokenizer.decode(list(words[:k])) == before)
        log_p = asker.next_log_p([[[*start, *words[:n]]] for _ in items], [words[n]])
        wanted = [float(row[0][0]) for row in log_p]
        assert [one[at] for one in (found[0], found[2])] == pytest.approx(
            [wanted[0], wanted[2]], abs=1e-4
        )
    assert found[1][0] == pytest.approx(wanted[1], abs=1e-4)
