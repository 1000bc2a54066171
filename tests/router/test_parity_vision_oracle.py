"""The vision tower and early fusion against stored float32 results of the reference implementation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from picturing import open_vision
from safetensors.torch import load_file
from stepping import all_logits, load_decoder

from router.engine.images import ImageInput, place_images
from router.model.vision import adapt, add_class_token, embed_patches, encode_tiles, patch_rotations, vision_block

ORACLE = Path(os.environ.get("HERD_ORACLE_DIR", Path(__file__).parents[3] / "shared" / "llama4" / "oracle"))
ATOL = 1e-4

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no stored reference results at {ORACLE}")


@pytest.fixture(scope="module", params=["scout", "maverick", "guard"])
def folder(request: pytest.FixtureRequest) -> Path:
    return ORACLE / str(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


def test_every_stage_of_the_tower(folder: Path) -> None:
    oracle = load_file(folder / "oracle.safetensors")
    _, vision, weights, _ = open_vision(folder)
    pixels = oracle["mm.pixel_values"]
    patches = embed_patches(pixels, weights, vision)
    close(patches, oracle["mm.vision.patch_embedding"])
    x = add_class_token(patches, weights)
    close(x, oracle["mm.vision.hidden.0"])
    for number, layer in enumerate(weights.layers, start=1):
        x = vision_block(x, layer, vision, patch_rotations(vision))
        close(x, oracle[f"mm.vision.hidden.{number}"])
    close(adapt(x, weights, vision), oracle["mm.vision.last_hidden_state"])
    close(encode_tiles(pixels, weights, vision), oracle["mm.vision.projected"])


def test_a_tile_does_not_see_its_neighbours(folder: Path) -> None:
    oracle = load_file(folder / "oracle.safetensors")
    _, vision, weights, _ = open_vision(folder)
    for number, tile in enumerate(oracle["mm.pixel_values"]):
        close(encode_tiles(tile[None], weights, vision)[0], oracle["mm.vision.projected"][number])


@pytest.mark.parametrize("counts", [[1], [5, 1, 1], [16], [3, 16, 1, 1, 9]], ids=str)
def test_logits_in_pieces(folder: Path, counts: list[int]) -> None:
    """Pieces of any length, through the middle of images and tiles."""
    oracle = load_file(folder / "oracle.safetensors")
    _, vision, weights, rules = open_vision(folder)
    ids = oracle["mm.input_ids"][0].tolist()
    images = [
        ImageInput(digest=name, num_tiles=tiles, pixels=bytes(tiles * rules.tile_bytes))
        for name, tiles in ((b"wide", 3), (b"small", 1))
    ]
    encoded = encode_tiles(oracle["mm.pixel_values"], weights, vision)
    features = {b"wide": encoded[:3].flatten(0, 1), b"small": encoded[3]}
    placed = place_images(ids, images, rules)
    ours = all_logits(load_decoder(folder), ids, counts, images=placed, features=features)
    known = ~ours.isnan().any(-1)
    assert known.sum() >= len(ids) // 16
    close(ours[known], oracle["mm.logits"][0][known])
