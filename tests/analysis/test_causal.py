"""Models of which it is known what they see: the object, any hole, or nothing at all."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.analysis.blanking import WAYS, altered, elsewhere, parts, shifted
from agevlm_mlx.analysis.causal import causal
from agevlm_mlx.analysis.examples import Example
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.respondent import Request

COLOURS = {"dog": (255, 0, 0), "apple": (0, 0, 255), "ice": (0, 255, 0), "sky": (0, 255, 255)}
PLACES = {"dog": (slice(2, 6), slice(2, 7)), "apple": (slice(14, 18), slice(10, 19))}


def mask(noun: str) -> np.ndarray:
    pixels = np.zeros((20, 30), bool)
    pixels[PLACES[noun]] = True
    return pixels


def picture(path: Path, *nouns: str) -> Path:
    pixels = np.full((20, 30, 3), 90, np.uint8)
    for noun in nouns:
        pixels[PLACES[noun]] = COLOURS[noun]
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    def example(n: int, *nouns: str) -> Example:
        objects = {noun: (lambda noun=noun: mask(noun)) for noun in nouns}
        return Example(picture(tmp_path / f"{n}.png", *nouns), "", None, objects, ("ice", "sky"))

    return [example(0, "dog", "apple"), example(1, "dog"), example(2, "apple")]


def shows(pixels: np.ndarray, noun: str) -> bool:
    """Whether any pixel is of the noun's own colour."""
    return bool((pixels == COLOURS[noun]).all(-1).any())


class Seer:
    """Says yes with the probability `p(pixels, noun)`, and "A dog." with log p -0.1 or -2.1."""

    def __init__(self, p: Callable[[np.ndarray, str], float]) -> None:
        self.about: dict[str, Any] = {}
        self.p = p
        self.bad: set[str] = set()
        self.pixels: dict[Path, np.ndarray] = {}
        self.shown: list[int] = []

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        assert len(set(images)) == len(images)
        self.shown.append(len(images))
        bad = {image: f"{image.name}: bad" for image in images if image.name in self.bad}
        self.pixels = {i: np.asarray(Image.open(i)) for i in images if i not in bad}
        return bad

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        out = []
        for request, names in zip(requests, options, strict=True):
            assert tuple(names) == ("yes", "no")
            noun = next(noun for noun in COLOURS if f" {noun} " in request.prompt)
            p = self.p(self.pixels[request.image], noun)
            out.append((np.log(0.5 * p), np.log(0.5 * (1 - p))))  # half goes to other words
        return out

    def log_likelihood(
        self, requests: Sequence[Request], answers: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        out = []
        for request, (answer,) in zip(requests, answers, strict=True):
            noun = answer.removeprefix("An ").removeprefix("A ").removesuffix(".")
            out.append((-0.1 if shows(self.pixels[request.image], noun) else -2.1,))
        return out


def values(found: dict[str, Any], way: str) -> dict[str, float]:
    return {name: number["value"] for name, number in found[way].items()}


def test_who_answers_from_the_objects_pixels_has_the_whole_effect(examples: list[Example]):
    found = causal(Seer(lambda pixels, noun: 0.9 if shows(pixels, noun) else 0.1), examples)
    assert (found["images"], found["objects"]) == (3, 4)
    for way in WAYS:
        assert values(found["present"]["p_yes"], way) == pytest.approx(
            {
                "object": 0.1,
                "elsewhere": 0.9,
                "change_object": -0.8,
                "change_elsewhere": 0,
                "effect": -0.8,
            }
        )
        assert values(found["present"]["accuracy"], way) == {
            "object": 0,
            "elsewhere": 1,
            "change_object": -1,
            "change_elsewhere": 0,
            "effect": -1,
        }
        effect = found["present"]["log_p"][way]["effect"]
        assert effect["value"] == pytest.approx(-2)
        assert effect["interval"] == pytest.approx([-2, -2])
        assert effect["n"] == 4
        absent = values(found["absent"]["p_yes"], way)
        assert absent == pytest.approx(
            {"object": 0.1, "elsewhere": 0.1}
            | dict.fromkeys(("change_object", "change_elsewhere", "effect"), 0)
        )
        assert values(found["absent"]["accuracy"], way)["object"] == 1
    assert found["present"]["p_yes"]["before"]["value"] == pytest.approx(0.9)
    assert found["absent"]["accuracy"]["before"]["value"] == 1


def test_who_ignores_the_picture_has_no_effect(examples: list[Example]):
    found = causal(Seer(lambda pixels, noun: 0.6), examples)
    for kind, right in (("present", 1), ("absent", 0)):
        for way in WAYS:
            changes = values(found[kind]["p_yes"], way)
            assert changes["object"] == pytest.approx(0.6)
            assert [changes[k] for k in ("change_object", "change_elsewhere", "effect")] == [0] * 3
            assert found[kind]["p_yes"][way]["effect"]["interval"] == [0, 0]
        assert found[kind]["accuracy"]["before"]["value"] == right


def test_who_minds_any_hole_has_changes_but_no_effect(examples: list[Example]):
    """Without the control this model would pass for one that sees the object."""

    def p(pixels: np.ndarray, noun: str) -> float:
        whole = {90, *COLOURS["dog"]}
        return 0.9 if set(np.unique(pixels)) <= whole else 0.2

    found = causal(Seer(p), examples)
    changes = values(found["present"]["p_yes"], "mean colour")
    assert changes["change_object"] == changes["change_elsewhere"] == pytest.approx(-0.7)
    assert changes["effect"] == 0
    # For things that are not there the same model is right more often once there is a hole.
    assert values(found["absent"]["accuracy"], "mean colour")["change_object"] == 1


def test_rows_say_what_was_done_and_can_be_drawn(examples: list[Example]):
    found = causal(Seer(lambda pixels, noun: 0.9 if shows(pixels, noun) else 0.1), examples)
    assert [(Path(row["image"]).name, row["phrase"]) for row in found["rows"]] == [
        ("0.png", "dog"),
        ("0.png", "apple"),
        ("1.png", "dog"),
        ("2.png", "apple"),
    ]
    row = found["rows"][0]
    assert (row["absent"], row["area"]) == ("ice", 20 / 600)
    assert [row["absent"] for row in found["rows"]] == ["ice", "sky", "ice", "ice"]
    assert row["shifts"] != found["rows"][2]["shifts"]  # the same dog in another picture
    assert row["present"]["p_yes"]["blur"] == pytest.approx({"object": 0.1, "elsewhere": 0.9})
    control = shifted(mask("dog"), row["shifts"])
    assert control.sum() == 20
    assert not (control & mask("dog")).any()
    json.dumps(found, allow_nan=False)


def test_how_much_each_blanking_changes_is_told(tmp_path: Path):
    """20 of 600 pixels are red on grey 90; the mean colour is (96, 87, 87)."""
    dog = Example(picture(tmp_path / "a.png", "dog"), "", None, {"dog": lambda: mask("dog")}, ())
    found = causal(Seer(lambda pixels, noun: 0.5), [dog], boots=10)
    change = found["pixel_change"]["mean colour"]
    assert change["object"]["value"] == pytest.approx(20 / 600 * (159 + 87 + 87) / 3)
    assert change["elsewhere"]["value"] == pytest.approx(20 / 600 * (6 + 3 + 3) / 3)
    assert found["rows"][0]["pixel_change"]["mean colour"]["object"] == change["object"]["value"]


def test_batches_do_not_matter(examples: list[Example]):
    seen = lambda pixels, noun: 0.2 + 0.7 * shows(pixels, noun) * pixels.mean() / 255  # noqa: E731
    told: list[tuple[str, int, int]] = []
    small, large = Seer(seen), Seer(seen)
    one = causal(small, examples, batch_size=1, progress=lambda *step: told.append(step))
    assert one == causal(large, examples, batch_size=64)
    # A picture, and two ways and two places for each object
    assert (small.shown, large.shown) == ([9, 5, 5], [19])
    assert [step[1:] for step in told] == [(1, 3), (2, 3), (3, 3)]
    other = causal(Seer(seen), examples, seed=1)
    assert [r["shifts"] for r in other["rows"]] != [r["shifts"] for r in one["rows"]]


def test_what_cannot_be_tested_is_counted_and_named(tmp_path: Path):
    def broken() -> np.ndarray:
        raise UserError("mask: damaged")

    objects = {
        "dog": lambda: mask("dog"),
        "wall": lambda: np.ones((20, 30), bool),
        "cat": lambda: np.zeros((20, 30), bool),
        "bus": lambda: np.ones((30, 20), bool),
        "car": broken,
    }
    (tmp_path / "bad.png").write_bytes(b"no picture")
    examples = [
        Example(picture(tmp_path / "odd.png", "dog"), "", None, objects, ()),
        Example(tmp_path / "bad.png", "", None, {"dog": lambda: mask("dog")}, ()),
        Example(picture(tmp_path / "long.png"), "", None, {"dog": lambda: mask("dog")}, ()),
    ]
    model = Seer(lambda pixels, noun: 0.5)
    model.bad = {"long.png"}
    found = causal(model, examples)
    assert (found["images"], found["objects"]) == (1, 1)
    assert found["skipped"] == {"no room": 1, "unusable mask": 3}
    assert "expected a mask of 30x20 px" in found["problems"][0]
    assert "got 20x30 px" in found["problems"][1]
    assert found["problems"][2].endswith("odd.png: car: mask: damaged")
    assert "bad.png: not an image" in found["problems"][3]
    assert found["problems"][4] == "long.png: bad"
    assert found["absent"] == {}
    assert found["rows"][0]["absent"] is None


def test_nothing_to_test_is_no_error():
    found = causal(Seer(lambda pixels, noun: 0.5), [])
    assert (found["images"], found["objects"], found["rows"]) == (0, 0, [])
    assert found["present"]["p_yes"]["before"]["value"] is None


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_control_is_the_same_shape_and_does_not_touch(seed: int):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 16, 2)
    area = np.zeros((height, width), bool)
    top, left = (rng.integers(0, n - 2) for n in (height, width))
    area[top : top + 4, left : left + 3] = rng.random((4, 3))[: height - top, : width - left] < 0.6
    if not area.any():
        return
    shifts = elsewhere(area, rng)
    rows, columns = np.nonzero(area)
    near = np.zeros_like(area)
    for r, c in zip(rows, columns, strict=True):
        near[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2] = True
    room = [
        (dr, dc)
        for dr in range(-rows.min(), height - rows.max())
        for dc in range(-columns.min(), width - columns.max())
        if not near[rows + dr, columns + dc].any()
    ]
    if room:
        assert shifts is not None
        assert len(shifts) == 1
        assert shifts[0] in room
    if shifts is not None:
        control = shifted(area, shifts)
        assert control.sum() == area.sum()
        assert not (control & near).any()


def test_several_things_in_several_corners_are_moved_each_for_itself():
    area = np.zeros((40, 50), bool)
    area[:8, :9] = area[32:, 43:] = True
    area[39, 0] = True
    area[38, 1] = True  # connected at a corner
    found = parts(area)
    assert [int(part.sum()) for part in found] == [72, 56, 2]
    assert (np.sum(found, 0) == area).all()
    shifts = elsewhere(area, np.random.default_rng(0))
    assert shifts is not None
    assert len(shifts) == 3  # as one shape it would lie on itself wherever it is
    control = shifted(area, shifts)
    assert control.sum() == area.sum()
    touching = np.zeros_like(area)
    touching[:9, :10] = touching[31:, 42:] = touching[37:, :3] = True
    assert not (control & touching).any()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_parts_are_connected_and_apart(seed: int):
    rng = np.random.default_rng(seed)
    area = rng.random((9, 11)) < 0.4
    found = parts(area)
    assert (
        (np.sum([part.astype(int) for part in found], 0) == area).all() if found else not area.any()
    )
    for n, part in enumerate(found):
        reached = np.zeros_like(part)
        reached[tuple(np.argwhere(part)[0])] = True
        while True:  # grow by a pixel in every direction, inside the whole area
            grown = reached.copy()
            for down, right in itertools.product((-1, 0, 1), repeat=2):
                grown |= np.roll(np.pad(reached, 1), (down, right), (0, 1))[1:-1, 1:-1]
            grown &= area
            if (grown == reached).all():
                break
            reached = grown
        assert (reached == part).all(), n


def test_blanking_changes_the_area_alone_and_leaves_no_trace_of_it():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 30, 3), np.uint8)
    area = mask("apple")
    grey = altered(pixels, area, "mean colour")
    assert (grey[area] == pixels.mean((0, 1)).round()).all()
    blurred = altered(pixels, area, "blur")
    for after in (grey, blurred):
        assert (after[~area] == pixels[~area]).all()
        assert after.dtype == np.uint8
    assert blurred[area].std() < pixels[area].std() / 5
