"""The comparison with mlx-vlm runs both programs on the same task; no time is judged."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

pytestmark = pytest.mark.parity

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "against_mlx_vlm.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with sizes that take a second."""
    spec = importlib.util.spec_from_file_location("against_mlx_vlm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 300,
    }
    vision = {
        **module.shapes.VISION,
        "image_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    monkeypatch.setattr(module, "TEXT", {**module.TEXT, **small})
    monkeypatch.setattr(module, "IMAGE_TOKEN", 290)
    monkeypatch.setattr(module, "LENGTHS", (2, 4))
    monkeypatch.setattr(module, "TARGETS", {3: 2.0})
    monkeypatch.setattr(module.shapes, "VISION", vision)
    original = module.shapes.random_model
    monkeypatch.setattr(
        module.shapes, "random_model", lambda text, fusion: original(text, vision, fusion)
    )
    return module


def test_both_programs_are_measured_side_by_side(script, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    args = ["--image-tokens", "3", "5", "--decode-at", "3", "--trials", "1", "--json", str(out)]
    assert script.main(args) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    first = told["measured"]["first_token"]
    assert first.keys() == {"3", "5"}
    assert first["3"]["times_sooner"]["ours, own projector"]["than"] == "SmolVLM"
    assert told["measured"]["decode"]["3"].keys() == {
        "text only (mlx-lm)", "ours", "SmolVLM", "ours, built like mllama", "mllama",
    }  # fmt: skip
    assert told["measured"]["decode"]["3"]["mllama"].keys() == {"1-2", "3-4"}
    assert "mlx-vlm" in told["versions"]
    assert "| 3: ours, own projector | SmolVLM |" in printed
    assert " met |" in printed or " MISSED |" in printed


def test_the_language_models_have_the_same_sizes(script):
    comparison = script.Comparison(1)
    ours, theirs = comparison.text, comparison.smolvlm.model.language_model
    assert len(ours.layers) == len(theirs.layers)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes = [lm.layers[0].self_attn[name].weight.shape for lm in (ours, theirs)]
        assert shapes[0] == shapes[1]
    assert ours.layers[0].mlp.up_proj.weight.shape == theirs.layers[0].mlp.up_proj.weight.shape
    assert theirs.lm_head.weight.shape == ours.model.embed_tokens.weight.shape
    looking = comparison.like_mllama.model.looking_layers
    layers = comparison.mllama.model.language_model.model.layers
    assert len(layers) == len(ours.layers) + len(looking)
    assert sum("cross_attn" in layer for layer in layers) == len(looking)


def test_smolvlm_reads_every_image_token_and_its_cache_is_rewound(script):
    comparison = script.Comparison(1)
    features = mx.random.normal((5, 64))
    cache = make_prompt_cache(comparison.smolvlm.model.language_model)
    comparison.smolvlm.prefill(features, comparison.ids, cache)
    assert cache[0].offset == 5 + comparison.ids.size
    measure = comparison.smolvlm.decode(features, comparison.ids)
    assert [len(measure()), len(measure())] == [4, 4]


def test_the_same_connector_on_both_sides_gives_the_same_tokens(script):
    comparison = script.Comparison(1)
    z_vis = script.shapes.encoder_output(comparison.same.model, 5)
    # One weight, two orders of a block's patches: compare what each makes of equal patches.
    weight = comparison.same.model.multi_modal_projector.linear.weight
    comparison.smolvlm.model.connector.modality_projection.proj.weight = weight
    even = mx.broadcast_to(z_vis[:, :1], z_vis.shape)
    ours = script.shapes.project(comparison.same.model, even)[0]
    assert mx.allclose(comparison.smolvlm.connect(even), ours, atol=1e-5)


def test_bad_input_is_one_line(script, tmp_path, capsys):
    assert script.main(["--trials", "0"]) == 2
    assert script.main(["--json", str(tmp_path / "no" / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
