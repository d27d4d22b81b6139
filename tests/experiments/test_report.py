"""Table, figures and results.json of made-up runs."""

import json

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import compare
from agevlm_mlx.experiments import figures, report, statistics, tables
from agevlm_mlx.experiments.results import BOOTS, SEED, Results
from agevlm_mlx.experiments.state import State

SKILL = {"guided": 0.9, "plain": 0.1}


@pytest.fixture
def main(plan, pretend):
    """The cells of the entry main, both arms judged: guided is much better."""
    cells = [cell for cell in plan.cells({}) if cell.entry == "main"]
    for cell in cells:
        for run in cell.runs:
            pretend(plan, run, SKILL[run.arm])
    return cells


def test_with_one_seed_it_is_the_paired_difference_of_evaluate(plan, pretend):
    runs = [cell.runs[0] for cell in plan.cells({})[:2]]
    for run in runs:
        pretend(plan, run, SKILL[run.arm])
    results = Results(plan)
    a, b = (compare.read_result(plan.result("test", run.name))[1] for run in runs)
    wanted = compare.differences(benchmark("scenes"), a, b, BOOTS, SEED)
    first, second = (tables.Cell("main", run.arm, "base", "1x", (run,)) for run in runs)
    seeds, found = tables.Pairs(results)(first, second, "test")
    assert seeds == (0,)
    assert len(found) > 15
    for name, one in found.items():
        assert one.value == pytest.approx(wanted[name].value, abs=1e-5)
        if one.interval is not None:
            assert one.interval == pytest.approx(wanted[name].interval, abs=1e-5)


def test_draws_are_kept_until_the_answers_change(plan, main, monkeypatch):
    run = main[0].runs[0].name
    first = Results(plan).drawn(run, "test")
    monkeypatch.setattr("agevlm_mlx.experiments.results.draws", lambda rows: {"new": np.ones(3)})
    again = Results(plan).drawn(run, "test")
    assert again.keys() == first.keys()
    assert np.array_equal(again["text.recall"], first["text.recall"])
    with open(plan.result("test", run).with_suffix(".jsonl"), "ab") as file:
        file.write(b"{}")  # half a line is left out
    assert list(Results(plan).drawn(run, "test")) == ["new"]


def test_only_seeds_that_both_arms_have_are_compared(plan, main):
    plan.result("test", main[1].runs[1].name).unlink()
    seeds, _ = tables.Pairs(Results(plan))(main[0], main[1], "test")
    assert seeds == (0, 2)


def test_answers_to_other_questions_are_not_compared(plan, main):
    path = plan.result("test", main[1].runs[1].name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"items": "others"}))
    with pytest.raises(UserError, match="asked, got others; delete both"):
        tables.compared(plan, tables.Pairs(Results(plan)), main)


def test_a_pair_of_variations_is_compared_at_each_length(folder, pretend, tmp_path):
    file = folder / "experiment.toml"
    head, _, tail = file.read_text().rpartition('compare = [["guided", "plain"]]')
    file.write_text(head + 'compare = [["guided/few", "plain/all"]]' + tail)
    plan = tables.Plan(str(folder), tmp_path / "out")
    cells = [cell for cell in plan.cells({}) if cell.entry == "sizes"]
    for name in ("guided-few-s0", "plain-s0", "guided-few-2x-s0", "plain-2x-s0"):
        run = next(r for c in cells for r in c.runs if r.name == name)
        pretend(plan, run, SKILL[run.arm])
    found = tables.compared(plan, tables.Pairs(Results(plan)), cells)
    assert [(one.first, one.second, one.length) for one in found] == [
        ("guided/few", "plain/all", "1x"), ("guided/few", "plain/all", "2x"),
    ]  # fmt: skip


def test_the_report_says_what_came_out(plan, main):
    told = report.write(plan, State(plan))
    folder = plan.out / "report"
    lines = (folder / "table.md").read_text().splitlines()
    assert "| plain | not \\| taught | `stages.1.losses.attention.weight=0.0` |" in lines
    assert "| test | 12 | test, plain | 11 |  |" in lines
    assert any("No choice was made on any of them but `chosen`" in line for line in lines)
    header = lines.index("| | guided | plain |")
    mine = lines[header : lines.index("## sizes")]
    rows = {line.split("|")[1].strip(): line for line in mine if line[:1] == "|"}
    adversarial = rows["POPE adversarial: accuracy"].split("|")[2:4]
    values = [Results(plan).values(f"guided-s{seed}", "test") for seed in range(3)]
    mean, deviation = statistics.spread([v["text.pope.adversarial.accuracy"] for v in values])
    assert adversarial[0].strip() == f"**{mean:.3f} +- {deviation:.3f}**"
    assert "**" not in adversarial[1]
    assert "**" not in rows["nouns a caption"]  # neither way is better
    assert rows["training, s"].split("|")[2].strip() == "10 +- 0"
    assert rows["layer 1, random"].split("|")[2].strip() == "0.650 +- 0.000"
    difference = next(line for line in lines if line.startswith("| guided - plain (seeds 0, 1, 2)"))
    assert difference.count("*") >= 3
    data = json.loads((folder / "results.json").read_text())
    assert data["runs"]["guided-s1"]["tests"]["test"] == values[1]
    assert data["runs"]["guided-s1"]["train_seconds"] == 10
    assert data["parameters"]["guided/base"][0] > 0
    (one,) = (found for found in data["differences"] if found["entry"] == "main")
    assert one["numbers"]["text.recall"]["interval"][0] > 0
    for name in ("curves-main", "differences-main-test", "similarity-main-test", "maps-main-test"):
        assert f"{name}.png" in told
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 1000 or name.startswith("maps")
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_report_of_nothing(plan):
    report.write(plan, State(plan))
    assert (plan.out / "report" / "table.md").read_text().count("Nothing has been judged") == 2
    assert not list((plan.out / "report").glob("*.png"))


def test_without_matplotlib_the_numbers_are_there(plan, main, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    told = report.write(plan, State(plan))
    assert "no figures: matplotlib is missing: pip install 'agevlm-mlx[analyze]'" in told
    assert (plan.out / "report" / "table.md").exists()


def test_sizes_are_drawn_where_there_are_some(plan, pretend):
    entry = plan.experiment.runs[1]
    cells = [cell for cell in plan.cells({}) if cell.entry == "sizes"]
    for cell in cells:
        pretend(plan, cell.runs[0], SKILL[cell.arm])
    path = plan.out / "sizes.png"
    assert figures.sizes(Results(plan), entry, cells, "test", path, "sizes")
    assert path.stat().st_size > 10_000
    one = [cell for cell in cells if cell.vary == "all"]
    assert not figures.sizes(Results(plan), entry, one, "test", path, "sizes")


def test_more_arms_than_colours_are_compared_but_not_drawn_side_by_side(plan, main, monkeypatch):
    monkeypatch.setattr(figures, "MOST", 1)
    told = report.write(plan, State(plan))
    assert "differences-main-test" in told
    assert not any(name in told for name in ("curves-", "similarity-", "maps-"))
