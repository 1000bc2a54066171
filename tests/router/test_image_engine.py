"""Requests with images through the whole engine: greedy answers are the reference's, alone and in a crowd."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import FIRST_SPECIAL, PATCH, VOCAB
from picturing import open_vision, pixel_values, prompt_around, random_image
from reference import NEAR_TIE, Model, random_multimodal, reference_run, save
from stepping import Stepper, load_decoder
from transformers import Llama4ForConditionalGeneration

from experts.errors import InvalidInput
from router.engine.engine import Engine
from router.engine.image_features import ImageFeatures
from router.engine.images import ImageInput, place_images
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Event, FinishReason, SamplingParams, TokenEvent
from router.engine.runner import ModelRunner
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.model.decoder import Pending, RoutedExperts
from router.routed import Combined, Routing

NUM_OUTPUT = 8
MAX_LEN = 64
BLOCK_SIZE, CHUNK = 4, 16

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4,
    "attention_chunk_size": CHUNK, "floor_scale": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 8,
    "patch_size": 2, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 24, "projector_output_dim": 24,
    "vision_output_dim": 24,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request and the reference's greedy answer to it."""

    prompt: list[int]
    images: list[ImageInput]
    answer: list[int]


@pytest.fixture(scope="module")
def model() -> Llama4ForConditionalGeneration:
    return random_multimodal(TEXT, VISION, seed=4, image_token_index=PATCH)


@pytest.fixture(scope="module")
def folder(model: Llama4ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def crowd(model: Llama4ForConditionalGeneration, folder: Path) -> list[Ask]:
    """Sixteen requests of text and of up to two images, some of which several requests share."""
    rules = open_vision(folder)[3]
    generator = torch.Generator().manual_seed(0)
    asks = []
    for number in range(16):
        images = [random_image(1 + seed % 3, rules, seed) for seed in ([], [number], [3], [number % 5, 3])[number % 4]]
        while True:
            prompt = prompt_around(images, rules, 4 + number, generator, FIRST_SPECIAL)
            answer = greedy(model, prompt, pixel_values(images, rules) if images else None)
            if answer is not None:
                break
        asks.append(Ask(prompt=prompt, images=images, answer=answer))
    return asks


def greedy(model: Model, prompt: list[int], pixels: torch.Tensor | None) -> list[int] | None:
    """None where some choice of an expert or a token is nearly tied."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NUM_OUTPUT:
        # Among the answer's tokens may be the patch token, whose place the reference would fill from pixels.
        logits, gap = reference_run(model, ids, pixels)
        best = logits[-1].topk(2)
        if min(gap, float(best.values[0] - best.values[1])) < NEAR_TIE or int(best.indices[0]) == PATCH:
            return None
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


class Served:
    """An engine over the folder, and the features behind it."""

    def __init__(
        self,
        folder: Path,
        *,
        max_batch_tokens: int = 256,
        cache_bytes: int = 1 << 20,
        max_running: int = 16,
        num_blocks: int = 256,
        micro_batches: int = 1,
    ) -> None:
        _, vision, weights, rules = open_vision(folder)
        layout = KVLayout(
            block_size=BLOCK_SIZE, num_global_blocks=num_blocks, num_local_blocks=num_blocks, chunk_size=CHUNK,
            has_global=True, has_local=True,
        )  # fmt: skip
        bounds = SchedulerConfig(
            max_batch_tokens=max_batch_tokens, max_running=max_running, max_waiting=64, max_waiting_tokens=10_000,
            max_model_len=MAX_LEN,
        )  # fmt: skip
        self.features = ImageFeatures(weights, vision, cache_bytes=cache_bytes)
        runner = ModelRunner(
            load_decoder(folder), layout, eos_ids=(), micro_batches=micro_batches, images=self.features
        )
        self.scheduler = Scheduler(KVCache(layout), bounds)
        self.engine = Engine(
            scheduler=self.scheduler, runner=runner, vocab_size=VOCAB, available=lambda _: True, image_rules=rules
        )

    def answer(self, asks: list[Ask]) -> list[list[int]]:
        """All of them at the same time."""
        self.engine.start()
        inboxes = [self.submit(number, ask) for number, ask in enumerate(asks)]
        answers = []
        for inbox in inboxes:
            tokens = []
            while isinstance(event := inbox.get(timeout=120), TokenEvent):
                tokens.append(event.token_id)
            assert event.reason is FinishReason.LENGTH, event
            answers.append(tokens)
        return answers

    def submit(self, number: int, ask: Ask, emitted: int = 0) -> queue.SimpleQueue[Event]:
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT)
        self.engine.submit(
            str(number), 0, ask.prompt, ask.answer[:emitted], sampling, time.monotonic() + 600, inbox.put, ask.images
        )
        return inbox


@pytest.fixture
def serve(folder: Path) -> Iterator[Any]:
    started: list[Served] = []

    def start(**options: int) -> Served:
        started.append(Served(folder, **options))
        return started[-1]

    yield start
    for served in started:
        served.engine.stop()


def test_alone(serve: Any, crowd: list[Ask]) -> None:
    served = serve(max_running=1)
    assert served.answer(crowd) == [ask.answer for ask in crowd]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_crowd_of_text_and_images(serve: Any, crowd: list[Ask], micro_batches: int) -> None:
    served = serve(micro_batches=micro_batches)
    assert served.answer(crowd) == [ask.answer for ask in crowd]
    distinct = {image.digest for ask in crowd for image in ask.images}
    assert served.features.stats.images == len(distinct)


@pytest.mark.parametrize("budget", [1, 5, 23])
def test_pieces_of_any_size_without_a_cache(serve: Any, crowd: list[Ask], budget: int) -> None:
    """An image that left the cache in the middle of its patches is encoded again from its pixels."""
    served = serve(max_batch_tokens=budget, cache_bytes=0)
    assert served.answer(crowd) == [ask.answer for ask in crowd]
    assert served.features.stats.hits == 0
    assert served.features.num_bytes == 0


def test_preempted_requests_see_their_images_again(serve: Any, crowd: list[Ask]) -> None:
    served = serve(num_blocks=MAX_LEN // BLOCK_SIZE, cache_bytes=0)
    assert served.answer(crowd) == [ask.answer for ask in crowd]
    once = sum(len(ask.prompt) + NUM_OUTPUT - 1 for ask in crowd)
    assert served.engine.stats.computed_tokens > once, "some request was preempted"


def test_text_alone_never_reaches_the_tower(serve: Any, crowd: list[Ask]) -> None:
    served = serve()
    text = [ask for ask in crowd if not ask.images]
    assert served.answer(text) == [ask.answer for ask in text]
    assert served.features.stats.images == served.features.stats.hits == 0


def test_another_router_continues_with_the_images(serve: Any, crowd: list[Ask]) -> None:
    served = serve()
    served.engine.start()
    ask = crowd[3]
    inbox = served.submit(0, ask, emitted=3)
    tokens = [inbox.get(timeout=60) for _ in range(NUM_OUTPUT - 3)]
    assert tokens == [
        TokenEvent(request_id="0", index=index, token_id=ask.answer[index]) for index in range(3, NUM_OUTPUT)
    ]


class Losing:
    """Routed experts of which, in one layer, those of some rows are away."""

    def __init__(self, experts: RoutedExperts, layer: int, rows: set[int]) -> None:
        self._experts = experts
        self._layer = layer
        self.rows = rows

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Lossy:
        return Lossy(self._experts.dispatch(layer, x_TH, routing), self.rows if layer == self._layer else set())


@dataclass(frozen=True)
class Lossy:
    pending: Pending
    rows: set[int]

    def combine(self) -> Combined:
        y_TH = self.pending.combine().y_TH.clone()
        y_TH[sorted(self.rows)] = float("nan")
        return Combined(y_TH=y_TH, lost=dict.fromkeys(self.rows, ((0, 0),)))


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_request_that_leaves_the_step_takes_its_images_along(folder: Path, crowd: list[Ask], layer: int) -> None:
    asks = [crowd[7], crowd[0], crowd[3]]
    assert all(len(ask.prompt) > CHUNK for ask in asks if ask.images)
    _, vision, weights, rules = open_vision(folder)
    features = ImageFeatures(weights, vision).of(image for ask in asks for image in ask.images)
    placed = [place_images(ask.prompt, ask.images, rules) for ask in asks]
    prompts = [ask.prompt for ask in asks]
    counts = dict.fromkeys(range(3), CHUNK)
    whole = Stepper(load_decoder(folder), prompts, BLOCK_SIZE, placed, features)
    experts = Losing(whole.decoder.experts, layer, {2})
    lossy = Stepper(load_decoder(folder, experts=experts), prompts, BLOCK_SIZE, placed, features)
    assert set(lossy.step(counts).lost) == {0}
    assert [request.num_computed for request in lossy.requests] == [0, len(asks[1].prompt), CHUNK]
    experts.rows = set()
    whole.step(counts)
    lossy.step({0: CHUNK})
    for row in (0, 2):
        ours, theirs = packed_rest(lossy, row), packed_rest(whole, row)
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert int(ours.argmax()) == asks[row].answer[0]


def packed_rest(stepper: Stepper, row: int) -> torch.Tensor:
    """Logits of a sequence's last token, after computing what is left of it."""
    request = stepper.requests[row]
    while True:
        output = stepper.step({row: CHUNK})
        if request.num_computed == request.num_known:
            return output.logits_SV[0]


def test_patches_and_images_must_agree_in_number(serve: Any, crowd: list[Ask]) -> None:
    served = serve()
    served.engine.start()
    ask = crowd[1]
    for prompt, images in [(ask.prompt, ask.images * 2), ([PATCH, *ask.prompt], ask.images), ([1, 2], ask.images)]:
        with pytest.raises(InvalidInput, match="patch tokens"):
            served.submit(0, Ask(prompt=prompt, images=images, answer=[]))
    assert served.engine.load() == (0, 0, 0)
