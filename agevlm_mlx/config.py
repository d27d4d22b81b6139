"""Strict configuration: frozen dataclasses read from TOML or JSON, with dotted overrides.

Unknown keys, wrong types and missing values are errors that name the key, so that a typo
in a recipe never silently trains something else.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import UserError

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `data`, checking every key and type.

    `where` is the dotted path (or file) that error messages start with. Raises ``UserError``
    for an unknown key (with the closest known one), a missing key or a wrong type.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(data, Mapping):
        raise UserError(f"{where or cls.__name__}: expected a table, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            advice = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(fields)}"
            raise UserError(f"{prefix}{key}: unknown key; {advice}")
    values = {}
    for name, spec in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{prefix}{name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: missing; expected {_describe(hints[name])}")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary of a dataclass, without keys whose value is None."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_origin(hint) else str(hint)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = UserError(f"{where}: expected {_describe(hint)}, got {value!r}")
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except UserError as error:
                if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                    raise error
        raise wrong
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise wrong
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise wrong
        return tuple(
            _convert(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        if not args:
            return dict(value)
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ``UserError`` names the file and line when it is malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pass the path of a .toml recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def read_json(path: Path, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON file; ``UserError`` names the file and line when it is malformed.

    keep: what each object becomes as soon as it is read, so that of a huge file only what is
    wanted stays in memory.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=keep)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error.reason}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5000 digits
        raise UserError(f"{path}: not JSON that can be read: {error}") from None


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``key.sub=value`` (or ``list.0.key=value``, ``list.*.key=value`` for all of a list)
    assignments to a nested dictionary.

    Values are read as TOML (``3``, ``0.1``, ``true``, ``[1, 2]``, ``"text"``); a bare word
    is a string. Unknown keys are found later, by `from_dict`.
    """
    data = json.loads(json.dumps(data))
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted.strip():
            raise UserError(f"{assignment!r}: expected key=value, for example train.lr=1e-3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        _assign(data, dotted.strip().split("."), value, dotted)
    return data


def _assign(node: Any, keys: Sequence[str], value: Any, dotted: str) -> None:
    key, *rest = keys
    places: Sequence[Any] = [key]
    if isinstance(node, list):
        places = range(len(node)) if key == "*" else [_index(node, key, dotted)]
    for place in places:
        if not rest:
            node[place] = value
            continue
        inner = node[place] if isinstance(node, list) else node.setdefault(place, {})
        if not isinstance(inner, dict | list):
            raise UserError(f"{dotted}: {key} is a value, not a table")
        _assign(inner, rest, value, dotted)


def _index(items: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"{dotted}: expected an index below {len(items)} or *, got {key!r}")
    return int(key)


#: Layers beyond which a configuration is taken for damaged: no model has them, and building them
#: would fill the memory.
MAX_LAYERS = 1000


def check_depth(table: Mapping[str, Any], where: str) -> None:
    """``UserError`` if a model's configuration asks for more than `MAX_LAYERS` layers."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depths"):
        value = table.get(name)
        for depth in value if isinstance(value, list | tuple) else (value,):
            if isinstance(depth, int | float) and depth > MAX_LAYERS:
                raise UserError(f"{where}.{name}: expected at most {MAX_LAYERS}, got {depth}")


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the image reaches the language model.

    ``cross`` inserts gated cross-attention before the named decoder layers, ``concat`` puts
    the image tokens in front of the text (the LLaVA baseline).
    """

    fusion: Literal["cross", "concat"] = "cross"
    #: Decoder layers (0-based) that a cross-attention block precedes; None spreads four evenly.
    layers: tuple[int, ...] | None = None
    #: Heads of the cross-attention; None takes the language model's own.
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    #: A learnable key/value that a word about nothing in the picture can look at.
    null_slot: bool = True
    #: Initial gate, before tanh: 0 keeps a pretrained language model's text untouched.
    gate_init: float = 0.0
    #: A gated MLP after the attention, as in Llama-3.2-Vision.
    gated_mlp: bool = False
    projector: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    projector_hidden_size: int | None = None
    #: pixel_shuffle joins factor x factor neighbouring tokens into one.
    pixel_shuffle_factor: int = 2
    #: Add to each image token where it lies: for encoders whose tokens do not tell (cross-attention
    #: takes them as a set), as the embedded one.
    image_positions: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ``config.json`` of a checkpoint."""

    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    fusion_config: FusionConfig = field(default_factory=FusionConfig)
    quantization: dict[str, Any] | None = None
    model_type: Literal["agevlm"] = "agevlm"

    def __post_init__(self) -> None:
        for name in ("text_config", "vision_config"):
            if "model_type" not in getattr(self, name):
                raise UserError(f"{name}.model_type: missing; expected for example 'llama'")
