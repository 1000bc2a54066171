"""In deterministic mode the logits behind every token are the same bits, whatever happens around a request."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import in_batches
from compiled import same_bits
from deterministic import (
    MAX_LEN,
    Answer,
    Ask,
    Desk,
    assert_same,
    deterministic_decoder,
    deterministic_features,
    experts_on_hosts,
    open_deterministic,
)
from drawing import VOCAB, text_fields
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picturing import image_rules, prompt_around, random_image
from reference import random_model, rewrite_config, save
from stepping import Stepper, packed_logits

from cluster.config import ServeSettings
from cluster.local import Model
from cluster.measure.hosts import await_links, host_processes
from cluster.tiny import make_tiny
from experts.transport.grpc_client import GrpcTransport
from router.dispatch import RemoteExperts
from router.model.decoder import Decoder

CHUNK = 64
LENGTHS = (1, 5, 40, 63, 64, 65, 90, 150)


class Case:
    """A tiny model, and what it answers to each request alone."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model, self.settings = open_deterministic(folder, dtype)
        self.decoder = deterministic_decoder(self.model, self.settings)
        self.asks = [Ask(prompt=prompt, seed=number) for number, prompt in enumerate(prompts(self.model, LENGTHS, 1))]
        desk = Desk(self.decoder)
        self.alone = [desk.answer([ask])[0] for ask in self.asks]

    def check(self, answers: Sequence[Answer]) -> None:
        for found, expected in zip(answers, self.alone, strict=True):
            assert_same(found, expected)

    def others(self, count: int, seed: int, num_output: int = 9) -> list[Ask]:
        lengths = torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [Ask(prompt=prompt, seed=seed, num_output=num_output) for prompt in prompts(self.model, lengths, seed)]


def prompts(model: Model, lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    highest = min(model.config.vocab_size, 2000)
    return [tuple(torch.randint(0, highest, (length,), generator=generator).tolist()) for length in lengths]


LONGER = pytest.mark.soak
SCOUTS = [("scout", "float32"), pytest.param(("scout", "bfloat16"), marks=LONGER)]
MAVERICKS = [("maverick", "bfloat16"), pytest.param(("maverick", "float32"), marks=LONGER)]
GUARDS = [pytest.param(("guard", dtype), marks=LONGER) for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module", params=[*SCOUTS, *MAVERICKS, *GUARDS], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp("model") / kind
    make_tiny(kind, folder)
    return Case(folder, dtype)


@pytest.mark.parametrize("budget", [16, 64, 1024])
def test_in_a_crowd(case: Case, budget: int) -> None:
    desk = Desk(case.decoder, budget=budget)
    case.check(desk.answer([*case.asks, *case.others(8, budget)], later=case.others(4, budget + 1))[: len(case.asks)])


def test_in_interleaved_halves(case: Case) -> None:
    case.check(Desk(case.decoder, budget=100, micro_batches=2).answer(case.asks))


def test_after_preemption(case: Case) -> None:
    desk = Desk(case.decoder, budget=128, num_blocks=MAX_LEN // 2, block_size=2)
    answers = desk.answer([*case.others(3, 3, num_output=100), *case.asks])[3:]
    assert desk.runner.recomputed > 0
    case.check(answers)


@pytest.mark.parametrize("block_size", [pytest.param(8, marks=LONGER), 5])
def test_after_finding_prefixes(case: Case, block_size: int) -> None:
    """Prompts' beginnings are there already, from requests that went on otherwise, up to within and onto borders."""
    desk = Desk(case.decoder, prefix_cache=True, block_size=block_size)
    [tail] = prompts(case.model, [20], 5)
    for length in (24, 64, 80, 128):
        desk.answer([Ask(prompt=(*case.asks[-1].prompt[:length], *tail), seed=9)])
    for _ in range(2):
        case.check([desk.answer([ask])[0] for ask in case.asks])
    case.check(desk.answer(case.asks))
    assert desk.scheduler.cache.numbers().hit_tokens > 300


@pytest.mark.parametrize(("num_hosts", "transport"), [(1, "local"), (4, "local"), (2, "grpc"), (4, "grpc")])
@pytest.mark.parametrize("case", [*SCOUTS, *MAVERICKS], indirect=True, ids="-".join)
def test_with_experts_on_hosts(case: Case, num_hosts: int, transport: str) -> None:
    with experts_on_hosts(case.model, case.settings, num_hosts, transport) as experts:
        decoder = deterministic_decoder(case.model, case.settings, experts)
        case.check(Desk(decoder, budget=64).answer([*case.asks, *case.others(4, 7)])[: len(case.asks)])


@pytest.mark.parametrize("case", SCOUTS, indirect=True, ids="-".join)
def test_with_hosts_in_processes_of_their_own(case: Case) -> None:
    elsewhere = ServeSettings(model_dir=case.settings.model_dir, dtype=str(case.model.dtype).removeprefix("torch."),
                              hosts=2, replicas=1, deterministic=True)  # fmt: skip
    with host_processes(case.model, elsewhere) as hosts:
        transport = GrpcTransport(router_name="test", terms=case.model.terms())
        remote = RemoteExperts(transport)
        remote.connect(hosts.view)
        await_links(transport, 2)
        case.check(Desk(deterministic_decoder(case.model, elsewhere, remote), budget=200).answer(case.asks))
        transport.close()


@pytest.mark.parametrize("case", SCOUTS, indirect=True, ids="-".join)
def test_images(case: Case) -> None:
    """Features are those of an image alone, and answers about images those of a request alone."""
    rules = image_rules(case.model.config)
    generator = torch.Generator().manual_seed(2)
    images = [random_image(1 + number % 3, rules, number) for number in range(4)]
    together = deterministic_features(case.model, case.settings).of(images)
    for image in images:
        alone = deterministic_features(case.model, case.settings).of([image])
        assert same_bits(together[image.digest], alone[image.digest])
    asks = [
        Ask(prompt=tuple(prompt_around(some, rules, 10, generator, 1000)), seed=number, images=tuple(some))
        for number, some in enumerate(([images[0]], [images[1], images[2]], [images[3], images[0]]))
    ]

    def desk(**options: Any) -> Desk:
        return Desk(
            case.decoder, images=deterministic_features(case.model, case.settings), rules=rules, block_size=4, **options
        )

    expected = [desk().answer([ask])[0] for ask in asks]
    for options in ({"budget": 7}, {"budget": 500}, {"prefix_cache": True}):
        for found, answer in zip(desk(**options).answer([*asks, *case.others(4, 2)]), expected, strict=False):
            assert_same(found, answer)


@in_batches(5)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(fields=text_fields(), seed=st.integers(0, 1 << 20), data=st.data())
def test_models_of_any_widths(batch: int, fields: dict[str, Any], seed: int, data: st.DataObject) -> None:
    """Odd sizes too: what tiles are filled with must not show."""
    fields["hidden_size"] = data.draw(st.sampled_from([7, 20, 32, 45]), label="hidden_size")
    fields["intermediate_size"] = data.draw(st.sampled_from([5, 16, 22]), label="intermediate_size")
    fields["intermediate_size_mlp"] = data.draw(st.sampled_from([9, 16, 34]), label="intermediate_size_mlp")
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]), label="dtype")
    decoder = random_decoder(fields, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4), label="lengths")
    counts = [data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5), label="pieces") for _ in lengths]
    sequences = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    packed = packed_logits(Stepper(decoder, sequences, block_size=5), counts)
    for ids, found in zip(sequences, packed, strict=True):
        known = ~found.isnan().any(-1)
        [alone] = packed_logits(Stepper(decoder, [ids], block_size=3), [[1]])
        assert known[-1] and same_bits(found[known], alone[known])


def random_decoder(fields: dict[str, Any], seed: int, dtype: str) -> Decoder:
    with tempfile.TemporaryDirectory() as name:
        folder = save(random_model(fields, seed), Path(name))
        rewrite_config(folder, {"attention_chunk_size": fields["attention_chunk_size"]})
        return deterministic_decoder(*open_deterministic(folder, dtype))
