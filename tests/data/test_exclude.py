"""Which images are kept out of training."""

import json
from pathlib import Path

import pytest

from agevlm_mlx.data.exclude import Excluded, exclusions
from agevlm_mlx.errors import UserError


def test_the_pictures_of_pope() -> None:
    pope = exclusions(["pope"])
    assert len(pope) == 500
    assert Path("coco/train2017/000000310196.jpg") in pope
    assert Path("coco/train2017/000000310197.jpg") not in pope


@pytest.mark.parametrize("listed", ["COCO_val2014_000000000139.jpg", "000000000139.jpg"])
@pytest.mark.parametrize(
    "path",
    [
        "/data/coco/train2017/000000000139.jpg",
        "val2014/COCO_val2014_000000000139.jpg",
        "COCO_train2014_000000000139.png",
        "COCO_train2014_000000000139_4.jpg",  # RefCOCO names an object's picture
    ],
)
def test_coco_names_of_one_picture(listed: str, path: str) -> None:
    assert Path(path) in Excluded([listed])
    assert Path(path.replace("139", "138")) not in Excluded([listed])


@pytest.mark.parametrize(
    ("listed", "path", "wanted"),
    [
        ("a.jpg", "/x/y/a.jpg", True),
        ("a.jpg", "/x/y/a.PNG", True),
        ("a", "/x/y/a.webp", True),
        ("y/a.jpg", "/x/y/a.jpg", True),
        ("./y//a.jpg", "/x/y/a.jpg", True),
        ("/x/y/a.jpg", "/x/y/a.jpg", True),
        ("y/a.jpg", "/x/z/a.jpg", False),
        ("y/a.jpg", "a.jpg", False),
        ("a.jpg", "/x/ba.jpg", False),
        ("a.jpg", "/x/a.jpg/b.jpg", False),
        ("v1.5", "/x/v1.6.jpg", False),
        ("139.jpg", "000000000139.jpg", False),
    ],
)
def test_other_names_are_ends_of_paths(listed: str, path: str, wanted: bool) -> None:
    assert (Path(path) in Excluded([listed])) == wanted


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("x.txt", "# remark\n\na.jpg\r\nb/c.jpg\n"),
        ("x.json", json.dumps([{"image": "a.jpg"}, {"file_name": "b/c.jpg"}])),
        ("x.json", '{"image": "a.jpg"}\n{"image": "b/c.jpg", "text": "POPE writes lines"}\n'),
        ("x.jsonl", '{"image": "a.jpg"}\n\n{"filename": "b/c.jpg"}\n'),
        ("x.tsv", "index\timage\timage_path\n1\t" + "A" * 5000 + "\ta.jpg\n2\tB\tb/c.jpg\n"),
        ("x.csv", "image\na.jpg\nb/c.jpg\n"),
    ],
)
def test_lists_in_files(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    both = exclusions([str(tmp_path / file), "pope"])
    assert len(both) == 502
    assert Path("images/a.jpg") in both
    assert Path("images/b/c.jpg") in both
    assert Path("images/c.jpg") not in both
    assert Path("000000310196.jpg") in both


def test_no_list_excludes_nothing() -> None:
    assert len(exclusions([])) == 0
    assert Path("a.jpg") not in exclusions([])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("x.txt", b"", "expected names of images, got none"),
        ("x.txt", b"a.jpg\n/\n", "x.txt:2: expected the name of an image, got '/'"),
        ("x.txt", b"a.jpg\n\xff.jpg\n", "x.txt:2: expected UTF-8"),
        ("x.txt", b"a" * 2000, "x.txt:1: expected the name of an image"),
        ("x.json", b"[]", "expected names of images, got none"),
        ("x.json", b'[{"image": "a.jpg"},\n{"id": 3}]', "x.json:2: expected the name of an image"),
        ("x.json", b'["a.jpg"]', "x.json:1: expected an object"),
        ("x.json", b'{"images": [{"a": 1}]}', "x.json:1: expected the name of an image"),
        ("x.jsonl", b'{"image": "a.jpg"}\n{', "x.jsonl:2: malformed JSON"),
        ("x.tsv", b"image\n" + b"A" * 5000, "x.tsv:2: expected the name of an image"),
        ("x.xml", b"a", "expected a table"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, file: str, text: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(text)
    with pytest.raises(UserError) as caught:
        exclusions([str(tmp_path / file)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_list_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.exclude: expected 'pope' or a file .* got 'popes'"):
        exclusions(["popes"])
    with pytest.raises(UserError, match="expected 'pope' or a file"):
        exclusions([str(tmp_path)])
