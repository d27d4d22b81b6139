"""A language model in a GGUF file, as the Hugging Face checkpoint it was made from.

llama.cpp's converter renames tensors, reorders the rows of q and k where it rotates neighbours
instead of halves, and adds one to Gemma's norms; all of that is undone here. Metadata and
tokenizer become config.json's keys and a `PreTrainedTokenizerFast`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerFast

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import Rule, apply_rules

from .gguf_file import Tensor, read_header, read_tensors
from .gguf_tokenizer import build_tokenizer, end_tokens


@dataclass(frozen=True)
class GgufModel:
    """A language model and its tokenizer."""

    #: config.json of a Hugging Face or mlx-lm model.
    text_config: dict[str, Any]
    #: Hugging Face names; dequantised one by one when they are evaluated.
    weights: dict[str, mx.array]
    tokenizer: PreTrainedTokenizerFast
    #: What the file says of itself (name, license, ...) and how its tensors are stored.
    notes: dict[str, str]


# Configuration


@dataclass(frozen=True)
class _Keys:
    """The metadata of one architecture, by name without the prefix."""

    metadata: Mapping[str, Any]
    path: Path

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def need(self, name: str, kind: type = int) -> Any:
        value = self.get(name)
        if not isinstance(value, kind) or (kind is int and value < 1):
            raise UserError(
                f"{self.path}: expected {self.architecture}.{name}, a positive {kind.__name__}, "
                f"got {value!r}; the file is incomplete or of an unusual model"
            )
        return value


def _head_dim(keys: _Keys) -> int:
    """Width of a head, the same for q, k, v and for what is rotated."""
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head = keys.get("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.get(name, head) != head:
            raise UserError(
                f"{keys.path}: expected {keys.architecture}.{name} {head}, the width of a head, "
                f"got {keys.get(name)}; such a model cannot be imported"
            )
    return head


def _rope_scaling(
    keys: _Keys, factors: mx.array | None, theta: float, head: int
) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(keys.path, factors, theta, head)
    # Files from before 2023-10 have the factor alone.
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if kind == "none" or factor == 1.0:
        return None
    if kind != "linear":
        raise UserError(
            f"{keys.path}: expected rope scaling none, linear or Llama 3's, got {kind!r}; convert "
            "the original checkpoint instead"
        )
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(path: Path, factors: mx.array, theta: float, head: int) -> dict[str, Any]:
    """Llama 3's scaling, of which the file keeps only what each frequency is divided by.

    All published models have the same bounds, so the largest divisor tells the rest; another
    rule would give other divisors.
    """
    stored = np.array(factors.astype(mx.float32))
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise UserError(
            f"{path}: rope_freqs.weight does not hold Llama 3's rope scaling; convert the "
            "original checkpoint instead"
        )
    return scaling


def _config(keys: _Keys, tensors: Mapping[str, Tensor], factors: mx.array | None) -> dict[str, Any]:
    """What config.json says of every architecture here."""
    if "token_embd.weight" not in tensors:
        raise UserError(f"{keys.path}: found no token_embd.weight; expected a whole model")
    vocabulary = tensors["token_embd.weight"].shape[0]
    tokens = keys.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > vocabulary:
        raise UserError(
            f"{keys.path}: expected at most {vocabulary} tokens, one for each row of "
            f"token_embd.weight, got {len(tokens)}"
        )
    heads, head = keys.need("attention.head_count"), _head_dim(keys)
    groups = keys.get("attention.head_count_kv", heads)
    if not isinstance(groups, int) or not groups or heads % groups:
        raise UserError(
            f"{keys.path}: expected {keys.architecture}.attention.head_count_kv that divides "
            f"{heads}, the same in every layer; got {groups!r}"
        )
    theta = keys.get("rope.freq_base", 10000.0)
    ends = end_tokens(keys.metadata)
    config = {
        "hidden_size": keys.need("embedding_length"),
        "num_hidden_layers": keys.need("block_count"),
        "intermediate_size": keys.need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "max_position_embeddings": keys.need("context_length"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if scaling := _rope_scaling(keys, factors, theta, head):
        config["rope_scaling"] = scaling
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (number := keys.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[name] = number
    return config


def _no_more(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _qwen2_config(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] != width:  # neither transformers nor mlx-lm has a key for it
        raise UserError(f"{keys.path}: expected heads of width {width}, got {config['head_dim']}")
    return {}


def _gemma3_config(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    # The file leaves out the scale of attention. It is the head's width, but for the 27B model,
    # which llama.cpp too knows by its depth.
    scale = config["head_dim"]
    if config["num_hidden_layers"] == 62:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {
        "query_pre_attn_scalar": scale,
        "sliding_window": keys.need("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "rope_theta": keys.get("rope.freq_base", 1e6),
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 1e4),
        "hidden_activation": "gelu_pytorch_tanh",
    }


# Tensors


def _unpermuted(heads: int) -> Callable[[mx.array], mx.array]:
    """Rows of q or k from neighbouring pairs (x0 y0 x1 y1 ...), as llama.cpp rotates them, to
    halves (x0 x1 ... y0 y1 ...) in each of `heads` heads."""

    def change(rows: mx.array) -> mx.array:
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return change


def _minus_one(norm: mx.array) -> mx.array:
    return norm.astype(mx.float32) - 1


_LAYER = r"blk\.(\d+)\."
_OUT = r"model.layers.\1."


def _norms(
    names: Mapping[str, str], change: Callable[[mx.array], mx.array] | None = None
) -> list[Rule]:
    found = [Rule(rf"{_LAYER}{a}\.weight", rf"{_OUT}{b}.weight", change) for a, b in names.items()]
    return [*found, Rule(r"output_norm\.weight", "model.norm.weight", change)]


_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _rules(config: Mapping[str, Any], family: "_Family") -> list[Rule]:
    q = k = None
    if family.permuted:
        q = _unpermuted(config["num_attention_heads"])
        k = _unpermuted(config["num_key_value_heads"])
    end = r"\.(weight|bias)" if family.biases else r"\.(weight)"
    return [
        Rule(r"token_embd\.weight", "model.embed_tokens.weight"),
        Rule(r"output\.weight", "lm_head.weight"),
        Rule(r"rope_freqs\.weight", drop="rope scaling, in the config"),
        Rule(rf"{_LAYER}attn_q{end}", rf"{_OUT}self_attn.q_proj.\2", q),
        Rule(rf"{_LAYER}attn_k{end}", rf"{_OUT}self_attn.k_proj.\2", k),
        Rule(rf"{_LAYER}attn_v{end}", rf"{_OUT}self_attn.v_proj.\2"),
        Rule(rf"{_LAYER}attn_output\.weight", rf"{_OUT}self_attn.o_proj.weight"),
        Rule(rf"{_LAYER}ffn_(gate|up|down)\.weight", rf"{_OUT}mlp.\2_proj.weight"),
        *family.norms,
    ]


@dataclass(frozen=True)
class _Family:
    """How one ``general.architecture`` becomes a Hugging Face model."""

    model_type: str
    architecture: str
    norms: list[Rule]
    #: q and k rows reordered by llama.cpp's converter.
    permuted: bool = False
    #: q, k and v have biases.
    biases: bool = False
    config: Callable[[_Keys, Mapping[str, Any]], dict[str, Any]] = _no_more


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", _norms(_TWO_NORMS), permuted=True),
    "smollm3": _Family("smollm3", "SmolLM3ForCausalLM", _norms(_TWO_NORMS), permuted=True),
    "qwen2": _Family(
        "qwen2", "Qwen2ForCausalLM", _norms(_TWO_NORMS), biases=True, config=_qwen2_config
    ),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _norms(_TWO_NORMS | _HEAD_NORMS)),
    "gemma3": _Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _norms(_FOUR_NORMS | _HEAD_NORMS, _minus_one),
        config=_gemma3_config,
    ),
}


def read_gguf(path: Path, dtype: mx.Dtype = mx.float32) -> GgufModel:
    """The language model of a GGUF file, its weights dequantised to `dtype` when evaluated.

    Memory holds the file's tensors as stored (packed), and each one wide only while it is used:
    take entries out of `weights` as you go. ``UserError`` for a file that is not whole, or of
    an architecture, tensor type or tokenizer that is not known here.
    """
    path = Path(path)
    metadata, tensors = read_header(path)
    keys = _Keys(metadata, path)
    family = _FAMILIES.get(keys.architecture)
    if family is None:
        raise UserError(
            f"{path}: expected general.architecture {', '.join(_FAMILIES)}; got "
            f"{metadata.get('general.architecture')!r}; convert the original checkpoint instead"
        )
    tokenizer = build_tokenizer(metadata, path)
    arrays = read_tensors(path, tensors)
    config = _config(keys, tensors, arrays.get("rope_freqs.weight"))
    config |= family.config(keys, config)
    config |= {"model_type": family.model_type, "architectures": [family.architecture]}
    weights, _ = apply_rules(arrays, _rules(config, family), path)
    for name in list(weights):
        weights[name] = weights[name].astype(dtype)
    kinds = Counter(tensor.kind for tensor in tensors.values())
    notes = {"stored as": ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common())}
    for name in ("name", "basename", "organization", "license", "license.link", "quantized_by"):
        if value := metadata.get(f"general.{name}"):
            notes[name] = str(value)
    return GgufModel(config, weights, tokenizer, notes)
