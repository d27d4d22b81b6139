"""Put the numbers and figures of `agevlm experiment claim` into docs/claim.md and README.md.

Between ``<!-- claim: NAME -->`` and ``<!-- /claim -->`` stands table NAME; the text around is
written by hand, so read it again after this.

  python scripts/claim_tables.py runs/claim
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from agevlm_mlx.evaluation.compare import Difference
from agevlm_mlx.experiments.results import headline
from agevlm_mlx.experiments.tables import difference

ROOT = Path(__file__).parents[1]
ARMS = ("concat", "concat-guided", "cross", "features", "shuffled", "guided", "guided-features")
STYLES = ("combos", "recoloured", "outlined", "blurred", "scaled")
ROWS = {
    "adversarial POPE accuracy": "text.pope.adversarial.accuracy",
    '... says "yes" (truth: 0.5)': "text.pope.adversarial.yes_ratio",
    "... with another picture": "shuffled.text.pope.adversarial.accuracy",
    "random POPE accuracy": "text.pope.random.accuracy",
    "pointing game": "look.pointing_game",
    "... within 15/224 of the picture": "look.pointing_game_tolerance",
    "matching AUROC, one noun exchanged, by likelihood": "logits.matching_auroc_hard",
    "... by asking for each noun": "logits.matching_confirmed_auroc_hard",
    "CHAIR_i of captions as they come": "text.chair_i",
    "... objects named": "text.recall",
    "CHAIR_i at recall .60, surest nouns": "text.chair_i_at_recall.60",
    "... nouns best confirmed when asked for": "text.chair_i_confirmed_at_recall.60",
}
#: Of README: the same, shorter.
FEW = (
    "adversarial POPE accuracy",
    "... with another picture",
    "pointing game",
    "matching AUROC, one noun exchanged, by likelihood",
    "... by asking for each noun",
    "CHAIR_i of captions as they come",
    "... objects named",
    "CHAIR_i at recall .60, surest nouns",
    "... nouns best confirmed when asked for",
)
#: Of the runs with fewer pictures and longer training.
SIZED = {
    "adversarial POPE": "text.pope.adversarial.accuracy",
    "pointing game": "look.pointing_game",
    "matching, one noun exchanged": "logits.matching_auroc_hard",
    "CHAIR_i as they come": "text.chair_i",
    "objects named": "text.recall",
    "CHAIR_i, recall .60, best confirmed": "text.chair_i_confirmed_at_recall.60",
}
PICTURES = {"tenth": "400", "third": "1,333", "base": "4,000"}
LENGTHS = {"1x": "300 steps", "3x": "900 steps"}
#: Columns of the paired differences.
PAIRED = {
    "adversarial POPE": "text.pope.adversarial.accuracy",
    "pointing game": "look.pointing_game",
    "matching, likelihood": "logits.matching_auroc_hard",
    "matching, asked": "logits.matching_confirmed_auroc_hard",
    "CHAIR_i, surest": "text.chair_i_at_recall",
    "CHAIR_i, confirmed": "text.chair_i_confirmed_at_recall",
}
FIGURES = {
    "differences-main-test": "differences-test",
    "differences-main-unbiased": "differences-unbiased",
    "maps-main-test": "maps",
    "curves-main": "curves",
    "similarity-main-test": "similarity",
    "differences-ablations-unbiased": "ablations-unbiased",
    "differences-ablations-test": "ablations-test",
    "sizes-sizes-test": "sizes-test",
    "sizes-sizes-unbiased": "sizes-unbiased",
    "differences-late-unbiased-again": "late-unbiased",
}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {stdev(values):.3f}".replace("± 0.", "± .")


def rows(columns: Sequence[str], lines: Iterator[tuple[str, list[str]]], first: str = "") -> str:
    """A Markdown table."""
    head = [f"| {first} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines)])


class Tables:
    """The tables of one report."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.known: dict[str, Callable[[], str]] = {
            "arms test": lambda: self.arms("test", ARMS, tuple(ROWS)),
            "arms unbiased": lambda: self.arms("unbiased", ARMS, tuple(ROWS)),
            "few test": lambda: self.arms("test", ("concat", "cross", "guided"), FEW),
            "few unbiased": lambda: self.arms("unbiased", ("concat", "cross", "guided"), FEW),
            "styles": self.styles,
            "sizes test": lambda: self.sizes("test"),
            "sizes unbiased": lambda: self.sizes("unbiased"),
            "differences test": lambda: self.differences("main", "test"),
            "differences unbiased": lambda: self.differences("main", "unbiased"),
            "ablations test": lambda: self.differences("ablations", "test"),
            "ablations unbiased": lambda: self.differences("ablations", "unbiased"),
            "late test": lambda: self.differences("late", "test-again"),
            "late unbiased": lambda: self.differences("late", "unbiased-again"),
        }

    def runs(self, arm: str, vary: str = "base", length: str = "1x") -> list[dict[str, Any]]:
        """Those of an arm, unless told otherwise with the plain recipe."""
        return [
            run
            for run in self.report["runs"].values()
            if (run["arm"], run["vary"], run["length"]) == (arm, vary, length)
            and "tuning" not in run["tests"]
        ]

    def values(self, arm: str, test: str, name: str, *which: str) -> list[float]:
        return [
            run["tests"][test][name]
            for run in self.runs(arm, *which)
            if name in run["tests"].get(test, {})
        ]

    def arms(self, test: str, arms: Sequence[str], names: Sequence[str]) -> str:
        arms = self.judged(arms, test)

        def lines() -> Iterator[tuple[str, list[str]]]:
            for label in names:
                yield label, [spread(self.values(arm, test, ROWS[label])) for arm in arms]
            if len(names) == len(ROWS):
                yield (
                    "training, s",
                    [f"{mean(run['train_seconds'] for run in self.runs(arm)):.0f}" for arm in arms],
                )

        return rows(arms, lines())

    def judged(self, arms: Sequence[str], test: str) -> list[str]:
        """Those that have a result on a test."""
        return [arm for arm in arms if self.values(arm, test, ROWS["pointing game"])]

    def styles(self) -> str:
        name, arms = "text.pope.adversarial.accuracy", self.judged(ARMS, STYLES[0])
        lines = ((test, [spread(self.values(arm, test, name)) for arm in arms]) for test in STYLES)
        return rows(arms, lines, "adversarial POPE accuracy")

    def sizes(self, test: str) -> str:
        """Pictures x steps; the mean over seeds, as the spread would hide the pattern."""
        which = [(vary, length) for length in LENGTHS for vary in PICTURES]

        def lines() -> Iterator[tuple[str, list[str]]]:
            for label, name in SIZED.items():
                for arm in ("concat", "cross", "guided"):
                    found = [self.values(arm, test, name, *one) for one in which]
                    yield f"{label}: {arm}", [f"{mean(v):.3f}" if v else "-" for v in found]

        heads = [f"{PICTURES[vary]} pictures, {LENGTHS[length]}" for vary, length in which]
        return rows(heads, lines())

    def differences(self, entry: str, test: str) -> str:
        def lines() -> Iterator[tuple[str, list[str]]]:
            for one in self.report["differences"]:
                if (one["entry"], one["test"]) != (entry, test):
                    continue
                found = {
                    name: Difference(d["first"], d["second"], d["interval"])
                    for name, d in one["numbers"].items()
                }
                cells = []
                for name in PAIRED.values():
                    number = headline(found, name)
                    cells.append(f"{difference(number[0])}{number[1]}" if number else "-")
                yield f"{one['first']} - {one['second']}", cells

        return rows(list(PAIRED), lines(), "first - second")


def fill(text: str, tables: Tables) -> str:
    """The text with each marked table made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables.known:
            raise SystemExit(f"expected some of {', '.join(tables.known)}, got {name!r}")
        return f"<!-- claim: {name} -->\n\n{tables.known[name]()}\n\n<!-- /claim -->"

    return re.sub(r"<!-- claim: (.*?) -->.*?<!-- /claim -->", made, text, flags=re.DOTALL)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    report = Path(sys.argv[1]) / "report"
    tables = Tables(json.loads((report / "results.json").read_text(encoding="utf-8")))
    for page in (ROOT / "docs/claim.md", ROOT / "README.md"):
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print(page)
    folder = ROOT / "docs/claim"
    shutil.copy(report / "table.md", folder / "table.md")
    for name, ours in FIGURES.items():
        if (report / f"{name}.png").is_file():
            shutil.copy(report / f"{name}.png", folder / f"{ours}.png")
            print(folder / f"{ours}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
