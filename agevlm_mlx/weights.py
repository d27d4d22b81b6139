"""Checkpoint folders: load, check and save (layout: ``ARCHITECTURE.md``, "Formats")."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as mlx_lm_load_tokenizer

from .config import ModelConfig, from_dict, read_json, to_dict
from .data.image import Preprocessor
from .errors import UserError, one_line
from .hub import download
from .models.agevlm import AgeVLM
from .models.tensors import assign
from .models.vision import fitted

#: Where ``make demo`` leaves its model; preferred over the shipped one when it is there.
DEMO_MODEL = Path("runs/demo/guided")
#: Bytes of a weight file beyond which a checkpoint is split (as the hub's own tools do).
MAX_SHARD = 5 << 30
#: Parameters of the teacher's side (guidance and distillation heads): dropped from checkpoints.
TEACHER_PREFIX = "sam_"


@dataclass(frozen=True)
class Loaded:
    """A model ready to use and everything that belongs to it."""

    model: AgeVLM
    tokenizer: TokenizerWrapper
    preprocessor: Preprocessor
    path: Path


def shipped(name: str) -> Path:
    """A folder of the package's own assets: ``model``, ``encoder`` or ``teacher``."""
    return Path(str(resources.files("agevlm_mlx"))) / "assets" / name


def resolve(source: str | Path | None) -> Path:
    """The checkpoint folder of a path, a Hugging Face id, or the default (None)."""
    if source is None:
        return DEMO_MODEL if (DEMO_MODEL / "config.json").is_file() else shipped("model")
    path = Path(os.path.expanduser(source))  # a ~user unknown here stays as it is
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: expected a checkpoint folder, got a file; pass its folder")
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(
            f"{path}: no such folder; pass a checkpoint folder or a hub id like org/name"
        )
    patterns = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
    return download(text, patterns)


def read_config(folder: Path) -> ModelConfig:
    """The ``config.json`` of a checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected an AgeVLM checkpoint, found no config.json in it")
    data = read_json(path)
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != "agevlm":
        raise UserError(
            f"{path}: expected model_type 'agevlm', got {repr(kind)[:40]}; this is another model"
        )
    # A copy of `quantization` for the hub's pages, and what an export says to other programs.
    for name in ("quantization_config", "model_file", "image_token_id"):
        data.pop(name, None)
    return from_dict(ModelConfig, data, str(path))


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a checkpoint folder, from one file or from shards."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        table = read_json(index)
        if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
            raise UserError(f"{index}: expected a weight_map of tensor names to files")
        names = sorted(set(map(str, table["weight_map"].values())))
    weights: dict[str, mx.array] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is incomplete")
        try:
            weights.update(mx.load(str(path)))  # pyright: ignore[reportArgumentType, reportCallIssue]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    return weights


_SAFETENSORS_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}


def write_safetensors(path: Path, weights: dict[str, mx.array]) -> None:
    """Write one safetensors file, emptying `weights` on the way.

    ``mx.save_safetensors`` evaluates everything first; here each array is evaluated, written
    and let go before the next one, so that lazy arrays of any total size pass through the
    memory of one.
    """
    # Wide types first keep every tensor aligned to its own size.
    names = sorted(weights, key=lambda name: (-weights[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in names:
        array, start = weights[name], end
        end += array.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype],
            "shape": array.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = mx.contiguous(weights.pop(name)).reshape(-1)
            if array.size:
                file.write(memoryview(array.view(mx.uint8)))  # pyright: ignore[reportArgumentType]
            del array
            mx.clear_cache()


def write_weights(folder: Path, weights: dict[str, mx.array], max_shard: int = MAX_SHARD) -> None:
    """Write ``model.safetensors``, or shards of at most `max_shard` bytes, and their index;
    `weights` is emptied on the way."""
    shards: list[list[str]] = [[]]
    room, total = max_shard, 0
    for name, array in weights.items():
        if shards[-1] and array.nbytes > room:
            shards.append([])
            room = max_shard
        shards[-1].append(name)
        room -= array.nbytes
        total += array.nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_safetensors(folder / file, {name: weights.pop(name) for name in names})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def quantize(model: AgeVLM, settings: Mapping[str, Any], stored: Mapping[str, mx.array]) -> None:
    """Replace the layers that `stored` holds quantised weights for.

    settings: the ``quantization`` table of ``config.json``, as mlx-lm writes it: ``group_size``,
    ``bits`` and ``mode``, and under the path of a layer what is different there. ``UserError``
    for settings that MLX has no such layers for.
    """
    common = {name: settings[name] for name in ("group_size", "bits", "mode") if name in settings}
    if not {"group_size", "bits"} <= common.keys():
        raise UserError(f"quantization: expected group_size and bits, got {list(settings)[:4]}")

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in stored or not hasattr(module, "to_quantized"):
            return False
        own = settings.get(path)
        return dict(own if isinstance(own, Mapping) else common)

    try:
        nn.quantize(model, class_predicate=choose)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"quantization: expected group_size and bits as mlx-lm writes them: {one_line(error)}"
        ) from None


def load_tokenizer(folder: Path, eos_token_ids: list[int] | int | None = None) -> TokenizerWrapper:
    """mlx-lm's tokenizer of a folder, without transformers' remarks on our model type.

    eos_token_ids: all tokens that end an answer, when they are more than the tokenizer's own.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return mlx_lm_load_tokenizer(folder, eos_token_ids=eos_token_ids)
    finally:
        logging.set_verbosity(verbosity)


def load(source: str | Path | None = None, lazy: bool = False) -> Loaded:
    """Load a checkpoint folder or hub id; None takes the demo's model or the shipped one.

    lazy: leave the weights on disk until they are evaluated (everything is checked all the same).
    Raises ``UserError`` when something is missing or belongs to another architecture.
    """
    folder = resolve(source)
    config = read_config(folder)
    model = AgeVLM(config)
    weights = read_weights(folder)
    if config.quantization:
        quantize(model, config.quantization, weights)
    assign(model, weights, folder)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: found no tokenizer.json; the checkpoint is incomplete")
    preprocessor = Preprocessor.from_dict(
        read_json(folder / "preprocessor_config.json"), str(folder / "preprocessor_config.json")
    )
    ends = config.text_config.get("eos_token_id")
    try:
        tokenizer = load_tokenizer(folder, ends)
    except Exception as error:  # transformers raises whatever the files' content leads to
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {one_line(error)}); "
            "take tokenizer.json and tokenizer_config.json from where the checkpoint came from"
        ) from None
    return Loaded(model, tokenizer, preprocessor, folder)


def load_encoder(model: AgeVLM, source: str | Path) -> None:
    """Initialise the vision tower from a folder of encoder weights (``shipped`` or a path)."""
    folder = shipped("encoder") if source == "shipped" else Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with model.safetensors")
    tower = model.vision_tower
    weights = {name: fitted(tower, name, v) for name, v in read_weights(folder).items()}
    assign(tower, weights, folder)


def save_model(
    folder: Path,
    model: AgeVLM,
    tokenizer: Any,
    preprocessor: Preprocessor,
    card: str,
    *,
    quantization: Mapping[str, Any] | None = None,
    donate: bool = False,
) -> None:
    """Write a checkpoint folder that `load` reads.

    donate: `model` is not needed any more: its arrays are let go one by one as they are
    written, so that a lazily loaded model never is in memory as a whole.

    Files are written aside, synced and moved into place, ``config.json`` last, so that an
    interrupted save never leaves a folder that looks whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = to_dict(model.config)
    if quantization:
        config["quantization"] = dict(quantization)
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        parameters = dict(tree_flatten(model.parameters()))
        if donate:
            model.update(tree_map(lambda _: mx.array(0), model.parameters()))
        write_weights(aside, parameters)
        _write_json(aside / "preprocessor_config.json", preprocessor.to_dict())
        (aside / "README.md").write_text(card, encoding="utf-8")
        tokenizer.save_pretrained(str(aside))
        _write_json(aside / "config.json", config)
        names = sorted(p.name for p in aside.iterdir() if p.is_file())
        for name in sorted(names, key=lambda n: n == "config.json"):
            with open(aside / name, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


#: Beside the configuration and the weights.
_ANSWERS = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def fingerprint(folder: Path) -> str:
    """sha256 (first 16 hex digits) over all of a checkpoint that decides what it answers: its
    configuration, weights, tokenizer and how pictures are brought to it."""
    digest = hashlib.sha256()
    names = ("config.json", *_ANSWERS)
    files = [folder / name for name in names if (folder / name).is_file()]
    for path in [*files, *sorted(folder.glob("model*.safetensors"))]:
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]
