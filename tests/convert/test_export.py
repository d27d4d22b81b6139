"""`agevlm-convert export`: the bundled source and the folder, without mlx-vlm."""

import ast
import hashlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from agevlm_mlx.config import read_json
from agevlm_mlx.models.projector import PROJECTORS
from agevlm_mlx.models.vision import VISION_ENCODERS
from agevlm_mlx.weights import load, read_weights, shipped
from convert import bundle, export
from convert.__main__ import main

ALLOWED = {"mlx", "mlx_lm", "mlx_vlm", "numpy", "PIL", "transformers", *sys.stdlib_module_names}


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Run the source of a model file; its classes."""
    # Every model file registers its cache class with mlx-lm.
    monkeypatch.setattr(mlx_lm_cache, "VisionCache", mlx_lm_cache.VisionCache)  # pyright: ignore

    def run(text: str) -> types.ModuleType:
        module = types.ModuleType("custom_model")
        exec(compile(text, export.MODEL_FILE, "exec"), module.__dict__)
        return module

    return run


def exported(out: Path, *more: str) -> int:
    where = ["--model", str(shipped("model")), "--mlx-path", str(out)]
    return main(["export", "--to", "mlx-vlm", *where, *more])


@pytest.mark.parametrize("kind", VISION_ENCODERS)
def test_the_source_of_any_encoder_stands_alone(kind: str, python: Any):
    text = export.model_source(kind, "mlp")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] in ALLOWED
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
    module = python(text)
    assert list(module.VISION_ENCODERS) == [kind]
    assert module.VISION_ENCODERS[kind][1].__name__ == VISION_ENCODERS[kind][1].__name__  # pyright: ignore
    assert set(export._EXPORTED) <= set(vars(module))


@pytest.mark.parametrize("projector", PROJECTORS)
def test_only_the_projector_in_use_is_in_the_source(projector: str, python: Any):
    module = python(export.model_source("agevlm_vit", projector))
    assert list(module.PROJECTORS) == [projector]
    others = {c.__name__ for name, c in PROJECTORS.items() if name != projector}
    assert not others & set(vars(module))


def test_the_folder_holds_model_source_and_its_hash(tmp_path: Path, capsys: Any):
    assert exported(tmp_path / "out") == 0
    index = read_json(shipped("model") / "model.safetensors.index.json")
    assert f"{len(index['weight_map'])} tensors" in capsys.readouterr().out
    text = (tmp_path / "out" / export.MODEL_FILE).read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in card
    assert "trust_remote_code" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_file"] == export.MODEL_FILE
    before, after = read_weights(shipped("model")), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_exported_model_gives_our_logits(tmp_path: Path, python: Any):
    assert exported(tmp_path / "out") == 0
    module = python((tmp_path / "out" / export.MODEL_FILE).read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = module.Model(module.ModelConfig.from_dict(config | {"audio_config": {}}))
    weights = read_weights(tmp_path / "out")
    teacher = {"sam_head.weight": mx.zeros((2, 2))}
    kept = model.sanitize(model.sanitize({**weights, **teacher}))
    assert kept.keys() == weights.keys() == dict(tree_flatten(model.parameters())).keys()
    model.load_weights(list(kept.items()))
    ours = load(shipped("model")).model
    ids = mx.array([[1, 40, 300, 2]])
    pixels = mx.random.normal((1, 128, 128, 3), key=mx.random.key(0))
    assert np.array_equal(model(ids), ours(ids))
    cache = model.make_cache()
    shown = mx.array([True])
    logits = model.look_and_read(ids, cache, model.encode_image(pixels), shown)
    assert np.array_equal(logits, ours(ids, ours.see(pixels)))
    assert not any(entry.is_trimmable() for entry in cache if entry.vision is not None)
    # The second row of a batch has no image, whatever stands in its place.
    rows = [entry.to_batch([0, 0]) for entry in model.make_cache()]
    z_img = mx.repeat(model.encode_image(pixels), 2, axis=0)
    both = model.look_and_read(mx.repeat(ids, 2, axis=0), rows, z_img, mx.array([True, False]))
    assert np.allclose(both, np.concatenate([logits, ours(ids)]), atol=1e-4)


def test_our_own_commands_read_an_exported_folder(tmp_path: Path):
    assert exported(tmp_path / "out") == 0
    again, original = load(tmp_path / "out"), load(shipped("model"))
    ids = mx.array([[5, 9, 200, 17]])
    assert mx.array_equal(again.model(ids), original.model(ids))


def test_the_tokenizer_adds_nothing_to_the_chat_template(python: Any):
    class Tokenizer:
        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return options

        def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, Any]:
            return options

    tokenizer = Tokenizer()
    found = python(export.model_source("agevlm_vit", "mlp"))._plain_tokenizer(tokenizer)
    assert found("a", add_special_tokens=True, padding=True) == {
        "add_special_tokens": False,
        "padding": True,
    }
    assert found.apply_chat_template([], tokenize=False, enable_thinking=False) == {
        "tokenize": False
    }
    assert found.apply_chat_template([], enable_thinking=True) == {"enable_thinking": True}
    assert type(found).__name__ == "Tokenizer"


def test_dry_run_and_bad_arguments_write_nothing(tmp_path: Path, capsys: Any):
    assert exported(tmp_path / "out", "--dry-run") == 0
    assert "nothing written" in capsys.readouterr().out
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    for arguments, message in (
        (["--to", "mlx-vlm", "--mlx-path", str(full)], "already there"),
        (["--to", "gguf", "--mlx-path", str(tmp_path / "out")], "expected mlx-vlm, got 'gguf'"),
        (
            ["--to", "mlx-vlm", "--model", str(other), "--mlx-path", str(tmp_path / "out")],
            "expected model_type 'agevlm', got 'llama'",
        ),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "other"]
    assert [p.name for p in full.iterdir()] == ["note.txt"]


def test_names_that_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "small_package"
    package.mkdir()
    files = {
        "__init__.py": "",
        "one.py": "def _size(x):\n    return x + 1\n\n\ndef first(x):\n    return _size(x)\n",
        "two.py": "import math as first\n\n\ndef _size(x):\n    return first.floor(x) * 10\n",
        "unused.py": "raise RuntimeError\n",
        "registry.py": (
            "from . import one, two, unused\nfrom .one import first as start\n\n"
            "#: Kept.\nTABLE = {\n    'one': (one.first, start),\n    'two': two._size,\n"
            "    'unused': unused.nothing,\n}\nSEEN = []\nSEEN.append(TABLE)\nunrelated = 5\n"
        ),
    }
    for name, text in files.items():
        (package / name).write_text(text)
    entry = tmp_path / "entry.py"
    entry.write_text(
        "from small_package.registry import SEEN, TABLE\n"
        "from small_package.two import _size as measure\n\n\n"
        "def first(x):\n    return measure(TABLE['one'][1](x)), len(SEEN)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bundle, "OWN", "small_package")
    text = bundle.bundle(entry, {"TABLE": "one"}, "Two lines.\nOf header.", ["first"])
    found: dict[str, Any] = {}
    exec(text, found)
    assert found["first"](2.5) == (30, 1)  # what a module does with its names happens, too
    assert "#: Kept." in text
    assert "unrelated" not in text
    assert "two._size" not in text
    assert "nothing" not in text
