"""The store on disk: round trips, interruption at every moment, damage, mismatches."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from agevlm_mlx.errors import UserError
from agevlm_mlx.sam import index, tail, writer
from agevlm_mlx.sam.store import Store, StoreMeta, StoreWriter, file_sha256, prompt_key

META = StoreMeta(teacher="a" * 64, preprocessing="b" * 64, grid=(2, 3), feature_channels=4)


def image(number: int, meta: StoreMeta = META) -> dict:
    """The arguments of `StoreWriter.add` for one made-up image with 0 to 3 prompts."""
    rng = np.random.default_rng(number)
    n = number % 4
    return {
        "image_key": f"images/{number:06d}.png",
        "sha256": f"{number:064x}",
        "prompts": [prompt_key((i, number, i + 1, number + 1)) for i in range(n)],
        "coverage": rng.random((n, meta.cells)).astype(np.float32),
        "iou": rng.random(n).astype(np.float32),
        "features": rng.normal(3, 2, (meta.cells, meta.feature_channels))
        if meta.feature_channels
        else None,
    }


def fill(path: Path, numbers, **options) -> None:
    with StoreWriter(path, META, **options) as store:
        for number in numbers:
            if image(number)["image_key"] not in store.done:
                store.add(**image(number))


def features(store: Store, image_key: str) -> np.ndarray:
    """The features of an image that must have some."""
    read = store.features(image_key)
    assert read is not None
    return read


def old_store(path: Path, numbers) -> None:
    """The store of format version 1 of some images: everything stands in its index."""
    fill(path, numbers)
    (shard,) = path.glob("shard-*")
    file = safe_open(shard, framework="numpy")
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entries = json.loads(tensors.pop("entries").tobytes())
    data = save(tensors)
    shard.write_bytes(data)
    about = json.loads((path / index.INDEX).read_text())
    images, row = {}, 0
    for place, (key, sha256, text) in enumerate(entries):
        images[key] = {"sha256": sha256, "shard": 0, "image": place, "row": row}
        images[key]["prompts"] = text.split()
        row += len(text.split())
    about["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (path / index.INDEX).write_text(json.dumps({**about, "version": 1, "images": images}))


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ((1, 2, 3, 4), "box:1,2,3,4"),
        ((1.0, 2.5, 3.126, 4.004), "box:1,2.5,3.13,4"),
        ((np.float32(0.1), np.int64(7)), "point:0.1,7"),
        ((1234.56, 0), "point:1234.56,0"),
    ],
)
def test_prompt_keys(prompt, key):
    assert prompt_key(prompt) == key


def test_a_prompt_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="box of 4 or a point of 2"):
        prompt_key((1, 2, 3))


def test_what_is_added_is_read_back(tmp_path):
    fill(tmp_path, range(10))
    store = Store(tmp_path)
    assert store.meta == META
    assert list(store) == [image(n)["image_key"] for n in range(10)]
    for number in range(10):
        added = image(number)
        key = added["image_key"]
        assert store.sha256(key) == added["sha256"]
        assert store.prompts(key) == tuple(added["prompts"])
        for row, prompt in enumerate(added["prompts"]):
            target = store.target(key, prompt)
            assert target.dtype == np.float32
            np.testing.assert_allclose(target, added["coverage"][row], atol=0.5 / 255 + 1e-6)
            assert store.iou(key, prompt) == pytest.approx(added["iou"][row], abs=1e-3)


def test_arrays_in_any_memory_order_are_stored_in_the_same_bytes(tmp_path):
    fill(tmp_path / "c", range(4, 8))
    with StoreWriter(tmp_path / "f", META) as store:
        for number in range(4, 8):
            one = image(number)
            store.add(
                **{
                    **one,
                    "coverage": np.asfortranarray(one["coverage"]),
                    "features": np.asfortranarray(one["features"]),
                }
            )
    assert contents(tmp_path / "f") == contents(tmp_path / "c")


def test_what_was_never_labelled_is_a_key_error(tmp_path):
    fill(tmp_path, range(4))
    store = Store(tmp_path)
    with pytest.raises(KeyError):
        store.target("images/999999.png", "box:0,0,1,1")
    with pytest.raises(KeyError):
        store.target(image(1)["image_key"], "box:9,9,9,9")
    with pytest.raises(KeyError):
        store.features("images/999999.png")


def test_features_are_standardised_over_the_store_and_padding_stays_zero(tmp_path):
    added = [image(n) for n in range(12)]
    added[3]["features"][2:] = 0.0  # the student's padding
    with StoreWriter(tmp_path, META) as store:
        for one in added:
            store.add(**one)
    store = Store(tmp_path)
    raw = np.concatenate([one["features"] for one in added])
    inside = raw[raw.any(1)]
    np.testing.assert_allclose(store.feature_mean, inside.mean(0), atol=1e-2)
    assert store.feature_scale == pytest.approx(np.sqrt(inside.var(0).mean()), rel=1e-2)
    read = np.concatenate([features(store, one["image_key"]) for one in added])
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[raw.any(1)].mean(0), 0, atol=1e-2)
    assert not features(store, added[3]["image_key"])[2:].any()
    assert features(store, added[3]["image_key"])[:2].all()


def test_a_store_without_features_has_none(tmp_path):
    meta = StoreMeta(teacher="t", preprocessing="p", grid=(1, 1))
    with StoreWriter(tmp_path, meta) as store:
        store.add(**image(3, meta))
    assert Store(tmp_path).features(image(3)["image_key"]) is None


def test_arrays_of_the_wrong_shape_are_refused(tmp_path):
    wrong = {**image(3), "coverage": np.zeros((3, 5), dtype=np.float32)}
    with StoreWriter(tmp_path, META) as store, pytest.raises(ValueError, match=r"\(3, 6\)"):
        store.add(**wrong)


def test_shards_stay_below_their_size(tmp_path):
    fill(tmp_path, range(40), shard_bytes=500)
    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) > 3
    assert max(path.stat().st_size for path in shards) < 500 + 400  # rows and the header
    store = Store(tmp_path)
    np.testing.assert_allclose(
        store.target(image(39)["image_key"], image(39)["prompts"][2]),
        image(39)["coverage"][2],
        atol=0.002,
    )


def test_the_bytes_do_not_depend_on_when_the_writer_flushed(tmp_path):
    fill(tmp_path / "once", range(30), shard_bytes=700)
    for stop in (3, 4, 11, 30):
        fill(tmp_path / "parts", range(stop), shard_bytes=700)
    with StoreWriter(tmp_path / "each", META, shard_bytes=700) as store:
        for number in range(30):
            store.add(**image(number))
            store.flush()
    assert contents(tmp_path / "parts") == contents(tmp_path / "once")
    assert contents(tmp_path / "each") == contents(tmp_path / "once")


def every_write(monkeypatch, act) -> None:
    """Call `act(write, *its arguments)` in the place of all that puts bytes or names on disk."""
    replace, append = os.replace, tail.TailWriter.append
    monkeypatch.setattr(os, "replace", lambda *names: act(replace, *names))
    monkeypatch.setattr(tail.TailWriter, "append", lambda *rows: act(append, *rows))


@pytest.mark.parametrize("moment", range(16))
def test_a_writer_that_dies_at_any_write_leaves_a_store_that_continues(
    tmp_path, monkeypatch, moment
):
    fill(tmp_path / "whole", range(20), shard_bytes=1500)
    calls = []

    def dying(write, *arguments):
        calls.append(write)
        if len(calls) == moment + 1:
            raise RuntimeError("killed")
        write(*arguments)

    path = tmp_path / "broken"
    store = StoreWriter(path, META, shard_bytes=1500)
    every_write(monkeypatch, dying)

    def add_all():
        for number in range(20):
            store.add(**image(number))
            if number % 2:
                store.flush()
        store.close()

    with pytest.raises(RuntimeError, match="killed"):
        add_all()
    monkeypatch.undo()
    store._lock.close()  # as the system does for a dead process
    if (path / index.INDEX).exists():
        reader = Store(path)
        reader.verify()
        assert list(reader) == [image(n)["image_key"] for n in range(len(reader))]
        for number, key in enumerate(reader):
            assert_labels(reader, number)
            assert len(features(reader, key)) == META.cells
    fill(path, range(20), shard_bytes=1500)
    assert contents(path) == contents(tmp_path / "whole")


def assert_labels(store: Store, number: int) -> None:
    """What the store holds of a made-up image is that image's."""
    added = image(number)
    for row, prompt in enumerate(added["prompts"]):
        target = store.target(added["image_key"], prompt)
        np.testing.assert_allclose(target, added["coverage"][row], atol=0.5 / 255 + 1e-6)
        assert store.iou(added["image_key"], prompt) == pytest.approx(added["iou"][row], abs=1e-3)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 20, 60, 100])
def test_half_an_image_at_the_end_of_a_tail_is_cut_off(tmp_path, cut):
    fill(tmp_path / "whole", range(9))
    unfinished(tmp_path / "cut", 5, 3)
    (path,) = (tmp_path / "cut").glob("tail-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    store = Store(tmp_path / "cut")
    assert len(store) == 8 - bool(cut)
    assert_labels(store, 5)
    fill(tmp_path / "cut", range(9))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_tail_that_was_cut_grows_behind_the_cut(tmp_path):
    unfinished(tmp_path, 0, 4)
    (path,) = tmp_path.glob("tail-*")
    path.write_bytes(path.read_bytes()[:-5])
    store = StoreWriter(tmp_path, META)
    assert len(store.done) == 3
    for number in range(3, 6):
        store.add(**image(number))
    store.flush()
    store._lock.close()
    assert list(Store(tmp_path)) == [image(n)["image_key"] for n in range(6)]


def test_what_a_crash_leaves_is_swept_away_and_other_files_are_not(tmp_path):
    fill(tmp_path, range(4))
    left = [".tmp-0123.json", "tail-00000-2.bin", "tail-00009-0.bin", "shard-00001-1.safetensors"]
    for name in [*left, "notes.txt", writer.BAD_RECORDS]:
        (tmp_path / name).write_bytes(b"x")
    StoreWriter(tmp_path, META).close()
    names = {p.name for p in tmp_path.iterdir()}
    assert not names & set(left)
    assert {"notes.txt", writer.BAD_RECORDS, "index.json"} < names
    assert len(Store(tmp_path)) == 4


def test_a_flipped_bit_in_a_tail_costs_the_images_from_there_on(tmp_path):
    fill(tmp_path / "whole", range(9))
    unfinished(tmp_path / "bit", 5, 3)
    (path,) = (tmp_path / "bit").glob("tail-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert 5 <= len(Store(tmp_path / "bit")) < 8
    fill(tmp_path / "bit", range(9))
    assert contents(tmp_path / "bit") == contents(tmp_path / "whole")


def test_an_images_length_beyond_the_file_takes_no_memory(tmp_path):
    unfinished(tmp_path, 0, 3)
    (path,) = tmp_path.glob("tail-*")
    path.write_bytes(path.read_bytes() + b"\xff" * 12)
    tracemalloc.start()
    assert len(Store(tmp_path)) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def unfinished(path: Path, finished: int, more: int) -> None:
    """A store as kill -9 leaves it: `finished` images in a shard and `more` in a tail."""
    if finished:
        fill(path, range(finished))
    store = StoreWriter(path, META)
    for number in range(finished, finished + more):
        store.add(**image(number))
    store.flush()
    store._lock.close()


def test_the_features_of_a_tail_count_in_the_mean(tmp_path):
    unfinished(tmp_path / "killed", 4, 3)
    fill(tmp_path / "whole", range(7))
    killed, whole = Store(tmp_path / "killed"), Store(tmp_path / "whole")
    np.testing.assert_array_equal(killed.feature_mean, whole.feature_mean)
    assert killed.feature_scale == whole.feature_scale
    for key in whole:
        np.testing.assert_array_equal(features(killed, key), features(whole, key))


def test_a_flush_writes_what_is_new_and_the_index_lists_shards_only(tmp_path, monkeypatch):
    sizes = []
    with StoreWriter(tmp_path, META, shard_bytes=2**20) as store:
        for number in range(0, 400, 4):
            store.add(**image(number))
            store.flush()
            sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
            assert len(list(tmp_path.iterdir())) == 3  # the lock, the index, the tail
        about = (tmp_path / index.INDEX).stat().st_size
    steps = np.diff(sizes)
    assert steps.min() == steps.max() < 300
    assert (tmp_path / index.INDEX).stat().st_size < about + 300


@pytest.mark.chaos
def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    script = (
        "import sys, time\n"
        "from tests.sam.test_store import META, image\n"
        "from agevlm_mlx.sam import writer\n"
        "writer.FLUSH_SECONDS = 0.0\n"
        "with writer.StoreWriter(sys.argv[1], META, shard_bytes=2000) as store:\n"
        "    for n in range(10**6):\n"
        "        store.add(**image(n)); print(n, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if int(line) >= 60:
            break
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=30)
    run.stdout.close()
    survived = len(Store(tmp_path / "killed"))
    assert survived >= 60
    fill(tmp_path / "killed", range(survived + 10), shard_bytes=2000)
    fill(tmp_path / "whole", range(survived + 10), shard_bytes=2000)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.chaos
def test_kill_9_at_twenty_moments_changes_no_byte(tmp_path):
    script = (
        "import sys\n"
        "from tests.sam.test_store import fill\n"
        "from agevlm_mlx.sam import writer\n"
        "writer.FLUSH_SECONDS = 0.0\n"
        "print('ready', flush=True)\n"
        "fill(sys.argv[1], range(600), shard_bytes=5000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    rng = np.random.default_rng(0)
    for moment in rng.exponential(0.15, 20):
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
        )
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(moment)
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=30)
        run.stdout.close()
        if (tmp_path / "killed" / index.INDEX).exists():
            store = Store(tmp_path / "killed")
            store.verify()
            assert list(store) == [image(n)["image_key"] for n in range(len(store))]
    fill(tmp_path / "killed", range(600), shard_bytes=5000)
    fill(tmp_path / "whole", range(600), shard_bytes=5000)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("channels", "images", "limit"), [(0, 300, 2), (256, 12, 60)])
def test_coco_fits_on_a_24_x_24_grid(tmp_path, channels, images, limit):
    """train2017: 118,287 images, 860,001 boxes. `scripts/measure_store.py` writes all of it."""
    meta = StoreMeta(teacher="t", preprocessing="p", grid=(24, 24), feature_channels=channels)
    boxes = [prompt_key((100.25 + i, 200.75, 300.25, 400.75 + i)) for i in range(8)]  # 7.3 each
    coverage, iou = np.full((8, 576), 0.5, np.float32), np.full(8, 0.5, np.float32)
    features = np.ones((576, channels)) if channels else None
    with StoreWriter(tmp_path, meta) as store:
        for number in range(images):
            key = f"train2017/{number:012d}.jpg"
            store.add(key, "f" * 64, boxes, coverage, iou, features)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / images * 118_287 <= limit * 2**30


@pytest.mark.parametrize("place", ["memory", "tail", "last shard", "earlier shard"])
def test_an_image_added_again_gets_the_masks_that_it_lacks(tmp_path, place):
    first, last = {"earlier shard": (3, 20)}.get(place, (1, 4))
    new = {
        **image(3),
        "prompts": [image(3)["prompts"][1], "point:1,2"],
        "coverage": np.ones((2, 6), dtype=np.float32),
        "iou": np.ones(2, np.float32),
        "features": np.ones((6, 4)),
    }
    store = StoreWriter(tmp_path, META, shard_bytes=600)
    for number in range(first, last):
        store.add(**image(number))
    if place == "tail":
        store.flush()
        store._lock.close()
    elif place != "memory":
        store.close()
    if place != "memory":
        store = StoreWriter(tmp_path, META, shard_bytes=600)
    store.add(**new)
    store.flush()
    for reader in (Store(tmp_path), store.close() or Store(tmp_path)):
        key = new["image_key"]
        assert len(reader) == last - first
        assert reader.prompts(key) == (*image(3)["prompts"], "point:1,2")
        assert reader.target(key, "point:1,2").tolist() == [1.0] * 6
        for number in range(first, last):
            assert_labels(reader, number)
        fill(tmp_path / "once", range(first, last))
        once = Store(tmp_path / "once")
        np.testing.assert_allclose(reader.feature_mean, once.feature_mean, rtol=1e-9)
        assert reader.feature_scale == pytest.approx(once.feature_scale, rel=1e-9)
        np.testing.assert_allclose(features(reader, key), features(once, key), rtol=1e-6)


def test_an_image_added_again_without_anything_new_changes_nothing(tmp_path):
    fill(tmp_path, range(6))
    before = contents(tmp_path)
    with StoreWriter(tmp_path, META) as store:
        store.add(**{**image(3), "coverage": np.ones((3, 6), dtype=np.float32)})
    assert contents(tmp_path) == before


def test_another_file_under_an_images_key_is_refused(tmp_path):
    fill(tmp_path, range(6))
    with (
        StoreWriter(tmp_path, META) as store,
        pytest.raises(UserError, match=r"000003\.png changed since it was labelled"),
    ):
        store.add(**{**image(3), "sha256": "f" * 64})


def test_a_reader_goes_on_while_the_store_grows(tmp_path):
    fill(tmp_path, range(5))
    store = Store(tmp_path)
    fill(tmp_path, range(8))
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00000-8.safetensors"]
    for number in range(5):
        assert_labels(store, number)
        assert len(features(store, image(number)["image_key"])) == META.cells


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"teacher": "c" * 64}, "another teacher"),
        ({"preprocessing": "c" * 64}, "another preprocessing"),
        ({"grid": (3, 2)}, "another grid"),
        ({"feature_channels": 0}, "another feature channels"),
        ({"prompt": "point"}, "another prompt"),
    ],
)
def test_a_store_made_otherwise_is_not_continued(tmp_path, changed, says):
    fill(tmp_path, range(3))
    before = contents(tmp_path)
    other = StoreMeta(**{**vars(META), **changed})
    with pytest.raises(UserError, match=says):
        StoreWriter(tmp_path, other)
    assert contents(tmp_path) == before


def test_two_writers_at_once_are_refused(tmp_path):
    with StoreWriter(tmp_path, META), pytest.raises(UserError, match="another `agevlm teach`"):
        StoreWriter(tmp_path, META)
    StoreWriter(tmp_path, META).close()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, META)
    assert (tmp_path / "thesis.tex").read_text() == "important"


def test_check_says_what_differs(tmp_path):
    fill(tmp_path, range(4))
    store = Store(tmp_path)
    good = {image(n)["image_key"]: image(n)["sha256"] for n in range(4)}
    store.check(META.preprocessing, META.grid, good)
    with pytest.raises(UserError, match="4x4 token grid, got 2x3"):
        store.check(META.preprocessing, (4, 4))
    with pytest.raises(UserError, match="preprocessing cccc"):
        store.check("c" * 64, META.grid)
    with pytest.raises(UserError, match=r"no labels for image other\.png"):
        store.check(META.preprocessing, META.grid, {"other.png": "0"})
    with pytest.raises(UserError, match=r"000001\.png is another file"):
        store.check(META.preprocessing, META.grid, {image(1)["image_key"]: "d" * 64})


def test_verify_finds_a_flipped_bit_and_a_changed_image(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(b"pixels")
    with StoreWriter(tmp_path / "store", META) as store:
        store.add(**{**image(3), "image_key": "a.png", "sha256": file_sha256(data / "a.png")})
    seen = []
    Store(tmp_path / "store").verify(data, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    (data / "a.png").write_bytes(b"other pixels")
    with pytest.raises(UserError, match=r"a\.png: changed since"):
        Store(tmp_path / "store").verify(data)
    (data / "a.png").unlink()
    with pytest.raises(UserError, match="no such file"):
        Store(tmp_path / "store").verify(data)
    (shard,) = (tmp_path / "store").glob("shard-*")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path / "store").verify()


@pytest.mark.parametrize("cut", [0, 1, 7, 11, 13, 60, 100])
def test_verify_takes_the_piece_that_a_killed_writer_leaves(tmp_path, cut):
    unfinished(tmp_path, 0, 3)
    (path,) = tmp_path.glob("tail-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    Store(tmp_path).verify()


@pytest.mark.parametrize("bit", range(0, 3000, 101))
def test_verify_finds_a_flipped_bit_in_a_tail(tmp_path, bit):
    unfinished(tmp_path, 2, 4)
    (path,) = tmp_path.glob("tail-*")
    data = bytearray(path.read_bytes())
    assert len(data) * 8 > 3000
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"tail-00000-2\.bin: damaged .* `agevlm teach` again"):
        Store(tmp_path).verify()


@pytest.mark.parametrize("change", [{"cells": 3}, {"sum": [1.0] * 4}, {"squares": [9.0] * 4}])
@pytest.mark.parametrize("more", [0, 2])
def test_verify_sums_the_features_up(tmp_path, change, more):
    unfinished(tmp_path, 6, more)
    Store(tmp_path).verify()
    rewrite(tmp_path, lambda d: d["features"].update(change))
    with pytest.raises(UserError, match=r"index\.json: damaged \(its feature sums"):
        Store(tmp_path).verify()


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="agevlm teach"):
        Store(tmp_path / "nothing")


def rewrite(path: Path, change) -> None:
    data = json.loads((path / index.INDEX).read_text())
    change(data)
    (path / index.INDEX).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=3), "format version 2 or 1, got 3"),
        (lambda d: d.update(format="other"), "index of a SAM store"),
        (lambda d: d.pop("shards"), "damaged"),
        (lambda d: d["shards"][0].update(file="../../secret.safetensors"), "not the name of a"),
        (lambda d: d["shards"][0].update(rows=1), "damaged"),
        (lambda d: d["shards"][0].update(images=3), "damaged"),
        (lambda d: d["shards"][0].update(images=-1), "negative"),
        (lambda d: d["shards"][0].update(rows=6.0), "damaged"),
        (lambda d: d["shards"][0].update(color=1), "damaged"),
        (lambda d: d["shards"].append(d["shards"][0] | {"file": "shard-00001-1.safetensors"}), "d"),
        (lambda d: d["features"].update(sum=[0.0]), "feature sums"),
        (lambda d: d["features"].update(sum=[float("nan")] * 4), "feature sums"),
        (lambda d: d["features"].update(squares=[float("inf")] * 4), "feature sums"),
        (lambda d: d["features"].update(cells=-3), "over -3 cells"),
        (lambda d: d["shards"].append(d["shards"][0]), "listed twice"),
        (lambda d: d.update(version=True), "format version 2 or 1, got True"),
        (lambda d: d["meta"].update(grid=[2]), "grid"),
        (lambda d: d["meta"].update(color=1), "unknown key"),
    ],
)
def test_a_damaged_index_is_explained(tmp_path, change, says):
    fill(tmp_path, range(4))
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=says):
        Store(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        b"no JSON",
        b"{}",
        b'[["a", "b"]]',
        b'[["a", "b", 3], ["a", "b", ""], ["a", "b", ""], ["a", "b", ""]]',
        b"[" * 100_000,
        json.dumps([[str(i), "b", ""] for i in range(4)]).encode(),
    ],
)
def test_a_shard_with_wrong_entries_is_explained(tmp_path, entries):
    fill(tmp_path, range(4))
    (shard,) = tmp_path.glob("shard-*")
    file = safe_open(shard, framework="numpy")
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["entries"] = np.frombuffer(entries, np.uint8)
    shard.write_bytes(save(tensors))
    with pytest.raises(UserError, match=r"00000-4\.safetensors: damaged"):
        Store(tmp_path)
    del tensors["entries"]
    shard.write_bytes(save(tensors))
    with pytest.raises(UserError, match=r"00000-4\.safetensors: damaged"):
        Store(tmp_path)


def test_a_store_of_format_1_is_read_but_not_continued(tmp_path):
    old_store(tmp_path / "old", range(6))
    fill(tmp_path / "new", range(6))
    old, new = Store(tmp_path / "old"), Store(tmp_path / "new")
    old.verify()
    assert list(old) == list(new)
    for key in new:
        assert old.prompts(key) == new.prompts(key)
        for name, value in new.rows(key).items():
            np.testing.assert_array_equal(old.rows(key)[name], value)
        np.testing.assert_array_equal(features(old, key), features(new, key))
    with pytest.raises(UserError, match=r"version 1, .*agevlm teach --merge .*old --out NEW"):
        StoreWriter(tmp_path / "old", META)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["shards"][0].update(rows=1), "outside its shard"),
        (lambda d: d["images"]["images/000003.png"].update(shard=7), "not listed"),
        (lambda d: d["images"]["images/000003.png"].update(row=-1), "outside its shard"),
        (lambda d: d["images"]["images/000003.png"].update(row="0"), "damaged"),
        (lambda d: d["images"].update(x=3), "damaged"),
        (lambda d: d["images"]["images/000003.png"].update(prompts=[3]), "damaged"),
        (lambda d: d.pop("images"), "damaged"),
    ],
)
def test_a_damaged_index_of_format_1_is_explained(tmp_path, change, says):
    old_store(tmp_path, range(4))
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=says):
        Store(tmp_path)


def test_a_truncated_index_or_shard_is_explained(tmp_path):
    fill(tmp_path, range(4))
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        StoreWriter(tmp_path, META)
    text = (tmp_path / index.INDEX).read_text()
    (tmp_path / index.INDEX).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"index\.json:\d+: malformed"):
        Store(tmp_path)


@pytest.mark.parametrize("partly", [0, 1, 50])
def test_a_full_disk_is_reported_and_what_was_finished_stays(tmp_path, monkeypatch, partly):
    fill(tmp_path / "whole", range(9))
    fill(tmp_path / "store", range(5))
    before = contents(tmp_path / "store")

    class Full:
        """The file of a tail on a disk with room for a few bytes more."""

        def __init__(self, path):
            self.file, self.room = path.open("ab", buffering=0), partly

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(self, path, length):
        self.path, self._length, self._file = path, length, Full(path)

    monkeypatch.setattr(tail.TailWriter, "__init__", opened)
    with pytest.raises(OSError, match=r"No space left on device: .*tail-00000-5"):
        fill(tmp_path / "store", range(9))
    monkeypatch.undo()
    after = contents(tmp_path / "store")
    assert after.pop("tail-00000-5.bin") == b""
    assert after == before
    fill(tmp_path / "store", range(9))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_disk_too_full_for_a_shard_keeps_the_tail(tmp_path, monkeypatch):
    fill(tmp_path / "whole", range(9))

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    store = StoreWriter(tmp_path / "store", META)
    store.flush()
    for number in range(9):
        store.add(**image(number))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store.close()
    monkeypatch.undo()
    assert len(Store(tmp_path / "store")) == 9
    fill(tmp_path / "store", range(9))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_long_job_is_on_disk_after_a_few_seconds_not_only_at_the_end(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr(writer.time, "monotonic", lambda: float(next(clock)))
    with StoreWriter(tmp_path, META) as store:
        for number in range(6):
            store.add(**image(number))
        assert len(Store(tmp_path)) >= 3


def test_six_thousand_images_open_within_a_second(tmp_path):
    meta = StoreMeta(teacher="t" * 64, preprocessing="p" * 64, grid=(8, 8))
    coverage, iou = np.zeros((4, 64), np.float32), np.ones(4, np.float32)
    prompts = [f"box:10.25,{n}.5,100,{n}" for n in range(4)]
    with StoreWriter(tmp_path, meta) as store:
        for number in range(6000):
            store.add(f"images/{number:06d}.png", "a" * 64, prompts, coverage, iou)
    start = time.perf_counter()
    store = Store(tmp_path)
    store.target("images/005999.png", prompts[3])
    assert len(store) == 6000
    assert time.perf_counter() - start < 1.0
