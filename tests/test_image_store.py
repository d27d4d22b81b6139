"""Images are looked at once: what counts as the same image, and what the memory may take."""

import io
import os
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import image_store
from agevlm_mlx.errors import UserError
from agevlm_mlx.image_store import ImageStore


@pytest.fixture
def store(tiny_talker):
    it = tiny_talker("cross")
    return ImageStore(it.model, it.preprocessor)


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_the_same_picture_is_looked_at_once(store, noise, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(noise(1)))
    first = store.look(path)
    assert store.look(str(path)) is first
    assert store.look(path.read_bytes()) is first
    assert store.look(first) is first
    assert (store.hits, store.misses, len(store)) == (2, 1, 1)
    path.write_bytes(png(noise(2)))  # the same name, another picture
    assert store.look(path) is not first
    assert (store.hits, store.misses, len(store)) == (2, 2, 2)


def test_pictures_in_memory_are_told_apart(store, noise):
    grey = noise(1).convert("P")
    other = grey.copy()
    other.putpalette([255 - v for v in grey.getpalette()])
    turned = noise(1).copy()
    turned.getexif()[0x0112] = 6
    keys = {store.look(i).key for i in (noise(1), noise(2), grey, other, turned)}
    assert len(keys) == 5
    assert store.look(noise(1)).key in keys
    assert (store.hits, store.misses) == (1, 5)


def test_what_is_kept_is_what_the_model_makes_of_it(store, noise, tiny_talker):
    it = tiny_talker("cross")
    sight = store.look(noise(1))
    pixels, geometry = it.preprocessor(noise(1))
    cache = it.model.see(mx.array(pixels[None]))
    assert sight.geometry == geometry
    for i, (keys, values) in zip(it.model.looking_layers, sight.seen.layers, strict=True):
        assert mx.allclose(cache[i].vision.keys[:, :, 1:], keys, atol=1e-6)
        assert mx.allclose(cache[i].vision.values[:, :, 1:], values, atol=1e-6)


def test_the_oldest_make_room(tiny_talker, noise):
    it = tiny_talker("cross")
    one = ImageStore(it.model, it.preprocessor).look(noise(1)).seen.nbytes
    assert one == 2 * 2 * 16 * 2 * 8 * 4  # layers, keys and values, S, K, H, bytes
    store = ImageStore(it.model, it.preprocessor, max_bytes=2 * one)
    first, second = store.look(noise(1)), store.look(noise(2))
    assert store.look(noise(1)) is first  # used again: the second is now the oldest
    store.look(noise(3))
    assert (len(store), store.nbytes) == (2, 2 * one)
    assert store.look(noise(1)) is first
    assert store.look(noise(2)) is not second
    none = ImageStore(it.model, it.preprocessor, max_bytes=one - 1)
    none.look(noise(1))
    assert (len(none), none.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "no.png", "no.png: no such file"),
        (lambda p: p, "got a folder"),
        (lambda p: str(p / "a\0b"), "not an image|no such file|embedded"),
        (lambda p: b"", "not an image"),
        (lambda p: b"GIF89a", "not an image|damaged"),
        (lambda p: png(Image.effect_noise((50, 50), 9))[:900], "damaged or truncated"),
        (lambda p: Image.new("RGB", (0, 5)), "expected an image with pixels, got 0x5"),
        (lambda p: Image.new("1", (9000, 9000)), "at most 50 megapixels, got 9000x9000"),
    ],
)
def test_what_is_no_image_is_one_line(store, tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        store.look(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert (len(store), store.misses) == (0, 0)


def test_only_pictures_are_opened_whatever_they_are_called(store, tmp_path, monkeypatch):
    """Pillow would hand an EPS, which is a program, to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "photo.png"
    path.write_bytes(eps)
    for source in (path, eps):
        with pytest.raises(UserError, match="not an image"):
            store.look(source)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe or a device"):
        store.look(tmp_path / "pipe")
    for name in ("~nobody-here/a.png", "a" * 5000):
        with pytest.raises(UserError, match=r"not an image|no such file"):
            store.look(name)


def test_a_file_is_not_read_beyond_its_limit(store, tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "MAX_BYTES", 1 << 20)
    path = tmp_path / "film.png"
    with open(path, "wb") as file:
        file.truncate(3 << 20)
    for source in (path, bytes(3 << 20)):
        with pytest.raises(UserError, match="expected an image of at most 1 MB, got 3 MB"):
            store.look(source)


def test_a_long_thin_picture_and_an_animation_have_a_first_frame(store, tmp_path):
    frames = [Image.fromarray(np.full((4, 200), v, np.uint8)) for v in (0, 255)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert store.look(path).geometry.width == 200
