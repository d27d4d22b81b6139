"""`agevlm benchmark`: what it counts, what it predicts, what it writes. No time is judged."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from agevlm_mlx.benchmark import main
from agevlm_mlx.benchmarking import measure, report, shapes, timing, traffic
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.cross_attention import Recorder

ROOT = Path(__file__).parents[1]
SMALL = ["--prompt-tokens", "4", "--generation-tokens", "3", "--batch-size", "2", "--trials", "1"]
#: Parameters of the tiny model that one token reads (tests/conftest.py has its sizes): embedding,
#: three layers (q, k, v, o, MLP, norms), the last norm; and of two cross-attention blocks all but
#: what makes the image's keys and values.
TINY_TEXT = 100 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
TINY_CROSS = 2 * (32 + 2 * 32 * 32 + 8 + 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the large arrays of the bandwidth."""
    monkeypatch.setattr(traffic, "bandwidth", lambda trials: {"read": 8.0, "best": 10.0})


def wide_text(**changes: Any) -> dict[str, Any]:
    """A text_config whose layers can all be quantised."""
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 96,
        "rms_norm_eps": 1e-5,
        **changes,
    }


SMALL_VISION = {
    **shapes.VISION,
    "image_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


# --- what is counted -------------------------------------------------------------------------


def test_the_bytes_of_a_token_are_those_counted_by_hand(tiny_model):
    assert traffic.weight_bytes(shapes.text_only(tiny_model)) == 4 * TINY_TEXT
    assert traffic.weight_bytes(tiny_model.language_model) == 4 * (TINY_TEXT + TINY_CROSS)
    settings = measure.Settings((16, 48), 4, 6, 2, 1)
    bench = measure.Bench(tiny_model, settings, lambda _: None)
    memory = bench.memory()
    a_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, numbers of four bytes
    assert memory["bytes_per_text_token"] == {"agevlm": a_token, "text_only": a_token}
    images = {n: 2 * 2 * 2 * (n + 1) * 8 * 4 for n in (16, 48)}  # one more for the null slot
    assert memory["image_bytes"] == images
    assert memory["image_bytes_constant"]
    moved = bench.moved(memory)
    assert moved["text_only"] == traffic.Traffic(4 * TINY_TEXT, 7 * a_token, 0)
    assert moved["agevlm"].describe() == {
        "weights": 4 * (TINY_TEXT + TINY_CROSS),
        "text": 7 * a_token,
        "image": images[48],
        "total": 4 * (TINY_TEXT + TINY_CROSS) + 7 * a_token + images[48],
    }


def test_an_image_that_grows_with_the_text_is_told(tiny_model, monkeypatch):
    sizes = iter(range(100))
    monkeypatch.setattr(AgeVLM, "image_bytes", lambda *_: next(sizes))
    bench = measure.Bench(tiny_model, measure.Settings((16,), 4, 6, 2, 1), lambda _: None)
    memory = bench.memory()
    assert not memory["image_bytes_constant"]
    moved = {name: told.describe() for name, told in bench.moved(memory).items()}
    told = report.memory_lines({"memory": memory, "bytes_per_token": moved})
    assert "GROWS WITH THE TEXT" in told


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_a_token_of_text_takes_what_the_cache_grows_by(fusion, tiny_model_config):
    model = AgeVLM(tiny_model_config(fusion=fusion))
    cache = model.look(mx.zeros((1, 16, 32)), model.make_cache())
    sizes = []
    for _ in range(2):
        model(mx.zeros((1, 256), mx.int32), cache=cache)
        sizes.append(sum(entry.nbytes for entry in cache))
    assert traffic.bytes_per_text_token(cache) == (sizes[1] - sizes[0]) // 256


def test_an_input_embedding_of_its_own_is_not_read_as_a_whole():
    tied, untied = (
        shapes.random_model(wide_text(tie_word_embeddings=tied), SMALL_VISION)
        for tied in (True, False)
    )
    assert traffic.weight_bytes(tied.language_model) == traffic.weight_bytes(untied.language_model)


def test_bytes_of_a_format_are_those_of_a_model_quantised_so():
    model = shapes.random_model(wide_text(), SMALL_VISION, dtype=mx.bfloat16)
    lm = model.language_model
    foretold = {name: traffic.weight_bytes(lm, name) for name in traffic.FORMATS}
    assert foretold["bfloat16"] == traffic.weight_bytes(lm)
    for bits in (4, 8):
        model = shapes.random_model(wide_text(), SMALL_VISION, dtype=mx.bfloat16)
        shapes.quantize(model, bits, 64)
        assert traffic.weight_bytes(model.language_model) == foretold[f"{bits} bit"]
        again = {name: traffic.weight_bytes(model.language_model, name) for name in foretold}
        assert again == foretold


def test_a_layer_that_cannot_be_quantised_keeps_two_bytes_a_number(tiny_model):
    wide = 3 * 32 * 64  # only down_proj has rows of 64
    expected = 0.5625 * wide + 2 * (TINY_TEXT + TINY_CROSS - wide)
    assert traffic.weight_bytes(tiny_model.language_model, "4 bit") == expected


# --- what is predicted -----------------------------------------------------------------------


def test_a_prediction_is_bandwidth_over_bytes(tiny_model, monkeypatch):
    now = traffic.Traffic(4 * (TINY_TEXT + TINY_CROSS), 4 * 1000, 4 * 500)
    assert traffic.predicted(tiny_model, now, 4) == {}  # too small for a prediction
    monkeypatch.setattr(traffic, "LEAST_PREDICTED", 0)
    told = traffic.predicted(tiny_model, now, 4)
    assert list(told) == ["bfloat16", "8 bit", "4 bit"]
    half = told["bfloat16"]
    total = 2 * (TINY_TEXT + TINY_CROSS + 1000 + 500)
    assert half["bytes_per_token"]["total"] == total
    assert half["tokens_per_second"]["M1"] == pytest.approx(68.25e9 / total)
    assert half["tokens_per_second"]["M4 Max (40-core GPU)"] == pytest.approx(546e9 / total)
    assert half["tokens_per_second"].keys() == traffic.CHIPS.keys()
    assert told["4 bit"]["bytes_per_token"]["image"] == 2 * 500
    shown = report.predicted_table({"assumption": traffic.ASSUMPTION, "formats": told})
    assert "predicted tokens/s, not measured" in shown
    assert f"| M1 | 68.25 | {68.25e9 / total:.0f} |" in shown
    assert "nothing" in report.predicted_table({"assumption": "", "formats": {}})


# --- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
def test_the_language_model_alone_is_the_grafted_one_without_images(bits):
    model = shapes.random_model(wide_text(num_key_value_heads=2), SMALL_VISION)
    if bits:
        shapes.quantize(model, bits, 64)
    lm = shapes.text_only(model)
    ids = mx.array([[5, 1, 7, 2]])
    assert mx.array_equal(lm(ids), model.language_model(ids))
    own = dict(tree_flatten(model.language_model.parameters()))
    alone = dict(tree_flatten(lm.parameters()))
    assert all(array is own[name] for name, array in alone.items())
    assert {name for name in own if ".cross_attn." not in name} == alone.keys()
    seen = model.look(mx.random.normal((1, 3, 64)), model.make_cache())
    assert not mx.allclose(lm(ids), model(ids, cache=seen))  # and images do something


def test_no_weight_of_the_vision_encoder_is_evaluated(monkeypatch):
    evaluated = []
    monkeypatch.setattr(shapes.mx, "eval", lambda *trees: evaluated.extend(trees))
    model = shapes.random_model(wide_text(), SMALL_VISION)
    assert len(evaluated) == 2
    assert evaluated[0].keys() == model.language_model.parameters().keys()


def test_cases_take_turns_and_the_first_round_is_not_counted():
    order: list[str] = []

    def case(name: str) -> Callable[[], int]:
        def run() -> int:
            order.append(name)
            return len(order)

        return run

    said: list[str] = []
    taken = timing.interleaved({"a": case("a"), "b": case("b")}, 2, said.append)
    assert "".join(order) == "ababab"
    assert taken == {"a": [3, 5], "b": [4, 6]}
    assert said == ["warming up", "trial 1/2", "trial 2/2"]
    assert timing.ratio([2.0, 9.0, 40.0], [1.0, 3.0, 10.0]) == 3.0
    assert timing.summary([3.0, 1.0, 2.0]) == {
        "median": 2.0, "min": 1.0, "max": 3.0, "trials": [3.0, 1.0, 2.0],
    }  # fmt: skip


def test_the_first_token_is_all_that_is_computed(tiny_model):
    ids = mx.array([1, 2, 3, 4])
    lm = shapes.text_only(tiny_model)
    for model, cache in ((lm, make_prompt_cache(lm)), (tiny_model, tiny_model.make_cache())):
        timing.first_token(model, ids, cache)
        assert cache[0].offset == ids.size  # no step ahead


def test_moments_are_one_for_each_token_after_the_first(tiny_model):
    numbers: list[int] = []
    found = timing.decode(
        tiny_model, mx.array([1, 2, 3]), tiny_model.make_cache(), 5, numbers.append
    )
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert len(found) == 5
    assert found == sorted(found)


def test_with_maps_every_token_gives_one(tiny_model, monkeypatch):
    taken = []

    def take(self: Recorder, position: int) -> mx.array:
        taken.append(position)
        return original(self, position)

    original = Recorder.take
    monkeypatch.setattr(Recorder, "take", take)
    cache = tiny_model.look(mx.random.normal((1, 16, 32)), tiny_model.make_cache())
    timing.decode_with_maps(tiny_model, mx.array([1, 2, 3]), cache, 4)
    assert taken == [2, 3, 4, 5, 6]  # the last token of the question chooses the first


def test_the_first_question_includes_the_projector_and_the_second_does_not(tiny_model, monkeypatch):
    calls = {"project": 0, "remember": 0}
    originals = {name: getattr(AgeVLM, name) for name in calls}

    def counted(name: str) -> Callable[..., Any]:
        def call(self: AgeVLM, z: mx.array) -> Any:
            calls[name] += 1
            return originals[name](self, z)

        return call

    for name in calls:
        monkeypatch.setattr(AgeVLM, name, counted(name))
    bench = measure.Bench(tiny_model, measure.Settings((32,), 4, 3, 2, 2), lambda _: None)
    figures = bench.first_token(32)
    # Once for the second questions, once in each first question: a warm-up and three times two.
    assert calls == {"project": 8, "remember": 8}
    assert list(figures["seconds"]) == [
        "text_only", "no_image", "first_question", "second_question",
    ]  # fmt: skip


def test_rates_are_tokens_over_seconds(tiny_model, monkeypatch):
    monkeypatch.setattr(
        timing, "decode", lambda model, *_: [1.0, 2.0, 5.0 if isinstance(model, AgeVLM) else 4.0]
    )
    monkeypatch.setattr(timing, "decode_with_maps", lambda *_: [3.0, 6.0, 8.0])
    bench = measure.Bench(tiny_model, measure.Settings((16,), 4, 3, 2, 2), lambda _: None)
    figures = bench.decode()
    medians = {name: rate["median"] for name, rate in figures["tokens_per_second"].items()}
    assert medians == {"text_only": 3 / 4, "maps_off": 3 / 5, "maps_on": 3 / 8}
    assert (figures["maps_off_over_text"], figures["maps_on_over_text"]) == (4 / 5, 4 / 8)
    monkeypatch.setattr(timing, "batch", lambda *_: 2.0)
    monkeypatch.setattr(timing, "seconds", lambda _: 1.5)
    figures = bench.batch()
    assert figures["tokens_per_second"]["together"]["median"] == 2 * 3 / 2.0
    assert figures["tokens_per_second"]["alone"]["median"] == 3 / 1.5
    assert figures["together_over_alone"] == 1.5


def test_a_batch_answers_every_prompt(tiny_model):
    bench = measure.Bench(tiny_model, measure.Settings((16,), 4, 3, 3, 1), lambda _: None)
    figures = bench.batch()
    assert figures["size"] == 3
    assert len(figures["tokens_per_second"]["together"]["trials"]) == 1


def test_a_concat_model_is_measured_too(tiny_model_config):
    model = AgeVLM(tiny_model_config(fusion="concat"))
    bench = measure.Bench(model, measure.Settings((16,), 4, 3, 2, 1), lambda _: None)
    memory = bench.memory()
    assert memory["image_bytes"] == {16: 16 * memory["bytes_per_text_token"]["text_only"]}
    assert memory["image_bytes_constant"]
    assert bench.decode()["tokens_per_second"].keys() == {"text_only", "maps_off", "maps_on"}
    assert bench.first_token(16)["second_question_over_text"] > 0
    assert bench.batch()["together_over_alone"] > 0


def test_a_target_is_met_or_missed():
    assert report.target("a", 0.9, 0.9, True)["met"]
    assert not report.target("a", 0.89, 0.9, True)["met"]
    assert report.target("a", 1.1, 1.1, False)["met"]
    found = [report.target("slow", 1.2, 1.1, False)]
    assert "| slow | 1.20 | <= 1.1 | MISSED |" in report.target_table(found)


# --- the command -----------------------------------------------------------------------------


def run(folder: Path, *args: str | Path) -> int:
    return main(["--model", str(folder), *SMALL, *map(str, args)])


def test_measured_and_predicted_are_written_apart_with_all_facts(
    tiny_checkpoint, tmp_path, capsys, quick
):
    out = tmp_path / "speed.json"
    assert run(tiny_checkpoint, "--image-tokens", 32, 16, "--json", out) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    told = json.loads(out.read_text())
    assert told.keys() == {
        "command", "model", "settings", "machine", "versions", "measured", "targets", "predicted",
        "finished",
    }  # fmt: skip
    assert told["settings"]["image_tokens"] == [16, 32]
    assert {"chip", "processor", "cores", "memory_bytes", "os", "device", "blas", "threads"} <= (
        told["machine"].keys()
    )
    assert {"mlx", "mlx-lm", "python"} <= told["versions"].keys()
    measured = told["measured"]
    assert measured.keys() == {
        "memory", "bytes_per_token", "first_token", "decode", "batch", "bandwidth", "limit",
    }  # fmt: skip
    assert measured["first_token"].keys() == {"16", "32"}
    assert measured["decode"]["tokens_per_second"].keys() == {"text_only", "maps_off", "maps_on"}
    assert measured["decode"]["image_tokens"] == 32
    assert measured["batch"]["size"] == 2
    share = measured["limit"]["maps_off"]["share_of_bandwidth"]
    rate = measured["decode"]["tokens_per_second"]["maps_off"]["median"]
    moved = measured["bytes_per_token"]["agevlm"]["total"]
    assert share == pytest.approx(rate * moved / 10e9, abs=1e-5)
    assert told["predicted"].keys() == {"assumption", "gigabytes_per_second", "formats"}
    assert told["targets"] == []  # those are for the known sizes
    for words in ("time to first token", "tokens/s", "batch of 2 images", "predicted"):
        assert words in printed.out


def test_a_dry_run_times_nothing(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(traffic, "bandwidth", lambda *_: pytest.fail("timed"))
    out = tmp_path / "bytes.json"
    assert run(tiny_checkpoint, "--dry-run", "--json", out) == 0
    measured = json.loads(out.read_text())["measured"]
    assert measured.keys() == {"memory", "bytes_per_token"}
    assert "bytes per text token" in capsys.readouterr().out


def test_a_shape_is_measured_quantised_and_judged(monkeypatch, tmp_path, capsys, quick):
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", wide_text())
    monkeypatch.setattr(shapes, "VISION", SMALL_VISION)
    monkeypatch.setattr(traffic, "LEAST_PREDICTED", 0)
    args = ["--shape", "smollm2-135m", "--image-tokens", "2", "--dtype", "bfloat16", "-q"]
    out = tmp_path / "speed.json"
    small = [*SMALL, "--batch-size", "8", "--generation-tokens", "1"]
    assert main([*args, "--q-bits", "8", *small, "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["model"]["dtypes"] == ["bfloat16", "uint32"]
    assert len(told["targets"]) == 5
    assert {"name", "value", "target", "at_least", "met"} == told["targets"][0].keys()
    rates = told["predicted"]["formats"]["8 bit"]["tokens_per_second"]
    assert set(rates) == set(traffic.CHIPS)
    assert "| wanted |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--image-tokens", "17"], "multiple of this model's 16"),
        (["--image-tokens", "0"], "multiple of this model's 16"),
        (["--seed", "-1"], "--seed: expected from 0"),
        (["--image-tokens", "64000000000"], "--image-tokens: expected at most 1000000"),
        (["--prompt-tokens", "100000000000"], "from 2 to 1000000, got 1000"),
        (["--prompt-tokens", "1"], "from 2 to 1000000, got 1"),
        (["--generation-tokens", "0"], "from 1 to 1000000, got 0"),
        (["--batch-size", "-1"], "from 1 to 1000000, got -1"),
        (["--trials", "0"], "from 1 to 1000000, got 0"),
        (["--q-bits", "4"], "together with -q"),
        (["--json", "no/such/folder/a.json"], "create it first"),
    ],
)
def test_bad_input_is_one_line(args, says, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(measure.Bench, "memory", lambda _: pytest.fail("measured"))
    assert main(["--model", str(tiny_checkpoint), *args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert printed.out == ""


def test_what_cannot_be_quantised(tiny_model):
    narrow = shapes.random_model(
        wide_text(hidden_size=48, intermediate_size=48, num_attention_heads=3, head_dim=16),
        SMALL_VISION,
    )
    with pytest.raises(UserError, match="no layer's width is a multiple of 64"):
        shapes.quantize(narrow, 4, 64)
    tiny_model.config = replace(tiny_model.config, quantization={"bits": 4})
    with pytest.raises(UserError, match="quantised already"):
        shapes.quantize(tiny_model, 4, 32)


def test_more_text_than_the_model_was_made_for(monkeypatch, capsys):
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", wide_text(max_position_embeddings=64))
    args = ["--shape", "smollm2-135m", "--image-tokens", "64", "--prompt-tokens", "60"]
    assert main([*args, "--generation-tokens", "5"]) == 2
    assert "at most the 64 tokens" in capsys.readouterr().err


@pytest.mark.e2e
def test_the_shipped_model_is_measured_in_seconds(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "agevlm_mlx", "benchmark", "--trials", "1"]
    done = subprocess.run(
        [*command, "--generation-tokens", "8", "--batch-size", "4", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "batch of 4 images" in done.stdout
    told = json.loads(out.read_text())
    assert told["command"].startswith("agevlm benchmark --trials 1")
    rates = told["measured"]["decode"]["tokens_per_second"]
    assert all(rate["median"] > 0 for rate in rates.values())
    assert told["measured"]["memory"]["image_bytes_constant"]
