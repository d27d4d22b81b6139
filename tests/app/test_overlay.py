"""The page must light up the place that was looked at, whatever the picture's shape."""

import base64
import io
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.image import Geometry, Preprocessor, load_image
from agevlm_mlx.evaluation.grounding import grounding_score
from agevlm_mlx.evaluation.words import Look
from app import overlay
from app.pictures import take
from tests.app.held import HELD

GRID = (8, 8)


def pixels(png: bytes) -> np.ndarray:
    """u8[h w 4] of a layer."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def brightest(png: bytes) -> tuple[float, float]:
    """(x, y) of the middle of the brightest, most opaque pixels, in fractions of the layer."""
    rgba = pixels(png).astype(float)
    weight = rgba[..., 3] * 1000 + rgba[..., :3].sum(-1)
    rows, columns = np.nonzero(weight == weight.max())
    return (columns.mean() + 0.5) / rgba.shape[1], (rows.mean() + 0.5) / rgba.shape[0]


def looking_at(
    geometry: Geometry, x: float, y: float, grid: tuple[int, int] = GRID
) -> tuple[np.ndarray, tuple[float, float]]:
    """A map with its peak in the cell of the source point x, y (fractions), and that cell's
    width and height in fractions of the picture."""
    place = geometry.to_input(np.array([[x * geometry.width, y * geometry.height]]))[0]
    side = geometry.image_size
    column, row = (place / side * grid[::-1]).astype(int).clip(0, np.array(grid[::-1]) - 1)
    attn_map = np.full(grid, 0.002, np.float32)
    attn_map[row, column] = 0.6
    cell = (
        side / grid[1] / geometry.scale_x / geometry.width,
        side / grid[0] / geometry.scale_y / geometry.height,
    )
    return attn_map, cell


def look(*maps: np.ndarray, **about: Any) -> Look:
    """A look of two layers and two heads, all alike."""
    values = np.stack([np.stack([np.stack(maps)] * 2)] * 2).astype(np.float16)
    fields = {"word": "dog", "role": "user", "start": 11, "end": 14, "names": True}
    return Look(**{**fields, **about}, values=values)


def decoded(url: str) -> bytes:
    head, _, content = url.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(content, validate=True)


# --- the place ---------------------------------------------------------------------------------

SIZES = [(400, 300), (300, 400), (333, 333), (1200, 400), (97, 411), (12, 9), (4000, 3000),
         (40, 1600), (1600, 40)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("convention", ["agevlm", "sam"])
def test_the_peak_is_where_it_was_put(size: tuple[int, int], resize: Any, convention: Any) -> None:
    geometry = Preprocessor(image_size=64, resize=resize, convention=convention).geometry(*size)
    # Of a crop, points inside it: the rest cannot be looked at.
    (x0, y0), (x1, y1) = np.clip(geometry.to_source(np.array([[0, 0], [64, 64]])) / size, 0, 1)
    for u, v in ((0.5, 0.5), (0.85, 0.3), (0.02, 0.98)):
        x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
        attn_map, cell = looking_at(geometry, x, y)
        found = overlay.peak(attn_map, geometry)
        left, top, right, bottom = found["box"]
        rounding = 1e-4
        assert left - rounding <= x <= right + rounding
        assert top - rounding <= y <= bottom + rounding
        assert 0 <= left <= found["x"] <= right <= 1
        assert 0 <= top <= found["y"] <= bottom <= 1
        assert right - left <= cell[0] + 2 * rounding
        assert bottom - top <= cell[1] + 2 * rounding
        png = overlay.layer(attn_map, geometry, 0.6)
        width, height = Image.open(io.BytesIO(png)).size
        at = brightest(png)
        # Within one token's cell, or a pixel of the layer where that is larger.
        assert abs(at[0] - x) <= max(cell[0], 1 / width)
        assert abs(at[1] - y) <= max(cell[1], 1 / height)


@pytest.mark.parametrize("grid", [(4, 8), (8, 4), (1, 6), (1, 1), (24, 24)])
@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_a_grid_need_not_be_square(grid: tuple[int, int], size: tuple[int, int]) -> None:
    geometry = Preprocessor(image_size=48).geometry(*size)
    for x, y in ((0.2, 0.7), (0.9, 0.1)):
        attn_map, cell = looking_at(geometry, x, y, grid)
        left, top, right, bottom = overlay.peak(attn_map, geometry)["box"]
        assert left <= x <= right
        assert top <= y <= bottom
        at = brightest(overlay.layer(attn_map, geometry, 0.6))
        assert abs(at[0] - x) <= cell[0]
        assert abs(at[1] - y) <= cell[1]


@pytest.mark.parametrize("orientation", HELD)
@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_a_turned_photo_lights_up_where_its_upright_self_shows_it(
    orientation: int, resize: Any
) -> None:
    """From the file to the layer: a model that looks at what is bright."""
    upright = Image.new("RGB", (300, 200))
    upright.paste((255, 255, 255), (200, 30, 225, 55))
    exif = Image.Exif()
    exif[0x0112] = orientation
    method, file = HELD[orientation], io.BytesIO()
    stored = upright.transpose(method) if method is not None else upright
    stored.save(file, "JPEG", exif=exif)
    shown = take("photo.jpg", file.getvalue())
    squeezed, geometry = Preprocessor(image_size=64, resize=resize, image_mean=(0, 0, 0)).resized(
        load_image(shown.data)
    )
    attn_map = np.asarray(squeezed, np.float32)[..., 0].reshape(8, 8, 8, 8).mean((1, 3))
    attn_map /= attn_map.sum()
    _, cell = looking_at(geometry, 0.5, 0.5)
    wanted = 212.5 / 300, 42.5 / 200
    found = overlay.peak(attn_map, geometry)
    at = brightest(overlay.layer(attn_map, geometry, attn_map.max()))
    for x, y in ((found["x"], found["y"]), at):
        assert abs(x - wanted[0]) <= cell[0]
        assert abs(y - wanted[1]) <= cell[1]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 1000), (1000, 1)])
@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_the_smallest_pictures_have_a_layer_and_a_peak(size: tuple[int, int], resize: Any) -> None:
    geometry = Preprocessor(image_size=64, resize=resize).geometry(*size)
    attn_map, _ = looking_at(geometry, 0.5, 0.5)
    shown = pixels(overlay.layer(attn_map, geometry, 0.6))
    assert max(shown.shape[:2]) == 192
    # A crop of the thinnest shows the model less than a pixel of the layer.
    assert shown[..., 3].max() > (0 if resize == "crop" else 100)
    found = overlay.peak(attn_map, geometry)
    assert 0 <= found["x"] <= 1
    assert 0 <= found["y"] <= 1


def test_a_look_into_the_padding_points_at_nothing_outside_the_picture() -> None:
    geometry = Preprocessor(image_size=64).geometry(400, 100)  # rows 3 and 4 of 8 show it
    attn_map = np.full(GRID, 0.001, np.float32)
    attn_map[0, 0] = 0.9
    attn_map[4, 6] = 0.05
    found = overlay.peak(attn_map, geometry)
    assert found["box"] == [0.75, 0.5, 0.875, 1]
    word = overlay.word_json(look(attn_map), [geometry])
    assert word["peak"] == {"picture": 0, **found}
    at = brightest(decoded(word["layers"][0]))
    assert abs(at[0] - 0.8125) <= 0.125
    assert abs(at[1] - 0.75) <= 0.5


def test_a_cell_that_lies_partly_in_the_padding_is_cut_to_the_picture() -> None:
    geometry = Preprocessor(image_size=64).geometry(640, 100)  # 10 px high at y 27
    attn_map = np.full(GRID, 0.001, np.float32)
    attn_map[3, 2] = 0.9  # y 24 to 32
    box = overlay.peak(attn_map, geometry)["box"]
    assert box == [0.25, 0, 0.375, 0.5]
    assert overlay.peak(attn_map, geometry)["y"] == 0.25


def test_a_layer_has_the_shape_of_the_whole_picture() -> None:
    for size, wanted in (((400, 300), (192, 144)), ((300, 1200), (48, 192)), ((7, 7), (192, 192))):
        for resize in ("pad", "crop", "stretch"):
            geometry = Preprocessor(image_size=64, resize=resize).geometry(*size)
            attn_map, _ = looking_at(geometry, 0.5, 0.5)
            image = Image.open(io.BytesIO(overlay.layer(attn_map, geometry, 0.6)))
            assert image.size == wanted
    large = overlay.layer(attn_map, geometry, 0.6, longest=500)
    assert Image.open(io.BytesIO(large)).size == (500, 500)


# --- colour and opacity ------------------------------------------------------------------------


def test_more_attention_is_more_opaque_and_lighter() -> None:
    """A ramp across the picture: along it neither opacity nor lightness may fall."""
    geometry = Preprocessor(image_size=64).geometry(64, 64)
    ramp = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1))
    shown = pixels(overlay.layer(ramp, geometry, 1.0)).astype(float)[96]
    luminance = shown[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(shown[:, 3]) >= 0).all()
    assert (np.diff(luminance) >= 0).all()
    assert len(np.unique(shown[:, 3])) > 40  # no bands
    assert shown[0, 3] <= 8
    assert shown[-1].tolist() == [253, 231, 37, 255]


def test_nothing_is_transparent() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 300)
    attn_map = np.zeros(GRID, np.float32)
    attn_map[1, 1] = 0.5
    alpha = pixels(overlay.layer(attn_map, geometry, 0.5))[..., 3]
    assert alpha[36, 36] >= 240
    assert (alpha[96:] == 0).all()
    assert (alpha[:, 96:] == 0).all()


def test_what_was_cropped_away_is_transparent() -> None:
    geometry = Preprocessor(image_size=64, resize="crop").geometry(400, 200)
    alpha = pixels(overlay.layer(np.ones(GRID, np.float32), geometry, 1.0))[..., 3]
    assert (alpha[:, 49:143] == 255).all()
    assert (alpha[:, :47] == 0).all()
    assert (alpha[:, 145:] == 0).all()


def test_the_scale_is_the_callers() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 300)
    attn_map, _ = looking_at(geometry, 0.4, 0.4)
    strong = pixels(overlay.layer(attn_map, geometry, 0.6))[..., 3].max()
    weak = pixels(overlay.layer(attn_map, geometry, 6.0))[..., 3].max()
    assert strong >= 240
    assert 10 < weak < 80
    assert pixels(overlay.layer(attn_map, geometry, 0.06))[..., 3].max() == 255


def test_a_look_everywhere_shows_no_place() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    attn_map = np.full(GRID, 1 / 64, np.float32)
    shown = pixels(overlay.layer(attn_map, geometry, 1 / 64)).reshape(-1, 4)
    assert len(np.unique(shown, axis=0)) == 1
    word = overlay.word_json(look(attn_map), [geometry])
    assert word["grounding"] == pytest.approx(0, abs=1e-3)
    assert word["on_image"] == pytest.approx(1, abs=1e-3)


def test_a_look_nowhere_shows_nothing() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    nothing = np.zeros(GRID, np.float32)
    assert pixels(overlay.layer(nothing, geometry, 0.0))[..., 3].max() == 0
    word = overlay.word_json(look(nothing, nothing), [geometry] * 2)
    assert word["peak"] is None
    assert word["layers"] == [None, None]
    assert (word["grounding"], word["on_image"]) == (0, 0)


def test_a_layer_is_a_small_file() -> None:
    """Also of a fine grid with attention here and there."""
    rng = np.random.default_rng(0)
    geometry = Preprocessor(image_size=64).geometry(640, 480)
    for cells, limit in ((8, 6_000), (24, 12_000)):
        attn_map = rng.dirichlet(np.full(cells * cells, 0.05)).reshape(cells, cells)
        assert len(overlay.layer(attn_map.astype(np.float32), geometry, attn_map.max())) < limit


# --- a word ------------------------------------------------------------------------------------


def test_the_pictures_of_a_word_share_one_scale() -> None:
    geometries = [Preprocessor(image_size=64).geometry(*size) for size in SIZES[:4]]
    strong, cell = looking_at(geometries[2], 0.7, 0.2)
    half, _ = looking_at(geometries[0], 0.3, 0.6)
    faint, _ = looking_at(geometries[1], 0.3, 0.6)
    maps = [half / 4, faint / 60, strong / 2, faint / 40]
    word = overlay.word_json(look(*maps), geometries)
    assert word["peak"]["picture"] == 2
    assert abs(word["peak"]["x"] - 0.7) <= cell[0]
    assert abs(word["peak"]["y"] - 0.2) <= cell[1]
    assert word["layers"][1] is not None  # 3 % of the strongest
    alpha = [pixels(decoded(url))[..., 3].max() if url else 0 for url in word["layers"]]
    assert alpha[2] >= 240
    assert 100 < alpha[0] < 200
    assert 0 < alpha[1] < alpha[0]


def test_a_picture_with_next_to_nothing_has_no_layer() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    strong, _ = looking_at(geometry, 0.7, 0.2)
    layers = overlay.word_json(look(strong * 0.015, strong, strong * 0.025), [geometry] * 3)
    assert [url is None for url in layers["layers"]] == [True, False, False]


def test_a_word_says_who_said_it_and_how_definite_it_is() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    attn_map, _ = looking_at(geometry, 0.7, 0.2)
    word = overlay.word_json(look(attn_map, role="assistant", names=False), [geometry])
    about = {name: word[name] for name in ("role", "start", "end", "text", "names")}
    assert about == {"role": "assistant", "start": 11, "end": 14, "text": "dog", "names": False}
    assert word["on_image"] == pytest.approx(attn_map.sum(), abs=1e-3)
    assert word["grounding"] == pytest.approx(grounding_score(attn_map), abs=1e-3)
    assert set(word) == {*about, "on_image", "grounding", "peak", "layers"}


def test_one_layer_and_head_can_be_chosen() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 300)
    places = {(i, j): (0.2 + 0.6 * i, 0.2 + 0.6 * j) for i in (0, 1) for j in (0, 1)}
    values = np.zeros((2, 2, 1, *GRID), np.float16)
    for (i, j), place in places.items():
        values[i, j, 0] = looking_at(geometry, *place)[0] * (0.4 + 0.2 * i + 0.4 * j)
    one = replace(look(values[0, 0, 0]), values=values)
    for (i, j), (x, y) in places.items():
        word = overlay.word_json(one, [geometry], i, j)
        at = brightest(decoded(word["layers"][0]))
        for found in (at, (word["peak"]["x"], word["peak"]["y"])):
            assert abs(found[0] - x) <= 1 / 8
            assert abs(found[1] - y) <= 1 / 8
        assert word["on_image"] == pytest.approx(values[i, j].astype(np.float32).sum(), abs=1e-3)
    whole = overlay.word_json(one, [geometry])
    assert whole["on_image"] == pytest.approx(values.astype(np.float32).sum() / 4, abs=1e-3)
    assert overlay.word_json(one, [geometry], head=1)["peak"]["y"] > 0.5
    assert overlay.word_json(one, [geometry], layer=1)["peak"]["x"] > 0.5


@dataclass(frozen=True)
class BrokenLook:
    """What a model whose numbers overflowed gives."""

    values: np.ndarray
    word: str = "dog"
    role: str = "user"
    start: int = 0
    end: int = 3
    names: bool = True

    def attention(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_model_without_numbers_still_gives_json(bad: float, all_of_it: bool) -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    values = np.full((1, *GRID), 0.01, np.float32)
    values[:, :, (slice(None) if all_of_it else 3)] = bad
    word = overlay.word_json(BrokenLook(values), [geometry])  # pyright: ignore[reportArgumentType]
    assert json.loads(json.dumps(word, allow_nan=False)) == word


def test_maps_and_pictures_must_belong_together() -> None:
    geometry = Preprocessor(image_size=64).geometry(300, 200)
    with pytest.raises(ValueError, match="zip"):
        overlay.word_json(look(np.ones(GRID)), [geometry] * 2)
