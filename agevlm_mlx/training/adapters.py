r"""Low-rank adapters on the language model: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).

The layers and the file format are mlx-lm's own: a saved adapter is one that ``mlx_lm`` loads onto
the language model alone. An adapted ``q_proj.weight`` becomes ``q_proj.linear.weight``, beside it
come ``q_proj.lora_a``, ``q_proj.lora_b`` and for DoRA ``q_proj.m``; to train only these::

    trainable = [["language_model\\..*\\.(lora_a|lora_b|m)", 1.0], [".*", 0.0]]
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .. import config
from ..atomic import write_file, write_text
from ..errors import UserError, one_line
from ..models.agevlm import AgeVLM
from .stages import LoraSpec

#: The files of an adapter's folder, as mlx-lm names them.
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_LEAVES = ("lora_a", "lora_b", "m")
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, nn.QuantizedLinear, *_EXPERTS)


def add(model: AgeVLM, spec: LoraSpec) -> None:
    """Put adapters that change nothing yet on the language model's linear layers, in place.

    Cross-attention gets none. ``UserError`` for layers that the model has not, and for a model
    that has adapters.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers  # slow to import

    depth = len(model.layers)
    if (spec.num_layers or 0) > depth:
        raise UserError(f"model.lora.num_layers: expected at most {depth}, got {spec.num_layers}")
    if _adapted(model):
        raise UserError("model.lora: the model has adapters already; fuse them first")
    known = dict(linear for layer in model.layers for linear in _linear_layers(layer))
    keys = list(known) if spec.keys is None else list(spec.keys)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            advice = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known)}"
            raise UserError(
                f"model.lora.keys: no linear layer '{key}' in a decoder layer; {advice}"
            )
        bits = getattr(known[key], "bits", 4)
        if spec.dora and (isinstance(known[key], _EXPERTS) or bits not in (2, 4, 8)):
            raise UserError(
                f"model.lora: mlx-lm has no DoRA for '{key}' ({type(known[key]).__name__}, "
                f"{bits} bits); use LoRA or leave it out of keys"
            )
    # No keys would mean all linear layers to mlx-lm, those of cross-attention too.
    settings = _settings(spec) | {"keys": keys}
    linear_to_lora_layers(
        model.language_model, spec.num_layers or depth, settings, use_dora=spec.dora
    )


def fuse(model: AgeVLM) -> None:
    """Work the adapters into the weights and remove them, in place.

    A quantised layer becomes one in full precision (float of its scales): quantised again, it
    would not answer as trained. A checkpoint may mix both.
    """
    fused = []
    for path, module in _adapted(model):
        base = module["linear"]
        dtype = (base["scales"] if "scales" in base else base["weight"]).dtype
        whole = module.fuse(dequantize=True)
        whole.weight = whole.weight.astype(dtype)  # DoRA's length of a row is float32
        fused.append((path, whole))
    if fused:
        model.language_model.update_modules(cast(dict, tree_unflatten(fused)))


def parameters(model: AgeVLM) -> dict[str, mx.array]:
    """What adapters add, by its name within the language model."""
    return {
        f"{path}.{leaf}": module[leaf]
        for path, module in _adapted(model)
        for leaf in _LEAVES
        if leaf in module
    }


def save(folder: Path, model: AgeVLM, spec: LoraSpec) -> None:
    """Write the adapters as a folder that mlx-lm and `load` read."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted({path.split(".layers.", 1)[1].split(".", 1)[1] for path, _ in _adapted(model)})
    settings = {
        "fine_tune_type": "dora" if spec.dora else "lora",
        "num_layers": spec.num_layers or len(model.layers),
        "lora_parameters": _settings(spec) | {"keys": keys},
    }
    tensors = {name: value.astype(mx.float32) for name, value in parameters(model).items()}
    write_file(
        folder / WEIGHTS,
        lambda path: mx.save_safetensors(str(path), tensors, {"format": "mlx"}),
    )
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")


def load(folder: Path, model: AgeVLM) -> LoraSpec:
    """Put the adapters of a folder on `model`, as `add` does, and give them their weights.

    ``UserError`` for a folder that is no adapter, and for one of another model: every tensor in it
    and every adapter must find the other.
    """
    spec = _read_spec(folder)
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(folder / WEIGHTS)))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder / WEIGHTS}: not readable: {one_line(error)}") from None
    add(model, spec)
    own = {name: value.shape for name, value in parameters(model).items()}
    given = {name: value.shape for name, value in tensors.items()}
    if own != given:
        same = sum(given.get(name) == shape for name, shape in own.items())
        raise UserError(
            f"{folder}: adapters of another model: {same} of {len(given)} tensors fit its "
            f"{len(own)}; load it onto the model it was trained on"
        )
    model.language_model.load_weights(list(tensors.items()), strict=False)
    return spec


def _read_spec(folder: Path) -> LoraSpec:
    where = folder / CONFIG
    if not where.is_file():
        raise UserError(f"{folder}: expected an adapter's folder, found no {CONFIG} in it")
    table = config.read_json(where)
    kind = table.get("fine_tune_type", "lora") if isinstance(table, dict) else None
    if kind not in ("lora", "dora") or not isinstance(table.get("lora_parameters"), dict):
        raise UserError(f"{where}: expected fine_tune_type lora or dora and lora_parameters")
    settings = {**table["lora_parameters"], "num_layers": table.get("num_layers")}
    settings = {key: value for key, value in settings.items() if value is not None}
    return config.from_dict(LoraSpec, settings | {"dora": kind == "dora"}, str(where))


def _settings(spec: LoraSpec) -> dict[str, Any]:
    return {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout}


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a decoder layer that can have adapters, by their paths in it."""
    for path, module in cast(list[tuple[str, nn.Module]], layer.named_modules()):
        if isinstance(module, _LINEAR) and not path.startswith("cross_attn."):
            yield path, module


def _adapted(model: AgeVLM) -> list[tuple[str, Any]]:
    return [(p, m) for p, m in model.language_model.named_modules() if "lora_a" in m]
