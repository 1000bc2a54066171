"""All that one checkpoint needs to take pictures: how to cut them, which tokens stand for them, who decodes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experts.config import ModelConfig
from experts.errors import CheckpointError
from router.prompt.images.limits import ImageLimits
from router.prompt.images.loader import ImageLoader
from router.prompt.images.processor_config import read_settings
from router.prompt.images.tokens import ImageTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The eyes of an ingress."""

    loader: ImageLoader
    tokens: ImageTokens

    @classmethod
    def from_folder(
        cls, model_dir: Path, config: ModelConfig, special_ids: Mapping[str, int], limits: ImageLimits | None = None
    ) -> Vision | None:
        """None for a model without a vision tower, or whose tokenizer has no tokens for pictures: it reads text.

        Raises CheckpointError for a processor that asks for what we do not do.
        """
        if config.vision is None:
            return None
        settings = read_settings(model_dir, config.vision)
        try:
            tokens = ImageTokens.from_specials(
                special_ids, patch_id=config.image_token_id, tokens_per_tile=settings.tokens_per_tile
            )
        except CheckpointError as error:
            logger.warning("images will be refused: %s", error)
            return None
        return cls(loader=ImageLoader(settings, limits), tokens=tokens)
