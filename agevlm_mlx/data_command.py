"""`agevlm data`: look at a data set before training on it, or write it as our own JSONL."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from . import atomic
from .data.contact_sheet import contact_sheet
from .data.counting import Student, count, missing_files
from .data.exclude import exclusions
from .data.folder import REPORT
from .data.record_scan import NoRecords
from .data.record_set import BAD, Records, read_records, write_problems
from .data.records import to_json
from .data.report import Report
from .errors import UserError, command
from .sam.progress import Progress
from .sam.store import Store

SHEET = Path(REPORT)

EXAMPLES = """\
examples:
  agevlm data check data/scenes                          our JSONL, LLaVA, COCO, RefCOCO, ...
  agevlm data check llava.json --bad bad_records.jsonl   every problem in a file
  agevlm data check coco --fast --no-sheet               headers of the pictures only
  agevlm data check coco --model runs/mine --store coco-sam
  agevlm data convert coco --out coco/records.jsonl
"""
CHECK = """\
examples:
  agevlm data check data/scenes
  agevlm data check llava.json --json check.json --bad bad_records.jsonl
  agevlm data check coco --model runs/mine --store coco-sam --sheet coco.png
  agevlm data check coco --fast --limit 1000 --no-sheet
  agevlm data check coco --exclude pope my-test-images.txt

exit status: 0 if training can start, maybe with warnings; 1 if it would fail with
data.on_error="stop" (the default of recipes); 2 if the data cannot be read at all.
"""
CONVERT = """\
examples:
  agevlm data convert coco --out coco/records.jsonl
  agevlm data convert refcoco --out data/refcoco.jsonl --on-error skip

Images stay where they are: the file has to lie in a folder above them.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of ``agevlm data``."""
    p = argparse.ArgumentParser(prog="agevlm data")
    _describe(p, "Look at a data set, or write it as our own JSONL.", EXAMPLES)
    commands = p.add_subparsers(required=True, metavar="check | convert")
    text = "Decode every picture, tokenise every text, and say what is wrong with them."
    c = commands.add_parser("check", help="count a data set and find what is wrong with it")
    _describe(c, text, CHECK)
    c.set_defaults(run=check)
    c.add_argument("data", type=Path, metavar="PATH", help="a file or folder of records")
    c.add_argument(
        "--model",
        metavar="FOLDER",
        help="whose tokenizer and token grid count (default: the embedded model)",
    )
    c.add_argument(
        "--store",
        type=Path,
        metavar="STORE",
        help="a teacher's store: does it fit the data and --model?",
    )
    c.add_argument(
        "--exclude",
        nargs="*",
        default=["pope"],
        metavar="LIST",
        help="images left out, as data.exclude (default: pope; nothing after it: none)",
    )
    c.add_argument("--fast", action="store_true", help="read only the headers of pictures")
    c.add_argument("--limit", type=_positive, metavar="N", help="look at N images, evenly spread")
    c.add_argument("--seed", type=int, default=0, help="of the contact sheet (default: 0)")
    c.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    c.add_argument("--bad", type=Path, metavar="FILE", help="write all problems, one JSON a line")
    c.add_argument(
        "--sheet",
        type=Path,
        default=SHEET,
        metavar="FILE",
        help=f"picture with 16 random records (default: {SHEET})",
    )
    c.add_argument("--no-sheet", action="store_true", help="draw no picture")
    text = "Write a data set of any format that is read as our own JSONL."
    c = commands.add_parser("convert", help="write a data set as our own JSONL")
    _describe(c, text, CONVERT)
    c.set_defaults(run=convert)
    c.add_argument("data", type=Path, metavar="PATH", help="a file or folder of records")
    c.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="what to write")
    c.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what becomes of bad records: end, or leave them out (default: stop)",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``agevlm data``; see ``--help`` of its two commands."""
    args = parser().parse_args(argv)
    return args.run(args)


def check(args: argparse.Namespace) -> int:
    """Print the report of a data set; 1 if training on it would fail."""
    _check_writable(args)
    store = Store(args.store) if args.store else None
    student = read_student(args.model)
    try:
        records = read_records(args.data, on_error="skip", exclude=exclusions(args.exclude))
    except NoRecords as error:
        report = Report(str(args.data), 0, 0, {}, error.problems, error.excluded, error.text_only)
        report.pictures.missing = missing_files(error.problems)
        return _finish(args, report)
    progress = Progress(0, "images", brief=True)
    report = count(
        str(args.data),
        records,
        student,
        store=store,
        decode=not args.fast,
        most=args.limit,
        progress=progress.show_of,
    )
    if store is not None and report.labels is not None and args.model:
        report.labels.problems += _misfits(store, student)
    if not args.no_sheet:
        _draw(args.sheet, records, args.seed, f"{args.data}: {len(records):,} records")
    return _finish(args, report)


def convert(args: argparse.Namespace) -> int:
    """Write the records of a data set as one JSONL file, with images relative to its folder."""
    out: Path = args.out
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected the name of a .jsonl file")
    if out.exists():
        raise UserError(f"--out {out}: exists; delete it or choose another name")
    _check_folder(out)
    records = read_records(args.data, on_error=args.on_error)
    for note in records.notes():
        print(note)
    progress = Progress(len(records), "records", brief=True)
    folder = os.path.abspath(out.parent)

    def write(name: Path) -> None:
        with name.open("w", encoding="utf-8") as file:
            for number, record in enumerate(records, 1):
                image = os.path.relpath(os.path.abspath(record.image), folder)
                if image.split(os.sep)[0] == "..":
                    raise UserError(
                        f"--out {out}: expected a file in a folder above {record.image}; write it "
                        f"to {records.root / out.name}, or link the images there"
                    )
                file.write(to_json(replace(record, image=Path(image))) + "\n")
                progress.show(number)

    atomic.write_file(out, write)
    if records.problems:
        bad = out.with_name(BAD)
        write_problems(bad, records.problems)
        print(f"{bad}: what was left out")
    print(f"{out}: {len(records):,} records about {len(records.images):,} images")
    return 0


def read_student(source: str | None) -> Student:
    """What the model in a folder makes of data (None: the embedded one). ``UserError`` if it
    cannot be read."""
    from . import weights
    from .prompts import context_length

    loaded = weights.load(source, lazy=True)
    limit = context_length(loaded.model)
    return Student(loaded.tokenizer, limit, loaded.preprocessor, loaded.model.grid)


def _misfits(store: Store, student: Student) -> list[str]:
    """Why the store is not one for the student, in a sentence if there is a reason."""
    try:
        store.check(student.preprocessor.fingerprint(), student.grid)
    except UserError as error:
        return [str(error).removeprefix(f"{store.path}: ")]
    return []


def _draw(path: Path, records: Records, seed: int, title: str) -> None:
    page = contact_sheet(records, seed, title)
    atomic.write_file(path, lambda name: page.save(name, format="PNG"))


def _finish(args: argparse.Namespace, report: Report) -> int:
    """Say and write what was found, and leave with the status that it deserves."""
    if args.json:
        atomic.write_text(args.json, json.dumps(report.to_dict(), indent=2) + "\n")
    if args.bad:
        write_problems(args.bad, report.problems)
    *lines, advice = report.lines()
    for line in lines:
        print(line)
    if report.records and not args.no_sheet:
        print(f"contact sheet: {args.sheet}")
    print(advice)
    return 1 if report.fails else 0


def _check_writable(args: argparse.Namespace) -> None:
    """Before the work, not after it: ``UserError`` for a file that cannot be written."""
    for path in (args.json, args.bad, None if args.no_sheet else args.sheet):
        if path is not None:
            _check_folder(path)
            if path.is_symlink() or (path.exists() and not path.is_file()):  # it would be replaced
                raise UserError(f"{path}: expected a file, got a link or a device; name another")
            _check_outside(path, args.data)


def _check_outside(path: Path, data: Path) -> None:
    """A file below the data would be read as a part of it from then on."""
    file, home = path.resolve(), data.resolve()
    if file == home or (file.is_relative_to(home) and path.name not in (REPORT, BAD)):
        raise UserError(f"{path}: expected a file outside of the data {data}; choose another place")


def _check_folder(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: expected the name of a file in a folder that can be written")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _describe(parser: argparse.ArgumentParser, description: str, examples: str) -> None:
    parser.description, parser.epilog = description, examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    sys.exit(main())
