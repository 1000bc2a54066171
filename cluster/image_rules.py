"""What a model's images are like, read off its config; for engines and for those who only look at prompts."""

from __future__ import annotations

from experts.config import ModelConfig
from router.engine.images import ImageRules


def image_rules(config: ModelConfig) -> ImageRules | None:
    """None for models without a vision tower."""
    if config.vision is None:
        return None
    return ImageRules(
        token_id=config.image_token_id,
        tokens_per_tile=config.vision.tokens_per_tile,
        tile_size=config.vision.tile_size,
    )
