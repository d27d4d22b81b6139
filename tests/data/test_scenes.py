"""The embedded pictures: exact masks, the bias, true texts, and folders whole or refused."""

import contextlib
import errno
import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import scenes as command
from agevlm_mlx.data import painting
from agevlm_mlx.data import scenes as folders
from agevlm_mlx.data.nouns import (
    ALL_NOUNS,
    HELD_OUT,
    NOUNS,
    SPLITS,
    THEMES,
    Split,
    held_out_pair,
    likely_absent,
    popular_absent,
    sample_nouns,
    theme_of,
)
from agevlm_mlx.data.painting import SIDE, TILE, make_scene
from agevlm_mlx.data.records import Record
from agevlm_mlx.data.scene_dialogues import rich_records
from agevlm_mlx.data.scene_texts import POPE_KINDS, corner, mismatched, scene_records
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.data.styles import STYLES, Style, draw_sprite
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_decode

# --- pictures


def test_a_picture_depends_on_seed_split_and_index_only() -> None:
    first = make_scene(1, "train", 7)
    make_scene(1, "train", 8)
    again = make_scene(1, "train", 7)
    assert first.nouns == again.nouns
    np.testing.assert_array_equal(first.image, again.image)
    for other in (make_scene(2, "train", 7), make_scene(1, "val", 7), make_scene(1, "train", 8)):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("split", SPLITS)
def test_masks_are_what_is_visible(split: Split) -> None:
    for i in range(12):
        scene = make_scene(4, split, i)
        assert scene.image.shape == (SIDE, SIDE, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.nouns) == len(set(scene.nouns)) == len(scene.masks) <= 4
        assert scene.masks.sum(axis=0).max() == 1  # a pixel shows one object
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
            assert mask.sum() > 100
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert inside.any(axis=0)[[0, -1]].all()
            assert inside.any(axis=1)[[0, -1]].all()


def test_masks_cover_exactly_what_was_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.float32([255, 0, 255])  # no sprite is magenta
    monkeypatch.setattr(painting, "_background", lambda _: np.tile(plain, (SIDE, SIDE, 1)))
    for i in range(20):
        scene = make_scene(5, "train", i)
        painted = np.abs(scene.image.astype(int) - plain).max(axis=2) > 0
        seen = scene.masks.any(axis=0)
        near = seen.copy()  # a rim of half-transparent pixels lies around a mask
        for shift in (-2, -1, 1, 2):
            near |= np.roll(seen, shift, 0) | np.roll(seen, shift, 1)
        assert (painted & seen).sum() > 0.999 * seen.sum()
        assert (painted & ~near).sum() < 0.02 * seen.sum()


def test_an_object_in_front_hides_what_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "_place", lambda rng, side, others: (40, 40 + 12 * len(others)))
    monkeypatch.setattr(painting, "_MIN_VISIBLE", 0.0)
    both = painting._paint(np.random.default_rng(0), ["book", "clock"])
    alone = painting._paint(np.random.default_rng(0), ["book"])
    assert both is not None
    assert alone is not None
    hidden = alone.masks[0] & ~both.masks[0]
    assert hidden.sum() > 0
    assert (hidden <= both.masks[1]).all()
    monkeypatch.setattr(painting, "_MIN_VISIBLE", 0.999)
    assert painting._paint(np.random.default_rng(0), ["book", "clock"]) is None


def test_big_and_small_are_apart() -> None:
    sides: dict[str, list[int]] = {"small": [], "big": []}
    for i in range(60):
        scene = make_scene(6, "train", i)
        for size, (x0, y0, x1, y1) in zip(scene.sizes, scene.boxes, strict=True):
            sides[size].append(max(x1 - x0, y1 - y0))
    assert min(len(s) for s in sides.values()) > 30
    # What stands in front may cut a big one, so a few are allowed to overlap.
    assert np.quantile(sides["small"], 0.98) < np.quantile(sides["big"], 0.05)
    assert max(sides["big"]) < 75


# --- the styles


@pytest.mark.parametrize("style", ["recoloured", "outlined", "blurred"])
def test_a_style_changes_the_look_and_nothing_else(style: Style) -> None:
    for i in range(12):
        plain, other = make_scene(3, "test", i), make_scene(3, "test", i, style)
        assert (other.nouns, other.sizes) == (plain.nouns, plain.sizes)
        np.testing.assert_array_equal(other.masks, plain.masks)
        np.testing.assert_array_equal(other.boxes, plain.boxes)
        np.testing.assert_array_equal(other.image, make_scene(3, "test", i, style).image)
        change = np.abs(other.image.astype(int) - plain.image).mean(axis=2)
        for mask in plain.masks:
            assert change[mask].mean() > 8
        if style != "blurred":  # the sprites' soft rims reach a little out of the masks
            assert np.mean(change[~plain.masks.any(axis=0)] > 0) < 0.05


def test_recoloured_objects_keep_their_brightness_and_no_two_their_colours() -> None:
    sprite = np.zeros((4, 4, 4), np.float32)
    sprite[:2] = (120, 40, 40, 200)  # half see-through red, alpha premultiplied
    rng = np.random.default_rng(0)
    drawn = [draw_sprite(sprite, "recoloured", rng)[0, 0] for _ in range(20)]
    luma = np.array([0.299, 0.587, 0.114])
    for one in drawn:
        assert one[3] == 200
        assert 0 <= one[:3].min() <= one[:3].max() <= 200
        assert one[:3] @ luma == pytest.approx(sprite[0, 0, :3] @ luma, abs=12)  # some is clipped
        assert np.abs(one[:3] - sprite[0, 0, :3]).max() > 15
    assert len({tuple(one) for one in drawn}) == 20
    assert not draw_sprite(sprite, "recoloured", rng)[2:].any()  # what was clear stays clear


def test_outlined_objects_have_lines_and_no_colours() -> None:
    sprite = np.zeros((30, 30, 4), np.float32)
    sprite[5:25, 5:25] = (90, 60, 60, 255)
    sprite[5:25, 15:25, :3] = (255, 255, 240)
    drawn = draw_sprite(sprite, "outlined", np.random.default_rng(0))
    np.testing.assert_array_equal(drawn[..., 3], sprite[..., 3])
    assert np.ptp(drawn[..., :3], axis=-1).max() < 10
    ink = drawn[..., 0] < 100
    assert ink[5, 5:25].all()  # where it ends
    assert ink[10, 14:16].any()  # where dark and bright meet
    assert (drawn[10, 8:12, :3] > 240).all()
    assert (drawn[10, 18:22, :3] > 240).all()


def test_scaled_objects_have_sizes_that_train_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, dict[str, list[int]]] = {}
    real = painting._cutout

    def cutout(noun: str, pose: painting._Pose) -> np.ndarray:
        sides.append(pose.inner)
        return real(noun, pose)

    monkeypatch.setattr(painting, "_cutout", cutout)
    for split, style in (("train", "plain"), ("test", "scaled")):
        found = shown[style] = {"small": [], "big": []}
        for i in range(40):
            sides: list[int] = []
            scene = make_scene(6, split, i, style)
            # Those of layouts that were thrown away come before.
            for size, side in zip(scene.sizes, sides[-len(scene.nouns) :], strict=True):
                found[size].append(side)
            assert scene.nouns == make_scene(6, split, i).nouns
    scaled, train = shown["scaled"], shown["plain"]
    assert max(scaled["small"]) < min(train["small"])
    assert max(train["big"]) < min(scaled["big"])


@pytest.mark.parametrize("style", STYLES[1:])
def test_a_folder_of_another_style_asks_the_same_and_has_its_own_pixels(
    tmp_path: Path, style: Style
) -> None:
    for folder, own in (("plain", "plain"), ("other", style), ("again", style)):
        assert write_scenes(tmp_path / folder, 6, 4, "test", style=own)
    plain, other, again = (fingerprint(tmp_path / folder) for folder in ("plain", "other", "again"))
    assert other == again
    for name in plain:
        if name.startswith("pope"):
            assert other[name] == plain[name]
        if name.endswith(".png"):
            assert other[name] != plain[name]
        if name in ("captions.json", "instances.json"):
            assert (other[name] == plain[name]) == (style not in ("scaled", "varied"))
    assert json.loads((tmp_path / "other" / "scenes.json").read_text())["style"] == style
    # Folders made before there were styles say nothing of theirs, and are still finished.
    assert "style" not in json.loads((tmp_path / "plain" / "scenes.json").read_text())
    with pytest.raises(
        UserError, match=rf"style={style} texts=short version=1, asked for .* style=plain"
    ):
        write_scenes(tmp_path / "other", 6, 4, "test")


# --- the sprites


def test_varied_objects_show_looks_of_their_own_and_keep_their_place() -> None:
    rng = np.random.default_rng(0)
    sprite = painting._cutout("dog", painting._Pose(60, 0.1, False, 68))
    looks = {draw_sprite(sprite, "varied", rng).tobytes() for _ in range(60)}
    assert len(looks) > 20  # plain and grey are one each, the others have colours of their own
    for _ in range(60):
        drawn = draw_sprite(sprite, "varied", rng)
        assert np.array_equal(drawn[..., 3], sprite[..., 3])
        assert drawn.shape == sprite.shape
        assert drawn[..., :3].min() >= -1e-3


def test_balanced_pictures_have_no_bias_and_no_held_out_pair() -> None:
    frequency = frequencies("balanced")
    assert set(frequency) == set(NOUNS)
    assert max(frequency.values()) < 3 * min(frequency.values())
    assert not any(has_held_out_pair(nouns) for nouns in drawn("balanced", 400))


def test_pairs_differ_in_one_noun_and_nothing_else() -> None:
    alike = 0
    for i in range(0, 40, 2):
        first, second = make_scene(6, "pairs", i), make_scene(6, "pairs", i + 1)
        differ = [a != b for a, b in zip(first.nouns, second.nouns, strict=True)]
        assert sum(differ) == 1
        if first.sizes != second.sizes:
            continue  # the other noun would have been hidden: laid out anew
        spot = differ.index(True)
        x0, y0, x1, y1 = np.concatenate([first.boxes[[spot]], second.boxes[[spot]]]).T
        outside = np.ones((SIDE, SIDE), bool)
        outside[max(y0.min() - 3, 0) : y1.max() + 3, max(x0.min() - 3, 0) : x1.max() + 3] = False
        alike += bool((first.image[outside] == second.image[outside]).all())
    assert alike >= 15
    assert not any(has_held_out_pair(nouns) for nouns in drawn("pairs", 400))


# --- rich texts


def test_rich_texts_follow_the_short_ones_and_change_nothing_else(tmp_path: Path) -> None:
    write_scenes(tmp_path / "short", 6, 4, "train")
    write_scenes(tmp_path / "rich", 6, 4, "train", texts="rich")
    short, rich = (fingerprint(tmp_path / folder) for folder in ("short", "rich"))
    assert {name for name in short if short[name] != rich[name]} == {"llava.json", "scenes.json"}
    records = {
        name: json.loads((tmp_path / name / "llava.json").read_text()) for name in ("short", "rich")
    }
    kinds = {record["kind"] for record in records["short"]}
    assert [r for r in records["rich"] if r["kind"] in kinds] == records["short"]
    assert len({r["id"] for r in records["rich"]}) == len(records["rich"])
    with pytest.raises(UserError, match=r"texts=rich version=1, asked for .* texts=short"):
        write_scenes(tmp_path / "rich", 6, 4, "train")


@pytest.mark.parametrize("split", ["train", "balanced", "nouns"])
def test_every_rich_text_is_true(split: Split) -> None:
    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, bool]] = Counter()
    for i in range(60):
        scene = make_scene(3, split, i)
        for record in rich_records(scene, "s", "images/s.png", np.random.default_rng([3, i])):
            kinds[record["kind"]] += 1
            turns = [turn["value"] for turn in record["conversations"]]
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                mentioned = named(question) | named(answer)
                if answer.startswith(("Yes", "No")):
                    assert len(named(question)) == 1
                    there = mentioned <= set(scene.nouns)
                    assert there == answer.startswith("Yes")
                    answers[record["kind"], there] += 1
                else:
                    assert mentioned <= set(scene.nouns)
                if record["kind"] in ("describe", "sentence_caption"):
                    assert named(answer) == set(scene.nouns)
            for phrase in record.get("phrases", ()):
                said = turns[phrase["turn"]].removeprefix("<image>\n")
                assert said[phrase["start"] : phrase["end"]] == phrase["text"]
                box = scene.boxes[scene.nouns.index(phrase["text"])].tolist()
                assert phrase["box"] == box
    for kind in ("ask", "ask_hard", "sentence_presence", "sentence_hard"):
        assert answers[kind, True] == answers[kind, False] > 0
    assert kinds["dialogue"] == 180


def test_a_follow_up_is_about_the_object_of_the_turn_before() -> None:
    found = 0
    for i in range(60):
        scene = make_scene(3, "train", i)
        for record in rich_records(scene, "s", "images/s.png", np.random.default_rng([3, i])):
            turns = [turn["value"] for turn in record["conversations"]]
            about = None
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                if question in ("Is it big or small?", "How big is it?"):
                    assert answer.lower() == scene.sizes[scene.nouns.index(about or "")]
                    found += 1
                elif named(question):
                    about = next(iter(named(question)))
    assert found > 10


def test_sprites_look_different_when_small() -> None:
    small = {}
    for noun, sprite in painting._sprites().items():
        assert sprite.size == (TILE, TILE)
        white = Image.new("RGBA", sprite.size, "white")
        white.alpha_composite(sprite.convert("RGBA"))
        small[noun] = np.asarray(white.convert("RGB").resize((25, 25)), float)
    assert tuple(small) == ALL_NOUNS
    distance = {pair: np.abs(small[pair[0]] - small[pair[1]]).mean() for pair in
                combinations(small, 2)}  # fmt: skip
    nearest = min(distance, key=lambda pair: distance[pair])
    assert distance[nearest] > 15, nearest


# --- the bias


def drawn(split: Split, n: int) -> list[list[str]]:
    rng = np.random.default_rng(11)
    return [sample_nouns(rng, split) for _ in range(n)]


def frequencies(split: Split, n: int = 1500) -> Counter[str]:
    return Counter(noun for nouns in drawn(split, n) for noun in nouns)


def test_there_are_enough_nouns_to_speak_of() -> None:
    assert len(NOUNS) >= 40
    assert len(HELD_OUT) >= 12
    assert not set(NOUNS) & {noun for noun, _ in HELD_OUT}
    assert len(ALL_NOUNS) == len(set(ALL_NOUNS))


def test_some_nouns_are_frequent_in_train_and_none_in_uniform() -> None:
    train, uniform = frequencies("train"), frequencies("uniform")
    for members in THEMES.values():
        first, last = members[0][0], members[-1][0]
        assert train[first] > 1.8 * train[last]
    assert set(uniform) == set(NOUNS)
    assert max(uniform.values()) < 1.8 * min(uniform.values())


@pytest.mark.parametrize(("split", "low", "high"), [("train", 0.6, 0.9), ("uniform", 0.0, 0.2)])
def test_themes_come_together_in_train_only(split: Split, low: float, high: float) -> None:
    pairs = [(a, b) for nouns in drawn(split, 800) for a, b in combinations(nouns, 2)]
    assert low < np.mean([theme_of(a) == theme_of(b) for a, b in pairs]) < high


def has_held_out_pair(nouns: list[str]) -> bool:
    where = [NOUNS.index(noun) for noun in nouns]
    return any(held_out_pair(a, b) for a, b in combinations(where, 2))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_held_out_pairs_never_meet(split: Split) -> None:
    assert not any(has_held_out_pair(nouns) for nouns in drawn(split, 800))


def test_every_picture_of_combos_has_a_held_out_pair() -> None:
    assert all(has_held_out_pair(nouns) for nouns in drawn("combos", 100))


def test_the_nouns_split_shows_nothing_of_train() -> None:
    held_out = {noun for noun, _ in HELD_OUT}
    assert set(frequencies("nouns", 200)) == held_out
    assert not set(frequencies("train")) & held_out


# --- texts


def texts_of(split: Split, i: int) -> tuple[painting.Scene, list[dict[str, Any]]]:
    scene = make_scene(8, split, i)
    return scene, scene_records(scene, "x", "images/x.png", np.random.default_rng(i))


def asked(record: dict[str, Any]) -> tuple[str, str]:
    question, answer = (message["value"] for message in record["conversations"])
    return question.removeprefix("<image>\n"), answer


def named(text: str) -> set[str]:
    words = set(text.replace(",", " ").replace(".", " ").replace("?", " ").lower().split())
    return words & set(ALL_NOUNS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_true(split: Split) -> None:
    numbers = dict(zip(("One", "Two", "Three", "Four"), range(1, 5), strict=True))
    for i in range(25):
        scene, texts = texts_of(split, i)
        for record in texts:
            (question, answer), kind = asked(record), record["kind"]
            about = named(question)
            if kind == "caption":
                assert answer.endswith(".")
                assert named(answer) == set(scene.nouns)
            elif kind in ("presence", "presence_hard"):
                assert answer == ("Yes" if about <= set(scene.nouns) else "No")
            elif kind == "match":
                assert answer == ("Yes" if about == set(scene.nouns) else "No")
            elif kind == "count":
                assert numbers[answer] == len(scene.nouns)
            else:
                (noun,) = about
                k = scene.nouns.index(noun)
                expected = scene.sizes[k].capitalize() if kind == "attribute" else corner(scene, k)
                assert answer == expected


def test_captions_go_from_left_to_right() -> None:
    for i in range(20):
        scene, texts = texts_of("train", i)
        _, answer = asked(texts[0])
        centres = {n: b[0] + b[2] for n, b in zip(scene.nouns, scene.boxes, strict=True)}
        order = sorted(scene.nouns, key=lambda noun: answer.index(f" {noun}"))
        assert [centres[n] for n in order] == sorted(centres.values())


def test_phrases_carry_the_box_of_their_noun() -> None:
    for i in range(20):
        scene, texts = texts_of("train", i)
        for record in texts:
            for phrase in record.get("phrases", []):
                text = asked(record)[phrase["turn"]]
                assert text[phrase["start"] : phrase["end"]] == phrase["text"]
                box = scene.boxes[scene.nouns.index(phrase["text"])]
                assert phrase["box"] == box.tolist()


def test_what_is_absent_guides_nothing() -> None:
    for i in range(20):
        _, texts = texts_of("train", i)
        for record in texts:
            tied = {phrase["text"] for phrase in record.get("phrases", [])}
            if record["kind"] != "count" and asked(record)[1] != "No":
                assert tied == named(" ".join(asked(record)))
            else:
                assert not tied


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_balanced(split: Split) -> None:
    wordings: Counter[bool] = Counter()
    for i in range(20):
        _, texts = texts_of(split, i)
        kinds = Counter((r["kind"], asked(r)[1]) for r in texts)
        assert kinds["presence", "Yes"] == kinds["presence", "No"] == 6
        assert kinds["presence_hard", "Yes"] == kinds["presence_hard", "No"] == 2
        assert kinds["match", "Yes"] == kinds["match", "No"] == 1
        wordings.update("in the image" in asked(r)[0] for r in texts if r["kind"] == "presence")
    assert 0.4 < wordings[True] / wordings.total() < 0.6


def test_articles_fit() -> None:
    questions = {asked(r)[0] for i in range(60) for r in texts_of("uniform", i)[1]}
    assert any("an apple" in q for q in questions)
    assert any("an umbrella" in q for q in questions)
    assert not any(f" a {vowel}" in q for q in questions for vowel in "aeiou")


def test_a_mismatched_caption_swaps_one_noun_within_its_theme() -> None:
    rng = np.random.default_rng(0)
    for nouns in drawn("train", 60):
        wrong = mismatched(nouns, rng)
        (change,) = [(a, b) for a, b in zip(nouns, wrong, strict=True) if a != b]
        assert change[1] not in nouns
        assert theme_of(change[0]) == theme_of(change[1])


def test_positions_near_the_middle_are_not_asked() -> None:
    scene = make_scene(8, "train", 0)
    boxes = {(0, 0, 40, 40): "Top left", (80, 90, 120, 128): "Bottom right",
             (80, 0, 120, 40): "Top right", (50, 0, 80, 40): None}  # fmt: skip
    for box, expected in boxes.items():
        moved = replace(scene, boxes=np.array([box]))
        assert corner(moved, 0) == expected


# --- folders


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fingerprint(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", POPE_KINDS)
def test_pope_asks_twice_about_every_picture(scenes: Path, kind: str) -> None:
    questions = lines(scenes / f"pope_{kind}.json")
    nouns = {f"{i:06d}.png": list(make_scene(3, "train", i).nouns) for i in range(48)}
    assert [q["question_id"] for q in questions] == list(range(1, 97))
    assert Counter(q["image"] for q in questions) == dict.fromkeys(nouns, 2)
    assert Counter(q["label"] for q in questions) == {"yes": 48, "no": 48}
    for question in questions:
        present = nouns[question["image"]]
        (noun,) = named(question["text"])
        assert question["text"].endswith(f" {noun} in the image?")
        assert (noun in present) == (question["label"] == "yes")
        if question["label"] == "no" and kind == "popular":
            assert noun in popular_absent(present, 8)
        if question["label"] == "no" and kind == "adversarial":
            assert noun == likely_absent(present)[0]


def test_likely_nouns_are_those_of_the_theme() -> None:
    assert theme_of(likely_absent(["cow", "pig"])[0]) == "farm"
    assert theme_of(likely_absent(["umbrella"])[0]) == "garden"


def test_the_tables_describe_the_files(scenes: Path, records: list[Record]) -> None:
    tables = json.loads((scenes / "instances.json").read_text())
    names = {c["id"]: c["name"] for c in tables["categories"]}
    assert set(NOUNS) <= set(names.values())
    found: dict[int, list[dict[str, Any]]] = {}
    for item in tables["annotations"]:
        found.setdefault(item["image_id"], []).append(item)
    assert len(tables["images"]) == len(found) == len({r.image for r in records}) == 48
    for image in tables["images"]:
        scene = make_scene(3, "train", image["id"])
        stored = np.asarray(Image.open(scenes / "images" / image["file_name"]))
        np.testing.assert_array_equal(stored, scene.image)
        for k, item in enumerate(found[image["id"]]):
            assert names[item["category_id"]] == scene.nouns[k]
            np.testing.assert_array_equal(rle_decode(item["segmentation"]), scene.masks[k])
            x, y, width, height = item["bbox"]
            assert [x, y, x + width, y + height] == scene.boxes[k].tolist()
            assert item["area"] == scene.masks[k].sum()
    assert "CC BY-SA 4.0" in json.loads((scenes / "scenes.json").read_text())["attribution"]


def test_several_processes_write_the_same_bytes(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_CHUNK", 24)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 2)
    done: list[tuple[int, int]] = []
    assert write_scenes(tmp_path / "again", 48, 3, progress=lambda *at: done.append(at))
    assert done == [(24, 48), (48, 48)]
    assert fingerprint(tmp_path / "again") == fingerprint(scenes)


def test_more_pictures_begin_with_the_same_ones(tmp_path: Path, scenes: Path) -> None:
    write_scenes(tmp_path / "few", 5, 3)
    few, many = fingerprint(tmp_path / "few" / "images"), fingerprint(scenes / "images")
    assert few.items() <= many.items()


def test_a_finished_folder_is_reused(scenes: Path) -> None:
    before = fingerprint(scenes)
    assert not write_scenes(scenes, 48, 3)
    assert fingerprint(scenes) == before


@pytest.mark.parametrize("other", [(47, 3, "train"), (48, 4, "train"), (48, 3, "val")])
def test_other_scenes_are_not_overwritten(scenes: Path, other: tuple[int, int, Split]) -> None:
    before = fingerprint(scenes)
    with pytest.raises(UserError, match=r"holds other scenes \(split=train n=48 seed=3 .* asked"):
        write_scenes(scenes, *other)
    assert fingerprint(scenes) == before


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="found other files in it"):
        write_scenes(tmp_path, 2, 0)
    assert list(fingerprint(tmp_path)) == ["images/holiday.jpg"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="got a file"):
        write_scenes(tmp_path / "file", 2, 0)
    with pytest.raises(UserError, match="a folder that can be written"):
        write_scenes(tmp_path / "file" / "below", 2, 0)


@pytest.mark.parametrize("moment", ["painting", "tables"])
def test_an_interrupted_folder_is_not_finished_and_can_be_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "tables":
            patch.setattr(folders, "_write_tables", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(out, 5, 9, progress=interrupt if moment == "painting" else None)
    assert not (out / "scenes.json").exists()
    assert (out / ".unfinished").exists()
    # Also by a run that asks for something else: no picture of the first may stay.
    assert write_scenes(out, 3, 9)
    assert write_scenes(tmp_path / "straight", 3, 9)
    assert fingerprint(out) == fingerprint(tmp_path / "straight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, "train"), "n: expected 1 to 999999 pictures, got 0"),
        ((10_000_000, 0, "train"), "n: expected 1 to 999999 pictures"),
        ((1, -1, "train"), "seed: expected a number >= 0, got -1"),
        ((1, 0, "dev"), "split: expected train, val"),
        ((1, 0, "val", None, "cubist"), "style: expected plain, recoloured"),
    ],
)
def test_impossible_arguments_write_nothing(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_scenes(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


# --- the command


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--n", "2", "--seed", "5", "--split", "nouns"]
    assert command.main(arguments) == 0
    assert "2 nouns scenes in" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert command.main([*arguments[:-1], "val"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert command.main([*arguments, "--style", "blurred"]) == 2
    assert "style=plain" in capsys.readouterr().err
    styled = [*arguments, "--style", "blurred", "--out", str(tmp_path / "blurred")]
    assert command.main(styled) == 0
    assert "2 blurred nouns scenes in" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert command.main(["--out", str(tmp_path / "out"), "--n", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out" / "scenes.json").exists()
    assert command.main(["--out", str(tmp_path / "out"), "--n", "2"]) == 0


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        command.main(["--help"])
    assert "agevlm scenes --out" in capsys.readouterr().out
