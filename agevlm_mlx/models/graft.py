"""Any mlx-lm language model becomes a VLM: graft, don't fork.

Chosen decoder layers get a `cross_attn` child and a class whose call runs it first; every
parameter of the language model keeps its name, so that mlx-lm's checkpoints, LoRA tuner and
quantiser see the model they know.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING

from ..config import FusionConfig, check_depth
from ..errors import UserError, one_line
from ..kernels.guided_attention import guided_attention
from .cache import VisionCache
from .cross_attention import GatedCrossAttention, MapRequest, Recorder


def build_language_model(text_config: Mapping[str, Any]) -> Any:
    """The mlx-lm model of a ``text_config`` table, with random weights."""
    kind = str(text_config["model_type"])
    name = f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", kind) or importlib.util.find_spec(name) is None:
        raise UserError(
            f"text_config.model_type: expected an mlx-lm architecture such as 'llama', got {kind!r}"
        )
    check_depth(text_config, "text_config")
    module = importlib.import_module(name)
    try:
        return module.Model(module.ModelArgs.from_dict(dict(text_config)))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A missing field of ModelArgs, or one that its model can make nothing of.
        raise UserError(f"text_config: {kind} needs more: {one_line(error)}") from None


def tie_embeddings(lm: Any, text_config: Mapping[str, Any]) -> None:
    """Drop the output layer that Gemma 3 in mlx-lm has until it has seen a checkpoint without.

    Other architectures go by ``tie_word_embeddings`` themselves.
    """
    if text_config.get("tie_word_embeddings") and getattr(lm, "tie_word_embeddings", True) is False:
        lm.sanitize({})


def cross_layers(config: FusionConfig, depth: int) -> tuple[int, ...]:
    """The decoder layers (0-based) that a cross-attention block precedes.

    The paper names positions 2, 7, 12, 17; a 16-layer language model has no layer 17, but a
    stack of 16 self- and 4 cross-attention layers has, and the blocks then come before
    self-attention layers 2, 6, 10 and 14. Other depths are spread in the same proportion.
    """
    if config.layers is None:
        return tuple(sorted({(2 * i + 1) * depth // 8 for i in range(4)}))
    wrong = [i for i in config.layers if not 0 <= i < depth]
    if wrong or len(set(config.layers)) != len(config.layers) or not config.layers:
        raise UserError(
            f"fusion_config.layers: expected different layers from 0 to {depth - 1}, "
            f"got {list(config.layers)}"
        )
    return tuple(sorted(config.layers))


def language_model_width(lm: Any) -> int:
    """D, the width of the hidden states."""
    return lm.args.hidden_size


def _why_not(lm: Any, layers: Any) -> str | None:
    """The reason why `lm` cannot look at images, or None."""
    if hasattr(lm, "language_model"):
        return "it wraps a text model; take a text-only checkpoint of the same family"
    if not layers or not hasattr(lm, "model"):
        return "expected an mlx-lm model with .model and .layers"
    for name in ("hidden_size", "num_attention_heads"):
        if not hasattr(getattr(lm, "args", None), name):
            return f"its ModelArgs in mlx-lm have no {name}"
    for layer in layers:
        if "cache" not in inspect.signature(type(layer).__call__).parameters:
            return f"its {type(layer).__name__} is called without a cache, where an image is kept"
    return None


def _check_caches(lm: Any, kind: str, looking: Iterable[int]) -> None:
    """Recurrent layers keep a state without the text's position, by which an image is found."""
    usable = [i for i, cache in enumerate(make_prompt_cache(lm)) if hasattr(cache, "offset")]
    wrong = [i for i in looking if i not in usable]
    if wrong:
        raise UserError(
            f"fusion_config.layers: {kind} keeps no position in the cache of layers {wrong}; "
            + (f"choose among {usable}, with 'cross'" if usable else "it cannot be grafted")
        )


def graft(lm: Any, config: FusionConfig) -> tuple[int, ...]:
    """Make `lm` look at images, in place; returns the layers that do."""
    layers = getattr(lm, "layers", None)
    kind = type(lm).__module__.rpartition(".")[2]
    reason = _why_not(lm, layers)
    if reason:
        raise UserError(f"text_config.model_type: {kind} cannot be grafted: {reason}")
    assert layers is not None
    lm.model.__class__ = _trunk(type(lm.model))
    if config.fusion == "concat":
        if "input_embeddings" not in inspect.signature(type(lm.model).__call__).parameters:
            raise UserError(
                f"fusion_config.fusion: {kind} takes no "
                "input_embeddings in mlx-lm, which 'concat' needs; use 'cross'"
            )
        _check_caches(lm, kind, range(len(layers)))
        _tap_self_attention(type(lm).__module__)
        return tuple(range(len(layers)))
    chosen = cross_layers(config, len(layers))
    _check_caches(lm, kind, chosen)
    args, dim = lm.args, language_model_width(lm)
    n_heads = config.num_attention_heads or args.num_attention_heads
    n_kv_heads = config.num_key_value_heads or (
        n_heads if config.num_attention_heads else getattr(args, "num_key_value_heads", n_heads)
    )
    head_dim = config.head_dim or getattr(args, "head_dim", None) or dim // n_heads
    if n_heads % n_kv_heads:
        raise UserError(
            "fusion_config.num_attention_heads: expected a multiple of num_key_value_heads "
            f"({n_kv_heads}), got {n_heads}"
        )
    for i in chosen:
        layers[i].cross_attn = GatedCrossAttention(
            dim,
            n_heads,
            n_kv_heads,
            head_dim,
            eps=getattr(args, "rms_norm_eps", 1e-5),
            null_slot=config.null_slot,
            gate_init=config.gate_init,
            mlp_dim=getattr(args, "intermediate_size", 4 * dim) if config.gated_mlp else None,
        )
        layers[i].__class__ = _grounded(type(layers[i]))
    return chosen


_trunk_classes: dict[type, type] = {}
_grounded_classes: dict[type, type] = {}


def _trunk(trunk_class: type) -> type:
    """`trunk_class`, everything of a language model before its output layer, with a call that
    hands on chosen positions alone when it is told so (``AgeVLM.__call__``)."""
    if trunk_class not in _trunk_classes:

        @functools.wraps(trunk_class.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = trunk_class.__call__(self, *args, **kwargs)
            return self.keep(out) if self.keep and isinstance(out, mx.array) else out

        members = {"__call__": call, "keep": None}
        _trunk_classes[trunk_class] = type(trunk_class.__name__, (trunk_class,), members)
    return _trunk_classes[trunk_class]


def _grounded(layer_class: type) -> type:
    """`layer_class` with a call that runs `cross_attn` when its cache holds an image."""
    if layer_class not in _grounded_classes:

        def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            for cache in (*args, *kwargs.values()):
                if isinstance(cache, VisionCache) and cache.vision is not None:
                    x = self.cross_attn(x, cache.vision, cache.offset, cache.request)
            return layer_class.__call__(self, x, *args, **kwargs)

        name = f"Grounded{layer_class.__name__}"
        _grounded_classes[layer_class] = type(name, (layer_class,), {"__call__": call})
    return _grounded_classes[layer_class]


def _tap_self_attention(module_name: str) -> None:
    """Let the self-attention of one mlx-lm architecture report rows over a prefix image.

    Every mlx-lm model calls the ``scaled_dot_product_attention`` of its own module with its
    cache; ours calls the same and, when the cache carries a request, also computes the rows.
    """
    module = sys.modules[module_name]
    fused = getattr(module, "scaled_dot_product_attention", None)
    if fused is None or getattr(fused, "reports_rows", False):
        return

    def attend(queries: mx.array, keys: Any, values: Any, cache: Any, *args: Any, **kw: Any):
        # A model with fusion = "cross" may share the architecture: it has no prefix to report.
        request = cache.request if isinstance(cache, VisionCache) and cache.prefix else None
        if request is not None:
            mask = kw.get("mask", args[1] if len(args) > 1 else None)
            scale = kw.get("scale", args[0] if args else None)
            if isinstance(keys, tuple | list):  # a quantised KV cache
                keys_now = mx.dequantize(*keys, group_size=cache.group_size, bits=cache.bits)
            else:
                keys_now = keys
            _report(queries, keys_now, scale, mask, cache, request)
        return fused(queries, keys, values, cache, *args, **kw)

    attend.reports_rows = True  # pyright: ignore[reportFunctionMemberAccess]
    module.scaled_dot_product_attention = attend  # pyright: ignore[reportAttributeAccessIssue]


def _report(
    q: mx.array, keys: mx.array, scale: Any, mask: Any, cache: VisionCache, request: Any
) -> None:
    if isinstance(request, MapRequest):
        request.maps.append(_prefix_map(q, keys, scale, mask, cache.prefix, request))
        return
    assert isinstance(request, Recorder)
    before = cache.offset - q.shape[2]  # the cache already holds this call's tokens
    columns = request.columns(before, q.shape[2])
    if columns:
        wanted = mx.array(list(columns))
        asked = MapRequest(mx.zeros_like(wanted), wanted, None, [])
        maps = _prefix_map(q, keys, scale, mask, cache.prefix, asked).mean(1)
        for n, column in enumerate(columns):
            request.add(before + column, maps[n : n + 1])


def _prefix_map(
    q: mx.array, keys: mx.array, scale: Any, mask: Any, prefix: int, request: MapRequest
) -> mx.array:
    """fp32 [P heads prefix]: the share of self-attention that goes to the image tokens."""
    T, L = q.shape[2], keys.shape[2]
    if isinstance(mask, mx.array):
        allowed = mx.broadcast_to(mask, (q.shape[0], 1, T, L))[request.rows, 0, request.cols]
    else:
        allowed = mx.arange(L)[None] <= (L - T + request.cols)[:, None]
    heads = request.heads or q.shape[1]
    maps = guided_attention(q, keys, request.rows, request.cols, heads, scale, allowed)
    return maps[..., :prefix]
