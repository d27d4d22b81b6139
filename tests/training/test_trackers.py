"""`train.report_to`, with fakes of the packages: what they are told, and that they stop nothing."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.training import trackers
from agevlm_mlx.training.trackers import open_trackers, require

RECIPE = {"train": {"seed": 0}, "stages": [{"name": "align"}]}
ROW = {"step": 5, "stage": "align", "lm": 2.0, "norm": None, "tokens": 64, "odd": True}
VALIDATION = {"step": 5, "stage": "align", "val_lm": 1.5, "val_pointing": None}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the three packages were told, by name."""
    told: dict[str, list[Any]] = {"tensorboard": [], "trackio": [], "wandb": []}

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    class EventsWriter:
        def __init__(self, prefix: str, suffix: str):
            told["tensorboard"].append(("open", prefix))
            self.write_event = told["tensorboard"].append
            self.flush = lambda: told["tensorboard"].append("flush")
            self.close = lambda: told["tensorboard"].append("close")

    def event(wall_time: float, **content: Any) -> dict[str, Any]:
        assert wall_time > 1e9
        return content

    module("tensorboardX")
    module("tensorboardX.event_file_writer", EventsWriter=EventsWriter)
    module(
        "tensorboardX.proto.event_pb2",
        Event=event,
        SessionLog=type("SessionLog", (), {"START": 1, "__init__": lambda self, status: None}),
    )
    module("tensorboardX.summary", scalar=lambda name, value: (name, value))

    def run(name: str, known: int) -> Any:
        return SimpleNamespace(
            log=lambda values, step: told[name].append((step, values)),
            finish=lambda: told[name].append("finish"),
            _next_step=known,
        )

    def init(name: str, known: int = 0) -> Any:
        def start(**given: Any) -> Any:
            told[name].append(given)
            return run(name, known)

        return start

    module("trackio", init=init("trackio", 5))
    module("wandb", init=init("wandb"), Settings=lambda **given: given)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_every_package_gets_the_numbers_of_every_row(told: dict[str, list[Any]], tmp_path: Path):
    observers = open_trackers(("tensorboard", "trackio", "wandb"), tmp_path / "run", RECIPE, 4)
    for observer in observers:
        observer.row(ROW)
        observer.look(5, None)
        observer.row(VALIDATION)
        observer.close()
        observer.close()
    numbers = {"train/lm": 2.0, "train/tokens": 64}
    for name in ("trackio", "wandb"):
        assert told[name][0]["config"] == RECIPE
        assert told[name][1:] == [(5, numbers), (5, {"validation/lm": 1.5}), "finish"]
    assert told["tensorboard"][0] == ("open", str(tmp_path / "run/trackers/tensorboard/events"))
    written = [e for e in told["tensorboard"] if isinstance(e, dict) and "summary" in e]
    assert [(e["step"], *e["summary"]) for e in written] == [
        (5, "train/lm", 2.0),
        (5, "train/tokens", 64),
        (5, "validation/lm", 1.5),
    ]
    assert told["tensorboard"][-1] == "close"


def test_a_resumed_run_is_the_same_run(told: dict[str, list[Any]], tmp_path: Path):
    for step in (0, 4):
        for observer in open_trackers(("trackio", "wandb"), tmp_path / "run", RECIPE, step):
            observer.close()
    for name, key in (("trackio", "name"), ("wandb", "id")):
        first, second = (given for given in told[name] if isinstance(given, dict))
        assert first[key] == second[key]
        assert second["resume"] == "allow"
    other = open_trackers(("wandb",), tmp_path / "other", RECIPE, 0)
    assert len(other) == 1
    assert told["wandb"][-1]["id"] != told["wandb"][0]["id"]


def test_trackio_is_not_told_again_what_it_has(told: dict[str, list[Any]], tmp_path: Path):
    (observer,) = open_trackers(("trackio",), tmp_path, RECIPE, 2)
    for step in (3, 4, 5):
        observer.row(ROW | {"step": step})
    assert [step for step, _ in told["trackio"][1:]] == [5]


def test_tensorboard_forgets_what_was_undone(told: dict[str, list[Any]], tmp_path: Path):
    open_trackers(("tensorboard",), tmp_path, RECIPE, 40)
    assert [e["step"] for e in told["tensorboard"] if isinstance(e, dict)] == [41, 41]
    assert "session_log" in told["tensorboard"][2]


@pytest.mark.parametrize(("mode", "wanted"), [(None, "offline"), ("online", "online")])
def test_wandb_is_offline_unless_told(
    told: dict[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str | None,
    wanted: str,
):
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    open_trackers(("wandb",), tmp_path, RECIPE, 0)
    assert told["wandb"][0]["mode"] == wanted
    assert told["wandb"][0]["dir"] == str(tmp_path / "trackers")


def test_nothing_is_made_for_a_recipe_that_reports_nowhere(tmp_path: Path):
    assert open_trackers((), tmp_path, RECIPE, 0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "package"), trackers._MODULES.items())
def test_a_missing_package_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} .*; pip install 'agevlm-mlx\[{name}\]'$"):
        open_trackers((name,), tmp_path, RECIPE, 0)
    with pytest.raises(UserError, match=f"train.report_to: {name} needs"):
        require((name,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_package_that_fails_is_given_up_in_one_line(
    told: dict[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
):
    calls: list[str] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        raise ConnectionError("no route\nto host")

    run = SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    setattr(run, where, fail)
    monkeypatch.setattr(sys.modules["wandb"], "init", fail if where == "init" else lambda **k: run)
    both = open_trackers(("wandb", "trackio"), tmp_path, RECIPE, 0)
    for observer in both:
        for step in (5, 6):
            observer.row(ROW | {"step": step})
        observer.close()
    assert capsys.readouterr().err == (
        "warning: train.report_to: wandb failed (no route to host); "
        "going on without it, metrics.jsonl has the numbers\n"
    )
    assert calls == [where]
    assert len(told["trackio"]) == 4


@pytest.mark.parametrize("content", ["", "../../x\n", "\0" * 8, "abcdefgh\n"])
def test_a_damaged_id_is_made_anew(told: dict[str, list[Any]], tmp_path: Path, content: str):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers/id").write_text(content)
    open_trackers(("wandb",), tmp_path, RECIPE, 0)
    identity = told["wandb"][0]["id"]
    assert identity.isalnum()
    assert (identity == content.strip()) == (content == "abcdefgh\n")
    assert (tmp_path / "trackers/id").read_text() == f"{identity}\n"
