"""An upright RGB picture to the tiles that the vision tower reads. Knows Pillow; nothing of files or tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from PIL import Image

from router.prompt.images.canvas import Layout, lay_out, num_tiles
from router.prompt.images.settings import ImageSettings

CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ImageTiles:
    """`pixels` are uint8 [num_tiles, 3, S, S]: `rows` x `cols` tiles row by row, then the global one, if any.

    `digest` is SHA-256 over mode, sizes, pixels and settings: equal digests stand for equal features.
    """

    pixels: bytes
    rows: int
    cols: int
    digest: bytes

    @property
    def num_tiles(self) -> int:
        return num_tiles(self.rows, self.cols)


def cut(image: Image.Image, settings: ImageSettings) -> ImageTiles:
    """The tiles of `image`: resized onto its canvas, black beside it, and once more as a whole in one tile.

    Resizing is Pillow's bilinear filter, which averages over all pixels that a new one covers. transformers uses
    torch's, on floats or on uint8 as its processor at hand does: over sizes from 1x1 to 4000x3000 its values differ
    from ours by at most 1 of 255 on floats, and on uint8 by at most 2, by 2 in about one of 100,000 values of small
    pictures that are enlarged.
    """
    layout = lay_out(*image.size, settings)
    pixels = b"".join(band.tobytes() for tile in _tiles(image, layout, settings.tile_size) for band in tile.split())
    about = json.dumps([image.mode, image.size, layout.rows, layout.cols, asdict(settings)], sort_keys=True)
    digest = hashlib.sha256(about.encode() + b"\n" + pixels).digest()
    return ImageTiles(pixels=pixels, rows=layout.rows, cols=layout.cols, digest=digest)


def _tiles(image: Image.Image, layout: Layout, tile: int) -> list[Image.Image]:
    canvas = Image.new("RGB", (layout.cols * tile, layout.rows * tile))
    canvas.paste(_resize(image, layout.width, layout.height))
    tiles = [
        canvas.crop((col * tile, row * tile, (col + 1) * tile, (row + 1) * tile))
        for row in range(layout.rows)
        for col in range(layout.cols)
    ]
    if len(tiles) > 1:
        tiles.append(_resize(image, tile, tile))
    return tiles


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """First along the rows, as torch does; left alone, newer versions of Pillow begin with the cheaper direction."""
    along_rows = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return along_rows.resize((width, height), Image.Resampling.BILINEAR)
