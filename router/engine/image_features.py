"""Features of images: encodes tiles and keeps what it encoded, within bounds. Knows nothing of requests and prompts.

Shape letters: N tiles, C channels, S tile side, M tokens per tile, H text hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from experts.vision_config import NUM_CHANNELS, VisionConfig
from router.engine.images import ImageInput
from router.model.vision import VisionWeights, encode_tiles

CACHE_BYTES = 512 << 20
"""About twenty of the largest images of a released checkpoint."""
MAX_TILES_AT_ONCE = 128
"""What a step needs is one batch up to here; beyond, memory counts for more than one more call."""


@dataclass
class ImageStats:
    """Plain counters since start: images and tiles encoded, batches run, images found in the cache."""

    images: int = 0
    tiles: int = 0
    batches: int = 0
    hits: int = 0


class ImageFeatures:
    """Projected features by image digest. The least recently used ones leave when `cache_bytes` are exceeded; whoever
    needs them again pays for encoding them again."""

    def __init__(
        self,
        weights: VisionWeights,
        config: VisionConfig,
        *,
        cache_bytes: int = CACHE_BYTES,
        tiles_at_once: int = MAX_TILES_AT_ONCE,
    ) -> None:
        self.stats = ImageStats()
        self._weights = weights
        self._config = config
        self._cache_bytes = cache_bytes
        self._tiles_at_once = tiles_at_once
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(features.nbytes for features in self._cache.values())

    def of(self, images: Iterable[ImageInput]) -> dict[bytes, torch.Tensor]:
        """Digest → [num_tiles · M, H] for all `images`; those not known yet are encoded in one batch, each once."""
        wanted = {image.digest: image for image in images}
        found = {digest: self._cache[digest] for digest in wanted if digest in self._cache}
        for digest in found:
            self._cache.move_to_end(digest)
        fresh = self._encode([image for digest, image in wanted.items() if digest not in found])
        self._cache |= fresh
        while self.num_bytes > self._cache_bytes:
            self._cache.popitem(last=False)
        self.stats.hits += len(found)
        return found | fresh

    def _encode(self, images: list[ImageInput]) -> dict[bytes, torch.Tensor]:
        if not images:
            return {}
        side = self._config.tile_size
        # A bytearray, because torch wants memory that it may write to.
        buffer = bytearray().join(image.pixels for image in images)
        tiles_NCSS = torch.frombuffer(buffer, dtype=torch.uint8).view(-1, NUM_CHANNELS, side, side)
        batches = torch.split(tiles_NCSS, self._tiles_at_once)
        features_NMH = torch.cat(
            [encode_tiles(self._normalised(batch), self._weights, self._config) for batch in batches]
        )
        self.stats.images += len(images)
        self.stats.tiles += len(tiles_NCSS)
        self.stats.batches += len(batches)
        parts = torch.split(features_NMH, [image.num_tiles for image in images])
        # Copies: a view would keep the whole batch in memory for as long as any of its images is known.
        return {image.digest: part.flatten(0, 1).clone() for image, part in zip(images, parts, strict=True)}

    def _normalised(self, tiles_NCSS: torch.Tensor) -> torch.Tensor:
        """float32 pixels in −1 … 1."""
        return (tiles_NCSS.to(self._weights.device).float() / 255 - 0.5) / 0.5
