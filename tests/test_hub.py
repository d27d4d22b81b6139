"""What is said when a file cannot be had from the hub."""

import errno
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from agevlm_mlx import weights
from agevlm_mlx.errors import UserError
from agevlm_mlx.hub import download, download_dataset
from convert import source

FOUND_NOTHING = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
NAMED = "org/name: no such folder here, so its config.json was wanted from the hub, which "
BY_HAND = "`hf download org/name --local-dir name` makes one"


def offline() -> Exception:
    error = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    error.__cause__ = errors.OfflineModeIsEnabled("offline")
    return error


def refusal(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    messages = set()
    for read in (source.locate, weights.load):
        with pytest.raises(UserError) as caught:
            read("org/name")
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    return message


def test_no_network(monkeypatch):
    said = refusal(monkeypatch, errors.LocalEntryNotFoundError("Got: ConnectError: x\nAn error"))
    assert said == (
        f"{NAMED}cannot be reached (Got: ConnectError: x); pass a folder: where there is a "
        f"network, {BY_HAND}"
    )


def test_an_error_without_words(monkeypatch):
    assert "cannot be reached (TimeoutError)" in refusal(monkeypatch, TimeoutError())


def test_offline_mode(monkeypatch):
    said = refusal(monkeypatch, offline())
    assert said.startswith(f"{NAMED}is switched off by HF_HUB_OFFLINE; pass a folder")
    assert said.endswith(BY_HAND)


def test_no_such_repository(monkeypatch):
    error = errors.RepositoryNotFoundError("404", response=FOUND_NOTHING)
    said = refusal(monkeypatch, error)
    assert said.startswith(f"{NAMED}shows no such repository; check its name, or `hf auth login`")


def test_a_gated_repository(monkeypatch):
    said = refusal(monkeypatch, errors.GatedRepoError("403", response=FOUND_NOTHING))
    assert said.startswith(f"{NAMED}asks for its conditions to be accepted")
    assert "https://huggingface.co/org/name" in said


def test_no_name_of_a_repository():
    with pytest.raises(UserError, match=r"^org/na me: no such folder; pass a folder or a hub id"):
        source.locate("org/na me")


def test_a_full_disk_is_not_the_hubs_fault(monkeypatch):
    def fail(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space"):
        download("org/name", ["*.json"])


@pytest.mark.parametrize(
    ("files", "loaded"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model-1.safetensors", "model-2.safetensors"], ["model-1.safetensors"]),
        (["pytorch_model-1.bin", "flax_model.msgpack"], ["pytorch_model-1.bin"]),
        # LAION's repositories: config.json goes with Hugging Face's file.
        (["open_clip_model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"],
            ["open_clip_model.safetensors"],
        ),
        (["open_clip_pytorch_model.bin"], ["open_clip_pytorch_model.bin"]),
        ([], []),
    ],
)
def test_one_kind_of_weight_file_is_downloaded(monkeypatch, tmp_path: Path, files, loaded):
    def snapshot(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repo, repo_type) == ("org/name", "model")
        for name in ["config.json", "vocab.txt", *files]:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert source.locate("org/name", "*.txt") == tmp_path
    there = {path.name for path in tmp_path.iterdir()}
    kind = {name for name in files if name.startswith(loaded[0].split("-")[0])} if loaded else set()
    assert there == {"config.json", "vocab.txt"} | kind


def test_open_clips_file_does_not_go_with_a_config(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"/pytorch_model\.bin: "), source.open_tensors(tmp_path):
        pass


def test_a_dataset_is_downloaded_whole(monkeypatch, tmp_path: Path):
    asked = []

    def snapshot(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download_dataset("org/name") == tmp_path
    assert asked == [("org/name", {"repo_type": "dataset", "allow_patterns": ["*"]})]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            offline(),
            "is switched off by HF_HUB_OFFLINE; pass a folder: where there is a network, `hf "
            "download org/name --repo-type dataset --local-dir name` makes one",
        ),
        (
            errors.GatedRepoError("403", response=FOUND_NOTHING),
            "asks for its conditions to be accepted: do so on "
            "https://huggingface.co/datasets/org/name, then `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError("404", response=FOUND_NOTHING),
            "shows no such repository; check its name, or `hf auth login` if it is private",
        ),
    ],
)
def test_a_dataset_that_cannot_be_had(monkeypatch, error: Exception, said: str):
    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        download_dataset("org/name")
    named = "org/name: no such folder here, so its files were wanted from the hub, which "
    assert str(caught.value) == named + said


def test_no_name_of_a_dataset():
    with pytest.raises(UserError, match=r"^org/na me: no such folder; pass a folder or a hub id"):
        download_dataset("org/na me")
