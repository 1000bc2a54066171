"""Requests that find their beginnings in the cache get the answers they would get alone, from a real decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import VOCAB
from reference import random_model, save
from stepping import load_decoder

from router.engine.kv_cache import KVCache, KVNumbers
from router.engine.kv_layout import KVLayout
from router.engine.request import Request, SamplingParams
from router.engine.runner import ModelRunner
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.model.decoder import Decoder

CHUNK, NUM_OUTPUT, MAX_LEN = 16, 12, 80
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24,
    "num_local_experts": 4, "attention_chunk_size": CHUNK, "floor_scale": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_decoder(save(random_model(FIELDS, seed=11), folder))


def prompts() -> list[list[int]]:
    """Beginnings in common that end within a block, on a block, on a border and beyond it."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(2, VOCAB, (count,), generator=generator).tolist()

    common = draw(50)
    return [common, *(common[:length] + draw(9) for length in (3, 4, 8, 16, 17, 20, 31, 32, 33, 44)), common]


class Desk:
    """Scheduler and runner, one step after another."""

    def __init__(self, decoder: Decoder, block_size: int, *, prefix_cache: bool, num_blocks: int) -> None:
        layout = KVLayout(
            block_size=block_size, num_global_blocks=num_blocks, num_local_blocks=num_blocks, chunk_size=CHUNK,
            has_global=True, has_local=True,
        )  # fmt: skip
        bounds = SchedulerConfig(
            max_batch_tokens=24, max_running=8, max_waiting=64, max_waiting_tokens=10_000, max_model_len=MAX_LEN
        )
        self.scheduler = Scheduler(KVCache(layout, prefix_cache=prefix_cache), bounds)
        self.runner = ModelRunner(decoder, layout, eos_ids=())

    def answer(self, asks: list[list[int]]) -> list[list[int]]:
        """All at the same time."""
        requests = [
            Request(
                request_id=str(number),
                token_ids=list(ids),
                num_prompt=len(ids),
                sampling=SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True),
                deadline=1e9,
                arrival=0.0,
            )
            for number, ids in enumerate(asks)
        ]
        for request in requests:
            self.scheduler.submit(request, 0.0)
        while self.scheduler.has_work:
            step = self.scheduler.schedule(0.0)
            outcome = self.runner.run(step)
            self.scheduler.update(step, outcome.sampled, outcome.lost, 0.0)
            self.scheduler.check_integrity()
        return [request.token_ids[request.num_prompt :] for request in requests]

    def numbers(self) -> KVNumbers:
        return self.scheduler.cache.numbers()


# Blocks of 5 do not fit chunks of 16: hits end before the first border or on one where both fit.
@pytest.mark.parametrize(("block_size", "least_hits"), [(4, 400), (8, 300), (5, 80)])
def test_answers_do_not_depend_on_what_is_found(decoder: Decoder, block_size: int, least_hits: int) -> None:
    plain = Desk(decoder, block_size, prefix_cache=False, num_blocks=200)
    alone = [plain.answer([ids])[0] for ids in prompts()]
    assert plain.numbers().hit_tokens == 0
    desk = Desk(decoder, block_size, prefix_cache=True, num_blocks=200)
    assert [desk.answer([ids])[0] for ids in prompts()] == alone
    assert desk.answer(prompts()) == alone
    assert desk.numbers().hit_tokens >= least_hits


def test_answers_do_not_depend_on_what_was_evicted_or_preempted(decoder: Decoder) -> None:
    plain = Desk(decoder, 4, prefix_cache=False, num_blocks=200)
    alone = [plain.answer([ids])[0] for ids in prompts()]
    desk = Desk(decoder, 4, prefix_cache=True, num_blocks=28)
    for _ in range(2):
        assert desk.answer(prompts()) == alone
    assert desk.numbers().hit_tokens > 0 and desk.numbers().evicted_blocks > 0
