"""Images for tests: random tiles, prompts around them, and features computed as a router does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig, load_config
from experts.vision_config import VisionConfig
from router.checkpoint import load_vision
from router.engine.images import ImageInput, ImageRules
from router.model.vision import VisionWeights


def open_vision(
    model_dir: Path, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, VisionConfig, VisionWeights, ImageRules]:
    """The tower of a folder and what the engine knows of it."""
    config = load_config(model_dir)
    assert config.vision is not None
    weights = load_vision(Checkpoint(model_dir), config, dtype, torch.device("cpu"))
    return config, config.vision, weights, image_rules(config)


def image_rules(config: ModelConfig) -> ImageRules:
    assert config.vision is not None
    return ImageRules(
        token_id=config.image_token_id,
        tokens_per_tile=config.vision.tokens_per_tile,
        tile_size=config.vision.tile_size,
    )


def random_image(num_tiles: int, rules: ImageRules, seed: int) -> ImageInput:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tiles, 3, rules.tile_size, rules.tile_size)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageInput(digest=f"image {seed}".encode(), num_tiles=num_tiles, pixels=tiles.numpy().tobytes())


def pixel_values(images: Sequence[ImageInput], rules: ImageRules) -> torch.Tensor:
    """float32 [tiles, 3, S, S] in −1 … 1, as the reference model takes them."""
    tiles = [
        torch.tensor(list(image.pixels)).view(image.num_tiles, 3, rules.tile_size, rules.tile_size) for image in images
    ]
    return (torch.cat(tiles).float() / 255 - 0.5) / 0.5


def prompt_around(
    images: Sequence[ImageInput], rules: ImageRules, num_text: int, generator: torch.Generator, first_special: int
) -> list[int]:
    """Random text with the images in it, tiles set apart by separators; ids from `first_special` on are special."""
    text = torch.randint(0, first_special, (num_text,), generator=generator).tolist()
    ids = text[: num_text // 2]
    for image in images:
        ids.append(first_special)
        for _ in range(image.num_tiles):
            ids += [*[rules.token_id] * rules.tokens_per_tile, first_special + 1]
    return [*ids, *text[num_text // 2 :]]
