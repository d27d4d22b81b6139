"""The model as an mlx-lm model: causality, caches, batching, several images."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.graft import build_language_model, cross_layers
from agevlm_mlx.models.projector import sincos_positions

VOCAB = 100
TOLERANCE = 2e-5  # fp32, different order of summation

LANGUAGE_MODELS = {
    "llama": dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, head_dim=8,
                  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                  tie_word_embeddings=False),
    "qwen2": dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64,
                  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5),
    "qwen3": dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, head_dim=8,
                  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                  max_position_embeddings=512, rope_theta=1e4, tie_word_embeddings=True),
    "smollm3": dict(hidden_size=32, num_hidden_layers=4, intermediate_size=64,
                    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                    no_rope_layer_interval=4),
    "gemma3_text": dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, head_dim=8,
                        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
                        sliding_window=16, sliding_window_pattern=3),
}  # fmt: skip


def text_config(kind="llama"):
    return {"model_type": kind, "vocab_size": VOCAB, **LANGUAGE_MODELS[kind]}


VISION = {
    "model_type": "agevlm_vit", "image_size": 16, "patch_size": 4, "hidden_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def build(fusion="cross", kind="llama", vision=None, **fusion_options):
    options = {"layers": (1, 2), "gate_init": 0.5} if fusion == "cross" else {}
    config = ModelConfig(
        text_config=text_config(kind),
        vision_config=vision or VISION,
        fusion_config=FusionConfig(fusion=fusion, **{**options, **fusion_options}),
    )
    mx.random.seed(7)
    model = AgeVLM(config)
    # At the usual initial scale every greedy answer repeats one token.
    for layer in model.layers:
        layer.mlp.down_proj.weight = 8 * layer.mlp.down_proj.weight
        layer.self_attn.o_proj.weight = 8 * layer.self_attn.o_proj.weight
        if "cross_attn" in layer:
            layer.cross_attn.o_proj.weight = 8 * layer.cross_attn.o_proj.weight
    mx.eval(model.parameters())
    return model


def pixels(n, seed=0):
    return mx.random.normal((n, 16, 16, 3), key=mx.random.key(seed))


def tokens(n, T, seed=1):
    return mx.random.randint(0, VOCAB, (n, T), key=mx.random.key(seed))


def difference(a, b):
    return mx.abs(a - b).max().item()


def greedy(model, prompt, cache, n=6, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


@pytest.fixture(scope="module", params=["cross", "concat"])
def model(request):
    return build(request.param)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_gate_zero_is_the_text_only_model_bit_for_bit(kind):
    model = build(kind=kind, gate_init=0.0)
    alone = build_language_model(text_config(kind))
    shared = [
        (k, v)
        for k, v in tree_flatten(model.language_model.parameters())
        if ".cross_attn." not in k
    ]
    alone.load_weights(shared)  # strict: the language model's own names are unchanged
    ids = tokens(2, 9)
    expected = alone(ids)
    assert mx.array_equal(model(ids, cache=model.see(pixels(2))), expected)
    model.language_model.layers[1].cross_attn.gate = mx.ones(1)
    assert difference(model(ids, cache=model.see(pixels(2))), expected) > 1e-3


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_decoding_equals_the_full_forward(kind):
    model, ids = build(kind=kind), tokens(2, 20)
    full = model(ids, cache=model.see(pixels(2)))
    cache = model.see(pixels(2))
    steps = [model(ids[:, a:b], cache=cache) for a, b in [(0, 5), (5, 6), (6, 13), (13, 20)]]
    assert difference(mx.concatenate(steps, axis=1), full) < TOLERANCE


def test_a_future_token_changes_no_past_logit(model):
    ids = tokens(1, 10)
    changed = mx.concatenate([ids[:, :6], (ids[:, 6:] + 1) % VOCAB], axis=1)
    before, after = (model(x, cache=model.see(pixels(1))) for x in (ids, changed))
    assert mx.array_equal(before[:, :6], after[:, :6])
    assert difference(before[:, 6:], after[:, 6:]) > 1e-3


def test_the_image_matters_and_padding_does_not(model):
    ids = tokens(2, 8)
    logits = model(ids, cache=model.see(pixels(2)))
    other = model(ids, cache=model.see(pixels(2, seed=5)))
    assert difference(logits, other) > 1e-3
    padded = mx.concatenate([ids, mx.zeros((2, 5), mx.int32)], axis=1)
    again = model(padded, cache=model.see(pixels(2)))[:, :8]
    assert difference(again, logits) < TOLERANCE


def test_several_texts_share_one_look(model):
    ids, images = tokens(6, 7), pixels(2)
    z_img = model.project(model.encode(images))
    together = model(ids, cache=model.look(z_img, texts=3))
    seen = model.look(z_img)
    for _ in range(2):  # a look can be shared by several groups of texts
        assert mx.array_equal(model(ids, cache=model.share(seen, 3)), together)
    alone = [model(ids[r : r + 1], cache=model.see(images[r // 3 : r // 3 + 1])) for r in range(6)]
    assert difference(together, mx.concatenate(alone)) < TOLERANCE


def test_batched_generation_equals_single(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 3], [1, 2, 3]]
    images = pixels(3)

    def caches():
        return [model.see(images[i : i + 1]) for i in range(3)] + [model.make_cache()]

    expected = [greedy(model, p, c) for p, c in zip(prompts, caches(), strict=True)]
    assert expected[0] != expected[3]  # the image changes the answer
    generator = BatchGenerator(model, max_tokens=6)
    uids = generator.insert(prompts, caches=caches())
    answers = {uid: [] for uid in uids}
    while any(len(a) < 6 for a in answers.values()):
        _, responses = generator.next()
        for response in responses:
            answers[response.uid].append(response.token)
    assert [answers[uid] for uid in uids] == expected


def test_a_follow_up_question_reuses_the_image(model):
    ids = tokens(1, 12)
    full = model(ids, cache=model.see(pixels(1)))
    cache = model.see(pixels(1))
    model(ids[:, :10], cache=cache)
    assert trim_prompt_cache(cache, 4) == 4
    assert difference(model(ids[:, 6:], cache=cache), full[:, 6:]) < TOLERANCE


def test_a_prompt_cache_file_remembers_the_image(model, tmp_path):
    cache = model.see(pixels(1))
    model(tokens(1, 5), cache=cache)
    path = str(tmp_path / "image.safetensors")
    save_prompt_cache(path, cache)
    assert greedy(model, [3, 4], load_prompt_cache(path)) == greedy(model, [3, 4], cache)


def test_deep_copies_of_a_cache_are_independent(model):
    cache = model.see(pixels(1))
    copies = copy.deepcopy(cache)
    assert greedy(model, [3, 4], cache) == greedy(model, [3, 4], copies)


def test_quantised_text_cache_leaves_the_image_alone():
    model = build(kind="llama", num_attention_heads=4, head_dim=8)
    wide = {**text_config(), "head_dim": 64}
    model = AgeVLM(
        ModelConfig(text_config=wide, vision_config=VISION,
                    fusion_config=FusionConfig(layers=(1, 2), gate_init=0.5))
    )  # fmt: skip
    cache = model.see(pixels(1))
    vision = cache[1].vision.keys
    answer = greedy(model, [1, 2, 3], cache, kv_bits=8, quantized_kv_start=0)
    assert len(answer) == 6
    assert cache[1].bits == 8
    assert cache[1].vision.keys is vision


def test_text_sees_the_images_of_its_own_and_earlier_turns():
    model, images, ids = build(), pixels(2), tokens(1, 9)
    cache = model.see(images[:1])
    first = model(ids[:, :4], cache=cache)
    cache = model.see(images[1:], cache)
    second = model(ids[:, 4:], cache=cache)
    alone = model(ids, cache=model.see(images[:1]))
    assert difference(first, alone[:, :4]) < TOLERANCE
    assert difference(second, alone[:, 4:]) > 1e-3
    # One pass over both turns, with the second image hidden from the first turn.
    both = model.see(images[None])
    S = model.num_image_tokens
    for layer in model.looking_layers:
        both[layer].vision.start = mx.array([[0] * (1 + S) + [4] * S])
    once = model(ids, cache=both)
    assert difference(mx.concatenate([first, second], axis=1), once) < TOLERANCE


def test_an_image_added_to_a_text_conversation_is_invisible_before():
    model, ids = build(), tokens(1, 8)
    cache = model.make_cache()
    before = model(ids[:, :3], cache=cache)
    cache = model.see(pixels(1), cache)
    after = model(ids[:, 3:], cache=cache)
    text_only = model(ids, cache=model.make_cache())
    assert difference(before, text_only[:, :3]) < TOLERANCE
    assert difference(after, text_only[:, 3:]) > 1e-3


def test_two_images_in_concat_follow_each_other():
    model, images, ids = build("concat"), pixels(2), tokens(1, 4)
    together = model(ids, cache=model.see(images[None]))
    one_by_one = model.see(images[1:], model.see(images[:1]))
    assert difference(model(ids, cache=one_by_one), together) < TOLERANCE


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_explicit_rows_reproduce_the_fused_output(kv_heads):
    model = build(num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8)
    block = model.language_model.layers[1].cross_attn
    block.null_key = mx.random.normal(block.null_key.shape)
    block.o_proj.weight, block.gate = mx.eye(32), mx.array([20.0])  # tanh = 1: plain attention
    z_img = model.project(model.encode(pixels(2)))
    cache, x = model.look(z_img), mx.random.normal((2, 5, 32))
    vision = cache[1].vision
    rows, cols = (mx.array(v) for v in ([0] * 5 + [1] * 5, [*range(5), *range(5)]))
    _, maps = model.attend(tokens(2, 5), cache, rows, cols)
    assert maps.shape == (10, 2, 4, 16)

    class Request:
        heads, maps = None, []

    Request.rows, Request.cols = rows, cols
    fused = block(x, vision, 0, Request) - x
    explicit = Request.maps[0]  # P N S, the null slot left out
    null = 1 - explicit.sum(axis=-1, keepdims=True)
    weights = mx.concatenate([null, explicit], axis=-1)
    values = mx.repeat(vision.values, 4 // kv_heads, axis=1)[rows]  # P N S H
    out = (weights[:, :, None] @ values)[:, :, 0].reshape(2, 5, 32)
    assert difference(out, fused) < 1e-5


def test_rows_are_those_of_the_asked_texts_and_heads(model):
    z_img, ids = model.project(model.encode(pixels(2))), tokens(4, 6)
    rows, cols = mx.array([0, 3, 3]), mx.array([5, 0, 4])
    logits, maps = model.attend(ids, model.look(z_img, texts=2), rows, cols, heads=2)
    assert maps.shape == (3, len(model.looking_layers), 2, 16)
    assert maps.dtype == mx.float32
    assert difference(logits, model(ids, cache=model.look(z_img, texts=2))) < TOLERANCE
    for p, (row, col) in enumerate([(0, 5), (3, 0), (3, 4)]):
        alone = model.see(pixels(2)[row // 2 : row // 2 + 1])
        cut = ids[row : row + 1, : col + 1]
        _, one = model.attend(cut, alone, mx.array([0]), mx.array([col]))
        assert difference(one[0, :, :2], maps[p]) < 1e-5
    assert 0 < maps.sum(axis=-1).min().item() <= maps.sum(axis=-1).max().item() < 1


def test_attend_needs_an_image(model):
    with pytest.raises(ValueError, match="see\\(\\) or look\\(\\)"):
        model.attend(tokens(1, 3), model.make_cache(), mx.array([0]), mx.array([1]))


@pytest.mark.parametrize("projector", ["linear", "mlp", "pixel_shuffle"])
def test_projectors_and_encoders_fit_any_pair(projector):
    siglip = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8,
              "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip
    for vision, side in ((VISION, 16), (siglip, 32)):
        model = build(vision=vision, projector=projector)
        images = mx.random.normal((2, side, side, 3))
        z_img = model.project(model.encode(images))
        expected = (2, 2) if projector == "pixel_shuffle" else (4, 4)
        assert model.grid == expected
        assert z_img.shape == (2, model.num_image_tokens, 32)
        assert model(tokens(2, 3), cache=model.see(images)).shape == (2, 3, VOCAB)


def test_pixel_shuffle_keeps_neighbours_together():
    model = build(projector="pixel_shuffle")
    z_vis = mx.zeros((1, 16, 24))
    z_vis[0, 4 * 2 + 3] = 1.0  # row 2, column 3 of the 4x4 grid
    changed = mx.abs(model.project(z_vis)).sum(axis=-1)[0]
    assert np.flatnonzero(np.array(changed) > 0).tolist() == [3]  # row 1, column 1 of 2x2


@pytest.mark.parametrize("projector", ["linear", "mlp", "pixel_shuffle"])
def test_equal_tokens_tell_where_they_are_only_with_positions(projector):
    z_vis = mx.broadcast_to(mx.random.normal((2, 1, 24)), (2, 16, 24))  # all cells look the same
    for positions in (False, True):
        model = build(projector=projector, image_positions=positions)
        names = [name for name, _ in tree_flatten(model.multi_modal_projector.parameters())]
        assert ("position_proj.weight" in names) == positions
        z_img = np.array(model.project(z_vis))
        for one in z_img:
            assert len(np.unique(one.round(5), axis=0)) == (len(one) if positions else 1)
        difference = z_img - z_img[:, :1]  # positions are the same in every picture
        np.testing.assert_allclose(difference[0], difference[1], atol=1e-5)


def test_positions_mean_the_same_on_every_grid():
    rows, columns = np.split(np.array(sincos_positions((3, 6))).reshape(3, 6, 16), 2, axis=-1)
    assert np.all(rows == rows[:, :1])
    assert np.all(columns == columns[:1])
    other = np.array(sincos_positions((9, 2))).reshape(9, 2, 16)
    np.testing.assert_allclose(other[1::3, 0, :8], rows[:, 0], atol=1e-6)  # middles of thirds
    # The first wave runs from one side to the other: its cosine tells left from right.
    assert np.all(np.diff(columns[0, :, 4]) < 0)
    np.testing.assert_allclose(
        columns[0, :, 4], np.cos(np.pi * (np.arange(6) + 0.5) / 6), atol=1e-6
    )


def test_default_placement_is_the_papers():
    assert cross_layers(FusionConfig(), 16) == (2, 6, 10, 14)
    assert cross_layers(FusionConfig(), 4) == (0, 1, 2, 3)
    assert len(cross_layers(FusionConfig(), 30)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion_config": FusionConfig(layers=(1, 9))}, "layers from 0 to 2, got \\[1, 9\\]"),
        ({"text_config": {"model_type": "nonsense"}}, "mlx-lm architecture .* got 'nonsense'"),
        ({"text_config": {"model_type": "../llama"}}, "mlx-lm architecture"),
        ({"text_config": {"model_type": "llama"}}, "llama needs more"),
        ({"vision_config": {"model_type": "vgg"}}, "expected agevlm_vit or .*, got 'vgg'"),
        ({"vision_config": {**VISION, "patchsize": 4}}, "did you mean 'patch_size'"),
        ({"vision_config": {**VISION, "patch_size": 5}}, "patch_size that divides"),
    ],
)
def test_bad_configurations_say_what_to_do(change, message):
    parts = {"text_config": text_config(), "vision_config": VISION, **change}
    with pytest.raises(UserError, match=message):
        AgeVLM(ModelConfig(**parts))


SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, intermediate_size=64,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 4,
          "n_positions": 64, "layer_norm_epsilon": 1e-5}, "gpt2 cannot be grafted: its ModelArgs"),
        ({"model_type": "mamba", "state_size": 8, "conv_kernel": 4, "use_bias": False,
          "use_conv_bias": True, "time_step_rank": 4}, "mamba cannot be grafted: expected"),
        ({"model_type": "qwen3_vl", "text_config": {**SIZES, "model_type": "qwen3",
          "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 1e4,
          "tie_word_embeddings": True}}, "take a text-only checkpoint"),
        ({"model_type": "iquestloopcoder", "head_dim": 8, "max_position_embeddings": 64},
         "called without a cache"),
        ({"model_type": "falcon_h1", "head_dim": 8, "max_position_embeddings": 64,
          "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "attention_bias": False},
         r"no position in the cache of layers \[1, 2\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_a_language_model_that_cannot_look_says_why(config, reason, fusion):
    layers = (1, 2) if fusion == "cross" else None
    parts = {"text_config": SIZES | config, "vision_config": VISION}
    with pytest.raises(UserError, match=reason if fusion == "cross" else None) as caught:
        AgeVLM(ModelConfig(**parts, fusion_config=FusionConfig(fusion=fusion, layers=layers)))
    assert "\n" not in str(caught.value)


def test_concat_needs_input_embeddings():
    config = {"model_type": "nemotron", "hidden_size": 32, "hidden_act": "relu2",
              "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
              "norm_eps": 1e-5, "vocab_size": VOCAB, "num_key_value_heads": 4}  # fmt: skip
    fusion = FusionConfig(fusion="concat")
    with pytest.raises(UserError, match="use 'cross'"):
        AgeVLM(ModelConfig(text_config=config, vision_config=VISION, fusion_config=fusion))


def test_the_prompt_cache_of_the_model_is_ours():
    model = build()
    assert [type(c).__name__ for c in make_prompt_cache(model)] == [
        "KVCache", "VisionCache", "VisionCache",
    ]  # fmt: skip


@pytest.mark.parametrize("fusion", ["cross", "concat"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_logits_of_chosen_positions_are_those_of_all(kind, fusion):
    """Values and gradients; the output layer is asked for no more than it has to give."""
    model, ids = build(fusion, kind), tokens(2, 6)
    z_img, at = mx.random.normal((2, 16, 32)), (mx.array([0, 1, 1]), mx.array([5, 0, 3]))
    model.freeze()
    model.language_model.model.layers[0].unfreeze()
    sizes = []

    def loss(params, chosen):
        model.update(params)
        keep = (lambda out: sizes.append(out.shape) or out[at][None]) if chosen else None
        logits = model(ids, model.look(z_img), keep=keep)
        return (logits[0] if chosen else logits[at]).square().sum()

    trained = model.trainable_parameters()
    results = [mx.value_and_grad(loss)(trained, chosen) for chosen in (False, True)]
    model.update(trained)
    assert sizes == [(2, 6, 32)]
    (whole, slopes), (few, few_slopes) = results
    assert few.item() == pytest.approx(whole.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(slopes), tree_flatten(few_slopes), strict=True):
        np.testing.assert_allclose(np.array(b), np.array(a), 1e-4, 1e-4, err_msg=str(name))


def test_logits_are_chosen_after_a_trunk_that_does_not_do_it(monkeypatch):
    model, ids = build(), tokens(2, 6)
    last, cache = mx.array([3, 5]), model.see(pixels(2))
    wanted = model(ids, copy.deepcopy(cache))[mx.arange(2), last][:, None]
    trunk = type(model.language_model.model)
    monkeypatch.setattr(trunk, "__call__", lambda self, *args: trunk.__base__.__call__(self, *args))
    assert mx.array_equal(model.last_logits(ids, cache, last), wanted)
