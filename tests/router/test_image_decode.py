"""Files to RGB pixels: every form of the four formats, and files that are not what they claim to be."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experts.errors import InvalidInput
from router.prompt.images.decode import decode_image
from router.prompt.images.header import DAMAGED, read_header
from router.prompt.images.limits import ImageLimits

LIMITS = ImageLimits()
FORMATS = ("PNG", "JPEG", "WebP", "GIF")
WHITE = (255, 255, 255)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    return Image.frombytes("RGB", (width, height), bytes((7 * i) % 256 for i in range(width * height * 3)))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, lines: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    data = image.tobytes()
    return [tuple(data[i : i + 3]) for i in range(0, len(data), 3)]


def decoded(data: bytes) -> list[tuple[int, ...]]:
    return pixels(decode_image(data, LIMITS))


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        decode_image(data, limits, "my field")
    assert caught.value.field == "my field"
    assert not re.search(r"0x|/|\\|<|Error|PIL|object", str(caught.value)), caught.value
    return caught.value


def test_lossless_files_come_out_as_they_were() -> None:
    image = gradient()
    assert decoded(file_of(image, "PNG")) == pixels(image)
    assert decoded(file_of(image, "WebP", lossless=True)) == pixels(image)
    grey = image.convert("L")
    assert decoded(file_of(grey, "GIF")) == pixels(grey.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded(mode: str) -> None:
    flat = Image.new(mode, (20, 30), 200 if mode == "L" else (200, 100, 50))
    image = decode_image(file_of(flat, "JPEG"), LIMITS)
    assert (image.size, image.mode) == ((20, 30), "RGB")
    expected = (200, 200, 200) if mode == "L" else (200, 100, 50)
    assert all(max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= 3 for pixel in pixels(image))


def test_cmyk_is_decoded() -> None:
    image = decode_image(file_of(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG"), LIMITS)
    red, green, blue = pixels(image)[0]
    assert red < 5 and green > 250 and blue < 5


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("LA", (1, 1), (0, 0)), WHITE),
        (Image.new("LA", (1, 1), (40, 255)), (40, 40, 40)),
        (Image.new("RGBA", (1, 1), (9, 99, 199, 255)), (9, 99, 199)),
        (Image.new("RGBA", (1, 1), (9, 99, 199, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (0, 100, 255, 128)), (127, 177, 255)),
    ],
)
def test_modes_of_png(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert decoded(file_of(image, "PNG")) == [expected]


def test_transparency_by_palette_and_by_color_lies_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert decoded(file_of(palette, "PNG")) == [(10, 20, 30), (40, 50, 60)]
    assert decoded(file_of(palette, "PNG", transparency=1)) == [(10, 20, 30), WHITE]
    assert decoded(file_of(palette, "PNG", transparency=bytes([255, 128]))) == [(10, 20, 30), (147, 152, 157)]
    color = Image.new("RGB", (2, 1), (1, 2, 3))
    color.putpixel((1, 0), (4, 5, 6))
    assert decoded(file_of(color, "PNG", transparency=(4, 5, 6))) == [(1, 2, 3), WHITE]
    grey = Image.frombytes("L", (2, 1), bytes([8, 9]))
    assert decoded(file_of(grey, "PNG", transparency=8)) == [WHITE, (9, 9, 9)]


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = [0, 255, 256, 0x8001, 0xFFFF]
    lines = b"\0" + struct.pack(">5H", *values)
    assert decoded(png(5, 1, 16, 0, lines)) == [(v >> 8,) * 3 for v in values]
    key = chunk(b"tRNS", struct.pack(">H", 0x8001))
    assert decoded(png(5, 1, 16, 0, lines, key))[3:] == [WHITE, WHITE]
    assert decoded(png(5, 1, 16, 0, lines, key))[:3] == [(0, 0, 0), (0, 0, 0), (1, 1, 1)]
    assert decoded(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x1234, 0xABCD, 255))) == [(0x12, 0xAB, 0)]
    assert decoded(png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0x1234, 0xABCD, 255, 0))) == [WHITE]
    assert decoded(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 0x1234, 0xFFFF))) == [(0x12, 0x12, 0x12)]


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WebP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert set(decoded(data)) == {(250, 0, 0)}


def test_transparent_gif_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decoded(file_of(image, "GIF", transparency=0)) == [WHITE, (40, 50, 60)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    """Corners of the upright picture: white at the top left, dark at the top right, mid grey at the bottom left."""
    upright = Image.new("RGB", (40, 24), (200, 200, 200))
    upright.paste((255, 255, 255), (0, 0, 20, 12))
    upright.paste((0, 0, 0), (20, 0, 40, 12))
    upright.paste((100, 100, 100), (0, 12, 20, 24))
    turned = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for method in turned.get(orientation, []):
        stored = stored.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WebP" else {}
    image = decode_image(file_of(stored, kind, exif=exif, **options), LIMITS)
    assert image.size == (40, 24)
    corners = [image.getpixel(at) for at in ((4, 4), (35, 4), (4, 20), (35, 20))]
    for found, wanted in zip(corners, (255, 0, 100, 200), strict=True):
        assert isinstance(found, tuple) and abs(found[0] - wanted) <= 3


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    image = gradient()
    for exif in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"junk"):
        assert decoded(png(24, 16, 8, 2, lines_of(image), chunk(b"eXIf", exif))) == pixels(image)


def lines_of(image: Image.Image) -> bytes:
    data, step = image.tobytes(), image.width * 3
    return b"".join(b"\0" + data[i : i + step] for i in range(0, len(data), step))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 100_000), (100_000, 1), (2, 1), (16_000, 4_000)])
def test_odd_sizes_are_decoded(width: int, height: int) -> None:
    image = decode_image(file_of(Image.new("L", (width, height), 3), "PNG"), LIMITS)
    assert image.size == (width, height)
    assert image.getpixel((width - 1, height - 1)) == (3, 3, 3)


def bomb(kind: str, width: int, height: int) -> bytes:
    """A small file that promises a large picture."""
    if kind == "PNG":
        return png(width, height, 8, 6, b"\0" * 100_000)
    data = bytearray(file_of(gradient(16, 16), kind, **({"lossless": True} if kind == "WebP" else {})))
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    else:
        assert data[12:16] == b"VP8L"
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "width", "height"),
    [
        ("PNG", 2**31 - 1, 2**31 - 1),
        ("PNG", 8001, 8000),
        ("PNG", 2**20, 1),
        ("PNG", 1, 2**20),
        ("GIF", 65535, 65535),
        ("JPEG", 65535, 65535),
        ("WebP", 16383, 16383),
    ],
)
def test_bombs_are_refused_by_their_headers(
    kind: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.prompt.images.decode._READERS", {})
    error = refusal(bomb(kind, width, height))
    assert error.value == f"{kind} of {width} by {height} pixels"
    assert "may have at most" in error.rule


def test_the_limits_are_inclusive() -> None:
    data = file_of(Image.new("L", (20, 30)), "PNG")
    limits = ImageLimits(max_bytes=len(data), max_pixels=600, max_side=30)
    assert decode_image(data, limits).size == (20, 30)
    for tighter in ({"max_bytes": len(data) - 1}, {"max_pixels": 599}, {"max_side": 29}):
        refusal(data, ImageLimits(**{"max_bytes": len(data), "max_pixels": 600, "max_side": 30, **tighter}))


def test_a_frame_larger_than_its_screen_is_refused_before_it_is_decoded() -> None:
    data = bytearray(file_of(Image.new("L", (16, 16)), "GIF"))
    at = data.index(b"\x2c\0\0\0\0") + 5
    data[at : at + 4] = struct.pack("<HH", 8500, 8500)
    assert refusal(bytes(data)).value == "GIF of 8500 by 8500 pixels"
    data[at : at + 4] = struct.pack("<HH", 65535, 65535)
    refusal(bytes(data))


def test_a_second_frame_header_does_not_get_past_the_limits() -> None:
    data = bytearray(file_of(gradient(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 19])
    frame[5:9] = struct.pack(">HH", 65535, 65535)
    assert "may have at most" in refusal(bytes(data[: at + 19] + frame + data[at + 19 :])).rule


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels_are_refused(size: tuple[int, int]) -> None:
    assert "at least one pixel" in refusal(png(*size, 8, 0, b"\0")).rule


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_refused_wherever_they_end(kind: str) -> None:
    whole = file_of(Image.frombytes("RGB", (24, 16), random.Random(1).randbytes(24 * 16 * 3)), kind)
    expected = decoded(whole)
    for end in range(len(whole)):
        try:
            # The last bytes may be checksums and marks of the end.
            assert decoded(whole[:end]) == expected and end > len(whole) - 32
        except InvalidInput:
            assert refusal(whole[:end]).rule in (DAMAGED, "must be a PNG, JPEG, WebP or GIF image")


@pytest.mark.parametrize("kind", FORMATS)
def test_content_decides_whatever_follows(kind: str) -> None:
    image = gradient()
    data = file_of(image, kind)
    assert read_header(data, LIMITS, "x").kind == kind
    if kind != "WebP":
        assert decoded(data + b"\0junk behind the end") == decoded(data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "PCX", "TGA", "SGI", "JPEG2000", "PDF", "EPS", "AVIF"])
def test_other_formats_are_not_even_tried(kind: str) -> None:
    try:
        data = file_of(gradient(), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow cannot write {kind}")
    assert refusal(data).rule == "must be a PNG, JPEG, WebP or GIF image"


def test_a_picture_of_several_pictures_is_its_first() -> None:
    """Cameras write them as JPEG with more behind; another reader of Pillow's would take them."""
    red, blue = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    data = file_of(red, "MPO", save_all=True, append_images=[blue])
    assert data.startswith(b"\xff\xd8\xff")
    red_part, _, blue_part = decoded(data)[0]
    assert red_part > 240 and blue_part < 10


def test_only_four_readers_of_pillow_are_imported() -> None:
    code = (
        "import sys; from router.prompt.images import worker\n"
        "print(*(name for name in sys.modules if name.startswith('PIL.') and name.endswith('Plugin')))\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules, 'pickle' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split("\n")
    names = {name.removeprefix("PIL.").removesuffix("ImagePlugin") for name in out[0].split()}
    assert names == {"Png", "Jpeg", "WebP", "Gif"}
    assert out[1] == "False False False"


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_broken_files_give_a_picture_or_one_clear_refusal(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    content = bytearray(file_of(gradient(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        image = decode_image(bytes(content), ImageLimits(max_pixels=10_000))
    except InvalidInput as error:
        assert error.rule == DAMAGED or error.rule.startswith(("an image m", "each side", "must be a PNG"))
    else:
        assert image.mode == "RGB" and image.width * image.height <= 10_000


@settings(deadline=None, max_examples=300)
@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP"]),
    rest=st.binary(),
)
def test_headers_of_anything_are_read_or_refused(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest, LIMITS, "x")
    except InvalidInput as error:
        assert error.field == "x"
    else:
        assert 0 < header.width * header.height <= LIMITS.max_pixels


def test_endless_segments_are_given_up() -> None:
    assert refusal(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000).rule == DAMAGED
    assert refusal(b"\xff\xd8" + b"\xff" * 1_000_000).rule == DAMAGED
