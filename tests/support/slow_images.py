"""A picture to tiles by the book: loops over pixels, in the arithmetic that the specification and Pillow describe.

Slow and obvious; the fast way is compared with it. Pictures are nested lists [height][width][3] of 0 ... 255.
"""

from __future__ import annotations

import math

import torch

Rows = list[list[list[int]]]

PRECISION = 22
"""Bits after the point of Pillow's resize weights."""


def by_the_book(
    picture: Rows, tile: int, max_patches: int, *, fill_canvas: bool = False
) -> tuple[int, int, list[Rows]]:
    """(rows, cols, tiles with the global one last)."""
    height, width = len(picture), len(picture[0])
    rows, cols = best_canvas(height, width, tile, max_patches, fill_canvas)
    new_height, new_width = size_on_canvas(height, width, rows, cols, tile, fill_canvas)
    resized = resize(picture, new_height, new_width)
    black = [0, 0, 0]
    padded = [line + [black] * (cols * tile - new_width) for line in resized]
    padded += [[black] * (cols * tile) for _ in range(rows * tile - new_height)]
    tiles = [
        [line[col * tile : (col + 1) * tile] for line in padded[row * tile : (row + 1) * tile]]
        for row in range(rows)
        for col in range(cols)
    ]
    if len(tiles) > 1:
        tiles.append(resize(picture, tile, tile))
    return rows, cols, tiles


def best_canvas(height: int, width: int, tile: int, max_patches: int, fill_canvas: bool = False) -> tuple[int, int]:
    """Step 2 and 3 of the specification, with torch's float32."""
    canvases = [(r, n // r) for n in range(max_patches, 0, -1) for r in range(1, n + 1) if n % r == 0]
    sizes = torch.tensor(canvases) * tile
    scales = torch.minimum(sizes[:, 0] / height, sizes[:, 1] / width)
    enlarging = scales[scales >= 1]
    if len(enlarging):
        wanted = enlarging.max() if fill_canvas else enlarging.min()
    else:
        wanted = scales.max()
    fitting = [canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == wanted]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def size_on_canvas(
    height: int, width: int, rows: int, cols: int, tile: int, fill_canvas: bool = False
) -> tuple[int, int]:
    """Step 4. transformers holds the canvas in a tensor, so a side that the canvas limits is computed in float32."""
    canvas_h, canvas_w = torch.tensor(rows * tile), torch.tensor(cols * tile)
    if fill_canvas:
        box_h, box_w = canvas_h, canvas_w
    else:
        box_h, box_w = min(max(height, tile), canvas_h), min(max(width, tile), canvas_w)
    scale_h, scale_w = box_h / height, box_w / width
    if scale_w < scale_h:
        new = min(math.floor(height * scale_w), box_h), box_w
    else:
        new = box_h, min(math.floor(width * scale_h), box_w)
    return max(int(new[0]), 1), max(int(new[1]), 1)


def resize(picture: Rows, height: int, width: int) -> Rows:
    """Bilinear with antialias: first along the rows, rounded to whole values, then along the columns."""
    if len(picture[0]) != width:
        weights = _all_weights(len(picture[0]), width)
        picture = [_resize_line(line, weights) for line in picture]
    if len(picture) != height:
        weights = _all_weights(len(picture), height)
        columns = [_resize_line(list(column), weights) for column in zip(*picture, strict=True)]
        picture = [list(line) for line in zip(*columns, strict=True)]
    return picture


def _resize_line(line: list[list[int]], weights: list[tuple[int, list[int]]]) -> list[list[int]]:
    return [[_weighted(line, first, whole, channel) for channel in range(3)] for first, whole in weights]


def _weighted(line: list[list[int]], first: int, whole: list[int], channel: int) -> int:
    total = sum(weight * line[first + x][channel] for x, weight in enumerate(whole))
    return min(255, (total + (1 << (PRECISION - 1))) >> PRECISION)


def _all_weights(old: int, new: int) -> list[tuple[int, list[int]]]:
    """For each new pixel: the first old one that it covers, and the whole-numbered weights from there on."""
    scale = old / new
    return [_weights((x + 0.5) * scale, max(scale, 1.0), old) for x in range(new)]


def _weights(center: float, reach: float, old: int) -> tuple[int, list[int]]:
    """They fall linearly to 0 at a distance of `reach`, and sum to 1."""
    first = max(int(center - reach + 0.5), 0)
    last = min(int(center + reach + 0.5), old)
    weights = [max(0.0, 1.0 - abs((x - center + 0.5) * (1.0 / reach))) for x in range(first, last)]
    total = 0.0
    for weight in weights:
        total += weight
    return first, [int(0.5 + weight * (1.0 / total) * (1 << PRECISION)) for weight in weights]
