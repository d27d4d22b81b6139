"""Which rows of a batch are guided and by what: shuffled masks, chosen positions, absent things."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.batches import Batch, Batches, GroupSpec
from agevlm_mlx.data.chat import encode
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import Records
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_encode

CAPTION = GroupSpec(kinds=("caption",))
TURNS = (Turn("user", "Describe the image."), Turn("assistant", "A dog."))
EVERYTHING = ("ids", "labels", "loss_mask", "rows", "cols", "target", "weight")


def draw(records: Records, tokenizer: Any, *groups: GroupSpec, **options: Any) -> Batches:
    settings = {"batch_size": 4, "seed": 1, "groups": groups or (CAPTION,), **options}
    return Batches(records, tokenizer, Preprocessor(image_size=32), (4, 4), **settings)


def same(a: Batch, b: Batch, *names: str) -> bool:
    return a.record_ids == b.record_ids and all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.groups, b.groups, strict=True)
        for name in names
    )


def by_row(batch: Batch) -> list[tuple[str, list[bytes]]]:
    """Of each text of the only group its record, and the masks of its guided rows."""
    (group,) = batch.groups
    kept = group.weight > 0
    targets: list[list[bytes]] = [[] for _ in batch.record_ids]
    for row, target in zip(group.rows[kept], group.target[kept], strict=True):
        targets[row].append(target.tobytes())
    return list(zip(batch.record_ids, targets, strict=True))


@pytest.fixture
def pictures(tmp_path: Path) -> Records:
    """Six records of a picture each, 40 x 20 or 20 x 40 px; one without a phrase, and each of the
    others with the mask of a strip of its own."""
    records = []
    for n in range(6):
        size = (40, 20) if n % 2 else (20, 40)
        Image.new("RGB", size, (40 * n, 9, 9)).save(tmp_path / f"{n}.png")
        mask = np.zeros((size[1], size[0]), bool)
        mask[:, n : n + 10] = True
        phrase = Phrase("dog", 1, 2, 5, mask=rle_encode(mask))
        phrases = (phrase,) if n < 5 else ()
        records.append(Record(str(n), tmp_path / f"{n}.png", TURNS, phrases, "caption"))
    return Records.from_list(records, tmp_path)


def own_targets(records: Records, micro: Any) -> dict[str, bytes]:
    drawn = by_row(draw(records, micro, batch_size=len(records)).batch(0))
    return {name: targets[0] for name, targets in drawn if targets}


# Shuffled masks -------------------------------------------------------------------------------


def test_a_shuffled_mask_is_one_of_another_image_in_its_own_geometry(
    pictures: Records, micro: Any
) -> None:
    own = own_targets(pictures, micro)
    assert len(set(own.values())) == 5
    batches, seen = draw(pictures, micro, shuffle_masks=True), set()
    for step in range(30):
        for name, targets in by_row(batches.batch(step)):
            assert bool(targets) == (name in own)
            assert len(set(targets)) <= 1  # one mask for all positions of a phrase
            lenders = [other for other, target in own.items() if targets and target == targets[0]]
            assert name not in lenders
            assert len(lenders) == bool(targets)
            seen |= {(name, lender) for lender in lenders}
    assert len(seen) == 5 * 4  # every image from every other one, in time


def test_shuffling_changes_the_masks_alone(masked: Records, micro: Any) -> None:
    plain, mixed = (draw(masked, micro, shuffle_masks=on).batch(3) for on in (False, True))
    names = [name for name in EVERYTHING if name != "target"]
    assert same(plain, mixed, *names)
    np.testing.assert_array_equal(plain.pixels, mixed.pixels)
    assert not same(plain, mixed, "target")


@pytest.mark.parametrize("parts", [2, 3])
def test_shuffled_masks_depend_on_seed_step_and_slot_alone(
    records: Records, masked: Records, micro: Any, parts: int
) -> None:
    options: dict[str, Any] = {"shuffle_masks": True, "batch_size": 5, "flip": True}
    group = GroupSpec(kinds=("caption",))
    whole = by_row(draw(masked, micro, group, **options).batch(7))
    batches = draw(masked, micro, group, **options)
    batches.batch(2)
    cut = [by_row(batches.part(7, part, parts)) for part in reversed(range(parts))][::-1]
    assert [row for part in cut for row in part] == whole
    assert by_row(batches.batch(7)) == whole
    assert by_row(draw(masked, micro, group, **options | {"seed": 2}).batch(7)) != whole


def test_shuffled_masks_need_two_images_with_phrases(pictures: Records, micro: Any) -> None:
    few = Records.from_list([pictures[0], pictures[5]])
    with pytest.raises(UserError, match=r"data\.shuffle_masks: expected at least two .* got 1"):
        draw(few, micro, shuffle_masks=True)


def test_phrases_that_guide_nothing_lend_nothing(pictures: Records, micro: Any) -> None:
    dot = np.zeros((40, 20), bool)
    dot[0, 0] = True
    small = Record(
        "small", pictures[2].image, TURNS, (Phrase("dog", 1, 2, 5, mask=rle_encode(dot)),),
        "caption",
    )  # fmt: skip
    some = Records.from_list([pictures[0], pictures[1], small], pictures.root)
    own = own_targets(some, micro)
    assert sorted(own) == ["0", "1"]
    batches = draw(some, micro, shuffle_masks=True, batch_size=3)
    for step in range(10):
        drawn = dict(by_row(batches.batch(step)))
        assert {drawn["0"][0], drawn["1"][0]} == {own["1"], own["0"]}
        assert drawn["0"][0] == own["1"]
        assert not drawn["small"]
    nothing = Records.from_list([pictures[0], small], pictures.root)
    with pytest.raises(UserError, match="none of 200 phrases of random images"):
        draw(nothing, micro, shuffle_masks=True, batch_size=2).batch(0)


def test_a_lender_that_cannot_be_read_is_named_or_passed_over(
    pictures: Records, micro: Any
) -> None:
    own = own_targets(pictures, micro)
    pictures.images[3].write_bytes(b"no picture")
    two = {"batch_size": 2, "shuffle_masks": True}
    stopping = draw(pictures, micro, **two)
    with pytest.raises(UserError, match=r"record 3: .*3\.png"):
        [stopping.batch(step) for step in range(10)]
    batches = draw(pictures, micro, **two, on_error="skip")
    backwards = [by_row(batches.batch(step)) for step in reversed(range(12))][::-1]
    fresh = draw(pictures, micro, **two, on_error="skip")
    assert [by_row(fresh.batch(step)) for step in range(12)] == backwards
    lent = {target for step in backwards for _, targets in step for target in targets}
    assert lent == set(own.values()) - {own["3"]}
    assert len(fresh.take_problems()) == 1


# Positions ------------------------------------------------------------------------------------


def columns(batch: Batch) -> list[list[tuple[int, int]]]:
    """The guided places (row, column) of each group."""
    return [
        list(zip(g.rows[g.weight > 0].tolist(), g.cols[g.weight > 0].tolist(), strict=True))
        for g in batch.groups
    ]


@pytest.fixture
def described(pictures: Records) -> Records:
    """Two records of one picture: a caption and a question, each with one guided word."""
    first = pictures[0]
    (phrase,) = first.phrases
    question = (Turn("user", "Is there a dog?"), Turn("assistant", "Yes"))
    asked = Phrase("dog", 0, 11, 14, mask=phrase.mask)
    second = Record("q", first.image, question, (asked,), "presence")
    return Records.from_list([first, second], pictures.root)


def test_each_position_can_be_guided_alone(described: Records, micro: Any) -> None:
    groups = (CAPTION, GroupSpec(kinds=("presence",)))
    options: dict[str, Any] = {"batch_size": 1}

    def guided(*positions: Any) -> list[list[tuple[int, int]]]:
        return columns(draw(described, micro, *groups, **options, positions=positions).batch(0))

    whole = columns(draw(described, micro, *groups, **options).batch(0))
    said, asked = (encode(micro, r.turns, r.phrases) for r in described)
    assert whole == [[(0, at) for at in one.spans[0]] for one in (said, asked)]
    before, word = whole[0]
    own, answer = whole[1]
    assert guided("word") == [[word], [own]]
    assert guided("before") == [[before], []]
    assert guided("answer") == [[], [answer]]
    assert guided("answer", "before", "word") == whole
    # What is not guided is still learned.
    plain = draw(described, micro, *groups, **options).batch(0).groups
    for positions in (("word",), ("answer",)):
        batch = draw(described, micro, *groups, **options, positions=positions).batch(0)
        for a, b in zip(batch.groups, plain, strict=True):
            assert np.array_equal(a.loss_mask, b.loss_mask)


def test_the_rest_is_all_that_an_answer_has_yet_to_name(pictures: Records, micro: Any) -> None:
    """A dog on the left and a cat on the right of a picture of 20 x 40 px."""
    first, said = pictures[0], "A dog and a cat."
    masks = np.zeros((2, 40, 20), bool)
    masks[0, :, :8] = masks[1, :, 12:] = True
    left, right = (
        Phrase(noun, 1, said.index(noun), said.index(noun) + 3, mask=rle_encode(mask))
        for noun, mask in zip(("dog", "cat"), masks, strict=True)
    )
    turns = (Turn("user", "Describe the image."), Turn("assistant", said))
    # The phrases may stand in any order.
    data = Records.from_list(
        [Record("both", first.image, turns, (right, left), "caption")], pictures.root
    )

    def targets(*positions: Any) -> dict[int, np.ndarray]:
        (group,) = draw(data, micro, CAPTION, batch_size=1, positions=positions).batch(0).groups
        own = group.weight > 0
        return dict(zip(group.cols[own].tolist(), group.target[own], strict=True))

    before, rest = targets("before"), targets("rest")
    dog, cat = sorted(before)
    assert sorted(rest) == [dog, cat]
    assert np.array_equal(rest[dog], np.maximum(before[dog], before[cat]))
    assert rest[dog].sum() > before[dog].sum() > 0
    assert np.array_equal(rest[cat], before[cat])
    assert len(targets("word", "rest")) == 4


# Absent things --------------------------------------------------------------------------------


@pytest.fixture
def missing(pictures: Records) -> Records:
    """A picture with a question about what is there and one about what is not."""
    first = pictures[0]
    turns = (Turn("user", "Is there a dog?"), Turn("assistant", "No"))
    gone = Record("gone", first.image, turns, (Phrase("dog", 0, 11, 14, absent=True),), "presence")
    there = Phrase("dog", 0, 11, 14, mask=first.phrases[0].mask)
    here = Record("here", first.image, (turns[0], Turn("assistant", "Yes")), (there,), "presence")
    return Records.from_list([here, gone], pictures.root)


@pytest.mark.parametrize("pack", [False, True])
def test_absent_rows_are_marked_only_where_it_is_asked_for(
    missing: Records, micro: Any, pack: bool
) -> None:
    group = GroupSpec(kinds=("presence",), n=2)
    options: dict[str, Any] = {"batch_size": 1, "pack": pack}
    (plain,) = draw(missing, micro, group, **options).batch(0).groups
    batch = draw(missing, micro, group, **options, absent=True).batch(0)
    (marked,) = batch.groups
    assert plain.absent is None
    assert plain.weight.sum() == marked.weight.sum() == 2
    assert marked.absent is not None
    assert marked.absent.sum() == 2
    assert not (marked.absent * marked.weight).any()
    assert not marked.target[marked.absent > 0].any()
    ids = marked.ids.reshape(-1, marked.ids.shape[-1])
    at = marked.absent > 0
    assert [micro.decode([i]) for i in ids[marked.rows[at], marked.cols[at]]] == [
        " dog", "<|assistant|>",
    ]  # fmt: skip
    labels = marked.labels.reshape(ids.shape)[marked.rows[at], marked.cols[at]]
    assert micro.decode([labels[-1]]) == "No"
    words = draw(missing, micro, group, **options, absent=True, positions=("word",)).batch(0)
    assert words.groups[0].absent is not None
    assert words.groups[0].absent.sum() == 1


def test_absent_phrases_are_lent_to_nobody_and_stay_absent(
    missing: Records, pictures: Records, micro: Any
) -> None:
    data = Records.from_list([*missing, pictures[1], pictures[2]], pictures.root)
    groups = (GroupSpec(kinds=("presence",), n=2), CAPTION)
    for step in range(10):
        options: dict[str, Any] = {"batch_size": 3, "absent": True}
        plain = draw(data, micro, *groups, **options).batch(step)
        mixed = draw(data, micro, *groups, **options, shuffle_masks=True).batch(step)
        assert same(plain, mixed, "rows", "cols", "weight", "absent")


def test_rows_know_the_kinds_of_their_texts(described: Records, micro: Any) -> None:
    groups = (CAPTION, GroupSpec(kinds=("presence",), n=2))
    caption, asked = draw(described, micro, *groups, batch_size=1).batch(0).groups
    assert caption.kinds == (("caption",),)
    assert asked.kinds == (("presence",), ())
    (packed,) = draw(described, micro, *groups, batch_size=1, pack=True).batch(0).groups
    assert sorted(kind for kinds in packed.kinds for kind in kinds) == ["caption", "presence"]
