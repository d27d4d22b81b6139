"""The page of random pictures: what is drawn on them, and pictures and texts of all sorts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data import contact_sheet as module
from agevlm_mlx.data.contact_sheet import contact_sheet
from agevlm_mlx.data.record_set import Records
from agevlm_mlx.data.records import Phrase, Record, Turn
from agevlm_mlx.sam.targets import rle_encode


def record(
    folder: Path,
    image: Image.Image | None,
    *phrases: Phrase,
    name: str = "a.png",
    question: str = "What is it?",
    answer: str = "A dog and a cat",
) -> Record:
    if image is not None:
        image.save(folder / name)
    turns = (Turn("user", question), Turn("assistant", answer))
    return Record(name, folder / name, turns, phrases, "chat")


def dog(**place) -> Phrase:
    return Phrase("dog", 1, 2, 5, **place)


def shades(page: Image.Image) -> set[tuple[int, int, int]]:
    pixels = np.asarray(page).astype(np.int32) @ [1 << 16, 1 << 8, 1]
    return {(v >> 16, v >> 8 & 255, v & 255) for v in np.unique(pixels).tolist()}


def drawn(folder: Path, *phrases: Phrase, colour: str = "grey", size=(200, 150)) -> np.ndarray:
    """The tile of one picture, u8 [260 340 3]."""
    page = contact_sheet(
        Records.from_list([record(folder, Image.new("RGB", size, colour), *phrases)])
    )
    left, top = module._MARGIN, module._MARGIN + 44
    return np.asarray(page)[top : top + module._HIGH, left : left + module._WIDE]


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_box_is_drawn_around_its_place_with_a_dark_edge(tmp_path, colour):
    tile = drawn(tmp_path, dog(box=(50, 50, 100, 100)), colour=colour)
    # 200x150 is shown 1.7 times as large: 340x255, 2 px from the top.
    first, dark = np.array(module._COLOURS[0]), np.array(module._DARK)
    row = tile[130]
    bright = np.flatnonzero((row == first).all(axis=-1))
    assert bright.tolist() == [84, 85, 169, 170]
    assert (row[[83, 171]] == dark).all()
    assert not (tile[:, 200:] == first).all(axis=-1).any()


def test_a_mask_is_outlined_not_its_box(tmp_path):
    mask = np.zeros((150, 200), bool)
    mask[50:100, 20:60] = True
    mask[50:60, 20:120] = True  # an L: the box's other corner is no part of it
    tile = drawn(tmp_path, dog(mask=rle_encode(mask), box=(20, 50, 120, 100)))
    first = (tile == module._COLOURS[0]).all(axis=-1)
    assert first.any()
    assert first[140:175, 20:110].any()
    assert not first[140:180, 150:].any()


def test_a_point_is_marked(tmp_path):
    tile = drawn(tmp_path, dog(point=(100, 75)))
    assert tuple(tile[130, 170]) == module._COLOURS[0]


def test_labels_of_the_same_place_do_not_cover_one_another(tmp_path):
    phrases = [dog(box=(20, 100, 60, 140)) for _ in range(5)]
    tile = drawn(tmp_path, *phrases)
    for colour in module._COLOURS[:5]:
        assert (tile == colour).all(axis=-1).sum() > 200, colour


def test_the_choice_follows_the_seed(tmp_path):
    found = [
        record(tmp_path, Image.new("RGB", (20, 20), (k * 8, 0, 0)), name=f"{k}.png")
        for k in range(30)
    ]
    records = Records.from_list(found)
    pages = [contact_sheet(records, seed).tobytes() for seed in (1, 1, 2)]
    assert pages[0] == pages[1] != pages[2]
    reds = shades(contact_sheet(records, 1)) & {(k * 8, 0, 0) for k in range(30)}
    assert len(reds) == 16


def test_pictures_and_texts_of_all_sorts_are_drawn(tmp_path):
    sizes = [(1, 1), (3, 2), (1, 3000), (5000, 2), (2500, 1800)]
    found = [
        record(tmp_path, Image.new("RGB", size), dog(box=(0, 0, *size)), name=f"{k}.png")
        for k, size in enumerate(sizes)
    ]
    texts = ["word " * 4000, "x" * 5000, "Ein schöner Tag — 漢字 🐶 \u202eab\x00c\n\td", " . "]
    found += [
        record(
            tmp_path, Image.new("L", (40, 30)), name=f"{len(text)}.png", question=text, answer=text
        )
        for text in texts
    ]
    page = contact_sheet(Records.from_list(found), title="t" * 1000)
    assert page.width == 2 * module._MARGIN + 4 * module._WIDE + 3 * module._GAP
    assert page.height < 3 * 500


def test_what_cannot_be_shown_says_why(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for bad in (
        record(tmp_path, None, name="broken.png"),
        record(tmp_path, Image.new("RGB", (20, 20)), dog(box=(0, 0, 50, 50)), name="outside.png"),
    ):
        assert module._WRONG in shades(contact_sheet(Records.from_list([bad])))
    good = record(tmp_path, Image.new("RGB", (20, 20)), dog(box=(0, 0, 20, 20)))
    assert module._WRONG not in shades(contact_sheet(Records.from_list([good])))


def test_lines_fit_and_lose_nothing():
    pen = module.ImageDraw.Draw(Image.new("RGB", (9, 9)))
    text = "a few short words and " + "averylongword" * 20 + " then more"
    lines = list(module._lines(pen, text, 200, 14))
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(pen.textlength(line, font=module._font(14)) <= 200 for line in lines)
    assert len(module._wrapped(pen, text)) == module._MOST_LINES
    assert module._wrapped(pen, text)[-1].endswith("...")
