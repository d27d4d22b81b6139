"""The data formats that are not files of records: who finds them, and who reads them.

A reader is ``read_x(path) -> Iterator[Record | Problem]``. It yields a `Problem` for what is
wrong with one record, may yield `TextOnly` for one that has no image, and raises ``UserError``
where nothing can be read at all. It need not ask whether an image exists, is excluded or a phrase
is in its text: `record_set.read_records` does, which also keeps what it yields on disk. Numbers in
records are Python's own, not numpy's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .coco import coco_root, is_coco, read_coco_folder
from .flickr30k import flickr30k_root, is_flickr30k, read_flickr30k
from .folder import is_folder, read_folder
from .huggingface import is_huggingface, read_huggingface
from .records import Problem, Record, TextOnly
from .refcoco import is_refcoco, read_refcoco, refcoco_root


def folder(path: Path) -> Path:
    """The folder that a path is or lies in."""
    return path if path.is_dir() else path.parent


@dataclass(frozen=True)
class Format:
    """A format that `read_records` finds by itself.

    needs: what a folder (or file) of it holds, for the message when nothing fits. matches:
    whether a file or folder is of it; cheap, raises nothing. read: its records, one by one. root:
    the folder that keys of images are relative to.
    """

    needs: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Iterable[Record | Problem | TextOnly]]
    root: Callable[[Path], Path] = folder


#: The first that matches is read. Asked after ``llava.json`` and a folder's only .jsonl file,
#: before a .json array.
FORMATS: tuple[Format, ...] = (
    Format("captions_*.json with instances_*.json (COCO)", is_coco, read_coco_folder, coco_root),
    Format("refs(unc).p with instances.json (RefCOCO)", is_refcoco, read_refcoco, refcoco_root),
    Format(
        "Sentences with Annotations (Flickr30k Entities)",
        is_flickr30k,
        read_flickr30k,
        flickr30k_root,
    ),
    Format("a folder of pictures with a.txt or metadata.csv", is_folder, read_folder),
    Format("parquet or Arrow files (Hugging Face)", is_huggingface, read_huggingface),
)
