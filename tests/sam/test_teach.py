"""`agevlm teach` with a teacher that needs no torch: it fills the box it is shown."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import teach
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.launchers import launched
from agevlm_mlx.sam import labelling, merging, progress, room, writer
from agevlm_mlx.sam.automatic import Automatic
from agevlm_mlx.sam.jobs import Job, Jobs, complete, survey
from agevlm_mlx.sam.labelling import Labeller
from agevlm_mlx.sam.protocol import Candidates, Labels
from agevlm_mlx.sam.store import Store, file_sha256
from agevlm_mlx.sam.targets import rle_encode

from .test_store import META, fill, old_store


@dataclass
class FakeTeacher:
    """A box is filled, a point is one pixel; features are the coordinates of the cell."""

    fingerprint: str = "f" * 64
    feature_channels: int = 2
    batch_size: int = 4
    light: bool = True
    seen: list = field(default_factory=list)
    interrupt_after: int = 10**6

    def label(self, images, prompts, *, features=False):
        if len(self.seen) >= self.interrupt_after:
            raise KeyboardInterrupt
        answers = []
        for image, group in zip(images, prompts, strict=True):
            self.seen.append((image.shape, list(group)))
            masks = np.zeros((len(group), *image.shape[:2]), dtype=bool)
            for mask, prompt in zip(masks, group, strict=True):
                x0, y0, x1, y1 = (int(v) for v in (*prompt, prompt[0] + 1, prompt[1] + 1)[:4])
                mask[y0:y1, x0:x1] = True
            grid = np.stack(np.meshgrid(np.arange(4) + 1.0, np.arange(4) + 1.0), -1)
            answers.append(Labels(masks, np.full(len(group), 0.5, np.float32), grid))
        return [replace(a, features=a.features if features else None) for a in answers]


def phrase(**where) -> Phrase:
    return Phrase("dog", 0, 11, 14, **where)


def jobs_of(root: Path, *records: Record, **options) -> Jobs:
    return Jobs(Records.from_list(records, root), **options)


def record(image: Path, *phrases: Phrase, name: str = "r") -> Record:
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "Yes"))
    return Record(name, image, turns, phrases)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of 10 pictures of 40 x 20 pixels, each asked about twice, with its own box."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(10):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(folder / f"images/{i}.png")
        found = {"text": "dog", "turn": 0, "start": 11, "end": 14, "box": [i, 0, i + 20, 20]}
        talk = [
            {"role": "user", "content": "Is there a dog?"},
            {"role": "assistant", "content": "Yes"},
        ]
        line = {"image": f"images/{i}.png", "conversations": talk, "phrases": [found]}
        lines += [json.dumps({**line, "id": f"{i}{side}"}) for side in "ab"]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def run(data: Path, out: Path, teacher: FakeTeacher, *, features: bool = False, **options) -> int:
    preprocessor, grid = Preprocessor(image_size=32), (4, 4)
    make = teach.MakeLabeller(preprocessor=preprocessor, grid=grid, features=features)
    labeller = Labeller(teacher, preprocessor, grid, features)
    jobs = Jobs(read_records(data), options.get("prompt", "box"), every_image=features)
    return teach.teach(jobs, make, out, labeller=labeller, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_every_image_is_labelled_once_on_the_students_grid(data, tmp_path):
    teacher = FakeTeacher()
    assert run(data, tmp_path / "store", teacher) == 0
    assert teacher.seen == [((20, 40, 3), [(i, 0, i + 20, 20)]) for i in range(10)]
    store = Store(tmp_path / "store")
    assert list(store) == [f"images/{i}.png" for i in range(10)]
    assert store.sha256("images/3.png") == file_sha256(data / "images/3.png")
    # 40 x 20 fills the middle two rows of the 4 x 4 grid; the box 0..20 their left half.
    expected = np.zeros((4, 4))
    expected[1:3, :2] = 1
    target = store.target("images/0.png", "box:0,0,20,20")
    np.testing.assert_allclose(target.reshape(4, 4), expected, atol=0.01)
    assert store.iou("images/0.png", "box:0,0,20,20") == 0.5


def test_features_are_pooled_without_padding(data, tmp_path):
    run(data, tmp_path / "store", FakeTeacher(), features=True)
    store = Store(tmp_path / "store")
    store.check(Preprocessor(image_size=32).fingerprint(), (4, 4))
    features = store.features("images/0.png")
    assert features is not None
    features = features.reshape(4, 4, 2)
    assert not features[[0, 3]].any()
    # Standardised: what remains of the columns 1 2 3 4 is their order and even spacing.
    steps = np.diff(features[1, :, 0])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    assert steps[0] > 0
    np.testing.assert_allclose(features[2, :, 1] - features[1, :, 1], steps[0], rtol=1e-2)


def test_a_second_run_does_nothing_and_changes_nothing(data, tmp_path, capsys):
    run(data, tmp_path / "store", FakeTeacher())
    before, again = contents(tmp_path / "store"), FakeTeacher()
    run(data, tmp_path / "store", again)
    assert again.seen == []
    assert contents(tmp_path / "store") == before
    assert "10 of 10 images are done already" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(data, tmp_path, capsys):
    run(data, tmp_path / "whole", FakeTeacher())
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "store", FakeTeacher(interrupt_after=8))
    assert "same command again" in capsys.readouterr().err
    assert len(Store(tmp_path / "store")) == 8
    rest = FakeTeacher()
    run(data, tmp_path / "store", rest)
    assert len(rest.seen) == 2
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_new_phrases_of_a_finished_image_are_added(data, tmp_path):
    run(data, tmp_path / "store", FakeTeacher())
    text = (data / "data.jsonl").read_text().replace("[3, 0, 23, 20]", "[4, 0, 10, 10]", 1)
    (data / "data.jsonl").write_text(text)
    teacher = FakeTeacher()
    run(data, tmp_path / "store", teacher)
    assert [prompts for _, prompts in teacher.seen] == [[(4, 0, 10, 10)]]
    assert Store(tmp_path / "store").prompts("images/3.png") == ("box:3,0,23,20", "box:4,0,10,10")


def other_boxes(data: Path) -> Path:
    """Other data about the same pictures."""
    other = data.with_name("other")
    other.mkdir()
    (other / "images").symlink_to(data / "images")
    text = (data / "data.jsonl").read_text().replace("20, 20]", "8, 8]").replace("0, 2", "1, 1")
    (other / "data.jsonl").write_text(text)
    return other


def test_two_data_sets_of_the_same_pictures_share_a_store(data, tmp_path):
    other = other_boxes(data)
    run(data, tmp_path / "first", FakeTeacher(), features=True)
    run(other, tmp_path / "second", FakeTeacher(), features=True)
    teacher = FakeTeacher()
    for folder in (data, other, data, other):
        run(folder, tmp_path / "both", teacher, features=True)
    assert len(teacher.seen) == 20  # each image once for each
    first, second, both = (Store(tmp_path / name) for name in ("first", "second", "both"))
    for store in (first, second):
        for key in store:
            for prompt in store.prompts(key):
                assert np.array_equal(both.target(key, prompt), store.target(key, prompt))
    np.testing.assert_allclose(both.feature_mean, first.feature_mean)
    assert both.feature_scale == pytest.approx(first.feature_scale)
    assert complete(both, Jobs(read_records(data)))
    assert complete(both, Jobs(read_records(other)))
    both.verify()


def test_the_forecast_counts_the_masks_that_are_stored_anew(data, tmp_path):
    run(data, tmp_path / "store", FakeTeacher(), features=True)
    one = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*"))
    with writer.StoreWriter(tmp_path / "store", Store(tmp_path / "store").meta) as store:
        plan = survey(Jobs(read_records(other_boxes(data))), store.meta, store)
    assert plan.prompts == 10
    run(data.with_name("other"), tmp_path / "store", FakeTeacher(), features=True)
    both = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*"))
    assert both - one == pytest.approx(plan.size, abs=500)  # a header


def test_merging_into_a_store_keeps_its_masks(data, tmp_path):
    run(data, tmp_path / "one", FakeTeacher())
    run(other_boxes(data), tmp_path / "two", FakeTeacher())
    out = ["--out", str(tmp_path / "both")]
    assert teach.main(["--merge", str(tmp_path / "one"), *out]) == 0
    assert teach.main(["--merge", str(tmp_path / "two"), *out]) == 0
    one, two, both = (Store(tmp_path / name) for name in ("one", "two", "both"))
    for store in (one, two):
        for key in store:
            for prompt in store.prompts(key):
                assert np.array_equal(both.target(key, prompt), store.target(key, prompt))


def test_a_store_may_be_merged_into_itself_while_its_last_shard_grows(data, tmp_path, monkeypatch):
    small = functools.partial(writer.StoreWriter, shard_bytes=700)
    monkeypatch.setattr(merging, "StoreWriter", small)
    run(data, tmp_path / "whole", FakeTeacher())
    run(other_boxes(data), tmp_path / "others", FakeTeacher())
    merging.merge_stores([tmp_path / "whole"], tmp_path / "one")
    assert merging.merge_stores([tmp_path / "others", tmp_path / "one"], tmp_path / "one") == 10
    assert {len(Store(tmp_path / "one").prompts(f"images/{i}.png")) for i in range(10)} == {2}


def test_a_shard_without_images_is_done_and_merges(data, tmp_path, capsys):
    words = ["--data", str(data), "--backend", "mlx", "--workers", "1", "--out"]
    for shard in ("1/11", "11/11"):
        out = str(tmp_path / shard[:-3])
        assert teach.main([*words, out, "--shard", shard]) == 0
    assert "0 images" in capsys.readouterr().out
    parts = [str(tmp_path / "1"), str(tmp_path / "11")]
    assert teach.main(["--merge", *parts, "--out", str(tmp_path / "all")]) == 0
    assert list(Store(tmp_path / "all")) == ["images/0.png"]


@pytest.mark.parametrize(
    "preprocessor",
    [
        Preprocessor(image_size=64),
        Preprocessor(image_size=64, resize="crop", convention="transformers"),
        Preprocessor(image_size=48, convention="torchvision", crop_pct=0.9),
        Preprocessor(image_size=32, convention="sam", image_mean=(0.1, 0.2, 0.3)),
    ],
)
def test_a_students_preprocessing_may_be_given_whole(data, tmp_path, preprocessor):
    words = ["--data", str(data), "--backend", "mlx", "--workers", "1", "--grid", "4x4"]
    words += ["--preprocessing", json.dumps(preprocessor.to_dict()), "--limit", "2"]
    assert teach.main([*words, "--out", str(tmp_path / "store")]) == 0
    Store(tmp_path / "store").check(preprocessor.fingerprint(), (4, 4))


def test_an_image_that_changed_is_noticed(data, tmp_path):
    run(data, tmp_path / "store", FakeTeacher())
    Image.new("RGB", (40, 20), "white").save(data / "images/5.png")
    with pytest.raises(UserError, match=r"images/5\.png changed"):
        run(data, tmp_path / "store", FakeTeacher())


def test_a_store_of_another_teacher_is_not_continued(data, tmp_path):
    run(data, tmp_path / "store", FakeTeacher())
    with pytest.raises(UserError, match="another teacher"):
        run(data, tmp_path / "store", FakeTeacher(fingerprint="0" * 64))


def test_dry_run_writes_nothing(data, tmp_path, capsys):
    teacher = FakeTeacher()
    assert run(data, tmp_path / "store", teacher, dry_run=True) == 0
    assert not (tmp_path / "store").exists()
    assert not teacher.seen
    assert "10 images, 10 prompts on a 4x4 grid" in capsys.readouterr().out


def test_points_only_shows_sam_the_middle_and_keeps_the_key_of_the_box(data, tmp_path):
    teacher = FakeTeacher()
    run(data, tmp_path / "store", teacher, prompt="point")
    assert teacher.seen[0][1] == [(10, 10)]
    assert Store(tmp_path / "store").prompts("images/0.png") == ("box:0,0,20,20",)
    assert Store(tmp_path / "store").meta.prompt == "point"


def test_prompts_come_from_boxes_then_points_and_a_ready_mask_needs_no_sam(tmp_path):
    mask = rle_encode(np.ones((4, 4), dtype=bool))
    image = tmp_path / "a.png"
    (job,) = jobs_of(
        tmp_path,
        record(image, phrase(box=(0, 0, 2, 2), point=(1, 1)), phrase(point=(3, 3))),
        record(image, phrase(box=(0, 0, 2, 2))),
        record(image, phrase(box=(1, 1, 3, 3)), phrase(mask=mask)),
        record(image, phrase(box=(1, 1, 3, 3), mask=mask)),
    )
    assert job.prompts == {"box:0,0,2,2": (0, 0, 2, 2), "point:3,3": (3, 3)}
    assert job.ready == {"box:1,1,3,3": mask}


def test_a_phrase_with_nothing_to_show_sam_is_named_or_left_out(tmp_path):
    nothing = record(tmp_path / "a.png", phrase(point=(1, 1)), phrase(), name="r7")
    jobs = jobs_of(tmp_path, nothing, on_error="skip")
    assert [job.keys for job in jobs] == [("point:1,1",)] == [job.keys for job in jobs]
    (problem,) = jobs.problems
    assert (problem.record, "has no box, point or mask" in problem.problem) == ("r7", True)
    with pytest.raises(UserError, match="record r7: the phrase 'dog' has no box, point or mask"):
        list(jobs_of(tmp_path, nothing))


def test_an_image_outside_the_data_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="inside the data folder"):
        list(jobs_of(tmp_path, record(Path("/elsewhere/a.png"), phrase(point=(1, 1)))))


def ask(job: Job) -> labelling.Labelled:
    (result,) = Labeller(FakeTeacher(), Preprocessor(image_size=8), (2, 2))([job])
    assert isinstance(result, labelling.Labelled)
    return result


def test_ready_masks_are_pooled_as_they_are(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, 2:] = True
    job = Job("a.png", tmp_path / "a.png", {"point:0,0": (0, 0)}, {"box:2,0,4,4": rle_encode(mask)})
    result = ask(job)
    assert result.prompts == ("box:2,0,4,4", "point:0,0")
    np.testing.assert_allclose(result.coverage, [[0, 1, 0, 1], [0.25, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(result.iou, [1.0, 0.5])


def test_a_ready_mask_of_another_size_or_broken_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    small = rle_encode(np.ones((2, 2), dtype=bool))
    with pytest.raises(UserError, match=r"a\.png: expected masks of 4 x 4 pixels, got 2 x 2"):
        ask(Job("a.png", tmp_path / "a.png", {}, {"box:0,0,1,1": small}))
    with pytest.raises(UserError, match=r"a\.png: mask counts"):
        ask(Job("a.png", tmp_path / "a.png", {}, {"b": {"size": [4, 4], "counts": [1]}}))


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png: ") as caught:
        ask(Job("broken.png", path, {"point:0,0": (0, 0)}))
    assert "\n" not in str(caught.value)


def test_a_folder_can_be_verified_and_damage_is_found(data, tmp_path, capsys):
    run(data, tmp_path / "store", FakeTeacher())
    arguments = ["--out", str(tmp_path / "store"), "--verify", "--data", str(data)]
    assert teach.main(arguments) == 0
    assert "10 images verified" in capsys.readouterr().out
    (data / "images/4.png").write_bytes(b"x")
    assert teach.main(arguments) == 2
    assert "images/4.png: changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "no such data folder"),
        (["--data", "{data}", "--model", "m", "--grid", "4x4"], "drop those flags"),
        (["--verify"], "expected a SAM store"),
        (["--data", "{data}", "--preprocessing", "{{", "--grid", "4x4"], "expected JSON"),
        (["--data", "{data}", "--preprocessing", "[]"], "--preprocessing: expected a table"),
        (["--data", "{data}", "--preprocessing", '{{"image_size": 0}}'], "image_size >= 1"),
        (["--data", "{data}", "--preprocessing", "{{}}", "--resize", "pad"], "drop those flags"),
        (["--data", "{data}", "--backend", "mlx", "--device", "cpu"], "is for --backend torch"),
        (["--data", "{data}", "--match-thresh", "0.4"], "--match-thresh: is for --prompt auto"),
        (["--data", "{data}", "--prompt", "auto", "--match-thresh", "4"], "from 0 to 1"),
        (["--data", "{data}", "--shard", "auto"], "mlx.launch or mpirun, got no number"),
        (["--merge", "{data}"], "expected a SAM store"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_2(data, tmp_path, capsys, arguments, says):
    arguments = [a.format(data=data) for a in arguments]
    assert teach.main([*arguments, "--out", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grid", "8"],
        ["--shard", "3/2"],
        ["--shard", "all"],
        ["--limit", "0"],
        ["--prompt", "text"],
        [],
    ],
)
def test_flags_that_make_no_sense_say_so(data, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        teach.main([*arguments, "--out", str(tmp_path / "store")])
    assert caught.value.code == 2
    assert (
        "expected" in (said := capsys.readouterr().err)
        or "invalid choice" in said
        or ("--data is required" in said)
    )


def test_data_without_phrases_is_explained(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "a.png", "conversations": talk}))
    assert teach.main(["--data", str(tmp_path), "--out", str(tmp_path / "s")]) == 2
    assert "got none to label" in capsys.readouterr().err


def without_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "agevlm_mlx.sam.teacher", raising=False)
    monkeypatch.delitem(sys.modules, "agevlm_mlx.sam.torchvision_ops", raising=False)


def test_without_torch_the_torch_backend_names_the_extra_and_the_other(
    data, tmp_path, capsys, monkeypatch
):
    without_torch(monkeypatch)
    words = ["--data", str(data), "--out", str(tmp_path / "s"), "--backend", "torch"]
    assert teach.main(words) == 2
    error = capsys.readouterr().err
    assert 'run: pip install "agevlm-mlx[teacher]", or use --backend mlx' in error
    assert not (tmp_path / "s").exists()


def test_without_torch_mlx_serves(data, tmp_path, monkeypatch):
    monkeypatch.setattr(teach.importlib.util, "find_spec", lambda name: None)
    without_torch(monkeypatch)
    words = ["--data", str(data), "--out", str(tmp_path / "s"), "--limit", "2", "--workers", "1"]
    assert teach.main(words) == 0
    assert len(Store(tmp_path / "s")) == 2


@pytest.mark.parametrize(
    ("wanted", "device", "gpu", "missing", "chosen"),
    [
        ("auto", None, False, "", "torch"),
        ("auto", None, True, "", "mlx"),
        ("auto", None, False, "torchvision", "mlx"),
        ("auto", "cpu", True, "", "torch"),
        ("torch", None, True, "", "torch"),
        ("mlx", None, False, "", "mlx"),
    ],
)
def test_mlx_on_a_mac_or_without_torch_else_torch(
    monkeypatch, wanted, device, gpu, missing, chosen
):
    import mlx.core as mx

    monkeypatch.setattr(mx.metal, "is_available", lambda: gpu)
    monkeypatch.setattr(teach.importlib.util, "find_spec", lambda n: None if n == missing else n)
    assert teach.choose_backend(wanted, device) == chosen


def test_limit_and_shards_choose_images(data, tmp_path, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(teach, "teach", lambda jobs, *_, **__: chosen.append(jobs) or 0)
    base = ["--data", str(data), "--out", str(tmp_path / "s")]
    for extra in (["--limit", "3"], ["--shard", "1/3"], ["--shard", "3/3"]):
        assert teach.main([*base, *extra]) == 0
    assert [[job.key for job in jobs] for jobs in chosen] == [
        ["images/0.png", "images/1.png", "images/2.png"],
        ["images/0.png", "images/3.png", "images/6.png", "images/9.png"],
        ["images/2.png", "images/5.png", "images/8.png"],
    ]


def test_images_are_read_a_few_ahead_of_the_teacher(data, monkeypatch):
    taken = []
    jobs = Jobs(read_records(data))
    labeller = Labeller(FakeTeacher(batch_size=2), Preprocessor(image_size=32), (4, 4))

    def ask():
        for job in [*jobs] * 10:
            taken.append(job)
            yield job

    results = labelling.label_all(ask(), lambda: labeller, workers=1, batch_size=2)
    next(results)
    assert 2 <= len(taken) <= 2 + 2 * (2 + labelling.READERS)
    assert len(list(results)) == 99


def test_masks_of_large_pictures_are_made_for_a_few_at_a_time(data, tmp_path, monkeypatch):
    calls = []

    class Teacher(FakeTeacher):
        def label(self, images, prompts, **options):
            calls.append(len(images))
            return super().label(images, prompts, **options)

    run(data, tmp_path / "whole", FakeTeacher())
    for most, wanted in ((1, [1] * 10), (40 * 20 * 3, [3, 1, 3, 1, 2]), (10**6, [4, 4, 2])):
        calls.clear()
        monkeypatch.setattr(labelling, "MASK_BYTES", most)
        run(data, tmp_path / str(most), Teacher())
        assert calls == wanted
        assert contents(tmp_path / str(most)) == contents(tmp_path / "whole")


def test_shards_made_apart_merge_into_the_store_of_one_machine(data, tmp_path, capsys):
    run(data, tmp_path / "whole", FakeTeacher(), features=True)
    shards = []
    for k in range(3):
        preprocessor = Preprocessor(image_size=32)
        make = teach.MakeLabeller(preprocessor=preprocessor, grid=(4, 4), features=True)
        labeller = Labeller(FakeTeacher(), preprocessor, (4, 4), True)
        jobs = Jobs(read_records(data), every_image=True).part(k, 3)
        shards.append(tmp_path / f"shard{k}")
        teach.teach(jobs, make, shards[-1], labeller=labeller)
    assert [len(Store(shard)) for shard in shards] == [4, 3, 3]
    assert teach.main(["--merge", *map(str, shards), "--out", str(tmp_path / "merged")]) == 0
    assert "10 images from 3 stores" in capsys.readouterr().out
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    # In another order, and again into the same store: the same labels.
    again = ["--merge", *map(str, reversed(shards)), "--out", str(tmp_path / "merged")]
    assert teach.main(again) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_stores_that_do_not_fit_are_not_merged(data, tmp_path, capsys):
    run(data, tmp_path / "one", FakeTeacher())
    run(data, tmp_path / "other", FakeTeacher(fingerprint="1" * 64))
    stores = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert teach.main(["--merge", *stores, "--out", str(tmp_path / "no")]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_another_file_under_the_same_name_is_not_merged(data, tmp_path, capsys):
    run(data, tmp_path / "one", FakeTeacher())
    Image.new("RGB", (40, 20), "white").save(data / "images/7.png")
    run(data, tmp_path / "other", FakeTeacher())
    stores = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert teach.main(["--merge", *stores, "--out", str(tmp_path / "no")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "another file" in line]
    assert error.startswith(f"error: {tmp_path}/other: image images/7.png is another file")
    assert not (tmp_path / "no").exists()
    assert teach.main(["--merge", stores[0], "--out", str(tmp_path / "no")]) == 0
    assert teach.main(["--merge", stores[1], "--out", str(tmp_path / "no")]) == 2
    assert "image images/7.png is another file" in capsys.readouterr().err


def test_an_image_of_two_stores_gets_the_masks_of_both(data, tmp_path):
    run(data, tmp_path / "one", FakeTeacher(), features=True)
    text = (data / "data.jsonl").read_text().replace("[3, 0, 23, 20]", "[4, 0, 10, 10]")
    (data / "data.jsonl").write_text(text)
    run(data, tmp_path / "two", FakeTeacher(), features=True)
    stores = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert teach.main(["--merge", *stores, "--out", str(tmp_path / "both")]) == 0
    one, two, both = (Store(tmp_path / name) for name in ("one", "two", "both"))
    assert both.prompts("images/3.png") == ("box:3,0,23,20", "box:4,0,10,10")
    for store in (one, two):
        for key in store:
            for prompt in store.prompts(key):
                assert np.array_equal(both.target(key, prompt), store.target(key, prompt))


def test_a_merge_that_is_killed_continues(data, tmp_path, monkeypatch):
    jobs = Jobs(read_records(data))
    make = teach.MakeLabeller(preprocessor=Preprocessor(image_size=32), grid=(4, 4))
    shards = [tmp_path / "1", tmp_path / "2"]
    for k, shard in enumerate(shards):
        labeller = Labeller(FakeTeacher(), make.preprocessor, (4, 4))
        teach.teach(jobs.part(k, 2), make, shard, labeller=labeller)
    merging.merge_stores(shards, tmp_path / "whole")
    add, added = writer.StoreWriter.add, []

    def dying(self, *arguments, **options):
        if len(added) == 6:
            self.flush()
            self._lock.close()  # as the system does for a dead process
            monkeypatch.setattr(self, "close", lambda: None)
            raise RuntimeError("killed")
        added.append(arguments)
        add(self, *arguments, **options)

    monkeypatch.setattr(writer.StoreWriter, "add", dying)
    with pytest.raises(RuntimeError, match="killed"):
        merging.merge_stores(shards, tmp_path / "merged")
    monkeypatch.undo()
    assert len(Store(tmp_path / "merged")) == 6
    assert merging.merge_stores(shards, tmp_path / "merged") == 10
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_a_store_of_format_1_becomes_one_of_today(data, tmp_path):
    old_store(tmp_path / "old", range(6))
    fill(tmp_path / "new", range(6))
    assert teach.main(["--merge", str(tmp_path / "old"), "--out", str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "new")


def spoiled(data: Path) -> None:
    """Damage: an image cut off, one without a record that can be read, a box far outside."""
    path = data / "images/2.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    lines = (data / "data.jsonl").read_text().splitlines()
    lines = [line.replace("[5, 0, 25, 20]", "[5, 0, 99, 20]") for line in lines]
    lines[8:10] = ["{", "[]"]  # image 4
    (data / "data.jsonl").write_text("\n".join(lines))


def test_bad_images_and_records_stop_or_are_left_out_and_listed(data, tmp_path, capsys):
    good = (data / "images/2.png").read_bytes(), (data / "data.jsonl").read_text()
    spoiled(data)
    store = tmp_path / "store"
    words = ["--data", str(data), "--out", str(store), "--backend", "mlx", "--workers", "1"]
    assert teach.main(words) == 2
    assert "data.jsonl:9: malformed JSON" in capsys.readouterr().err
    words += ["--on-error", "skip"]
    assert teach.main(words) == 0
    said = capsys.readouterr().out
    assert f"4 left out, listed in {store}/bad_records.jsonl" in said
    bad = [json.loads(line) for line in (store / "bad_records.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in bad] == [
        f"{data}/data.jsonl:9",
        f"{data}/data.jsonl:10",
        f"{data}/images/2.png",
        f"{data}/images/5.png",
    ]
    assert "expected a box inside the image of 40 x 20 pixels" in bad[3]["problem"]
    assert list(Store(store)) == [f"images/{i}.png" for i in (0, 1, 3, 6, 7, 8, 9)]
    # A merged store has the list, too.
    assert teach.main(["--merge", str(store), "--out", str(tmp_path / "copy")]) == 0
    assert contents(tmp_path / "copy") == contents(store)
    # Mended: what was left out is labelled, and the list goes.
    (data / "images/2.png").write_bytes(good[0])
    (data / "data.jsonl").write_text(good[1])
    assert teach.main(words) == 0
    assert len(Store(store)) == 10
    assert not (store / "bad_records.jsonl").exists()


def test_pictures_in_rows_of_a_table_are_labelled_and_verified(data, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()][::2]
    for row in rows:
        row["image"] = {"bytes": (data / row["image"]).read_bytes(), "path": None}
    (tmp_path / "table").mkdir()
    path = tmp_path / "table/train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    teacher = FakeTeacher()
    run(tmp_path / "table", tmp_path / "store", teacher)
    run(data, tmp_path / "files", FakeTeacher())
    store, files = Store(tmp_path / "store"), Store(tmp_path / "files")
    assert list(store) == [f"train.parquet/{i}/image" for i in range(10)]
    for mine, its in zip(store, files, strict=True):
        assert store.sha256(mine) == files.sha256(its)
        for prompt in files.prompts(its):
            assert np.array_equal(store.target(mine, prompt), files.target(its, prompt))
    words = ["--out", str(tmp_path / "store"), "--verify", "--data", str(tmp_path / "table")]
    assert teach.main(words) == 0
    rows[3]["image"]["bytes"] = rows[4]["image"]["bytes"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert teach.main(words) == 2
    assert "train.parquet/3/image: changed" in capsys.readouterr().err


def test_a_disk_too_small_for_the_store_is_said_before_it_starts(data, tmp_path, monkeypatch):
    free = namedtuple("usage", "total used free")(10**9, 10**9, 900)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    teacher = FakeTeacher()
    with pytest.raises(UserError, match=r"about \d\.\d kB of free disk space, got 0\.9 kB; free"):
        run(data, tmp_path / "store", teacher)
    assert not teacher.seen


def test_the_forecast_is_the_size(data, tmp_path):
    for features in (False, True):
        out = tmp_path / f"store{features}"
        run(data, out, FakeTeacher(), features=features)
        plan = survey(Jobs(read_records(data)), Store(out).meta)
        assert (plan.total, plan.prompts) == (10, 10)
        shard = next(out.glob("shard-*")).stat().st_size
        assert shard == pytest.approx(plan.size, rel=0.15)  # ten images: the header counts


def test_a_store_is_complete_when_it_holds_every_prompt(data, tmp_path):
    jobs = Jobs(read_records(data))
    run(data, tmp_path / "store", FakeTeacher(interrupt_after=10**6))
    assert complete(Store(tmp_path / "store"), jobs)
    text = (data / "data.jsonl").read_text().replace("[3, 0, 23, 20]", "[4, 0, 10, 10]", 1)
    (data / "data.jsonl").write_text(text)
    assert not complete(Store(tmp_path / "store"), Jobs(read_records(data)))


@dataclass
class FakeLook:
    """The left half, the right half and the lower half of any image; three masks a point."""

    image: np.ndarray
    features: np.ndarray = field(default_factory=lambda: np.ones((4, 4, 2), np.float32))

    def candidates(self, points, *, min_iou, min_stability, offset=1.0):
        height, width = self.image.shape[:2]
        masks = np.zeros((3, height, width), bool)
        masks[0, :, : width // 2], masks[1, :, width // 2 :], masks[2, height // 2 :] = 1, 1, 1
        iou = np.array([0.9, 0.95, 0.92], np.float32)
        return Candidates(masks, iou, np.ones(3, np.float32))


class LookingTeacher(FakeTeacher):
    def look(self, image):
        self.seen.append(image.shape)
        return FakeLook(image)


def run_auto(data: Path, out: Path, teacher: FakeTeacher, **settings) -> int:
    preprocessor, automatic = Preprocessor(image_size=32), Automatic(points_per_side=4, **settings)
    make = teach.MakeLabeller(preprocessor=preprocessor, grid=(4, 4), automatic=automatic)
    labeller = Labeller(teacher, preprocessor, (4, 4), automatic=automatic)
    return teach.teach(Jobs(read_records(data), "auto"), make, out, labeller=labeller)


def test_automatic_masks_are_stored_under_the_phrases_own_keys(data, tmp_path, capsys):
    teacher = LookingTeacher()
    assert run_auto(data, tmp_path / "store", teacher) == 0
    assert len(teacher.seen) == 10
    store = Store(tmp_path / "store")
    assert store.meta.prompt.startswith("auto 4x4 points")
    # The box 0..20 of the 40 x 20 picture is its left half, 9..29 is no mask's own box.
    left = np.zeros((4, 4))
    left[1:3, :2] = 1
    np.testing.assert_allclose(store.target("images/0.png", "box:0,0,20,20").reshape(4, 4), left)
    assert store.iou("images/0.png", "box:0,0,20,20") == pytest.approx(0.9, abs=1e-3)
    assert not store.target("images/9.png", "box:9,0,29,20").any()
    assert store.iou("images/9.png", "box:9,0,29,20") == 0
    assert "no automatic mask fits 3 of 10 phrases" in capsys.readouterr().out
    again = LookingTeacher()
    run_auto(data, tmp_path / "store", again)
    assert not again.seen
    with pytest.raises(UserError, match=r"another prompt .*match 0\.5, this run has .*match 0\.6"):
        run_auto(data, tmp_path / "store", again, match_thresh=0.6)


@pytest.mark.parametrize(
    ("environment", "hosts", "place"),
    [
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "3"}, None, (1, 3)),
        ({"MLX_RANK": "1"}, [["127.0.0.1:5000"], ["127.0.0.1:5001"]], (2, 2)),
        ({"MLX_RANK": "0"}, "", (1, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, None, (4, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, None, (1, 2)),
    ],
)
def test_the_launcher_says_which_shard_is_whose(tmp_path, environment, hosts, place):
    if hosts is not None:
        (tmp_path / "hosts").write_text(json.dumps(hosts) if hosts else "")
        environment = {**environment, "MLX_HOSTFILE": str(tmp_path / "hosts")}
    assert launched(environment) == place


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MLX_RANK": "0"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"},
        {"MLX_RANK": "2", "MLX_WORLD_SIZE": "2"},
        {"MLX_RANK": "x", "MLX_WORLD_SIZE": "2"},
    ],
)
def test_without_a_launcher_a_shard_has_to_be_said(environment):
    with pytest.raises(UserError, match="pass --shard K/N"):
        launched(environment)


def test_each_process_of_a_launcher_writes_a_store_and_says_how_to_join_them(
    data, tmp_path, capsys, monkeypatch
):
    words = ["--data", str(data), "--out", str(tmp_path / "s"), "--backend", "mlx"]
    assert teach.main([*words, "--workers", "1"]) == 0
    for rank in range(2):
        monkeypatch.setenv("MLX_RANK", str(rank))
        monkeypatch.setenv("MLX_WORLD_SIZE", "2")
        assert teach.main([*words, "--workers", "1", "--shard", "auto"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].rpartition("agevlm teach ")[2]
    assert command == f"--merge {tmp_path}/s-1-of-2 {tmp_path}/s-2-of-2 --out {tmp_path}/s"
    whole = contents(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        path.unlink()
    assert teach.main(shlex.split(command)) == 0
    assert set(contents(tmp_path / "s")) == set(whole)
    assert list(Store(tmp_path / "s")) == [f"images/{i}.png" for i in range(10)]


@pytest.mark.e2e
def test_two_processes_at_once_make_the_store_of_one(data, tmp_path):
    (tmp_path / "hosts").write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    words = [sys.executable, "-m", "agevlm_mlx.teach", "--data", str(data), "--backend", "mlx"]
    words += ["--workers", "1", "--features", "--out"]
    runs = [
        subprocess.Popen(
            [*words, str(tmp_path / "s"), "--shard", "auto"],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts")},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(runs):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert f"s-{rank + 1}-of-2: shard {rank + 1} of 2; when all are made" in said
    shards = [str(tmp_path / f"s-{k}-of-2") for k in (1, 2)]
    assert teach.main(["--merge", *shards, "--out", str(tmp_path / "s")]) == 0
    assert teach.main([*words[3:], str(tmp_path / "one")]) == 0
    one, joined = Store(tmp_path / "one"), Store(tmp_path / "s")
    assert list(one) == list(joined)
    for key in one:
        mine, its = one.rows(key), joined.rows(key)
        np.testing.assert_allclose(mine["coverage"], its["coverage"], atol=0.02)
        np.testing.assert_allclose(mine["features"], its["features"], atol=0.02)


def test_progress_on_a_pipe_is_a_line_every_ten_seconds(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 111.0, 112.0, 113.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = progress.Progress(23)
    for done in (1, 5, 12, 13, 23):
        line.show(done)
    assert capsys.readouterr().err.splitlines() == [
        "images 12/23  1.0/s  11 s left",
        "images 23/23  1.7/s",
    ]


def test_progress_gives_hours_and_says_nothing_of_what_was_quick(capsys, monkeypatch):
    clock = iter([0.0, 11.0, 60.0, 0.0, 1.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) + 100)
    line = progress.Progress(100_000)
    for done in (1, 12, 61):
        line.show(done)
    assert [said.split("  ")[2] for said in capsys.readouterr().err.splitlines()] == [
        "27 h 46 min left",
        "27 h 45 min left",
    ]
    line = progress.Progress(3, brief=True)
    for done in (1, 2, 3):
        line.show(done)
    assert capsys.readouterr().err == ""


def labeller_without_interrupts() -> Labeller:
    """As a worker process builds it, which Ctrl-C must not reach even while it starts."""
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return Labeller(FakeTeacher(), Preprocessor(image_size=32), (4, 4))


@pytest.mark.e2e
def test_ctrl_c_waits_until_the_workers_are_started(data):
    found = labelling.label_all(
        Jobs(read_records(data)), labeller_without_interrupts, workers=2, batch_size=2
    )
    assert len(list(found)) == 10
    with pytest.raises(KeyboardInterrupt), labelling._later_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_store_that_cannot_be_a_folder_is_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    words = ["--data", str(data), "--backend", "mlx", "--workers", "1"]
    assert teach.main([*words, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file: expected a folder to write to, got: File exists; choose another" in error
    assert error.count("\n") == 1


def test_a_bad_box_or_mask_costs_the_others_of_its_picture_nothing(data, tmp_path, capsys):
    small = rle_encode(np.ones((2, 2), dtype=bool))
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    lines[4]["phrases"][0]["box"] = [2, 0, 99, 20]  # one of two of image 2
    lines[7]["phrases"][0].update(box=[1, 1, 3, 3], mask=small)  # one of two of image 3
    for line in lines[8:10]:  # both of image 4
        line["phrases"][0]["box"] = [2, 0, 99, 20]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--data", str(data), "--out", str(tmp_path / "s"), "--backend", "mlx"]
    words += ["--workers", "1", "--on-error", "skip"]
    for _ in range(2):
        assert teach.main(words) == 0
        assert "3 left out, listed in" in capsys.readouterr().out
        text = (tmp_path / "s/bad_records.jsonl").read_text()
        bad = [json.loads(line) for line in text.splitlines()]
        places = [entry["where"].rpartition("/")[2] for entry in bad]
        assert places == ["2.png", "3.png", "4.png"]
        assert "got [2, 0, 99, 20]" in bad[0]["problem"]
        assert "expected masks of 20 x 40 pixels" in bad[1]["problem"]
        store = Store(tmp_path / "s")
        assert store.prompts("images/2.png") == ("box:2,0,22,20",)
        assert store.prompts("images/3.png") == ("box:3,0,23,20",)
        assert "images/4.png" not in store
        left_out = [entry["where"] for entry in bad]
        assert complete(store, Jobs(read_records(data)), left_out)
        assert not complete(store, Jobs(read_records(data)))


def test_a_store_without_images_takes_other_settings(data, tmp_path):
    with writer.StoreWriter(tmp_path / "s", replace(META, prompt="point")):
        pass
    run(data, tmp_path / "s", FakeTeacher())
    store = Store(tmp_path / "s")
    assert (store.meta.prompt, len(store)) == ("box", 10)
    with pytest.raises(UserError, match="another teacher"):
        writer.StoreWriter(tmp_path / "s", META)


def test_a_merge_that_was_stopped_needs_room_for_the_rest_only(data, tmp_path, monkeypatch):
    run(data, tmp_path / "one", FakeTeacher())
    words = ["--merge", str(tmp_path / "one"), "--out", str(tmp_path / "all")]
    size = room.disk(tmp_path / "one")
    free = namedtuple("usage", "total used free")(10**9, 10**9, int(1.5 * size))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    assert teach.main(words) == 2  # the images, and once more while they become a shard
    monkeypatch.undo()
    assert teach.main(words) == 0
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    assert teach.main(words) == 0


def test_pictures_whose_phrases_have_masks_are_not_shown_to_the_teacher(data, tmp_path):
    mask = rle_encode(np.ones((20, 40), dtype=bool))
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for line in lines[:14]:
        line["phrases"][0]["mask"] = mask
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    teacher, looking = FakeTeacher(), LookingTeacher()
    run(data, tmp_path / "store", teacher)
    assert [prompts for _, prompts in teacher.seen] == [[(i, 0, i + 20, 20)] for i in (7, 8, 9)]
    run_auto(data, tmp_path / "auto", looking)
    assert len(looking.seen) == 3
    for store in (Store(tmp_path / "store"), Store(tmp_path / "auto")):
        assert len(store) == 10
        assert store.iou("images/0.png", "box:0,0,20,20") == 1
    run(data, tmp_path / "features", whole := FakeTeacher(), features=True)
    assert len(whole.seen) == 10


@pytest.mark.parametrize("value", [np.nan, 1e5])
@pytest.mark.parametrize("where", ["iou", "features"])
def test_what_is_no_number_is_not_stored(data, tmp_path, value, where):
    class Broken(FakeTeacher):
        def label(self, images, prompts, *, features=False):
            answers = super().label(images, prompts, features=features)
            for image, answer in zip(images, answers, strict=True):
                if image[0, 0, 0] == 3:
                    getattr(answer, where).flat[1 if where == "features" else 0] = value
            return answers

    with pytest.raises(UserError, match=r"images/3\.png: expected finite numbers up to 65504"):
        run(data, tmp_path / "store", Broken(), features=True)
    preprocessor = Preprocessor(image_size=32)
    labeller = Labeller(Broken(), preprocessor, (4, 4), True, on_error="skip")
    make = teach.MakeLabeller(preprocessor=preprocessor, grid=(4, 4), features=True)
    jobs = Jobs(read_records(data), every_image=True)
    assert teach.teach(jobs, make, tmp_path / "store", labeller=labeller) == 0
    store = Store(tmp_path / "store")
    assert len(store) == 9
    assert np.isfinite(store.feature_mean).all()
