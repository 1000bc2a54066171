"""Images as the engine knows them: places in a prompt, features encoded in one batch, kept and dropped."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawing import PATCH, SMALLEST_VISION, VOCAB
from picturing import open_vision, random_image
from reference import random_multimodal, save

from experts.errors import InvalidInput, Overloaded
from router.engine.image_features import MAX_TILES_AT_ONCE, ImageFeatures
from router.engine.images import ImageInput, ImageRules, place_images
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Request, SamplingParams
from router.engine.scheduler import Scheduler, SchedulerConfig

RULES = ImageRules(token_id=9, tokens_per_tile=2, tile_size=4)
NUM_BYTES = 3 * 4 * 4


def image(num_tiles: int, name: str = "a") -> ImageInput:
    return ImageInput(digest=name.encode(), num_tiles=num_tiles, pixels=bytes(num_tiles * NUM_BYTES))


def test_patches_go_to_images_in_order() -> None:
    prompt = [1, 9, 9, 2, 9, 3, 9, 4, 9, 9]
    first, second = place_images(prompt, [image(2, "a"), image(1, "b")], RULES)
    assert (first.image.digest, first.positions) == (b"a", (1, 2, 4, 6))
    assert (second.image.digest, second.positions) == (b"b", (8, 9))


@pytest.mark.parametrize(
    ("start", "count", "rows"),
    [(0, 1, []), (0, 2, [0]), (1, 2, [0, 1]), (2, 3, [1, 2]), (3, 1, []), (4, 9, [2, 3]), (0, 9, [0, 1, 2, 3])],
)
def test_rows_of_any_part_of_a_prompt(start: int, count: int, rows: list[int]) -> None:
    [placed] = place_images([1, 9, 9, 2, 9, 3, 9, 4], [image(2)], RULES)
    assert list(placed.rows_within(start, count)) == rows


def test_patch_tokens_without_an_image_are_tokens() -> None:
    assert place_images([9, 9, 9], [], RULES) == ()
    assert place_images([9, 9, 9], [], None) == ()


@pytest.mark.parametrize(
    ("prompt", "images", "rules", "field"),
    [
        ([9, 9, 9], [image(1)], RULES, "prompt"),
        ([9], [image(1)], RULES, "prompt"),
        ([1, 2], [image(1)], RULES, "prompt"),
        ([9, 9], [image(1), image(1)], RULES, "prompt"),
        ([9, 9], [image(1)], None, "images"),
        ([], [image(0)], RULES, "images"),
        ([9, 9], [ImageInput(digest=b"a", num_tiles=1, pixels=bytes(NUM_BYTES - 1))], RULES, "images"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    prompt: list[int], images: list[ImageInput], rules: ImageRules | None, field: str
) -> None:
    with pytest.raises(InvalidInput) as error:
        place_images(prompt, images, rules)
    assert error.value.field == field


def request(name: str, images: list[ImageInput]) -> Request:
    prompt = [1, *[9, 9] * len(images)]
    return Request(
        request_id=name, token_ids=prompt, num_prompt=len(prompt), sampling=SamplingParams(max_tokens=5), deadline=9.0,
        arrival=0.0, images=place_images(prompt, images, RULES),
    )  # fmt: skip


def test_pixels_that_wait_are_bounded() -> None:
    """One request may have any number; text is not concerned; what has ended gives its room back."""
    layout = KVLayout(
        block_size=4, num_global_blocks=16, num_local_blocks=0, chunk_size=None, has_global=True, has_local=False
    )
    bounds = SchedulerConfig(
        max_batch_tokens=8, max_running=9, max_waiting=9, max_waiting_tokens=99, max_model_len=64,
        max_image_bytes=2 * NUM_BYTES,
    )  # fmt: skip
    scheduler = Scheduler(KVCache(layout), bounds)
    scheduler.submit(request("large", [image(1)] * 3), 0.0)
    with pytest.raises(Overloaded, match="bytes of images"):
        scheduler.submit(request("small", [image(1)]), 0.0)
    scheduler.submit(request("text", []), 0.0)
    scheduler.cancel("large")
    scheduler.submit(request("small", [image(1)]), 0.0)
    scheduler.submit(request("another", [image(1)]), 0.0)
    with pytest.raises(Overloaded):
        scheduler.submit(request("one more", [image(1)]), 0.0)


class Encoder(ImageFeatures):
    """The features of a real tower, and its rules."""

    def __init__(self, folder: Path) -> None:
        _, self.tower, self.weights, self.rules = open_vision(folder)
        super().__init__(self.weights, self.tower)

    def bounded(self, num_images: int) -> ImageFeatures:
        """With a cache for so many images of one tile."""
        per_image = self.of([self.image(0)])[b"image 0"].nbytes
        return ImageFeatures(self.weights, self.tower, cache_bytes=num_images * per_image)

    def image(self, seed: int, num_tiles: int = 1) -> ImageInput:
        return random_image(num_tiles, self.rules, seed)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    fields = {
        "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8, "intermediate_size_mlp": 8,
        "num_local_experts": 1, "attention_chunk_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        yield save(random_multimodal(fields, SMALLEST_VISION, seed=1, image_token_index=PATCH), Path(name))


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def test_one_batch_and_every_content_once(encoder: Encoder) -> None:
    images = [encoder.image(1), encoder.image(2, num_tiles=3), encoder.image(1), encoder.image(3, num_tiles=2)]
    together = encoder.of(images)
    assert (encoder.stats.images, encoder.stats.tiles, encoder.stats.batches) == (3, 6, 1)
    for one in images:
        [alone] = ImageFeatures(encoder.weights, encoder.tower).of([one]).values()
        torch.testing.assert_close(together[one.digest], alone, atol=1e-6, rtol=0)
        assert alone.shape == (one.num_tiles * encoder.tower.tokens_per_tile, 8)


def test_more_tiles_than_memory_is_given_for_are_cut(encoder: Encoder) -> None:
    many = encoder.image(5, num_tiles=MAX_TILES_AT_ONCE + 1)
    [features] = encoder.of([many]).values()
    assert encoder.stats.batches == 2
    assert len(features) == (MAX_TILES_AT_ONCE + 1) * encoder.tower.tokens_per_tile


def test_known_images_are_not_encoded_again(encoder: Encoder) -> None:
    first = encoder.of([encoder.image(1)])
    again = encoder.of([encoder.image(1), encoder.image(2)])
    assert again[b"image 1"] is first[b"image 1"]
    assert (encoder.stats.images, encoder.stats.hits) == (2, 1)


def test_the_least_recently_used_leaves_first(encoder: Encoder) -> None:
    features = encoder.bounded(2)
    for seed in (1, 2, 1, 3):
        features.of([encoder.image(seed)])
    assert features.stats.images == 3
    features.of([encoder.image(1)])
    assert features.stats.images == 3
    features.of([encoder.image(2)])
    assert features.stats.images == 4, "2 had left for 3"


def test_the_cache_keeps_within_its_bytes(encoder: Encoder) -> None:
    features = encoder.bounded(2)
    step = [encoder.image(seed) for seed in range(5)]
    assert len(features.of(step)) == 5, "what a step needs it gets, whatever the cache may keep"
    assert features.num_bytes == 2 * features.of(step[:1])[b"image 0"].nbytes
    for kept in features._cache.values():
        assert kept.untyped_storage().nbytes() == kept.nbytes, "a view would keep its whole batch in memory"


def test_a_cache_of_nothing_encodes_every_time(encoder: Encoder) -> None:
    features = encoder.bounded(0)
    assert torch.equal(*(features.of([encoder.image(1)])[b"image 1"] for _ in range(2)))
    assert (features.stats.images, features.num_bytes) == (2, 0)
