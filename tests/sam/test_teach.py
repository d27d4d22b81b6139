"""`agevlm teach` with a teacher that needs no torch: it fills the box it is shown."""

import json
import sys
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
from agevlm_mlx.sam import labelling
from agevlm_mlx.sam.jobs import Job, Jobs
from agevlm_mlx.sam.labelling import Labeller
from agevlm_mlx.sam.store import Store, file_sha256
from agevlm_mlx.sam.targets import rle_encode


@dataclass(frozen=True)
class Labels:
    masks: np.ndarray
    iou: np.ndarray
    features: np.ndarray | None


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
    assert [prompts for _, prompts in teacher.seen] == [[(4, 0, 10, 10), (3, 0, 23, 20)]]
    assert Store(tmp_path / "store").prompts("images/3.png") == ("box:4,0,10,10", "box:3,0,23,20")


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


def test_a_phrase_with_nothing_to_show_sam_is_named(tmp_path):
    with pytest.raises(UserError, match="record r7: the phrase 'dog' has no box, point or mask"):
        list(jobs_of(tmp_path, record(tmp_path / "a.png", phrase(point=(1, 1)), phrase(), name="r7")))


def test_an_image_outside_the_data_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="inside the data folder"):
        list(jobs_of(tmp_path, record(Path("/elsewhere/a.png"), phrase(point=(1, 1)))))


def ask(job: Job) -> labelling.Labelled:
    (result,) = Labeller(FakeTeacher(), Preprocessor(image_size=8), (2, 2))([job])
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
    [["--grid", "8"], ["--shard", "3/2"], ["--shard", "all"], ["--limit", "0"], ["--prompt", "text"], []],
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


def test_without_torch_the_extra_is_named(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "agevlm_mlx.sam.teacher", raising=False)
    monkeypatch.delitem(sys.modules, "agevlm_mlx.sam.torchvision_ops", raising=False)
    assert teach.main(["--data", str(data), "--out", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert 'torch is not installed; run: pip install "agevlm-mlx[teacher]"' in error
    assert not (tmp_path / "s").exists()


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


