"""Hidden words, and the ends of answers that name things."""

import numpy as np
import pytest

from agevlm_mlx.data.batches import Batches, GroupSpec
from agevlm_mlx.data.chat import END, PAD, POSITIONS, Position, build_tokenizer
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.scenes import write_scenes

PREPROCESSOR = Preprocessor.from_dict({"image_size": 64, "resize": "pad"})


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("scenes") / "s"
    write_scenes(folder, 12, 3, "train", masks=True)
    return read_records(folder)


@pytest.fixture(scope="module")
def tokenizer(records: Records):
    return build_tokenizer(turn.text for record in records for turn in record.turns)


def drawn(records: Records, tokenizer, kinds: tuple[str, ...] = ("caption",), **options) -> Batches:
    spec = GroupSpec(kinds=kinds, n=1)
    return Batches(
        records, tokenizer, PREPROCESSOR, (8, 8), batch_size=8, groups=[spec], seed=1, **options
    )


def test_about_the_share_of_the_answers_tokens_is_hidden_and_nothing_else(
    records: Records, tokenizer
) -> None:
    pad = tokenizer.convert_tokens_to_ids(PAD)
    hidden = shown = 0
    for step in range(6):
        plain = drawn(records, tokenizer).batch(step).groups[0]
        some = drawn(records, tokenizer, word_dropout=0.4).batch(step).groups[0]
        assert np.array_equal(plain.labels, some.labels)
        assert np.array_equal(plain.loss_mask, some.loss_mask)
        changed = plain.ids != some.ids
        assert (some.ids[changed] == pad).all()
        # An answer's token is one that was to be predicted at the column before.
        answers = np.zeros_like(changed)
        answers[..., 1:] = plain.loss_mask[..., :-1] > 0
        assert not changed[~answers].any()
        hidden, shown = hidden + changed.sum(), shown + (answers & ~changed).sum()
        # What is hidden guides nothing, the rest is guided as before.
        places = {
            (int(r), int(c)) for r, c, w in zip(plain.rows, plain.cols, plain.weight, strict=True)
            if w
        }  # fmt: skip
        rows = changed.reshape(-1, changed.shape[-1])
        left = {
            (int(r), int(c)) for r, c, w in zip(some.rows, some.cols, some.weight, strict=True) if w
        }
        assert left == {(r, c) for r, c in places if not rows[r, c]}
    assert 0.3 < hidden / (hidden + shown) < 0.5


def test_what_is_hidden_depends_on_the_step_and_its_slot_alone(records: Records, tokenizer) -> None:
    batches = drawn(records, tokenizer, word_dropout=0.4)
    whole, again = batches.batch(3).groups[0], batches.batch(3).groups[0]
    assert np.array_equal(whole.ids, again.ids)
    parts = [batches.part(3, part, 2).groups[0].ids for part in range(2)]
    T = min(part.shape[-1] for part in parts)
    assert np.array_equal(np.concatenate([p[..., :T] for p in parts]), whole.ids[..., :T])
    assert not np.array_equal(whole.ids, batches.batch(4).groups[0].ids)


@pytest.mark.parametrize("kinds", [("caption",), ("presence",)])
def test_the_end_of_an_answer_that_names_things_looks_at_nothing(
    records: Records, tokenizer, kinds: tuple[str, ...]
) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    positions: tuple[Position, ...] = (*POSITIONS, "end")
    group = drawn(records, tokenizer, kinds, positions=positions, absent=True).batch(0).groups[0]
    plain = drawn(records, tokenizer, kinds, absent=True).batch(0).groups[0]
    assert plain.absent is None
    if kinds == ("presence",):  # Yes and No name nothing
        assert group.absent is None
        return
    assert group.absent is not None
    labels = group.labels.reshape(-1, group.labels.shape[-1])
    kept = group.absent > 0
    marked = list(zip(group.rows[kept].tolist(), group.cols[kept].tolist(), strict=True))
    assert len(marked) == 8 == len({row for row, _ in marked})
    assert all(labels[row, column] == end for row, column in marked)
    assert float(group.weight.sum()) == float(plain.weight.sum())
