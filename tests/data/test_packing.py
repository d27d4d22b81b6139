"""Several texts in a row: where they stand, and that a model reads each as if it were alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.data.batches import Batch, Batches, GroupSpec
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.packing import first_fit, packed_rows
from agevlm_mlx.data.record_set import Records
from agevlm_mlx.data.records import Record
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.packing import why_not_packed
from agevlm_mlx.sam.targets import rle_encode
from agevlm_mlx.training.objective import loss_and_gradients
from agevlm_mlx.training.reading import read_texts
from agevlm_mlx.training.rules import named_parameters
from agevlm_mlx.training.stages import AttentionLoss, Losses

GRID = (4, 4)
GROUPS = (GroupSpec(kinds=("caption",)), GroupSpec(kinds=("presence",), n=5))


# Rows -----------------------------------------------------------------------------------------


def texts(*lengths: int) -> list[str]:
    return [str(number % 10) * length for number, length in enumerate(lengths)]


def test_a_text_goes_into_the_first_row_with_room() -> None:
    assert first_fit(texts(3, 7, 4, 5, 1), 10) == [["1111111", "000"], ["33333", "2222", "4"]]
    assert first_fit([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_in_one_row_of_its_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [texts(*rng.integers(1, 60, size=rng.integers(0, 9))) for _ in range(5)]
    rows, T = packed_rows(images)
    assert T % 4 == 0
    assert len({len(own) for own in rows}) == 1
    for own, image in zip(rows, images, strict=True):
        assert sorted(text for row in own for text in row) == sorted(image)
        assert all(sum(map(len, row)) <= T for row in own)
    assert len(rows[0]) * T <= max(map(len, images)) * (max(len(t) for i in images for t in i) + 4)


def test_no_texts_make_one_empty_row() -> None:
    assert packed_rows([[], []]) == ([[[]], [[]]], 4)


# Batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def guided(records: Sequence[Record], masked: Sequence[Record]) -> Records:
    """Captions with masks and questions, in which the boxes are masks, about the same pictures."""

    def with_masks(record: Record) -> Record:
        phrases = []
        for phrase in record.phrases:
            assert phrase.box is not None
            x0, y0, x1, y1 = (round(edge) for edge in phrase.box)
            mask = np.zeros((128, 128), bool)
            mask[y0:y1, x0:x1] = True
            phrases.append(replace(phrase, box=None, mask=rle_encode(mask)))
        return replace(record, phrases=tuple(phrases))

    asked = [with_masks(record) for record in records if record.kind == "presence"]
    return Records.from_list([*masked, *asked])


def draw(guided: Records, micro: Any, *, pack: bool, groups: Sequence[GroupSpec] = GROUPS) -> Batch:
    batches = Batches(
        guided,
        micro,
        Preprocessor(image_size=16),
        GRID,
        batch_size=3,
        groups=groups,
        seed=4,
        pack=pack,
    )
    return batches.batch(1)


def pieces(batch: Batch) -> list[tuple[Any, ...]]:
    """What each text of each image is and guides, wherever it stands, sorted."""
    found = []
    for group in batch.groups:
        B, R, T = group.ids.shape
        arrays = (a.reshape(B * R, T) for a in (group.ids, group.labels, group.loss_mask))
        for row, (ids, labels, loss) in enumerate(zip(*arrays, strict=True)):
            if group.segments is None:
                numbers = np.where(np.arange(T) <= np.flatnonzero(labels).max(initial=-1), 0, -1)
            else:
                numbers = group.segments.reshape(B * R, T)[row]
            for number in set(numbers) - {-1}:
                here = np.flatnonzero(numbers == number)
                assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
                looks = [
                    (int(col - here[0]), target.tobytes())
                    for r, col, target, weight in zip(
                        group.rows, group.cols, group.target, group.weight, strict=True
                    )
                    if weight and r == row and here[0] <= col <= here[-1]
                ]
                text = tuple(a[here].tobytes() for a in (ids, labels, loss))
                found.append((row // R, *text, tuple(sorted(looks))))
    return sorted(found)


def test_packed_rows_hold_the_same_texts_and_guide_the_same_tokens(
    guided: Records, micro: Any
) -> None:
    plain, packed = (draw(guided, micro, pack=pack) for pack in (False, True))
    assert len(plain.groups) == 2
    (group,) = packed.groups
    assert group.segments is not None
    assert group.segments.shape == group.ids.shape
    assert pieces(packed) == pieces(plain)
    assert len(pieces(packed)) == 3 * 6
    assert packed.record_ids == plain.record_ids
    assert sum(g.weight.sum() for g in plain.groups) == group.weight.sum() > 8
    assert len(set(group.segments.reshape(-1, group.ids.shape[2])[group.rows, group.cols])) > 2
    unused = group.segments == -1
    assert not group.loss_mask[unused].any()
    assert group.ids.size < sum(g.ids.size for g in plain.groups)


# Models ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model_config: Callable[..., ModelConfig], micro: Any) -> AgeVLM:
    model = AgeVLM(tiny_model_config(len(micro)))
    mx.eval(model.parameters())
    return model


def outputs(model: AgeVLM, batch: Batch) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Logits [B*R T V], zeros where nothing is supervised, and maps of each group's texts."""
    seen = model.look(model.project(model.encode(mx.array(batch.pixels))))
    found = []
    for group in batch.groups:
        logits, maps = read_texts(model, seen, group, guided=bool(group.weight.any()), heads=2)
        B, R, T = group.ids.shape
        everywhere = np.zeros((B * R, T, logits.shape[-1]), np.float32)
        everywhere[group.supervised] = np.array(logits)
        found.append((everywhere, None if maps is None else np.array(maps)))
    return found


def test_each_text_is_read_as_if_it_were_alone(guided: Records, micro: Any, model: AgeVLM) -> None:
    plain, packed = (draw(guided, micro, pack=pack) for pack in (False, True))
    alone: dict[tuple[int, bytes], np.ndarray] = {}
    maps: dict[tuple[int, bytes], np.ndarray] = {}
    for group, (logits, looks) in zip(plain.groups, outputs(model, plain), strict=True):
        R = group.ids.shape[1]
        flat = group.ids.reshape(len(logits), -1)
        for row, ids in enumerate(flat):
            for length in range(1, len(ids) + 1):
                alone[row // R, ids[:length].tobytes()] = logits[row, length - 1]
        if looks is not None:
            for p in np.flatnonzero(group.weight):
                row, col = group.rows[p], group.cols[p]
                maps[row // R, flat[row, : col + 1].tobytes()] = looks[p]
    (group,), ((logits, looks),) = packed.groups, outputs(model, packed)
    assert group.segments is not None
    assert looks is not None
    R, flat = group.ids.shape[1], group.ids.reshape(len(logits), -1)
    numbers = group.segments.reshape(flat.shape)

    def text(row: int, col: int) -> tuple[int, bytes]:
        first = int(np.flatnonzero(numbers[row] == numbers[row, col])[0])
        return row // R, flat[row, first : col + 1].tobytes()

    assert numbers.max() > 0
    for row, col in zip(*group.supervised, strict=True):
        np.testing.assert_allclose(logits[row, col], alone[text(row, col)], atol=1e-5)
    for p in np.flatnonzero(group.weight):
        wanted = maps[text(group.rows[p], group.cols[p])]
        np.testing.assert_allclose(looks[p], wanted, atol=1e-6)


def test_loss_and_gradients_are_those_of_rows_of_their_own(
    guided: Records, micro: Any, model: AgeVLM
) -> None:
    losses = Losses(attention=AttentionLoss(weight=0.3, heads=2))
    params = named_parameters(model)
    results = []
    for pack in (False, True):
        (total, parts), grads = loss_and_gradients(
            model, params, draw(guided, micro, pack=pack), losses
        )
        results.append((total.item(), parts.tolist(), {k: np.array(v) for k, v in grads.items()}))
    (loss, parts, grads), (packed_loss, packed_parts, packed_grads) = results
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert packed_parts == pytest.approx(parts, abs=1e-5)
    assert parts[1] > 0
    for name, grad in grads.items():
        np.testing.assert_allclose(packed_grads[name], grad, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", [0, 1])
def test_a_text_cannot_see_its_neighbours(
    guided: Records, micro: Any, model: AgeVLM, number: int
) -> None:
    batch = draw(guided, micro, pack=True)
    (group,) = batch.groups
    assert group.segments is not None
    changed = group.segments == number
    assert changed.any()
    assert (group.segments > number).any()
    ((before, looks),) = outputs(model, batch)
    group.ids[changed] = (group.ids[changed] + 7) % len(micro)
    ((after, looks_after),) = outputs(model, batch)
    flat = changed.reshape(before.shape[:2])
    np.testing.assert_array_equal(before[~flat], after[~flat])
    own = flat & (group.loss_mask.reshape(flat.shape) > 0)
    assert (before[own] != after[own]).any(axis=-1).all()
    assert looks is not None
    assert looks_after is not None
    other = ~flat[group.rows, group.cols] & (group.weight > 0)
    np.testing.assert_array_equal(looks[other], looks_after[other])
    assert not np.array_equal(looks, looks_after)


# Which models ---------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    # Layers that see the last 4 tokens only, beside ones that see all.
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
    # Layers without positions.
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_models_with_relative_positions_can_be_packed(
    kind: str, dtype: mx.Dtype, tiny_model_config: Callable[..., ModelConfig]
) -> None:
    config = tiny_model_config()
    config.text_config.update(model_type=kind, **OTHERS[kind])
    model = AgeVLM(config)
    model.set_dtype(dtype)
    assert why_not_packed(model) is None


def test_concat_cannot_be_packed(tiny_model_config: Callable[..., ModelConfig]) -> None:
    model = AgeVLM(tiny_model_config(fusion="concat", layers=None))
    assert "concat" in str(why_not_packed(model))


def test_a_model_with_positions_of_its_own_cannot_be_packed(tiny_model: AgeVLM) -> None:
    embed = tiny_model.language_model.model.embed_tokens
    places = mx.random.normal((64, 32)) * 0.1

    class Placed(type(embed)):
        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + places[: ids.shape[1]]

    embed.__class__ = Placed
    assert "positions" in str(why_not_packed(tiny_model))


def test_a_model_that_makes_its_own_mask_cannot_be_packed(tiny_model: AgeVLM) -> None:
    layer = tiny_model.language_model.model.layers[0]

    class Own(type(layer)):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return super().__call__(x, "causal", cache)

    layer.__class__ = Own
    assert "see what stands before" in str(why_not_packed(tiny_model))


def test_a_model_with_a_running_state_cannot_be_packed() -> None:
    text = {
        "model_type": "lfm2",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [0, 2],
        "max_position_embeddings": 128,
    }
    vision = {"model_type": "agevlm_vit", "image_size": 16, "patch_size": 4, "hidden_size": 24}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = ModelConfig(
        text_config=text, vision_config=vision, fusion_config=FusionConfig(layers=(0, 2))
    )
    assert "ArraysCache" in str(why_not_packed(AgeVLM(config)))


def test_packed_rows_are_read_in_one_pass(tiny_model: AgeVLM) -> None:
    seen = tiny_model.look(mx.zeros((1, tiny_model.num_image_tokens, 32)))
    cache = tiny_model.share(seen, 1, mx.zeros((1, 6), mx.int32))
    with pytest.raises(ValueError, match="expected all 6 positions of packed rows in one pass"):
        tiny_model(mx.zeros((1, 4), mx.int32), cache)
