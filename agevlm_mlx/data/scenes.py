"""The embedded data: folders of pictures in the formats that users have.

A folder holds `images/`, `llava.json` (texts), `captions.json` and `instances.json` (COCO),
`pope_random.json`, `pope_popular.json`, `pope_adversarial.json` (POPE's JSON lines) and, written
last, `scenes.json` (what made it). The same arguments give the same bytes.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ..atomic import write_text
from ..errors import UserError
from ..sam.targets import rle_encode
from .nouns import ALL_NOUNS, NOUNS, SPLITS, Split
from .painting import SIDE, make_scene
from .scene_dialogues import rich_records
from .scene_marks import mark_absent, mark_masks
from .scene_texts import POPE_KINDS, caption, pope_questions, scene_records
from .styles import STYLES, Style

#: Changes whenever the same arguments would give other bytes.
VERSION = 1
Texts = Literal["short", "rich"]
TEXTS: tuple[Texts, ...] = get_args(Texts)
ATTRIBUTION = "OpenMoji (https://openmoji.org), CC BY-SA 4.0"
_CHUNK = 64


def write_scenes(
    out: Path,
    n: int,
    seed: int,
    split: Split = "train",
    progress: Callable[[int, int], None] | None = None,
    style: Style = "plain",
    texts: Texts = "short",
    masks: bool = False,
    absent: bool = False,
) -> bool:
    """Write `n` pictures of a split to the folder `out`; False when it was there already.

    Another `style` draws the same nouns otherwise (see `styles`); questions are the same too, but
    for some of "scaled", which are about sizes and places. The ``rich`` texts are those of
    `scene_dialogues` after the ``short`` ones. masks: phrases have exact masks beside their boxes.
    absent: nouns that a text names and the picture does not show are phrases, marked as absent.
    `progress` is called with (done, n). A folder left by an interrupted run is completed;
    one with other contents is refused with ``UserError``.
    """
    if n < 1 or n > 999_999:
        raise UserError(f"n: expected 1 to 999999 pictures, got {n}")
    if split not in SPLITS:
        raise UserError(f"split: expected {', '.join(SPLITS)}, got {split!r}")
    if style not in STYLES:
        raise UserError(f"style: expected {', '.join(STYLES)}, got {style!r}")
    if seed < 0:
        raise UserError(f"seed: expected a number >= 0, got {seed}")
    about = {"format": "agevlm-scenes", "version": VERSION, "split": split, "seed": seed, "n": n,
             "side": SIDE, "attribution": ATTRIBUTION}  # fmt: skip
    if style != "plain":  # said only then: older plain folders stay what they are
        about["style"] = style
    if texts not in TEXTS:
        raise UserError(f"texts: expected {', '.join(TEXTS)}, got {texts!r}")
    if texts != "short":
        about["texts"] = texts
    about |= {name: True for name, on in (("masks", masks), ("absent", absent)) if on}
    if _finished(out, about):
        return False
    images = out / "images"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".unfinished").write_text(json.dumps(about))
        images.mkdir(exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out}: expected a folder that can be written, {error.strerror}") from None
    drawn = (str(images), seed, split, style, texts, masks, absent)
    jobs = [(*drawn, i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]
    parts, done = [], 0
    with contextlib.closing(_run(jobs)) as finished:
        for part in finished:
            parts.append(part)
            done += len(part["images"])
            if progress:
                progress(done, n)
    _write_tables(out, parts)
    write_text(out / "scenes.json", json.dumps(about, indent=2) + "\n")
    (out / ".unfinished").unlink()
    return True


def _finished(out: Path, about: dict[str, Any]) -> bool:
    """Whether `out` already holds exactly this; ``UserError`` when it holds something else."""
    marker = out / "scenes.json"
    if marker.is_file():
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            found = None
        if found == about:
            return True
        raise UserError(
            f"{out}: holds other scenes ({_brief(found)}, asked for {_brief(about)}); "
            "choose another folder or delete it"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder to write to, got a file")
    if out.exists() and any(out.iterdir()) and not (out / ".unfinished").exists():
        raise UserError(f"{out}: expected an empty or new folder, found other files in it")
    shutil.rmtree(out / "images", ignore_errors=True)
    return False


def _brief(about: Any) -> str:
    if not isinstance(about, dict):
        return "unreadable scenes.json"
    known = {"style": "plain", "texts": "short"} | about
    keys = ("split", "n", "seed", "style", "texts", "version")
    marks = [key for key in ("masks", "absent") if known.get(key)]
    return " ".join([*(f"{key}={known.get(key)}" for key in keys), *marks])


def _run(jobs: list[tuple]) -> Generator[dict[str, Any], None, None]:
    """The results of `_paint_chunk` in order, from as many processes as there are cores."""
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers == 1 or not _can_spawn():
        yield from map(_paint_chunk, jobs)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_the_parent
    ) as pool:
        try:
            yield from pool.map(_paint_chunk, jobs)
        except BrokenProcessPool:
            raise UserError(
                "scenes: a worker process was killed (out of memory?); run the same command again"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process; the parent stops the workers, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _can_spawn() -> bool:
    """Spawned workers import the main script again, which an interactive one does not survive."""
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or script is None or Path(script).is_file()


def _paint_chunk(
    job: tuple[str, int, Split, Style, Texts, bool, bool, int, int],
) -> dict[str, Any]:
    """Paint pictures first .. last-1 and describe them; runs in a worker process."""
    folder, seed, split, style, texts, masks, absent, first, last = job
    part: dict[str, Any] = {"images": [], "captions": [], "annotations": [], "records": []}
    part.update({kind: [] for kind in POPE_KINDS})
    for i in range(first, last):
        scene = make_scene(seed, split, i, style)
        name = f"{i:06d}.png"
        Image.fromarray(scene.image).save(Path(folder) / name, compress_level=1)
        # Texts have their own random numbers: another wording leaves the pixels as they are.
        rng = np.random.default_rng([seed, SPLITS.index(split), i, 1])
        part["images"].append({"id": i, "file_name": name, "width": SIDE, "height": SIDE})
        described = caption([scene.nouns[k] for k in scene.left_to_right()])
        part["captions"].append({"image_id": i, "caption": described})
        for noun, mask, (x0, y0, x1, y1) in zip(
            scene.nouns, scene.masks, scene.boxes.tolist(), strict=True
        ):
            part["annotations"].append(
                {
                    "image_id": i,
                    "category_id": ALL_NOUNS.index(noun) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": rle_encode(mask),
                }
            )
        records = scene_records(scene, f"{i:06d}", f"images/{name}", rng)
        if texts == "rich":
            rng_rich = np.random.default_rng([seed, SPLITS.index(split), i, 2])
            records += rich_records(scene, f"{i:06d}", f"images/{name}", rng_rich)
        if masks:
            mark_masks(records, scene)
        if absent:
            mark_absent(records, scene)
        part["records"] += records
        for kind, questions in pope_questions(scene, name, rng).items():
            part[kind] += questions
    return part


def _write_tables(out: Path, parts: list[dict[str, Any]]) -> None:
    def rows(key: str) -> list[dict]:
        return [row for part in parts for row in part[key]]

    used = {row["category_id"] for row in rows("annotations")} | set(range(1, len(NOUNS) + 1))
    categories = [{"id": i, "name": noun} for i, noun in enumerate(ALL_NOUNS, 1) if i in used]
    coco = {"info": {"description": "agevlm-mlx embedded scenes", "attribution": ATTRIBUTION}}
    captions = [{"id": i, **row} for i, row in enumerate(rows("captions"))]
    boxes = [{"id": i, **row} for i, row in enumerate(rows("annotations"), 1)]
    write_text(out / "llava.json", _lines(rows("records")))
    write_text(
        out / "captions.json",
        json.dumps({**coco, "images": rows("images"), "annotations": captions}),
    )
    write_text(
        out / "instances.json",
        json.dumps(
            {**coco, "images": rows("images"), "annotations": boxes, "categories": categories}
        ),
    )
    for kind in POPE_KINDS:
        questions = [{"question_id": i, **q} for i, q in enumerate(rows(kind), 1)]
        write_text(out / f"pope_{kind}.json", "".join(json.dumps(q) + "\n" for q in questions))


def _lines(records: list[dict]) -> str:
    """A JSON array with one record a line, so that an error can name the line."""
    return "[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n"
