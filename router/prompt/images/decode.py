"""A picture's file to upright RGB pixels. Knows Pillow, and of it the readers of four formats only.

Pillow decodes hostile bytes in C, so this runs in a process of its own; `worker` is that process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO

from PIL import ExifTags, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from experts.errors import InvalidInput
from router.prompt.images.header import DAMAGED, check_size, read_header
from router.prompt.images.limits import ImageLimits

STRIP_PIXELS = 1 << 20

# Called directly: Image.open would try others, and JPEG's own factory turns to a format of several pictures.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of this EXIF orientation upright."""


def decode_image(data: bytes, limits: ImageLimits, field: str = "image") -> Image.Image:
    """The picture in the file `data`, its first frame, upright and in RGB; transparent parts lie on white.

    Raises InvalidInput(field) for other formats than PNG, JPEG, WebP and GIF, and for files that are damaged, cut
    off or too large. The size is checked before pixels are decoded.
    """
    kind = read_header(data, limits, field).kind
    try:
        image = _READERS[kind](BytesIO(data))
        # Some files have a second header that says otherwise.
        check_size(kind, *image.size, limits, field)
        image.load()
    except (InvalidInput, MemoryError):
        raise
    # Pillow promises nothing narrower for files that are not what they claim to be.
    except Exception:
        raise InvalidInput(field, kind, DAMAGED) from None
    method = _UPRIGHT.get(_orientation(image))
    rgb = to_rgb(image)
    # Two copies of a large picture are enough.
    del image
    return rgb if method is None else rgb.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that the four formats have, in RGB; what is transparent is laid on white."""
    if image.mode == "I;16":
        image = _with_eight_bits(image)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, part).convert("RGB"), box[:2])
    return rgb


def _with_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by its upper bytes, as Pillow reads 16-bit colour; its own conversion would clip at 255."""
    grey = Image.new("L", image.size)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.new("L", image.size)
    for box in _strips(image):
        raw = image.crop(box).tobytes("raw", "I;16B")
        size = (box[2] - box[0], box[3] - box[1])
        grey.paste(Image.frombytes("L", size, raw[::2]), box[:2])
        if alpha is not None:
            values = struct.unpack(f">{len(raw) // 2}H", raw)
            opaque = bytes(0 if value == key else 255 for value in values)
            alpha.paste(Image.frombytes("L", size, opaque), box[:2])
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows that cover the picture: working on all of it at once would take several copies."""
    num_rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        yield 0, top, image.width, min(top + num_rows, image.height)


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 where there is none or it cannot be read: a picture is no worse for that."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1
