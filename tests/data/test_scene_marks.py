"""Exact masks and absent things in the phrases of an embedded folder's texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agevlm_mlx.data.nouns import ALL_NOUNS
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.scene_marks import _NOUN
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.jobs import Jobs
from agevlm_mlx.sam.targets import rle_decode
from agevlm_mlx.scenes import main


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures plain, with masks, with absent phrases, and with both."""
    out = tmp_path_factory.mktemp("marks")
    for name in ("plain", "masks", "absent", "both"):
        masks, absent = (name in (one, "both") for one in ("masks", "absent"))
        assert write_scenes(out / name, 12, 3, texts="rich", masks=masks, absent=absent)
    return out


def bare(folder: Path) -> list[dict[str, Any]]:
    """The records as they would be without marks."""
    records = json.loads((folder / "llava.json").read_text())
    for record in records:
        kept = [p for p in record.pop("phrases", []) if not p.get("absent")]
        for phrase in kept:
            phrase.pop("mask", None)
        if kept:
            record["phrases"] = kept
    return records


@pytest.mark.parametrize("name", ["masks", "absent", "both"])
def test_marks_add_to_the_phrases_and_change_nothing_else(folders: Path, name: str) -> None:
    plain, marked = files(folders / "plain"), files(folders / name)
    assert {f for f in plain if plain[f] != marked[f]} == {"llava.json", "scenes.json"}
    assert bare(folders / name) == bare(folders / "plain")
    about = json.loads(marked["scenes.json"])
    said = {one: True for one in ("masks", "absent") if name in (one, "both")}
    assert about == json.loads(plain["scenes.json"]) | said
    assert not {"masks", "absent"} & json.loads(plain["scenes.json"]).keys()


def test_masks_are_those_of_the_pictures(folders: Path) -> None:
    instances = json.loads((folders / "plain" / "instances.json").read_text())
    names = {row["id"]: row["name"] for row in instances["categories"]}
    exact = {
        (row["image_id"], names[row["category_id"]]): rle_decode(row["segmentation"])
        for row in instances["annotations"]
    }
    phrases = 0
    records = read_records(folders / "masks")
    for record in records:
        for phrase in record.phrases:
            assert phrase.mask is not None
            mask = rle_decode(phrase.mask)
            assert np.array_equal(mask, exact[int(record.image.stem), phrase.text])
            assert phrase.box is not None
            x0, y0, x1, y1 = (int(v) for v in phrase.box)
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            phrases += 1
    assert phrases > 200
    assert np.array_equal(records.masked, records.guided)


def test_every_absent_noun_of_a_text_is_marked_and_no_other(folders: Path) -> None:
    instances = json.loads((folders / "plain" / "instances.json").read_text())
    names = {row["id"]: row["name"] for row in instances["categories"]}
    shown: dict[int, set[str]] = {}
    for row in instances["annotations"]:
        shown.setdefault(row["image_id"], set()).add(names[row["category_id"]])
    plain, marked = (read_records(folders / name) for name in ("plain", "absent"))
    for before, after in zip(plain, marked, strict=True):
        there = shown[int(after.image.stem)]
        absent = [p for p in after.phrases if p.absent]
        assert after.phrases == (*before.phrases, *absent)
        for phrase in absent:
            assert phrase.text in set(ALL_NOUNS) - there
            assert after.turns[phrase.turn].text[phrase.start : phrase.end] == phrase.text
        if after.kind in ("presence", "presence_hard", "ask", "ask_hard"):
            (said,) = after.phrases  # each asks for one thing, which is there or is not
            assert said.absent == (after.turns[1].text == "No")
        if after.kind in ("caption", "describe", "count", "attribute", "position"):
            assert not absent
        if after.kind in ("match",):
            assert len(absent) == (after.turns[1].text == "No")
    assert marked.absent.sum() > 100
    assert np.array_equal(marked.guided, plain.guided)


def test_no_noun_is_found_in_another() -> None:
    for noun in ALL_NOUNS:
        assert _NOUN.findall(f"A {noun}, and the {noun}.") == [noun] * 2
    assert not _NOUN.findall("The cardboard catalogue of dogma.")


def test_a_teacher_is_not_asked_about_absent_things(folders: Path) -> None:
    plain, marked = (Jobs(read_records(folders / name)) for name in ("plain", "absent"))
    assert [job.prompts for job in plain] == [job.prompts for job in marked]
    assert not marked.problems
    alone = [record for record in read_records(folders / "absent") if record.kind == "ask"]
    nothing = [r for r in alone if all(p.absent for p in r.phrases)]
    assert len(Jobs(Records.from_list(nothing))) == 0
    masks = Jobs(read_records(folders / "masks"))
    assert all(job.ready and not job.prompts for job in masks)


def test_a_folder_with_other_marks_is_another_folder(folders: Path) -> None:
    assert not write_scenes(folders / "both", 12, 3, texts="rich", masks=True, absent=True)
    with pytest.raises(UserError, match=r"version=1 masks absent, asked for .*version=1\)"):
        write_scenes(folders / "both", 12, 3, texts="rich")
    with pytest.raises(UserError, match=r"version=1, asked for .*version=1 masks\)"):
        write_scenes(folders / "plain", 12, 3, texts="rich", masks=True)


def test_the_command_passes_its_flags_on(tmp_path: Path, capsys) -> None:
    out = tmp_path / "x"
    assert main(["--out", str(out), "--n", "2", "--masks", "--absent-phrases"]) == 0
    about = json.loads((out / "scenes.json").read_text())
    assert about["masks"] is True
    assert about["absent"] is True
    records = read_records(out)
    assert records.masked.any()
    assert records.absent.any()
