"""Exported folders in the real mlx-vlm and mlx-lm, in processes that cannot import agevlm_mlx."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from PIL import Image

from agevlm_mlx.config import from_dict, to_dict
from agevlm_mlx.data.chat import prompt_ids
from agevlm_mlx.data.records import Turn
from agevlm_mlx.generation import stream_generate
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.scenes import main as scenes
from agevlm_mlx.weights import Loaded, load, save_model, shipped
from convert.__main__ import main

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
QUESTIONS = ("Describe the image.", "Is there a cat?", "What is to the left of the key?")
#: Without agevlm_mlx from here on: an exported folder has all it needs.
ALONE = """
import agevlm_mlx, json, sys
from agevlm_mlx.sam.torchvision_ops import import_torchvision
import_torchvision()
for name in [n for n in sys.modules if n.split(".")[0] in ("agevlm_mlx", "convert")]:
    del sys.modules[name]
sys.modules["agevlm_mlx"] = None
"""
#: Every folder with every question: alone, about two pictures, batched and continued.
ASK = """
from mlx_vlm import load
from mlx_vlm.apc import model_supports_apc
from mlx_vlm.generate import BatchGenerator, PromptCacheState, batch_generate, generate
from mlx_vlm.prompt_utils import apply_chat_template, get_message_json
from mlx_vlm.utils import prepare_inputs

folders, pictures, questions = json.loads(sys.argv[1])
result = {}
loaded = {folder: load(folder) for folder in folders}
for folder, (model, processor) in loaded.items():
    def ask(question, images, **options):
        prompt = apply_chat_template(processor, model.config, question, num_images=len(images))
        options = {"max_tokens": 12, "temperature": 0.0, **options}
        return generate(model, processor, prompt, image=images, **options).token_ids

    own = result[folder] = {}
    own["prefix cache"] = model_supports_apc(model.language_model)
    own["ids"] = []
    for images in (None, pictures[:1]):  # mlx-vlm tokenises text without images by itself
        prompt = apply_chat_template(processor, model.config, questions[0], num_images=0)
        inputs = prepare_inputs(processor, images, prompts=prompt, add_special_tokens=True)
        own["ids"].append(inputs["input_ids"].tolist())
    own["one"] = [[ask(q, [p]) for p in pictures] for q in questions]
    own["two"] = [ask(q, pictures) for q in questions]
    own["none"] = [ask(q, []) for q in questions]
    if folder == folders[0]:
        own["parts"] = ask(questions[0], pictures[:1], prefill_step_size=3)
        quantised = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
        own["8-bit cache"] = ask(questions[0], pictures[:1], **quantised)
    # A conversation whose prompt goes on from an answer, but about another picture.
    state = PromptCacheState()
    first = ask(questions[0], pictures[:1], prompt_cache_state=state)
    again = [{"role": "user", "content": questions[0]}]
    again += [{"role": "assistant", "content": processor.tokenizer.decode(first[:-1])}]
    again += [{"role": "user", "content": questions[1]}]
    own["conversation"] = ask(again, pictures[1:], prompt_cache_state=state)
    own["fresh conversation"] = ask(again, pictures[1:])

    # Rows of one prefill with and without images, and one that joins the batch later.
    generator = BatchGenerator(model.language_model, processor, prefill_batch_size=2,
                               completion_batch_size=4, compute_logprobs=False)
    rows, tokens, steps = [(0, 1), (1, 2), (None, 0), (0, 1)], {}, 0
    def insert(picture, question):
        prompt = apply_chat_template(processor, model.config, questions[question], num_images=0)
        images = None if picture is None else [pictures[picture]]
        inputs = prepare_inputs(processor, images, prompts=prompt, add_special_tokens=True)
        ids = inputs["input_ids"]
        features = model.get_input_embeddings(ids, inputs.get("pixel_values"))
        kwargs = {k: v for k, v in features.to_dict().items() if v is not None}
        return generator.insert(ids.tolist(), 12, prompt_kwargs=[kwargs])[0]
    uids = [insert(*row) for row in rows[:2]]
    while generator.has_work or len(uids) < 4:
        steps += 1
        if steps == 3:
            uids += [insert(*row) for row in rows[2:]]
        for response in generator.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)
    own["rows"] = [tokens[uid] for uid in uids]
    own["batch"] = batch_generate(model, processor, images=[p for p in pictures],
                                  prompts=[questions[2], questions[0]], max_tokens=12).texts
print("RESULT", json.dumps(result))
"""


def alone(script: str, *arguments: str) -> str:
    """Standard output of a script that starts without agevlm_mlx."""
    run = subprocess.run(
        [sys.executable, "-c", ALONE + script, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # What mlx-vlm logs of an architecture it does not have.
    assert "agevlm not supported" not in run.stderr + run.stdout
    return run.stdout


def exported(model: Path, out: Path) -> Path:
    assert main(["export", "--to", "mlx-vlm", "--model", str(model), "--mlx-path", str(out)]) == 0
    return out


def concat_model(folder: Path) -> Path:
    """The shipped tokenizer and encoder with a small concat model of random weights."""
    base = load(shipped("model"))
    config = to_dict(base.model.config)
    config["fusion_config"] = {
        "fusion": "concat",
        "projector": "pixel_shuffle",
        "image_positions": True,
    }
    # No other ids than the tokenizer's, which mlx-vlm's detokenizer would fail on.
    config["text_config"]["vocab_size"] = len(base.tokenizer.get_vocab())
    mx.random.seed(3)
    model = AgeVLM(from_dict(type(base.model.config), config))
    model.update(tree_map(lambda w: w * 2, model.parameters()))  # let every token matter
    model.vision_tower = base.model.vision_tower
    save_model(folder, model, base.tokenizer, base.preprocessor, "# concat")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, Path]:
    """Kind of checkpoint -> its folder in our own format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cross = shipped("model")
    bits = ["--q-bits", "8", "--q-group-size", "32"]
    out = str(folder / "8-bit")
    assert main(["quantize", "--model", str(cross), "--mlx-path", out, *bits]) == 0
    return {"cross": cross, "8-bit": folder / "8-bit", "concat": concat_model(folder / "concat")}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: Any) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("exported")
    return {kind: exported(path, out / kind) for kind, path in checkpoints.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> list[str]:
    out = tmp_path_factory.mktemp("scenes")
    assert scenes(["--out", str(out), "--n", "2", "--split", "test"]) == 0
    first, second = sorted(out.rglob("*.png"))
    with Image.open(second) as image:  # neither square nor of the input's size
        image.resize((150, 90)).save(second)
    return [str(first), str(second)]


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], pictures: list[str]) -> dict[str, Any]:
    """Kind of checkpoint -> what mlx-vlm answered, all kinds loaded in one process."""
    order = json.dumps([[str(f) for f in folders.values()], pictures, QUESTIONS])
    found = json.loads(alone(ASK, order).rpartition("RESULT ")[2])
    return {kind: found[str(folder)] for kind, folder in folders.items()}


def ours(loaded: Loaded, prompt: Any, images: list[str]) -> list[int]:
    pieces = stream_generate(
        loaded.model, loaded.tokenizer, loaded.preprocessor, prompt, images, max_tokens=12
    )
    tokens = [piece.token for piece in pieces]
    return tokens[:12]


KINDS = ("cross", "8-bit", "concat")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_ours(
    kind: str, checkpoints: Any, answers: Any, pictures: list[str], parity: Any
):
    loaded, found = load(checkpoints[kind]), answers[kind]
    ids = prompt_ids(loaded.tokenizer, [Turn("user", QUESTIONS[0])])
    assert found["ids"] == [[ids], [ids]]
    one = [[ours(loaded, q, [p]) for p in pictures] for q in QUESTIONS]
    two = [ours(loaded, q, pictures) for q in QUESTIONS]
    none = [ours(loaded, q, []) for q in QUESTIONS]
    assert one[0][0] != one[0][1]
    assert none != [row[0] for row in one]
    assert found["two"] == two
    assert found["none"] == none
    pairs = zip(chain(*found["one"]), chain(*one), strict=True)
    wrong = sum(theirs != own for theirs, own in pairs)
    parity("Export for mlx-vlm", "mlx_vlm.generate", f"{kind}, different answers", wrong, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_keep_their_own_image(kind: str, answers: Any):
    found = answers[kind]
    one, none = found["one"], found["none"]
    assert found["rows"] == [one[1][0], one[2][1], none[0], one[1][0]]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_generate_gives_each_prompt_its_image(kind: str, checkpoints: Any, answers: Any):
    found, tokenizer = answers[kind], load(checkpoints[kind]).tokenizer._tokenizer
    wanted = [found["one"][2][0], found["one"][0][1]]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted]
    # Halves of a character (random weights give them) read differently piece by piece.
    assert [_ascii(text) for text in found["batch"]] == [_ascii(text) for text in texts]


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode().strip()


@pytest.mark.parametrize("kind", KINDS)
def test_another_picture_does_not_continue_from_a_cached_prompt(kind: str, answers: Any):
    found = answers[kind]
    assert found["conversation"] == found["fresh conversation"]
    assert found["prefix cache"] is False


def test_a_long_prompt_in_parts_and_a_quantised_cache_see_the_image(answers: Any):
    found = answers["cross"]
    assert found["parts"] == found["one"][0][0]
    assert found["8-bit cache"] == found["one"][0][0]


def test_the_command_line_of_mlx_vlm(folders: Any, checkpoints: Any, pictures: list[str]):
    script = "import runpy; sys.argv[0] = 'mlx_vlm.generate'\n"
    script += "runpy.run_module('mlx_vlm.generate', run_name='__main__')"
    out = alone(
        script,
        *("--model", str(folders["cross"]), "--image", pictures[1], "--prompt", QUESTIONS[0]),
        *("--max-tokens", "16", "--temperature", "0", "--no-verbose"),
    )
    loaded = load(checkpoints["cross"])
    answer = loaded.tokenizer.decode(ours(loaded, QUESTIONS[0], pictures[1:])[:-1])
    assert answer.strip() in out


def test_mlx_lm_reads_the_text_models(folders: Any, checkpoints: Any):
    script = """
from mlx_lm import load
from mlx_lm.generate import stream_generate
assert "mlx_vlm" not in sys.modules
ids = json.loads(sys.argv[1])
found = []
for folder in sys.argv[2:]:
    model, tokenizer = load(folder, trust_remote_code=True)
    found.append([r.token for r in stream_generate(model, tokenizer, ids, max_tokens=12)])
print("RESULT", found)
"""
    models = [load(checkpoints[kind]) for kind in KINDS]
    ids = prompt_ids(models[0].tokenizer, [Turn("user", QUESTIONS[0])])
    out = alone(script, json.dumps(ids), *(str(folders[kind]) for kind in KINDS))
    assert json.loads(out.rpartition("RESULT ")[2]) == [ours(m, QUESTIONS[0], []) for m in models]
