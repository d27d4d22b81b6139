"""Pictures of a training run: what they show, and that nothing about them can end the run."""

import builtins
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import watch, weights
from agevlm_mlx.curves import Curve, draw_curves, read_curves
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.look_sheet import Look, inside, sheet, strip, tile
from agevlm_mlx.sam.targets import rle_encode
from agevlm_mlx.training.rules import named_parameters
from agevlm_mlx.training.stages import AttentionLoss, Losses
from agevlm_mlx.watch import Pictures


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 8, 3, "val")
    return folder


@pytest.fixture(scope="module")
def shipped() -> Any:
    return weights.load(None)


def recipe(heads: int | None = 2) -> Any:
    def stage(weight: float, heads: int | None) -> Any:
        losses = Losses(attention=AttentionLoss(weight=weight, heads=heads))
        return SimpleNamespace(losses=losses)

    return SimpleNamespace(
        stages=[stage(0.0, None), stage(0.3, heads)], steps=1500, train=SimpleNamespace(clip=1.0)
    )


def job_of(shipped: Any, records: Records, **changes: Any) -> Any:
    told = {"recipe": recipe(), "records": records, "store": None, "val_records": records}
    told |= {"val_store": None, "model": shipped.model, "tokenizer": shipped.tokenizer}
    return SimpleNamespace(**told | {"preprocessor": shipped.preprocessor} | changes)


@pytest.fixture
def pictures(
    tmp_path: Path, shipped: Any, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> Pictures:
    """Two pictures of a run without metrics, which takes half a second less to draw."""
    monkeypatch.setattr(watch, "LOOKS", 2)
    said: list[str] = []
    made = Pictures(tmp_path / "run", job_of(shipped, read_records(scenes)), said.append)
    made.said = said
    made.run.mkdir()
    return made


def write_metrics(made: Pictures) -> None:
    rows = [{"step": n, "stage": "guide", "lm": 3 / n, "norm": 1.0, "lr": 1e-3} for n in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "val_lm": 1.0}])
    (made.run / "metrics.jsonl").write_text(text)


def test_a_run_gets_curves_looks_and_a_strip(pictures: Pictures, shipped: Any):
    write_metrics(pictures)
    for step in (0, 1000):
        pictures.look(step, shipped.model)
    pictures.close()
    names = {path.name for path in pictures.folder.iterdir()}
    assert names == {
        "curves.png", "looks-0.png", "looks-1000.png", "looks.png",
        "looks-over-time.png", "looks.npz",
    }  # fmt: skip
    newest = (pictures.folder / "looks.png").read_bytes()
    assert newest == (pictures.folder / "looks-1000.png").read_bytes()
    assert pictures.said == []
    for name in names - {"looks.npz"}:
        with Image.open(pictures.folder / name) as image:
            image.load()
            assert image.width > 400


def test_the_looks_are_the_first_guided_pictures_with_their_first_phrase(
    pictures: Pictures, scenes: Path
):
    first: dict[Path, str] = {}
    for record in read_records(scenes):
        if record.phrases:
            first.setdefault(record.image, record.phrases[0].text)
    assert [look.phrase for look in pictures.looks] == list(first.values())[:2]


def test_a_map_is_what_the_model_gives_for_that_text_alone(pictures: Pictures, shipped: Any):
    model = shipped.model
    maps = pictures._maps(model)
    assert maps.shape == (2, *model.grid)
    for look, found in zip(pictures.looks, maps, strict=True):
        seen = model.look(model.project(model.encode(mx.array(look.pixels[None]))))
        rows = mx.zeros(len(look.columns), mx.int32)
        ids = mx.array([look.ids])
        attn = model.attend(ids, model.share(seen, 1), rows, mx.array(look.columns), 2)[1]
        wanted = np.array(attn.mean(axis=(0, 1, 2))).reshape(model.grid)
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_shipped_model_looks_inside_the_outlines(pictures: Pictures, shipped: Any):
    watch.LOOKS = 6
    maps = pictures._maps(shipped.model)
    shares = [float(inside(*pair).rstrip("%")) for pair in zip(pictures.looks, maps, strict=True)]
    assert np.mean(shares) > 30
    turned = [
        float(inside(look, m[::-1, ::-1]).rstrip("%"))
        for look, m in zip(pictures.looks, maps, strict=True)
    ]
    assert np.mean(turned) < np.mean(shares) / 2


def test_looking_changes_nothing_in_the_model(pictures: Pictures, shipped: Any):
    model = shipped.model
    model.train()
    before = named_parameters(model, trainable=True)
    pictures.look(1, model)
    assert model.training
    assert all(m.training for m in model.modules())
    after = named_parameters(model, trainable=True)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    model.eval()


def test_a_resumed_run_keeps_the_earlier_looks_and_forgets_the_undone_ones(
    pictures: Pictures, shipped: Any
):
    for step in (0, 40, 80):
        pictures.look(step, shipped.model)
    again = Pictures(pictures.run, pictures.job, pictures.said.append)
    again.look(60, shipped.model)
    assert list(again._load()) == [0, 40, 60]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N."])
def test_damaged_maps_are_forgotten(pictures: Pictures, shipped: Any, content: bytes):
    pictures.folder.mkdir()
    (pictures.folder / "looks.npz").write_bytes(content)
    pictures.look(7, shipped.model)
    assert list(pictures._load()) == [7]
    assert pictures.said == []


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_the_maps_is_unpickled(pictures: Pictures, shipped: Any, tmp_path: Path):
    pictures.folder.mkdir()
    steps = np.array([Evil(tmp_path / "evil")], object)
    np.savez(pictures.folder / "looks.npz", steps=steps, maps=np.zeros((1, 2, 8, 8)))
    assert pictures._load() == {}
    assert not (tmp_path / "evil").exists()


def test_without_matplotlib_the_looks_are_drawn_and_one_line_says_what_to_do(
    pictures: Pictures, shipped: Any, monkeypatch: pytest.MonkeyPatch
):
    there = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    write_metrics(pictures)
    pictures.look(3, shipped.model)
    pictures.look(4, shipped.model)
    line = "no curves: matplotlib is missing: pip install 'agevlm-mlx[analyze]'"
    assert pictures.said == [line]
    assert (pictures.folder / "looks-4.png").exists()
    assert not (pictures.folder / "curves.png").exists()


def test_what_cannot_be_drawn_is_said_once_and_ends_nothing(
    pictures: Pictures,
):
    class Broken:
        training = True

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"[metal] no\nmemory for {name}")

    write_metrics(pictures)
    pictures.look(3, Broken())
    pictures.look(4, Broken())
    assert pictures.said == ["no pictures of the attention: [metal] no memory for eval"]
    assert (pictures.folder / "curves.png").exists()


def test_a_full_disk_ends_nothing(pictures: Pictures, shipped: Any):
    pictures.folder.write_bytes(b"")  # where the folder should be
    pictures.look(3, shipped.model)
    assert len(pictures.said) == 2
    assert all("File exists" in line for line in pictures.said)


def test_attention_that_is_not_finite_is_said(pictures: Pictures, shipped: Any):
    class Model:
        def __getattr__(self, name: str) -> Any:
            return getattr(shipped.model, name)

        def attend(self, *args: Any) -> Any:
            logits, maps = shipped.model.attend(*args)
            return logits, maps * float("nan")

    pictures.look(3, Model())
    assert pictures.said == ["no pictures of the attention: the model's attention is not finite"]


def test_without_phrases_one_line_says_so(tmp_path: Path, shipped: Any, scenes: Path):
    bare = [Record(r.id, r.image, r.turns) for r in read_records(scenes)]
    said: list[str] = []
    job = job_of(shipped, Records.from_list(bare, scenes))
    Pictures(tmp_path, job, said.append).look(1, shipped.model)
    assert said == [
        "no pictures of the attention: no validation record has a phrase; give phrases in data.val"
    ]


# --- what is outlined --------------------------------------------------------------------------


class Store:
    """Labels of which `coverage` is the only one."""

    def __init__(self, coverage: np.ndarray | None):
        self.coverage = coverage

    def target(self, image_key: str, prompt: str) -> np.ndarray:
        assert image_key == "wide.png"
        if self.coverage is None:
            raise KeyError(prompt)
        return self.coverage


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A picture of 120 x 60: shown at 288 x 144, padded above and below for the model."""
    path = tmp_path / "wide.png"
    Image.new("RGB", (120, 60), (90, 90, 90)).save(path)
    return path


def outline_of(wide: Path, shipped: Any, store: Any = None, **phrase: Any) -> Look | None:
    said = Phrase("dog", 0, 11, 14, **phrase)
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "Yes"))
    records = Records.from_list([Record("1", wide, turns, (said,))], wide.parent)
    looks = Pictures(wide.parent, job_of(shipped, records, val_store=store)).looks
    return looks[0] if looks else None


def span(outline: np.ndarray) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 of what is above one half."""
    ys, xs = np.nonzero(outline > 0.5)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_a_box_is_outlined_where_it_is(wide: Path, shipped: Any):
    look = outline_of(wide, shipped, box=(60, 0, 120, 30))
    np.testing.assert_allclose(span(look.outline), (144, 0, 288, 72), atol=1)
    grid = look.target.reshape(shipped.model.grid)  # 8 x 8, of which rows 2 to 5 are picture
    assert grid[2:4, 4:].min() == 1
    assert grid.sum() == grid[2:4, 4:].sum()


def test_a_mask_counts_more_than_its_box(wide: Path, shipped: Any):
    mask = np.zeros((60, 120), bool)
    mask[30:, :60] = True
    look = outline_of(wide, shipped, box=(0, 0, 120, 60), mask=rle_encode(mask))
    np.testing.assert_allclose(span(look.outline), (0, 72, 144, 144), atol=1)


def test_the_teacher_s_mask_counts_most(wide: Path, shipped: Any):
    coverage = np.zeros((8, 8), np.float32)
    coverage[2:6, 6:] = 0.8
    store = Store(coverage.reshape(-1))
    look = outline_of(wide, shipped, store, box=(0, 0, 120, 60))
    np.testing.assert_allclose(span(look.outline), (198, 0, 288, 144), atol=20)
    assert look.target.max() == 1
    other = outline_of(wide, shipped, Store(None), box=(60, 0, 120, 30))
    np.testing.assert_allclose(span(other.outline), (144, 0, 288, 72), atol=1)


def test_a_point_without_a_teacher_has_no_outline(wide: Path, shipped: Any):
    look = outline_of(wide, shipped, point=(10, 10))
    assert look.outline is None
    assert inside(look, np.ones((8, 8))) == ""
    page = sheet([look], np.full((1, 8, 8), 0.01), "title")
    assert page.width > 500


def test_words_that_nothing_is_known_about_are_passed_over(wide: Path, shipped: Any):
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "Yes, a cat."))
    phrases = (Phrase("dog", 0, 11, 14), Phrase("cat", 1, 7, 10, box=(0, 0, 60, 30)))
    records = Records.from_list([Record("1", wide, turns, phrases)], wide.parent)
    looks = Pictures(wide.parent, job_of(shipped, records)).looks
    assert [look.phrase for look in looks] == ["cat"]


def test_a_picture_that_cannot_be_read_is_not_watched(wide: Path, shipped: Any):
    wide.write_bytes(b"no picture")
    assert outline_of(wide, shipped, box=(0, 0, 9, 9)) is None


def test_the_line_is_drawn_on_the_outline(wide: Path, shipped: Any):
    look = outline_of(wide, shipped, box=(30, 15, 90, 45))
    attn_map = np.full((8, 8), 1 / 64)
    drawn = np.asarray(tile(look, attn_map), int)
    bare = np.asarray(tile(replace(look, outline=None), attn_map), int)
    ys, xs = np.nonzero(np.abs(drawn - bare).sum(-1))
    assert (drawn[72 - 36, 100:180] > 180).all()  # the upper edge, in white
    assert np.minimum(np.abs(xs - 72), np.abs(xs - 216)).max() < 80
    assert ((np.abs(xs - 144) > 66) | (np.abs(ys - 72) > 30)).all()  # nothing in the middle


def test_the_strip_has_a_column_a_step(pictures: Pictures, shipped: Any):
    maps = pictures._maps(shipped.model)
    narrow = strip(pictures.looks, {0: maps, 500: maps})
    wide = strip(pictures.looks, {step: maps for step in range(6)})
    assert wide.width - narrow.width > 400
    assert wide.height == narrow.height


def test_more_steps_than_fit_are_spread_evenly():
    assert watch._spread(9, 6) == [0, 2, 3, 5, 6, 8]
    assert watch._spread(2, 6) == [0, 1]
    assert watch._spread(1, 6) == [0]


# --- curves ------------------------------------------------------------------------------------


def test_a_curve_takes_little_memory_and_keeps_means_and_extremes():
    curve = Curve(most=100)
    values = np.sin(np.arange(10_000) / 500)
    values[1234] = 50.0
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    steps, mean, low, high = curve.points()
    assert 50 < len(steps) <= 101
    width = curve.width
    assert width == 128
    np.testing.assert_allclose(mean[0], values[:width].mean())
    np.testing.assert_allclose(steps[0], (1 + width) / 2)
    assert high.max() == 50
    assert low.min() == values.min()


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_curves_are_read_with_stages_gaps_and_skipped_steps(tmp_path: Path):
    metrics = rows(
        tmp_path / "m",
        {"step": 1, "stage": "align", "lm": 4.0, "lr": 0.1},
        {"step": 2, "stage": "align", "skipped": 1.0, "lr": 0.1},
        {"step": 3, "stage": "guide", "lm": 2.0, "attention": None, "lr": 0.2, "new": True},
        {"step": 3, "stage": "guide", "val_lm": 3.0, "val_pointing": None},
    )
    read = read_curves(metrics)
    assert read.stages == {"align": 1, "guide": 3}
    assert read.skipped == [2]
    assert set(read.curves) == {"lm", "lr", "val_lm", "skipped"}
    np.testing.assert_array_equal(read.curves["lm"].points()[0], [1, 3])


@pytest.mark.parametrize("count", [1, 2, 3, 2000])
def test_curves_of_any_length_are_drawn(tmp_path: Path, count: int):
    made = [
        {"step": n, "stage": "a $x$" if n < 3 else "b", "lm": 1 / n, "norm": 0.0 if n == 2 else 9.0,
         "attention": 0.0, "lr": 0.0, "seconds": 1.0, "waited": 0.1}
        for n in range(1, count + 1)
    ]  # fmt: skip
    metrics = rows(tmp_path / "m", *made, {"step": count, "val_lm": 2.0, "val_pointing": 0.5})
    draw_curves(metrics, tmp_path / "c.png", "my $run$_1", 1.0)
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
        assert image.width == 1296
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_without_numbers_no_picture(tmp_path: Path):
    draw_curves(rows(tmp_path / "m", {"step": 1}), tmp_path / "c.png", "run")
    assert not (tmp_path / "c.png").exists()


def test_the_preprocessor_of_the_shipped_model_pads(shipped: Any):
    assert isinstance(shipped.preprocessor, Preprocessor)
    assert shipped.preprocessor.resize == "pad"  # what the tests above count on
