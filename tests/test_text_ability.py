"""What a language model still writes after it has learned to look: the script that measures it."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx import weights
from agevlm_mlx.config import read_json
from agevlm_mlx.models.graft import build_language_model

ROOT = Path(__file__).parents[1]
# transformers imports torchvision, if it is there.
pytestmark = pytest.mark.usefixtures("torchvision")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts/measure_text_ability.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parts(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model that sees, and the language model in it as a folder of its own."""
    folder = tmp_path / "lm"
    loaded = weights.load(tiny_checkpoint)
    text_config = read_json(tiny_checkpoint / "config.json")["text_config"]
    lm: Any = build_language_model(text_config)
    own = dict(tree_flatten(loaded.model.language_model.parameters()))
    wanted = [name for name, _ in tree_flatten(lm.parameters())]
    loaded.tokenizer.save_pretrained(str(folder))
    mx.save_safetensors(str(folder / "model.safetensors"), {n: own[n] for n in wanted})
    (folder / "config.json").write_text(json.dumps(text_config))
    return tiny_checkpoint, folder


def test_a_frozen_language_model_reads_the_same_bit_for_bit(script, parts, capsys):
    model, lm = parts
    assert script.main(["--model", str(model), "--lm", str(lm), "--max-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "(+0.00%)" in said
    assert "the same, bit for bit; largest difference 0," in said
    answers = re.findall(r"  (?:before|after ) (.*)\n", said)
    assert len(answers) == 2 * len(script.QUESTIONS)
    assert answers[::2] == answers[1::2]


def test_a_changed_one_is_told(script, parts, tmp_path, capsys):
    model, lm = parts
    changed = weights.load(model).model
    layer: Any = changed.layers[1]
    layer.mlp.up_proj.weight = layer.mlp.up_proj.weight + 0.05
    before = script.own_language_model(str(lm), mx.float32)
    ids = [*range(5, 5 + script.WINDOW + 1), 7]
    reading = script.compare(before, changed, ids)
    assert reading.tokens == len(ids) - 2  # two parts
    assert reading.difference > 0
    logits = [before(mx.array(ids[i : i + script.WINDOW])[None])[0] for i in (0, script.WINDOW)]
    nll = 0.0
    for start, part in zip((0, script.WINDOW), logits, strict=True):
        for t, label in enumerate(ids[start + 1 : start + script.WINDOW]):
            nll += (mx.logsumexp(part[t]) - part[t, label]).item()
    assert reading.before == pytest.approx(nll / reading.tokens, rel=1e-4)
    assert f"perplexity {math.exp(reading.before):.3f} before" in script.report(reading)
    assert "not the same" in script.report(reading)
    short = tmp_path / "short.txt"
    short.write_text("")
    args = ["--model", str(model), "--lm", str(lm), "--text", str(short)]
    assert script.main(args) == 2
    assert "--text" in capsys.readouterr().err
