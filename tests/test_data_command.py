"""`agevlm data check` and `agevlm data convert`: what is counted, and what the status says."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.data.counting import Student, count
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.report import Labels, Picture, Pictures, Texts
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.data_command import _misfits, main
from agevlm_mlx.sam.index import StoreMeta, prompt_key
from agevlm_mlx.sam.store import Store, StoreWriter, image_sha256
from agevlm_mlx.sam.targets import rle_encode

Write = Callable[..., Path]


def item(number: int, image: str, question: str = "Is there a dog?", answer: str = "Yes", **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "image": image, "conversations": turns, **more}


def dog(**place: Any) -> dict[str, Any]:
    return {"text": "dog", "turn": 0, "start": 11, "end": 14, **place}


def mask(height: int, width: int, side: int) -> dict[str, Any]:
    bits = np.zeros((height, width), bool)
    bits[:side, :side] = True
    return rle_encode(bits)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(items, pictures={"a.png": (w, h)})`` -> a JSONL file beside those pictures."""

    def make(*items: Any, pictures: dict[str, tuple[int, int]] | None = None) -> Path:
        for k, (name, size) in enumerate((pictures or {"a.png": (64, 48)}).items()):
            Image.new("RGB", size, (k, 90, 30)).save(tmp_path / name)
        lines = [one if isinstance(one, str) else json.dumps(one) for one in items]
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


@pytest.fixture(scope="module")
def student() -> Student:
    texts = ["Is there a dog? Yes", "What is it? A cat"] * 50
    return Student(build_tokenizer(texts, 300), 16, Preprocessor(), (8, 8))


def report(path: Path, student: Student, **options: Any):
    return count("data", read_records(path, on_error="skip"), student, **options)


def test_good_data_is_counted(write, student):
    path = write(
        item(1, "a.png", phrases=[dog(box=[8, 8, 40, 40], mask=mask(48, 64, 30))]),
        item(2, "a.png", answer="No, none", kind="presence"),
        item(3, "b.png", "What is it?", "A cat"),
        pictures={"a.png": (64, 48), "b.png": (200, 100)},
    )
    found = report(path, student)
    assert (found.records, found.images) == (3, 2)
    assert found.kinds == {"chat": 2, "presence": 1}
    assert not found.fails
    assert not list(found.warnings())
    assert found.advice == "training can start"
    texts = found.texts
    assert (texts.records, texts.turns, texts.answers, texts.yes, texts.no) == (3, 6, 3, 1, 1)
    assert sum(texts.lengths.values()) == 3
    assert texts.too_long == 0
    assert (found.phrases.total, found.phrases.masks, found.phrases.guided_records) == (1, 1, 1)
    assert found.phrases.frequent == {"dog": 1}
    assert str(found.pictures.smallest).startswith("64x48")
    assert str(found.pictures.largest).startswith("200x100")


BAD_PHRASES = [
    (dog(box=[0, 0, 65, 48]), "outside"),
    (dog(point=[10, 49]), "outside"),
    (dog(mask=mask(48, 48, 9)), "48x48"),
    (dog(mask={"size": [48, 64], "counts": [1, 2]}), "dog"),
]


@pytest.mark.parametrize(("phrase", "says"), BAD_PHRASES)
@pytest.mark.parametrize("decode", [True, False])
def test_phrases_that_do_not_fit_their_picture_fail(write, student, phrase, says, decode):
    found = report(write(item(1, "a.png", phrases=[phrase])), student, decode=decode)
    assert found.fails
    assert found.phrases.misplaced == 1
    (problem,) = found.problems
    assert says in problem.problem
    assert problem.record == "1"


def test_phrases_of_the_wrong_size_warn(write, student):
    # 64x48 on a grid of 8x8 cells of 8 px each.
    found = report(
        write(
            item(1, "a.png", phrases=[dog(mask=mask(48, 64, 5))]),
            item(2, "a.png", "Is there a dog? ", phrases=[dog(mask=mask(48, 64, 64))]),
            item(3, "a.png", "Is there a dog?? ", phrases=[dog(box=[0, 0, 5, 5])]),
            item(4, "a.png", "Is there a dog??? ", phrases=[dog(box=[0, 0, 64, 48])]),
        ),
        student,
    )
    assert (found.phrases.too_small, found.phrases.too_large) == (2, 1)
    assert not found.fails
    assert "first look at the 1 warning" in found.advice


def test_a_text_longer_than_the_language_model_takes_warns(write, student):
    found = report(write(item(1, "a.png", "Is there a dog? " * 9), item(2, "a.png")), student)
    assert found.texts.too_long == 1
    assert not found.fails


def test_texts_whose_phrases_cannot_be_found_fail(write, student):
    path = write(item(1, "a.png"), item(2, "a.png", "is there a dog?", "yes"))
    tokenizer = build_tokenizer(["a"], 300)
    tokenizer.chat_template = student.tokenizer.chat_template.replace(
        "['content']", "['content']|lower"
    )
    records = read_records(path, on_error="skip")
    assert not count("data", records, student).texts.unaligned
    found = count("data", records, replace(student, tokenizer=tokenizer))
    assert found.texts.unaligned == 1
    assert found.fails
    (problem,) = found.problems
    assert problem.record == "1"
    assert "chat template" in problem.problem


def test_copies_of_texts_and_of_files_are_found(write, student, tmp_path):
    Image.new("RGB", (64, 48), (0, 90, 30)).save(tmp_path / "c.png")  # as `write` paints a.png
    path = write(
        item(1, "a.png"),
        item(2, "a.png"),
        item(3, "b.png"),
        item(4, "a.png", kind="other"),
        item(5, "c.png"),
        pictures={"a.png": (64, 48), "b.png": (64, 48)},
    )
    found = report(path, student)
    assert found.texts.copies == 1
    assert found.pictures.copies == 1
    assert [Path(p).name for p in found.pictures.copied[0]] == ["a.png", "c.png"]
    assert report(path, student, decode=False).pictures.copies is None


def test_three_copies_are_two_too_many(write, student, tmp_path):
    for name in ("b.png", "c.png"):
        Image.new("RGB", (64, 48), (0, 90, 30)).save(tmp_path / name)
    path = write(item(1, "a.png"), item(2, "b.png"), item(3, "c.png"))
    found = report(path, student)
    assert found.pictures.copies == 2
    assert {Path(first).name for first, _ in found.pictures.copied} == {"a.png"}


def test_a_limit_looks_at_images_all_over_the_data(write, student):
    pictures = {f"{k}.png": (8, 8) for k in range(10)}
    path = write(*(item(k, f"{k}.png") for k in range(10)), pictures=pictures)
    found = report(path, student, most=3)
    assert (found.looked_at, found.pictures.opened, found.texts.records) == (3, 3, 3)
    assert found.records == 10


def test_a_turned_photo_is_measured_upright_by_its_header_too(write, student, tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.jpg", exif=exif)
    path = write(item(1, "p.jpg", phrases=[dog(box=[0, 0, 20, 40])]))
    for decode in (True, False):
        found = report(path, student, decode=decode)
        assert not found.fails, found.problems
        assert str(found.pictures.smallest).startswith("20x40")


def test_odd_shapes_are_shown_the_oddest_first():
    pictures = Pictures()
    for k, size in enumerate([(100, 100), (500, 100), (4, 4), (100, 9000), (15, 20), (16, 16)]):
        pictures.add(Picture(str(k), *size))
    assert pictures.odd == 4
    assert [p.path for p in pictures.oddest] == ["3", "2", "1", "4"]


def test_the_histogram_counts_every_text_once():
    texts = Texts()
    texts.lengths.update([1, 2, 3, 4, 5, 8, 9, 100])
    assert texts.histogram() == [
        (1, 1),
        (2, 1),
        (4, 2),
        (8, 2),
        (16, 1),
        (32, 0),
        (64, 0),
        (128, 1),
    ]
    assert (texts.at(0.5), texts.at(1.0)) == (4, 100)
    assert Texts().histogram() == []
    assert Texts().at(0.5) == 0


# --- a teacher's store -------------------------------------------------------------------------

BOX = [8.0, 8.0, 40.0, 40.0]


@pytest.fixture
def labelled(write: Write, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``labelled(boxes)`` -> data with phrases in `BOX` and another box, a store with `boxes`."""

    def make(boxes: list[list[float]], sha256: str | None = None) -> tuple[Path, Path]:
        phrases = [dog(box=BOX), dog(box=[0.0, 0.0, 20.0, 20.0])]
        path = write(item(1, "a.png", phrases=phrases))
        meta = StoreMeta(
            teacher="t",
            preprocessing=Preprocessor().fingerprint(),
            grid=(8, 8),
            feature_channels=0,
            prompt="box",
        )
        store = tmp_path / "store"
        with StoreWriter(store, meta) as writer:
            writer.add(
                "a.png",
                sha256=sha256 or image_sha256(tmp_path / "a.png"),
                prompts=[prompt_key(tuple(box)) for box in boxes],
                coverage=np.full((len(boxes), 64), 0.2, np.float32),
                iou=np.ones(len(boxes), np.float32),
                features=None,
            )
        return path, store

    return make


def test_a_store_that_fits(labelled, student):
    path, store = labelled([BOX, [0.0, 0.0, 20.0, 20.0]])
    found = report(path, student, store=Store(store))
    assert found.labels.fit
    assert not found.fails
    # Sizes are those of the teacher's masks: 0.2 of 64 cells.
    assert (found.phrases.too_small, found.phrases.too_large) == (0, 0)


def test_a_store_that_lacks_prompts_or_was_made_for_other_files_fails(labelled, student):
    path, store = labelled([BOX], sha256="0" * 64)
    found = report(path, student, store=Store(store))
    assert (found.labels.missing_prompts, found.labels.other_files) == (1, 1)
    assert found.fails
    assert "agevlm teach" in found.advice
    assert json.loads(json.dumps(found.to_dict()))["store"]["missing_prompts"] == 1
    assert "  1 box or point without a mask" in list(found.lines())
    Image.new("RGB", (64, 48)).save(path.parent / "new.png")
    with path.open("a") as file:
        file.write(json.dumps(item(2, "new.png", phrases=[dog(box=BOX)])) + "\n")
    assert report(path, student, store=Store(store)).labels.missing_images == 1


def test_a_phrase_without_a_place_fails_where_a_store_is_used(labelled, student):
    path, store = labelled([BOX, [0.0, 0.0, 20.0, 20.0]])
    one = json.loads(path.read_text())
    one["phrases"].append(dog())
    path.write_text(json.dumps(one))
    assert not report(path, student).fails
    found = report(path, student, store=Store(store))
    (problem,) = found.problems
    assert "no box, point or mask" in problem.problem
    assert found.fails


def test_a_store_of_another_grid_does_not_fit_the_model(labelled, student):
    _, path = labelled([BOX])
    store = Store(path)
    assert _misfits(store, student) == []
    (problem,) = _misfits(store, replace(student, grid=(4, 4)))
    assert "4x4" in problem
    labels = Labels(str(path), problems=[problem])
    assert not labels.fit


# --- the command -------------------------------------------------------------------------------


def spoilt(folder: Path) -> Path:
    """A folder full of bad things, among some that only look bad."""
    write_scenes(folder, 6, 3)
    images = folder / "images"
    good = np.asarray(Image.open(images / "000000.png"))
    Image.fromarray(good).convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(np.full((40, 30), 40_000, np.uint16)).save(images / "deep.png")
    Image.fromarray(good).convert("P").save(images / "palette.png")
    Image.new("RGB", (900, 12), "orange").save(images / "long.png")
    whole = (images / "cmyk.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (images / "text.png").write_text("this is no picture")
    shutil.copy(images / "cmyk.jpg", images / "copy.jpg")
    names = ["cmyk.jpg", "deep.png", "palette.png", "long.png", "cut.jpg", "text.png", "copy.jpg"]
    items: list[Any] = json.loads((folder / "llava.json").read_text())
    for name in ("llava.json", "captions.json", "instances.json"):
        (folder / name).unlink()
    items += [item(900 + k, name) for k, name in enumerate(names)]
    items += [
        item(910, "gone.png"),
        item(911, "gone.png"),
        item(912, "../../etc/passwd"),
        item(913, "000000.png", phrases=[dog(box=[0, 0, 9999, 9])]),
        item(914, "000001.png", phrases=[dog(mask=mask(9, 9, 4))]),
        item(915, "000001.png", phrases=[dog(start=3) | {"end": 6}]),
        item(916, "palette.png", "It is  鸟 ", "Ja 🐦\u202e " + "very " * 300, kind="long"),
        item(917, "palette.png", "again", "again"),
        item(918, "palette.png", "again", "again"),
        {"id": "919", "image": "000001.png", "conversations": []},
        {"id": "920", "conversations": [{"from": "human", "value": "a"}]},
        item(921, "COCO_val2014_000000000042.jpg"),
    ]
    lines = [json.dumps(one) for one in items]
    (folder / "records.jsonl").write_text("\n".join([*lines, "{not json", '{"id": 1', "[]"]))
    return folder


@pytest.mark.e2e
def test_check_of_scenes_and_of_a_folder_full_of_bad_things(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_scenes(tmp_path / "good", 6, 3)
    assert main(["check", "good", "--json", "good.json"]) == 0
    said = capsys.readouterr()
    assert "6 images" in said.out
    assert "training can start" in said.out.splitlines()[-1]
    good = json.loads(Path("good.json").read_text())
    assert good["fails"] is False
    assert Image.open("data-check.png").format == "PNG"

    folder = spoilt(tmp_path / "bad")
    status = main(["check", "bad", "--json", "b.json", "--bad", "b.jsonl", "--sheet", "b.png"])
    said = capsys.readouterr()
    assert status == 1
    assert 'data.on_error="skip"' in said.out.splitlines()[-1]
    assert "Traceback" not in said.out + said.err
    found = json.loads(Path("b.json").read_text())
    problems = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
    assert found["fails"]
    assert found["left_out"] == {
        "bad": len(problems),
        "excluded": 0,
        "text_only": 1,
    }
    by_record = {problem["record"] for problem in problems}
    bad = {"904", "905", "910", "911", "912", "913", "914", "915", "919"}
    assert bad <= by_record, bad - by_record
    assert not by_record & {"900", "901", "902", "903", "906", "916", "917", "918"}
    assert sum(problem["record"] is None for problem in problems) == 3
    assert found["pictures"]["broken"] == 2
    assert found["pictures"]["copies"] == 1
    assert found["pictures"]["missing"] == 2
    assert found["pictures"]["odd"] == 1
    assert found["texts"]["copies"] == good["texts"]["copies"] + 1
    assert found["phrases"]["misplaced"] == 2
    with Image.open("b.png") as page:
        assert page.width > 1000
    assert main(["check", str(folder), "--no-sheet", "--fast"]) == 1
    assert "opened (not decoded)" in capsys.readouterr().out


@pytest.mark.e2e
def test_check_of_nothing_to_train_on(write, capsys, tmp_path):
    path = write(item(1, "gone.png"), "no json")
    bad = tmp_path / "bad.jsonl"
    assert main(["check", str(path), "--bad", str(bad), "--no-sheet"]) == 1
    assert "nothing to train on" in capsys.readouterr().out
    assert len(bad.read_text().splitlines()) == 2
    path = write(item(1, "COCO_val2014_000000310196.jpg"))
    Image.new("RGB", (9, 9)).save(tmp_path / "COCO_val2014_000000310196.jpg")
    assert main(["check", str(path), "--no-sheet"]) == 1
    assert main(["check", str(path), "--no-sheet", "--exclude"]) == 0
    assert main(["check", str(tmp_path / "nowhere"), "--no-sheet"]) == 2
    assert main(["check", str(path), "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_convert_writes_what_is_read_back_the_same(tmp_path, capsys):
    assert write_scenes(tmp_path / "scenes", 3, 3)
    out = tmp_path / "all.jsonl"
    assert main(["convert", str(tmp_path / "scenes"), "--out", str(out)]) == 0
    before, after = read_records(tmp_path / "scenes"), read_records(out)
    assert list(after) == list(before)
    assert len(after)
    assert json.loads(out.read_text().splitlines()[0])["image"] == "scenes/images/000000.png"
    assert main(["convert", str(tmp_path / "scenes"), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_convert_refuses_a_place_from_which_images_are_not_below(tmp_path, capsys):
    assert write_scenes(tmp_path / "scenes", 1, 3)
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "x.jsonl"
    assert main(["convert", str(tmp_path / "scenes"), "--out", str(out)]) == 2
    assert "folder above" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_convert_leaves_out_bad_records_when_told_to(write, capsys, tmp_path):
    path = write(item(1, "a.png"), item(2, "gone.png"))
    out = tmp_path / "new" / "x.jsonl"
    assert main(["convert", str(path), "--out", str(out)]) == 2  # no such folder
    out = tmp_path / "x.jsonl"
    assert main(["convert", str(path), "--out", str(out)]) == 2
    assert main(["convert", str(path), "--out", str(out), "--on-error", "skip"]) == 0
    assert len(read_records(out)) == 1
    assert len((tmp_path / "bad_records.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["check", "convert"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"agevlm data {command}" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--bad", "--sheet"])
def test_check_writes_nothing_into_the_data(write, tmp_path, capsys, option):
    path = write(item(1, "a.png"))
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "there.json")
    inside, data = str(tmp_path / "sub" / "x.jsonl"), str(path)
    (tmp_path / "sub").mkdir()
    for target, of in ((inside, str(tmp_path)), (data, data), (str(tmp_path / "link"), data)):
        assert main(["check", of, "--fast", option, target]) == 2
        assert "Traceback" not in (said := capsys.readouterr().err)
        assert "expected a file" in said
    assert path.read_bytes() == before
    assert (tmp_path / "link").is_symlink()


def test_check_may_write_what_is_no_data_into_the_folder(write, tmp_path, capsys):
    write(item(1, "a.png"))
    bad, sheet = str(tmp_path / "bad_records.jsonl"), str(tmp_path / "data-check.png")
    for _ in range(2):
        assert main(["check", str(tmp_path), "--fast", "--bad", bad, "--sheet", sheet]) == 0
