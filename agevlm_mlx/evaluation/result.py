"""One benchmark, one model: asked, scored and written, going on where it was broken off."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import config
from ..errors import UserError
from . import files, scoring
from .answers import AnswerFile
from .benchmark import Benchmark, Item
from .machine import machine, versions
from .respondent import Respondent
from .run import Progress, Run, Settings, begin_row, digest, still_asked


@dataclass(frozen=True)
class Out:
    """Who is asked about which data, and where it is written.

    folder: of the result files; data: of the benchmark. command: as a person would repeat it.
    problems: what reading left out. fresh: ask again what is answered.
    """

    folder: Path
    data: Path
    model: Respondent
    command: str = ""
    problems: Sequence[str] = ()
    fresh: bool = False

    def result(self, benchmark: Benchmark) -> Path:
        """BENCHMARK-MODEL.json"""
        return self.folder / f"{benchmark.name}-{self.model.about['name']}.json"

    def answers(self, benchmark: Benchmark) -> Path:
        """BENCHMARK-MODEL.jsonl, every answer."""
        return self.result(benchmark).with_suffix(".jsonl")


def evaluate(
    benchmark: Benchmark,
    items: Sequence[Item],
    settings: Settings,
    out: Out,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Ask what has no answer yet, score all of it, write both files, and return the result.

    ``UserError`` for an image that cannot be read (unless bad ones are skipped), while another
    run writes the same files, or where there are answers to something else (unless `fresh`).
    """
    begun = _begun(benchmark, items, settings, out.model)
    result_file, answer_file = out.result(benchmark), out.answers(benchmark)
    for path in (result_file, answer_file):
        files.check_writable(path)
    start = time.perf_counter()
    with AnswerFile(answer_file, out.fresh) as answers:
        earlier = _earlier(result_file, answers, begun)
        again = _drop_changed(answers, items, out.data)
        before = sum(item.key in answers.rows for item in items)
        seconds = earlier.get("seconds") if before else 0
        seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        run = Run(out.model, benchmark, settings, answers, out.data, progress)
        files.write_json(result_file, {**begun, "finished": None, "seconds": seconds})
        try:
            run.ask(items)
        except BaseException:
            spent = seconds + time.perf_counter() - start
            files.write_json(result_file, {**begun, "finished": None, "seconds": spent})
            raise
        # Kept answers are judged by the labels of today.
        rows = [
            files.plain(answers.rows[item.key] | begin_row(item, out.data))
            for item in items
            if item.key in answers.rows
        ]
        asked = {row["key"] for row in rows}
        others = [row for key, row in answers.rows.items() if key not in asked]
        if any(row != answers.rows[row["key"]] for row in rows):
            answers.replace([*rows, *others])
    if not rows:
        raise UserError(f"{benchmark.name}: expected at least one item that can be asked, got none")
    units = scoring.units(rows)
    scored = scoring.score(benchmark, rows, units, settings.boots, settings.seed)
    problems = [*out.problems, *run.problems]
    report = {
        **begun,
        "command": out.command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds + time.perf_counter() - start,
        "answered_before": before,
        "asked_again": again,
        "not_asked": [row["key"] for row in others],
        "versions": versions(),
        "machine": machine(),
        "counts": {
            "items": len(rows),
            "images": len({row["image"] for row in rows} - {None}),
            "units": len(units),
            "with_image": sum(row["image"] is not None for row in rows),
            "shuffled": sum("shuffled_image" in row for row in rows),
            "bad": len(problems),
        },
        "problems": problems,
        **scoring.report(scored),
    }
    files.write_json(result_file, report)
    return report


def _begun(
    benchmark: Benchmark, items: Sequence[Item], settings: Settings, model: Respondent
) -> dict[str, Any]:
    """What has to be the same for answers to be the same."""
    text_tokens = benchmark.text_tokens or benchmark.max_tokens
    return {
        "benchmark": benchmark.name,
        "items": digest(items),
        "model": dict(model.about),
        "settings": {
            "limit": settings.limit,
            "seed": settings.seed,
            "prompt": settings.prompt or benchmark.prompt,
            "max_tokens": settings.max_tokens or benchmark.max_tokens,
            "text_tokens": settings.max_tokens or text_tokens,
            "decoding": "greedy",
            "batch_size": settings.batch_size,
            "boots": settings.boots,
        },
    }


def _earlier(result_file: Path, answers: AnswerFile, begun: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result that was begun here before, if there are any answers.

    ``UserError`` if they are of another model, or were given to other prompts: they cannot be
    used, and are not thrown away unasked.
    """
    if not answers.rows:
        return {}
    try:
        before = config.read_json(result_file)
    except UserError:
        before = None
    if not isinstance(before, dict):
        raise UserError(
            f"{answers.path}: answers without a readable {result_file.name} beside them, which "
            f"says to what; {_INSTEAD}"
        )
    now, changed = files.plain(begun), ""
    settings, wanted = before.get("settings"), now["settings"]
    if _fingerprint(before) != _fingerprint(now):
        changed = "by another model, or the same before it changed"
    elif settings != wanted:
        settings = settings if isinstance(settings, dict) else {}
        changed = ", ".join(
            f"with {key} {settings.get(key)!r}, now {value!r}"
            for key, value in wanted.items()
            if settings.get(key) != value
        )
    if changed:
        raise UserError(f"{answers.path}: the answers there are {changed}; {_INSTEAD}")
    return before


#: What to do when there are answers of another kind.
_INSTEAD = "--fresh replaces them, another --out keeps both"


def _drop_changed(answers: AnswerFile, items: Sequence[Item], folder: Path) -> int:
    """Drop answers to questions, or about pictures, that are others now, to be asked again; how
    many. Those to what is not asked now stay. ``UserError`` if most are: then it is other data."""
    known = [item for item in items if item.key in answers.rows]
    changed = {i.key for i in known if not still_asked(answers.rows[i.key], i, folder)}
    if 2 * len(changed) > len(known) or (answers.rows and not known):
        raise UserError(
            f"{answers.path}: of {len(answers.rows)} answers there {len(known) - len(changed)} are "
            f"to what is asked now, about pictures that are the same; {_INSTEAD}"
        )
    if changed:
        answers.replace(row for key, row in answers.rows.items() if key not in changed)
    return len(changed)


def _fingerprint(result: Mapping[str, Any]) -> Any:
    """Not the model's path, which can be written in many ways."""
    model = result.get("model")
    return model.get("fingerprint") if isinstance(model, dict) else None
