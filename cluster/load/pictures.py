"""Pictures for loads: each number has one of its own, which compresses about as badly as a photograph's PNG."""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw


def draw_png(size: tuple[int, int], number: int, seed: int) -> bytes:
    """A PNG of `size` (width, height): coloured noise under a few ellipses."""
    generator = random.Random(f"picture {seed} {number}")
    width, height = size
    small = (max(1, width // 4), max(1, height // 4))
    noise = generator.randbytes(3 * small[0] * small[1])
    picture = Image.frombytes("RGB", small, noise).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for _ in range(5):
        left, right = sorted(generator.randrange(width) for _ in range(2))
        top, bottom = sorted(generator.randrange(height) for _ in range(2))
        draw.ellipse((left, top, right, bottom), fill=(*generator.randbytes(3),))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
