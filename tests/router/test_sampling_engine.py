"""Sampling through the whole engine on a tiny model: transformers' own processors, neighbours, resumption."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import random_model, save
from slow_sampler import adjusted
from stepping import load_decoder
from transformers import Llama4ForCausalLM

from router.engine.draw import Draw
from router.engine.engine import Engine
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Event, FinishReason, SamplingParams, TokenEvent
from router.engine.runner import ModelRunner
from router.engine.scheduler import Scheduler, SchedulerConfig

VOCAB, CHUNK, BLOCK_SIZE, MAX_LEN = 60, 16, 4, 64
NUM_OUTPUT = 16
GAP = 1e-3
"""Between the best and the second token of every step that is compared: rounding must not decide."""
EOS = 1

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4,
    "attention_chunk_size": CHUNK, "floor_scale": 8, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama4ForCausalLM:
    return random_model(TEXT, seed=11)


@pytest.fixture(scope="module")
def folder(model: Llama4ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


class Served:
    """An engine over the folder."""

    def __init__(self, folder: Path, *, num_blocks: int = 256, max_batch_tokens: int = 256) -> None:
        layout = KVLayout(
            block_size=BLOCK_SIZE, num_global_blocks=num_blocks, num_local_blocks=num_blocks, chunk_size=CHUNK,
            has_global=True, has_local=True,
        )  # fmt: skip
        bounds = SchedulerConfig(
            max_batch_tokens=max_batch_tokens, max_running=16, max_waiting=64, max_waiting_tokens=10_000,
            max_model_len=MAX_LEN, eos_ids=frozenset({EOS}),
        )  # fmt: skip
        runner = ModelRunner(load_decoder(folder), layout, eos_ids=(EOS,))
        scheduler = Scheduler(KVCache(layout), bounds)
        self.engine = Engine(scheduler=scheduler, runner=runner, vocab_size=VOCAB, available=lambda _: True)
        self.engine.start()

    def submit(self, name: str, prompt: list[int], emitted: list[int], sampling: SamplingParams) -> Any:
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.engine.submit(name, 0, prompt, emitted, sampling, time.monotonic() + 600, inbox.put)
        return inbox

    def answers(self, asks: list[tuple[list[int], SamplingParams]]) -> list[list[TokenEvent]]:
        """All of them at the same time."""
        inboxes = [self.submit(str(number), prompt, [], sampling) for number, (prompt, sampling) in enumerate(asks)]
        return [rest(inbox) for inbox in inboxes]


def rest(inbox: queue.SimpleQueue[Event]) -> list[TokenEvent]:
    tokens = []
    while isinstance(event := inbox.get(timeout=120), TokenEvent):
        tokens.append(event)
    assert event.reason is FinishReason.LENGTH, event
    return tokens


def ids(tokens: list[TokenEvent]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.fixture
def serve(folder: Path) -> Iterator[Any]:
    started: list[Served] = []

    def start(**options: int) -> Served:
        started.append(Served(folder, **options))
        return started[-1]

    yield start
    for served in started:
        served.engine.stop()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB, (6 + number,), generator=generator).tolist() for number in range(count)]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_OUTPUT, "ignore_eos": True, "temperature": 0.0, **fields})


@torch.no_grad()
def logits_after(model: Llama4ForCausalLM, known: list[int]) -> list[float]:
    return [float(logit) for logit in model(torch.tensor([known]), use_cache=False).logits[0, -1]]


def expected(model: Llama4ForCausalLM, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """Greedy tokens by the slow sampler from the reference's logits, as far as rounding does not decide."""
    known = list(prompt)
    while len(known) < len(prompt) + sampling.max_tokens:
        draw = Draw(sampling=sampling, position=len(known), known=known, num_prompt=len(prompt))
        logits = adjusted(logits_after(model, known), draw)
        best, second = sorted(logits)[-1:-3:-1]
        if best - second < GAP:
            break
        known.append(logits.index(best))
    return known[len(prompt) :]


KINDS: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.5},
    {"frequency_penalty": -1.0, "presence_penalty": 0.5}, {"logit_bias": ((7, 3.0), (9, -100.0))},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": ((4, 1.0),)},
]  # fmt: skip


def test_a_crowd_of_all_penalties_answers_as_the_slow_sampler_does(serve: Any, model: Llama4ForCausalLM) -> None:
    asks = [(prompt, params(**kind)) for prompt, kind in zip(prompts(2 * len(KINDS)), KINDS * 2, strict=True)]
    wanted = [expected(model, prompt, sampling) for prompt, sampling in asks]
    assert sum(map(len, wanted)) > len(asks) * NUM_OUTPUT // 2, "too many near ties to say much"
    for tokens, want in zip(serve().answers(asks), wanted, strict=True):
        assert ids(tokens)[: len(want)] == want


def test_repetition_penalty_is_that_of_transformers(serve: Any, model: Llama4ForCausalLM) -> None:
    served = serve()
    for prompt in prompts(4):
        sampling = params(repetition_penalty=1.3)
        [tokens] = served.answers([(prompt, sampling)])
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_OUTPUT, do_sample=False, eos_token_id=None,
            repetition_penalty=1.3, attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )[0, len(prompt) :].tolist()  # fmt: skip
        certain = len(expected(model, prompt, sampling))
        assert certain > 2 and ids(tokens)[:certain] == theirs[:certain]


def test_logprobs_are_those_of_the_reference(serve: Any, model: Llama4ForCausalLM) -> None:
    [prompt] = prompts(1)
    sampling = params(temperature=1.0, seed=3, num_logprobs=5, presence_penalty=1.0, logit_bias=((3, 2.0),))
    [tokens] = serve().answers([(prompt, sampling)])
    known = list(prompt)
    for token in tokens:
        logprobs = torch.tensor(logits_after(model, known)).log_softmax(-1)
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-3)
        assert [one for _, one in token.logprobs.top] == pytest.approx(logprobs.topk(5).values.tolist(), abs=1e-3)
        assert [one for _, one in token.logprobs.top] == pytest.approx(
            [float(logprobs[other]) for other, _ in token.logprobs.top], abs=1e-3
        )
        known.append(token.token_id)


def test_tokens_do_not_depend_on_neighbours_preemption_or_the_router(serve: Any) -> None:
    """Hot rows with penalties: every way of computing them must see the same known tokens."""
    kinds = [{**kind, "temperature": 0.9, "top_p": 0.95, "seed": 5, "num_logprobs": 2} for kind in KINDS]
    asks = [(prompt, params(**kind)) for prompt, kind in zip(prompts(len(kinds)), kinds, strict=True)]
    alone = serve()
    wanted = [ids(alone.answers([ask])[0]) for ask in asks]
    assert len({tuple(answer) for answer in wanted}) == len(asks)
    assert [ids(tokens) for tokens in serve().answers(asks)] == wanted
    tight = serve(num_blocks=MAX_LEN // BLOCK_SIZE)
    assert [ids(tokens) for tokens in tight.answers(asks)] == wanted
    once = sum(len(prompt) + NUM_OUTPUT - 1 for prompt, _ in asks)
    assert tight.engine.stats.computed_tokens > once, "some request was preempted"
    other = serve()
    for number, ((prompt, sampling), answer) in enumerate(zip(asks, wanted, strict=True)):
        tokens = rest(other.submit(str(number), prompt, answer[:9], sampling))
        assert ids(tokens) == answer[9:] and tokens[0].index == 9


def test_stop_tokens_are_banned_below_min_tokens(serve: Any, model: Llama4ForCausalLM) -> None:
    [prompt] = prompts(1)
    stop = max(range(VOCAB), key=logits_after(model, prompt).__getitem__)
    served = serve()
    inbox = served.submit("a", prompt, [], params(stop_token_ids=(stop,)))
    first, finish = inbox.get(timeout=120), inbox.get(timeout=120)
    assert (first.token_id, finish.reason) == (stop, FinishReason.STOP)
    sampling = params(stop_token_ids=(stop,), min_tokens=NUM_OUTPUT, ignore_eos=False)
    [tokens] = served.answers([(prompt, sampling)])
    assert not {stop, EOS} & set(ids(tokens)[:NUM_OUTPUT])
