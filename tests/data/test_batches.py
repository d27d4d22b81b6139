"""Batches: which texts and images they hold, and what their phrases should look at."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data import batches as module
from agevlm_mlx.data.batches import Batch, Batches, GroupSpec
from agevlm_mlx.data.bounded import Bounded
from agevlm_mlx.data.chat import Encoded, encode
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.data.image_check import check_images
from agevlm_mlx.data.order import Order
from agevlm_mlx.data.record_set import Records
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.store import prompt_key
from agevlm_mlx.sam.targets import rle_decode, rle_encode

GRID = (4, 4)
PREPROCESSOR = Preprocessor(image_size=32)
CAPTION, PRESENCE = GroupSpec(kinds=("caption",)), GroupSpec(kinds=("presence",), n=4)


def draw(records: Sequence[Record], tokenizer: Any, *groups: GroupSpec, **options: Any) -> Batches:
    settings = {"batch_size": 4, "seed": 1, **options}
    preprocessor, root = settings.pop("preprocessor", PREPROCESSOR), settings.pop("root", None)
    if not isinstance(records, Records):
        records = Records.from_list(records, root)
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
    records: Records, masked: Records, micro: Any
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
def test_every_epoch_shows_each_image_once(masked: Records, micro: Any, batch_size: int) -> None:
    batches = draw(masked, micro, CAPTION, batch_size=batch_size)
    shown = [i for step in range(2 * 48 // batch_size + 2) for i in batches.batch(step).record_ids]
    first, second = shown[:48], shown[48:96]
    assert sorted(first) == sorted(second) == sorted(record.id for record in masked)
    assert first != second


def test_texts_are_drawn_from_their_kinds_without_repeats(records: Records, micro: Any) -> None:
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


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("pack", [False, True])
def test_the_parts_of_a_batch_are_the_whole(
    records: Records, micro: Any, parts: int, pack: bool
) -> None:
    options: dict[str, Any] = {"batch_size": 5, "flip": True, "pack": pack, "bucket": 3}
    whole = draw(records, micro, PRESENCE, CAPTION, **options).batch(7)
    batches = draw(records, micro, PRESENCE, CAPTION, **options)
    cut = [batches.part(7, part, parts) for part in reversed(range(parts))][::-1]
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in cut]), whole.pixels)
    assert sorted(i for b in cut for i in b.record_ids) == sorted(whole.record_ids)
    assert texts(whole) == [text for b in cut for text in texts(b)]


def texts(batch: Batch) -> list[list[tuple[bytes, bytes]]]:
    """The ids and loss masks of each image's texts, sorted."""
    found: list[list[tuple[bytes, bytes]]] = [[] for _ in batch.pixels]
    for group in batch.groups:
        for image, row in np.ndindex(group.ids.shape[:2]):
            ids, loss = group.ids[image, row], group.loss_mask[image, row]
            if group.segments is None:
                segments = np.where(
                    np.arange(len(ids)) <= np.flatnonzero(loss).max(initial=-1), 0, -1
                )
            else:
                segments = group.segments[image, row]
            for number in set(segments) - {-1}:
                here = segments == number
                found[image].append((ids[here].tobytes(), loss[here].tobytes()))
    return [sorted(own) for own in found]


def test_a_part_without_an_image_is_refused(masked: Records, micro: Any) -> None:
    batches = draw(masked, micro, CAPTION)
    assert [len(batches.part(0, part, 6).pixels) for part in (1, 2, 4, 5)] == [1] * 4
    with pytest.raises(UserError, match=r"batch_size: expected an image for each of 6 .* got 4"):
        batches.part(0, 0, 6)


@pytest.mark.parametrize("pack", [False, True])
def test_threads_make_the_same_batches(records: Records, micro: Any, pack: bool) -> None:
    groups = (CAPTION, GroupSpec(kinds=("presence", "count"), n=6))
    wanted = [draw(records, micro, *groups, pack=pack).batch(step) for step in range(12)]
    shared = draw(records, micro, *groups, pack=pack)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(shared.batch, [*range(12), *range(12)]))
    assert all(equal(a, b) for a, b in zip(made, [*wanted, *wanted], strict=True))


# Buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch_size", "bucket"), [(50, 4, 3), (7, 4, 2), (3, 8, 1), (64, 8, 99)]
)
def test_buckets_show_each_image_once_an_epoch(n: int, batch_size: int, bucket: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, n).astype(float)
    order = Order(lengths, batch_size, 3, bucket)
    shown = [order.image(place) for place in range(5 * n)]
    epochs = [shown[e * n : (e + 1) * n] for e in range(5)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    again = Order(lengths, batch_size, 3, bucket)
    assert [again.image(place) for place in reversed(range(5 * n))] == shown[::-1]


def test_images_of_a_bucketed_batch_have_texts_of_like_length() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(240.0))
    order = Order(lengths, 8, 3, bucket=10)
    batches = [[lengths[order.image(step * 8 + slot)] for slot in range(8)] for step in range(30)]
    spans = [max(batch) - min(batch) for batch in batches]
    assert np.mean(spans) < 30  # 187 where the order is random
    means = np.array([np.mean(batch) for batch in batches])
    assert (np.diff(means) < 0).sum() > 8  # but not one after another by length


def test_the_last_images_of_an_epoch_begin_a_batch_that_the_next_one_ends() -> None:
    lengths = np.arange(11.0)
    order = Order(lengths, 4, 0, bucket=2)
    plain = Order(lengths, 4, 0)
    # Batches 0 and 1 are whole, batch 2 lies in both epochs, where nothing is sorted.
    places = [*range(8, 11), 11]
    assert [order.image(p) for p in places] == [plain.image(p) for p in places]
    for first in (12, 16):
        images = [order.image(p) for p in range(first, first + 4)]
        assert images == sorted(images)


def test_buckets_go_by_the_texts_that_are_drawn(one: Record, micro: Any, tmp_path: Path) -> None:
    short, long = (Turn("assistant", text) for text in ("No.", "Yes, the dog. " * 9))
    data = []
    for number in range(12):
        image = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8)).save(image)
        # What is long as a caption is short as a question, and the other way about.
        for kind, answer in zip(
            ("caption", "presence"), (short, long)[:: (-1) ** number], strict=True
        ):
            data.append(
                replace(
                    one,
                    id=f"{number}-{kind}",
                    image=image,
                    phrases=(),
                    kind=kind,
                    turns=(one.turns[0], answer),
                )
            )
    for kind in ("caption", "presence"):
        batches = draw(data, micro, GroupSpec(kinds=(kind,)), bucket=3)
        columns = [batches.batch(step).groups[0].ids.shape[2] for step in range(3)]
        assert len(set(columns)) > 1
        numbers = [
            [int(i.split("-")[0]) % 2 for i in batches.batch(s).record_ids] for s in range(3)
        ]
        assert sorted(sum(row) for row in numbers) == [0, 2, 4]


# What -----------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_preprocessor(masked: Records, micro: Any) -> None:
    batch = draw(masked, micro, CAPTION).batch(0)
    image_of = {record.id: record.image for record in masked}
    for pixels, name in zip(batch.pixels, batch.record_ids, strict=True):
        np.testing.assert_array_equal(pixels, PREPROCESSOR(load_image(image_of[name]))[0])
    assert batch.pixels.dtype == np.float32
    assert batch.sam_features is None


def test_rows_hold_the_texts_and_predict_the_next_token(records: Records, micro: Any) -> None:
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


def test_rows_without_a_text_have_no_loss(masked: Records, micro: Any) -> None:
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


def test_targets_are_the_masks_at_the_tokens_that_look(masked: Records, micro: Any) -> None:
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


def test_flip_mirrors_pixels_and_targets_together(masked: Records, micro: Any) -> None:
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
        record = with_phrase(one, mask=None, **fields)
        (where,) = fields.values()
        store = Shelf({f"1.png {prompt_key(where)}": coverage})
        (group,) = draw([record], micro, CAPTION, batch_size=1, store=store).batch(0).groups
        assert group.weight.sum() == 2
        np.testing.assert_array_equal(group.target[:2], np.stack([coverage, coverage]))


def test_a_phrases_own_mask_goes_before_the_one_of_its_box_in_the_store(
    one: Record, micro: Any
) -> None:
    box = (1, 2, 9, 8)  # which two phrases may have, each with its own mask
    store = Shelf({f"1.png {prompt_key(box)}": np.linspace(0, 0.5, 16, dtype=np.float32)})
    record = with_phrase(one, box=box)
    assert record.phrases[0].mask is not None
    (group,) = draw([record], micro, CAPTION, batch_size=1, store=store).batch(0).groups
    (own,) = draw([record], micro, CAPTION, batch_size=1).batch(0).groups
    assert group.weight.sum() == 2
    np.testing.assert_array_equal(group.target, own.target)


def test_image_keys_start_at_the_data_folder(records: Records, micro: Any) -> None:
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
    record = with_phrase(one, box=(1, 2, 9, 8), mask=None)
    batches = draw([record], micro, CAPTION, batch_size=1, store=Shelf({}))
    with pytest.raises(UserError, match=r"record 7-a: .*'dog' in 1\.png; run `agevlm teach`"):
        batches.batch(0)


def test_features_come_along_and_are_mirrored_too(masked: Records, micro: Any) -> None:
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


def test_kinds_that_the_data_lacks_are_listed(records: Records, micro: Any) -> None:
    with pytest.raises(UserError, match="no texts of kind ocr or chat; it has attribute, caption"):
        draw(records, micro, CAPTION, GroupSpec(kinds=("ocr", "chat")))
    with pytest.raises(UserError, match="it has none"):
        draw([], micro, CAPTION)
    with pytest.raises(UserError, match="expected kinds and n >= 1"):
        GroupSpec(kinds=("caption",), n=0)
    with pytest.raises(UserError, match="expected kinds and n >= 1"):
        GroupSpec(kinds=())


# What is left out -----------------------------------------------------------------------------


@pytest.fixture
def several(one: Record, tmp_path: Path) -> list[Record]:
    """Ten records about ten pictures, of which 3 and 4 are damaged and 6 has a box outside."""
    data = []
    for number in range(10):
        image = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 20), (0, 20 * number, 255)).save(image)
        data.append(replace(one, id=f"r{number}", image=image))
    for number in (3, 4):
        data[number].image.write_bytes(data[number].image.read_bytes()[:60])
    data[6] = with_phrase(data[6], box=(1, 1, 41, 9))
    return data


@pytest.mark.parametrize("bucket", [0, 2])
def test_the_next_image_takes_the_place_of_one_that_cannot_be_used(
    several: list[Record], micro: Any, bucket: int
) -> None:
    batches = draw(several, micro, CAPTION, on_error="skip", flip=True, bucket=bucket)
    made = [batches.batch(step) for step in range(5)]
    order = Order(batches._order._lengths, 4, 1, bucket)
    shown = [name for batch in made for name in batch.record_ids]
    wanted = []
    for place in range(20):
        drawn = [order.image(place, later) for later in range(10)]
        wanted.append(next(f"r{image}" for image in drawn if image not in (3, 4, 6)))
    assert shown == wanted
    problems = batches.take_problems()
    assert sorted(p.record or "" for p in problems) == ["r3", "r4", "r6"]
    assert all(p.where == str(several[int((p.record or "")[1:])].image) for p in problems)
    damaged, outside = problems[0], next(p for p in problems if p.record == "r6")
    assert "box [1, 1, 41, 9] of 'dog' is outside" in outside.problem
    assert not damaged.problem.startswith(damaged.where)
    assert batches.take_problems() == []
    # The same in another order and in parts.
    again = draw(several, micro, CAPTION, on_error="skip", flip=True, bucket=bucket)
    for batch in reversed(made):
        assert equal(again.batch(batch.step), batch)
    halves = [again.part(2, part, 2) for part in range(2)]
    assert [name for half in halves for name in half.record_ids] == made[2].record_ids
    assert len(again.take_problems()) == 3


def test_a_damaged_image_is_read_once(
    several: list[Record], micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(
        module, "image_bytes", lambda path: (reads.append(path.name), path.read_bytes())[1]
    )
    batches = draw(several, micro, CAPTION, on_error="skip")
    for step in range(10):
        batches.batch(step)
    assert sorted(reads) == [f"{number}.png" for number in range(10)]


def test_another_text_takes_the_place_of_a_bad_one(one: Record, micro: Any) -> None:
    bad = replace(with_phrase(one, box=(1, 1, 9, 20.5)), id="bad")
    data = [bad, one, replace(one, id="7-c")]
    batches = draw(data, micro, GroupSpec(kinds=("caption",), n=2), batch_size=1, on_error="skip")
    drawn = [batches.batch(step).record_ids for step in range(12)]
    assert {frozenset(ids) for ids in drawn} == {frozenset({"7-a", "7-c"})}
    assert [p.record for p in batches.take_problems()] == ["bad"]


def test_data_of_which_nothing_can_be_used_ends_the_run(
    several: list[Record], micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = draw(several[3:5], micro, CAPTION, on_error="skip")
    with pytest.raises(UserError, match=r"none of 2 images in a row .*[34]\.png: (damaged|not an)"):
        batches.batch(0)
    monkeypatch.setattr(module, "_MOST_SKIPPED", 1)
    batches = draw(several, micro, CAPTION, on_error="skip")
    with pytest.raises(UserError, match="none of 1 images in a row"):
        [batches.batch(step) for step in range(3)]


def test_a_damaged_image_without_a_store_entry_is_left_out(
    one: Record, micro: Any, tmp_path: Path
) -> None:
    other = replace(one, id="8", image=tmp_path / "2.png", phrases=())
    Image.new("RGB", (8, 8)).save(other.image)
    store = Shelf({}, {"2.png": np.ones((16, 3), np.float32)})
    batches = draw(
        [replace(one, phrases=()), other],
        micro,
        CAPTION,
        batch_size=2,
        store=store,
        on_error="skip",
        root=tmp_path,
    )
    assert batches.batch(0).record_ids == ["8", "8"]
    (problem,) = batches.take_problems()
    assert "no features for 1.png" in problem.problem


def test_images_are_checked_before_the_first_step(
    several: list[Record], records: Records, masked: Records
) -> None:
    assert check_images(records) == check_images(masked, most=5) == []
    data = Records.from_list(
        [*several, with_phrase(several[0], mask=rle_encode(np.ones((3, 3), bool)))]
    )
    found = check_images(data)
    assert [problem.record for problem in found] == ["r0", "r3", "r4", "r6"]
    assert "is 3x3" in found[0].problem
    assert "outside" in found[3].problem
    # Evenly spread: the first, the middle and the last.
    assert [p.record for p in check_images(Records.from_list(several[:5]), most=3)] == ["r4"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "I", "F"])
def test_odd_modes_are_pictures_too(one: Record, micro: Any, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "odd.tiff"
    plain = np.full((20, 40), 200, np.float32)
    image = Image.fromarray(plain) if mode == "F" else Image.new("L", (40, 20), 200)
    if mode == "PA":
        path, image = tmp_path / "odd.png", image.convert("P")
        image.save(path, transparency=0)
    elif mode == "I;16":
        Image.fromarray(plain.astype(np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path)
    record = replace(one, image=path, phrases=())
    assert check_images(Records.from_list([record])) == []
    batch = draw([record], micro, CAPTION, batch_size=1).batch(0)
    assert batch.pixels.shape == (1, 32, 32, 3)


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(
    one: Record, micro: Any, tmp_path: Path
) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (60_000, 1_000)).save(path)
    record = replace(one, image=path)
    (problem,) = check_images(Records.from_list([record]))
    assert "at most 50 megapixels, got 60000x1000" in problem.problem
    with pytest.raises(UserError, match=r"record 7-a: .*huge\.png: expected at most 50 megapixels"):
        draw([record], micro, CAPTION, batch_size=1).batch(0)


# Memory ---------------------------------------------------------------------------------------


def test_pixels_are_kept_up_to_a_budget(
    masked: Records, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    monkeypatch.setattr(
        module, "image_bytes", lambda path: (loads.append(path), path.read_bytes())[1]
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


def test_tokenised_texts_are_kept_up_to_a_budget(
    records: Records, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(module, "encode", lambda *args: (calls.append(args), encode(*args))[1])
    kept = draw(records, micro, PRESENCE)
    for _ in range(2):
        for step in range(4):
            kept.batch(step)
        first = len(calls)
    assert len(calls) == first <= 4 * 4 * 4
    monkeypatch.setattr(module, "_TEXT_BYTES", 20_000)
    tight = draw(records, micro, PRESENCE)
    for step in range(12):
        assert equal(tight.batch(step), kept.batch(step))
    assert 0 < len(tight._encoded) < 15


def test_a_bounded_memory_forgets_what_was_not_used_for_longest() -> None:
    made: list[str] = []
    memory = Bounded[str](10)

    def ask(key: str) -> str:
        return memory.get(key, lambda: (made.append(key), key)[1], len)

    for key in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        assert ask(key) == key
    assert made == ["aaaa", "bbbb", "cccc", "bbbb"]
    assert ask("d" * 11) == "d" * 11  # does not fit at all
    assert len(memory) == 0
    assert ask("aaaa") == "aaaa"
    assert len(memory) == 1


def test_the_last_token_guides_nothing(
    one: Record, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with a chat template that puts nothing behind an answer.
    cut = Encoded((1, 2, 3, 4, 5), (0, 0, 0, 1, 1), ((3, 4),), (("before", "word"),))
    monkeypatch.setattr(module, "encode", lambda *_: cut)
    (group,) = draw([one], micro, CAPTION, batch_size=1).batch(0).groups
    assert group.ids.shape == (1, 1, 4)
    assert group.cols[group.weight > 0].tolist() == [3]
