"""Sampling options: checked, mlx-lm's in effect, and independent of other rows."""

import argparse

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from agevlm_mlx.errors import UserError
from agevlm_mlx.sampling import Sampling, StopWords, add_arguments, from_arguments, keep_likely


@pytest.fixture(autouse=True)
def uncompiled():
    mx.disable_compile()  # mlx-lm's filters: seconds each on a CPU
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    ("top_p", "min_p", "top_k"),
    [(0.9, 0, 0), (0.3, 0, 0), (1e-6, 0, 0), (1, 0.1, 0), (1, 1, 0), (1, 0, 5), (1, 0, 1),
     (0.8, 0.05, 4)],
)  # fmt: skip
def test_unlikely_tokens_are_dropped_as_mlx_lm_does(top_p, min_p, top_k):
    logits = 3 * mx.random.normal((4, 50))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = logprobs
    if top_p < 1:
        expected = apply_top_p(expected, top_p)
    if min_p:
        expected = apply_min_p(expected, float(min_p))
    if top_k:
        expected = apply_top_k(expected, top_k)
    got = keep_likely(logprobs, top_p, min_p, top_k)
    assert mx.array_equal(mx.isinf(got), mx.isinf(expected))
    assert mx.array_equal(mx.where(mx.isinf(got), 0, got), mx.where(mx.isinf(got), 0, logprobs))
    assert not mx.isinf(got).all(axis=-1).any()


def test_a_draw_follows_the_probabilities():
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    draw = Sampling(temp=1.0, seed=1).sampler()
    counts = np.bincount([draw(logprobs).item() for _ in range(600)], minlength=3) / 600
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.08
    assert Sampling(temp=0.0).sampler()(logprobs).item() == 0
    only = Sampling(temp=5.0, top_k=10**6, seed=2).sampler()  # more than there are: all of them
    assert {only(logprobs).item() for _ in range(60)} == {0, 1, 2}


def test_the_coldest_settings_are_greedy():
    logprobs = mx.log(mx.array([[0.2, 0.5, 0.3]]))
    for options in ({"temp": 1e-320}, {"temp": 1.0, "top_p": 1e-46}, {"temp": 1e300, "top_k": 1}):
        draw = Sampling(**options).sampler()
        assert {draw(logprobs).item() for _ in range(20)} == {1}, options


def test_a_seed_does_not_listen_to_the_rest_of_the_process():
    logprobs = mx.random.normal((1, 1000))

    def run(disturbed):
        draw = Sampling(temp=1.0, seed=5).sampler()
        out = []
        for n in range(5):
            if disturbed:
                mx.random.seed(n)
                mx.eval(mx.random.normal((3,)))
            out.append(draw(logprobs).item())
        return out

    assert run(True) == run(False)
    assert len(set(run(False))) > 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 0), ("temp", -0.1), ("temp", float("nan")), ("temp", float("inf")),
     ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", 1.1), ("repetition_penalty", 0.0),
     ("repetition_penalty", float("nan")), ("repetition_context_size", 0), ("seed", -1),
     ("seed", 2**64), ("repetition_context_size", 10**20), ("max_tokens", 2**31),
     ("presence_penalty", float("inf")), ("stop", ("",))],
)  # fmt: skip
def test_wrong_values_are_named(option, value):
    with pytest.raises(UserError, match=rf"^{option}: expected .*, got "):
        Sampling(**{option: value})


def test_flags_are_mlx_lms_and_errors_say_them():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = (
        "--max-tokens 7 --temp 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --repetition-penalty 1.2 "
        "--repetition-context-size 9 --presence-penalty 0.3 --frequency-penalty 0.4 --seed 3 "
        "--stop a --stop b"
    )
    args = parser.parse_args(flags.split())
    assert from_arguments(args) == Sampling(
        max_tokens=7, temp=0.5, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.2,
        repetition_context_size=9, presence_penalty=0.3, frequency_penalty=0.4, seed=3,
        stop=("a", "b"),
    )  # fmt: skip
    assert from_arguments(parser.parse_args([])) == Sampling()
    with pytest.raises(UserError, match=r"^--top-p: expected more than 0"):
        from_arguments(parser.parse_args(["--top-p", "0"]))


def test_penalties_change_the_logits():
    tokens, logits = mx.array([1, 1, 2]), mx.ones((1, 4))

    def after(**options):
        out = mx.array(logits)
        for processor in Sampling(**options).logits_processors():
            out = processor(tokens, out)
        return np.array(out)[0].tolist()

    assert after() == [1, 1, 1, 1]
    assert after(repetition_penalty=2.0) == [1, 0.5, 0.5, 1]
    assert after(presence_penalty=0.5) == [1, 0.5, 0.5, 1]
    assert after(frequency_penalty=0.5) == [1, 0.0, 0.5, 1]
    assert after(logit_bias={3: 2.0}) == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("words", "pieces", "shown", "stopped"),
    [
        ((), ["a", "b"], ["a", "b"], False),
        (("END",), ["to the E", "N", "D and on"], ["to the ", "", ""], True),
        (("END",), ["to the E", "Nd"], ["to the ", "ENd"], False),
        (("aab",), ["aa", "aab!"], ["", "aa"], True),
        (("xyz", "b"), ["abc"], ["a"], True),
    ],
)
def test_stop_words_come_in_any_pieces(words, pieces, shown, stopped):
    stop = StopWords(words)
    assert [stop.feed(piece) for piece in pieces] == shown
    assert stop.stopped == stopped
    assert stop.feed("more") == ("" if stopped else "more")


def test_what_was_held_back_comes_at_the_end():
    stop = StopWords(("END",))
    assert stop.feed("the EN") == "the "
    assert stop.finish() == "EN"
    assert stop.finish() == ""
