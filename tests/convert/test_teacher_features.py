"""`agevlm-convert teacher-features`: files of SAM features become a store for training."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import teach
from agevlm_mlx.data.batches import Batches, GroupSpec
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.jobs import Jobs
from agevlm_mlx.sam.labelling import Labeller
from agevlm_mlx.sam.protocol import Labels
from agevlm_mlx.sam.store import Store
from agevlm_mlx.sam.targets import rle_encode
from convert import __main__ as cli
from convert import teacher_features

CHANNELS, SIDE = 5, 8
STUDENT = Preprocessor(image_size=32)
GRID = (4, 4)
#: Wide, tall and square pictures: SAM pads below, to the right, and nowhere.
SIZES = {"wide": (40, 20), "tall": (18, 44), "square": (30, 30)}


def embedding(seed: int) -> np.ndarray:
    """[C G G] as SAM gives it; what lies in its padding is no less than in the picture."""
    return np.random.default_rng(seed).normal(size=(CHANNELS, SIDE, SIDE)).astype(np.float32)


EMBEDDINGS = {name: embedding(i) for i, name in enumerate(SIZES)}


class FileTeacher:
    """What `agevlm teach` would ask: the same features, and masks of the left half."""

    fingerprint, feature_channels, batch_size, light = "f" * 64, CHANNELS, 1, True

    def label(self, images: Any, prompts: Any, *, features: bool = False) -> Any:
        (image,), (group,) = images, prompts
        name = {size: name for name, size in SIZES.items()}[image.shape[1], image.shape[0]]
        masks = np.zeros((len(group), *image.shape[:2]), bool)
        masks[:, :, : image.shape[1] // 2] = True
        grid = EMBEDDINGS[name].transpose(1, 2, 0) if features else None
        return [Labels(masks, np.full(len(group), 0.5, np.float32), grid)]


def write_data(folder: Path, *, masks: bool) -> Path:
    """A picture of each size with a box, whose mask comes along if `masks`."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for name, (width, height) in SIZES.items():
        Image.new("RGB", (width, height), (200, 10, 10)).save(folder / f"images/{name}.png")
        found = {"text": "dog", "turn": 0, "start": 11, "end": 14, "box": [0, 0, width, height]}
        if masks:
            mask = np.zeros((height, width), bool)
            mask[: height // 2] = True
            found["mask"] = rle_encode(mask)
        talk = [
            {"role": "user", "content": "Is there a dog?"},
            {"role": "assistant", "content": "Yes"},
        ]
        line = {"id": name, "image": f"images/{name}.png", "conversations": talk}
        lines.append(json.dumps({**line, "phrases": [found]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", masks=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "features"
    folder.mkdir()
    for name, values in EMBEDDINGS.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def convert(data: Path, files: Path, out: Path, *options: str) -> int:
    student = ["--image-size", "32", "--grid", "4x4"]
    where = ["--features", str(files), "--data", str(data), "--mlx-path", str(out)]
    return cli.main(["teacher-features", *where, *student, *options])


def taught(data: Path, out: Path, *, features: bool) -> Store:
    """The store that `agevlm teach` makes, with the same features."""
    make = teach.MakeLabeller(preprocessor=STUDENT, grid=GRID, features=features)
    labeller = Labeller(FileTeacher(), STUDENT, GRID, features)
    assert teach.teach(Jobs(read_records(data)), make, out, labeller=labeller) == 0
    return Store(out)


def assert_same(one: Store, other: Store) -> None:
    assert list(one) == list(other)
    for key in one:
        mine, its = one.rows(key), other.rows(key)
        for name in ("sha256", "prompts"):
            assert mine[name] == its[name]
        for name in ("coverage", "iou", "features"):
            np.testing.assert_array_equal(mine[name], its[name])
    np.testing.assert_array_equal(one.feature_mean, other.feature_mean)
    assert one.feature_scale == other.feature_scale


def test_the_store_is_the_one_that_teach_would_make(data, files, tmp_path, capsys):
    assert convert(data, files, tmp_path / "store") == 0
    store = Store(tmp_path / "store")
    assert store.meta.feature_channels == CHANNELS
    store.check(STUDENT.fingerprint(), GRID)
    assert_same(store, taught(data, tmp_path / "taught", features=True))
    said = capsys.readouterr()
    assert "3 images, features 5 x 8 x 8 on a 4x4 grid" in said.out
    assert "images 3/3" in said.err


def test_features_lie_where_the_picture_is(data, files, tmp_path):
    # One channel counts the columns of SAM's grid, one the rows, the others are constant.
    for name in SIZES:
        values = np.ones((CHANNELS, SIDE, SIDE), np.float32)
        values[0], values[1] = np.arange(SIDE)[None], np.arange(SIDE)[:, None]
        np.save(files / f"{name}.npy", values)
    assert convert(data, files, tmp_path / "store") == 0
    store = Store(tmp_path / "store")
    # 40 x 20 is all columns and the upper half of SAM's rows, and the middle two student rows.
    wide = store.rows("images/wide.png")["features"].reshape(4, 4, CHANNELS)
    assert not wide[[0, 3]].any()
    np.testing.assert_allclose(wide[1, :, 0], [0.5, 2.5, 4.5, 6.5], atol=0.01)
    np.testing.assert_allclose(wide[[1, 2], 0, 1], [0.5, 2.5], atol=0.01)
    square = store.rows("images/square.png")["features"].reshape(4, 4, CHANNELS)
    np.testing.assert_allclose(square[:, 0, 1], [0.5, 2.5, 4.5, 6.5], atol=0.01)


def test_training_reads_it(data, files, tmp_path, tiny_checkpoint):
    from agevlm_mlx.weights import load_tokenizer

    assert convert(data, files, tmp_path / "store") == 0
    batches = Batches(
        read_records(data),
        load_tokenizer(tiny_checkpoint),
        STUDENT,
        GRID,
        batch_size=3,
        groups=[GroupSpec(kinds=("chat",), n=1)],
        seed=0,
        store=Store(tmp_path / "store"),
    )
    batch = batches.batch(0)
    assert batch.sam_features is not None
    assert batch.sam_features.shape == (3, 16, CHANNELS)
    assert batch.groups[0].weight.any()


def test_masks_of_a_store_and_features_of_files(files, tmp_path):
    data = write_data(tmp_path / "bare", masks=False)
    masks = taught(data, tmp_path / "masks", features=False)
    before = {p.name: p.read_bytes() for p in masks.path.iterdir()}
    assert convert(data, files, tmp_path / "store", "--masks", str(masks.path)) == 0
    store = Store(tmp_path / "store")
    assert_same(store, taught(data, tmp_path / "both", features=True))
    assert {p.name: p.read_bytes() for p in masks.path.iterdir()} == before


def test_pictures_without_phrases_need_no_masks(data, files, tmp_path):
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps({**line, "phrases": []}) for line in lines)
    (data / "data.jsonl").write_text(text)
    assert convert(data, files, tmp_path / "store") == 0
    store = Store(tmp_path / "store")
    assert [store.prompts(key) for key in store] == [()] * 3
    assert store.features("images/wide.png") is not None


def npz(path: Path, values: np.ndarray) -> None:
    np.savez(path, image_embedding=values)


def half(path: Path, values: np.ndarray) -> None:
    np.save(path, values.astype(np.float16))


def batched(path: Path, values: np.ndarray) -> None:
    np.save(path, values[None].astype(np.float64))


@pytest.mark.parametrize(
    ("name", "write", "tolerance"),
    [("wide.npz", npz, 0), ("wide.npy", half, 2e-3), ("wide.npy", batched, 0)],
)
def test_formats(tmp_path, name, write, tolerance):
    write(tmp_path / name, EMBEDDINGS["wide"])
    got = teacher_features.read(tmp_path / name)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, EMBEDDINGS["wide"].transpose(1, 2, 0), atol=tolerance)


@pytest.mark.parity
def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(EMBEDDINGS["wide"])
    want = EMBEDDINGS["wide"].transpose(1, 2, 0)
    for saved, tolerance in (
        (values, 0),
        (values[None].clone().requires_grad_(), 0),
        (values.bfloat16(), 0.02),
        ({"features": values}, 0),
    ):
        torch.save(saved, tmp_path / "a.pt")
        np.testing.assert_allclose(teacher_features.read(tmp_path / "a.pt"), want, atol=tolerance)


@pytest.mark.parity
def test_the_embedded_teachers_features_as_files(data, files, tmp_path):
    """SAM itself: its features, saved as PyTorch does, give the store of `agevlm teach`."""
    import torch

    from agevlm_mlx.sam.teacher import Teacher

    teacher = Teacher(device="cpu")
    for name in SIZES:
        (files / f"{name}.npy").unlink()
        features = teacher.features(np.asarray(Image.open(data / f"images/{name}.png")))
        torch.save(torch.from_numpy(features).permute(2, 0, 1)[None], files / f"{name}.pt")
    assert convert(data, files, tmp_path / "store") == 0
    make = teach.MakeLabeller(preprocessor=STUDENT, grid=GRID, features=True)
    labeller = Labeller(teacher, STUDENT, GRID, True)
    jobs = Jobs(read_records(data), every_image=True)
    assert teach.teach(jobs, make, tmp_path / "taught", labeller=labeller) == 0
    assert_same(Store(tmp_path / "store"), Store(tmp_path / "taught"))


@pytest.mark.parametrize(
    "name", ["images/wide.png.npy", "images/wide.npy", "wide.png.npy", "wide.npy"]
)
def test_names_of_files(data, files, tmp_path, name):
    (files / "wide.npy").unlink()
    (files / name).parent.mkdir(exist_ok=True)
    np.save(files / name, EMBEDDINGS["wide"])
    found = teacher_features.match(files, Jobs(read_records(data), every_image=True))
    assert found["images/wide.png"] == files / name


def test_a_second_run_adds_what_is_new(data, files, tmp_path, capsys):
    whole = (data / "data.jsonl").read_text()
    (data / "data.jsonl").write_text("\n".join(whole.splitlines()[:2]))
    assert convert(data, files, tmp_path / "store") == 0
    (data / "data.jsonl").write_text(whole)
    (files / "tall.npy").write_bytes(b"not read again")
    assert convert(data, files, tmp_path / "store") == 0
    assert "2 of 3 images are done" in capsys.readouterr().out
    assert len(Store(tmp_path / "store")) == 3


def test_a_damaged_file_keeps_what_came_before_and_the_command_continues(
    data, files, tmp_path, capsys
):
    (files / "square.npy").write_bytes(b"\x93NUMPY")
    assert convert(data, files, tmp_path / "store") == 2
    assert "square.npy: not a readable .npy file" in capsys.readouterr().err
    assert list(Store(tmp_path / "store")) == ["images/wide.png", "images/tall.png"]
    np.save(files / "square.npy", EMBEDDINGS["square"])
    assert convert(data, files, tmp_path / "store") == 0
    assert_same(Store(tmp_path / "store"), taught(data, tmp_path / "taught", features=True))


def test_a_dry_run_writes_nothing(data, files, tmp_path, capsys):
    assert convert(data, files, tmp_path / "store", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "3 images, 3 prompts on a 4x4 grid, features of 5 channels" in said
    assert not (tmp_path / "store").exists()


def refusal(capsys, *arguments: Any) -> str:
    """The one line that a refused command says; it makes no store."""
    assert convert(*arguments) == 2
    assert not arguments[2].exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_image_without_a_file(data, files, tmp_path, capsys):
    (files / "tall.npy").rename(files / "toll.npy")
    error = refusal(capsys, data, files, tmp_path / "store")
    assert "none for 1; the first is images/tall.png" in error
    assert "tall.npy" in error


def test_no_such_folder(data, tmp_path, capsys):
    assert "no such folder" in refusal(capsys, data, tmp_path / "no", tmp_path / "store")


def test_two_files_for_an_image(data, files, tmp_path, capsys):
    npz(files / "wide.npz", EMBEDDINGS["wide"])
    assert "wide.npy is there too" in refusal(capsys, data, files, tmp_path / "store")


def test_one_file_for_two_images(data, files, tmp_path, capsys):
    lines = (data / "data.jsonl").read_text()
    (data / "other").mkdir()
    Image.new("RGB", (40, 20)).save(data / "other/wide.png")
    (data / "data.jsonl").write_text(
        lines + "\n" + lines.splitlines()[0].replace("images/wide.png", "other/wide.png")
    )
    error = refusal(capsys, data, files, tmp_path / "store")
    assert "is meant for images/wide.png and for other/wide.png" in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((CHANNELS, SIDE, SIDE + 1), np.float32), "[5, 8, 9]"),
        (np.zeros((2, CHANNELS, SIDE, SIDE), np.float32), "[2, 5, 8, 8]"),
        (np.zeros((SIDE, SIDE, CHANNELS), np.float32), "[8, 8, 5]"),
        (np.ones((CHANNELS, SIDE, SIDE), np.int32), "int32"),
        (np.full((CHANNELS, SIDE, SIDE), np.nan, np.float32), "got nan"),
        (np.full((CHANNELS, SIDE, SIDE), np.inf, np.float32), "got inf"),
        (np.full((CHANNELS, SIDE, SIDE), 1e5, np.float32), "up to 65504"),
        (np.zeros((CHANNELS, SIDE, SIDE), np.float32), "not all zero"),
    ],
)
def test_what_is_no_embedding(data, files, tmp_path, capsys, values, message):
    np.save(files / "wide.npy", values)
    error = refusal(capsys, data, files, tmp_path / "store")
    assert "wide.npy: expected" in error
    assert message in error


def test_one_nan_among_numbers(tmp_path):
    values = EMBEDDINGS["wide"].copy()
    values[3, 2, 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="got nan"):
        teacher_features.read(tmp_path / "a.npy")


def test_features_of_another_teacher_among_them(data, files, tmp_path, capsys):
    np.save(files / "square.npy", EMBEDDINGS["square"][:4])
    assert convert(data, files, tmp_path / "store") == 2
    assert "expected 5 x 8 x 8 as in wide.npy, got 4 x 8 x 8" in capsys.readouterr().err


def test_a_store_is_not_continued_with_other_features(data, files, tmp_path, capsys):
    assert convert(data, files, tmp_path / "store") == 0
    np.save(files / "wide.npy", EMBEDDINGS["tall"])
    assert convert(data, files, tmp_path / "store") == 2
    assert "another teacher" in capsys.readouterr().err


def test_several_arrays_need_a_name(data, files, tmp_path, capsys):
    (files / "wide.npy").unlink()
    np.savez(files / "wide.npz", a=EMBEDDINGS["tall"], b=EMBEDDINGS["wide"])
    assert "one array, got a, b; pass --array" in refusal(capsys, data, files, tmp_path / "store")
    got = teacher_features.read(files / "wide.npz", "b")
    np.testing.assert_array_equal(got, EMBEDDINGS["wide"].transpose(1, 2, 0))
    arguments = data, files, tmp_path / "store", "--array", "c"
    assert "expected 'c', got a, b" in refusal(capsys, *arguments)


def header(shape: str) -> bytes:
    """The beginning of an .npy file."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path):
    path = tmp_path / "wide.npy"
    path.write_bytes(header("(256, 100000, 100000)") + b"\0" * 100)
    with pytest.raises(UserError, match=r"wide\.npy: not a readable \.npy file"):
        teacher_features.read(path)
    path = tmp_path / "wide.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header("(256, 100000, 100000)") + b"\0" * 100)
    with pytest.raises(UserError, match=r"wide\.npz: not a readable \.npz file"):
        teacher_features.read(path)


def test_an_archive_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    npz(tmp_path / "wide.npz", EMBEDDINGS["wide"])
    monkeypatch.setattr(teacher_features, "_LARGEST_ARCHIVE", 1000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="unpacked it would have 1408 bytes, expected 1000"):
        teacher_features.read(tmp_path / "wide.npz")


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)])  # encrypted; packed in another way
def test_an_archive_that_zipfile_cannot_unpack(tmp_path, place, value):
    npz(tmp_path / "wide.npz", EMBEDDINGS["wide"])
    data = bytearray((tmp_path / "wide.npz").read_bytes())
    data[data.rfind(b"PK\1\2") + place] = value
    (tmp_path / "wide.npz").write_bytes(data)
    with pytest.raises(UserError, match="not a readable"):
        teacher_features.read(tmp_path / "wide.npz")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["wide.npy", "wide.npz"])
def test_an_array_of_objects_is_refused_unread(data, files, tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (files / "wide.npy").unlink()
    values = np.array([Evil()], dtype=object)
    (np.save if name.endswith("y") else np.savez)(files / name, values, allow_pickle=True)
    assert "not a readable" in refusal(capsys, data, files, tmp_path / "store")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parity
def test_a_pickle_that_would_run_code_is_refused_unread(data, files, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    (files / "wide.npy").unlink()
    torch.save(Evil(), files / "wide.pt")
    error = refusal(capsys, data, files, tmp_path / "store")
    assert "not a file of plain tensors" in error
    assert not (tmp_path / "ran").exists()


def test_boxes_without_masks(files, tmp_path, capsys):
    data = write_data(tmp_path / "bare", masks=False)
    error = refusal(capsys, data, files, tmp_path / "store")
    assert "wide.png: expected a mask for every box" in error
    assert "--masks STORE" in error


def test_a_store_that_lacks_masks(files, tmp_path, capsys):
    data = write_data(tmp_path / "bare", masks=False)
    whole = (data / "data.jsonl").read_text()
    (data / "data.jsonl").write_text(whole.splitlines()[0])
    masks = taught(data, tmp_path / "masks", features=False)
    (data / "data.jsonl").write_text(whole)
    arguments = data, files, tmp_path / "store", "--masks", str(masks.path)
    capsys.readouterr()
    assert "got none for box:0,0,18,44 in images/tall.png" in refusal(capsys, *arguments)


def test_a_store_of_masks_for_another_student(files, tmp_path, capsys):
    data = write_data(tmp_path / "bare", masks=False)
    masks = taught(data, tmp_path / "masks", features=False)
    capsys.readouterr()
    arguments = data, files, tmp_path / "store", "--masks", str(masks.path), "--grid", "2x2"
    assert "expected a store on a 2x2 token grid" in refusal(capsys, *arguments)


def test_a_picture_that_changed_since_its_masks(files, tmp_path, capsys):
    data = write_data(tmp_path / "bare", masks=False)
    masks = taught(data, tmp_path / "masks", features=False)
    Image.new("RGB", SIZES["wide"], (1, 2, 3)).save(data / "images/wide.png")
    assert convert(data, files, tmp_path / "store", "--masks", str(masks.path)) == 2
    assert "wide.png: changed since its masks" in capsys.readouterr().err
