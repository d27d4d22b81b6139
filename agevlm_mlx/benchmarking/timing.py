"""How long things take: interleaved trials, medians, and what is timed of a generation.

All times are seconds. Cases of one comparison take turns (A B C, A B C, ...), so that a machine
that slows down for a while slows all of them down.
"""

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream

from ..generation import ReadOnce
from ..models.agevlm import AgeVLM

T = TypeVar("T")
Progress = Callable[[str], None]


def interleaved(
    cases: Mapping[str, Callable[[], T]],
    trials: int,
    progress: Progress = lambda _: None,
) -> dict[str, list[T]]:
    """The measurements of each case: once unrecorded to warm up, then `trials` times in turn."""
    taken: dict[str, list[T]] = {name: [] for name in cases}
    for trial in range(trials + 1):
        progress(f"trial {trial}/{trials}" if trial else "warming up")
        for name, case in cases.items():
            value = case()
            if trial:
                taken[name].append(value)
    return taken


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and every measurement."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "trials": list(values),
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the trials' own ratios: neighbours in time are compared."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes; it evaluates what it computes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def answer(model: Any, ids: mx.array, cache: list[Any], tokens: int) -> Generator[Any, None, None]:
    """mlx-lm's ``generate_step``, which calls an `AgeVLM` as ``stream_generate`` lets it."""
    called = ReadOnce(model, ids.tolist()) if isinstance(model, AgeVLM) else model  # pyright: ignore[reportArgumentType]
    return generate_step(ids, called, prompt_cache=cache, max_tokens=tokens)


def first_token(model: Any, ids: mx.array, cache: list[Any]) -> None:
    """`ids` are read and the first token is computed.

    ``max_tokens=0`` leaves out the step that mlx-lm begins ahead before it hands out a token: on
    the CPU back end the first token would otherwise wait for most of the second.
    """
    for _ in answer(model, ids, cache, 0):
        pass


def moments(
    steps: Generator[Any, None, None],
    stream: Any,
    tokens: int,
    each: Callable[[int], Any] = lambda _: None,
) -> list[float]:
    """Seconds from the first token of a ``generate_step`` to each of the `tokens` that follow.

    stream: the one that `steps` computes on. each: called with the number of every token as it
    comes, the first being 0.
    """
    next(steps)
    each(0)
    start = time.perf_counter()
    found = []
    for n in range(1, tokens + 1):
        next(steps)
        each(n)
        found.append(time.perf_counter() - start)
    steps.close()
    mx.synchronize(stream)
    return found


def decode(
    model: Any,
    ids: mx.array,
    cache: list[Any],
    tokens: int,
    each: Callable[[int], Any] = lambda _: None,
) -> list[float]:
    """The `moments` of mlx-lm's answer to `ids`."""
    steps = answer(model, ids, cache, tokens + 1)
    return moments(steps, generation_stream, tokens, each)


def decode_with_maps(model: AgeVLM, ids: mx.array, cache: list[Any], tokens: int) -> list[float]:
    """`decode`, and every token's maps are taken as ``stream_generate(attention=True)`` does."""
    first = cache[model.looking_layers[0]].offset + ids.size - 1
    with model.record(cache, first) as recorder:
        return decode(
            model, ids, cache, tokens, lambda n: np.array(recorder.take(first + n), np.float32)
        )


def batch(
    model: Any, prompts: Sequence[Sequence[int]], caches: Sequence[list[Any]], tokens: int
) -> float:
    """Seconds in which mlx-lm's BatchGenerator answers all prompts with `tokens` tokens each."""
    generator = BatchGenerator(model, completion_batch_size=len(prompts))
    start = time.perf_counter()
    generator.insert(
        [list(p) for p in prompts], [tokens] * len(prompts), caches=[list(c) for c in caches]
    )
    left = len(prompts)
    while left:
        left -= sum(r.finish_reason is not None for r in generator.next_generated())
    taken = time.perf_counter() - start
    generator.close()
    return taken
