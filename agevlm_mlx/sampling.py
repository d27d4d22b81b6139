"""How the next word is chosen and when an answer ends: one set of options for every command."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors

from .errors import UserError

#: Below it temperatures and shares mean the same, and float32 can no longer divide by them.
COLDEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """mlx-lm's sampling options, checked; ``UserError`` names the option that is wrong.

    temp 0 is greedy. stop: texts that end the answer and do not belong to it. seed: makes an
    answer repeatable, whatever else the model does in between.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def check(name: str, right: bool, expected: str) -> None:
            if not right:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("max_tokens", "top_k", "repetition_context_size"):
            check(name, getattr(self, name) < 2**31, "less than 2^31")
        numbers = ("temp", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        for name in (*numbers, "frequency_penalty"):
            value = getattr(self, name)
            check(name, value is None or math.isfinite(value), "a finite number")
        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("temp", self.temp >= 0, "0 (greedy) or more")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        check("top_k", self.top_k >= 0, "0 (all) or more")
        check("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        check("repetition_penalty", penalty is None or penalty > 0, "more than 0 (1 is none)")
        check("repetition_context_size", self.repetition_context_size >= 1, "at least 1")
        check("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        check("stop", all(self.stop), "texts that are not empty")

    def check_vocabulary(self, size: int) -> None:
        """``UserError`` if `logit_bias` names a token that a model of `size` tokens lacks: MLX
        would write past the end of the logits."""
        wrong = [token for token in self.logit_bias or () if not 0 <= token < size]
        if wrong:
            raise UserError(f"logit_bias: expected tokens from 0 to {size - 1}, got {wrong[0]}")

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """Log-probabilities [B V] -> tokens [B]."""
        return greedy_sampler if self.temp == 0 else _Sampler(self)

    def logits_processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """What is done to the logits before; none unless asked for."""
        return make_logits_processors(
            dict(self.logit_bias) if self.logit_bias else None,
            self.repetition_penalty,
            self.repetition_context_size,
            self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class _Sampler:
    """mlx-lm's filters and a draw, with a random state of its own if there is a seed: MLX has one
    for the whole process, which other rows of a batch would disturb."""

    def __init__(self, options: Sampling) -> None:
        self._options = options
        self._key = None if options.seed is None else mx.random.key(options.seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        chosen, key = self._options, None
        logprobs = keep_likely(logprobs, chosen.top_p, chosen.min_p, chosen.top_k)
        if self._key is not None:
            self._key, key = mx.random.split(self._key)
        # Seen from the likeliest, and within what float32 can divide by.
        temp = min(max(chosen.temp, COLDEST), 1 / COLDEST)
        logits = (logprobs - logprobs.max(axis=-1, keepdims=True)) / temp
        return mx.random.categorical(logits, key=key)


def keep_likely(logprobs: mx.array, top_p: float, min_p: float, top_k: int) -> mx.array:
    """Log-probabilities [B V] in which unlikely tokens are -inf: mlx-lm's top-p, min-p and top-k,
    in its order.

    mlx-lm's own are compiled anew for every value of their parameters and never forgotten, which
    takes seconds on a CPU and lets a server grow.
    """
    if 0 < top_p < 1:
        likely = -mx.sort(-logprobs, axis=-1)
        probs = mx.exp(likely)
        above = mx.cumsum(probs, axis=-1, inclusive=False)
        kept = above < max(top_p, COLDEST) * probs.sum(axis=-1, keepdims=True)
        lowest = mx.where(kept, likely, mx.inf).min(axis=-1, keepdims=True)
        logprobs = mx.where(logprobs < lowest, -mx.inf, logprobs)
    if min_p:
        lowest = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
        logprobs = mx.where(logprobs < lowest, -mx.inf, logprobs)
    if 0 < top_k < logprobs.shape[-1]:
        lowest = mx.topk(logprobs, top_k, axis=-1).min(axis=-1, keepdims=True)
        logprobs = mx.where(logprobs < lowest, -mx.inf, logprobs)
    return logprobs


class StopWords:
    """Cuts a stream of text at the first of some words, which may come in several pieces."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        machine = TextStateMachine({"normal": [(word, None) for word in words]} if words else None)
        self._state: Any = machine.make_state()
        #: Whether one of the words has come.
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain not to belong to a stop word."""
        if self.stopped:
            return ""
        self._state, safe, name = TextStateMachine.step(self._state, text)
        self.stopped = name is None
        return safe

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        if self.stopped:
            return ""
        self._state, rest, _ = TextStateMachine.flush(self._state)
        return rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """mlx-lm's flags for `Sampling`."""
    group = parser.add_argument_group("sampling")
    add, default = group.add_argument, Sampling()
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    add("--temp", type=float, default=0.0, metavar="T", help="temperature; 0 is greedy (0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1)")
    add("--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens; 0 is all (0)")
    add("--min-p", type=float, default=0.0, metavar="P", help="of the likeliest's probability (0)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 repeats less (none)")
    size = default.repetition_context_size
    help_size = f"tokens that it looks back ({size})"
    add("--repetition-context-size", type=int, default=size, metavar="N", help=help_size)
    add("--presence-penalty", type=float, metavar="X", help="taken off tokens used before (none)")
    add("--frequency-penalty", type=float, metavar="X", help="the same for each use (none)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    stop_help = "ends the answer; repeat for several"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop_help)


def from_arguments(args: argparse.Namespace) -> Sampling:
    """The options of the command line; errors name them as they are written there."""
    names = [field.name for field in fields(Sampling) if hasattr(args, field.name)]
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["stop"] = tuple(args.stop)
    try:
        return Sampling(**options)
    except UserError as error:
        name, rest = str(error).split(":", 1)
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from None
