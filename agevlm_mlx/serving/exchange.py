"""What goes into the model's thread and what comes out of it."""

from dataclasses import dataclass, field
from typing import Any

from ..data.records import Turn
from ..sampling import Sampling


@dataclass(frozen=True)
class Ask:
    """A conversation that waits for an answer.

    attention: also say where each word looked. top_logprobs: None without log probabilities.
    """

    turns: tuple[Turn, ...]
    sampling: Sampling = field(default_factory=Sampling)
    attention: bool = False
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of the answer and the most likely ones at its place, with log probabilities."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of an answer."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    finish_reason: "stop" or "length". cached_tokens: how many of the prompt's were not read
    again. words: where each content word looked (`Ask.attention`), as plain JSON values.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    words: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Failed:
    """No more of the answer will come. error: ``UserError`` or one of the classes below."""

    error: Exception


Event = Piece | Done | Failed


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The model's thread has ended or is about to."""


class Expired(Exception):
    """The answer was not ready in time."""


class ModelFailure(Exception):
    """The model failed; the terminal says how."""
