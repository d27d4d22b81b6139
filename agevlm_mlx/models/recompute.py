"""Gradient checkpointing: less memory for a third more arithmetic (arXiv 1604.06174).

Inside ``recomputed(model)`` the decoder layers and the blocks of the vision encoder keep only what
they were given; what is inside them is computed again when the backward pass gets there.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as mlx_lm_cache

from ..errors import UserError
from .agevlm import AgeVLM
from .cache import VisionCache
from .cross_attention import MapRequest, VisionKV
from .hidden_states import reclassed

#: What a decoder layer is given that has arrays in it and is no list, tuple or dictionary.
_HOLDERS = (VisionCache, VisionKV, MapRequest, mlx_lm_cache._BaseCache)


@contextlib.contextmanager
def recomputed(model: AgeVLM) -> Iterator[None]:
    """Whatever is differentiated inside the block recomputes layers; values stay as they are.

    Gradients reach the parameters that are not frozen in the module. ``UserError`` for a model
    with dropout in these layers: it would drop other elements the second time.
    """
    check_recomputable(model)
    with reclassed([*model.layers, *_vision_blocks(model)], _recomputing):
        yield


def check_recomputable(model: AgeVLM) -> None:
    """``UserError`` if `recomputed` cannot serve `model`."""
    for block in [*model.layers, *_vision_blocks(model)]:
        if any(isinstance(m, nn.Dropout) and m._p_1 < 1 for m in block.modules()):
            raise UserError(
                "train.grad_checkpoint: expected a model without dropout, which recomputed layers "
                "would draw anew; set model.lora.dropout = 0"
            )


def _vision_blocks(model: AgeVLM) -> list[nn.Module]:
    modules = cast(list[tuple[str, nn.Module]], model.vision_tower.named_modules())
    return [module for path, module in modules if re.search(r"(^|\.)layers\.\d+$", path)]


_classes: dict[type, type] = {}


def _recomputing(kind: type) -> type:
    """`kind`, a module's class, with a call that is checkpointed.

    What a layer reads from its cache (an image's keys, a prefix) goes in as arguments, and what it
    leaves there (keys, maps) comes out as results, or no gradient would pass; the layer itself
    works on a copy of the cache.
    """
    if kind not in _classes:

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            params = cast(list[tuple[str, mx.array]], tree_flatten(self.trainable_parameters()))
            caches = [c for c in (*args, *kwargs.values()) if isinstance(c, _HOLDERS)]
            with _new_maps(caches):
                given = [value for _, value in params]
                # A copy: by the time of the backward pass the caches have gone on.
                asked = _map((args, kwargs), lambda array: given.append(array) or array)
                left: list[Any] = []

                def run(*given: mx.array) -> list[mx.array]:
                    values = iter(given)
                    _place(self, [(name, next(values)) for name, _ in params])
                    own_args, own_kwargs = _map(asked, lambda _: next(values))
                    out = kind.__call__(self, *own_args, **own_kwargs)
                    owns = [c for c in (*own_args, *own_kwargs.values()) if isinstance(c, _HOLDERS)]
                    results: list[mx.array] = []
                    everything = (out, [_written(own) for own in owns])
                    _map(everything, results.append)
                    if not left:  # not when it runs again
                        left.append(everything)
                    return results

                values = iter(_checkpointed(run)(*given))
                _place(self, params)  # instead of what `run` was given: a layer may run again
                out, written = _map(left[0], lambda _: next(values))
                left[0] = None
                for cache, parts in zip(caches, written, strict=True):
                    _write(cache, parts)
                return out

        _classes[kind] = type(kind.__name__, (kind,), {"__call__": call})
    return _classes[kind]


def _checkpointed(run: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
    """Like ``mx.checkpoint``, with the backward pass in an order that saves memory.

    Nothing is computed again before its gradient has come, and the layer before gets its gradient
    only when those of this layer's parameters are done. Otherwise MLX may first go through all
    layers and keep what was computed again in each for its parameters.
    """
    function = mx.custom_function(run)

    @function.vjp
    def backward(given: Any, slopes: Any, results: Any) -> tuple[mx.array, ...]:
        given = mx.depends(list(given), list(slopes))
        _, gradients = mx.vjp(run, given, list(slopes))
        return tuple(mx.depends(gradients, gradients))

    return cast(Any, function)


def _place(module: nn.Module, params: list[tuple[str, mx.array]]) -> None:
    module.update(cast(dict, tree_unflatten(params)) if params else {})


def _map(value: Any, f: Callable[[mx.array], Any]) -> Any:
    """A copy of `value` with `f` of each of its floating-point arrays, always in one order."""
    if isinstance(value, mx.array):
        return f(value) if mx.issubdtype(value.dtype, mx.floating) else value
    if isinstance(value, list | tuple):
        return type(value)([_map(v, f) for v in value])
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    if isinstance(value, _HOLDERS):
        other = copy.copy(value)
        vars(other).update(_map(vars(value), f))
        return other
    return value


def _written(cache: Any) -> tuple[Any, list[mx.array]]:
    """What a layer leaves in a cache: the state of its text, and maps."""
    if not isinstance(cache, VisionCache):
        return vars(cache), []
    maps = cache.request.maps if isinstance(cache.request, MapRequest) else []
    return vars(cache.text), maps


def _write(cache: Any, parts: tuple[dict[str, Any], list[mx.array]]) -> None:
    text, maps = parts
    vars(cache.text if isinstance(cache, VisionCache) else cache).update(text)
    if maps:
        cast(Any, cache).request.maps += maps


@contextlib.contextmanager
def _new_maps(caches: list[Any]) -> Iterator[None]:
    """Hide the maps of earlier layers, which are nothing to this one."""
    requests = [c.request for c in caches if isinstance(getattr(c, "request", None), MapRequest)]
    earlier = [request.maps for request in requests]
    for request in requests:
        request.maps = []
    try:
        yield
    finally:
        for request, maps in zip(requests, earlier, strict=True):
            request.maps = maps + request.maps
