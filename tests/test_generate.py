"""`agevlm generate` and the functions behind it, on a tiny random model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PIL import Image

import agevlm_mlx
from agevlm_mlx import generate, generation, stream_generate
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.records import Turn
from agevlm_mlx.evaluation import overlay
from agevlm_mlx.evaluation.words import content_words, word_maps
from agevlm_mlx.generate import main
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.weights import Loaded, load, save_model

TEXTS = [
    "Is there a dog or a hot dog in the image?",
    "Where is the car?",
    "A dog and a car. Top left",
]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_config: Callable[..., ModelConfig]
) -> Path:
    mx.random.seed(3)
    tokenizer = chat.build_tokenizer(TEXTS * 3, 400)
    model = AgeVLM(tiny_model_config(400, gate_init=1.0))
    out = tmp_path_factory.mktemp("models") / "tiny"
    save_model(out, model, TokenizerWrapper(tokenizer), Preprocessor(image_size=16), "# tiny\n")
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(folder: Path, *args: str | Path) -> int:
    return main(["--model", str(folder), *map(str, args)])


# --- in Python -------------------------------------------------------------------------------


def test_the_answer_is_the_pieces_put_together(loaded, photo):
    parts = (loaded.model, loaded.tokenizer, loaded.preprocessor, "Where is the car?")
    pieces = list(stream_generate(*parts, photo, max_tokens=6))
    text = generate(*parts, photo, max_tokens=6)
    assert "".join(p.text for p in pieces).strip() == text
    assert pieces[-1].generation_tokens <= 6
    assert generate(*parts, Image.open(photo), max_tokens=6) == text
    assert generate(*parts, [photo], max_tokens=6) == text
    assert generate(*parts, photo.read_bytes(), max_tokens=6) == text


def test_greedy_is_the_argmax_of_the_full_forward(loaded, photo):
    model, tokenizer = loaded.model, loaded.tokenizer
    pixels = mx.array(loaded.preprocessor(Image.open(photo))[0])[None]
    ids = chat.prompt_ids(tokenizer, (Turn("user", "Where is the car?"),))
    said = []
    for _ in range(5):
        logits = model(mx.array([ids + said]), cache=model.see(pixels))
        said.append(int(mx.argmax(logits[0, -1])))
        if said[-1] in tokenizer.eos_token_ids:
            said.pop()
            break
    text = generate(model, tokenizer, loaded.preprocessor, "Where is the car?", photo, max_tokens=5)
    assert text == tokenizer.decode(said).strip()


def test_sampling_is_repeatable_with_a_seed(loaded, photo):
    parts = (loaded.model, loaded.tokenizer, loaded.preprocessor, "Where is the car?", photo)
    mx.disable_compile()  # mlx-lm compiles its samplers, which takes seconds on a CPU
    try:
        texts = [generate(*parts, max_tokens=8, temp=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    finally:
        mx.enable_compile()
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_conversation_and_a_text_without_image(loaded, photo):
    parts = (loaded.model, loaded.tokenizer, loaded.preprocessor)
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "No"), Turn("user", "Where is it?"))
    answers = {
        generate(*parts, turns, photo, max_tokens=8),
        generate(*parts, "Where is it?", photo, max_tokens=8),
        generate(*parts, "Where is it?", max_tokens=8),
    }
    assert len(answers) >= 2


def test_the_functions_are_the_packages_own():
    import_module("agevlm_mlx.generate")  # the command's module has the name of the function
    assert agevlm_mlx.generate is generation.generate
    assert agevlm_mlx.stream_generate is generation.stream_generate
    assert agevlm_mlx.batch_generate is generation.batch_generate


def test_the_function_wins_over_the_module_in_any_order():
    for first in ("import agevlm_mlx.generate", "from agevlm_mlx import generate"):
        code = (
            f"{first}; from agevlm_mlx.generate import main; import agevlm_mlx; "
            "from agevlm_mlx import generate; assert generate is agevlm_mlx.generate; "
            "assert generate.__module__ == 'agevlm_mlx.generation', generate"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- words and their maps ----------------------------------------------------------------------


def test_content_words_name_something():
    words = [w for w, _, _ in content_words("Is there a dog's bed in the T-shirt image? Yes, 2 x.")]
    assert words == ["dog's", "bed", "T-shirt"]
    text = "Where is the café?"
    assert [text[a:b] for _, a, b in content_words(text)] == ["café"]
    assert list(content_words("")) == []


def test_each_word_gets_the_mean_over_its_tokens(loaded, photo):
    model, tokenizer = loaded.model, loaded.tokenizer
    pixels = mx.array(loaded.preprocessor(Image.open(photo))[0])[None]
    turns = (Turn("user", "Where is the car?"), Turn("assistant", "A dog and a car."))
    words = word_maps(model, tokenizer, model.see(pixels), turns)
    assert [(w.word, w.role) for w in words] == [
        ("car", "user"),
        ("dog", "assistant"),
        ("car", "assistant"),
    ]
    ids = list(chat.encode(tokenizer, turns, ()).ids)
    spelled = [tokenizer.decode([i]).strip() for i in ids]
    asked, answered = (n for n, word in enumerate(spelled) if word == "car")

    def look(*columns: int) -> np.ndarray:
        rows, cols = mx.zeros(len(columns), mx.int32), mx.array(columns)
        _, maps = model.attend(mx.array([ids]), model.see(pixels), rows, cols)
        return np.array(maps.mean((0, 1, 2)))

    assert words[0].maps[0].shape == model.grid
    assert np.allclose(words[0].maps[0].ravel(), look(asked), atol=1e-5)
    assert np.allclose(words[2].maps[0].ravel(), look(answered - 1, answered), atol=1e-5)


def test_no_word_no_map(loaded, photo):
    pixels = mx.array(loaded.preprocessor(Image.open(photo))[0])[None]
    turns = (Turn("user", "What is it?"), Turn("assistant", ""))
    assert word_maps(loaded.model, loaded.tokenizer, loaded.model.see(pixels), turns) == []


# --- the command -------------------------------------------------------------------------------


def test_the_answer_is_printed_and_the_maps_are_written(folder, photo, tmp_path, capsys):
    out = tmp_path / "maps.png"
    prompt = "Is there a dog?"
    assert run(folder, "--image", photo, "--prompt", prompt, "--max-tokens", "4",
               "--attention", out) == 0  # fmt: skip
    printed = capsys.readouterr()
    assert printed.out.endswith("\n")
    assert str(out) in printed.err
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width >= 2 * overlay.TILE


def test_json_has_the_answer_and_where_each_word_looked(folder, photo, capsys):
    assert run(folder, "--image", photo, "--image", photo, "--prompt", "Where is the car?",
               "--max-tokens", "4", "--json") == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == [str(photo)] * 2
    assert said["generation_tokens"] <= 4
    car = said["words"][0]
    assert (car["word"], car["role"]) == ("car", "user")
    assert 0 <= car["peak"][0] <= 60
    assert 0 <= car["peak"][1] <= 40
    assert len(car["on_image"]) == 2
    assert 0 < sum(car["on_image"]) <= 1.001


def test_the_place_a_word_looks_at_is_lit_in_the_picture(folder, tmp_path, monkeypatch):
    # A wide grey picture, padded to a square: the word looks at one cell near its right end.
    wide = tmp_path / "wide.png"
    Image.new("RGB", (160, 80), (128, 128, 128)).save(wide)
    seen = Preprocessor(image_size=16).geometry(160, 80)

    def attend(self, ids, cache, rows, cols, heads=None):
        Gh, Gw = self.grid
        maps = np.zeros((rows.size, 2, 4, Gh, Gw), np.float32)
        row, column = Gh // 2, Gw - 1
        maps[..., row, column] = 1
        return None, mx.array(maps.reshape(rows.size, 2, 4, -1))

    monkeypatch.setattr(AgeVLM, "attend", attend)
    out = tmp_path / "maps.png"
    assert run(folder, "--image", wide, "--prompt", "Where is the dog?", "--max-tokens", "1",
               "--attention", out) == 0  # fmt: skip
    Gh, Gw = load(folder).model.grid
    centre = np.array([[(Gw - 0.5) * 16 / Gw, (Gh // 2 + 0.5) * 16 / Gh]])
    x, y = seen.to_source(centre)[0]
    sheet = np.asarray(Image.open(out).convert("L"), float)
    k = overlay.TILE / 160
    top = next(n for n, row in enumerate(sheet) if abs(row[25] - 128) < 2)  # the plain picture
    left = 20 + overlay.TILE + 14  # the next tile
    tile = sheet[top : top + round(80 * k), left : left + overlay.TILE]
    here = tile[round(y * k) - 3 : round(y * k) + 4, round(x * k) - 3 : round(x * k) + 4].mean()
    assert here > tile[:, : overlay.TILE // 2].mean() + 40


def test_a_failure_leaves_an_older_picture_alone(folder, photo, tmp_path, monkeypatch):
    out = tmp_path / "maps.png"
    out.write_bytes(b"older")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(folder, "--image", photo, "--prompt", "A dog?", "--max-tokens", "2",
               "--attention", out) == 2  # fmt: skip
    assert out.read_bytes() == b"older"
    assert {p.name for p in tmp_path.iterdir()} == {"maps.png", "photo.png"}


def bad(tmp_path: Path, photo: Path) -> dict[str, list[str]]:
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    image = ["--image", str(photo)]
    ask = ["--prompt", "A dog?"]
    return {
        "missing image": ["--image", str(tmp_path / "no.png"), *ask],
        "truncated image": ["--image", str(tmp_path / "broken.png"), *ask],
        "text as image": ["--image", str(tmp_path / "text.png"), *ask],
        "missing model": ["--model", str(tmp_path / "no"), *image, *ask],
        "empty model": ["--model", str(tmp_path / "empty"), *image, *ask],
        "empty prompt": [*image, "--prompt", " "],
        "no tokens": [*image, *ask, "--max-tokens", "0"],
        "temperature": [*image, *ask, "--temp", "-1"],
        "top p": [*image, *ask, "--top-p", "0"],
        "maps without image": [*ask, "--attention", str(tmp_path / "a.png")],
        "maps into nowhere": [*image, *ask, "--attention", str(tmp_path / "no" / "a.png")],
        "maps as a folder": [*image, *ask, "--attention", str(tmp_path / "empty")],
        "maps of another kind": [*image, *ask, "--attention", str(tmp_path / "a.doc")],
    }


@pytest.mark.parametrize(
    "case",
    ["missing image", "truncated image", "text as image", "missing model", "empty model",
     "empty prompt", "no tokens", "temperature", "top p", "maps without image",
     "maps into nowhere", "maps as a folder", "maps of another kind"],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(case, folder, photo, tmp_path, capsys):
    args = bad(tmp_path, photo)[case]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = [] if "--model" in args else ["--model", str(folder)]
    assert main([*model, *args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(
    tmp_path, photo, monkeypatch
):
    monkeypatch.setattr("agevlm_mlx.weights.load", lambda *_: pytest.fail("loaded"))
    missing = tmp_path / "no" / "a.png"
    args = ["--image", str(photo), "--prompt", "A dog?", "--attention", str(missing)]
    assert main(args) == 2
