"""A map must light up the place it is about, whatever the picture's shape."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import files, overlay

GRID = (6, 6)


def placed(width: int, height: int, resize: str, x: float, y: float):
    """A picture, its geometry, and a map whose peak is the cell of source point (x, y)."""
    geometry = Preprocessor(image_size=48, resize=resize).geometry(width, height)  # pyright: ignore[reportArgumentType]
    column, row = (geometry.to_input(np.array([[x, y]]))[0] / 48 * 6).astype(int).clip(0, 5)
    attn_map = np.full(GRID, 0.01, np.float32)
    attn_map[row, column] = 0.65
    cell = 48 / 6 / geometry.scale_x, 48 / 6 / geometry.scale_y
    return geometry, attn_map, cell


@given(
    st.integers(20, 300),
    st.integers(20, 300),
    st.sampled_from(["pad", "crop", "stretch"]),
    st.floats(0.3, 0.7),
    st.floats(0.3, 0.7),
)
@settings(max_examples=60, deadline=None)
def test_the_peak_lands_within_one_cell_of_the_object(width, height, resize, u, v):
    if resize == "crop":  # only what is inside the crop can be looked at
        side = min(width, height)
        x, y = width / 2 + (u - 0.5) * side, height / 2 + (v - 0.5) * side
    else:
        x, y = u * width, v * height
    geometry, attn_map, cell = placed(width, height, resize, x, y)
    peak = overlay.peak_point(attn_map, geometry)
    assert abs(peak[0] - x) <= cell[0]
    assert abs(peak[1] - y) <= cell[1]
    size = overlay.display_size(width, height, 144)
    heat = overlay.heat(attn_map, geometry, size)
    assert heat.shape == (size[1], size[0])
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    scale = size[0] / width, size[1] / height
    assert abs((column + 0.5) / scale[0] - x) <= cell[0] + 1 / scale[0]
    assert abs((row + 0.5) / scale[1] - y) <= cell[1] + 1 / scale[1]


@pytest.mark.parametrize("size", [(200, 80), (80, 200), (120, 120)])
def test_the_overlay_is_bright_at_the_peak_and_dark_elsewhere(size: tuple[int, int]):
    grey = Image.new("RGB", size, (140, 140, 140))
    x, y = size[0] * 0.3, size[1] * 0.65
    geometry, attn_map, _ = placed(size[0], size[1], "pad", x, y)
    shown = overlay.overlay(grey, attn_map, geometry, tile=240, peak=False)
    light = np.asarray(shown.convert("L"), float)
    assert max(shown.size) == 240
    k = 240 / max(size)
    peak = overlay.peak_point(attn_map, geometry)
    here = light[int(peak[1] * k), int(peak[0] * k)]
    far = light[int((size[1] - y) * k), int((size[0] - x) * k)]
    assert here > far + 60
    marked = overlay.overlay(grey, attn_map, geometry, tile=240, peak=True)
    changed = np.argwhere(np.asarray(marked) != np.asarray(shown))
    assert len(changed)
    assert np.abs(changed[:, :2].mean(0) - [peak[1] * k, peak[0] * k]).max() < 2


def test_a_shared_scale_leaves_a_weaker_map_dark():
    grey = Image.new("RGB", (60, 60), (140, 140, 140))
    geometry, attn_map, _ = placed(60, 60, "pad", 30, 30)
    own = np.asarray(overlay.overlay(grey, attn_map, geometry), float).max()
    shared = np.asarray(overlay.overlay(grey, attn_map, geometry, top=6.5, peak=False), float)
    assert own > 150 > shared.max()


@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_the_blur_is_a_fraction_of_a_cell_whatever_its_shape(resize: str):
    """A lone cell stays lone: its light does not reach the next but one."""
    geometry = Preprocessor(image_size=48, resize=resize).geometry(600, 200)  # pyright: ignore[reportArgumentType]
    attn_map = np.zeros(GRID, np.float32)
    attn_map[3, 3] = 0.5
    size = overlay.display_size(600, 200, 288)
    levels = overlay.levels(attn_map, geometry, size, 0.5)
    assert levels.shape == (96, 288)
    assert 0.9 < levels.max() <= 1
    rows, columns = np.nonzero(levels > 0.02)
    cell = 8 / geometry.scale_x * 288 / 600, 8 / geometry.scale_y * 96 / 200
    assert 1.5 < (columns.max() - columns.min()) / cell[0] < 3.2
    assert 1.5 < (rows.max() - rows.min()) / cell[1] < 3.2


def test_the_map_does_not_change_the_callers_picture():
    image = Image.new("RGB", (60, 60), (140, 140, 140))
    geometry, attn_map, _ = placed(60, 60, "pad", 30, 30)
    before = image.tobytes(), attn_map.copy()
    overlay.overlay(image, attn_map, geometry)
    assert image.tobytes() == before[0]
    assert (attn_map == before[1]).all()


def test_colours_get_steadily_lighter():
    rgb = overlay.colours(np.linspace(0, 1, 50)).astype(float)
    luminance = rgb @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    assert rgb[0].tolist() == [68, 1, 84]
    assert rgb[-1].tolist() == [253, 231, 37]


def test_a_sheet_has_the_picture_and_a_tile_for_each_word():
    image = Image.new("RGB", (60, 60), (200, 30, 30))
    geometry, attn_map, _ = placed(60, 60, "pad", 30, 30)
    picture = overlay.Picture(image, geometry)
    words = [overlay.WordMap(w, (attn_map,)) for w in ("dog", "car", "tree", "boat")]
    one = overlay.word_sheet([picture], words[:3], question="Is there a dog?", answer="Yes")
    two = overlay.word_sheet([picture], words, question="Is there a dog?", answer="Yes")
    assert one.width == two.width
    assert two.height > one.height + overlay.TILE  # the fifth tile begins a second row
    assert overlay.word_sheet([picture], []).size[0] >= overlay.TILE


def test_several_pictures_stand_side_by_side():
    geometry, attn_map, _ = placed(60, 60, "pad", 30, 30)
    pictures = [overlay.Picture(Image.new("RGB", (60, 60)), geometry)] * 2
    word = overlay.WordMap("dog", (attn_map, attn_map * 0.1))
    sheet = overlay.word_sheet(pictures, [word], question="Which?", answer="The first " * 60)
    assert sheet.width > 2 * overlay.TILE
    with pytest.raises(ValueError, match="zip"):
        overlay.word_sheet(pictures, [overlay.WordMap("dog", (attn_map,))])


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": np.float32(0.5), "bad": float("nan"), "p": tmp_path})
    assert path.read_text() == f'{{\n  "x": 0.5,\n  "bad": null,\n  "p": "{tmp_path}"\n}}\n'
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert '"x": 0.5' in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="got a folder"):
        files.check_writable(tmp_path)
    with pytest.raises(UserError, match="create it first"):
        files.check_writable(tmp_path / "no" / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="got a file"):
        files.make_folder(tmp_path / "file")
    files.check_writable(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
