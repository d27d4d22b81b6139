"""Every way to get an answer gives the same words, and each token says where it looked."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import ReadOnce, batch_generate, generate, stream_generate
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.prompts import begin, read

QUESTIONS = ["Is there a dog?", "Where is the car?", "Describe the image.", "Yes Yes Where is it?"]


def parts(it):
    return it.model, it.tokenizer, it.preprocessor


def tokens(it, *args, **options):
    return [piece.token for piece in stream_generate(*parts(it), *args, **options)]


def turns(noise):
    """A conversation with an image in the first and in the last question."""
    return (
        Turn("user", "Is there a dog?", (noise(1),)),
        Turn("assistant", "Yes"),
        Turn("user", "Where is the car?", (noise(2), noise(3))),
    )


def test_the_talker_is_worth_testing_with(talker, noise):
    said = [tokens(talker, q, noise(n), max_tokens=8) for q in QUESTIONS for n in (1, 2)]
    assert len(set(map(tuple, said))) >= 6
    assert np.mean([len(set(answer)) for answer in said]) > 4


# --- the same words, however they are got -----------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 7, 2048])
def test_a_prompt_read_in_parts_gives_the_same_words(talker, noise, step):
    expected = tokens(talker, turns(noise), max_tokens=8)
    assert tokens(talker, turns(noise), max_tokens=8, prefill_step_size=step) == expected


@pytest.mark.parametrize("length", [1, 2, 5, 127, 128, 129, 300])
def test_reading_in_one_pass_gives_what_two_passes_give(tiny_talker, length):
    it = tiny_talker("cross")
    ids = [int(i) for i in np.random.default_rng(length).integers(4, 260, length)]
    image = mx.random.normal((1, 16, 16, 3))

    def greedy(model):
        steps = generate_step(
            mx.array(ids), model, max_tokens=5, prompt_cache=it.model.see(image),
            prefill_step_size=100,
        )  # fmt: skip
        return [(token, logprobs) for token, logprobs in steps]

    expected, got = greedy(it.model), greedy(ReadOnce(it.model, ids))
    assert [t for t, _ in got] == [t for t, _ in expected]
    for (_, a), (_, b) in zip(expected, got, strict=True):
        assert mx.allclose(a, b, atol=1e-4)


def test_a_batch_gives_the_words_of_single_answers(talker, noise):
    prompts = [*QUESTIONS, turns(noise), "Is there a dog?"]
    images = [noise(1), [noise(1), noise(2)], noise(3), (), (), noise(1)]
    expected = [
        generate(*parts(talker), p, i, max_tokens=4 + 3 * (n % 2))
        for n, (p, i) in enumerate(zip(prompts, images, strict=True))
    ]
    for size in (1, 2, 8):  # rows come and go in different company
        said = [
            batch_generate(*parts(talker), prompts, images, max_tokens=longest,
                           completion_batch_size=size, prefill_batch_size=min(size, 2))
            for longest in (4, 7)
        ]  # fmt: skip
        assert [said[n % 2][n] for n in range(6)] == expected


def test_a_seed_gives_the_same_words_alone_and_in_company(tiny_talker, noise):
    it = tiny_talker("cross")
    alone = [
        generate(*parts(it), q, noise(1), max_tokens=8, temp=1.5, seed=3) for q in QUESTIONS[:3]
    ]
    assert batch_generate(*parts(it), QUESTIONS[:3], [noise(1)] * 3, max_tokens=8, temp=1.5,
                          seed=3) == alone  # fmt: skip
    mx.random.seed(99)
    again = generate(*parts(it), QUESTIONS[0], noise(1), max_tokens=8, temp=1.5, seed=3)
    assert again == alone[0]
    assert again != generate(*parts(it), QUESTIONS[0], noise(1), max_tokens=8, temp=1.5, seed=4)


@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("good", [True, False])
def test_a_draft_model_changes_no_word(talker, noise, drafts, good):
    """good: the model's own language model, which is often right; else one that never is."""
    expected = tokens(talker, turns(noise), max_tokens=12)
    draft = talker.model.language_model
    if not good:
        from agevlm_mlx.models.graft import build_language_model

        draft = build_language_model(talker.model.config.text_config)
    options = {"draft_model": draft, "num_draft_tokens": drafts}
    assert tokens(talker, turns(noise), max_tokens=12, **options) == expected


def test_a_stop_word_ends_the_answer_and_is_cut_off(talker, noise):
    text = generate(*parts(talker), "Describe the image.", noise(1), max_tokens=20)
    stop = text[5:8]
    cut = text[: text.index(stop)].strip()
    options = {"max_tokens": 20, "stop": [stop, "never said"]}
    assert generate(*parts(talker), "Describe the image.", noise(1), **options) == cut
    prompts = ["Describe the image.", "Where is the car?"]  # the second goes on alone
    said = batch_generate(*parts(talker), prompts, [noise(1)] * 2, **options)
    assert said == [cut, generate(*parts(talker), prompts[1], noise(1), **options)]
    *_, last = stream_generate(*parts(talker), "Describe the image.", noise(1), **options)
    assert last.finish_reason == "stop"
    whole = {"max_tokens": 20, "stop": "never said"}
    assert generate(*parts(talker), "Describe the image.", noise(1), **whole) == text


def test_an_answer_ends_where_the_context_does(talker, noise):
    long = "dog " * 245
    pieces = list(stream_generate(*parts(talker), long, noise(1), max_tokens=1000))
    store = ImageStore(talker.model, talker.preprocessor)
    prompt = read(talker.tokenizer, (Turn("user", long, (noise(1),)),), store)
    concat = talker.model.num_image_tokens if talker.model.fusion == "concat" else 0
    if pieces[-1].finish_reason == "length":
        assert len(pieces) == 512 - len(prompt.ids) - concat
    assert len(prompt.ids) + concat + len(pieces) <= 512


def test_a_logits_processor_is_applied(talker, noise):
    banned = tokens(talker, "Describe the image.", noise(1), max_tokens=5)
    bias = dict.fromkeys(banned, -1e9)
    said = tokens(talker, "Describe the image.", noise(1), max_tokens=5, logit_bias=bias)
    assert not set(said) & set(banned)
    with pytest.raises(UserError, match="logit_bias: expected tokens from 0 to"):
        generate(*parts(talker), "Describe the image.", noise(1), logit_bias={10**6: 1.0})


def test_a_rotating_cache_forgets_text_but_never_the_image(tiny_talker, noise):
    it = tiny_talker("cross")
    long = "dog car " * 12 + "Where is the car?"
    full = tokens(it, long, noise(1), max_tokens=8)
    assert tokens(it, long, noise(1), max_tokens=8, max_kv_size=500) == full
    last = [
        list(stream_generate(*parts(it), long, noise(n), max_tokens=8, max_kv_size=8))[-1]
        for n in (1, 2)
    ]
    assert mx.abs(last[0].logprobs - last[1].logprobs).max() > 1e-3  # the images are still there
    cache = it.model.make_cache(8)
    assert [type(entry.text if hasattr(entry, "text") else entry).__name__ for entry in cache] == [
        "RotatingKVCache"
    ] * 3
    small = tokens(it, long, max_tokens=8, prompt_cache=cache)
    assert small != tokens(it, long, max_tokens=8)
    plain = [getattr(entry, "text", entry) for entry in cache]
    assert [entry.state[0].shape[2] for entry in plain] == [8] * 3


# --- a quantised text cache -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tiny_talker):
    """A model whose heads are wide enough for quantisation, and its tokenizer."""
    from dataclasses import replace

    from agevlm_mlx.models.agevlm import AgeVLM

    it = tiny_talker("cross")
    mx.random.seed(11)
    config = it.model.config
    text = {**config.text_config, "head_dim": 64}
    return replace(it, model=AgeVLM(replace(config, text_config=text)))


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_a_quantised_text_cache_stays_close(wide, noise, bits, bound):
    """Worst log-probability over 12 forced tokens; measured 0.0012 and 0.021."""
    ids = mx.array([[int(i) for i in np.random.default_rng(1).integers(4, 260, 24)]])
    store = ImageStore(wide.model, wide.preprocessor)
    prompt = read(wide.tokenizer, (Turn("user", "Where?", (noise(1),)),), store)

    def logprobs(quantise):
        cache, _ = begin(wide.model, prompt)
        wide.model(ids[:, :12], cache=cache)
        if quantise:
            cache = [entry.to_quantized(group_size=64, bits=bits) for entry in cache]
        steps = [wide.model(ids[:, i : i + 1], cache=cache) for i in range(12, 24)]
        logits = mx.concatenate(steps, axis=1)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    worst = mx.abs(logprobs(True) - logprobs(False)).max().item()
    assert 0 < worst < bound


def test_quantisation_starts_at_once_and_spares_the_image(wide, noise):
    store = ImageStore(wide.model, wide.preprocessor)
    prompt = read(wide.tokenizer, (Turn("user", "Where is the car?", (noise(1),)),), store)
    cache, _ = begin(wide.model, prompt)
    keys = cache[1].vision.keys
    said = tokens(wide, "Where is the car?", max_tokens=4, prompt_cache=cache, kv_bits=8)
    assert len(said) == 4
    assert cache[0].bits == cache[1].bits == 8
    assert cache[1].vision.keys is keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits: expected 4 or 8, got 3"),
        ({"kv_bits": 8, "max_kv_size": 64}, "cannot be quantised; choose one"),
        ({"kv_bits": 8}, "head dimension 8, got None; this model's cache cannot be quantised"),
        ({"max_kv_size": 2}, "max_kv_size: expected at least 8 tokens, got 2"),
        ({"draft_model": object(), "max_kv_size": 64}, "drop max_kv_size"),
        ({"draft_model": object(), "kv_bits": 8}, "drop kv_bits"),
        ({"draft_model": object(), "num_draft_tokens": 0}, "num_draft_tokens: expected 1"),
        ({"prefill_step_size": 0}, "prefill_step_size: expected 1 or more"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"stop": ["a", ""]}, "stop: expected texts that are not empty"),
    ],
)
def test_wrong_options_are_named(tiny_talker, noise, options, message):
    with pytest.raises(UserError, match=message):
        generate(*parts(tiny_talker("cross")), "A dog?", noise(1), **options)


def test_batch_generate_checks_what_it_is_given(tiny_talker, noise):
    it = tiny_talker("cross")
    assert batch_generate(*parts(it), []) == []
    with pytest.raises(UserError, match="images: expected 2, one entry a prompt, got 1"):
        batch_generate(*parts(it), ["a", "b"], [noise(1)])
    with pytest.raises(UserError, match="takes no kv_bits"):
        batch_generate(*parts(it), ["a"], [noise(1)], kv_bits=4)


# --- attention as data ------------------------------------------------------------------------


def expected_maps(it, prompt_turns, said):
    """fp32 [tokens L S]: where the position before each token of the answer looks, in one pass."""
    store = ImageStore(it.model, it.preprocessor)
    prompt = read(it.tokenizer, prompt_turns, store)
    cache, rest = begin(it.model, prompt)
    ids = [*rest, *said[:-1]]
    columns = mx.arange(len(rest) - 1, len(ids))
    _, maps = it.model.attend(mx.array([ids]), cache, mx.zeros_like(columns), columns)
    return np.array(maps.mean(2))


@pytest.mark.parametrize("drafts", [None, 3])
@pytest.mark.parametrize("images", [1, 2])
def test_each_token_says_where_the_choice_looked(talker, noise, images, drafts):
    asked = (Turn("user", "Where is the car?", tuple(noise(n) for n in range(images))),)
    options = {} if drafts is None else {"draft_model": talker.model.language_model,
                                         "num_draft_tokens": drafts}  # fmt: skip
    pieces = list(stream_generate(*parts(talker), asked, max_tokens=8, attention=True, **options))
    said = [piece.token for piece in pieces]
    assert said == tokens(talker, asked, max_tokens=8)
    expected = expected_maps(talker, asked, said)
    L = len(talker.model.looking_layers)
    for piece, values in zip(pieces, expected, strict=True):
        found = piece.attention
        assert found.values.shape == (L, images * 16)
        assert np.allclose(found.values, values, atol=2e-5)
        assert found.maps.shape == (L, images, 4, 4)
        assert np.allclose(found.mean, found.maps.mean(0))
        assert found.on_image == pytest.approx(values.sum(-1).mean(), abs=1e-4)
        if talker.model.fusion == "cross":
            assert found.null == pytest.approx(1 - found.on_image)
        else:
            assert found.null is None
        assert 0 <= found.grounding <= found.on_image + 1e-6


def test_a_later_image_is_looked_at_only_by_later_tokens(tiny_talker, noise):
    it = tiny_talker("cross")
    asked = turns(noise)
    pieces = list(stream_generate(*parts(it), asked, max_tokens=6, attention=True))
    expected = expected_maps(it, asked, [p.token for p in pieces])
    for piece, values in zip(pieces, expected, strict=True):
        assert piece.attention.maps.shape == (2, 3, 4, 4)
        assert np.allclose(piece.attention.values, values, atol=2e-5)


def test_maps_of_a_quantised_cache_are_those_of_the_image(wide, noise):
    plain, packed = (
        list(stream_generate(*parts(wide), "Where?", noise(1), max_tokens=3, attention=True, **o))
        for o in ({}, {"kv_bits": 8})
    )
    assert np.allclose(plain[0].attention.values, packed[0].attention.values, atol=1e-2)


def test_nothing_is_recorded_afterwards_or_unasked(talker, noise):
    store = ImageStore(talker.model, talker.preprocessor)
    prompt = read(talker.tokenizer, (Turn("user", "Where is the car?", (noise(1),)),), store)
    cache, _ = begin(talker.model, prompt)
    looking = cache[talker.model.looking_layers[0]]
    answer = stream_generate(*parts(talker), "A dog?", prompt_cache=cache, attention=True)
    next(answer)
    assert looking.request is not None
    answer.close()  # in the middle
    assert looking.request is None
    for piece in stream_generate(*parts(talker), "A dog?", prompt_cache=cache, max_tokens=2):
        assert piece.attention is None
        assert looking.request is None


def test_attention_needs_an_image(talker):
    with pytest.raises(UserError, match="attention: expected an image"):
        list(stream_generate(*parts(talker), "Where is the car?", attention=True))


def test_images_beside_a_cache_that_has_seen_them_are_refused(tiny_talker, noise):
    it = tiny_talker("cross")
    with pytest.raises(UserError, match="beside a prompt_cache"):
        generate(*parts(it), "A dog?", noise(1), prompt_cache=it.model.make_cache())
