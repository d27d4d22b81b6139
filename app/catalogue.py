"""Which models can be chosen, loading one, and what is to be said of it. Names and texts made here
are for the page: no path of this computer is in them."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from agevlm_mlx.console import printable
from agevlm_mlx.errors import UserError, one_line
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.prompts import context_length
from agevlm_mlx.quantization import fitting_group_size, layers_by_bits, nbytes, quantize_model
from agevlm_mlx.weights import Loaded, load, resolve, shipped

from .card import read_card
from .checkpoints import cached, describe, folders, in_cache, megabytes

#: What the page calls the model that comes with the package.
SHIPPED = "the shipped model"
#: Where training puts models, in the current folder.
_RUNS = Path("runs")
#: Parts in which weights are read, each with its own progress.
_PARTS = 50
#: A path of this computer and its last part; no web address, hub id or division.
_PATH = re.compile(r"(?<![\w.:/~])~?/(?:[^\s:;,'\"()/]+/)*([^\s:;,'\"()/]+)/?")


@dataclass(frozen=True)
class Choice:
    """A model to load. source: folder or hub id, None: the demo's model or the shipped one.
    bits: quantise its language model after loading."""

    source: str | None = None
    bits: Literal[None, 4, 8] = None


# --- what is on this computer ----------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    folder: Path
    source: str
    about: str  # precision and size
    name: str | None  # None: the last parts of its path


def choices(extra: Iterable[Path] = ()) -> list[tuple[str, str]]:
    """(label, source) of the models on this computer, the default first; labels are unique.

    Looks at the demo's and the shipped model, ``runs`` and the folders of `extra` (two levels
    deep) and the hub's cache. Folders that are no whole checkpoint of ours are left out. Sources
    may be paths: show a page the labels, and find the source again with `pick`.
    """
    places = [(folder, str(folder), None) for folder in (resolve(None), shipped("model"))]
    for root in (_RUNS, *extra):
        places += [(folder, str(folder), None) for folder in folders(root)]
    places += [(folder, repo, repo) for repo, folder in cached()]
    found: dict[Path, _Found] = {}
    for folder, source, name in places:
        real = folder.resolve()
        if real not in found and (about := describe(real)):
            found[real] = _Found(real, source, about, SHIPPED if _is_shipped(real) else name)
    return [
        (f"{name}, {entry.about}", entry.source)
        for name, entry in zip(_names(list(found.values())), found.values(), strict=True)
    ]


def pick(text: str, extra: Iterable[Path] = (), *, listed_only: bool = False) -> str:
    """The source that a label of `choices` stands for, else `text` as it was entered.

    listed_only: ``UserError`` for anything else, so that who sees the page cannot have any folder
    of this computer opened or any model downloaded.
    """
    if not text.isprintable():
        raise UserError("model: expected a folder or a hub id, got characters that no name has")
    listed = dict(choices(extra))
    if listed_only and text not in listed:
        raise UserError(f"model: expected one of the list, got {text[:100]!r}; choose it there")
    return listed.get(text, text.strip())


def _names(found: list[_Found]) -> list[str]:
    """For each, as many of the last parts of its path as tell it from the others."""
    shown = [1] * len(found)
    while True:
        names = [
            printable(entry.name or "/".join(entry.folder.parts[-count:]))
            for entry, count in zip(found, shown, strict=True)
        ]
        longer = [
            i
            for i, entry in enumerate(found)
            if not entry.name and names.count(names[i]) > 1 and shown[i] < len(entry.folder.parts)
        ]
        if not longer:
            return names
        for i in longer:
            shown[i] += 1


# --- loading one -----------------------------------------------------------------------------


def load_model(choice: Choice, progress: Callable[[float, str], None]) -> Loaded:
    """Load a model, quantised if asked for. Call it in the thread that will use it.

    progress: called with a share from 0 to 1, never less than before, and the step in a few words;
    the share is that of the weights' bytes that have been read, and stays 0 during a download. A
    model in the hub's cache is taken from there without asking the hub. ``UserError`` says what is
    missing.
    """
    source = choice.source
    step = "opening"
    if source is not None and _is_hub_id(source):
        if folder := in_cache(source):
            source = str(folder)
        else:
            step = f"downloading {source}"
    progress(0.0, step)
    loaded = load(source, lazy=True)
    model = loaded.model
    # What will be read: quantising puts something else in its place.
    sizes = {key: array.nbytes for key, array in dict(tree_flatten(model.parameters())).items()}
    step = "reading"
    if choice.bits:
        settings = quantize_model(model, choice.bits, fitting_group_size(model))
        model.config = replace(model.config, quantization=settings)
        step = f"quantising to {choice.bits} bits"
    total, read, told_of = sum(sizes.values()), 0, 0
    part: list[mx.array] = []
    for key, array in dict(tree_flatten(model.parameters())).items():
        part.append(array)
        read += sizes.get(key, 0)
        if (read - told_of) * _PARTS >= total or read == total:
            _evaluate(part, loaded.path)
            part, told_of = [], read
            progress(read / total, f"{step}, {megabytes(read)} of {megabytes(total)}")
    _evaluate(part, loaded.path)
    mx.clear_cache()
    return loaded


def _evaluate(arrays: list[mx.array], folder: Path) -> None:
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if "[read]" not in str(error):  # memory, not the disk
            raise
        raise UserError(f"{folder}: its weights cannot be read: {one_line(error)}") from None


def name(choice: Choice, path: Path) -> str:
    """What the page calls the model loaded from `path`: hub id or name of the folder."""
    if _is_shipped(path):
        called = SHIPPED
    elif choice.source is not None and _is_hub_id(choice.source):
        called = choice.source
    else:
        called = path.resolve().name
    return printable(called) + (f" in {choice.bits} bits" if choice.bits else "")


def told(error: Exception, choice: Choice) -> str:
    """An error of `load_model` as a sentence for the page: folders by their names alone. What is
    no ``UserError`` is a bug, whose traceback goes to the terminal."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
        return f"the model could not be loaded ({type(error).__name__}); the terminal says more"
    text = str(error)
    if choice.source is not None and not _is_hub_id(choice.source):
        # Its own folder first: `_PATH` takes a name with a space for two.
        given = Path(os.path.expanduser(choice.source))
        for folder in (given.resolve(), given.absolute(), given):
            if len(folder.parts) > 1:
                text = text.replace(str(folder), folder.name)
    return printable(_PATH.sub(r"\1", text))


def _is_shipped(folder: Path) -> bool:
    return folder.resolve() == shipped("model").resolve()


def _is_hub_id(source: str) -> bool:
    """Whether `weights.load` takes it for one."""
    return (
        source.count("/") == 1
        and not source.startswith((".", "/", "~"))
        and not os.path.exists(source)
    )


# --- what is to be said of it ----------------------------------------------------------------


def facts(loaded: Loaded, choice: Choice) -> dict[str, str]:
    """Label -> text: what a person wants to know of a model. Call it in the model's thread."""
    model, config = loaded.model, loaded.model.config
    layers, cross = model.looking_layers, model.fusion == "cross"
    Gh, Gw = model.grid
    size = loaded.preprocessor.image_size
    # Never evaluated: the shapes are enough.
    memory = model.image_bytes(model.see(mx.zeros((1, size, size, 3))))
    context = context_length(model)
    series = ", ".join(map(str, layers))
    return {
        "Model": name(choice, loaded.path),
        "Fusion": f"cross-attention before decoder layers {series} (the first is 0)"
        if cross
        else "concat: an image's tokens stand before the text",
        "Language model": f"{config.text_config['model_type']}, {len(model.layers)} layers, "
        f"{model.args.hidden_size} wide",
        "Vision encoder": f"{config.vision_config['model_type']}, {size} x {size} pixels",
        "Parameters": _parameters(model),
        "Precision": _precision(model),
        "An image": f"{Gh * Gw} tokens ({Gh} x {Gw}), {megabytes(memory)} in the cache",
        "Attention maps": f"{len(layers)} layers with {heads(model)} heads each"
        + ("" if cross else "; only of images in the first message"),
        "Context": f"{context} tokens" if context else "its configuration states no limit",
        **read_card(loaded.path),
    }


def heads(model: AgeVLM) -> int:
    """N, the attention heads of a looking layer."""
    if model.fusion != "cross":
        return model.args.num_attention_heads
    first: Any = model.layers[model.looking_layers[0]]
    return first.cross_attn.n_heads


def _parameters(model: AgeVLM) -> str:
    text = f"{get_total_parameters(model) / 1e6:.2f} M"
    if model.fusion != "cross":
        return text
    blocks = [model.layers[i].cross_attn for i in model.looking_layers]
    own = sum(map(get_total_parameters, blocks))
    return f"{text}, of which {own / 1e6:.2f} M in the cross-attention"


def _precision(model: AgeVLM) -> str:
    dtypes = {
        str(array.dtype).rpartition(".")[2]
        for key, array in dict(tree_flatten(model.parameters())).items()
        if mx.issubdtype(array.dtype, mx.floating) and not key.endswith((".scales", ".biases"))
    }
    plain, size = " and ".join(sorted(dtypes)), megabytes(nbytes(model))
    settings = model.config.quantization
    if not settings:
        return f"{plain}, {size}"
    bits = " and ".join(str(n) for n in sorted(layers_by_bits(model)) if n)
    groups = settings["group_size"]
    return f"language model in {bits} bits (groups of {groups}), the rest {plain}, {size}"
