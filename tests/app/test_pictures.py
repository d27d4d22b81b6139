"""An upload becomes a picture of the conversation, or a sentence that names the file."""

import base64
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.image import MAX_PIXELS, load_image
from agevlm_mlx.errors import UserError
from app import pictures
from app.pictures import MAX_UPLOAD, Shown, data_url, take
from tests.app.held import HELD


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def turned(image: Image.Image, orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """The file of an upright `image`, stored as a camera stores it that was held otherwise."""
    method = HELD[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image.transpose(method) if method is not None else image, kind, exif=exif,
                   **options)  # fmt: skip


def shown_on_page(shown: Shown, longest: int = 768) -> Image.Image:
    head, _, content = data_url(shown, longest).partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert head == f"data:image/{str(image.format).lower()};base64"
    return image


def one_colour_png(width: int, height: int, kind: int = 2, depth: int = 8) -> bytes:
    """A grey PNG of any size in a few kilobytes, made without its pixels.

    kind: 2 is RGB, 6 RGBA (half transparent), 0 grey.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    packer, row = (
        zlib.compressobj(1),
        b"\0" + b"\x80" * (width * {0: 1, 2: 3, 6: 4}[kind] * depth // 8),
    )
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- what is taken -----------------------------------------------------------------------------


def test_a_picture_of_ordinary_size_keeps_its_bytes() -> None:
    data = encoded(noise(), "JPEG")
    shown = take("photo.jpg", data)
    assert shown.data == data
    assert (shown.name, shown.size, shown.note) == ("photo.jpg", (64, 48), None)


def test_two_uploads_of_one_file_are_two_pictures() -> None:
    data = encoded(noise())
    first, second = take("a.png", data), take("a.png", data)
    assert first.id != second.id
    assert min(len(first.id), len(second.id)) >= 20
    assert first != second


@pytest.mark.parametrize("orientation", HELD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_photo_has_its_upright_size_and_is_shown_upright(
    orientation: int, kind: str
) -> None:
    upright = Image.new("RGB", (120, 80), (30, 30, 30))
    upright.paste((250, 250, 250), (90, 5, 110, 25))  # up on the right
    shown = take("a", turned(upright, orientation, kind))
    assert shown.size == (120, 80)
    page = np.asarray(shown_on_page(shown).convert("L"), float)
    assert page.shape == (80, 120)
    assert page[8:22, 93:107].min() > 200
    page[:30, 85:115] = 0
    assert page.max() < 80


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert take("a.jpg", encoded(noise(), "JPEG", exif=exif)).size == (64, 48)


@pytest.mark.filterwarnings("ignore")  # Pillow's own
def test_damaged_metadata_do_not_cost_the_photo() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        junk = b"Exif\0\0" + rng.choice([b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0", b""])
        junk += rng.integers(0, 256, 60, np.uint8).tobytes()
        shown = take("a.jpg", encoded(noise(), "JPEG", exif=junk))
        assert shown.size in ((64, 48), (48, 64))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("GIF", {}, "of the animation the first frame"),
        ("WEBP", {"lossless": True}, "of the animation the first frame"),
        ("PNG", {}, "of the animation the first frame"),
        ("TIFF", {}, "of its pages the first"),
    ],
)
def test_of_several_frames_the_first_is_shown_and_said(
    kind: str, options: dict[str, Any], said: str
) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    shown = take("party", data)
    assert shown.note == f"party: {said} is looked at"
    assert shown_on_page(shown).convert("RGB").getpixel((5, 5)) == (255, 0, 0)
    assert take("party", encoded(frames[0], kind)).note is None


def test_a_camera_that_stores_its_preview_beside_a_photo_has_no_animation() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(16, 12)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert take("a.jpg", data).note is None


# --- what is refused ---------------------------------------------------------------------------


def heic(*brands: bytes) -> bytes:
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 4 + len(body)) + body + bytes(40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"these are words, not pixels", "not an image that can be read"),
        (bytes(1000), "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        (encoded(noise())[:900], "damaged or truncated"),
        (encoded(noise(), "JPEG")[:700], "damaged or truncated"),
        (heic(b"heic", b"mif1", b"heic"), "HEIC photo cannot be read yet; export it as JPEG"),
        (heic(b"mif1", b"mif1", b"heix"), "HEIC photo cannot be read yet; export it as JPEG"),
        (one_colour_png(100_000, 1)[:60], "damaged or truncated|not an image"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_with_its_name(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        take("/home/someone/holiday.jpg", data)
    assert str(caught.value).startswith("holiday.jpg: ")
    assert "\n" not in str(caught.value)
    assert "someone" not in str(caught.value)


def test_a_file_with_too_many_bytes_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "open_image", None)
    with pytest.raises(UserError, match=r"a\.png: expected a file of at most 64 MB, got 65 MB"):
        take("a.png", bytes(MAX_UPLOAD + (1 << 20)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60_000, 60_000), "too many pixels to decode safely; make it smaller first"),
        ((2**31 - 1, 2**31 - 1), "too many pixels|not an image"),
        ((0, 10), "with pixels|not an image"),
    ],
)
def test_a_bomb_is_not_decoded(size: tuple[int, int], message: str) -> None:
    data = bytearray(one_colour_png(4, 4))
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match=message) as caught:
        take("a.png", bytes(data))
    assert str(caught.value).startswith("a.png: ")


@pytest.mark.filterwarnings("ignore")  # Pillow's own about damaged metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "MPO"])
def test_damaged_bytes_are_a_picture_or_a_sentence(kind: str) -> None:
    rng = np.random.default_rng(7)
    several = {"save_all": True, "append_images": [noise(16, 16).rotate(90)]}
    options = {} if kind in ("JPEG", "BMP", "ICO") else several
    whole = np.frombuffer(encoded(noise(16, 16), kind, **options), np.uint8)
    for _ in range(60):
        data = whole.copy()
        # The beginning, where the structure is, is damaged as often as the rest.
        reach = rng.choice([40, len(data)])
        places = rng.integers(0, min(reach, len(data)), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        message = "a: "
        try:
            shown = take("a", data.tobytes())
            assert data_url(shown).startswith("data:image/")
        except UserError as error:
            message = str(error)
        assert message.startswith("a: ")
        assert "\n" not in message


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dog.png", "dog.png"),
        ("/tmp/gradio/1234/dog.png", "dog.png"),
        ("C:\\fakepath\\dog.png", "dog.png"),
        ("a/b\\c/ dog.png/", "dog.png"),
        ("Screenshot 1.23\u202fPM.png", "Screenshot 1.23 PM.png"),
        ("two\nlines\tand\x1b[31mred\x00.png", "two lines and[31mred.png"),
        ("gnp.\u202ejpg\u2066\u200f", "gnp.jpg"),
        ("\udcff.png", ".png"),
        ("Äpfel 苹果 🍎.jpg", "Äpfel 苹果 🍎.jpg"),
        ("", "picture"),
        ("..", "picture"),
        ("///", "picture"),
        ("<b>x</b>.png", "b>.png"),
    ],
)
def test_a_name_is_printable_and_has_no_path(name: str, wanted: str) -> None:
    assert take(name, encoded(noise(4, 4))).name == wanted


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    name = take("x" * 5000 + ".jpeg", encoded(noise(4, 4))).name
    assert len(name) == 80
    assert re.fullmatch(r"x+…x+\.jpeg", name)


# --- large pictures ----------------------------------------------------------------------------


def quarters(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (20, 20, 20))
    image.paste((240, 240, 240), (0, 0, width // 2, height // 2))
    return image


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 50 megapixels were 5000, 12 were 1200, and a strip had 700."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5000)
    monkeypatch.setattr(pictures, "_REDUCED", 1200)
    monkeypatch.setattr(pictures, "_STRIP", 700)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "GIF"])
@pytest.mark.parametrize("size", [(120, 90), (73, 131), (640, 480)])
def test_a_large_picture_is_reduced_with_a_note(kind: str, size: tuple[int, int]) -> None:
    shown = take("photo.jpg", encoded(quarters(*size), kind))
    width, height = shown.size
    assert 900 < width * height <= 1200
    assert width / height == pytest.approx(size[0] / size[1], rel=0.06)
    before, after = "{}x{}".format(*size), f"{width}x{height}"
    assert shown.note == f"photo.jpg: {before} pixels, reduced to {after}"
    image = load_image(shown.data)
    assert image.size == shown.size
    wanted = np.asarray(quarters(*size).resize(shown.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(image, float) - wanted).mean() < 6


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("orientation", HELD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_turned_picture_stays_turned(orientation: int, kind: str) -> None:
    shown = take("a.jpg", turned(quarters(160, 90), orientation, kind, quality=95))
    assert shown.size[0] > shown.size[1]
    assert f"160x90 pixels, reduced to {shown.size[0]}x{shown.size[1]}" in str(shown.note)
    image = np.asarray(load_image(shown.data).convert("L"), float)
    assert image.shape == shown.size[::-1]
    height, width = image.shape
    assert image[: height // 2 - 2, : width // 2 - 2].min() > 180
    assert image[height // 2 + 2 :].max() < 80


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_a_large_picture_of_any_mode_keeps_its_colours(mode: str) -> None:
    image = quarters(120, 90)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = image.convert(mode) if mode != "I;16" else image
    kind = "JPEG" if mode == "CMYK" else "PNG"
    shown = take("a", encoded(image, kind))
    values = np.asarray(load_image(shown.data).convert("L"), float)
    height, width = values.shape
    assert values[: height // 2 - 2, : width // 2 - 2].mean() > 200
    assert values[height // 2 + 2 :].mean() < 60


@pytest.mark.usefixtures("small_limits")
def test_transparent_parts_of_a_large_picture_become_white() -> None:
    shown = take("a.png", encoded(Image.new("RGBA", (120, 90), (0, 0, 0, 0))))
    assert np.asarray(load_image(shown.data)).min() == 255


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("size", [(1, 70_000), (70_000, 1), (3, 30_000)])
def test_a_thin_picture_stays_within_what_a_jpeg_can_hold(size: tuple[int, int]) -> None:
    shown = take("strip.png", encoded(Image.new("RGB", size)))
    assert max(shown.size) <= 65_500
    assert load_image(shown.data).size == shown.size


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(("kind", "mode"), [("WEBP", "RGB"), ("JPEG2000", "RGB"), ("TIFF", "F")])
def test_what_takes_too_much_memory_to_reduce_is_refused(kind: str, mode: str) -> None:
    with pytest.raises(UserError, match=r"^a: expected at most .* megapixels, got 120x90; make"):
        take("a", encoded(quarters(120, 90).convert("L").convert(mode), kind))


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_damaged_picture_is_refused(kind: str) -> None:
    data = encoded(noise(120, 90), kind)
    with pytest.raises(UserError, match=r"^a: damaged or truncated image: "):
        take("a", data[: len(data) // 2])


@pytest.mark.usefixtures("small_limits")
def test_both_notes_are_said() -> None:
    frames = [Image.new("RGB", (120, 90), colour) for colour in ("red", "lime")]
    note = take("a.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).note
    assert re.fullmatch(r"a\.gif: of the animation .*; 120x90 pixels, reduced to .*", str(note))


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["JPEG", "RGB", "RGBA", "16-bit grey"])
def test_a_hundred_megapixels_are_reduced(kind: str) -> None:
    if kind == "JPEG":
        data = encoded(Image.new("L", (12_000, 9_000), 128), "JPEG")
    else:
        data = one_colour_png(12_000, 9_000, {"RGB": 2, "RGBA": 6}.get(kind, 0),
                              16 if "16" in kind else 8)  # fmt: skip
    assert MAX_PIXELS < 12_000 * 9_000
    shown = take("photo.jpg", data)
    assert shown.size == (4000, 3000)
    assert shown.note == "photo.jpg: 12000x9000 pixels, reduced to 4000x3000"
    values = np.asarray(shown_on_page(shown).convert("L"))
    assert np.abs(values.astype(int) - (191 if kind == "RGBA" else 128)).max() <= 2


# --- for the page ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted", "kind"),
    [
        ((64, 48), (64, 48), "PNG"),
        ((768, 500), (768, 500), "JPEG"),
        ((2000, 1000), (768, 384), "JPEG"),
        ((500, 2000), (192, 768), "JPEG"),
        ((4000, 100), (768, 19), "PNG"),
        ((1, 3000), (1, 768), "PNG"),
        ((1, 1), (1, 1), "PNG"),
    ],
)
def test_the_page_gets_a_reduced_picture(
    size: tuple[int, int], wanted: tuple[int, int], kind: str
) -> None:
    image = shown_on_page(take("a", encoded(Image.new("RGB", size), "JPEG")))
    assert (image.size, image.format) == (wanted, kind)


def test_transparency_is_white_on_the_page() -> None:
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    for image in (clear, clear.resize((900, 600))):
        assert np.asarray(shown_on_page(take("a.png", encoded(image)))).min() >= 254


def test_the_page_does_not_get_what_else_is_in_the_file() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    exif.get_ifd(0x8825)[1] = "N"
    for size in ((64, 48), (900, 600)):
        for kind in ("JPEG", "PNG", "WEBP"):
            options = {"comment": b"at home"} if kind == "JPEG" else {}
            data = encoded(noise(*size), kind, exif=exif, icc_profile=b"a profile", **options)
            assert b"taken at home" in data
            for longest in (768, 100):
                page = shown_on_page(take("a", data), longest)
                assert not set(page.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
                assert not page.getexif()


def test_the_picture_of_the_page_is_made_once_for_each_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = take("a", encoded(noise(900, 600)))
    small = data_url(shown, 100)
    assert len(small) < len(data_url(shown))
    monkeypatch.setattr(pictures, "open_image", None)
    assert data_url(shown, 100) == small
    assert shown_on_page(shown).size == (768, 512)


def test_a_picture_made_without_take_can_be_shown() -> None:
    shown = Shown("id", "scene.png", encoded(noise(900, 600)), (900, 600))
    assert shown_on_page(shown, 90).size == (90, 60)
