"""RefCOCO: pickles that are not trusted, both published forms, and scores worked out by hand."""

import io
import json
import os
import pickle
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.benchmarks import refcoco
from agevlm_mlx.benchmarks.coco_tables import read_table
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.pickled import read_pickle
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import pointing
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source
from agevlm_mlx.sam.targets import rle_encode

WIDTH, HEIGHT = 32, 24


def file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def box(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    """The outline of pixels x0..x1, y0..y1."""
    return [float(v) for v in (x0, y0, x1 + 1, y0, x1 + 1, y1 + 1, x0, y1 + 1)]


def ref(number: int, image: int, ann: int, split: str, *said: str) -> dict[str, Any]:
    return {
        "sent_ids": list(range(len(said))),
        "file_name": f"COCO_train2014_{image:012d}_{ann}.jpg",
        "ann_id": ann,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": n, "sent": text}
            for n, text in enumerate(said)
        ],
        "category_id": 1,
    }


REFS = [
    ref(0, 1, 11, "train", "never asked"),
    ref(1, 1, 11, "val", "the left man", "man in  blue."),
    ref(2, 2, 21, "testA", "dog"),
    ref(3, 2, 22, "testB", "A big umbrella"),
]


def segmentations() -> dict[int, Any]:
    """Annotation -> outline: one polygon, two of them, RLE; 99 is asked about by nobody."""
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[4:8, 4:8] = True
    return {
        11: [box(0, 0, 7, 7)],
        21: [box(0, 0, 3, 3), box(16, 12, 23, 19)],
        22: rle_encode(crowd, compressed=False),
        99: [["nonsense"]],
    }


def write(folder: Path, refs: Any, file: str = "refs(unc).p", protocol: int = 0) -> None:
    """A dataset as its authors publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps(refs, protocol))
    image_of = {11: 1, 21: 2, 22: 2, 99: 2}
    table = {
        "info": {},
        "images": [
            {"id": n, "file_name": file_name(n), "height": HEIGHT, "width": WIDTH, "license": 1}
            for n in (1, 2)
        ],
        "annotations": [
            {"id": ann, "image_id": image_of[ann], "category_id": 1, "segmentation": outline}
            for ann, outline in segmentations().items()
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "instances.json").write_text(json.dumps(table))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train2014").mkdir()
    for n in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (n, 0, 0)).save(tmp_path / "train2014" / file_name(n))
    write(tmp_path / "refcoco", REFS)
    return tmp_path


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        return refcoco.BENCHMARK.read(source), source.problems


# --- pickles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(tmp_path: Path, protocol: int):
    value = {
        "a": [1, -(2**70), 2.5, None, True, b"x", "é"],
        "t": (1, (2,)),
        "s": {1, 2} if protocol > 3 else 0,
    }
    (tmp_path / "p").write_bytes(pickle.dumps(value, protocol))
    if protocol < 3:  # bytes need a function's name there
        with pytest.raises(UserError, match="_codecs"):
            read_pickle(tmp_path / "p")
        del value["a"][5]
        (tmp_path / "p").write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(tmp_path / "p") == value


def test_a_pickle_of_python_2(tmp_path: Path):
    # [{'sent': 'caf\xc3\xa9', 'n': 3L}, u'\xe9'] as Python 2 writes it: str is bytes there.
    text = b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'n'\np4\nL3L\nsaV\xe9\np5\na."
    (tmp_path / "p").write_bytes(text)
    assert read_pickle(tmp_path / "p") == [{"sent": "café", "n": 3}, "é"]


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_of_a_hostile_pickle_is_run(tmp_path: Path, protocol: int):
    marker = tmp_path / "marker"
    (tmp_path / "p").write_bytes(pickle.dumps([Evil(f"touch {marker}")], protocol))
    with pytest.raises(UserError, match="system") as error:
        read_pickle(tmp_path / "p")
    assert not marker.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        b"\x80\xff.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",  # an extension
        b"Pid\n.",  # a persistent id
        b"}S'a'\nb.",  # BUILD on a dict
        b"(](tR.",  # a call of a list
        b"I" + b"9" * 10**5 + b"\n.",
        b"(" * 10**5 + b"l" * 10**5 + b".",
    ],
)
def test_what_is_no_plain_pickle(tmp_path: Path, data: bytes):
    (tmp_path / "p").write_bytes(data)
    try:
        value = read_pickle(tmp_path / "p")
    except UserError:
        return
    assert isinstance(value, list)  # a strange one, yet plain


@pytest.mark.parametrize(
    "data",
    [
        b"]r\x00\x00\x00\x01.",  # a memo number: room for all before it would be 256 MB
        b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".",  # so many bytes, it says
    ],
)
def test_a_few_bytes_do_not_fill_the_memory(tmp_path: Path, data: bytes):
    (tmp_path / "p").write_bytes(data)
    tracemalloc.start()
    try:
        with suppress(UserError):
            read_pickle(tmp_path / "p")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@drawn(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_is_a_user_error_or_plain(tmp_path_factory, place, noise, protocol):
    data = bytearray(pickle.dumps(REFS, protocol))
    place %= len(data)
    data[place : place + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "damaged.p"
    for damaged in (bytes(data), bytes(data[:place])):
        path.write_bytes(damaged)
        try:
            value = read_pickle(path)
        except UserError:
            continue
        assert type(value).__module__ == "builtins"


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2])
def test_every_phrase_that_is_not_for_training(folder: Path, protocol: int):
    write(folder / "refcoco", REFS, protocol=protocol)
    items, problems = read(folder)
    assert problems == []
    assert [(i.phrase, i.prompt, i.about["split"]) for i in items] == [
        ("left man", "Where is the left man?", "val"),
        ("man in blue", "Where is the man in blue?", "val"),
        ("dog", "Where is the dog?", "testA"),
        ("big umbrella", "Where is the big umbrella?", "testB"),
    ]
    assert [i.key for i in items[:3]] == [
        "refcoco/refs(unc).p: refs 2:1",
        "refcoco/refs(unc).p: refs 2:2",
        "refcoco/refs(unc).p: refs 3:1",
    ]
    assert {i.kind for i in items} == {"look"}
    assert [i.unit for i in items] == [file_name(n) for n in (1, 1, 2, 2)]
    assert items[0].image == folder / "train2014" / file_name(1)
    assert all(i.phrase in i.prompt for i in items)


def test_masks_are_those_of_the_outlines(folder: Path):
    masks = [item.mask() for item in read(folder)[0] if item.mask]
    expected = np.zeros((4, HEIGHT, WIDTH), bool)
    expected[:2, 0:8, 0:8] = True
    expected[2, 0:4, 0:4] = expected[2, 12:20, 16:24] = True
    expected[3, 4:8, 4:8] = True
    assert (np.stack(masks) == expected).all()


def test_outlines_that_nobody_asks_about_are_not_kept(folder: Path, monkeypatch):
    tables = []

    def spy(*args: Any) -> Any:
        tables.append(read_table(*args))
        return tables[-1]

    monkeypatch.setattr(refcoco, "read_table", spy)
    assert len(read(folder)[0]) == 4
    assert [a["id"] for a in tables[0]["annotations"] if a] == [11, 21, 22]


def test_one_splitting_of_a_dataset_counts(folder: Path):
    write(folder / "refcocog", [ref(0, 1, 11, "val", "by google")], "refs(google).p")
    write(folder / "refcocog", [ref(0, 1, 11, "test", "by umd")], "refs(umd).p")
    items, problems = read(folder)
    assert problems == []
    last = items[-1]
    assert (last.phrase, last.about) == ("by umd", {"dataset": "refcocog", "split": "test"})
    assert "by google" not in [i.phrase for i in items]
    assert {i.about["dataset"] for i in items} == {"refcoco", "refcocog"}
    assert len({i.key for i in items}) == len(items) == 5


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (ref(9, 1, 12, "val", "x"), "its annotation is not in refcoco/instances.json"),
        (ref(9, 7, 11, "val", "x"), "its picture is not in refcoco/instances.json"),
        (ref(9, 1, 11, "val", " ?"), "expected a phrase, got ' ?'"),
        (ref(9, 1, 11, "val", "a"), ""),
        (ref(9, 1, 11, "val", "\ud800"), "expected a phrase"),
        (ref(9, 1, 11, "val") | {"sentences": [3]}, "expected a phrase, got 3"),
        (ref(9, 1, 11, "val") | {"sentences": "x"}, "refs 5: expected ann_id, image_id, split"),
        (ref(9, 1, 11, "val", "x") | {"ann_id": [1]}, "refs 5: expected ann_id, image_id"),
        (["no dict"], "refs 5: expected ann_id, image_id, split, sentences, got ['no dict']"),
    ],
)
def test_a_bad_entry_is_told_and_the_rest_is_read(folder: Path, entry: Any, told: str):
    write(folder / "refcoco", [*REFS, entry], protocol=2)
    items, problems = read(folder)
    assert len(items) == (4 if told else 5)
    assert len(problems) == bool(told)
    assert told in "".join(problems)


@pytest.mark.parametrize(
    "outline",
    [
        [],
        [[1.0]],
        [[1.0, 2.0, 3.0]],
        [["a", "b", "c", "d"]],
        [None],
        None,
        3,
        "text",
        [box(100, 100, 120, 120)],
        [[float("nan")] * 6],
        [[1e300] * 6],
        {"size": [3, 3], "counts": [9]},
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
        {"counts": "?"},
    ],
)
def test_an_outline_that_is_none(folder: Path, outline: Any):
    path = folder / "refcoco" / "instances.json"
    table = json.loads(path.read_text())
    table["annotations"][0]["segmentation"] = outline
    path.write_text(json.dumps(table))
    items, problems = read(folder)
    assert [i.phrase for i in items] == ["dog", "big umbrella"]
    assert len(problems) == 1
    assert problems[0].startswith("refcoco/refs(unc).p: refs 2: ")
    assert problems[0].count("refs(unc).p") == 1


def test_pictures_that_are_missing_broken_or_of_another_size(folder: Path):
    path = folder / "train2014" / file_name(1)
    path.write_bytes(b"broken")
    assert "not an image" in "".join(read(folder)[1])
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)
    items, problems = read(folder)
    assert [i.phrase for i in items] == ["dog", "big umbrella"]
    assert problems == [
        "refcoco/refs(unc).p: refs 2: expected a picture of 32x24 as its outline, got 24x32"
    ]
    path.unlink()
    assert "no image" in "".join(read(folder)[1])


def test_what_is_missing_is_listed(folder: Path, tmp_path: Path):
    (folder / "refcoco" / "instances.json").unlink()
    with Source(folder) as source:
        assert refcoco.BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"missing: refcoco/instances\.json"):
            source.check(refcoco.BENCHMARK.needs)
    (folder / "refcoco" / "refs(unc).p").unlink()
    with Source(folder) as source:
        assert refcoco.BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"missing: refs\(unc\)\.p"):
            source.check(refcoco.BENCHMARK.needs)


@pytest.mark.parametrize("refs", [{"a": 1}, 3, None, "text"])
def test_a_pickle_of_something_else(folder: Path, refs: Any):
    write(folder / "refcoco", refs)
    items, problems = read(folder)
    assert items == []
    assert problems == ["refcoco/refs(unc).p: expected a list 'refs'"]


def test_a_hostile_file_is_told_with_its_name(folder: Path):
    write(folder / "refcoco", [Evil("true")])
    items, problems = read(folder)
    assert items == []
    assert len(problems) == 1
    assert problems[0].startswith("refcoco/refs(unc).p: expected a pickle of lists")


def parquet(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """A split as lmms-lab publishes it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")


def row(number: int, ann: int, outline: list[float] | None, *said: str) -> dict[str, Any]:
    held = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(held, "JPEG")
    return {
        "question_id": f"{ann}",
        "image": {"bytes": held.getvalue(), "path": f"{number}.jpg"},
        "question": "Please describe it.",
        "answer": list(said),
        "segmentation": outline,
        "bbox": [0.0, 0.0, 8.0, 8.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{number:012d}_{ann}.jpg",
    }


def test_the_parquet_files_of_lmms_lab(tmp_path: Path):
    home = tmp_path / "RefCOCO"
    parquet(
        home, "val", [row(1, 11, box(0, 0, 7, 7), "left man", "the man"), row(1, 12, None, "x")]
    )
    parquet(home, "testA", [row(1, 13, box(8, 8, 15, 15), "dog")])
    parquet(home, "train", [row(2, 14, box(8, 8, 15, 15), "not asked")])
    with Source(tmp_path) as source:
        items, problems = refcoco.BENCHMARK.read(source), source.problems
        assert [(i.phrase, i.about["split"], i.unit) for i in items] == [
            ("left man", "val", file_name(1)),
            ("man", "val", file_name(1)),
            ("dog", "testA", file_name(1)),
        ]
        assert {i.about["dataset"] for i in items} == {"RefCOCO"}
        assert len({i.image for i in items}) == 1
        assert items[2].mask is not None
        assert np.argwhere(items[2].mask()).min(0).tolist() == [8, 8]
        assert items[2].mask().sum() == 64
        assert len(problems) == 1
        assert "val-00000-of-00001.parquet:2: expected RLE or polygons" in problems[0]


def test_tables_of_another_benchmark_are_passed_over(folder: Path):
    parquet(folder / "POPE", "test", [{"question": "Is there a dog?"}])
    items, problems = read(folder)
    assert (len(items), problems) == (4, [])
    parquet(folder / "RefCOCOplus", "val", [row(2, 11, box(0, 0, 7, 7), "man")])
    items, problems = read(folder)
    assert (len(items), problems) == (5, [])


# --- scores ----------------------------------------------------------------------------------


def looked(hit: bool, energy: float, uniform: float, **rest: float) -> dict[str, Any]:
    names = ("near", "hit_half_heads", "centre_hit")
    more = {"energy_half_heads": energy, "centre": 0.0, "on_image": 1.0, "peak": [0, 0]}
    return (
        {"hit": hit, "energy": energy, "uniform": uniform}
        | dict.fromkeys(names, False)
        | more
        | rest
    )


def test_scores_against_a_hand_computed_table(folder: Path):
    items = read(folder)[0]
    looks = [
        looked(True, 0.5, 0.25, near=True, centre=0.4),
        looked(False, 0.1, 0.25, near=True),
        looked(True, 0.3, 0.20, centre_hit=True),
        {},  # nothing of the object is seen: no answer
    ]
    scores = Scores(sorted({i.unit for i in items}))
    pairs = zip(items, looks, strict=True)
    refcoco.BENCHMARK.score([Given(item, look=look) for item, look in pairs], scores)
    assert scores["pointing_game"] == pytest.approx(2 / 3)
    assert scores["pointing_game_tolerance"] == pytest.approx(2 / 3)
    assert scores["centre_pointing_game"] == pytest.approx(1 / 3)
    assert scores["energy_in_mask"] == pytest.approx(0.9 / 3)
    assert scores["uniform_energy"] == pytest.approx(0.7 / 3)
    assert scores["centre_energy"] == pytest.approx(0.4 / 3)
    assert scores["energy_gain"] == pytest.approx(0.9 / 0.7)
    assert scores["val.pointing_game"] == pytest.approx(1 / 2)
    assert scores["val.energy_gain"] == pytest.approx(0.6 / 0.5)
    assert scores["testA.pointing_game"] == 1
    assert "testB.pointing_game" not in scores
    assert set(refcoco.BENCHMARK.headline) <= set(scores.names)
    nothing = Scores(["x"])
    refcoco.BENCHMARK.score([Given(items[0])], nothing)
    assert nothing.names == []


def test_several_datasets_are_reported_apart(folder: Path):
    write(folder / "refcoco+", [ref(0, 1, 11, "val", "man")])
    items = read(folder)[0]
    scores = Scores(sorted({i.unit for i in items}))
    given = [Given(i, look=looked(i.about["dataset"] == "refcoco+", 0.5, 0.5)) for i in items]
    refcoco.BENCHMARK.score(given, scores)
    assert scores["pointing_game"] == pytest.approx(1 / 5)
    assert scores["refcoco+.val.pointing_game"] == 1
    assert scores["refcoco.val.pointing_game"] == 0


@pytest.mark.parametrize("knows", [True, False])
def test_one_that_looks_at_the_mask_hits_and_one_that_looks_everywhere_gains_nothing(
    folder: Path, knows: bool
):
    items = read(folder)[0]
    geometry = Preprocessor(image_size=32).geometry(WIDTH, HEIGHT)
    given = []
    for item in items:
        assert item.mask is not None
        mask = item.mask()
        over = mask if knows else np.ones_like(mask)
        cells = geometry.mask_to_grid(over, (8, 8)).reshape(8, 8).astype(np.float32)
        given.append(Given(item, look=pointing.measures(cells[None, None], mask, geometry)))
    scores = Scores(sorted({i.unit for i in items}))
    refcoco.BENCHMARK.score(given, scores)
    if knows:
        assert scores["pointing_game"] == 1
        assert scores["energy_in_mask"] > 0.8
    else:
        assert scores["energy_in_mask"] == pytest.approx(scores["uniform_energy"])
        assert scores["energy_gain"] == pytest.approx(1)
