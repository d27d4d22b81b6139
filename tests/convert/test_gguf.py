"""GGUF files: small ones written here, bit by bit, so that what is in them is known."""

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, llama, qwen2, qwen3, smollm3

from agevlm_mlx.errors import UserError
from agevlm_mlx.weights import load_tokenizer
from convert.gguf import read_gguf

WIDTH, HEADS, GROUPS, HEAD, HIDDEN, LAYERS = 32, 4, 2, 8, 64, 2
F32, F16, Q4_0, Q4_1, Q4_K, Q8_0, BF16 = 0, 1, 2, 3, 12, 8, 30
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """Type and value, as GGUF writes them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    kind, count = {str: 8, int: 5, float: 6}[type(value[0])], len(value)
    items = b"".join(map(_text, value)) if kind == 8 else None
    items = items or struct.pack(f"<{count}{'i' if kind == 5 else 'f'}", *value)
    return struct.pack("<IIQ", 9, kind, count) + items


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """tensors: float32 arrays, or (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = (F32, tensor.shape, tensor.astype("<f4").tobytes())
        kind, shape, data = tensor
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Special tokens, all bytes, and a few words: tokens, merges, types."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ 1", "1 2", "12 3", "h e", "l l", "he ll", "hell o", "Ġ hello"]
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    return tokens, merges, [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))


def depth(architecture: str) -> int:
    return 6 if architecture == "gemma3" else LAYERS  # its layers go by six


def metadata(architecture: str = "llama", **more: Any) -> dict[str, Any]:
    """more: ``rope__scaling__type`` stands for ``<architecture>.rope.scaling.type``, and
    ``tokenizer__ggml__pre`` for itself; None leaves a key out."""
    tokens, merges, types = vocabulary()
    table: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}"
        "<|im_end|>{% endfor %}",
    }
    own: dict[str, Any] = {
        "block_count": depth(architecture),
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "rope.freq_base": 5000.0,
    }
    table |= {f"{architecture}.{key}": value for key, value in own.items()}
    for key, value in more.items():
        key = key.replace("__", ".")
        key = key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}"
        table[key] = value
    return {key: value for key, value in table.items() if value is not None}


def tensors(architecture: str = "llama") -> dict[str, Any]:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) * 0.3).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.2 * random.normal(size=size)).astype(np.float32)

    found = {
        "token_embd.weight": matrix(len(vocabulary()[0]), WIDTH),
        "output_norm.weight": norm(WIDTH),
    }
    for i in range(depth(architecture)):
        layer = {
            "attn_norm.weight": norm(WIDTH),
            "ffn_norm.weight": norm(WIDTH),
            "attn_q.weight": matrix(HEADS * HEAD, WIDTH),
            "attn_k.weight": matrix(GROUPS * HEAD, WIDTH),
            "attn_v.weight": matrix(GROUPS * HEAD, WIDTH),
            "attn_output.weight": matrix(WIDTH, HEADS * HEAD),
            "ffn_gate.weight": matrix(HIDDEN, WIDTH),
            "ffn_up.weight": matrix(HIDDEN, WIDTH),
            "ffn_down.weight": matrix(WIDTH, HIDDEN),
        }
        if architecture == "qwen2":
            layer |= {
                f"attn_{x}.bias": norm(n * HEAD)
                for x, n in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))
            }
        if architecture in ("qwen3", "gemma3"):
            layer |= {"attn_q_norm.weight": norm(HEAD), "attn_k_norm.weight": norm(HEAD)}
        if architecture == "gemma3":
            layer |= {
                "post_attention_norm.weight": norm(WIDTH),
                "post_ffw_norm.weight": norm(WIDTH),
            }
        found |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    return found


def model(module: Any, config: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    built = module.Model(module.ModelArgs.from_dict(config))
    if hasattr(built, "sanitize"):
        weights = built.sanitize(dict(weights))
    built.load_weights(list(weights.items()))
    return built


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", metadata(), tensors())


def test_config_says_what_the_metadata_says(tiny):
    assert read_gguf(tiny).text_config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-3,
        "rope_theta": 5000.0,
        "max_position_embeddings": 512,
        "vocab_size": len(vocabulary()[0]),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],  # and <|endoftext|>, where llama.cpp stops too
        "pad_token_id": 2,
    }


def test_notes_name_model_licence_and_storage(tiny):
    notes = read_gguf(tiny).notes
    assert notes == {
        "name": "Tiny",
        "license": "apache-2.0",
        "stored as": f"{2 + 9 * LAYERS} x F32",
    }


def test_an_output_matrix_of_its_own_is_not_tied(tmp_path):
    head = tensors()["token_embd.weight"] + 1
    path = write(tmp_path / "a.gguf", metadata(), {**tensors(), "output.weight": head})
    found = read_gguf(path)
    assert found.text_config["tie_word_embeddings"] is False
    assert np.array_equal(found.weights["lm_head.weight"], head)


def test_rows_of_q_and_k_go_back_to_halves(tiny):
    """The file rotates neighbours (rope_traditional), the result halves: the same logits."""
    found, stored = read_gguf(tiny), tensors()
    ids = mx.array([[5, 9, 1, 77, 30, 8]])
    want = model(
        llama,
        found.text_config | {"rope_traditional": True},
        found.weights
        | {
            f"model.layers.{i}.self_attn.{x}_proj.weight": mx.array(
                stored[f"blk.{i}.attn_{x}.weight"]
            )
            for i in range(LAYERS)
            for x in "qk"
        },
    )(ids)
    got = model(llama, found.text_config, found.weights)(ids)
    assert mx.abs(got - want).max() < 1e-4 * mx.abs(want).max()
    rows = stored["blk.0.attn_k.weight"][HEAD:]  # of the second head
    halves = np.concatenate([rows[0::2], rows[1::2]])
    assert np.array_equal(found.weights["model.layers.0.self_attn.k_proj.weight"][HEAD:], halves)


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("llama", llama),
        ("smollm3", smollm3),
        ("qwen2", qwen2),
        ("qwen3", qwen3),
        ("gemma3", gemma3_text),
    ],
)
def test_every_architecture_fills_its_mlx_lm_model(architecture, module, tmp_path):
    sliding = {"attention__sliding_window": 16} if architecture == "gemma3" else {}
    path = write(tmp_path / "a.gguf", metadata(architecture, **sliding), tensors(architecture))
    found = read_gguf(path)
    built = model(module, found.text_config, found.weights)
    assert mx.isfinite(built(mx.array([[1, 2, 3]]))).all()
    stored = tensors(architecture)["blk.1.attn_q.weight"]
    q = np.array(found.weights["model.layers.1.self_attn.q_proj.weight"])
    assert np.array_equal(q, stored) == (architecture not in ("llama", "smollm3"))
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "pre_feedforward_layernorm"
        if architecture == "gemma3"
        else "post_attention_layernorm",
    }
    for theirs, ours in names.items():
        norm = tensors(architecture)[f"blk.1.{theirs}.weight"] - (architecture == "gemma3")
        assert np.array_equal(found.weights[f"model.layers.1.{ours}.weight"], norm)


def test_gemma_3_gets_what_its_file_leaves_out(tmp_path):
    table = metadata("gemma3", attention__sliding_window=16, rope__freq_base=None)
    config = read_gguf(write(tmp_path / "a.gguf", table, tensors("gemma3"))).text_config
    assert config["query_pre_attn_scalar"] == HEAD
    assert config["sliding_window"] == 16
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


def quantised(kind: int, rows: int, columns: int) -> tuple[Any, np.ndarray]:
    """Random blocks of 32 and the values that ggml's formulas give for them."""
    random = np.random.default_rng(1)
    blocks = rows * columns // 32
    scale = (random.normal(size=(blocks, 1)) * 0.01).astype(np.float16)
    wide = scale.astype(np.float32)
    if kind == Q8_0:
        codes = random.integers(-128, 128, (blocks, 32), dtype=np.int8)
        data, values = [scale.view(np.uint8), codes.view(np.uint8)], wide * codes
    else:
        codes = random.integers(0, 256, (blocks, 16), dtype=np.uint8)
        nibbles = np.concatenate([codes & 15, codes >> 4], 1).astype(np.float32)
        least = (random.normal(size=(blocks, 1)) * 0.05).astype(np.float16)
        if kind == Q4_0:
            data, values = [scale.view(np.uint8), codes], wide * (nibbles - 8)
        else:
            data = [scale.view(np.uint8), least.view(np.uint8), codes]
            values = wide * nibbles + least.astype(np.float32)
    return (kind, (rows, columns), np.concatenate(data, 1).tobytes()), values.reshape(rows, columns)


@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0])
def test_blocks_are_dequantised_exactly(kind, tmp_path):
    tensor, values = quantised(kind, WIDTH, HIDDEN)
    path = write(tmp_path / "a.gguf", metadata(), {**tensors(), "blk.0.ffn_down.weight": tensor})
    assert np.array_equal(read_gguf(path).weights["model.layers.0.mlp.down_proj.weight"], values)


def test_halves_are_read_exactly(tmp_path):
    values = np.random.default_rng(2).normal(size=(WIDTH, HIDDEN)).astype(np.float32) * 1e-6
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut
    bf16 = (BF16, values.shape, upper.tobytes())
    f16 = (F16, (HIDDEN, WIDTH), values.astype(np.float16).tobytes())
    path = write(
        tmp_path / "a.gguf",
        metadata(),
        {**tensors(), "blk.0.ffn_down.weight": bf16, "blk.0.ffn_up.weight": f16},
    )
    weights = read_gguf(path).weights
    exact = (upper.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(weights["model.layers.0.mlp.down_proj.weight"], exact)
    half = values.astype(np.float16).astype(np.float32).reshape(HIDDEN, WIDTH)
    assert np.array_equal(weights["model.layers.0.mlp.up_proj.weight"], half)


def test_weights_are_wide_only_when_evaluated(tmp_path):
    """Only what the file holds is in memory, and one matrix of it in float32."""
    tensor, _ = quantised(Q4_0, 4096, HIDDEN * 8)
    many = {f"blk.{i}.ffn_up.weight": tensor for i in range(16)}
    path = write(tmp_path / "a.gguf", metadata(), {**tensors(), **many})
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = read_gguf(path, mx.bfloat16).weights
    dtypes = {value.dtype for value in weights.values()}
    for name in list(weights):
        mx.eval(weights.pop(name))
    wide = 4096 * HIDDEN * 8 * 4
    assert mx.get_peak_memory() - before < path.stat().st_size + 3 * wide
    assert dtypes == {mx.bfloat16}


# Rope scaling


def test_llama_3s_scaling_is_read_from_its_divisors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from mlx_lm.models.rope_utils import Llama3RoPE

    plain = 500000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    divisors = np.array(Llama3RoPE(HEAD, base=500000.0, scaling_config=scaling)._freqs) / plain
    assert sum(divisors > 1.01) > 1  # some frequencies are scaled
    table = metadata(rope__freq_base=500000.0)
    path = write(tmp_path / "a.gguf", table, {**tensors(), "rope_freqs.weight": divisors})
    found = read_gguf(path)
    assert found.text_config["rope_scaling"] == scaling
    assert not any("rope" in name for name in found.weights)

    other = {**tensors(), "rope_freqs.weight": divisors * np.array([1.1, 1, 1, 1])}
    with pytest.raises(UserError, match="does not hold Llama 3's rope scaling"):
        read_gguf(write(tmp_path / "b.gguf", table, other))


def test_linear_scaling_is_kept_and_others_are_refused(tmp_path):
    table = metadata(rope__scaling__type="linear", rope__scaling__factor=8.0)
    path = write(tmp_path / "a.gguf", table, tensors())
    assert read_gguf(path).text_config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    table = metadata(rope__scaling__type="yarn", rope__scaling__factor=4.0)
    with pytest.raises(UserError, match=r"expected rope scaling none, linear or .*got 'yarn'"):
        read_gguf(write(tmp_path / "b.gguf", table, tensors()))


# Tokenizer


def pieces(path: Path, text: str) -> list[str]:
    tokenizer = read_gguf(path).tokenizer
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))


@pytest.mark.parametrize(
    ("pre", "want"),
    [
        ("smollm", ["Ġhello", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġhello", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġhello", "Ġ", "123", "4"]),
        ("gpt-2", ["Ġhello", "Ġ1", "2", "3", "4"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, want, tmp_path):
    table = metadata(tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=False)
    path = write(tmp_path / "a.gguf", table, tensors())
    assert pieces(path, " hello 1234") == want


def test_qwens_text_is_composed_first(tmp_path):
    path = write(tmp_path / "a.gguf", metadata(tokenizer__ggml__pre="qwen2"), tensors())
    assert pieces(path, "e\u0301") == pieces(path, "é") == ["Ã", "©"]


@pytest.mark.parametrize(
    ("flag", "pre", "starts"),
    [
        (True, "smollm", True),
        (None, "smollm", False),
        (None, "llama-bpe", True),
        (False, "llama-bpe", False),
    ],
)
def test_text_starts_as_the_file_says(flag, pre, starts, tmp_path):
    table = metadata(tokenizer__ggml__add_bos_token=flag, tokenizer__ggml__pre=pre)
    path = write(tmp_path / "a.gguf", table, tensors())
    assert pieces(path, "hello") == ["<|im_start|>"] * starts + ["hello"]


def test_special_tokens_and_chat_template(tiny):
    tokenizer = read_gguf(tiny).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        SPECIAL[1],
        2,
        2,
    )
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    text = "hello\n ünïcode 日本 123 😀"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("bos", [False, True])
def test_saved_and_loaded_it_is_the_same_tokenizer(bos, tmp_path):
    table = metadata(tokenizer__ggml__add_bos_token=bos)
    tokenizer = read_gguf(write(tmp_path / "a.gguf", table, tensors())).tokenizer
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "agevlm"}')
    loaded = load_tokenizer(tmp_path)
    for text in ("hello 1234", "<|im_start|>a  b<|im_end|>\n", "", "½ ünï"):
        assert loaded.encode(text) == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == 2


def sentencepiece(**more: Any) -> dict[str, Any]:
    """A vocabulary with scores and byte pieces; "ab" is better than "bc"."""
    words = {"▁": -9.0, "a": -8.0, "b": -7.0, "c": -6.0, "bc": -5.0, "ab": -2.0, "▁ab": -1.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    return metadata(
        tokenizer__ggml__model="llama",
        tokenizer__ggml__pre="default",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=[0.0] * 259 + list(words.values()),
        tokenizer__ggml__token_type=[2, 3, 3] + [6] * 256 + [1] * len(words),
        tokenizer__ggml__merges=None,
        tokenizer__ggml__unknown_token_id=0,
        **more,
    )


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    matrix = np.zeros((266, WIDTH), np.float32)
    path = write(tmp_path / "a.gguf", sentencepiece(), {**tensors(), "token_embd.weight": matrix})
    assert pieces(path, "abc ab é") == ["<s>", "▁ab", "c", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    table = sentencepiece(tokenizer__ggml__add_space_prefix=False)
    path = write(tmp_path / "b.gguf", table, {**tensors(), "token_embd.weight": matrix})
    assert pieces(path, "abc ab") == ["<s>", "ab", "c", "▁ab"]


# What cannot be used


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general__architecture": "mamba"}, r"expected general.architecture llama, .*got 'mamba'"),
        ({"general__architecture": None}, r"expected general.architecture llama, .*got None"),
        ({"block_count": None}, r"expected llama.block_count, a positive int, got None"),
        ({"embedding_length": "wide"}, r"expected llama.embedding_length, a positive int"),
        ({"attention__head_count_kv": [2, 1]}, r"the same in every layer; got \[2, 1\]"),
        ({"attention__layer_norm_rms_epsilon": None}, r"layer_norm_rms_epsilon, a positive float"),
        (
            {"rope__dimension_count": 4},
            r"expected llama.rope.dimension_count 8, the width of a head",
        ),
        ({"attention__value_length": 4}, r"expected llama.attention.value_length 8"),
        ({"tokenizer__ggml__model": "bert"}, r"tokenizer.ggml.model gpt2 or llama, got 'bert'"),
        ({"tokenizer__ggml__pre": "default"}, r"tokenizer.ggml.pre gpt-2, .*got 'default'"),
        ({"tokenizer__ggml__pre": None}, r"tokenizer.ggml.pre gpt-2, .*got None"),
        ({"tokenizer__ggml__merges": None}, r"expected tokenizer.ggml.merges"),
        ({"tokenizer__ggml__merges": ["1 9"]}, r"tokens and merges do not fit: .*`19`"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, r"a list of distinct texts"),
        ({"tokenizer__ggml__tokens": None}, r"a list of distinct texts"),
        ({"tokenizer__ggml__eos_token_id": 9999}, r"eos_token_id 9999 is not one of"),
        ({"split__count": 3}, None),
    ],
)
def test_unusable_metadata_is_said_in_one_line(change, message, tmp_path):
    table = metadata(**change)
    if message is None:
        table["split.count"], message = 3, r"one of 3 parts; merge them first"
    path = write(tmp_path / "bad.gguf", table, tensors())
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_tensor_types_and_names_are_refused(tmp_path):
    packed = (Q4_K, (HIDDEN, 256), bytes(HIDDEN * 144))
    path = write(tmp_path / "a.gguf", metadata(), {**tensors(), "blk.0.ffn_up.weight": packed})
    with pytest.raises(UserError, match=r"ffn_up.weight is stored as Q4_K, expected F32, .*Q8_0"):
        read_gguf(path)
    more = {**tensors(), "blk.0.ffn_gate_exps.weight": tensors()["blk.0.ffn_gate.weight"]}
    with pytest.raises(UserError, match=r"blk.0.ffn_gate_exps.weight \(0 rules\)"):
        read_gguf(write(tmp_path / "b.gguf", metadata(), more))
    few = {"output_norm.weight": tensors()["output_norm.weight"]}
    with pytest.raises(UserError, match=r"found no token_embd.weight"):
        read_gguf(write(tmp_path / "c.gguf", metadata(), few))
    small = {**tensors(), "token_embd.weight": np.zeros((5, WIDTH), np.float32)}
    with pytest.raises(UserError, match="expected at most 5 tokens"):
        read_gguf(write(tmp_path / "d.gguf", metadata(), small))


def test_files_that_are_not_whole_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
    whole, cut = tiny.read_bytes(), tmp_path / "cut.gguf"
    for size, message in (
        (0, "expected a GGUF file, got one that starts with b''"),
        (4, "ends within its header"),
        (30, "ends within its header"),
        (3000, "ends within its header"),
        (len(whole) - 64, "is not all there; the file is incomplete"),
    ):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=message):
            read_gguf(cut)
    cut.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(UserError, match="expected GGUF version 2 or 3, got 1"):
        read_gguf(cut)
    # A length of 2**60 is not believed.
    cut.write_bytes(whole[:24] + struct.pack("<Q", 1 << 60) + whole[32:])
    with pytest.raises(UserError, match="ends within its header"):
        read_gguf(cut)
    cut.write_bytes(whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:])
    with pytest.raises(UserError, match=r"ends within its header|unknown type"):
        read_gguf(cut)
