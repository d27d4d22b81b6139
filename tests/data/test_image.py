"""Pixels from any file, and one Geometry for whatever goes with them."""

import contextlib
import hashlib
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.data import image as image_module
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.errors import UserError

SIZE = 48
GRID = (6, 6)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(mode: str) -> Image.Image:
    """8 x 4 px, from dark on the left to bright on the right."""
    grey = np.tile(np.linspace(0, 1, 8), (4, 1))
    if mode == "I;16":
        return Image.fromarray((grey * 65535).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((grey * 65535).astype(np.int32))
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32))
    image = Image.fromarray((grey * 255).astype(np.uint8))
    if mode == "PA":
        return image.convert("P").convert("PA")
    if mode == "CMYK":
        return image.convert("RGB").convert("CMYK")
    return image.convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
)
def test_every_mode_keeps_its_brightness(mode: str) -> None:
    values = np.asarray(load_image(ramp(mode))).astype(float)
    assert values.shape == (4, 8, 3)
    assert values[:, :4].mean() + 60 < values[:, 4:].mean()
    if mode != "1":  # which has dots instead of grey
        np.testing.assert_allclose(values[0].mean(axis=1), np.linspace(0, 255, 8), atol=4)


def test_a_16_bit_png_is_scaled_not_cut() -> None:
    image = load_image(encoded(ramp("I;16")))
    np.testing.assert_allclose(np.asarray(image)[0, :, 0], np.linspace(0, 255, 8), atol=1)


def test_float_images_may_hold_nan_and_infinity() -> None:
    values = np.array([[0.0, 0.5, 1.0], [np.nan, np.inf, -np.inf]], np.float32)
    grey = np.asarray(load_image(Image.fromarray(values)))[..., 0]
    assert grey.tolist() == [[0, 127, 255], [0, 0, 0]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    pixels = np.asarray(load_image(encoded(image.convert(mode))))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_transparent_palette_entries_and_colours_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((1, 0), 1)
    wanted = [[255, 255, 255], [200, 10, 10]]
    assert np.asarray(load_image(encoded(palette, transparency=0)))[0].tolist() == wanted
    keyed = palette.convert("RGB")
    data = encoded(keyed, transparency=(0, 0, 0))
    assert np.asarray(load_image(data))[0].tolist() == wanted


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert load_image(image).getpixel((0, 0)) == (204, 204, 204)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 10, 20))  # the left quarter
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    upright = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40)
    values = np.asarray(upright).mean(axis=2)
    assert values[:8].min() > 200
    assert values[14:].max() < 50


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("P", (4, 4)) for _ in range(2)]
    for frame, colour in zip(frames, ([255, 0, 0], [0, 255, 0]), strict=True):
        frame.putpalette(colour)
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert load_image(data).getpixel((1, 1)) == (255, 0, 0)


def test_path_text_bytes_and_image_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ä picture.png"
    path.write_bytes(encoded(ramp("RGB")))
    wanted = np.asarray(ramp("RGB"))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), wanted)


def huge_png(width: int, height: int) -> bytes:
    """The header of a PNG of any size; there are no pixels in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no such file"),
        ("folder.png", "folder", "got a folder"),
        ("words.png", b"these are words, not pixels", "not an image"),
        ("empty.png", b"", "not an image"),
        ("cut.png", encoded(Image.effect_noise((64, 64), 90))[:900], "truncated"),
        ("cut.jpg", encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
        ("large.png", huge_png(10_000, 10_000), "at most 50 megapixels, got 10000x10000"),
        ("bomb.png", huge_png(100_000, 100_000), "too many pixels"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_image(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def ftyp(*brands: bytes) -> bytes:
    """The first bytes of a file of the MPEG-4 family: its brand, and those it goes with."""
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 4 + len(body)) + body + b"heic" * 20


@pytest.mark.parametrize("brands", [(b"heic",), (b"mif1", b"mif1", b"heix"), (b"msf1", b"hevc")])
def test_a_heic_photo_is_recognised_whatever_it_is_called(
    tmp_path: Path, brands: tuple[bytes, ...]
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(ftyp(*brands))
    said = "a HEIC photo cannot be read yet; export it as JPEG"
    for source, name in ((path, str(path)), (path.read_bytes(), "image")):
        with pytest.raises(UserError) as caught:
            load_image(source)
        assert str(caught.value) == f"{name}: {said}"


@pytest.mark.parametrize("brands", [(b"avif", b"mif1"), (b"mp42", b"isom"), (b"mif1",)])
def test_other_files_of_its_family_are_not_called_heic(brands: tuple[bytes, ...]) -> None:
    with pytest.raises(UserError, match=r"not an image that can be read|damaged"):
        load_image(ftyp(*brands))


def test_an_error_begins_with_the_name_that_is_asked_for() -> None:
    for source in (b"words", encoded(ramp("RGB"))[:60], Image.new("RGB", (0, 3))):
        with pytest.raises(UserError, match=r"^holiday\.png: "):
            load_image(source, name="holiday.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "I;16"])
def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """What is converted some rows at a time is what would be converted at once."""
    values = np.random.default_rng(2).integers(0, 65536, (23, 7, 4), np.uint16)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0])
    else:
        image = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGBA")
        image = image.convert("RGB").convert("P") if mode in ("P", "PA") else image
        image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(0, 250, 2))
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(image_module, "_BAND", 15)  # two rows
    np.testing.assert_array_equal(np.asarray(load_image(image)), whole)


@pytest.mark.parametrize("content", ["whole", "animation", "cut"])
def test_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    noise = Image.effect_noise((64, 64), 90)
    data = (
        encoded(noise)
        if content != "animation"
        else encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)])
    )
    path = tmp_path / "picture"
    path.write_bytes(data[:900] if content == "cut" else data)
    files = []
    opened = Image.open

    def remember(*args: Any, **options: Any) -> Any:
        image = opened(*args, **options)
        files.append(image.fp)
        return image

    monkeypatch.setattr(Image, "open", remember)
    with contextlib.suppress(UserError):
        load_image(path)
    assert [file.closed for file in files] == [True]


def test_the_pixel_limit_comes_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    image = Image.open(io.BytesIO(encoded(ramp("RGB"))))
    monkeypatch.setattr(type(image), "load", decode)
    with pytest.raises(UserError, match=r"at most 3e-05 megapixels, got 8x4"):
        load_image(image, max_pixels=30)


def test_whatever_a_decoder_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise struct.error("unpack requires\n4 bytes")

    image = Image.open(io.BytesIO(encoded(ramp("RGB"))))
    monkeypatch.setattr(type(image), "load", decode)
    with pytest.raises(UserError, match="damaged or truncated image: unpack requires 4 bytes"):
        load_image(image)


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(UserError, match="got 0x3"):
        load_image(Image.new("RGB", (0, 3)))


@pytest.mark.filterwarnings("ignore")  # Pillow's own about damaged metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_bytes_never_give_another_error(kind: str) -> None:
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    whole = np.frombuffer(encoded(ramp("RGB").resize((24, 16)), kind, **options), np.uint8)
    for _ in range(60):
        data = whole.copy()
        places = rng.integers(0, len(data), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        message, mode = "", "RGB"
        try:
            mode = load_image(data.tobytes()[: int(rng.integers(1, 2 * len(data)))]).mode
        except UserError as error:
            message = str(error)
        assert mode == "RGB"
        assert "\n" not in message


# Geometry -------------------------------------------------------------------------------------

preprocessors = st.builds(
    Preprocessor,
    image_size=st.just(SIZE),
    resize=st.sampled_from(("pad", "crop", "stretch")),
    resample=st.sampled_from(("bilinear", "bicubic", "lanczos")),
    convention=st.sampled_from(("agevlm", "transformers", "torchvision", "sam")),
    crop_pct=st.sampled_from((1.0, 0.875, 0.9)),
    fill=st.sampled_from(("mean", "black")),
    image_mean=st.just((0.0, 0.0, 0.0)),
    image_std=st.just((1.0, 1.0, 1.0)),
)
sides = st.integers(20, 150)
unit = st.floats(0, 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(preprocessors, sides, sides, unit, unit, st.floats(0.1, 0.8), st.floats(0.1, 0.8))
@example(Preprocessor(image_size=SIZE, image_mean=(0, 0, 0)), 150, 20, 0.5, 0.5, 0.3, 0.8)
def test_a_blob_and_its_mask_land_in_the_same_cells(
    preprocessor: Preprocessor, width: int, height: int, x: float, y: float, w: float, h: float
) -> None:
    mask = np.zeros((height, width), bool)
    wide, high = max(int(w * width), 4), max(int(h * height), 4)
    left, top = int(x * (width - wide)), int(y * (height - high))
    mask[top : top + high, left : left + wide] = True
    image = Image.fromarray(np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2))
    squeezed, geometry = preprocessor.resized(image)
    cell = SIZE // GRID[0]
    values = np.asarray(squeezed)[..., 0] / 255.0
    painted = values.reshape(GRID[0], cell, GRID[1], cell).mean(axis=(1, 3)).reshape(-1)
    covered = geometry.mask_to_grid(mask, GRID)
    # The resize blurs the edge over neighbouring pixels, so a part of a cell may differ.
    np.testing.assert_allclose(covered, painted, atol=0.2)
    assert abs(covered.sum() - painted.sum()) <= 0.1 + 0.1 * painted.sum()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(preprocessors, sides, sides, st.lists(st.tuples(unit, unit), min_size=1, max_size=5))
def test_to_source_undoes_to_input(
    preprocessor: Preprocessor, width: int, height: int, places: list[tuple[float, float]]
) -> None:
    geometry = preprocessor.geometry(width, height)
    points = np.array(places) * (width, height)
    np.testing.assert_allclose(geometry.to_source(geometry.to_input(points)), points, atol=1e-9)
    exact = geometry.to_input(np.array([[0, 0], [width, height]]))
    corners = exact.round()  # pictures lie on whole pixels
    np.testing.assert_allclose(exact, corners, atol=1e-9)
    resized, fitted = corners[1] - corners[0], int(SIZE / preprocessor.crop_pct)
    if preprocessor.resize == "crop":  # the picture covers the input
        assert corners[0].max() <= 0
        assert corners[1].min() >= SIZE
        assert resized.min() == fitted
    if preprocessor.resize == "pad":
        assert resized.max() == fitted
    if preprocessor.resize == "stretch":
        assert resized.tolist() == [fitted, fitted]
    if preprocessor.convention == "sam":
        assert corners[0].tolist() == [0, 0]
    else:  # in the middle, within a pixel
        assert np.abs(corners.sum(axis=0) - SIZE).max() <= 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(preprocessors, sides, sides, unit, unit)
def test_the_peak_of_a_map_returns_to_its_place(
    preprocessor: Preprocessor, width: int, height: int, x: float, y: float
) -> None:
    geometry = preprocessor.geometry(width, height)
    # What a crop cut off belongs to the nearest cell.
    place = np.clip(geometry.to_input(np.array([[x * width, y * height]])), 0, SIZE)[0]
    column, row = np.minimum(place / SIZE * GRID[0], GRID[0] - 1).astype(int)
    values = np.zeros(GRID, np.float32)
    values[row, column] = 1
    back = geometry.grid_to_source(values)
    assert back.shape == (height, width)
    row, column = np.unravel_index(back.argmax(), back.shape)
    found = np.clip(geometry.to_input(np.array([[column + 0.5, row + 0.5]])), 0, SIZE)[0]
    assert np.abs(found - place).max() <= SIZE / GRID[0]
    assert 0 <= back.min() <= back.max() <= 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(preprocessors, sides, sides)
def test_padding_is_no_coverage_and_the_rest_is_full(
    preprocessor: Preprocessor, width: int, height: int
) -> None:
    geometry = preprocessor.geometry(width, height)
    covered = geometry.mask_to_grid(np.ones((height, width), bool), GRID)
    (x0, y0, x1, y1) = geometry.input_boxes(np.array([[0, 0, width, height]]))[0]
    borders = np.arange(GRID[0] + 1) * SIZE / GRID[0]
    across = np.clip(np.minimum(borders[1:], x1) - np.maximum(borders[:-1], x0), 0, None)
    down = np.clip(np.minimum(borders[1:], y1) - np.maximum(borders[:-1], y0), 0, None)
    wanted = np.outer(down, across) / (SIZE / GRID[0]) ** 2
    np.testing.assert_allclose(covered, wanted.reshape(-1), atol=1e-4)
    assert covered.mean() == pytest.approx(geometry.filled, abs=1e-4)
    assert not geometry.mask_to_grid(np.zeros((height, width), bool), GRID).any()


def test_what_is_shown_is_what_the_picture_covers() -> None:
    """Also where the padding is exactly zero: nowhere else."""
    for convention in ("agevlm", "sam", "torchvision"):
        preprocessor = Preprocessor(
            image_size=16, convention=convention, fill="zero", image_mean=(0.3, 0.4, 0.6)
        )
        pixels, geometry = preprocessor(Image.new("RGB", (48, 16), (255, 255, 255)))
        x0, y0, x1, y1 = geometry.shown
        assert (x0, x1, y1 - y0) == (0, 16, 5)
        assert y0 == (0 if convention == "sam" else 5)
        bright = np.zeros((16, 16), bool)
        bright[y0:y1, x0:x1] = True
        assert (pixels[bright] > 0.5).all()
        assert (pixels[~bright] == 0).all()
    assert Preprocessor(image_size=16, resize="crop").geometry(40, 20).shown == (0, 0, 16, 16)


@pytest.mark.parametrize(
    ("settings", "size", "wanted"),
    [
        # Sides are rounded half up, the longer side of a crop is cut off or not.
        ({"resize": "crop"}, (61, 40), (49, 32, -9, 0)),
        ({"resize": "crop", "convention": "transformers"}, (61, 40), (48, 32, -8, 0)),
        ({"resize": "crop", "convention": "torchvision"}, (61, 40), (48, 32, -8, 0)),
        ({"resize": "crop", "convention": "sam"}, (61, 40), (49, 32, 0, 0)),
        # Of an odd rest, the half: rounded down (outwards), towards zero, or to even.
        ({"resize": "crop"}, (33, 32), (33, 32, -1, 0)),
        ({"resize": "crop", "convention": "transformers"}, (33, 32), (33, 32, 0, 0)),
        ({"resize": "crop", "convention": "torchvision"}, (33, 32), (33, 32, 0, 0)),
        ({"resize": "crop", "convention": "transformers"}, (35, 32), (35, 32, -1, 0)),
        ({"resize": "crop", "convention": "torchvision"}, (35, 32), (35, 32, -2, 0)),
        # Padding: 32 * 21 / 64 = 10.5, and an odd rest.
        ({}, (64, 21), (32, 11, 0, 10)),
        ({"convention": "sam"}, (64, 21), (32, 11, 0, 0)),
        ({"convention": "torchvision"}, (64, 21), (32, 10, 0, 11)),
        ({"convention": "torchvision"}, (64, 22), (32, 11, 0, 10)),
        # 32 / 0.875 = 36.57 px, of which the middle 32 remain.
        ({"resize": "stretch", "crop_pct": 0.875}, (9, 5), (36, 36, -2, -2)),
        ({"resize": "crop", "crop_pct": 0.875}, (36, 72), (36, 72, -2, -20)),
        ({"resize": "pad", "crop_pct": 0.875}, (36, 12), (36, 12, -2, 10)),
        # Never nothing.
        ({}, (1, 1000), (1, 32, 15, 0)),
        ({"convention": "torchvision"}, (1, 1000), (1, 32, 15, 0)),
    ],
)
def test_each_convention_rounds_and_places_in_its_way(
    settings: dict[str, Any], size: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    geometry = Preprocessor(image_size=32, **settings).geometry(*size)
    (x0, y0), (x1, y1) = geometry.to_input(np.array([[0, 0], size])).round(9)
    assert (x1 - x0, y1 - y0, x0, y0) == wanted


def test_the_resized_side_follows_the_image_size() -> None:
    preprocessor = Preprocessor(image_size=224, resize="crop", crop_pct=224 / 256)
    assert preprocessor.geometry(512, 512).scale_x == 0.5
    assert replace(preprocessor, image_size=448).geometry(512, 512).scale_x == 1


def test_the_embedded_default_keeps_its_pixels_to_the_bit() -> None:
    """The shipped model was trained on them, and mask stores carry its fingerprint."""
    default = Preprocessor(image_std=(0.25, 0.25, 0.25))
    values = np.random.default_rng(0).integers(0, 256, (37, 111, 3), dtype=np.uint8)
    pixels, geometry = default(Image.fromarray(values))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "bee31eb4af54b36d"
    assert geometry.to_input(np.array([[0, 0], [111, 37]])).tolist() == [[0, 21], [64, 42]]
    assert default.fingerprint() == "1be1bd503825c69c"


def test_padding_shows_the_mean_colour() -> None:
    preprocessor = Preprocessor(image_size=16, image_mean=(0.2, 0.4, 0.6), image_std=(0.1,) * 3)
    pixels, geometry = preprocessor(Image.new("RGB", (16, 4), (255, 255, 255)))
    assert geometry.offset_y == 6
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:6], 0, atol=0.02)
    np.testing.assert_allclose(pixels[6:10], np.broadcast_to([8, 6, 4], (4, 16, 3)), atol=1e-4)
    black, _ = replace(preprocessor, fill="black")(Image.new("RGB", (16, 4)))
    np.testing.assert_allclose(black, np.broadcast_to([-2, -4, -6], (16, 16, 3)), atol=1e-4)


def test_boxes_are_cut_to_the_input() -> None:
    geometry = Preprocessor(image_size=10, resize="crop").geometry(40, 10)
    boxes = geometry.input_boxes(np.array([[0, 0, 20, 5], [16, 2, 30, 8]]))
    assert boxes.tolist() == [[0, 0, 5, 5], [1, 2, 10, 8]]


def test_a_mask_of_another_size_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="10x20"):
        Preprocessor().geometry(20, 10).mask_to_grid(np.zeros((20, 10), bool), GRID)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_extreme_shapes_still_give_an_input(size: tuple[int, int], resize: Any) -> None:
    pixels, geometry = Preprocessor(image_size=16, resize=resize)(Image.new("RGB", size))
    assert pixels.shape == (16, 16, 3)
    assert geometry.mask_to_grid(np.ones(size[::-1], bool), (4, 4)).max() > 0


def test_a_thin_strip_is_not_blown_up_to_gigabytes() -> None:
    strip = Image.new("RGB", (1, 1_000_000))
    with pytest.raises(UserError, match="too long and thin"):
        Preprocessor(image_size=64, resize="crop")(strip)


def test_settings_survive_their_file() -> None:
    preprocessor = Preprocessor(image_size=32, resize="crop", image_mean=(0.1, 0.2, 0.3))
    assert Preprocessor.from_dict(preprocessor.to_dict()) == preprocessor
    with pytest.raises(UserError, match="image_siz"):
        Preprocessor.from_dict({"image_siz": 3})
    with pytest.raises(UserError, match="image_std > 0"):
        Preprocessor(image_std=(0.0, 1.0, 1.0))
    for crop_pct in (0.0, 1.01, float("nan")):
        with pytest.raises(UserError, match=r"crop_pct in \(0, 1\], got"):
            Preprocessor(crop_pct=crop_pct)


def test_the_fingerprint_follows_the_geometry_only() -> None:
    prints = {
        Preprocessor(
            image_size=size, resize=resize, convention=convention, crop_pct=crop_pct
        ).fingerprint()
        for size in (32, 64)
        for resize in ("pad", "crop", "stretch")
        for convention in ("agevlm", "transformers", "torchvision", "sam")
        for crop_pct in (1.0, 0.9, 0.875)
    }
    assert len(prints) == 2 * 3 * 4 * 3
    for colours in ({"image_mean": (0.0, 0.0, 0.0)}, {"fill": "zero"}, {"resample": "lanczos"}):
        assert Preprocessor(**colours).fingerprint() == Preprocessor().fingerprint()
