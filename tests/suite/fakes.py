"""Respondents whose answers are known, without a model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluation.benchmark import Benchmark, Item
from agevlm_mlx.evaluation.respondent import Looked, Request, Said
from agevlm_mlx.evaluation.source import Source

#: What is said to a request.
Script = Callable[[Request], str]


class Scripted:
    """Says what its script says. An option that the answer begins with is likely, others not."""

    def __init__(self, script: Script, broken: Sequence[str] = ()) -> None:
        self.script, self.broken = script, set(broken)
        self.about = {
            "path": "scripted",
            "name": "scripted",
            "fingerprint": "0",
            "fusion": "none",
            "parameters": 0,
            "grid": [4, 4],
        }
        self.shown: list[Path] = []
        self.asked: list[Request] = []

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        bad = {i: f"{i.name}: expected an image" for i in images if i.name in self.broken}
        self.shown = [image for image in images if image not in bad]
        return bad

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        for n, request in reversed(list(enumerate(requests))):
            self._check(request)
            yield n, self.script(request)

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        return [self._scores(*pair) for pair in zip(requests, options, strict=True)]

    log_likelihood = options

    def confidence(self, said: Sequence[Said]) -> list[tuple[float, ...]]:
        """The earlier a word is said the surer."""
        assert all(self.script(one.request) == one.answer for one in said)
        return [tuple(-0.01 * start for start, _ in one.spans) for one in said]

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        """Everything on the first cell."""
        found: list[Looked | None] = []
        for request, phrase in zip(requests, phrases, strict=True):
            self._check(request)
            assert phrase in request.prompt
            values = np.zeros((1, 2, 4, 4), np.float32)
            values[..., 0, 0] = 1.0
            assert request.image is not None
            with Image.open(request.image) as image:
                geometry = Preprocessor(image_size=16).geometry(*image.size)
            found.append(Looked(values, None, geometry))
        return found

    def _scores(self, request: Request, options: Sequence[str]) -> tuple[float, ...]:
        self._check(request)
        said = self.script(request).lower()
        return tuple(-0.1 if said.startswith(option.lower()) else -5.0 for option in options)

    def _check(self, request: Request) -> Any:
        assert request.image is None or request.image in self.shown, "not shown"
        self.asked.append(request)


def read(
    benchmark: Benchmark, folder: Path, skip_bad: bool = False
) -> tuple[list[Item], list[str]]:
    """What a benchmark reads of a folder, and what it says is bad."""
    with Source(folder, skip_bad) as source:
        items = benchmark.read(source)
        source.check(benchmark.needs)
        return items, source.problems
