"""Whoever answers a benchmark: a model of ours, one of mlx-vlm, or a fake in a test."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.image import Geometry


@dataclass(frozen=True)
class Request:
    """A prompt about one image, or about none. The same request is answered once."""

    image: Path | None
    prompt: str


@dataclass(frozen=True)
class Said:
    """An answer that was given about an image, and parts of it: (start, end) in characters."""

    request: Request
    answer: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Looked:
    """Where a phrase looked: attention f32[L N Gh Gw], the mean over the phrase's tokens, for
    each looking layer and head; each sums to the share that goes to the image. null: f32[L N],
    the share of the null slot; None where there is none. geometry: of the image."""

    attention: np.ndarray
    null: np.ndarray | None
    geometry: Geometry


class Respondent(Protocol):
    """Answers are greedy: the same request has the same answer.

    about: what a result says of the model: path, fingerprint, fusion, parameters, grid.
    """

    about: Mapping[str, Any]

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        """Encode the images that the next requests are about, and forget those before; the ones
        that cannot be read, with the reason. Requests name only images shown and read."""
        ...

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        """(number of the request, its answer), in the order in which answers end."""
        ...

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """For each request the log-probability, in nats, that its answer begins as each of its
        options does. Yes and no count in every spelling of their first letter."""
        ...

    def log_likelihood(
        self, requests: Sequence[Request], answers: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """For each request the mean log-probability per token of each answer, with its end."""
        ...

    def confidence(self, said: Sequence[Said]) -> list[tuple[float, ...]]:
        """For each answer the log-probability, in nats, of the first token of each of its spans
        where it was said; () for a model that cannot say."""
        ...

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        """Where a phrase of each request's prompt looks; None for a model that cannot say."""
        ...


def model_name(folder: Path) -> str:
    """What result files are called after: the folder, or the repository in the hub's cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--")
    return folder.name
