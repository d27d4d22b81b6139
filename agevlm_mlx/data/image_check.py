"""Whether images can be decoded and their phrases lie in them, found before the first step."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import UserError
from .guidance import check_place, own_mask
from .image import load_image
from .image_files import image_bytes
from .record_set import Records
from .records import Phrase, Problem


def check_images(records: Records, most: int = 2000) -> list[Problem]:
    """What is wrong with up to `most` of the images, evenly spread: those that cannot be decoded,
    and boxes, points and masks that do not fit theirs. In the order of the images.
    """
    count = len(records.images)
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda image: list(_check(records, int(image))), chosen)
        return list(chain.from_iterable(found))


def _check(records: Records, image: int) -> Iterator[Problem]:
    path, numbers = records.images[image], records.of_image(image)
    try:
        width, height = load_image(image_bytes(path), name=str(path)).size
    except UserError as error:
        yield Problem.of(error, str(path), records[int(numbers[0])].id)
        return
    for number in numbers[records.guided[numbers]]:
        record = records[int(number)]
        try:
            for phrase in record.phrases:
                place(phrase, path, width, height)
        except UserError as error:
            yield Problem.of(error, str(path), record.id)


def place(phrase: Phrase, image: Path, width: int, height: int) -> np.ndarray | None:
    """bool [height width], the phrase's own mask, if it has one. ``UserError`` where this, its box
    or its point does not fit its image of width x height px."""
    check_place(phrase, image, width, height)
    return None if phrase.mask is None else own_mask(phrase, image, width, height)
