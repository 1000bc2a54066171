"""Pictures to tiles and token ids: the specification's table, a slow second implementation, torch and transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slow_images import Rows, best_canvas, by_the_book, size_on_canvas
from transformers.models.llama4.processing_llama4 import Llama4Processor

from experts.errors import CheckpointError
from router.prompt.images.canvas import lay_out
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import ImageTiles, cut
from router.prompt.images.tokens import ImageTokens

TABLE = [
    ((336, 336), (1, 1), 1, 147),
    ((100, 60), (1, 1), 1, 147),
    ((300, 200), (1, 1), 1, 147),
    ((337, 336), (1, 2), 3, 437),
    ((640, 480), (2, 2), 5, 727),
    ((800, 300), (1, 3), 4, 582),
    ((1000, 1000), (3, 3), 10, 1452),
    ((1024, 768), (3, 4), 13, 1887),
    ((1280, 720), (3, 4), 13, 1887),
    ((4000, 3000), (3, 4), 13, 1887),
    ((1920, 1080), (3, 5), 16, 2322),
    ((2000, 1000), (3, 5), 16, 2322),
    ((1080, 1920), (5, 3), 16, 2322),
    ((1344, 1344), (4, 4), 17, 2467),
    ((3000, 3000), (4, 4), 17, 2467),
    ((6000, 300), (1, 16), 17, 2467),
    ((50, 2000), (6, 1), 7, 1017),
]

RELEASED = ImageSettings()
TOKENS = ImageTokens(
    start=200080, end=200081, between_cols=200084, after_row=200085, image=200090, patch=200092, tokens_per_tile=144
)

SIDES = st.integers(1, 5000) | st.integers(1, 60).map(lambda n: n * 84) | st.integers(1, 131072)
SMALL = st.integers(1, 80) | st.integers(81, 300)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def as_rows(image: Image.Image) -> Rows:
    data = image.tobytes()
    width, height = image.size
    return [[list(data[3 * (y * width + x) :][:3]) for x in range(width)] for y in range(height)]


def planes(tiles: Sequence[Rows]) -> bytes:
    """[T, 3, S, S]."""
    return bytes(pixel[channel] for tile in tiles for channel in range(3) for line in tile for pixel in line)


@pytest.mark.parametrize(("size", "canvas", "num_tiles", "num_tokens"), TABLE)
def test_the_specifications_table(
    size: tuple[int, int], canvas: tuple[int, int], num_tiles: int, num_tokens: int
) -> None:
    layout = lay_out(*size, RELEASED)
    assert ((layout.rows, layout.cols), layout.num_tiles) == (canvas, num_tiles)
    assert TOKENS.num_tokens(*canvas) == len(TOKENS.expand(*canvas)) == num_tokens
    tiles = cut(Image.new("RGB", size), RELEASED)
    assert ((tiles.rows, tiles.cols), tiles.num_tiles) == (canvas, num_tiles)
    assert len(tiles.pixels) == num_tiles * 3 * 336 * 336


def test_the_whole_sequence_of_one_picture() -> None:
    tile = [200092] * 144
    row = [*tile, 200084, *tile, 200085]
    assert TOKENS.expand(2, 2) == [200080, *row, *row, 200090, *tile, 200081]


@given(rows=st.integers(1, 16), cols=st.integers(1, 16), tokens_per_tile=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_expansion_is_that_of_transformers(rows: int, cols: int, tokens_per_tile: int) -> None:
    names = {
        "<|image_start|>": 1, "<|image_end|>": 2, "<|image|>": 3, "<|patch|>": 4, "<|tile_x_separator|>": 5,
        "<|tile_y_separator|>": 6,
    }  # fmt: skip
    text = Llama4Processor._prompt_split_image(None, (rows, cols), tokens_per_tile)
    expected = [names[f"<|{part}"] for part in text.split("<|")[1:]]
    tokens = ImageTokens.from_specials(names, patch_id=4, tokens_per_tile=tokens_per_tile)
    assert tokens.expand(rows, cols) == expected
    assert tokens.num_tokens(rows, cols) == len(expected)


def test_tokenizers_that_cannot_say_picture_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"lacks <\|image_end\|>, <\|patch\|>"):
        names = {"<|image_start|>": 1, "<|image|>": 3, "<|tile_x_separator|>": 5, "<|tile_y_separator|>": 6}
        ImageTokens.from_specials(names, patch_id=4, tokens_per_tile=1)
    with pytest.raises(CheckpointError, match=r"image_token_index: is 9, but the tokenizer's .* is 4"):
        ImageTokens.from_specials({**names, "<|image_end|>": 2, "<|patch|>": 4}, patch_id=9, tokens_per_tile=1)


@given(width=SIDES, height=SIDES, max_patches=st.sampled_from([1, 4, 12, 16, 25]), fill=st.booleans())
@settings(deadline=None, max_examples=400)
def test_sizes_are_those_of_the_book(width: int, height: int, max_patches: int, fill: bool) -> None:
    rows, cols = best_canvas(height, width, 336, max_patches, fill)
    layout = lay_out(width, height, ImageSettings(max_patches=max_patches, resize_to_max_canvas=fill))
    assert (layout.rows, layout.cols) == (rows, cols)
    assert (layout.height, layout.width) == size_on_canvas(height, width, rows, cols, 336, fill)
    assert 1 <= layout.height <= rows * 336 and 1 <= layout.width <= cols * 336


@given(width=SIDES, height=SIDES)
@settings(deadline=None, max_examples=200)
def test_a_rotated_picture_has_as_many_tiles(width: int, height: int) -> None:
    assert lay_out(width, height, RELEASED).num_tiles == lay_out(height, width, RELEASED).num_tiles


@given(
    width=SMALL,
    height=SMALL,
    tile=st.sampled_from([4, 8, 14]),
    max_patches=st.sampled_from([1, 4, 6, 16]),
    fill=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_pixels_are_those_of_the_book(
    width: int, height: int, tile: int, max_patches: int, fill: bool, seed: int
) -> None:
    picture = noise(width, height, seed)
    ours = cut(picture, ImageSettings(tile_size=tile, max_patches=max_patches, resize_to_max_canvas=fill))
    rows, cols, tiles = by_the_book(as_rows(picture), tile, max_patches, fill_canvas=fill)
    assert (ours.rows, ours.cols, ours.num_tiles) == (rows, cols, len(tiles))
    assert ours.pixels == planes(tiles)


@pytest.mark.parametrize("size", [(340, 100), (100, 60), (1, 1)])
def test_released_tiles_are_those_of_the_book(size: tuple[int, int]) -> None:
    picture = noise(*size)
    ours = cut(picture, RELEASED)
    rows, cols, tiles = by_the_book(as_rows(picture), 336, 16)
    assert (ours.rows, ours.cols) == (rows, cols)
    assert ours.pixels == planes(tiles)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "size",
    [(640, 480), (1000, 1000), (1280, 720), (100, 60), (50, 2000), (6000, 300), (9, 4000), (128, 128), (160, 100)],
)
def test_pixels_are_almost_torchs(size: tuple[int, int], kind: torch.dtype) -> None:
    """transformers resizes with torch, on whole values or on floats, as the processor at hand is."""
    picture = noise(*size)
    ours = cut(picture, RELEASED)
    layout = lay_out(*size, RELEASED)
    whole = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    whole = whole.view(1, size[1], size[0], 3).permute(0, 3, 1, 2).contiguous().to(kind)

    def resized(height: int, width: int) -> torch.Tensor:
        image = torch.nn.functional.interpolate(whole, (height, width), mode="bilinear", antialias=True)
        return image.round().to(torch.uint8)

    canvas = torch.zeros(3, layout.rows * 336, layout.cols * 336, dtype=torch.uint8)
    canvas[:, : layout.height, : layout.width] = resized(layout.height, layout.width)[0]
    tiles = canvas.unfold(1, 336, 336).unfold(2, 336, 336).permute(1, 2, 0, 3, 4).reshape(-1, 3, 336, 336)
    if layout.num_tiles > 1:
        tiles = torch.cat([tiles, resized(336, 336)])
    found = torch.frombuffer(bytearray(ours.pixels), dtype=torch.uint8).view(-1, 3, 336, 336)
    distance = (found.int() - tiles.int()).abs()
    # Small pictures, which are enlarged, differ by 2 in a few values.
    assert distance.max() <= (2 if kind is torch.uint8 else 1)
    assert (distance > 1).float().mean() < 1e-4
    assert (distance > 0).float().mean() < (0.05 if kind is torch.uint8 else 0.25)


def digest(picture: Image.Image, **changes: object) -> bytes:
    return cut(picture, ImageSettings(**{"tile_size": 8, "tokens_per_tile": 1, **changes})).digest  # type: ignore[arg-type]


def test_digests_tell_pictures_and_settings_apart() -> None:
    black = Image.new("RGB", (8, 8))
    pictures = [black, Image.new("RGB", (4, 16)), Image.new("RGB", (16, 4)), Image.new("RGB", (8, 7)), noise(8, 8)]
    digests = {digest(picture) for picture in pictures}
    digests |= {digest(black, tile_size=4), digest(black, max_patches=4), digest(black, tokens_per_tile=4)}
    digests |= {digest(black, resize_to_max_canvas=True)}
    assert len(digests) == 9
    assert all(len(one) == 32 for one in digests)
    assert digest(black) == digest(black.copy())


def test_tiles_count_themselves() -> None:
    assert ImageTiles(pixels=b"", rows=1, cols=1, digest=b"").num_tiles == 1
    assert ImageTiles(pixels=b"", rows=2, cols=3, digest=b"").num_tiles == 7
