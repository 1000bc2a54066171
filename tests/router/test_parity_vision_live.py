"""Vision towers and multimodal models of random configurations against live transformers, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import in_batches
from drawing import FIRST_SPECIAL, PATCH, VOCAB, text_fields, vision_fields
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from picturing import open_vision, pixel_values, prompt_around, random_image
from reference import clear_run, random_multimodal, reference_run, rewrite_config, save
from stepping import Stepper, all_logits, load_decoder, packed_logits
from transformers import Llama4ForConditionalGeneration

from router.engine.image_features import ImageFeatures
from router.engine.images import ImageInput, ImageRules, place_images

ATOL = 1e-4


@in_batches(5)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    text=text_fields(),
    vision=vision_fields(),
    old_spelling=st.booleans(),
    tiles=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 20),
    data=st.data(),
)
def test_random_multimodal_configs(
    batch: int,
    text: dict[str, Any],
    vision: dict[str, Any],
    old_spelling: bool,
    tiles: list[list[int]],
    seed: int,
    data: st.DataObject,
) -> None:
    """`tiles[row]` are the tiles of each image of a sequence; sequences with and without images go packed together."""
    model = random_multimodal(text, vision, seed, image_token_index=PATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = save(model, Path(name))
        chunk = {"attention_chunk_size": text["attention_chunk_size"]}
        rewrite_config(folder, chunk, old_spelling=old_spelling and not text.get("layer_types"))
        decoder = load_decoder(folder)
        _, tower, weights, rules = open_vision(folder)
    images = [
        [random_image(num_tiles, rules, 10 * row + number) for number, num_tiles in enumerate(row_tiles)]
        for row, row_tiles in enumerate(tiles)
    ]
    features = ImageFeatures(weights, tower).of(image for row in images for image in row)
    check_features(model, images, features, rules)
    generator = torch.Generator().manual_seed(seed)
    num_text = data.draw(st.integers(1, 12), label="num_text")
    runs = [
        clear_run(
            model,
            lambda row=row: prompt_around(row, rules, num_text, generator, FIRST_SPECIAL),
            pixel_values(row, rules) if row else None,
        )
        for row in images
    ]
    placed = [place_images(ids, row, rules) for (ids, _), row in zip(runs, images, strict=True)]
    counts = st.just([1]) | st.lists(st.integers(1, 17), min_size=1, max_size=8)
    pieces = data.draw(st.lists(counts, min_size=len(tiles), max_size=len(tiles)), label="pieces")
    stepper = Stepper(decoder, [ids for ids, _ in runs], data.draw(st.integers(1, 8)), placed, features)
    for ours, (ids, expected), row in zip(packed_logits(stepper, pieces), runs, images, strict=True):
        known = ~ours.isnan().any(-1)
        assert known[-1]
        if (ours - expected)[known].abs().max() > ATOL:
            event("this model makes large differences of the features' rounding: the reference sees ours")
            expected = logits_of_features(model, ids, torch.cat([features[image.digest] for image in row]))
        torch.testing.assert_close(ours[known], expected[known], atol=ATOL, rtol=0)


@torch.no_grad()
def logits_of_features(
    model: Llama4ForConditionalGeneration, ids: list[int], features_PH: torch.Tensor
) -> torch.Tensor:
    """What the reference answers with these features, within ATOL of its own, in place of patch tokens."""
    tokens = torch.tensor([ids])
    embeddings = model.get_input_embeddings()(tokens)
    embeddings[tokens == PATCH] = features_PH
    logits: torch.Tensor = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    return logits


def check_features(
    model: Llama4ForConditionalGeneration,
    images: list[list[ImageInput]],
    features: dict[bytes, torch.Tensor],
    rules: ImageRules,
) -> None:
    for image in (image for row in images for image in row):
        expected = project(model, pixel_values([image], rules))
        torch.testing.assert_close(features[image.digest], expected, atol=ATOL, rtol=0)


@torch.no_grad()
def project(model: Llama4ForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers puts in place of patch tokens."""
    adapted = model.vision_model(pixels).last_hidden_state
    projected: torch.Tensor = model.multi_modal_projector(adapted)
    return projected.flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_as_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24,
        "num_local_experts": 4, "attention_chunk_size": 16, "floor_scale": 8, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
        "image_size": 32, "patch_size": 4, "projector_input_dim": 48, "projector_output_dim": 48,
        "vision_output_dim": 48,
    }  # fmt: skip
    exact = random_multimodal(text, vision, seed=1, image_token_index=PATCH)
    folder = save(exact, tmp_path)
    half = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    _, tower, weights, rules = open_vision(folder, dtype)
    image = random_image(2, rules, seed=1)
    ids = prompt_around([image], rules, 30, torch.Generator().manual_seed(2), FIRST_SPECIAL)
    pixels = pixel_values([image], rules)
    features = ImageFeatures(weights, tower).of([image])
    truth, theirs = (project(model, pixels.to(model.dtype)).float() for model in (exact, half))
    as_close(features[image.digest].float(), theirs, truth)
    decoder = load_decoder(folder, dtype)
    ours = all_logits(decoder, ids, [1], images=place_images(ids, [image], rules), features=features)
    truth, theirs = (reference_run(model, ids, pixels.to(model.dtype))[0].float() for model in (exact, half))
    as_close(ours, theirs, truth)


def as_close(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    assert 0 < (ours - truth).abs().median() <= 1.5 * (theirs - truth).abs().median()
