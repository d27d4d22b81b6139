"""Attention maps as terminal text: where they are bright, how large they are, what is plain."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluation.overlay import Picture, WordMap
from agevlm_mlx.evaluation.terminal import caption, draw, rendering, room

SIZES = {"landscape": (160, 90), "portrait": (90, 160), "square": (64, 64)}
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
ROOM = (60, 20)


def corner_map(corner: tuple[int, int], grid: int = 12) -> np.ndarray:
    """Little attention everywhere, most of it in the last cell of a corner."""
    attn_map = np.full((grid, grid), 0.001, np.float32)
    row, column = (-1 if side else 0 for side in corner)
    attn_map[row, column] = 1 - 0.001 * (grid * grid - 1)
    return attn_map


def colour(code: list[int]) -> tuple[int, ...]:
    """What a terminal shows for the numbers of a colour sequence."""
    if code[1] == 2:
        return tuple(code[2:])
    number = code[2]
    if number >= 232:
        return (8 + 10 * (number - 232),) * 3
    steps = (0, 95, 135, 175, 215, 255)
    number -= 16
    return steps[number // 36], steps[number // 6 % 6], steps[number % 6]


def pixels(text: str) -> np.ndarray:
    """The picture that a terminal makes of half blocks: u8 [2 lines, columns, 3]."""
    rows = []
    for line in text.split("\n"):
        assert line.endswith("\x1b[0m")
        upper, lower, now = [], [], {38: (0, 0, 0), 48: (0, 0, 0)}
        for code, letter in re.findall(r"\x1b\[([\d;]*)m|(.)", line[: -len("\x1b[0m")]):
            if code:
                numbers = [int(n) for n in code.split(";")]
                now[numbers[0]] = colour(numbers)
            else:
                assert letter in "\u2580+"
                # The mark covers what it is on: its neighbour stands in for that.
                upper.append(upper[-1] if letter == "+" and upper else now[38])
                lower.append(lower[-1] if letter == "+" and lower else now[48])
        rows += [upper, lower]
    return np.array(rows)


def light(text: str, how: str) -> np.ndarray:
    """How bright each place of a drawing is, f[h w]."""
    if how != "shades":
        return pixels(text).mean(-1)
    lines = text.split("\n")
    assert lines[0] == lines[-1] == "+" + "-" * (len(lines[0]) - 2) + "+"
    assert all(line[0] == line[-1] == "|" for line in lines[1:-1])
    return np.array([[" .:-=+*#%@".index(c) for c in line[1:-1]] for line in lines[1:-1]], float)


@pytest.mark.parametrize("how", ["truecolor", "256", "shades"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("corner", CORNERS)
def test_the_corner_looked_at_is_the_brightest(how, shape, corner):
    image = Image.new("RGB", SIZES[shape], (120, 120, 120))
    geometry = Preprocessor(image_size=48, resize="stretch").geometry(*image.size)
    values = light(draw(image, corner_map(CORNERS[corner]), geometry, how, ROOM), how)
    down, right = CORNERS[corner]
    height, width = values.shape
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (row > height * 0.8) if down else (row < height * 0.2)
    assert (column > width * 0.8) if right else (column < width * 0.2)
    quarters = [
        values[half : half + height // 2, side : side + width // 2].mean()
        for half in (0, height - height // 2)
        for side in (0, width - width // 2)
    ]
    assert int(np.argmax(quarters)) == 2 * down + right


@pytest.mark.parametrize("how", ["truecolor", "256"])
def test_the_strongest_place_is_marked(how):
    image = Image.new("RGB", (160, 90), (250, 250, 250))
    geometry = Preprocessor(image_size=48, resize="stretch").geometry(160, 90)
    text = re.sub(r"\x1b\[[\d;]*m", "", draw(image, corner_map((1, 0)), geometry, how, ROOM))
    assert text.count("+") == 1
    lines = text.split("\n")
    row = next(n for n, line in enumerate(lines) if "+" in line)
    assert row >= len(lines) - 2
    assert lines[row].index("+") <= 3


@pytest.mark.parametrize("how", ["truecolor", "256", "shades"])
@pytest.mark.parametrize("size", [(160, 90), (90, 160), (2000, 10), (10, 2000), (1, 1)])
@pytest.mark.parametrize("space", [(60, 20), (200, 40), (4, 4)])
def test_a_drawing_fits_and_keeps_the_shape_of_its_picture(how, size, space):
    image = Image.new("RGB", size)
    geometry = Preprocessor(image_size=16, resize="stretch").geometry(*size)
    text = draw(image, np.ones((4, 4), np.float32) / 16, geometry, how, space)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")
    assert len(lines) <= space[1]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= space[0]
    frame = 2 if how == "shades" else 0
    wide, high = len(lines[0]) - frame, 2 * (len(lines) - frame)
    if min(size) > 10 and min(space) > 10:
        assert wide / high == pytest.approx(size[0] / size[1], rel=0.08)
        assert wide + frame == space[0] or high + 2 * frame == 2 * space[1]


def test_a_picture_shows_through_where_the_word_looked():
    colours = np.zeros((80, 80, 3), np.uint8)
    colours[:40, :40], colours[40:, 40:] = (255, 0, 0), (0, 0, 255)
    geometry = Preprocessor(image_size=16).geometry(80, 80)
    attn_map = np.zeros((4, 4), np.float32)
    attn_map[:2, :2] = 0.25
    shown = pixels(draw(Image.fromarray(colours), attn_map, geometry, "truecolor", (40, 20)))
    assert shown.shape == (40, 40, 3)
    red, blue = shown[4:8, 4:8].mean((0, 1)), shown[32:36, 32:36].mean((0, 1))
    assert red[0] > 200
    assert blue[2] > max(blue[:2])
    assert blue.max() < 120


def test_rows_and_columns_of_the_picture_keep_their_order():
    ramp = np.arange(48, dtype=np.uint8)
    colours = np.stack(
        [np.zeros((48, 48)), ramp[:, None] * 5 + 0 * ramp, ramp * 5 + 0 * ramp[:, None]]
    )
    image = Image.fromarray(colours.transpose(1, 2, 0).astype(np.uint8))
    geometry = Preprocessor(image_size=16).geometry(48, 48)
    attn_map = np.ones((4, 4), np.float32) / 16
    shown = pixels(draw(image, attn_map, geometry, "truecolor", (24, 12))).astype(int)
    assert shown.shape == (24, 24, 3)
    assert (np.diff(np.median(shown[..., 1], 1)) > 0).all()
    assert (np.diff(np.median(shown[..., 2], 0)) > 0).all()
    fewer = pixels(draw(image, attn_map, geometry, "256", (24, 12)))
    assert np.abs(fewer - shown).mean() < 20


def test_no_cell_of_a_fine_map_gets_lost():
    image = Image.new("RGB", (64, 64))
    geometry = Preprocessor(image_size=64).geometry(64, 64)
    for cell in range(32):
        attn_map = np.zeros((32, 32), np.float32)
        attn_map[cell, cell] = 1
        values = light(draw(image, attn_map, geometry, "shades", (20, 12)), "shades")
        row, column = np.unravel_index(values.argmax(), values.shape)
        assert abs((row + 0.5) / values.shape[0] - (cell + 0.5) / 32) < 0.1
        assert abs((column + 0.5) / values.shape[1] - (cell + 0.5) / 32) < 0.1


# --- what a terminal can show ------------------------------------------------------------------


class Screen(io.StringIO):
    def __init__(self, encoding: str = "utf-8", tty: bool = True) -> None:
        super().__init__()
        self._encoding, self._tty = encoding, tty

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize(
    ("screen", "environ", "how"),
    [
        (Screen(), {"COLORTERM": "truecolor"}, "truecolor"),
        (Screen("UTF8"), {"COLORTERM": "24bit"}, "truecolor"),
        (Screen(), {}, "256"),
        (Screen(), {"COLORTERM": "yes"}, "256"),
        (Screen(), {"COLORTERM": "truecolor", "NO_COLOR": "1"}, "shades"),
        (Screen(), {"COLORTERM": "truecolor", "NO_COLOR": ""}, "truecolor"),
        (Screen(), {"COLORTERM": "truecolor", "TERM": "dumb"}, "shades"),
        (Screen("ascii"), {"COLORTERM": "truecolor"}, "shades"),
        (Screen(tty=False), {"COLORTERM": "truecolor"}, "shades"),
    ],
)
def test_colour_needs_a_terminal_that_shows_it(screen, environ, how):
    assert rendering(screen, environ) == how


def test_the_room_is_the_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "30")
    assert room() == (119, 26)
    monkeypatch.setenv("LINES", "300")
    assert room()[1] <= 40
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setenv("LINES", "1")
    assert min(room()) >= 4


# --- the line below ----------------------------------------------------------------------------


def picture(width: int, height: int) -> Picture:
    geometry = Preprocessor(image_size=16).geometry(width, height)
    return Picture(Image.new("RGB", (width, height)), geometry)


def test_the_caption_says_how_much_and_where():
    attn_map = np.zeros((4, 4), np.float32)
    attn_map[1, 3] = 0.75
    text = caption(WordMap("dog", (attn_map,)), [picture(160, 160)], ["a.png"])
    assert text == (
        "dog (answered): 75% of the attention on a.png, strongest at (140, 60) of 160x160 px"
    )


def test_with_several_pictures_the_caption_names_the_one_looked_at():
    low, high = np.full((4, 4), 0.01, np.float32), np.zeros((4, 4), np.float32)
    high[0, 0] = 0.5
    word = WordMap("cat", (low, high), "user")
    text = caption(word, [picture(160, 160), picture(80, 80)], ["a.png", "b.png"])
    assert text == (
        "cat (asked): attention 16% on a.png, 50% on b.png; most in b.png, "
        "strongest at (10, 10) of 80x80 px"
    )


def test_attention_on_the_padding_is_said():
    attn_map = np.zeros((4, 4), np.float32)
    attn_map[0, 0] = 1  # above a picture twice as wide as high
    assert "in the padding" in caption(WordMap("sky", (attn_map,)), [picture(160, 80)], ["a"])
