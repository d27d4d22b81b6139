"""Hallucination at a chosen recall."""

from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.noun_vocabulary import NounVocabulary
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.evaluation.asking import Asker
from agevlm_mlx.evaluation.mentions import Mention, chair_at_recall, find
from agevlm_mlx.evaluation.scene_folder import read_scene_folder
from agevlm_mlx.weights import load


def mention(image: int, log_p: float, right: bool, new: bool | None = None) -> Mention:
    return Mention(image, "dog", log_p, right, right if new is None else new)


#: Two pictures with two objects each; in the order of confidence: right, wrong, right, right.
MENTIONS = [
    mention(0, -0.1, True),
    mention(1, -0.5, True),
    mention(0, -0.2, False),
    mention(1, -0.9, True),
    mention(0, -2.0, False),
]


@pytest.mark.parametrize(
    ("recall", "chair"), [(0.25, 0.0), (0.5, 1 / 3), (0.75, 1 / 4), (0.76, np.nan)]
)
def test_the_surest_mentions_are_kept_until_enough_is_recalled(recall: float, chair: float) -> None:
    found = chair_at_recall(MENTIONS, [2, 2], recall)
    assert np.allclose(found, [chair], equal_nan=True)


def test_a_noun_said_twice_recalls_once() -> None:
    twice = [mention(0, -0.1, True), mention(0, -0.2, True, new=False), mention(0, -0.3, False)]
    assert chair_at_recall(twice, [1], 1.0) == [0.0]
    assert np.isnan(chair_at_recall(twice, [2], 1.0)).all()


def test_draws_count_pictures_as_often_as_they_are_drawn() -> None:
    draws = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    # The first picture alone never recalls three quarters; the second needs both of its own.
    found = chair_at_recall(MENTIONS, [2, 2], 0.75, draws)
    assert np.allclose(found, [1 / 4, np.nan, 0.0], equal_nan=True)


def test_nothing_said_recalls_nothing() -> None:
    assert np.isnan(chair_at_recall([], [2, 2], 0.1)).all()


def test_confidence_is_what_the_model_gives_the_noun_where_it_says_it(tmp_path: Path) -> None:
    write_scenes(tmp_path / "s", 6, 11, "test")
    items = read_scene_folder(tmp_path / "s").items
    loaded = load(None)
    asker = Asker(loaded, [item.path for item in items], load_image)
    captions = ["A dog and a car." for _ in items]
    nouns = NounVocabulary(["dog", "car"])
    found = find(asker, "Describe the image.", captions, [list(i.objects) for i in items], nouns)
    assert [m.noun for m in found] == ["dog", "car"] * len(items)
    assert [m.image for m in found] == [i for i in range(len(items)) for _ in range(2)]
    for m in found:
        assert m.right == m.new == (m.noun in items[m.image].objects)
        # The same by hand: the prompt, the words before, then the noun's first token.
        before = "A" if m.noun == "dog" else "A dog and a"
        start = asker.prompt("Describe the image.")
        words = asker._answered("Describe the image.", captions[m.image]).ids[len(start) :]
        n = next(k for k in range(9) if asker.tokenizer.decode(list(words[:k])) == before)
        rows = [[[*start, *words[:n]]] if i == m.image else [] for i in range(len(items))]
        log_p = asker.next_log_p(rows, [words[n]])[m.image][0][0]
        assert m.log_p == pytest.approx(float(log_p), abs=1e-4)
