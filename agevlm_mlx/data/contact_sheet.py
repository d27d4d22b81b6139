"""A page of random pictures of a data set, each with its phrases drawn on it and a text below."""

import bisect
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..errors import UserError
from .image import load_image
from .image_check import place
from .image_files import image_bytes
from .record_set import Records
from .records import Phrase, Record, Turn

COLUMNS, ROWS = 4, 4
_WIDE, _HIGH = 340, 260
_MARGIN, _GAP, _LINE, _SMALL = 24, 20, 18, 14
_MOST_LINES, _MOST_PHRASES = 3, 8
_INK, _QUIET, _PAPER, _MOUNT = (32, 33, 36), (95, 99, 104), (255, 255, 255), (226, 229, 233)
_DARK, _WRONG = (17, 18, 20), (176, 32, 32)
#: Bright enough to be seen with a dark edge on anything, and far from one another for
#: colour-blind eyes too (after Okabe and Ito, lightened).
_COLOURS = (
    (255, 214, 51),
    (86, 196, 255),
    (255, 128, 96),
    (98, 230, 160),
    (255, 150, 220),
    (190, 160, 255),
    (255, 255, 255),
    (255, 176, 64),
)
#: Fonts of common systems for letters that Pillow's own font lacks, the best first.
_FONTS = ("Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(records: Records, seed: int = 0, title: str = "") -> Image.Image:
    """Sixteen of the data's pictures (fewer where there are fewer), drawn at random by `seed`.

    Of each, a record with phrases that have a place where there is one. A picture that cannot be
    shown, and a phrase that does not fit it, say why in its place.
    """
    rng = np.random.default_rng(seed)
    count = min(COLUMNS * ROWS, len(records.images))
    images = np.sort(rng.choice(len(records.images), count, replace=False))
    tiles = [_tile(_chosen(records, int(image), rng)) for image in images]
    columns = min(COLUMNS, count)
    lines = [tiles[at : at + columns] for at in range(0, count, columns)]
    top = _MARGIN + 44
    height = top + sum(max(t.height for t in line) + _GAP for line in lines) + _MARGIN - _GAP
    page = Image.new("RGB", (2 * _MARGIN + columns * (_WIDE + _GAP) - _GAP, height), _PAPER)
    pen = ImageDraw.Draw(page)
    _write(pen, (_MARGIN, _MARGIN - 4), _fitted(pen, title, page.width - 2 * _MARGIN, 20), 20)
    y = top
    for line in lines:
        for column, tile in enumerate(line):
            page.paste(tile, (_MARGIN + column * (_WIDE + _GAP), y))
        y += max(tile.height for tile in line) + _GAP
    return page


def _chosen(records: Records, image: int, rng: np.random.Generator) -> Record:
    numbers = records.of_image(image)
    guided = numbers[records.guided[numbers]]
    return records[int(rng.choice(guided if len(guided) else numbers))]


def _tile(record: Record) -> Image.Image:
    """A picture with its text below, `_WIDE` wide and as high as it has to be."""
    shown, size, problem = Image.new("RGB", (_WIDE, _HIGH), _MOUNT), "", ""
    try:
        picture = load_image(image_bytes(record.image), name=record.image.name)
        size = f"{picture.width}x{picture.height}"
        problem = _draw(shown, picture, record)
    except UserError as error:
        problem = str(error)
    pen = ImageDraw.Draw(shown)
    name = f"{record.id} · {record.kind} · {size}" if size else f"{record.id} · {record.kind}"
    rows = [(_fitted(pen, name, _WIDE, _SMALL - 2), _SMALL - 2, _QUIET)]
    if problem:
        rows += [(line, _SMALL, _WRONG) for line in _wrapped(pen, problem)]
    for turn in _first_exchange(record):
        mark = "A: " if turn.role == "assistant" else "Q: "
        rows += [(line, _SMALL, _INK) for line in _wrapped(pen, mark + turn.text)]
    left = len(record.turns) - 2
    if left > 0:
        rows.append((f"and {left} more turns", _SMALL - 2, _QUIET))
    tile = Image.new("RGB", (_WIDE, _HIGH + 8 + len(rows) * _LINE), _PAPER)
    tile.paste(shown)
    pen = ImageDraw.Draw(tile)
    for number, (line, height, colour) in enumerate(rows):
        _write(pen, (0, _HIGH + 6 + number * _LINE), line, height, colour)
    return tile


def _first_exchange(record: Record) -> list[Turn]:
    """The turn that holds the drawn phrases and the one that belongs to it, else the first two."""
    turn = next((p.turn for p in record.phrases if p.box or p.point or p.mask is not None), 0)
    start = turn - 1 if record.turns[turn].role == "assistant" and turn else turn
    return list(record.turns[start : start + 2])


def _draw(tile: Image.Image, picture: Image.Image, record: Record) -> str:
    """Put a picture and its phrases into a tile; what is wrong with one of them, or nothing."""
    scale = min(_WIDE / picture.width, _HIGH / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    corner = (_WIDE - size[0]) // 2, (_HIGH - size[1]) // 2
    tile.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    pen = ImageDraw.Draw(tile)
    wrong, labels = "", []
    placed = [p for p in record.phrases if p.box or p.point or p.mask is not None]
    for number, phrase in enumerate(placed[:_MOST_PHRASES]):
        colour = _COLOURS[number % len(_COLOURS)]
        try:
            mask = place(phrase, record.image, *picture.size)
        except UserError as error:
            wrong = wrong or str(error).replace(str(record.image), "the picture")
            continue
        stretch = size[0] / picture.width, size[1] / picture.height
        labels.append((phrase.text, colour, _outline(tile, phrase, mask, colour, corner, stretch)))
    taken: list[tuple[float, float, float, float]] = []
    for text, colour, at in labels:  # last, so that no outline crosses a word
        taken.append(_label(pen, text, colour, at, taken))
    if len(placed) > _MOST_PHRASES:
        more = f"+{len(placed) - _MOST_PHRASES} phrases"
        _label(pen, more, _MOUNT, (_WIDE - pen.textlength(more, _font(12)) - 8, _HIGH - 18), taken)
    return wrong


def _outline(
    tile: Image.Image,
    phrase: Phrase,
    mask: np.ndarray | None,
    colour: tuple[int, int, int],
    corner: tuple[int, int],
    stretch: tuple[float, float],
) -> tuple[float, float]:
    """Draw where a phrase is; the point at which its label begins."""
    pen = ImageDraw.Draw(tile)

    def moved(x: float, y: float) -> tuple[float, float]:
        return corner[0] + x * stretch[0], corner[1] + y * stretch[1]

    if mask is not None and mask.any():
        height, width = mask.shape
        size = max(1, round(width * stretch[0])), max(1, round(height * stretch[1]))
        level = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BOX)
        inside = Image.new("L", tile.size)
        inside.paste(Image.fromarray(np.asarray(level) > 100).convert("L"), corner)
        thin = inside.filter(ImageFilter.MaxFilter(3))
        rim = ImageChops.subtract(thin.filter(ImageFilter.MaxFilter(3)), inside)
        edge = ImageChops.subtract(rim.filter(ImageFilter.MaxFilter(3)), rim)
        tile.paste(colour, (0, 0), inside.point([v // 6 for v in range(256)]))
        tile.paste(_DARK, (0, 0), edge)
        tile.paste(colour, (0, 0), rim)
        top = int(mask.any(axis=1).argmax())
        return moved(float(mask[top].argmax()), float(top))
    if phrase.box is not None:
        (x0, y0), (x1, y1) = moved(*phrase.box[:2]), moved(*phrase.box[2:])
        x1, y1 = max(x1, x0 + 2), max(y1, y0 + 2)
        pen.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=_DARK, width=4)
        pen.rectangle((x0 - 1, y0 - 1, x1, y1), outline=colour, width=2)
        return x0, y0
    if phrase.point is not None:
        x, y = moved(*phrase.point)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=_DARK)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        return x + 6, y - 4
    return moved(0, 0)


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    colour: tuple[int, int, int],
    at: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Write a word on a tag above `at`, or where there is room; the place that it takes."""
    text = _fitted(pen, _clean(text), 150, 12)
    wide, high = pen.textlength(text, font=_best(text, 12)) + 8, 16
    x = min(max(at[0] - 2, 0), max(_WIDE - wide, 0))
    above = min(max(at[1] - high - 1, 0), _HIGH - high)
    steps = [above + sign * k * (high + 1) for k in range(_HIGH // high) for sign in (1, -1)]
    free = (y for y in steps if 0 <= y <= _HIGH - high and not _hits(x, y, wide, high, taken))
    y = next(free, above)
    box = (x, y, x + wide, y + high)
    pen.rectangle(box, fill=colour, outline=_DARK)
    _write(pen, (x + 4, y), text, 12, _DARK)
    return box


def _hits(
    x: float,
    y: float,
    wide: float,
    high: float,
    taken: Sequence[tuple[float, float, float, float]],
) -> bool:
    return any(x < x1 and x + wide > x0 and y < y1 and y + high > y0 for x0, y0, x1, y1 in taken)


def _wrapped(pen: ImageDraw.ImageDraw, text: str) -> list[str]:
    """At most `_MOST_LINES` lines that fit a tile; the last one says if there were more."""
    lines, text = [], _clean(text)
    for line in _lines(pen, text[:2000], _WIDE, _SMALL):
        if len(lines) == _MOST_LINES:
            lines[-1] = _fitted(pen, lines[-1] + "...", _WIDE, _SMALL)
            break
        lines.append(line)
    return lines


def _lines(pen: ImageDraw.ImageDraw, text: str, width: float, size: int) -> Iterator[str]:
    """Lines of whole words, where a word fits one."""
    line = ""
    for word in text.split():
        while word:  # in pieces if it is a long address, or has no spaces in its language
            end = _fits(pen, word, width, size)
            if line and end < len(word):
                room = width - pen.textlength(f"{line} ", font=_best(line, size))
                end = _fits(pen, word, room, size)
            longer = f"{line} {word[:end]}".strip()
            if line and pen.textlength(longer, font=_best(longer, size)) > width:
                yield line
                longer = word[:end]
            line, word = longer, word[end:]
    if line:
        yield line


def _fits(pen: ImageDraw.ImageDraw, text: str, width: float, size: int) -> int:
    """How many letters of a text fit the width, at least one."""
    font, most = _best(text, size), min(len(text), int(width))
    long = bisect.bisect_right(
        range(1, most + 1), width, key=lambda n: pen.textlength(text[:n], font=font)
    )
    return max(long, 1)


def _fitted(pen: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    text = _clean(text)
    if pen.textlength(text[: int(width) + 1], font=_best(text, size)) <= width:
        return text
    return text[: _fits(pen, text, width - pen.textlength("...", font=_font(size)), size)] + "..."


def _clean(text: str) -> str:
    """One line that can be drawn: no control characters, nothing that turns the direction."""
    text = unicodedata.normalize("NFC", text[:4000])
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int] = _INK,
) -> None:
    pen.text(at, text, fill=colour, font=_best(text, size))


@lru_cache(maxsize=32)
def _font(size: int, name: str | None = None) -> Font | None:
    """Pillow's own font, or one of the system's; None if it has none of that name."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _best(text: str, size: int) -> Font | None:
    """The first font that has all letters of a text, else Pillow's own."""
    for name in (None, *_FONTS):
        font = _font(size, name)
        if font is not None and all(_has(font, letter) for letter in set(text)):
            return font
    return _font(size)


@lru_cache(maxsize=8192)
def _has(font: Font, letter: str) -> bool:
    # A font draws the same box for everything that it lacks.
    return letter == " " or _drawn(font, letter) != _drawn(font, "\U0010fffe")


def _drawn(font: Font, letter: str) -> bytes:
    canvas = Image.new("L", (32, 32))
    ImageDraw.Draw(canvas).text((2, 2), letter, fill=255, font=font)
    return canvas.tobytes()
