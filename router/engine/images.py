"""Images of a request as numbers: which positions of its prompt take which rows of which image's features.

An image is a run of patch tokens in the prompt, `tokens_per_tile` for each of its tiles; other tokens may stand between
them. Knows no torch and nothing of how an image became tiles.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from experts.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """One image, cut into tiles. `pixels` are uint8 [num_tiles, 3, S, S]; equal `digest`s mean equal pixels."""

    digest: bytes
    num_tiles: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What the model's images are like: the patch token, its count per tile, and the side of a tile in pixels."""

    token_id: int
    tokens_per_tile: int
    tile_size: int

    @property
    def tile_bytes(self) -> int:
        return 3 * self.tile_size**2


@dataclass(frozen=True, kw_only=True)
class PlacedImage:
    """An image in a prompt: row i of its features belongs at `positions[i]`, ascending."""

    image: ImageInput
    positions: tuple[int, ...] = field(repr=False)

    def rows_within(self, start: int, count: int) -> range:
        """The feature rows that belong at positions start … start + count − 1."""
        return range(bisect_left(self.positions, start), bisect_left(self.positions, start + count))


def place_images(
    prompt_ids: Sequence[int], images: Sequence[ImageInput], rules: ImageRules | None
) -> tuple[PlacedImage, ...]:
    """Give the prompt's patch tokens to the images, in order.

    Raises InvalidInput when their numbers differ, when an image has not the bytes that it should, and for any image
    where `rules` is None. A prompt without images is left alone: a patch token there is a token like others.
    """
    if not images:
        return ()
    if rules is None:
        raise InvalidInput("images", len(images), "this model takes no images")
    for image in images:
        if image.num_tiles < 1 or len(image.pixels) != image.num_tiles * rules.tile_bytes:
            raise InvalidInput("images", len(image.pixels), f"must have {rules.tile_bytes} bytes for each of its tiles")
    positions = [position for position, token in enumerate(prompt_ids) if token == rules.token_id]
    expected = rules.tokens_per_tile * sum(image.num_tiles for image in images)
    if len(positions) != expected:
        raise InvalidInput("prompt", len(positions), f"must have {expected} patch tokens for its images")
    placed, first = [], 0
    for image in images:
        last = first + rules.tokens_per_tile * image.num_tiles
        placed.append(PlacedImage(image=image, positions=tuple(positions[first:last])))
        first = last
    return tuple(placed)
