"""The store on disk: round trips, interruption at every moment, damage, mismatches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.sam import index, writer
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


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 5, 8, 13])
def test_a_writer_that_dies_at_any_write_leaves_a_store_that_continues(
    tmp_path, monkeypatch, moment
):
    fill(tmp_path / "whole", range(20), shard_bytes=200)
    real, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) == moment + 1:
            raise RuntimeError("killed")
        real(source, target)

    path = tmp_path / "broken"
    store = StoreWriter(path, META, shard_bytes=200)
    monkeypatch.setattr(os, "replace", dying)

    def add_all():
        for number in range(20):
            store.add(**image(number))
            if number % 7 == 6:
                store.flush()
        store.flush()

    with pytest.raises(RuntimeError, match="killed"):
        add_all()
    monkeypatch.undo()
    store._lock.close()  # as the system does for a dead process
    if (path / index.INDEX).exists():
        reader = Store(path)
        reader.verify()
        for key in reader:
            assert len(features(reader, key)) == META.cells
    fill(path, range(20), shard_bytes=200)
    assert contents(path) == contents(tmp_path / "whole")


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


def test_an_image_added_again_replaces_its_labels(tmp_path):
    fill(tmp_path, range(6))
    again = {**image(3), "coverage": np.ones((3, 6), dtype=np.float32), "sha256": "f" * 64}
    with StoreWriter(tmp_path, META) as store:
        store.add(**again)
    store = Store(tmp_path)
    assert len(store) == 6
    assert store.sha256(again["image_key"]) == "f" * 64
    assert store.target(again["image_key"], again["prompts"][1]).tolist() == [1.0] * 6
    np.testing.assert_allclose(
        store.target(image(2)["image_key"], image(2)["prompts"][1]),
        image(2)["coverage"][1],
        atol=0.002,
    )


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
        (lambda d: d.update(version=2), "format version 1, got 2"),
        (lambda d: d.update(format="other"), "index of a SAM store"),
        (lambda d: d.pop("shards"), "damaged"),
        (lambda d: d["shards"][0].update(file="../../secret.safetensors"), "not the name of a"),
        (lambda d: d["shards"][0].update(rows=1), "outside its shard"),
        (lambda d: d["images"]["images/000003.png"].update(shard=7), "not listed"),
        (lambda d: d["images"]["images/000003.png"].update(row=-1), "outside its shard"),
        (lambda d: d["images"]["images/000003.png"].update(row="0"), "damaged"),
        (lambda d: d["images"].update(x=3), "damaged"),
        (lambda d: d["features"].update(sum=[0.0]), "feature sums"),
        (lambda d: d["meta"].update(grid=[2]), "grid"),
        (lambda d: d["meta"].update(color=1), "unknown key"),
    ],
)
def test_a_damaged_index_is_explained(tmp_path, change, says):
    fill(tmp_path, range(4))
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=says):
        Store(tmp_path)


def test_a_truncated_index_or_shard_is_explained(tmp_path):
    fill(tmp_path, range(4))
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path).target(image(1)["image_key"], image(1)["prompts"][0])
    shard.unlink()
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path).features(image(1)["image_key"])
    text = (tmp_path / index.INDEX).read_text()
    (tmp_path / index.INDEX).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"index\.json:\d+: malformed"):
        Store(tmp_path)


def test_a_full_disk_is_reported_and_what_was_finished_stays(tmp_path, monkeypatch):
    fill(tmp_path, range(5))
    before = contents(tmp_path)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path, range(9))
    monkeypatch.undo()
    assert contents(tmp_path) == before
    fill(tmp_path, range(9))
    assert len(Store(tmp_path)) == 9


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
