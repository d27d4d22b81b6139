"""The teacher's labels that a run opens or has made, with a real teacher on small pictures."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from PIL import Image

from agevlm_mlx import teach
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.store import Store
from agevlm_mlx.training import labels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "data", 4, 3, "train")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def teacher_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        words = [word for word in command[3:] if word != "--end-with-stdin"]
        status = teach.main([*words, "--backend=mlx", "--workers=1"])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(labels.subprocess, "run", run)


def labelling(
    preprocessor: Preprocessor,
    *,
    teach: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    said: list[str] | None = None,
    prompt: Literal["box", "point", "auto"] = "box",
) -> labels.Labelling:
    data = SimpleNamespace(teach=teach, on_error=on_error, prompt=prompt)
    recipe: Any = SimpleNamespace(data=data)
    say = print if said is None else said.append
    return labels.Labelling(recipe, preprocessor, (4, 4), teach, say)


def opened(own: labels.Labelling, data: Path, features: bool = False) -> Store:
    records = read_records(data, on_error=own.recipe.data.on_error)
    store = own.open("store", data.with_name("store"), data, records, features)
    assert store is not None
    return store


@pytest.mark.parametrize(
    ("preprocessor", "short"),
    [
        (Preprocessor(image_size=32, resize="crop"), True),
        (Preprocessor(image_size=32, image_mean=(0.1, 0.2, 0.3), resample="bilinear"), True),
        (Preprocessor(image_size=32, convention="transformers"), False),
        (Preprocessor(image_size=32, resize="crop", crop_pct=0.9), False),
        (Preprocessor(image_size=32, convention="torchvision", crop_pct=0.95), False),
        (Preprocessor(image_size=32, convention="sam"), False),
    ],
)
def test_what_teaching_makes_is_what_the_run_takes(data: Path, preprocessor, short: bool):
    assert len(opened(labelling(preprocessor, teach=True), data)) == 4
    command = labelling(preprocessor)._command(data.with_name("other"), data, False)
    assert ("--image-size=32" in command) == short
    assert any(word.startswith("--preprocessing=") for word in command) != short


@pytest.mark.parametrize("prompt", ["point", "auto"])
def test_the_teacher_is_shown_what_the_recipe_says(data: Path, prompt: Literal["point", "auto"]):
    opened(labelling(Preprocessor(image_size=32), teach=True), data)
    with pytest.raises(UserError, match=f"data.prompt = '{prompt}', got those of .*'box'"):
        opened(labelling(Preprocessor(image_size=32), teach=True, prompt=prompt), data)
    shutil.rmtree(data.with_name("store"))
    store = opened(labelling(Preprocessor(image_size=32), teach=True, prompt=prompt), data)
    assert store.meta.prompt.startswith(prompt)


def test_images_that_the_teacher_left_out_are_not_wanted_of_it_again(data: Path):
    path = sorted((data / "images").iterdir())[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="does not hold labels"):
        opened(labelling(Preprocessor(image_size=32), on_error="skip"), data)
    own = labelling(Preprocessor(image_size=32), teach=True, on_error="skip", said=(said := []))
    assert len(opened(own, data)) == 3
    said.clear()
    own = labelling(Preprocessor(image_size=32), on_error="skip", said=said)
    assert len(opened(own, data)) == 3
    assert said == [
        f"{data.with_name('store')}: 1 left out by the teacher, listed in "
        f"{data.with_name('store')}/bad_records.jsonl"
    ]
    with pytest.raises(UserError, match="does not hold labels"):
        opened(labelling(Preprocessor(image_size=32)), data)  # stops at a bad image
    # Another image that is missing is still wanted.
    text = (data.with_name("store") / "bad_records.jsonl").read_text()
    other = text.replace(path.name, "elsewhere.png")
    (data.with_name("store") / "bad_records.jsonl").write_text(other)
    with pytest.raises(UserError, match="does not hold labels"):
        opened(labelling(Preprocessor(image_size=32), on_error="skip"), data)


def test_one_picture_among_many_that_changed_after_teaching_is_noticed(tmp_path: Path):
    data = tmp_path / "data"
    write_scenes(data, 40, 3, "train")
    opened(labelling(Preprocessor(image_size=32), teach=True), data)
    path = sorted((data / "images").iterdir())[7]
    Image.new("RGB", (128, 128), "white").save(path)
    with pytest.raises(UserError, match="is another file than the one labelled"):
        opened(labelling(Preprocessor(image_size=32)), data)


def add_a_phrase(data: Path) -> None:
    """A box that no store has yet."""
    path = data / "llava.json"
    path.write_text(re.sub(r'"box": \[[^]]*\]', '"box": [1, 2, 3, 4]', path.read_text(), count=1))


def test_a_store_of_points_is_completed_with_points(data: Path):
    words = ["--data", str(data), "--out", str(data.with_name("store")), "--prompt", "point"]
    words += ["--image-size", "32", "--grid", "4x4", "--backend", "mlx", "--workers", "1"]
    assert teach.main(words) == 0
    add_a_phrase(data)
    with pytest.raises(UserError, match="--prompt=point"):
        opened(labelling(Preprocessor(image_size=32)), data)
    assert opened(labelling(Preprocessor(image_size=32), teach=True), data).meta.prompt == "point"


def test_a_phrase_with_nothing_does_not_stop_a_run_that_skips(data: Path):
    path = data / "llava.json"
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if line.count('"box"') > 1)
    lines[number] = re.sub(r', "box": \[[^]]*\]', "", lines[number], count=1)
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="ended with exit status 2"):
        opened(labelling(Preprocessor(image_size=32), teach=True), data)
    own = labelling(Preprocessor(image_size=32), teach=True, on_error="skip")
    assert len(opened(own, data)) == 4


@pytest.mark.chaos
def test_the_teacher_ends_with_the_run_that_started_it(data: Path):
    script = (
        "import sys, subprocess\n"
        "from agevlm_mlx.training import labels\n"
        "from agevlm_mlx.data.image import Preprocessor\n"
        "code = 'import sys, threading, time; from agevlm_mlx import teach;'\n"
        "code += 'threading.Thread(target=teach._end_with_stdin, daemon=True).start();'\n"
        "code += 'print(1, flush=True); time.sleep(60)'\n"
        "class Sleepy(labels.Labelling):\n"
        "    def _command(self, *_):\n"
        "        return [sys.executable, '-c', code]\n"
        "Sleepy(None, Preprocessor(), (4, 4), True, print)._run(None, None, False)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"1\n"  # the teacher, which has the same standard output
    run.kill()
    run.wait(timeout=30)
    start = time.monotonic()
    assert run.stdout.read() == b""  # the end, when the teacher's copy is closed as well
    assert time.monotonic() - start < 30
