"""Does the answer hang on the object's pixels? The causal test beside the attention maps.

A model that looks at an object need not use it. Here the object is blanked out of the picture and
the model is asked for it again; as a control an area of the same size and shape elsewhere (several
things each for itself, where they have no room together), which does not touch the object, is
blanked instead (`blanking`). Only the difference of the two says that it is the object that
counts, and not that something was blanked. Note that the blanked area still has the object's
outline; so has the control's. Where a model crops its pictures, an area may lie outside.

`causal` returns, as JSON (a number is ``{"value", "interval", "n"}``: the mean over objects, the
95 % interval [low, high] of a bootstrap over images or None, and how many objects it is of)::

    question  "Is there a {noun} in the image?"
    images    how many have an object that was tested
    objects   how many were tested
    skipped   {"no room": objects too large for a control, "unusable mask": empty, not of the
               picture's size or not readable}
    problems  ["FILE: reason"] for unusable masks, and for pictures that cannot be read
    present   of the object itself: {"p_yes": M, "accuracy": M, "log_p": M}
    absent    of a thing that is not in the picture, asked of the same pictures: {"p_yes": M,
              "accuracy": M}; {} if no example has one
    pixel_change  for each of `WAYS` {"object", "elsewhere": numbers}: the mean absolute change of
              a picture's pixels, in grey levels; less of it elsewhere may explain some of an effect
    rows      [{"image", "phrase", "absent": noun or None, "shifts": [[down, right], ...] px from
               object to control (`shifted`), "area": the mask's share of the picture,
               "present": {"p_yes": V, "log_p": V}, "not_there": {"p_yes": V} or {},
               "pixel_change": {way: {place: float}}}]: every object

    M is {"before": number, and for each of `WAYS`: {"object", "elsewhere": numbers with either
          blanked, "change_object", "change_elsewhere": those less before, "effect": change_object
          less change_elsewhere, in pairs}}
    V is {"before": float, and for each of `WAYS`: {"object": float, "elsewhere": float}}

p_yes: P(yes) / (P(yes) + P(no)) of the first token. accuracy: the share of p_yes above 0.5 for
present things, of all others for absent ones. log_p: log-probability per token (nats) of "A dog."
as the description of the image. A model that uses the object's pixels has effects well below 0
for present things; one that ignores the picture, or minds any hole alike, has 0. For absent
things every change should be 0: blanking something must not make another thing appear.

Ways: "mean colour", of the whole picture; "blur", Gaussian, half the object's longer side.
To draw a row: ``altered(pixels, mask, way)`` and ``altered(pixels, shifted(mask, shifts), way)``.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.image import load_image
from ..data.records import CAPTION_PROMPT
from ..data.scene_texts import caption, presence_question
from ..errors import UserError
from ..evaluation.respondent import Request, Respondent
from .blanking import PLACES, WAYS, altered, elsewhere, shifted
from .estimates import Estimates
from .examples import Example

Progress = Callable[[str, int, int], None]


def causal(
    respondent: Respondent,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    boots: int = 1000,
    seed: int = 0,
    progress: Progress = lambda task, done, total: None,
) -> dict[str, Any]:
    """What blanking an object changes; see the module's text.

    batch_size: pictures shown at a time, altered ones included (those of one image always go
    together). seed: of the bootstrap and of the places of the controls.
    """
    tested = _Tested()
    waiting: list[_Trial] = []
    for number, example in enumerate(examples):
        trials = list(tested.plan(example, np.random.default_rng((seed, number))))
        if waiting and _pictures([*waiting, *trials]) > batch_size:
            tested.ask(respondent, waiting)
            waiting = []
        waiting += trials
        if number + 1 == len(examples):
            tested.ask(respondent, waiting)
        progress("blanking objects", number + 1, len(examples))
    return tested.result(boots, seed)


@dataclass(frozen=True, eq=False)
class _Trial:
    """One object to blank. absent: a thing to ask for besides, if any is known."""

    image: Path
    phrase: str
    absent: str | None
    mask: np.ndarray
    shifts: list[tuple[int, int]]

    changes: dict[str, dict[str, float]] = field(default_factory=dict)

    def pictures(self, folder: Path, pixels: np.ndarray) -> dict[tuple[str, str], Path]:
        """Write the altered pictures: (way, place) -> file. Notes how much `changes`."""
        folder.mkdir()
        areas = dict(zip(PLACES, (self.mask, shifted(self.mask, self.shifts)), strict=True))
        files = {}
        for way in WAYS:
            for place, area in areas.items():
                file = files[way, place] = folder / f"{way} {place}.png"
                blanked = altered(pixels, area, way)
                change = np.abs(blanked.astype(np.int16) - pixels).mean()
                self.changes.setdefault(way, {})[place] = float(change)
                Image.fromarray(blanked).save(file, compress_level=1)
        return files


def _pictures(trials: Sequence[_Trial]) -> int:
    return len({trial.image for trial in trials}) + len(trials) * len(WAYS) * len(PLACES)


class _Tested:
    """What has been asked so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.skipped = {"no room": 0, "unusable mask": 0}
        self.problems: list[str] = []

    def plan(self, example: Example, rng: np.random.Generator) -> Iterator[_Trial]:
        """The objects of a picture that can be blanked, with a control each."""
        try:
            width, height = load_image(example.image).size
        except UserError as error:
            self.problems.append(str(error))
            return
        for n, (phrase, mask) in enumerate(example.objects.items()):
            try:
                pixels = mask()
                if pixels.shape != (height, width) or not pixels.any():
                    got = "x".join(map(str, pixels.shape[::-1]))
                    raise UserError(
                        f"expected a mask of {width}x{height} px that is not empty, got {got} px, "
                        f"{int(pixels.sum())} of them in it"
                    )
            except UserError as error:
                self.skipped["unusable mask"] += 1
                self.problems.append(f"{example.image}: {phrase}: {error}")
                continue
            shifts = elsewhere(pixels, rng)
            if shifts is None:
                self.skipped["no room"] += 1
                continue
            absent = example.absent[n % len(example.absent)] if example.absent else None
            yield _Trial(example.image, phrase, absent, pixels, shifts)

    def ask(self, respondent: Respondent, trials: Sequence[_Trial]) -> None:
        """Show the pictures of these trials, whole and altered, and ask for their things."""
        with tempfile.TemporaryDirectory() as name:
            files: list[dict[tuple[str, str], Path]] = []
            pixels: dict[Path, np.ndarray] = {}
            for n, trial in enumerate(trials):
                if trial.image not in pixels:  # one image at a time is in memory
                    pixels = {trial.image: np.asarray(load_image(trial.image))}
                files.append(trial.pictures(Path(name, str(n)), pixels[trial.image]))
            everything = [
                picture
                for trial, own in zip(trials, files, strict=True)
                for picture in (trial.image, *own.values())
            ]
            bad = respondent.show(list(dict.fromkeys(everything)))
            self.problems += bad.values()
            usable = [
                (trial, own)
                for trial, own in zip(trials, files, strict=True)
                if not bad.keys() & {trial.image, *own.values()}
            ]
            self._ask_usable(respondent, usable)

    def _ask_usable(
        self,
        respondent: Respondent,
        trials: Sequence[tuple[_Trial, dict[tuple[str, str], Path]]],
    ) -> None:
        seen, told, absent = [], [], []
        for trial, files in trials:
            for picture in (trial.image, *files.values()):
                seen.append(Request(picture, presence_question(trial.phrase, True)))
                told.append((Request(picture, CAPTION_PROMPT), [caption([trial.phrase])]))
                if trial.absent:
                    absent.append(Request(picture, presence_question(trial.absent, True)))
        p_seen, p_absent = (_p_yes(respondent, requests) for requests in (seen, absent))
        log_p = respondent.log_likelihood([r for r, _ in told], [a for _, a in told])
        log_p = iter([one for (one,) in log_p])
        for trial, files in trials:
            places = list(files)
            there = {"p_yes": _values(p_seen, places), "log_p": _values(log_p, places)}
            not_there = {"p_yes": _values(p_absent, places)} if trial.absent else {}
            self.rows.append(
                {
                    "image": str(trial.image),
                    "phrase": trial.phrase,
                    "absent": trial.absent,
                    "shifts": [list(shift) for shift in trial.shifts],
                    "area": float(trial.mask.mean()),
                    "present": there,
                    "not_there": not_there,
                    "pixel_change": trial.changes,
                }
            )

    def result(self, boots: int, seed: int) -> dict[str, Any]:
        numbers = {image: n for n, image in enumerate(dict.fromkeys(r["image"] for r in self.rows))}
        estimates = Estimates(len(numbers), boots, seed)

        def changes(
            kind: str, name: str, of: Callable[[float], float] = lambda value: value
        ) -> dict[str, Any]:
            rows = [row for row in self.rows if row[kind]]
            images = [numbers[row["image"]] for row in rows]
            values = [row[kind][name] for row in rows]
            before = np.array([of(v["before"]) for v in values])
            out: dict[str, Any] = {"before": estimates.mean(images, before)}
            for way in WAYS:
                after = {p: np.array([of(v[way][p]) for v in values]) for p in PLACES}
                out[way] = {p: estimates.mean(images, after[p]) for p in PLACES}
                out[way] |= {
                    f"change_{p}": estimates.ahead(images, after[p], before) for p in PLACES
                }
                out[way]["effect"] = estimates.ahead(images, *(after[p] for p in PLACES))
            return out

        return {
            "question": "Is there a {noun} in the image?",
            "images": len(numbers),
            "objects": len(self.rows),
            "skipped": self.skipped,
            "problems": self.problems,
            "present": {
                "p_yes": changes("present", "p_yes"),
                "accuracy": changes("present", "p_yes", lambda p: p > 0.5),
                "log_p": changes("present", "log_p"),
            },
            "absent": {
                "p_yes": changes("not_there", "p_yes"),
                "accuracy": changes("not_there", "p_yes", lambda p: p <= 0.5),
            }
            if any(row["not_there"] for row in self.rows)
            else {},
            "pixel_change": {
                way: {
                    place: estimates.mean(
                        [numbers[row["image"]] for row in self.rows],
                        np.array([row["pixel_change"][way][place] for row in self.rows]),
                    )
                    for place in PLACES
                }
                for way in WAYS
            },
            "rows": self.rows,
        }


def _p_yes(respondent: Respondent, requests: Sequence[Request]) -> Iterator[float]:
    """P(yes) of yes and no."""
    found = respondent.options(requests, [("yes", "no")] * len(requests))
    return iter([float(0.5 * (1 + np.tanh((yes - no) / 2))) for yes, no in found])


def _values(values: Iterator[float], places: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The next values, those of the whole picture and of each altered one."""
    out: dict[str, Any] = {"before": next(values)}
    for way, place in places:
        out.setdefault(way, {})[place] = next(values)
    return out
