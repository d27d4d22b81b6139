"""A conversation with its images in one file: it goes on exactly, and only with its own model."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import save_prompt_cache
from PIL import Image

from agevlm_mlx import prompt_cache
from agevlm_mlx.conversation import Conversation
from agevlm_mlx.errors import UserError
from agevlm_mlx.generate import main
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.weights import load

SHORT = Sampling(max_tokens=6)


def ask(chat, text, images=()):
    return "".join(p.text for p in chat.ask(text, images, SHORT)).strip()


@pytest.fixture
def saved(talker, noise, tmp_path):
    chat = Conversation(talker)
    ask(chat, "Is there a dog?", [noise(1), noise(2)])
    path = tmp_path / "chat.safetensors"
    prompt_cache.save(path, chat)
    return path, chat


def test_it_goes_on_with_the_same_words(talker, noise, saved):
    path, chat = saved
    again = prompt_cache.load(path, talker)
    assert [(t.role, t.text, len(t.images)) for t in again.turns] == [
        (t.role, t.text, len(t.images)) for t in chat.turns
    ]
    for question, images in [
        ("Where is the car?", ()),
        ("Describe the image.", noise(3)),
        ("Yes?", ()),
    ]:
        assert ask(again, question, images) == ask(chat, question, images)
    assert again.store.misses == 1  # the third image; the first two came with the file
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_maps_come_from_the_file_but_not_pictures(tiny_talker, noise, tmp_path):
    it = tiny_talker("cross")
    chat = Conversation(it)
    ask(chat, "Is there a dog?", noise(1))
    prompt_cache.save(tmp_path / "a.safetensors", chat)
    again = prompt_cache.load(tmp_path / "a.safetensors", it)
    for here, there in zip(chat.word_maps(), again.word_maps(), strict=True):
        assert np.allclose(here.maps, there.maps, atol=1e-6)
    with pytest.raises(UserError, match="keeps no pictures"):
        again.pictures()


def test_a_bounded_text_can_be_saved_and_loaded_again(tiny_talker, noise, tmp_path):
    it = tiny_talker("cross")
    chat = Conversation(it, max_kv_size=32)
    ask(chat, "Is there a dog?", noise(1))
    for n in range(2):
        path = tmp_path / f"{n}.safetensors"
        prompt_cache.save(path, chat)
        other = prompt_cache.load(path, it)  # the file knows its max_kv_size
        assert ask(other, "Where is the car?") == ask(chat, "Where is the car?")
        chat = other


def test_another_checkpoint_refuses_it(tiny_talker, noise, tmp_path, saved):
    path, chat = saved
    folder = tmp_path / "other"
    shutil.copytree(chat.loaded.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    with pytest.raises(UserError, match=r"made by another checkpoint: expected .*, got "):
        prompt_cache.load(path, load(folder))


def test_damaged_and_foreign_files_are_one_line(tiny_talker, tmp_path, noise):
    it = tiny_talker("cross")
    chat = Conversation(it)
    ask(chat, "Is there a dog?", noise(1))
    good = tmp_path / "good.safetensors"
    prompt_cache.save(good, chat)
    data = good.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed["__metadata__"])
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    track = next(k for k, v in header["__metadata__"].items() if k.endswith("track"))
    seen = next(k for k, v in header["__metadata__"].items() if k.endswith("seen"))
    sights = next(k for k, v in header["__metadata__"].items() if k.endswith("sights"))
    classes = next(k for k, v in header["__metadata__"].items() if v == "VisionCache")
    turns = next(k for k, v in header["__metadata__"].items() if k.endswith("turns"))
    limit = next(k for k, v in header["__metadata__"].items() if k.endswith("max_kv_size"))

    def retyped(kind):
        changed = json.loads(json.dumps(header))
        for name, about in changed.items():
            if name != "__metadata__" and about["dtype"] == "F32" and len(about["shape"]) == 4:
                about["dtype"] = kind
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    cases = {
        "integers": retyped("I32"),
        "size": with_header(lambda m: m.update({limit: "Infinity"})),
        "many images": with_header(lambda m: m.update({turns: '[["user","x",1000000000000]]'})),
        "no text": with_header(lambda m: m.update({turns: '[["user",5,1],["assistant","a",0]]'})),
        "no answer": with_header(lambda m: m.update({turns: '[["user","x",1]]'})),
        "no role": with_header(lambda m: m.update({turns: '[["king","x",1],["assistant","a",0]]'})),
        "empty": b"",
        "text": b"no tensors",
        "cut": data[: len(data) // 2],
        "no metadata": with_header(lambda m: m.clear()),
        "tokens": with_header(lambda m: m.update({track: "[1, 2]"})),
        "images": with_header(lambda m: m.update({seen: '[[0, "a"], [0, "b"]]'})),
        "geometry": with_header(lambda m: m.update({sights: '[["a", {"width": -1}]]'})),
        "no json": with_header(lambda m: m.update({track: "{"})),
        "class": with_header(lambda m: m.update({classes: "deepcopy"})),
        "other class": with_header(lambda m: m.update({classes: "KVCache"})),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a prompt cache that agevlm saved|damaged") as e:
            prompt_cache.load(path, it)
        assert "\n" not in str(e.value), name
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), it.model.make_cache()[:1])
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), {"a": mx.ones(3)})
    for name in ("theirs", "plain"):
        with pytest.raises(UserError, match="not a prompt cache that agevlm saved"):
            prompt_cache.load(tmp_path / f"{name}.safetensors", it)
    with pytest.raises(UserError, match="no such file; make one with --save-prompt-cache"):
        prompt_cache.load(tmp_path / "no.safetensors", it)


def test_nothing_to_save_and_a_draft_are_refused(tiny_talker, noise, tmp_path):
    it = tiny_talker("cross")
    with pytest.raises(UserError, match="nothing was asked yet"):
        prompt_cache.save(tmp_path / "a.safetensors", Conversation(it))
    chat = Conversation(it, draft_model=it.model.language_model)
    ask(chat, "Is there a dog?", noise(1))
    with pytest.raises(UserError, match="draft model cannot be saved"):
        prompt_cache.save(tmp_path / "a.safetensors", chat)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_file(tiny_talker, noise, tmp_path, monkeypatch):
    it = tiny_talker("cross")
    chat = Conversation(it)
    ask(chat, "Is there a dog?", noise(1))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        prompt_cache.save(path, chat)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_command_saves_and_goes_on(talker, noise, tmp_path, capsys):
    photo, cache = tmp_path / "photo.png", tmp_path / "seen.safetensors"
    noise(1).save(photo)
    model = ["--model", str(talker.path), "--max-tokens", "6"]

    def run(*args):
        code = main([*model, *map(str, args)])
        return code, capsys.readouterr()

    code, said = run("--image", photo, "--prompt", "Is there a dog?", "--save-prompt-cache", cache)
    assert code == 0
    assert str(cache) in said.err
    chat = Conversation(talker)
    assert said.out.strip() == ask(chat, "Is there a dog?", Image.open(photo))
    code, said = run("--prompt", "Where is the car?", "--prompt-cache-file", cache, "--json")
    assert code == 0
    told = json.loads(said.out)
    assert told["text"] == ask(chat, "Where is the car?")
    if talker.model.fusion == "cross":
        assert told["words"][0]["word"] == "car"
        assert told["image_bytes"] == 2 * 2 * 17 * 2 * 8 * 4
    for wrong, message in [
        (["--prompt-cache-file", tmp_path / "no.safetensors"], "no such file"),
        (["--prompt-cache-file", photo], "not a prompt cache"),
        (["--prompt-cache-file", cache, "--attention", tmp_path / "a.png"], "keeps no pictures"),
        (["--save-prompt-cache", tmp_path / "a.txt"], "ending in .safetensors"),
        (["--save-prompt-cache", tmp_path / "no" / "a.safetensors"], "no"),
        (["--prompt-cache-file", cache, "--system-prompt", "x"], "has begun"),
        (["--kv-bits", "8"], "error: --kv-group-size: expected 32, 64 or 128"),
        (["--num-draft-tokens", "3"], "expected --draft-model beside it"),
        (["--draft-model", tmp_path], "--draft-model"),
        (["--prompt-cache-file", cache, "--max-kv-size", "16"], "max_kv_size"),
        (["--prompt-cache-file", "a" * 5000], "no such file"),
        (["--save-prompt-cache", tmp_path / f"{'a' * 300}.safetensors"], "name"),
    ]:
        code, said = run("--prompt", "Where?", *wrong)
        assert (code, said.out) == (2, "")
        assert message in said.err
        assert said.err.count("\n") == 1
