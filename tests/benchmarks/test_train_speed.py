"""The scripts that measure training run on miniatures; no time is judged."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script says how many threads there are; no other test is to hear it."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
def test_torch_and_ours_compute_the_same_loss_and_are_timed(tmp_path, capsys):
    script, out = _load("benchmarks/train_against_torch.py"), tmp_path / "torch.json"
    assert script.main(["--tiny", "--trials", "2", "--json", str(out)]) == 0
    told = json.loads(out.read_text())["measured"]
    assert told["losses"]["torch"] == pytest.approx(told["losses"]["ours"], rel=1e-4)
    names = ["torch", "ours, concat", "ours, cross", "ours, cross, guided"]
    assert list(told["programs"]) == names
    assert all(len(p["step"]["trials"]) == 2 for p in told["programs"].values())
    assert "| ours, concat |" in capsys.readouterr().out


@pytest.mark.parity
def test_torch_and_ours_move_the_parameters_alike():
    script = _load("benchmarks/train_against_torch.py")
    text, vision = script.TINY_TEXT, script.TINY_VISION
    model = script.ours("concat", text, vision)
    batch = script.random_batch(model, 2, 16)
    other = script.copied(model, text, vision)
    begin = {name: np.array(v) for name, v in script.named_parameters(model).items()}
    script.TorchStep(other, batch, lr=1e-3)()
    script.TrainingStep(model, batch, script.Losses(), lr=1e-3)()
    theirs = {name: value.detach().numpy() for name, value in other.state_dict().items()}
    for name, value in script.named_parameters(model).items():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding alone
        wanted = theirs[name]
        if name.endswith("patch_embedding.weight"):
            wanted = wanted.transpose(0, 2, 3, 1)
        moved, wanted = np.array(value) - begin[name], wanted - begin[name]
        # Adam's first step is lr times the gradient's sign, where the gradient is not rounding.
        same = np.abs(moved - wanted) < 1e-5
        assert same.mean() > 0.98, name
        assert np.abs(wanted).max() > 0


@pytest.mark.parity
def test_another_model_is_not_timed(monkeypatch, capsys):
    script = _load("benchmarks/train_against_torch.py")
    monkeypatch.setattr(script, "rotate", lambda x, cos, sin: x)  # no positions
    assert script.main(["--tiny", "--trials", "1"]) == 2
    assert "not the same model" in capsys.readouterr().err


@pytest.mark.parity
def test_mlx_vlm_trains_the_same_tokens_and_is_timed(tmp_path, capsys):
    script, out = _load("benchmarks/train_against_mlx_vlm.py"), tmp_path / "mlx_vlm.json"
    assert script.main(["--tiny", "--trials", "1", "--json", str(out)]) == 0
    told = json.loads(out.read_text())["measured"]
    programs = told["programs"]
    assert list(programs) == [
        "mlx-vlm, SmolVLM", "ours, concat", "ours, cross", "ours, cross, guided",
    ]  # fmt: skip
    # An output layer of its own is all that theirs has more.
    theirs, ours = (programs[name]["parameters"] for name in ("mlx-vlm, SmolVLM", "ours, concat"))
    head = script.TINY_TEXT["vocab_size"] * script.TINY_TEXT["hidden_size"]
    assert theirs == ours + head
    assert all(p["peak_memory"]["median"] > 0 for p in programs.values())
    assert set(told["as_installed"]) == {"one image", "two images"}
    assert "| ours, concat |" in capsys.readouterr().out


@pytest.mark.parity
def test_the_mended_model_of_mlx_vlm_is_causal():
    script = _load("benchmarks/train_against_mlx_vlm.py")
    mx = script.mx
    model = script.smolvlm(script.Causal, script.TINY_TEXT, script.TINY_VISION)
    ids = np.append(np.full(4, 299), np.arange(9) + 1)[None]
    changed = ids.copy()
    changed[0, -1] = 0
    pixels, mask = mx.random.normal((1, 1, 3, 64, 64)), mx.ones(ids.shape, mx.int32)
    before, after = (model(mx.array(i), pixels, mask).logits[0] for i in (ids, changed))
    assert mx.array_equal(before[:-1], after[:-1])
    assert not mx.array_equal(before[-1], after[-1])


@pytest.mark.parity
def test_examples_for_mlx_vlm_supervise_our_tokens():
    script = _load("benchmarks/train_against_mlx_vlm.py")
    model = script.ours("concat", script.TINY_TEXT, script.TINY_VISION)
    batch = script.random_batch(model, 2, 16)
    (group,) = batch.groups
    for row, example in enumerate(script.examples(batch, 4, 299)):
        ids, supervised = example["input_ids"][0], example["completion_mask"][0]
        assert len(ids) == len(supervised) == 4 + 17
        assert (ids == 299).sum() == 4
        # Unshifted: what is supervised is the label of the position before.
        labels = group.labels[row, 0][group.loss_mask[row, 0] > 0]
        assert (ids[supervised > 0] == labels % 299).all()


@pytest.mark.e2e
def test_parts_of_a_step_add_up_to_it(tmp_path, capsys):
    script, out = _load("scripts/measure_training.py"), tmp_path / "training.json"
    args = ["--tiny", "--only", "smollm2", "--trials", "1", "--tokens", "16", "--json", str(out)]
    assert script.main(args) == 0
    told = json.loads(out.read_text())["measured"]
    assert len(told) == 2
    for case in told.values():
        total = sum(part["median"] for part in case["parts"].values())
        assert total == pytest.approx(case["step"]["median"], rel=1e-3)
        assert case["guided_rows"] == 4
        assert case["peak_memory"]["guided"] > 0
    printed = capsys.readouterr().out
    assert "| attention maps and loss |" in printed
    assert "python scripts/measure_training.py --tiny" in printed


def test_parts_and_what_is_trained():
    script = _load("scripts/measure_training.py")
    (case, frozen) = script.smollm2_cases(1, 16, True)
    assert list(script.nested(case)) == [
        "language model", "next-token loss", "cross-attention", "attention maps and loss",
        "projector and encoder", "clipping and optimiser",
    ]  # fmt: skip
    assert not any(name.startswith("vision_tower.") for name in frozen.trained)
    assert case.unguided.attention.weight == 0


@pytest.mark.e2e
def test_the_embedded_recipe_is_measured(tmp_path):
    script, out = _load("scripts/measure_training.py"), tmp_path / "training.json"
    args = ["--tiny", "--only", "scenes", "--images", "12", "--trials", "1", "--json", str(out)]
    assert script.main(args) == 0
    (case,) = json.loads(out.read_text())["measured"].values()
    assert case["guided_rows"] > 0
    assert case["data"]["median"] > 0


def test_bad_input_is_one_line(tmp_path, capsys):
    script = _load("scripts/measure_training.py")
    assert script.main(["--trials", "0"]) == 2
    assert script.main(["--json", str(tmp_path / "no" / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
