"""Batches: which texts and images they hold, and what their phrases should look at."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data import batches as module
from agevlm_mlx.data.batches import Batch, Batches, GroupSpec
from agevlm_mlx.data.chat import Encoded, encode
from agevlm_mlx.data.coco import read_coco
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.store import prompt_key
from agevlm_mlx.sam.targets import rle_decode, rle_encode

GRID = (4, 4)
PREPROCESSOR = Preprocessor(image_size=32)
CAPTION, PRESENCE = GroupSpec(kinds=("caption",)), GroupSpec(kinds=("presence",), n=4)


def draw(records: Sequence[Record], tokenizer: Any, *groups: GroupSpec, **options: Any) -> Batches:
    settings = {"batch_size": 4, "seed": 1, **options}
    preprocessor = settings.pop("preprocessor", PREPROCESSOR)
    return Batches(records, tokenizer, preprocessor, GRID, groups=groups, **settings)


def equal(a: Batch, b: Batch) -> bool:
    names = ("ids", "labels", "loss_mask", "rows", "cols", "target", "weight")
    return (
        a.record_ids == b.record_ids
        and a.step == b.step
        and np.array_equal(a.pixels, b.pixels)
        and all(
            np.array_equal(getattr(x, name), getattr(y, name))
            for x, y in zip(a.groups, b.groups, strict=True)
            for name in names
        )
    )


@pytest.fixture(scope="session")
def masked(scenes: Path) -> list[Record]:
    """The captions of the scenes, whose phrases bring their masks."""
    return read_coco(scenes / "captions.json", scenes / "instances.json", scenes / "images")


@pytest.fixture
def one(tmp_path: Path) -> Record:
    """A record about a picture of 40 x 20 px with one phrase and a mask of its left half."""
    Image.new("RGB", (40, 20), (0, 128, 255)).save(tmp_path / "1.png")
    mask = np.zeros((20, 40), bool)
    mask[:, :20] = True
    turns = (Turn("user", "Describe the image."), Turn("assistant", "A dog."))
    phrase = Phrase("dog", 1, 2, 5, mask=rle_encode(mask))
    return Record("7-a", tmp_path / "1.png", turns, (phrase,), "caption")


def with_phrase(record: Record, **fields: Any) -> Record:
    return replace(record, phrases=(replace(record.phrases[0], **fields),))


class Shelf:
    """A store of made-up masks by image key and prompt, and of features by image key."""

    def __init__(self, masks: dict[str, np.ndarray], features: dict[str, np.ndarray] | None = None):
        self.masks, self.rows = masks, features or {}
        self.meta = SimpleNamespace(feature_channels=3 if features is not None else 0)

    def target(self, image_key: str, prompt: str) -> np.ndarray:
        return self.masks[f"{image_key} {prompt}"]

    def features(self, image_key: str) -> np.ndarray:
        return self.rows[image_key]


# Which ----------------------------------------------------------------------------------------


def test_a_batch_depends_on_the_seed_and_the_step_only(
    records: list[Record], masked: list[Record], micro: Any
) -> None:
    data = [*masked, *(record for record in records if record.kind == "presence")]
    one, other = (draw(data, micro, CAPTION, PRESENCE, flip=True) for _ in range(2))
    for step in range(9):
        one.batch(step)
    for step in (14, 3, 8):
        assert equal(one.batch(step), other.batch(step))
    assert not equal(one.batch(3), one.batch(4))
    assert not equal(one.batch(3), draw(data, micro, CAPTION, PRESENCE, seed=2).batch(3))


@pytest.mark.parametrize("batch_size", [6, 5, 60])
def test_every_epoch_shows_each_image_once(
    masked: list[Record], micro: Any, batch_size: int
) -> None:
    batches = draw(masked, micro, CAPTION, batch_size=batch_size)
    shown = [i for step in range(2 * 48 // batch_size + 2) for i in batches.batch(step).record_ids]
    first, second = shown[:48], shown[48:96]
    assert sorted(first) == sorted(second) == sorted(record.id for record in masked)
    assert first != second


def test_texts_are_drawn_from_their_kinds_without_repeats(
    records: list[Record], micro: Any
) -> None:
    kind_of = {record.id: record.kind for record in records}
    groups = (CAPTION, GroupSpec(kinds=("presence", "count"), n=6))
    batches = draw(records, micro, *groups)
    for step in range(12):
        ids = batches.batch(step).record_ids
        assert len(set(ids)) == len(ids) == 4 + 4 * 6
        assert [kind_of[i] for i in ids[:4]] == ["caption"] * 4
        assert {kind_of[i] for i in ids[4:]} <= {"presence", "count"}
        images = [i.split("-")[0] for i in ids]
        assert images[4:] == [image for image in images[:4] for _ in range(6)]
    alone = [record for record in records if record.image == records[0].image]
    batches = draw(alone, micro, groups[1], batch_size=1)
    drawn = [frozenset(batches.batch(epoch).record_ids) for epoch in range(16)]
    assert len(set(drawn)) > 12  # other texts every time
    assert len(frozenset.union(*drawn)) == 13


# What -----------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_preprocessor(masked: list[Record], micro: Any) -> None:
    batch = draw(masked, micro, CAPTION).batch(0)
    image_of = {record.id: record.image for record in masked}
    for pixels, name in zip(batch.pixels, batch.record_ids, strict=True):
        np.testing.assert_array_equal(pixels, PREPROCESSOR(load_image(image_of[name]))[0])
    assert batch.pixels.dtype == np.float32
    assert batch.sam_features is None


def test_rows_hold_the_texts_and_predict_the_next_token(records: list[Record], micro: Any) -> None:
    by_id = {record.id: record for record in records}
    batch = draw(records, micro, PRESENCE, CAPTION).batch(2)
    names = iter(batch.record_ids)
    for group, R in zip(batch.groups, (4, 1), strict=True):
        assert group.ids.shape == group.labels.shape == group.loss_mask.shape
        assert group.ids.shape[:2] == (4, R)
        assert group.ids.shape[2] % 4 == 0
        assert (group.ids.dtype, group.loss_mask.dtype) == (np.int32, np.float32)
        lengths = []
        for row in range(4 * R):
            encoded = encode(micro, by_id[next(names)].turns, ())
            n = len(encoded.ids) - 1
            lengths.append(n)
            ids, labels, loss = (
                a.reshape(4 * R, -1)[row] for a in (group.ids, group.labels, group.loss_mask)
            )
            assert tuple(ids[:n]) == encoded.ids[:-1]
            assert tuple(labels[:n]) == encoded.ids[1:]
            assert tuple(loss[:n]) == encoded.loss_mask[1:]
            assert set(ids[n:]) | set(labels[n:]) <= {micro.pad_token_id}
            assert not loss[n:].any()
        assert group.ids.shape[2] - max(lengths) < 4
    assert next(names, None) is None


def test_rows_without_a_text_have_no_loss(masked: list[Record], micro: Any) -> None:
    (group,) = draw(masked, micro, GroupSpec(kinds=("caption",), n=3)).batch(0).groups
    assert group.ids.shape[:2] == (4, 3)
    assert (group.loss_mask.sum(axis=2) > 0).tolist() == [[True, False, False]] * 4
    assert (group.ids[:, 1:] == micro.pad_token_id).all()
    assert not set(group.rows[group.weight > 0]) & {1, 2, 4, 5, 7, 8, 10, 11}


def test_a_batch_may_lack_a_kind(one: Record, micro: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    asked = replace(one, id="8-q", image=tmp_path / "2.png", kind="presence", phrases=())
    batches = draw([one, asked], micro, CAPTION, GroupSpec(kinds=("presence",)), batch_size=1)
    sums = [[float(g.loss_mask.sum()) > 0 for g in batches.batch(s).groups] for s in range(2)]
    assert sorted(sums) == [[False, True], [True, False]]
    assert all(group.ids.size for group in batches.batch(0).groups)


# Where ----------------------------------------------------------------------------------------


def test_targets_are_the_masks_at_the_tokens_that_look(masked: list[Record], micro: Any) -> None:
    by_id = {record.id: record for record in masked}
    batch = draw(masked, micro, CAPTION).batch(1)
    (group,) = batch.groups
    assert group.rows.shape == group.cols.shape == group.weight.shape
    assert group.target.shape == (len(group.rows), 16)
    assert len(group.rows) % 32 == 0
    used = int(group.weight.sum())
    assert set(group.weight) <= {0.0, 1.0}
    wanted = []
    for row, name in enumerate(batch.record_ids):
        record = by_id[name]
        spans = encode(micro, record.turns, record.phrases).spans
        for phrase, span in zip(record.phrases, spans, strict=True):
            assert phrase.mask is not None
            mask = rle_decode(phrase.mask)
            coverage = PREPROCESSOR.geometry(128, 128).mask_to_grid(mask, GRID)
            if coverage.sum() >= 0.5:
                wanted += [(row, column, coverage) for column in span]
    assert used == len(wanted) > 8
    for p, (row, column, coverage) in enumerate(wanted):
        assert (group.rows[p], group.cols[p], group.weight[p]) == (row, column, 1)
        np.testing.assert_array_equal(group.target[p], coverage)
        assert group.loss_mask.reshape(4, -1)[row, column] == 1  # predicts a word of the answer
    assert not group.target[used:].any()
    assert not group.weight[used:].any()


def test_targets_of_the_second_text_of_an_image_are_in_its_row(one: Record, micro: Any) -> None:
    other = replace(one, id="7-b", phrases=())
    batch = draw([other, one], micro, GroupSpec(kinds=("caption",), n=2), batch_size=3).batch(0)
    (group,) = batch.groups
    rows = {row for row, name in enumerate(batch.record_ids) if name == "7-a"}
    assert set(group.rows[group.weight > 0]) == rows
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("width", "height", "used"),
    [(2, 2, False), (10, 20, True), (39, 20, False), (34, 20, True)],
)
def test_masks_too_small_or_near_full_guide_nothing(
    one: Record, micro: Any, width: int, height: int, used: bool
) -> None:
    mask = np.zeros((20, 40), bool)
    mask[:height, :width] = True
    record = with_phrase(one, mask=rle_encode(mask))
    for resize in ("pad", "crop", "stretch"):
        if resize == "crop" and width == 34:
            continue  # fills what the crop leaves
        preprocessor = replace(PREPROCESSOR, resize=resize)
        (group,) = (
            draw([record], micro, CAPTION, batch_size=1, preprocessor=preprocessor).batch(0).groups
        )
        assert bool(group.weight.any()) == (used and not (resize == "crop" and width == 10))
        assert group.ids.shape[:2] == (1, 1)  # the text itself stays


def test_a_phrase_without_mask_or_store_guides_nothing(one: Record, micro: Any) -> None:
    record = with_phrase(one, mask=None, box=(1, 1, 9, 9))
    (group,) = draw([record], micro, CAPTION, batch_size=1).batch(0).groups
    assert not group.weight.any()


def test_flip_mirrors_pixels_and_targets_together(masked: list[Record], micro: Any) -> None:
    plain = draw(masked, micro, CAPTION, batch_size=8)
    flipped = draw(masked, micro, CAPTION, batch_size=8, flip=True)
    turned = []
    for step in range(3):
        a, b = plain.batch(step), flipped.batch(step)
        assert a.record_ids == b.record_ids
        (x,), (y,) = a.groups, b.groups
        np.testing.assert_array_equal(x.ids, y.ids)
        np.testing.assert_array_equal(x.rows, y.rows)
        for slot in range(8):
            mirrored = not np.array_equal(a.pixels[slot], b.pixels[slot])
            turned.append(mirrored)
            step_by = -1 if mirrored else 1
            np.testing.assert_array_equal(a.pixels[slot][:, ::step_by], b.pixels[slot])
            own = (x.rows == slot) & (x.weight > 0)
            np.testing.assert_array_equal(
                x.target[own].reshape(-1, *GRID)[..., ::step_by], y.target[own].reshape(-1, *GRID)
            )
    assert 4 < sum(turned) < 20


# The store ------------------------------------------------------------------------------------


def test_targets_come_from_the_store_by_box_or_point(one: Record, micro: Any) -> None:
    coverage = np.linspace(0, 0.5, 16, dtype=np.float32)
    for fields in ({"box": (1, 2, 9, 8)}, {"point": (3.5, 4.0)}):
        record = with_phrase(one, **fields)  # the store goes before the record's own mask
        (where,) = fields.values()
        store = Shelf({f"1.png {prompt_key(where)}": coverage})
        (group,) = draw([record], micro, CAPTION, batch_size=1, store=store).batch(0).groups
        assert group.weight.sum() == 2
        np.testing.assert_array_equal(group.target[:2], np.stack([coverage, coverage]))


def test_image_keys_start_at_the_data_folder(records: list[Record], micro: Any) -> None:
    record = next(r for r in records if r.kind == "presence" and r.phrases)
    assert record.phrases[0].box is not None
    prompt = prompt_key(record.phrases[0].box)
    key = f"images/{record.image.name}"
    store = Shelf({f"{key} {prompt}": np.full(16, 0.5, np.float32)})
    for root in (None, record.image.parent.parent):
        group = GroupSpec(kinds=("presence",))
        batch = draw([record], micro, group, batch_size=1, store=store, root=root).batch(0)
        assert batch.groups[0].target.max() == 0.5


def test_a_phrase_that_the_store_lacks_is_named(one: Record, micro: Any) -> None:
    record = with_phrase(one, box=(1, 2, 9, 8))
    batches = draw([record], micro, CAPTION, batch_size=1, store=Shelf({}))
    with pytest.raises(UserError, match=r"record 7-a: .*'dog' in 1\.png; run `agevlm teach`"):
        batches.batch(0)


def test_features_come_along_and_are_mirrored_too(masked: list[Record], micro: Any) -> None:
    rng = np.random.default_rng(0)
    keys = [f"images/{record.image.name}" for record in masked]
    features = {key: rng.random((16, 3)).astype(np.float32) for key in keys}
    bare = [replace(record, phrases=()) for record in masked]
    image_of = {record.id: f"images/{record.image.name}" for record in masked}
    plain = draw(bare, micro, CAPTION, batch_size=16)
    batch = draw(bare, micro, CAPTION, batch_size=16, store=Shelf({}, features), flip=True).batch(0)
    assert batch.sam_features is not None
    assert batch.sam_features.shape == (16, 16, 3)
    for slot, name in enumerate(batch.record_ids):
        mirrored = not np.array_equal(plain.batch(0).pixels[slot], batch.pixels[slot])
        rows = features[image_of[name]].reshape(*GRID, 3)[:, :: -1 if mirrored else 1]
        np.testing.assert_array_equal(batch.sam_features[slot], rows.reshape(16, 3))


def test_an_image_without_features_is_named(one: Record, micro: Any) -> None:
    record = replace(one, phrases=())
    batches = draw([record], micro, CAPTION, batch_size=1, store=Shelf({}, {}))
    with pytest.raises(UserError, match=r"no features for 1\.png; run `agevlm teach`"):
        batches.batch(0)


# What is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"box": (1, 1, 41, 9)},
            r"record 7-a: the box \[1, 1, 41, 9\] of 'dog' is outside .*40x20",
        ),
        ({"box": (1, 1, 9, 20.5)}, "is outside"),
        ({"point": (3, 21)}, r"the point \[3, 21\] of 'dog' is outside .*40x20"),
        ({"mask": rle_encode(np.ones((40, 20), bool))}, r"record 7-a: .* is 20x40, .* is 40x20"),
        ({"mask": {"size": [20, 40], "counts": [7]}}, "record 7-a: 'dog': mask counts"),
        ({"mask": 3}, "record 7-a: 'dog': mask: expected a COCO RLE"),
    ],
)
def test_a_phrase_that_does_not_fit_its_image_is_named(
    one: Record, micro: Any, fields: dict[str, Any], message: str
) -> None:
    batches = draw([with_phrase(one, **fields)], micro, CAPTION, batch_size=1)
    with pytest.raises(UserError, match=message) as caught:
        batches.batch(0)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_named_when_its_turn_comes(one: Record, micro: Any) -> None:
    one.image.write_bytes(one.image.read_bytes()[:60])
    with pytest.raises(UserError, match=r"1\.png: (damaged|not an image)"):
        draw([one], micro, CAPTION, batch_size=1).batch(0)


def test_kinds_that_the_data_lacks_are_listed(records: list[Record], micro: Any) -> None:
    with pytest.raises(UserError, match="no texts of kind ocr or chat; it has attribute, caption"):
        draw(records, micro, CAPTION, GroupSpec(kinds=("ocr", "chat")))
    with pytest.raises(UserError, match="it has none"):
        draw([], micro, CAPTION)
    with pytest.raises(UserError, match="expected kinds and n >= 1"):
        GroupSpec(kinds=("caption",), n=0)
    with pytest.raises(UserError, match="expected kinds and n >= 1"):
        GroupSpec(kinds=())


# Memory ---------------------------------------------------------------------------------------


def test_pixels_are_kept_up_to_a_budget(
    masked: list[Record], micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    monkeypatch.setattr(
        module, "load_image", lambda path: (loads.append(path), load_image(path))[1]
    )
    few = masked[:8]
    kept = draw(few, micro, CAPTION)
    wanted = [kept.batch(step) for step in range(6)]
    assert len(loads) == 8  # three epochs, each image decoded once
    monkeypatch.setattr(module, "_PIXEL_BYTES", 2 * 32 * 32 * 3)
    tight = draw(few, micro, CAPTION)
    assert all(equal(tight.batch(batch.step), batch) for batch in wanted)
    assert len(loads) > 20
    assert len(tight._pixels) == 2


def test_the_last_token_guides_nothing(
    one: Record, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with a chat template that puts nothing behind an answer.
    cut = Encoded((1, 2, 3, 4, 5), (0, 0, 0, 1, 1), ((3, 4),))
    monkeypatch.setattr(module, "encode", lambda *_: cut)
    (group,) = draw([one], micro, CAPTION, batch_size=1).batch(0).groups
    assert group.ids.shape == (1, 1, 4)
    assert group.cols[group.weight > 0].tolist() == [3]
