"""Flickr30k Entities as records: sentences with marked phrases, boxes in XML, and odd ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.flickr30k import is_flickr30k, read_flickr30k, sentence
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import CAPTION_PROMPT, Problem, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_decode

SENTENCES = (
    "[/EN#1/people Two men] hold [/EN#2/other a  sign] in [/EN#3/scene the street] .",
    "[/EN#1/people/clothing Two men , smiling] , do n't [/EN#0/notvisual look] .",
    "",
)
WIDTH, HEIGHT = 40, 30


def thing(*names: str, box: tuple[int, int, int, int] | None = None) -> str:
    """An object of an annotation's file; without a box it is a scene."""
    said = "".join(f"<name>{name}</name>" for name in names)
    if box is None:
        return f"<object>{said}<scene>1</scene><nobndbox>0</nobndbox></object>"
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object>{said}<bndbox>{inner}</bndbox></object>"


THINGS = (
    thing("1", box=(2, 3, 10, 20)),
    thing("1", box=(20, 5, 30, 25)),
    thing("2", "9", box=(5, 5, 15, 12)),
    thing("3"),
)


def xml(*things: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>7.jpg</filename>{size}{''.join(things)}</annotation>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture of training, 7, and one of validation, 8, as published."""
    for name in ("Sentences", "Annotations", "flickr30k-images"):
        (tmp_path / name).mkdir()
    for name in ("7", "8"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "flickr30k-images" / f"{name}.jpg")
        (tmp_path / "Sentences" / f"{name}.txt").write_text("\n".join(SENTENCES))
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml(*THINGS))
    (tmp_path / "train.txt").write_text("7\n\n")
    (tmp_path / "val.txt").write_text("8\n")
    return tmp_path


def found(path: Path) -> tuple[list[str], list[Record]]:
    """What is said of the problems, and the records."""
    every = list(read_flickr30k(path))
    said = [str(one.error()) for one in every if isinstance(one, Problem)]
    assert all("\n" not in one for one in said)
    return said, [one for one in every if isinstance(one, Record)]


def test_captions_and_boxes_as_published(folder: Path) -> None:
    records = read_records(folder)
    assert records.root == folder
    first, second = records
    assert (first.id, first.kind) == ("7-1", "caption")
    assert first.image == folder / "flickr30k-images" / "7.jpg"
    assert first.turns == (
        Turn("user", CAPTION_PROMPT),
        Turn("assistant", "Two men hold a sign in the street."),
    )
    men, sign = first.phrases  # a street has no box
    assert (men.text, men.turn, men.start, men.end) == ("Two men", 1, 0, 7)
    assert (sign.text, sign.start, sign.box, sign.mask) == ("a sign", 13, (5, 5, 15, 12), None)
    assert men.box == (2, 3, 30, 25)
    assert men.mask is not None
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[3:20, 2:10] = wanted[5:25, 20:30] = True
    np.testing.assert_array_equal(rle_decode(men.mask), wanted)
    assert second.turns[1].text == "Two men, smiling, don't look."
    assert [p.text for p in second.phrases] == ["Two men, smiling"]


def test_other_splits_go_by_their_list(folder: Path) -> None:
    assert {r.image.name for r in read_records(folder / "val.txt")} == {"8.jpg"}
    (folder / "train.txt").unlink()
    assert {r.image.name for r in read_records(folder)} == {"7.jpg", "8.jpg"}
    assert not is_flickr30k(folder / "Sentences" / "7.txt")


def test_pictures_may_lie_beside_the_folder(tmp_path: Path, folder: Path) -> None:
    home = tmp_path / "entities"
    home.mkdir()
    for name in ("Sentences", "Annotations", "train.txt"):
        (tmp_path / name).rename(home / name)
    records = read_records(home)
    assert records.root == tmp_path
    assert records[0].image == tmp_path / "flickr30k-images" / "7.jpg"


@pytest.mark.parametrize(
    ("line", "text", "phrases"),
    [
        ("A man .", "A man.", []),
        ("[/EN#5/people A man]", "A man", ["A man"]),
        ("He said ' [/EN#5/other hi] ' !", "He said' hi'!", ["hi"]),
        ("( [/EN#5/other A man] ) [/EN#6/people 's hat] ?", "(A man)'s hat?", ["A man", "'s hat"]),
        ("[/EN#5/vehicles/other a   red\tcar]  ; fast", "a red car; fast", ["a red car"]),
        ("[/EN#5/other one] [/EN#6/other two]", "one two", ["one", "two"]),
        ("[/EN#5/other .] end", ". end", ["."]),
    ],
)
def test_sentences_read_as_people_write_them(line: str, text: str, phrases: list[str]) -> None:
    said, spans = sentence(line, "x")
    assert said == text
    assert [said[start:end] for _, start, end in spans] == phrases


@pytest.mark.parametrize(
    "line",
    ["[/EN#5/people A man", "A man]", "[/EN#x/people A man]", "[/EN#5/other [a] b]", "half \0"],
)
def test_broken_sentences_are_named_and_left_out(folder: Path, line: str) -> None:
    (folder / "Sentences" / "7.txt").write_text(f"{SENTENCES[0]}\n{line}\n")
    (said,), records = found(folder)
    assert said.startswith(f"{folder / 'Sentences' / '7.txt'}:2: expected ")
    assert [r.id for r in records] == ["7-1"]


LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected XML as Flickr30k's, got no element"),
        (xml(*THINGS)[:-5], "expected XML as Flickr30k's"),
        (LAUGHS + xml(thing("&c;", box=(1, 2, 3, 4))), "got a document type"),
        (xml(*THINGS, width=10**6, height=10**6), "expected the size of a picture, got 1000000x"),
        (xml(*THINGS, height=0), "expected the size of a picture, got 40x0"),
        ("<annotation/>", "expected a whole number in <size/width>, got ''"),
        (b"\xff\xfe<\0", "expected UTF-8 text"),
        (" " * (2 << 20), "expected at most 1048576 bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_broken_annotations_leave_the_captions(
    folder: Path, text: str | bytes | None, message: str
) -> None:
    file = folder / "Annotations" / "7.xml"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (said,), records = found(folder)
    assert said.startswith(f"{file}: ")
    assert message in said
    assert [r.phrases for r in records] == [(), ()]


@pytest.mark.parametrize(
    "box", [(41, 2, 50, 8), (9, 2, 5, 8), (2, 31, 5, 40), (-9, 2, -3, 8)]
)  # fmt: skip
def test_a_bad_box_is_told_and_the_others_stay(
    folder: Path, box: tuple[int, int, int, int]
) -> None:
    bad = thing("1", box=box)
    (folder / "Annotations" / "7.xml").write_text(xml(bad, *THINGS[1:]))
    (said,), records = found(folder)
    assert f"expected a box x0 y0 x1 y1 in a picture of 40x30, got {list(box)}" in said
    men, _ = records[0].phrases
    assert (men.box, men.mask) == ((20, 5, 30, 25), None)  # only one is left


def test_boxes_are_cut_at_the_picture_and_may_be_empty(folder: Path) -> None:
    out, flat = thing("1", box=(-2, 0, 10, 99)), thing("2", box=(5, 5, 5, 9))
    (folder / "Annotations" / "7.xml").write_text(xml(out, flat))
    said, records = found(folder)
    assert not said
    assert [p.box for p in records[0].phrases] == [(0, 0, 10, 30)]


def test_lists_name_pictures_only(folder: Path) -> None:
    (folder / "train.txt").write_text("../7\n7.jpg\n9\n")
    (first, second), records = found(folder)
    assert re.search(r"train\.txt:1: expected the number of a picture, got '\.\./7'", first)
    assert "9.txt: cannot be read: No such file" in second
    assert {r.image.name for r in records} == {"7.jpg"}


def test_a_missing_picture_is_told(folder: Path) -> None:
    (folder / "flickr30k-images" / "7.jpg").unlink()
    with pytest.raises(UserError, match=r"image not found: .*7\.jpg"):
        read_records(folder)
