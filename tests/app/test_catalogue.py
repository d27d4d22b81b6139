"""Which models the app offers, how it loads one, and what it says of it. No Gradio."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx import weights
from agevlm_mlx.errors import UserError
from agevlm_mlx.quantization import nbytes, quantize_model
from agevlm_mlx.weights import load, save_model, shipped
from app import catalogue
from app.card import read_card
from app.catalogue import Choice, choices, facts, load_model, name, pick, told
from app.checkpoints import describe, megabytes


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own, and an empty hub's cache that nothing leads out of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def offline(repo: str, patterns: list[str]) -> Path:
        raise UserError(f"{repo}: expected no download in a test")

    monkeypatch.setattr(weights, "download", offline)
    return tmp_path


@pytest.fixture
def copy(tiny_checkpoint: Path) -> Callable[[Path | str], Path]:
    """``copy(folder)``: the tiny checkpoint there."""
    return lambda folder: Path(shutil.copytree(tiny_checkpoint, folder))


def cache(copy: Callable[[Path], Path], place: Path, repo: str) -> Path:
    """Put the tiny checkpoint into the hub's cache."""
    folder = place / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    return copy(folder / "snapshots" / "abc123")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- choices ---------------------------------------------------------------------------------


def test_the_shipped_model_is_always_there():
    assert choices() == [("the shipped model, float32, 7.9 MB", str(shipped("model")))]


def test_what_is_on_this_computer(place, copy):
    copy("runs/demo/guided")
    copy("runs/mine")
    copy("elsewhere/deep/one")
    cache(copy, place, "org/some-model")
    found = choices([place / "elsewhere", place / "absent"])
    size = describe(place / "runs/mine")
    assert (size or "").startswith("float32, ")
    assert [label for label, _ in found] == [
        f"guided, {size}",  # the default comes first
        "the shipped model, float32, 7.9 MB",
        f"mine, {size}",
        f"one, {size}",
        f"org/some-model, {size}",
    ]
    for label, source in found:
        assert pick(label, [place / "elsewhere"]) == source
        loaded = load_model(Choice(source), lambda part, step: None)
        assert label.startswith(name(Choice(source), loaded.path))


def test_labels_are_unique_and_a_folder_is_listed_once(place, copy):
    copy("runs/a/guided")
    copy("runs/b/guided")
    os.symlink(place / "runs/a/guided", place / "runs/again")
    found = choices([place / "runs", place / "runs/b"])
    labels = [label.partition(",")[0] for label, _ in found]
    assert sorted(labels[1:]) == ["a/guided", "b/guided"]


def test_one_that_is_no_checkpoint_of_ours_is_left_out(place, copy):
    damages: dict[str, Callable[[Path], object]] = {
        "another": lambda folder: edit(folder, model_type="llama"),
        "list": lambda folder: (folder / "config.json").write_text("[1]"),
        "no-json": lambda folder: (folder / "config.json").write_text("{nope"),
        "deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "no-config": lambda folder: (folder / "config.json").unlink(),
        "no-tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
        "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
        "no-weights-in-it": lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "no-header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        "cut": lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        "index": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "shard": lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-1.safetensors", "b": 3}}'
        ),
    }
    for called, damage in damages.items():
        damage(copy(f"runs/{called}"))
    copy("runs/a/b/too-deep")
    copy("runs/.hidden")
    copy("runs/whole")
    assert [label.partition(",")[0] for label, _ in choices()] == ["the shipped model", "whole"]


@pytest.mark.parametrize("revision", ["", "../../../elsewhere", "none"])
def test_a_broken_cache_of_the_hub(place, copy, revision):
    folder = cache(copy, place, "org/model")
    (folder.parents[1] / "refs" / "main").write_text(revision)
    copy(place / "elsewhere")
    (place / "hub" / "models--file").write_text("")
    assert len(choices()) == 1


def test_places_that_are_no_folders(place, monkeypatch):
    (place / "hub").write_text("")
    (place / "runs").write_text("")
    assert len(choices([place / "hub", place / "a\0b"])) == 1


def test_who_sees_the_page_may_be_held_to_the_list(place, copy):
    folder = str(copy("elsewhere"))
    assert pick(f" {folder} ") == folder
    for entered in (folder, "org/name", str(shipped("model"))):
        with pytest.raises(UserError, match="expected one of the list"):
            pick(entered, listed_only=True)
    [(label, source)] = choices()
    assert pick(label, listed_only=True) == source


# --- loading ---------------------------------------------------------------------------------


def watch(choice: Choice) -> tuple[weights.Loaded, list[tuple[float, str]]]:
    steps: list[tuple[float, str]] = []
    return load_model(choice, lambda part, step: steps.append((part, step))), steps


def test_the_bar_shows_what_was_read(copy):
    folder = copy("mine")
    loaded, steps = watch(Choice(str(folder)))
    parts = [part for part, _ in steps]
    assert steps[0] == (0.0, "opening")
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert len(parts) > 10
    whole = nbytes(loaded.model)
    assert steps[-1][1] == f"reading, {megabytes(whole)} of {megabytes(whole)}"
    # Never further at once than a fiftieth and the tensor that exceeds it.
    largest = max(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    assert max(b - a for a, b in pairwise(parts)) <= 1 / 50 + largest / whole


def test_what_is_loaded_is_the_model(copy):
    folder = copy("mine")
    ours = dict(tree_flatten(watch(Choice(str(folder)))[0].model.parameters()))
    theirs = dict(tree_flatten(load(folder).model.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[key], theirs[key]) for key in ours)


def test_nothing_is_left_to_be_read_later(copy):
    folder = copy("mine")
    loaded, _ = watch(Choice(str(folder), 8))
    os.truncate(folder / "model.safetensors", 0)
    mx.eval(loaded.model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_in_memory(copy, bits):
    folder = copy("mine")
    loaded, steps = watch(Choice(str(folder), bits))
    assert loaded.model.config.quantization == {"group_size": 32, "bits": bits}
    expected = load(folder).model
    read = megabytes(nbytes(expected))  # of the disk, more than is kept
    assert steps[-1] == (1.0, f"quantising to {bits} bits, {read} of {read}")
    quantize_model(expected, bits, 32)
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(loaded.model(ids), expected(ids))
    found = facts(loaded, Choice(str(folder), bits))
    assert found["Model"] == f"mine in {bits} bits"
    assert found["Precision"].startswith(f"language model in {bits} bits (groups of 32), the rest")
    whole = facts(load(folder), Choice(str(folder)))
    assert found["Parameters"] == whole["Parameters"]


def test_what_cannot_be_quantised(copy, tiny_model_config, tiny_checkpoint, monkeypatch):
    made, of = load(tiny_checkpoint), load(tiny_checkpoint)
    settings = quantize_model(made.model, 8, 32)
    save_model(Path("q"), made.model, of.tokenizer, of.preprocessor, "", quantization=settings)
    with pytest.raises(UserError, match="the model is quantised already"):
        watch(Choice("q", 4))
    assert watch(Choice("q"))[1][-1][0] == 1.0
    size = Path("q/model.safetensors").stat().st_size
    assert describe(Path("q").absolute()) == f"8 bits, {megabytes(size)}"
    monkeypatch.setattr("agevlm_mlx.quantization.GROUP_SIZES", (128,))
    with pytest.raises(UserError, match="a multiple of 128, found none; keep the full precision"):
        watch(Choice(str(tiny_checkpoint), 4))


def test_the_hub_is_not_asked_for_what_is_in_its_cache(place, copy):
    cache(copy, place, "org/model")
    choice = Choice("org/model")
    loaded, steps = watch(choice)
    assert steps[0] == (0.0, "opening")
    assert name(choice, loaded.path) == "org/model"


def test_the_hub_is_asked_for_what_is_not(place, copy, monkeypatch):
    folder = cache(copy, place, "org/half")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(weights, "download", lambda repo, patterns: copy(place / repo))
    loaded, steps = watch(Choice("org/half"))
    assert steps[0] == (0.0, "downloading org/half")
    assert loaded.path == place / "org/half"


def test_a_folder_comes_before_the_hub(place, copy):
    cache(copy, place, "org/model")
    copy("org/model")
    loaded, _ = watch(Choice("org/model"))
    assert loaded.path == Path("org/model")
    assert name(Choice("org/model"), loaded.path) == "model"


def test_a_disk_that_fails_is_a_sentence_and_memory_is_for_others(copy, monkeypatch):
    for said, kind in [("[read] Unable to read", UserError), ("out of memory", RuntimeError)]:

        def fail(arrays: object, said: str = said) -> None:
            raise RuntimeError(said)

        with monkeypatch.context() as patch:
            patch.setattr(catalogue.mx, "eval", fail)
            with pytest.raises(kind) as caught:
                watch(Choice(str(shipped("model"))))
        assert isinstance(caught.value, UserError) == (kind is UserError)


# --- what is told ----------------------------------------------------------------------------

BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("empty", lambda folder: shutil.rmtree(folder) or folder.mkdir(),
     "bad one: expected an AgeVLM checkpoint, found no config.json in it"),
    ("another", lambda folder: edit(folder, model_type="llama"),
     "config.json: expected model_type 'agevlm', got 'llama'; this is another model"),
    ("file", lambda folder: shutil.rmtree(folder) or folder.write_text("x"),
     "bad one: expected a checkpoint folder, got a file; pass its folder"),
    ("nothing", lambda folder: shutil.rmtree(folder),
     "bad one: no such folder; pass a checkpoint folder or a hub id like org/name"),
    ("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(),
     "bad one: found no tokenizer.json; the checkpoint is incomplete"),
    ("bad tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}"),
     "bad one: its tokenizer cannot be read (KeyError: 'added_tokens'); take tokenizer.json and "
     "tokenizer_config.json from where the checkpoint came from"),
    ("no preprocessor", lambda folder: (folder / "preprocessor_config.json").unlink(),
     "preprocessor_config.json: no such file"),
    ("cut", lambda folder: os.truncate(folder / "model.safetensors", 100),
     "model.safetensors: not a readable safetensors file: "),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(),
     "model.safetensors: missing; the checkpoint is incomplete"),
    ("index", lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
     "model.safetensors.index.json: expected a weight_map of tensor names to files"),
    ("no JSON", lambda folder: (folder / "config.json").write_text("{nope"),
     "config.json:1: malformed JSON: "),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_missing_is_told_without_a_path(place, copy, damage, expected):
    folder = copy(place / "my models" / "of mine" / "bad one")
    damage(folder)
    for source in (folder, os.path.relpath(folder), folder.parent / ".." / "of mine" / folder.name):
        with pytest.raises(UserError) as caught:
            watch(Choice(str(source)))
        said = told(caught.value, Choice(str(source)))
        assert expected in said
        assert said.startswith(("bad one/", "bad one:"))
        assert "of mine" not in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/srv/models/x/config.json:1: malformed", "config.json:1: malformed"),
        ("~/models/x: no such folder", "x: no such folder"),
        ("see https://huggingface.co/org/name, then", "see https://huggingface.co/org/name, then"),
        ("org/name: no such folder", "org/name: no such folder"),
        ("expected 3/4 of it, and/or 2 / 4", "expected 3/4 of it, and/or 2 / 4"),
        ("in '/a/b' and (/c/d.json)", "in 'b' and (d.json)"),
        ("\x1b[31mred\x1b[0m /a/b/", "[31mred[0m b"),
    ],
)
def test_paths_are_shortened_to_names(message, expected):
    assert told(UserError(message), Choice("org/name")) == expected
    assert told(UserError(message), Choice()) == expected


def test_a_bug_is_told_of_and_goes_to_the_terminal(capsys):
    try:
        {}["/srv/secret"]
    except KeyError as error:
        said = told(error, Choice())
    assert said == "the model could not be loaded (KeyError); the terminal says more"
    assert "Traceback" in capsys.readouterr().err


# --- facts and card --------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_facts_are_those_of_the_model(tiny_talker, fusion):
    loaded = tiny_talker(fusion)
    model = loaded.model
    choice = Choice(str(loaded.path))
    before = mx.get_active_memory()
    found = facts(loaded, choice)
    assert mx.get_active_memory() - before < 4096, "facts evaluate nothing"
    assert found["Model"] == "checkpoint"
    assert found["Language model"] == "llama, 3 layers, 32 wide"
    assert found["Vision encoder"] == "agevlm_vit, 16 x 16 pixels"
    assert found["Context"] == "512 tokens"
    parameters = dict(tree_flatten(model.parameters()))
    own = sum(array.size for key, array in parameters.items() if ".cross_attn." in key)
    text = f"{sum(array.size for array in parameters.values()) / 1e6:.2f} M"
    # Measured: what the cache of a real picture takes.
    held = model.image_bytes(model.see(mx.zeros((1, 16, 16, 3))))
    assert found["An image"] == f"16 tokens (4 x 4), {megabytes(held)} in the cache"
    if fusion == "cross":
        assert found["Fusion"] == "cross-attention before decoder layers 1, 2 (the first is 0)"
        assert found["Attention maps"] == "2 layers with 4 heads each"
        assert found["Parameters"] == f"{text}, of which {own / 1e6:.2f} M in the cross-attention"
        # Keys and values of 16 tokens and the null slot, 2 layers, 2 heads of 8, float32.
        assert held == 2 * 2 * 17 * 16 * 4
    else:
        assert found["Fusion"].startswith("concat: ")
        assert found["Attention maps"].endswith("only of images in the first message")
        assert found["Parameters"] == text
        assert held == 3 * 2 * 16 * 16 * 4  # every layer, 2 heads of 8
    assert all(str(loaded.path.parent) not in text for text in found.values())


def test_a_context_that_is_not_stated(tiny_checkpoint):
    loaded = load(tiny_checkpoint)
    assert facts(loaded, Choice(str(tiny_checkpoint)))["Context"].startswith("its configuration")


def test_facts_of_the_shipped_model():
    loaded, _ = watch(Choice())
    found = facts(loaded, Choice())
    assert found["Model"] == "the shipped model"
    assert found["Training"].startswith("A vision-language model trained with agevlm-mlx")
    assert "Apache-2.0" in found["Licence"]
    assert found["Precision"] == "float32, 7.9 MB"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("", {}),
        ("# A title alone\n", {}),
        ("---\nlicense: mit\n---\n\nIt was trained on [cats](https://x.example).",
         {"Licence": "mit", "Training": "It was trained on cats."}),
        ("---\nlicense: 'cc-by-4.0' \nother: [1\n---\nText.", {"Licence": "cc-by-4.0"}),
        ("Taken as it is.\n\nWe **trained** `it` on\n<b onclick=x>dogs</b>. Licence: MIT.",
         {"Training": "We trained it on dogs. Licence: MIT.", "Licence": "Licence: MIT."}),
        ("| trained | a |\n\n- trained in a list\n\n# trained in a title", {}),
        ("trained \x1b[31mred\x07", {"Training": "trained [31mred"}),
        ("trained" + " word" * 200, {"Training": "trained" + " word" * 58 + " …"}),
        ("a_name_with trained _words_ and snake_case",
         {"Training": "a_name_with trained words and snake_case"}),
    ],
)  # fmt: skip
def test_a_card_is_plain_text(tmp_path, card, expected):
    (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path) == expected


def test_no_card(tmp_path):
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe trained \x00")
    assert "trained" in read_card(tmp_path)["Training"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (393_216, "393 kB"), (5_200_000, "5.2 MB"), (250 * 10**6, "250 MB"),
     (1_340_000_000, "1.3 GB")],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert megabytes(count) == text


def test_choices_are_equal_by_what_they_say():
    assert Choice("a", 4) == Choice("a", 4) != replace(Choice("a", 4), bits=8)
    assert len({Choice(), Choice(None, None), Choice("x")}) == 2
