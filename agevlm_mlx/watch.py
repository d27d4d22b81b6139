"""Pictures of a training run: its curves, and where the model looks as it learns.

They lie in ``pictures/`` of the run's folder::

    curves.png           losses, learning rate, gradient norm, validation, time, over the steps
    looks-<step>.png     the attention over some pictures after so many steps; looks.png: the newest
    looks-over-time.png  the same pictures at up to six steps beside each other
    looks.npz            the maps these are drawn from, so that a resumed run has all of them

Nothing here can end a run: what cannot be drawn is said in one line.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter

from .atomic import write_file
from .curves import draw_curves
from .data.chat import encode
from .data.image import Geometry, load_image
from .data.records import Phrase, Record
from .errors import UserError, one_line
from .evaluation.overlay import display_size, heat
from .look_sheet import Look, sheet, strip
from .models.agevlm import AgeVLM
from .sam.index import prompt_key
from .sam.labelling import image_key
from .sam.targets import rle_decode
from .training.build import Job
from .training.log import warn

#: Pictures to watch, and steps of the strip over time.
LOOKS, STEPS = 6, 6


class Pictures:
    """An observer of the trainer that draws; see the module."""

    def __init__(self, run: Path, job: Job, say: Callable[[str], None] = warn):
        self.run, self.job, self.say = run, job, say
        self.folder = run / "pictures"
        self._said: set[str] = set()
        attention = [s.losses.attention for s in job.recipe.stages if s.losses.attention.guides]
        #: The same heads and layers all the run, or a change of them would look like learning.
        self.heads = attention[-1].heads if attention else None
        self.layers = attention[-1].layers if attention else None

    def row(self, row: Mapping[str, Any]) -> None:
        """Nothing: the curves are drawn from ``metrics.jsonl``."""

    def look(self, step: int, model: AgeVLM) -> None:
        """Draw all pictures after `step` steps."""
        self._try("curves", lambda: self._curves(step))
        self._try("pictures of the attention", lambda: self._looks(step, model))

    def close(self) -> None:
        """Nothing is open."""

    def _try(self, what: str, draw: Callable[[], None]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draw()
        except Exception as error:  # whatever it is, the night's training is worth more
            text = f"no {what}: {one_line(error)}"
            if text not in self._said:
                self._said.add(text)
                self.say(text)

    def _curves(self, step: int) -> None:
        recipe = self.job.recipe
        title = f"{self.run.resolve().name}: step {step:,} of {recipe.steps:,}"
        metrics = self.run / "metrics.jsonl"
        if step and metrics.exists():
            clip = recipe.train.clip
            write_file(
                self.folder / "curves.png", lambda path: draw_curves(metrics, path, title, clip)
            )

    @cached_property
    def looks(self) -> list[Look]:
        """What is watched: of the first validation pictures with phrases, the first phrase each."""
        job = self.job
        records = job.val_records if job.val_records is not None else job.records
        store = job.store if job.val_records is None else job.val_store
        found: dict[Path, Look] = {}
        for n in np.flatnonzero(records.guided).tolist():
            record = records[n]
            if record.image not in found:
                look = _look(record, job, store, records.root)
                if look is not None:
                    found[record.image] = look
                if len(found) == LOOKS:
                    break
        return list(found.values())

    def _looks(self, step: int, model: AgeVLM) -> None:
        if not self.looks:
            raise UserError("no validation record has a phrase; give phrases in data.val")
        maps = self._maps(model)
        known = {s: m for s, m in self._load().items() if s < step} | {step: maps}
        steps = np.array(list(known))
        write_file(
            self.folder / "looks.npz",
            lambda path: np.savez_compressed(
                path, steps=steps, maps=np.stack(list(known.values()))
            ),
        )
        page = sheet(self.looks, maps, f"Where the model looks after {step:,} steps")
        for name in (f"looks-{step}.png", "looks.png"):
            write_file(self.folder / name, page.save)
        shown = {list(known)[i]: known[list(known)[i]] for i in _spread(len(known), STEPS)}
        write_file(self.folder / "looks-over-time.png", strip(self.looks, shown).save)

    def _maps(self, model: AgeVLM) -> np.ndarray:
        """f16 [looks Gh Gw]: the mean over layers, heads and the phrase's positions."""
        looks = self.looks
        ids = np.zeros((len(looks), max(len(look.ids) for look in looks)), np.int32)
        for row, look in enumerate(looks):  # what follows a text in its row does not change it
            ids[row, : len(look.ids)] = look.ids
        rows = [row for row, look in enumerate(looks) for _ in look.columns]
        columns = [column for look in looks for column in look.columns]
        learning = model.training
        model.eval()
        try:
            pixels = mx.array(np.stack([look.pixels for look in looks]))
            seen = model.look(model.project(model.encode(pixels)))
            cache = model.share(seen, 1)
            places = mx.array(rows), mx.array(columns)
            attn_map = model.attend(mx.array(ids), cache, *places, self.heads, self.layers)[1]
            found = np.array(attn_map.astype(mx.float32).mean(axis=(1, 2)))  # [P S]
        finally:
            model.train(learning)
        if not np.isfinite(found).all():
            raise UserError("the model's attention is not finite")
        maps = [found[np.array(rows) == row].mean(0) for row in range(len(looks))]
        return np.stack(maps).reshape(len(looks), *model.grid).astype(np.float16)

    def _load(self) -> dict[int, np.ndarray]:
        """The maps so far by step, as a run that is resumed finds them."""
        path = self.folder / "looks.npz"
        if not path.exists():
            return {}
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                steps, maps = stored["steps"], stored["maps"]
            if maps.shape != (len(steps), len(self.looks), *self.job.model.grid):
                return {}  # of other pictures
            return dict(zip(steps.tolist(), maps, strict=True))
        except Exception:  # damaged; what it held is in the pictures that are there already
            return {}


def _look(record: Record, job: Job, store: Any, folder: Path) -> Look | None:
    """The first phrase of a guided record; None if its picture or text cannot be shown."""
    phrase = next(p for p in record.phrases if p.box or p.point or p.mask is not None)
    try:
        image = load_image(record.image)
        bare = Phrase(phrase.text, phrase.turn, phrase.start, phrase.end)
        encoded = encode(job.tokenizer, record.turns, (bare,))
        pixels, geometry = job.preprocessor(image)
        key = image_key(record.image, folder)
        place = _outline(phrase, geometry, store, key, job.model.grid, display_size(*image.size))
    except UserError:
        return None  # training says what is wrong with it, or counts it
    columns = tuple(at for at in encoded.spans[0] if at < len(encoded.ids) - 1)
    if not columns:
        return None
    shown = image.resize(display_size(*image.size), Image.Resampling.BICUBIC)
    return Look(shown, geometry, pixels, encoded.ids[:-1], columns, phrase.text, *place)


def _outline(
    phrase: Phrase,
    geometry: Geometry,
    store: Any,
    key: str,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`Look.outline` and `Look.target`: of what guides the phrase, else of its box."""
    where = phrase.box or phrase.point
    target, mask = None, None
    if store is not None and where:
        with contextlib.suppress(KeyError):
            target = store.target(key, prompt_key(where))
    if target is None and phrase.mask is not None:
        mask = rle_decode(phrase.mask)
        if mask.shape != (geometry.height, geometry.width):
            return None, None
    elif target is None and phrase.box is not None:
        x0, y0, x1, y1 = (round(v) for v in phrase.box)
        mask = np.zeros((geometry.height, geometry.width), bool)
        mask[y0:y1, x0:x1] = True
    if mask is not None:
        target = geometry.mask_to_grid(mask, grid)
    if target is None or not target.max() > 0:
        return None, None
    target = target / target.max()
    if mask is None:
        return heat(target.reshape(grid), geometry, size), target
    shown = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(shown.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255, target


def _spread(n: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `n`, evenly apart, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})
