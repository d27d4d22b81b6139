"""Looks of which every number is known: at the mask, everywhere, at one token, at the other."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agevlm_mlx.analysis.estimates import Estimates
from agevlm_mlx.analysis.examples import Example
from agevlm_mlx.analysis.looking import looking
from agevlm_mlx.data.image import Geometry
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.respondent import Looked, Request

#: A picture of 4 x 4 px whose pixels are the input's and the cells.
SQUARE = Geometry(4, 4, 4, 1, 1, 0, 0)
Look = Callable[[Path, str], np.ndarray]


class Looker:
    """Looks as `look(image, phrase)` f[L N Gh Gw] says; the null slot gets what is missing."""

    def __init__(self, look: Look, null: bool = True, **about: Any) -> None:
        self.about, self.chosen, self.null = about, look, null
        self.bad: dict[Path, str] = {}
        self.shown: list[Path] = []
        self.largest = 0

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        self.shown, self.largest = list(images), max(self.largest, len(images))
        return {image: self.bad[image] for image in images if image in self.bad}

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        out: list[Looked | None] = []
        for request, phrase in zip(requests, phrases, strict=True):
            assert request.image in self.shown
            assert request.image not in self.bad
            assert request.prompt in (
                f"Is there a {phrase} in the image?",
                f"Is there an {phrase} in the image?",
            )
            attention = self.chosen(request.image, phrase).astype(np.float32)
            null = 1 - attention.sum((2, 3)) if self.null else None
            out.append(Looked(attention, null, SQUARE))
        return out


def box(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((4, 4), bool)
    mask[rows, columns] = True
    return mask


#: Two cells at the top left, four at the bottom right.
MASKS = {"dog": box(slice(0, 1), slice(0, 2)), "apple": box(slice(2, 4), slice(2, 4))}


def example(name: str, *phrases: str) -> Example:
    objects = {p: (lambda p=p: MASKS[p]) for p in phrases or MASKS}
    return Example(Path(name), "", None, objects, ())


def at(phrase: str, share: float = 1.0) -> np.ndarray:
    """f[Gh Gw]: all of `share` evenly in the phrase's mask."""
    return share * MASKS[phrase] / MASKS[phrase].sum()


def other(phrase: str) -> str:
    return "apple" if phrase == "dog" else "dog"


EXAMPLES = [example(f"{n}.png") for n in range(5)]


def value(found: dict[str, Any], name: str) -> float:
    return found["measures"][name]["value"]


def test_who_looks_at_the_mask_has_every_number_right():
    model = Looker(lambda image, phrase: at(phrase, 0.8)[None, None])
    found = looking(model, EXAMPLES)
    assert (found["images"], found["phrases"], found["layers"], found["heads"]) == (5, 10, [0], 1)
    exact = {"energy": 1, "hit": 1, "auroc": 1, "iou_half": 1, "best_iou": 1, "specificity": 1}
    # The mask is 2 and 4 cells of 16: the strongest holds 1/2 and 1/4
    exact |= {"on_image": 0.8, "null": 0.2, "in_mask": 0.8, "sink": 3 / 8}
    # ln 2 and ln 4 over ln 16; energy 1 over even attention's mean of 2/16 and 4/16
    exact |= {"entropy": (1 / 4 + 1 / 2) / 2, "gain": 1 / (3 / 16)}
    for name, expected in exact.items():
        number = found["measures"][name]
        assert number["value"] == pytest.approx(expected, abs=1e-6), name
        assert number["interval"] == pytest.approx([expected] * 2, abs=1e-6), name  # all the same
        assert number["n"] == 10
        if name != "best_iou":
            assert number["by_head"][0] == pytest.approx([expected], abs=1e-6), name
            assert number["by_layer"] == pytest.approx([expected], abs=1e-6), name
    energy = found["measures"]["energy"]["baselines"]
    known = {"uniform": 3 / 16, "shuffled": 0, "image_only": 0.5}
    for name, expected in known.items():
        assert energy[name]["value"] == pytest.approx(expected), name
        assert energy[name]["ahead"]["value"] == pytest.approx(1 - expected), name
    dog, apple = (row["baselines"]["image_only"]["energy"] for row in found["rows"][:2])
    assert (dog, apple) == pytest.approx((0.5, 0.5))
    assert [row["in_mask"] for row in found["rows"][:2]] == pytest.approx([0.8, 0.8])
    gain = found["measures"]["gain"]["baselines"]
    assert gain["uniform"]["value"] == pytest.approx(1)
    assert gain["image_only"]["ahead"]["value"] == pytest.approx(0.5 * 16 / 3)
    hit = found["measures"]["hit"]["baselines"]
    # A random point; the middle of the picture is the first pixel of the apple.
    assert [hit[k]["value"] for k in ("uniform", "centre", "shuffled")] == [3 / 16, 0.5, 0]
    assert hit["image_only"]["value"] == 0.5  # the dog has the stronger cells
    auroc = found["measures"]["auroc"]["baselines"]
    assert auroc["uniform"]["value"] == 0.5
    # The dog's 2 empty cells tie with 10 of 14 others, the apple's 4 with 10 of 12
    assert auroc["shuffled"]["value"] == pytest.approx((5 / 14 + 5 / 12) / 2)
    iou = found["measures"]["iou_half"]["baselines"]
    assert (iou["uniform"]["value"], iou["shuffled"]["value"]) == (3 / 16, 0)
    best = found["measures"]["hit"]["best_head"]
    assert (best["layer"], best["head"], best["chosen"], best["value"]) == (0, 0, 1, 1)
    assert best["n"] == 6  # two images chose, three scored


def test_who_looks_everywhere_gains_nothing():
    found = looking(Looker(lambda image, phrase: np.full((2, 3, 4, 4), 0.5 / 16)), EXAMPLES)
    assert value(found, "gain") == pytest.approx(1)
    assert value(found, "auroc") == 0.5
    assert value(found, "specificity") == 0
    assert value(found, "entropy") == pytest.approx(1)
    assert value(found, "sink") == pytest.approx(1 / 16)
    for baseline in ("uniform", "shuffled", "image_only"):
        ahead = found["measures"]["energy"]["baselines"][baseline]["ahead"]
        assert ahead["value"] == pytest.approx(0, abs=1e-7), baseline
        assert ahead["interval"] == pytest.approx([0, 0], abs=1e-7)
    assert np.shape(found["measures"]["energy"]["by_head"]) == (2, 3)


def test_who_always_looks_at_one_token_is_found_out():
    sink = np.zeros((1, 2, 4, 4))
    sink[:, :, 3, 3] = 0.9  # inside the apple: one of two phrases is even hit

    def look(image: Path, phrase: str) -> np.ndarray:
        maps = sink.copy()
        maps[0, 0] = at(phrase, 0.9)  # but the first head does look
        return maps

    found = looking(Looker(look), EXAMPLES)
    sinks = found["sinks"]
    assert sinks["by_head"]["cell"][0][1] == [3, 3]
    assert sinks["by_head"]["share"][0] == pytest.approx([0.5 / 2, 1])
    assert sinks["by_head"]["often"][0] == [0.5, 1]
    assert sinks["even"] == 1 / 16
    # Both heads together: (1 + (0 and 1/4)) / 2 at the sink, the strongest cell of most maps
    assert (sinks["cell"], sinks["often"]) == ([3, 3], 1)
    assert sinks["share"] == pytest.approx((0.5 + 0.625) / 2)
    heads = found["measures"]
    assert heads["specificity"]["by_head"][0] == pytest.approx([1, 0])
    assert heads["hit"]["by_head"][0] == [1, 0.5]
    assert heads["energy"]["best_head"]["head"] == 0


def test_who_looks_at_the_other_thing_is_worse_than_shuffled():
    found = looking(Looker(lambda image, phrase: at(other(phrase))[None, None]), EXAMPLES)
    assert value(found, "specificity") == pytest.approx(-1)
    shuffled = found["measures"]["hit"]["baselines"]["shuffled"]
    assert (value(found, "hit"), shuffled["value"], shuffled["ahead"]["value"]) == (0, 1, -1)


def test_layers_and_heads_are_not_exchanged():
    def look(image: Path, phrase: str) -> np.ndarray:
        maps = np.zeros((2, 3, 4, 4))
        maps[:] = at(other(phrase))
        maps[1, 0] = at(phrase, 0.5)
        return maps

    found = looking(Looker(look, looking_layers=[4, 9]), EXAMPLES)
    assert found["layers"] == [4, 9]
    assert found["measures"]["energy"]["by_head"] == [[0, 0, 0], [1, 0, 0]]
    # A layer's mean map: .5 of 2.5 is inside; of all maps .5 of 5.5
    assert found["measures"]["energy"]["by_layer"] == pytest.approx([0, 0.2])
    assert value(found, "energy") == pytest.approx(0.5 / 5.5)
    assert found["measures"]["null"]["by_head"] == [[0, 0, 0], [0.5, 0, 0]]
    best = found["measures"]["energy"]["best_head"]
    assert (best["layer"], best["head"], best["value"]) == (1, 0, 1)


def test_the_best_head_is_scored_on_images_that_did_not_choose_it():
    """A head that is right on exactly the images that choose, and wrong on the others."""
    order = np.random.default_rng(0).permutation(6)
    lucky = {f"{n}.png" for n in order[:3]}

    def look(image: Path, phrase: str) -> np.ndarray:
        first = at(phrase) if image.name in lucky else at(other(phrase))
        return np.stack([first, at(phrase) * 0.9 + at(other(phrase)) * 0.1])[None]

    best = looking(Looker(look), [example(f"{n}.png") for n in range(6)])["measures"]["energy"]
    assert best["by_head"][0] == pytest.approx([0.5, 0.9])
    assert best["best_head"]["head"] == 0
    assert (best["best_head"]["chosen"], best["best_head"]["value"]) == pytest.approx((1, 0))


def test_one_phrase_has_no_other():
    found = looking(
        Looker(lambda image, phrase: at("dog")[None, None]),
        [example("a.png", "dog"), example("b.png")],
    )
    assert found["measures"]["energy"]["n"] == 3
    assert found["measures"]["specificity"]["n"] == 2
    assert value(found, "specificity") == 0
    shuffled = found["measures"]["energy"]["baselines"]["shuffled"]
    assert (shuffled["n"], shuffled["ahead"]["n"]) == (2, 2)
    # Only on b.png: own 1 and 0, the other's map the same
    assert (shuffled["value"], shuffled["ahead"]["value"]) == (0.5, 0)
    # Each alone: both phrases' maps are on the dog, so none of them is specific
    assert [row["specificity"] for row in found["rows"]] == [None, 0, 0]
    alone = looking(Looker(lambda image, phrase: at("dog")[None, None]), [example("a.png", "dog")])
    assert alone["measures"]["specificity"]["value"] is None
    assert alone["measures"]["hit"]["best_head"] is None  # one image has no two halves


def test_batches_do_not_matter_and_progress_is_told():
    def look(image: Path, phrase: str) -> np.ndarray:
        return np.random.default_rng([ord(image.name[0]), len(phrase)]).random((2, 2, 4, 4)) / 20

    told: list[tuple[str, int, int]] = []
    model = Looker(look, null=False)
    small = looking(model, EXAMPLES, batch_size=2, progress=lambda *step: told.append(step))
    assert model.largest == 2
    assert [step[1:] for step in told] == [(2, 5), (4, 5), (5, 5)]
    assert small == looking(Looker(look, null=False), EXAMPLES, batch_size=64)
    assert "null" not in small["measures"]
    low, high = small["measures"]["energy"]["interval"]
    assert low < value(small, "energy") < high
    rows = small["rows"]
    assert value(small, "energy") == pytest.approx(np.mean([r["energy"] for r in rows]))
    assert value(small, "gain") == pytest.approx(
        sum(r["energy"] for r in rows) / sum(r["uniform"] for r in rows)
    )
    json.dumps(small, allow_nan=False)


def test_maps_of_the_first_images_are_kept():
    found = looking(Looker(lambda image, phrase: at(phrase, 0.8)[None, None]), EXAMPLES, keep=2)
    assert [k["image"] for k in found["kept"]] == ["0.png", "0.png", "1.png", "1.png"]
    last = found["kept"][3]
    assert found["rows"][last["number"]]["phrase"] == last["phrase"] == "apple"
    assert last["question"] == "Is there an apple in the image?"
    assert np.array(last["map"]) == pytest.approx(at("apple", 0.8))
    assert Geometry(**last["geometry"]) == SQUARE


def test_what_cannot_be_measured_is_counted_and_named():
    def broken() -> np.ndarray:
        raise UserError("mask: damaged")

    objects = {
        "dog": lambda: MASKS["dog"],
        "cat": lambda: np.zeros((4, 4), bool),
        "bus": lambda: np.ones((5, 4), bool),
        "car": broken,
    }
    odd = Example(Path("odd.png"), "", None, objects, ())
    model = Looker(lambda image, phrase: at("dog")[None, None])
    model.bad = {Path("bad.png"): "bad.png: damaged"}
    found = looking(model, [example("bad.png"), odd, example("c.png")])
    assert (found["images"], found["phrases"]) == (2, 3)
    assert found["skipped"] == {"out of view": 0, "unusable mask": 3}
    assert found["problems"][0] == "bad.png: damaged"
    assert found["problems"][1].startswith("odd.png: cat: expected a mask with something in it")
    assert found["problems"][2].startswith("odd.png: bus: expected a mask of 4x4 px")
    assert found["problems"][3] == "odd.png: car: mask: damaged"


def test_a_model_that_shows_no_attention_has_no_numbers():
    class Blind(Looker):
        def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
            return [None] * len(requests)

    found = looking(Blind(lambda image, phrase: at(phrase)), EXAMPLES)
    assert (found["images"], found["phrases"], found["layers"], found["heads"]) == (0, 0, [], 0)
    assert (found["measures"], found["sinks"], found["rows"], found["kept"]) == ({}, None, [], [])


def test_no_attention_on_the_image_is_no_sink():
    found = looking(Looker(lambda image, phrase: np.zeros((1, 1, 4, 4))), EXAMPLES)
    assert [value(found, n) for n in ("on_image", "null", "in_mask", "energy")] == [0, 1, 0, 0]
    assert (found["sinks"]["share"], found["sinks"]["often"]) == (0, 0)


def test_grids_that_differ_have_no_common_sink():
    def look(image: Path, phrase: str) -> np.ndarray:
        return np.ones((1, 1, 4, 4 if image.name == "0.png" else 2)) / 32

    found = looking(Looker(look), EXAMPLES)
    assert found["sinks"] is None
    assert value(found, "gain") == pytest.approx(1)


def test_an_estimate_draws_images_and_pairs_what_it_compares():
    estimates = Estimates(3)
    mean = estimates.mean([0, 0, 2], [1, 0, 1])
    assert (mean["value"], mean["n"]) == (pytest.approx(2 / 3), 3)
    assert mean["interval"] == [0.5, 1]  # only image 0, or only image 2
    ratio = estimates.ratio([0, 1], [1, 1], [1, 3])
    assert (ratio["value"], ratio["interval"]) == (0.5, pytest.approx([1 / 3, 1]))
    ahead = estimates.ahead([0, 1, 2], [0.1, 0.5, 0.9], [0.0, 0.4, 0.8])
    assert ahead["value"] == pytest.approx(0.1)
    assert ahead["interval"] == pytest.approx([0.1, 0.1])  # though the values differ much
    assert estimates.mean([], []) == {"value": None, "interval": None, "n": 0}
    assert Estimates(0).mean([], [])["value"] is None
