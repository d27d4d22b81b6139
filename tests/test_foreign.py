"""Models of mlx-vlm as respondents: tiny ones of random weights, and our own, exported."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from agevlm_mlx import foreign_inside as inside
from agevlm_mlx.analysis.subject import OurSubject
from agevlm_mlx.config import ModelConfig, from_dict, to_dict
from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.respondent import Request
from agevlm_mlx.foreign import Foreign, load, no_code
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.sam.torchvision_ops import import_torchvision
from agevlm_mlx.weights import load as load_ours
from agevlm_mlx.weights import save_model, shipped
from convert.__main__ import main as convert

import_torchvision()  # mlx-vlm imports it; some builds need help
from mlx_vlm.generate import stream_generate  # noqa: E402
from mlx_vlm.models import base  # noqa: E402
from mlx_vlm.utils import load as load_theirs  # noqa: E402

pytestmark = pytest.mark.parity

QUESTION = "Is there a red cat in the image?"
#: Two tokens of it.
WORDS = (" red", " cat")
#: As LLaVA's: the image's token, then the words.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] or part['content'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def save(folder: Path, family: str, config: dict[str, Any], image: str, **tables: Any) -> Path:
    """A checkpoint of random weights as mlx-vlm reads it; its image token is `image`."""
    module = importlib.import_module(f"mlx_vlm.models.{family}")
    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(["is there a red cat in the image? yes no Yes No A B dog"], 400)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    tokenizer.chat_template = TEMPLATE.replace("<image>", image)
    tokenizer.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(image)
    config = {**config, "model_type": family, "image_token_index": token, "image_token_id": token}
    config["eos_token_id"] = tokenizer.eos_token_id
    config["text_config"] = {**TEXT, **config["text_config"], "vocab_size": len(tokenizer)}
    flat = {**config["text_config"], **config}  # Qwen's wants it so
    for name, table in {"config": flat, **tables}.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    made = module.ModelConfig.from_dict(dict(flat))
    made.text_config = module.TextConfig.from_dict(config["text_config"])
    made.vision_config = module.VisionConfig.from_dict(config["vision_config"])
    mx.random.seed(7)
    model = module.Model(made)
    weights = tree_map(lambda w: w * 3 if w.ndim > 1 else w, model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)))
    return folder


class Lenient:
    """An image processor that overlooks the tokenizer's options, which mlx-vlm 0.7.10 gives
    LLaVA's and transformers 5.23 refuses."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, images: Any, **_: Any) -> Any:
        return self.own(images, return_tensors="np")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def llava(folder: Path, **preprocessing: Any) -> Foreign:
    """CLIP's tower, 16 tokens of a 32 px picture; `preprocessing` overrides the stretch."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    sight = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    save(
        folder,
        "llava",
        {"text_config": {"model_type": "llama"}, "vision_config": vision, **sight},
        "<image>",
        preprocessor_config={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 32, "width": 32},
            "do_center_crop": False,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
            **preprocessing,
        },
        processor_config={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )
    model, processor = load(folder)
    processor.image_processor = Lenient(processor.image_processor)
    return Foreign(folder, (model, processor))


def qwen(folder: Path) -> Foreign:
    """Qwen2-VL: positions in three dimensions, and tokens in a grid as wide as the picture."""
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    vision = {
        "model_type": "qwen2_vl",
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_patch_size": 4,
    }
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    save(
        folder,
        "qwen2_vl",
        {
            "text_config": {"model_type": "qwen2_vl", "rope_scaling": rope},
            "vision_config": vision,
        },
        "<|image_pad|>",
        preprocessor_config={**sizes, "min_pixels": 256, "max_pixels": 4096},
    )
    return Foreign(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> list[Path]:
    out, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for n, size in enumerate(((40, 40), (64, 32))):
        pixels = random.integers(0, 255, (size[1], size[0], 3), np.uint8)
        paths.append(out / f"{n}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


FAMILIES = {"llava": llava, "qwen2_vl": qwen}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any, tmp_path_factory: Any, pictures: list[Path]) -> Foreign:
    found = FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")
    assert found.show(pictures) == {}
    return found


def theirs(model: Foreign, request: Request, forced: list[int]) -> np.ndarray:
    """mlx-vlm's own log-probabilities f64[tokens V] while it is made to say `forced`."""
    coming = iter([*forced, *[0] * 4])
    image = model._image(request)
    pieces = stream_generate(
        model.model,
        model.processor,
        model._prompt(request.prompt, image is not None),
        None if image is None else [image],
        max_tokens=len(forced),
        sampler=lambda log_p: mx.array([next(coming)]),
    )
    return np.stack([np.array(piece.logprobs, np.float64) for piece in pieces])[: len(forced)]


def test_options_are_the_first_tokens_of_mlx_vlm(model: Foreign, pictures: list[Path]):
    requests = [Request(image, QUESTION) for image in (*pictures, None)]
    found = model.options(requests, [("yes", "no"), ("A", "B"), ("yes", "no")])
    ids = {name: model.tokenizer.encode(name)[0] for name in ("Yes", "yes", " Yes", " yes")}
    ids["YES"] = model.tokenizer.encode("YES")[0]
    log_p = theirs(model, requests[0], [0])[0]
    np.testing.assert_allclose(
        found[0][0], np.logaddexp.reduce(log_p[sorted(set(ids.values()))]), atol=1e-4
    )
    letters = [sorted({model.tokenizer.encode(x)[0] for x in (n, f" {n}")}) for n in "AB"]
    log_p = theirs(model, requests[1], [0])[0]
    found_letters = [np.logaddexp.reduce(log_p[row]) for row in letters]
    space = model.tokenizer.encode(" ")[0]
    if all(space not in row for row in letters):
        np.testing.assert_allclose(found[1], found_letters, atol=1e-4)
    assert abs(found[2][0] - found[0][0]) > 0.01  # the image matters


def test_likelihood_is_that_of_every_token_said_one_by_one(model: Foreign, pictures: list[Path]):
    for image in (*pictures, None):
        request, answers = Request(image, QUESTION), ("a red cat", "", "dog")
        (found,) = model.log_likelihood([request], [answers])
        for value, answer in zip(found, answers, strict=True):
            said = [*model.tokenizer.encode(answer), model.tokenizer.eos_token_id]
            log_p = theirs(model, request, said)
            mean = log_p[np.arange(len(said)), said].mean()
            assert value == pytest.approx(mean, abs=2e-4)


def test_answers_are_greedy_and_in_order(model: Foreign, pictures: list[Path]):
    requests = [Request(image, QUESTION) for image in (pictures[1], None, pictures[0])]
    found = dict(model.generate(requests, 6))
    assert list(found) == [0, 1, 2]
    assert found == dict(model.generate(requests, 6))
    assert found[0] != found[1] != found[2]
    said: list[int] = []
    for _ in range(6):
        said.append(int(theirs(model, requests[0], [*said, 0])[-1].argmax()))
    # Halves of a character (random weights give them) read differently piece by piece.
    said_ascii, found_ascii = (
        text.encode("ascii", "ignore").strip() for text in (model.tokenizer.decode(said), found[0])
    )
    assert said_ascii == found_ascii


def test_an_answer_may_merge_with_the_end_of_the_prompt(model: Foreign, monkeypatch: Any):
    plain = model._prompt
    monkeypatch.setattr(model, "_prompt", lambda *a: plain(*a).replace("assistant:", "assistant: "))
    merged, said = model._answer_ids(QUESTION, "red cat")
    assert merged == 1
    assert model.tokenizer.decode(said) == " red cat<|end|>"
    asked = model._inputs(Request(None, QUESTION))
    inputs, start = model._answered(asked, QUESTION, "red cat")
    whole = model._prepare(model._prompt(QUESTION, False, "red cat"), None)["input_ids"]
    assert inputs["input_ids"].tolist() == whole.tolist()
    assert inputs["attention_mask"].shape == whole.shape
    assert start == whole.shape[1] - len(said)


def test_a_template_without_an_end_gets_one(model: Foreign, monkeypatch: Any):
    plain = model._prompt
    monkeypatch.setattr(model, "_prompt", lambda *a: plain(*a).replace("<|end|>", ""))
    end = model.tokenizer.eos_token_id
    assert model._answer_ids(QUESTION, "dog")[1] == [*model.tokenizer.encode("dog"), end]
    monkeypatch.setattr(model, "_prompt", lambda q, image, a=None: plain(q, image) if a else q)
    assert model._answer_ids(QUESTION, "dog")[1] == [*model.tokenizer.encode("dog"), end]


def test_an_images_own_token_in_a_question_is_no_image(model: Foreign, pictures: list[Path]):
    token = model.processor.image_token
    plain, marked = (Request(pictures[0], q) for q in (QUESTION, f"{token}{QUESTION}"))
    assert model.options([marked], [("yes", "no")]) == model.options([plain], [("yes", "no")])


def test_looks_of_a_phrase(model: Foreign, pictures: list[Path]):
    requests = [Request(image, QUESTION) for image in (*pictures, None)]
    *looks, blind = model.look(requests, ["red cat", "Red Cat", "red cat"])
    assert blind is None
    assert model.look(requests[:1], ["dog"]) == [None]
    for path, looked in zip(pictures, looks, strict=True):
        assert looked is not None
        assert looked.null is None
        with Image.open(path) as image:
            assert (looked.geometry.width, looked.geometry.height) == image.size
        share = looked.attention.sum((2, 3))
        assert (share > 0).all()
        assert (share < 1).all()
        assert looked.attention.shape[:2] == (3, 4)
        # The same from every position's attention over everything.
        ids, given = model._embedded(model._inputs(Request(path, QUESTION)))
        tokens: Any = ids[0].tolist()
        with inside.attention_rows(model.model.language_model, range(len(tokens))) as rows:
            model._read(ids, given)
        everything = np.stack([np.array(row) for row in rows])  # L T N T
        np.testing.assert_allclose(everything.sum(-1), 1, atol=1e-5)
        assert not np.triu(everything.max((0, 2)), 1).any()
        words = [n for n in range(len(tokens)) if model.tokenizer.decode(tokens[n]) in WORDS]
        seen = [n for n, token in enumerate(tokens) if token == model.processor.image_token_id]
        wanted = everything[:, words][..., seen].mean(1)
        np.testing.assert_allclose(looked.attention.reshape(wanted.shape), wanted, atol=1e-6)
    grids = [looked.attention.shape[2:] for looked in looks if looked]
    square = model.model.config.model_type == "llava"
    assert grids == ([(4, 4), (4, 4)] if square else [(5, 5), (4, 8)])


def test_a_phrase_is_found_from_the_end_of_its_first_word(model: Foreign):
    ids = model._prepare(model._prompt(QUESTION, False), None)["input_ids"][0].tolist()
    places = model._phrase(ids, 2, "red cat")
    assert model.tokenizer.decode([ids[n] for n in places]).endswith("cat")
    before = model.tokenizer.decode(ids[: places[0] + 1])
    assert before.endswith("red")
    assert places == list(range(places[0], places[-1] + 1))
    assert model._phrase(ids, 2, "re") == []
    pieces = [len(model.tokenizer.encode(word)) for word in (" zebra", " cat")]
    assert pieces[0] > 1
    ids = model.tokenizer.encode("a zebra cat is a zebra cat")
    kept = range(pieces[0], pieces[0] + 1 + pieces[1])
    assert model._phrase(ids, 0, "zebra cat") == list(kept)
    assert len(model._phrase(ids, kept.stop, "zebra cat")) == len(kept)


def test_states_begin_with_embeddings_and_end_in_the_logits(model: Foreign, pictures: list[Path]):
    texts, image = model.states(pictures[0], ["a red cat", "dog"], QUESTION)
    assert texts.shape == (2, 4, 32)
    language_model = model.model.language_model
    trunk = language_model.model
    for text, answer in zip(texts, ("a red cat", "dog"), strict=True):
        words = np.array(trunk.embed_tokens(mx.array(model.tokenizer.encode(answer))))
        np.testing.assert_allclose(text[0], words.mean(0), atol=1e-5)
    inputs = model._inputs(Request(pictures[0], QUESTION))
    ids, given = model._embedded(inputs)
    places = np.flatnonzero(np.array(ids[0]) == model.processor.image_token_id)
    assert image is not None
    np.testing.assert_allclose(
        image[0], np.array(given["inputs_embeds"][0])[places].mean(0), atol=1e-5
    )
    with inside.hidden_states(language_model) as states:
        logits = model._read(ids, given)
    own = language_model.lm_head(trunk.norm(states[-1]))[0]
    np.testing.assert_allclose(np.array(own), np.array(logits), atol=1e-4)
    assert len(states) == 4
    blind, nothing = model.states(None, ["dog"], QUESTION)
    assert nothing is None
    assert not np.allclose(blind[0, 1:], texts[1, 1:])


def test_the_model_is_left_as_it_was(model: Foreign, pictures: list[Path]):
    language_model = model.model.language_model
    module = sys.modules[type(language_model.layers[0].self_attn).__module__]
    fused, kind = module.scaled_dot_product_attention, type(language_model.layers[0])
    model.look([Request(pictures[0], QUESTION)], ["red cat"])
    model.states(pictures[0], ["dog"], QUESTION)
    with pytest.raises(ZeroDivisionError), inside.attention_rows(language_model, [0]):
        raise ZeroDivisionError
    assert module.scaled_dot_product_attention is fused
    assert type(language_model.layers[0]) is kind


@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive"])
def test_rows_are_the_weights_that_the_fused_function_uses(
    mask: str | None, monkeypatch: pytest.MonkeyPatch
):
    module = ModuleType("made_up_architecture")
    module.scaled_dot_product_attention = base.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    language_model = type("LM", (nn.Module,), {"__module__": module.__name__})()
    q, k, v = (mx.random.normal((1, n, 6, 8)) for n in (4, 2, 2))
    allowed = mx.tril(mx.random.uniform(shape=(6, 6)) > 0.3) | mx.eye(6).astype(mx.bool_)
    masks: dict[Any, Any] = {"bool": allowed, "additive": mx.where(allowed, 0, -1e9)}
    given = masks.get(mask, mask)
    with inside.attention_rows(language_model, [1, 4]) as rows:
        out = module.scaled_dot_product_attention(q, k, v, None, scale=0.3, mask=given)
        # Of another sequence (cross-attention), and over more than the keys.
        module.scaled_dot_product_attention(q[:, :, :2], k, v, None, scale=0.3, mask=None)
        if mask == "causal":
            sinks = mx.zeros(4)
            module.scaled_dot_product_attention(q, k, v, None, 0.3, "causal", sinks)
    assert rows[1:] in ([None], [None, None])
    assert rows[0].shape == (2, 4, 6)
    mixed = rows[0].swapaxes(0, 1) @ mx.repeat(v[0], 2, axis=0)
    np.testing.assert_allclose(np.array(mixed), np.array(out[0][:, [1, 4]]), atol=1e-5)


CROP = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": 32}


@pytest.mark.parametrize("size", [(40, 40), (64, 32), (33, 90), (300, 200)])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_the_geometry_is_measured(resize: str, size: tuple[int, int], tmp_path: Path):
    model = llava(tmp_path / "model", **(CROP if resize == "crop" else {}))
    wanted = Preprocessor(image_size=32, resize=resize, convention="transformers").geometry(*size)
    found = model._geometry(Image.new("RGB", size), {})
    assert found is not None
    for name, value in vars(wanted).items():
        # The last pixel of a side, as rounded, cannot be seen in 32.
        assert getattr(found, name) == pytest.approx(value, abs=1.01 if "off" in name else 0.03)


def test_padding_is_measured_and_tiles_are_refused():
    pad = Preprocessor(image_size=32, resize="pad")

    def padded(image: Image.Image) -> dict[str, Any]:
        return {"pixel_values": mx.array(pad(image)[0].transpose(2, 0, 1)[None])}

    assert inside.geometry(padded, 64, 32) == pad.geometry(64, 32)
    assert inside.geometry(padded, 20, 40) == pad.geometry(20, 40)
    tiles = {"pixel_values": mx.zeros((1, 4, 3, 32, 32))}
    assert inside.geometry(lambda image: tiles, 64, 32) is None
    assert inside.grid(None, tiles, 16) is None
    assert inside.grid(None, padded(Image.new("RGB", (9, 9))), 15) is None
    assert inside.grid(None, padded(Image.new("RGB", (9, 9))), 16) == (4, 4)
    mirrored = {"pixel_values": lambda image: pad(image.transpose(0))[0]}
    assert inside.geometry(lambda i: {"pixel_values": mirrored["pixel_values"](i)}, 9, 9) is None


def test_an_image_that_cannot_be_read_is_named(model: Foreign, pictures: list[Path]):
    missing = pictures[0].with_name("missing.png")
    try:
        assert list(model.show([*pictures, missing])) == [missing]
    finally:
        model.show(pictures)


def config_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changes))
    return folder


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path):
    folder = config_of(tmp_path / "model", model_type="agevlm", model_file="model.py")
    (folder / "model.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match=r"code of its own \(model.py\)"):
        Foreign(folder)


def test_nor_is_that_of_its_tokenizer(tmp_path: Path):
    from transformers import AutoTokenizer

    folder = llava(tmp_path / "model").about["path"]
    (Path(folder) / "mine.py").write_text("raise SystemExit('it ran')")
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
    # As some families ask by themselves.
    with no_code(), pytest.raises(UserError, match="it wants to run Mine of its own"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(SystemExit, match="it ran"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_what_mlx_vlm_cannot_load_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="cannot load this nosuchfamily model"):
        Foreign(config_of(tmp_path / "a", model_type="nosuchfamily"))
    with pytest.raises(UserError, match="expected an object with a model_type"):
        Foreign(config_of(tmp_path / "b"))
    with pytest.raises(UserError, match="cannot load this llava model"):
        Foreign(config_of(tmp_path / "c", model_type="llava"))


def test_without_mlx_vlm_it_says_what_to_install(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlx-vlm"):
        Foreign(config_of(tmp_path / "a", model_type="llava"))


@pytest.fixture(scope="module", params=["cross", "concat"])
def twins(request: Any, tmp_path_factory: Any) -> tuple[OurSubject, Foreign]:
    """A model of ours, and what it becomes when it is exported for mlx-vlm."""
    folder = shipped("model")
    if request.param == "concat":
        loaded = load_ours(folder)
        config = to_dict(loaded.model.config)
        config["fusion_config"] = {"fusion": "concat", "projector": "pixel_shuffle"}
        # No other ids than the tokenizer's, which mlx-vlm's detokenizer would fail on.
        config["text_config"]["vocab_size"] = len(loaded.tokenizer.get_vocab())
        mx.random.seed(3)
        made = AgeVLM(from_dict(ModelConfig, config))
        folder = tmp_path_factory.mktemp("ours") / "concat"
        save_model(folder, made, loaded.tokenizer, loaded.preprocessor, "# concat")
    out = tmp_path_factory.mktemp("exported") / request.param
    command = ["export", "--to", "mlx-vlm", "--model", str(folder), "--mlx-path", str(out)]
    assert convert(command) == 0
    return OurSubject(load_ours(folder)), Foreign(out, load_theirs(str(out)))


def test_our_own_model_exported_answers_as_before(
    twins: Any, pictures: list[Path], monkeypatch: Any
):
    ours, exported = twins
    for model in twins:
        assert model.show(pictures) == {}
    requests = [Request(image, QUESTION) for image in (*pictures, None)]
    options, answers = [("yes", "no")] * 3, [("A red cat.", "Yes")] * 3
    if ours.about["fusion"] == "cross":  # trained: hardly anything is on " yes", with a space
        presence = [Request(request.image, "Is there a dog?") for request in requests]
        wanted = ours.options(presence, options)
        np.testing.assert_allclose(exported.options(presence, options), wanted, atol=0.02)
    wanted = ours.options(requests, options)
    heads = {name: ours._heads(name) for name in options[0]}
    assert all(set(heads[name]) <= set(exported._first_tokens(name)) for name in heads)
    monkeypatch.setattr(exported, "_first_tokens", heads.__getitem__)
    np.testing.assert_allclose(exported.options(requests, options), wanted, atol=2e-4)
    np.testing.assert_allclose(
        exported.log_likelihood(requests, answers),
        ours.log_likelihood(requests, answers),
        atol=2e-4,
    )
    assert dict(exported.generate(requests, 8)) == dict(ours.generate(requests, 8))
    # No token of the text stands for the image: where it lies is not to be guessed.
    assert exported.look(requests[:1], ["red cat"]) == [None]
    for image in (pictures[0], None):
        found, of_image = exported.states(image, ["Yes", "A red cat."], QUESTION)
        wanted, _ = ours.states(image, ["Yes", "A red cat."], QUESTION)
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        assert of_image is None
