"""Strict configuration: every slip is an error that names the key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from agevlm_mlx.config import (
    FusionConfig,
    ModelConfig,
    from_dict,
    override,
    read_json,
    read_toml,
    to_dict,
)
from agevlm_mlx.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    path: Path
    steps: int = 3
    layers: tuple[int, ...] | None = None
    pair: tuple[str, float] = ("x", 1.0)
    many: tuple[Inner, ...] = ()
    free: dict[str, int] = field(default_factory=dict)


GOOD = {"inner": {"rate": 1}, "path": "runs/x"}


def test_values_are_converted_to_the_declared_types():
    made = from_dict(
        Outer,
        {**GOOD, "layers": [1, 2], "many": [{"rate": 0.5, "kind": "b"}], "free": {"n": 1}},
    )
    assert made == Outer(
        Inner(1.0), Path("runs/x"), 3, (1, 2), ("x", 1.0), (Inner(0.5, "b"),), {"n": 1}
    )
    assert isinstance(made.inner.rate, float)
    assert from_dict(Outer, to_dict(made)) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "stepz: unknown key; did you mean 'steps'"),
        ({"inner": {"rate": 1, "knid": "a"}}, "inner.knid: unknown key; did you mean 'kind'"),
        ({"inner": {}}, "inner.rate: missing; expected float"),
        ({"inner": {"rate": "fast"}}, "inner.rate: expected float, got 'fast'"),
        ({"inner": {"rate": 1, "kind": "c"}}, "inner.kind: expected 'a' or 'b', got 'c'"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"layers": [1, "two"]}, "layers: expected .* got \\[1, 'two'\\]"),
        ({"layers": "12"}, "layers: expected"),
        ({"pair": ["x"]}, "pair: expected"),
        ({"many": [{"rate": 1}, {"rat": 1}]}, "many\\[1\\].rat: unknown key"),
        ({"inner": 3}, "inner: expected a table, got 3"),
    ],
)
def test_slips_are_named(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, {**GOOD, **change})


def test_overrides_reach_into_tables_and_lists():
    data = {"train": {"lr": 0.1}, "stages": [{"steps": 1}, {"steps": 2}]}
    changed = override(
        data, ["train.lr=1e-3", "stages.1.steps=9", "train.out=runs/x", "new.flag=true"]
    )
    assert changed == {
        "train": {"lr": 1e-3, "out": "runs/x"},
        "stages": [{"steps": 1}, {"steps": 9}],
        "new": {"flag": True},
    }
    assert data["train"] == {"lr": 0.1}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lr", "expected key=value"),
        ("stages.7.steps=1", r"expected an index below 1 or \*, got '7'"),
        ("train.lr.x=1", "lr is a value, not a table"),
    ],
)
def test_bad_overrides(assignment, message):
    with pytest.raises(UserError, match=message):
        override({"train": {"lr": 0.1}, "stages": [{}]}, [assignment])


def test_files_name_the_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n"b": }')
    with pytest.raises(UserError, match=r"a.json:2: malformed JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.toml").write_text("a = 1\nb = = 2")
    with pytest.raises(UserError, match=r"a.toml: not valid TOML: .*line 2"):
        read_toml(tmp_path / "a.toml")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="UTF-8"):
        read_json(tmp_path / "b.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "long.json").write_text("1" * 5000)
    for name in ("deep", "long"):
        with pytest.raises(UserError, match="not JSON that can be read"):
            read_json(tmp_path / f"{name}.json")
    for read in (read_json, read_toml):
        with pytest.raises(UserError, match="no such file"):
            read(tmp_path / "missing")


def test_model_config_round_trip():
    config = ModelConfig(
        text_config={"model_type": "llama", "hidden_size": 8},
        vision_config={"model_type": "agevlm_vit"},
        fusion_config=FusionConfig(layers=(1, 3), projector="linear"),
    )
    assert from_dict(ModelConfig, to_dict(config)) == config
    with pytest.raises(UserError, match="model_type: missing"):
        ModelConfig(text_config={}, vision_config={"model_type": "agevlm_vit"})


def test_a_star_is_every_item_of_a_list() -> None:
    data = {"stages": [{"lr": 1.0}, {"lr": 2.0, "losses": {"lm": 1.0}}]}
    found = override(data, ["stages.*.lr=0.5", "stages.*.losses.lm=0.1", "stages.1.lr=3.0"])
    assert found == {
        "stages": [{"lr": 0.5, "losses": {"lm": 0.1}}, {"lr": 3.0, "losses": {"lm": 0.1}}]
    }
    assert override({"betas": [0.9, 0.98]}, ["betas.*=0.5"]) == {"betas": [0.5, 0.5]}
    assert override({"table": {}}, ["table.*=1"]) == {"table": {"*": 1}}  # a key like any other
    with pytest.raises(UserError, match=r"stages.2.lr: expected an index below 2 or \*, got '2'"):
        override(data, ["stages.2.lr=1"])
