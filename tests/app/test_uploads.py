"""Uploads by the tab that has them."""

import os
import time
from pathlib import Path

import pytest

from agevlm_mlx.errors import UserError
from app.uploads import FORGOTTEN, Uploads


def upload(folder: Path, name: str, age: float = 0) -> str:
    path = folder / f"hash of {name}" / name
    path.parent.mkdir()
    path.write_bytes(name.encode())
    os.utime(path, times=(time.time() - age,) * 2)
    return str(path)


def test_names_and_contents(tmp_path):
    paths = [upload(tmp_path, name) for name in ("a.png", "b.png")]
    assert Uploads(tmp_path).read("tab", paths) == [("a.png", b"a.png"), ("b.png", b"b.png")]


def test_an_upload_goes_with_the_last_tab_that_has_it(tmp_path):
    uploads, path = Uploads(tmp_path), upload(tmp_path, "a.png")
    for tab in ("one", "two"):
        uploads.note(tab, [path])
    uploads.forget("one")
    assert Path(path).exists()
    uploads.forget("two")
    assert list(tmp_path.iterdir()) == []
    uploads.forget("unknown")


def test_what_no_tab_said_it_has_goes_when_it_is_old(tmp_path):
    uploads = Uploads(tmp_path)
    old, new = upload(tmp_path, "old.png", FORGOTTEN + 1), upload(tmp_path, "new.png")
    kept = upload(tmp_path, "kept.png", FORGOTTEN + 1)
    uploads.note("open", [kept])
    uploads.forget("closed")
    assert not Path(old).exists()
    assert Path(new).exists()
    assert Path(kept).exists()


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"^a\.png: it is no longer here; add it again$"):
        Uploads(tmp_path).read("tab", [str(tmp_path / "x" / "a.png")])


@pytest.mark.parametrize("way", ["{other}", "{folder}/../other/secret.txt", "{folder}/link"])
def test_only_uploads_are_read_and_deleted(tmp_path, way):
    folder, other = tmp_path / "uploads", tmp_path / "other" / "secret.txt"
    folder.mkdir()
    other.parent.mkdir()
    other.write_text("secret")
    (folder / "link").symlink_to(other)
    uploads = Uploads(folder)
    with pytest.raises(UserError):
        uploads.read("tab", [way.format(other=other, folder=folder)])
    uploads.forget("tab")
    assert other.exists()
