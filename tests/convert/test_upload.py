"""`agevlm-convert upload`, with a hub that is not there."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from agevlm_mlx.weights import read_weights
from convert import __main__ as cli
from convert.upload import completed_card


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Records what would go up; `error` is raised instead when it is set."""
    seen = SimpleNamespace(repos=[], files={}, error=None)

    class FakeApi:
        def create_repo(self, repo: str, **options: object) -> None:
            seen.repos.append((repo, options))

        def create_commit(self, repo: str, operations: list, **options: object) -> None:
            if seen.error:
                raise seen.error
            seen.files = {o.path_in_repo: o.path_or_fileobj for o in operations}

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return seen


def upload(folder: Path, *options: str, repo: str = "me/model") -> int:
    return cli.main(["upload", "--path", str(folder), "--upload-repo", repo, *options])


def test_the_files_of_a_checkpoint_go_up(folder, hub, capsys):
    (folder / ".DS_Store").write_text("")
    assert upload(folder, "--private", "--license", "mit", "--base-model", "a/b") == 0
    assert hub.repos == [("me/model", {"private": True, "exist_ok": True})]
    names = {p.name for p in folder.iterdir()} - {".DS_Store"}
    assert set(hub.files) == names
    card = hub.files["README.md"].decode()
    assert "license: mit\nbase_model:\n- a/b\n" in card
    assert card.endswith("# A tiny model\n")
    assert (folder / "README.md").read_text() == "# A tiny model\n"


def test_a_dry_run_sends_nothing(folder, hub, capsys):
    assert upload(folder, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "pipeline_tag: image-text-to-text" in out
    assert "names no licence" in out
    assert not hub.repos


def test_the_card_keeps_what_it_says():
    card = "---\nlicense: mit\ntags: [dogs, mlx]\n---\n\n# Mine\n---\nrest\n"
    done = completed_card(card)
    assert done.endswith("---\n\n# Mine\n---\nrest\n")
    assert "license: mit\n" in done
    assert "- dogs\n- mlx\n- agevlm\n" in done
    assert completed_card(done) == done


@pytest.mark.parametrize("text", ["", "# Mine\n", "---\n\n---\n# Mine\n"])
def test_a_card_without_entries(text, capfd):
    done = completed_card(text, "mit", ["a/b"])
    assert done.startswith("---\nlibrary_name: mlx\n")
    assert done.endswith(f"base_model:\n- a/b\n---\n\n{text.rpartition('---')[2].lstrip()}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("front", ["a: [", "- a list", "license: 'mit\n  "])
def test_front_matter_that_cannot_be_read(folder, hub, capsys, front):
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    assert upload(folder) == 2
    assert "README.md: its front matter cannot be read" in refusal(capsys, hub)


def refusal(capsys: pytest.CaptureFixture[str], hub: SimpleNamespace) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not hub.files
    return error


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.safetensors", "notes.txt"])
def test_other_files_are_refused(folder, hub, capsys, name):
    (folder / name).write_text("x")
    assert upload(folder) == 2
    assert name in refusal(capsys, hub)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(folder, hub, capsys, name):
    (folder / name).unlink()
    assert upload(folder) == 2
    assert name in refusal(capsys, hub)


def test_teacher_heads_are_refused(folder, hub, capsys):
    weights = read_weights(folder)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {"sam_head.w": mx.zeros(2)})
    assert upload(folder) == 2
    assert "sam_head" in refusal(capsys, hub)


def test_no_token(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert upload(folder) == 2
    assert "hf auth login" in refusal(capsys, hub)


def test_no_network(folder, hub, capsys):
    hub.error = httpx.ConnectError("Name or service not known")
    assert upload(folder) == 2
    assert "hf upload me/model copy" in refusal(capsys, hub)


def test_no_right_to_write(folder, hub, capsys):
    response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))
    hub.error = HfHubHTTPError("Forbidden", response=response)
    assert upload(folder) == 2
    assert "write access" in refusal(capsys, hub)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "../x", "a/"])
def test_a_wrong_name(folder, hub, capsys, repo):
    assert upload(folder, repo=repo) == 2
    assert "expected org/name" in refusal(capsys, hub)
