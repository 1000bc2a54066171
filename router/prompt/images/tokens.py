"""The token ids that stand for a picture in a prompt. Knows nothing of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experts.errors import CheckpointError
from router.prompt.images.canvas import num_tiles

PLACEHOLDER = "<|image|>"
"""What a chat template writes where a picture goes; also a part of what takes its place."""

_NAMES = {
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "image": PLACEHOLDER,
    "patch": "<|patch|>",
    "between_cols": "<|tile_x_separator|>",
    "after_row": "<|tile_y_separator|>",
}


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Ids of the tokens around the patches of a tile, of which there are `tokens_per_tile`."""

    start: int
    end: int
    image: int
    patch: int
    between_cols: int
    after_row: int
    tokens_per_tile: int

    @classmethod
    def from_specials(cls, special_ids: Mapping[str, int], *, patch_id: int, tokens_per_tile: int) -> ImageTokens:
        """`patch_id` is the id whose places the model fills with features. Raises CheckpointError."""
        missing = sorted(name for name in _NAMES.values() if name not in special_ids)
        if missing:
            raise CheckpointError("tokenizer", f"lacks {', '.join(missing)}")
        ids = {field: special_ids[name] for field, name in _NAMES.items()}
        if ids["patch"] != patch_id:
            raise CheckpointError(
                "config.json: image_token_index", f"is {patch_id}, but the tokenizer's <|patch|> is {ids['patch']}"
            )
        return cls(**ids, tokens_per_tile=tokens_per_tile)

    def expand(self, rows: int, cols: int) -> list[int]:
        """The ids that take the place of the placeholder of a picture on a canvas of `rows` x `cols` tiles."""
        tile = [self.patch] * self.tokens_per_tile
        row = tile + [self.between_cols, *tile] * (cols - 1) + [self.after_row]
        canvas = row * rows if rows * cols > 1 else []
        return [self.start, *canvas, self.image, *tile, self.end]

    def num_tokens(self, rows: int, cols: int) -> int:
        """How many ids `expand` gives: each tile's patches, a separator for all but the global one, and three."""
        separators = rows * cols if rows * cols > 1 else 0
        return 3 + separators + self.tokens_per_tile * num_tiles(rows, cols)
