"""Decode steps in fixed shapes, run as they come, against the ordinary decoder."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reference import random_model, save
from static_stepping import StaticStepper, compute_to, layout_of, remote, sequences, show_next, stacked
from stepping import CPU, Stepper, load_decoder
from tape import Tape, taped

from cluster.tiny import make_tiny
from experts.arithmetic import PlainArithmetic
from experts.checkpoint import Checkpoint
from experts.config import load_config
from experts.ffn import expert_ffn
from experts.stack import ExpertStack, every_product, grouped_products, stack_ffn
from experts.transport.local import FaultyLocalTransport
from experts.weights import ExpertStore
from router.dispatch import RemoteExperts
from router.engine.engine import Engine
from router.engine.images import ImageInput, PlacedImage
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import KVLayout
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent
from router.engine.runner import ModelRunner
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.engine.static_steps import MAX_BATCH, MAX_GATHERED, Recorder, StaticSteps, shape_of, unrecorded
from router.local_experts import LocalExperts
from router.model.decoder import Pending
from router.model.kv_store import KVStore
from router.model.static_decode import Leaving
from router.model.static_inputs import DecodeShape
from router.routed import Routing, pack_bytes, unpack_bytes

KINDS = ("scout", "maverick", "guard")
TWO_CHOICES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 12, "intermediate_size_mlp": 12, "num_local_experts": 6,
    "num_experts_per_tok": 2, "attention_chunk_size": 8, "floor_scale": 4, "interleave_moe_layer_step": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module", params=[*KINDS, "two-choices"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "two-choices":
        return save(random_model(TWO_CHOICES, seed=11), path)
    make_tiny(request.param, path, seed=5)
    return path


@pytest.mark.parametrize("record", [unrecorded, taped])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_decoding_equals_the_ordinary_decoder(folder: Path, cut: bool, record: Recorder) -> None:
    """Rows begin before chunk borders and temperature steps (tiny models: every 64 and 32) and go past them."""
    decoder, at_hand = load_decoder(folder), stacked(folder)
    starts, num_steps = [27, 60, 0, 125, 62], 9
    ids = sequences(decoder.config.vocab_size, *(start + num_steps for start in starts))
    ordinary = Stepper(decoder, ids)
    static = StaticStepper(decoder, ids, None if cut else at_hand, record)
    compute_to(ordinary, starts)
    compute_to(static, starts)
    for _ in range(num_steps):
        show_next(ordinary, ids)
        show_next(static, ids)
        expected, found = ordinary.step(dict.fromkeys(range(len(ids)), 1)), static.decode()
        assert (found.samples, found.lost) == (expected.samples, {})
        torch.testing.assert_close(found.logits_SV, expected.logits_SV, atol=1e-4, rtol=1e-4)
    for layer, chunked in enumerate(decoder.config.chunked_layers):
        for ours, theirs in zip(static.store.layer(layer), ordinary.store.layer(layer), strict=True):
            blank = ordinary.store.blank_slot(chunked)
            assert not ours[blank].any()
            written = ~ours[:blank].isnan()
            assert written.any()
            torch.testing.assert_close(ours[:blank][written], theirs[:blank][written], atol=1e-4, rtol=1e-4)
    choices = len(decoder.config.moe_layers) * decoder.config.experts_per_token
    counted = 0 if cut else num_steps * len(ids) * choices
    assert at_hand.rows_LE.sum() == counted, "rows that only fill the shape up are not counted"


def test_only_rows_that_sample_have_logits(folder: Path) -> None:
    decoder = load_decoder(folder)
    ids = sequences(decoder.config.vocab_size, 4, 4, 4)
    ordinary, static = Stepper(decoder, ids), StaticStepper(decoder, ids, stacked(folder))
    for stepper in (ordinary, static):
        compute_to(stepper, [2, 2, 2])
        stepper.requests[1].token_ids = ids[1][:3]
    expected, found = ordinary.step({0: 1, 1: 1, 2: 1}), static.decode()
    assert found.samples == expected.samples == (1,)
    torch.testing.assert_close(found.logits_SV, expected.logits_SV, atol=1e-4, rtol=1e-4)


def test_rows_without_their_experts_are_lost_and_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model(TWO_CHOICES, seed=11), tmp_path / "model")
    config = load_config(folder)
    experts, transport = remote(folder)
    ids = sequences(config.vocab_size, *[7] * 9)
    whole = Stepper(load_decoder(folder), ids)
    static = StaticStepper(load_decoder(folder, experts=experts), ids)
    for stepper in (whole, static):
        compute_to(stepper, [6] * 9)
    expected = whole.step(dict.fromkeys(range(9), 1))
    transport.lose("host-2")
    left = dict.fromkeys(config.moe_layers, 0)
    dispatch = experts.dispatch

    def counting(layer: int, x_TH: torch.Tensor, routing: Routing) -> Pending:
        left[layer] += len(x_TH)
        return dispatch(layer, x_TH, routing)

    monkeypatch.setattr(experts, "dispatch", counting)
    found = static.decode()
    assert found.lost and found.samples, "this seed loses some rows and keeps some"
    assert sorted([*found.lost, *found.samples]) == list(range(9))
    assert all(expert == 2 for missing in found.lost.values() for _, expert in missing)
    torch.testing.assert_close(found.logits_SV, expected.logits_SV[list(found.samples)], atol=1e-4, rtol=1e-4)
    lost_at = [min(layer for layer, _ in missing) for missing in found.lost.values()]
    expected_rows = {layer: 9 - sum(at < layer for at in lost_at) for layer in config.moe_layers}
    assert left == expected_rows, "rows that lost an expert are not sent on"
    transport.restore("host-2")
    sent = experts.stats.rows_sent
    again = static.steps.run(static.pieces(dict.fromkeys(sorted(found.lost), 1)))
    assert again is not None and not again.lost
    torch.testing.assert_close(again.logits_SV, expected.logits_SV[sorted(found.lost)], atol=1e-4, rtol=1e-4)
    choices = len(config.moe_layers) * config.experts_per_token
    assert experts.stats.rows_sent - sent == len(found.lost) * choices, "rows that fill the shape up stay here"


def test_a_step_that_has_lost_every_row_ends(tmp_path: Path) -> None:
    folder = save(random_model(TWO_CHOICES, seed=11), tmp_path / "model")
    decoder = load_decoder(folder, experts=RemoteExperts(FaultyLocalTransport({})))
    static = StaticStepper(decoder, sequences(50, 2, 2))
    output = static.decode()
    assert (output.samples, set(output.lost)) == ((), {0, 1})
    assert output.logits_SV.shape == (0, 50)


# Shapes


def test_shapes_are_powers_of_two_and_bounded(tmp_path: Path) -> None:
    make_tiny("scout", tmp_path / "tiny")
    decoder = load_decoder(tmp_path / "tiny")
    ids = sequences(decoder.config.vocab_size, 200, 70, 130)
    stepper = Stepper(decoder, ids)
    for request, computed in zip(stepper.requests, (199, 69, 129), strict=True):
        request.num_computed = computed
    layout = layout_of(stepper)
    pieces = stepper.pieces({0: 1, 1: 1, 2: 1})
    assert shape_of(pieces, layout) == DecodeShape(batch=4, num_blocks=(64, 8))
    assert shape_of(pieces[1:2], layout) == DecodeShape(batch=1, num_blocks=(32, 8))
    assert shape_of(stepper.pieces({0: 1, 1: 1})[:2] + stepper.pieces({2: 1}), layout) is not None
    many = [pieces[1]] * MAX_BATCH
    assert shape_of(many, layout) is not None
    assert shape_of([*many, pieces[1]], layout) is None, "more rows than any shape has"
    pieces[0].request.global_blocks = list(range(MAX_GATHERED // 4 + 1))
    far = stepper.pieces({0: 1})
    object.__setattr__(far[0], "start", MAX_GATHERED)
    assert shape_of(far, layout) is None, "more slots than may be gathered"


def test_prefills_and_images_do_not_fit(tmp_path: Path) -> None:
    make_tiny("scout", tmp_path / "tiny")
    decoder = load_decoder(tmp_path / "tiny")
    stepper = Stepper(decoder, sequences(decoder.config.vocab_size, 9, 9))
    steps = StaticSteps(decoder, stepper.store, layout_of(stepper))
    assert steps.run(stepper.pieces({0: 1, 1: 2})) is None
    image = PlacedImage(image=ImageInput(pixels=bytes(12), num_tiles=1, digest=b"d"), positions=(0, 1))
    stepper.requests[0].images = (image,)
    assert steps.run(stepper.pieces({0: 1})) is None
    compute_to(stepper, [0, 2])
    assert steps.run(stepper.pieces({1: 1})) is not None


def test_only_so_many_shapes_are_kept(tmp_path: Path) -> None:
    make_tiny("guard", tmp_path / "tiny")
    decoder = load_decoder(tmp_path / "tiny")
    made: list[int] = []

    def counting(works: list[Callable[[], object]]) -> list[Callable[[], object]]:
        made.append(len(works))
        return unrecorded(works)

    record: Recorder = counting  # type: ignore[assignment]
    stepper = Stepper(decoder, sequences(decoder.config.vocab_size, *[4] * 5))
    steps = StaticSteps(decoder, stepper.store, layout_of(stepper), record=record, max_programs=2)

    def run(num_rows: int) -> int:
        steps.run(stepper.pieces(dict.fromkeys(range(num_rows), 1)))
        return len(made)

    assert [run(1), run(2), run(1), run(5), run(1), run(2)] == [1, 2, 2, 3, 3, 4]


def test_a_tape_repeats_operators_and_refuses_what_asks_the_host() -> None:
    """Guards the recorder of the tests above."""
    x = torch.tensor([3.0])
    seen: list[float] = []

    def work() -> torch.Tensor:
        seen.append(1)
        return x * 2 + len(seen)

    [again] = taped([work])
    x.fill_(5.0)
    assert again() == torch.tensor([11.0]) and len(seen) == 1
    with Tape(), pytest.raises(AssertionError, match="asks the host"):
        x.item()


# Products of stacked experts


def random_stack(num_experts: int, hidden: int, size: int, dtype: torch.dtype) -> ExpertStack:
    generator = torch.Generator().manual_seed(3)
    return ExpertStack(
        gate_up_EFH=torch.randn(num_experts, 2 * size, hidden, generator=generator).to(dtype),
        down_EHF=torch.randn(num_experts, hidden, size, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("ends", [[0, 3, 3, 7], [7, 7, 7, 7], [0, 0, 0, 7], [2, 4, 6, 7]])
def test_a_stack_computes_what_its_experts_do(ends: list[int]) -> None:
    stack = random_stack(4, 16, 24, torch.float32)
    rows_RH = torch.randn(7, 16, generator=torch.Generator().manual_seed(4))
    found = stack_ffn(stack, rows_RH, torch.tensor(ends, dtype=torch.int32))
    begins = [0, *ends[:-1]]
    parts = [
        expert_ffn(stack.expert(expert), rows_RH[begin:end])
        for expert, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_the_grouped_product_is_every_product() -> None:
    """torch's grouped kernel for CPUs has the interface of the one for CUDA."""
    stack = random_stack(3, 16, 8, torch.bfloat16)
    x_RK = torch.randn(6, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    ends_E = torch.tensor([2, 2, 6], dtype=torch.int32)
    grouped, every = (one(x_RK, stack.gate_up_EFH, ends_E) for one in (grouped_products, every_product))
    torch.testing.assert_close(grouped, every)


def test_stacked_experts_equal_experts_one_by_one(folder: Path) -> None:
    config = load_config(folder)
    at_hand = stacked(folder)
    local = LocalExperts.over(at_hand, PlainArithmetic())
    one_by_one = {key: ExpertStore(Checkpoint(folder), config, torch.float32).load(*key) for key in local.weights}
    assert local.weights.keys() == {(layer, e) for layer in config.moe_layers for e in range(config.num_experts)}
    for key, weights in one_by_one.items():
        assert torch.equal(weights.gate_up_FH, local.weights[key].gate_up_FH)
        assert torch.equal(weights.down_HF, local.weights[key].down_HF)
    if not config.moe_layers:
        return
    generator = torch.Generator().manual_seed(6)
    x_BH = torch.randn(5, config.hidden_size, generator=generator)
    logits = torch.randn(5, config.num_experts, generator=generator)
    expert_TK = logits.topk(config.experts_per_token).indices.sort(-1).values
    routing = Routing(expert_TK=expert_TK, score_TK=torch.rand(expert_TK.shape, generator=generator))
    layer, live_B = config.moe_layers[-1], torch.tensor([1, 1, 1, 0, 0])
    expected = local.dispatch(layer, x_BH, routing).combine().y_TH
    before = dict(local.load_snapshot().rows)
    found = at_hand.compute(Leaving(layer=layer, x_BH=x_BH, routing=routing), live_B)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    after = local.load_snapshot()
    more = {key: count - before.get(key, 0) for key, count in after.rows.items() if count != before.get(key, 0)}
    chosen = expert_TK[:3].flatten().tolist()
    assert more == {(layer, expert): chosen.count(expert) for expert in chosen}
    assert after.rows_total == sum(after.rows.values())


def test_bytes_packed_for_one_copy_come_apart_again() -> None:
    parts = [torch.tensor([[3], [1 << 40]]), torch.rand(2, 1).bfloat16(), torch.rand(2, 6).bfloat16()[:, :5]]
    packed = pack_bytes(parts)
    assert packed.dtype == torch.uint8 and packed.nbytes == 16 + 4 + 20
    for found, part in zip(unpack_bytes(packed, parts), parts, strict=True):
        assert torch.equal(found, part)


# The engine on top


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers, all at a time."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for row, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        engine.submit(str(row), 0, prompt, [], sampling, time.monotonic() + 600, events.put)
    tokens: dict[str, list[int]] = {str(row): [] for row in range(len(prompts))}
    left = len(prompts)
    while left:
        event = events.get(timeout=60)
        if isinstance(event, TokenEvent):
            tokens[event.request_id].append(event.token_id)
        left -= isinstance(event, FinishEvent)
    return list(tokens.values())


@pytest.fixture
def answers(folder: Path) -> Iterator[Callable[[bool], list[list[int]]]]:
    engines: list[Engine] = []

    def of(is_static: bool) -> list[list[int]]:
        decoder, at_hand = load_decoder(folder), stacked(folder)
        config = decoder.config
        has_global, has_local = not all(config.chunked_layers), any(config.chunked_layers)
        layout = KVLayout(
            block_size=8,
            num_global_blocks=128 if has_global else 0,
            num_local_blocks=128 if has_local else 0,
            chunk_size=config.chunk_size,
            has_global=has_global,
            has_local=has_local,
        )
        made: list[StaticSteps] = []

        def static(store: KVStore) -> StaticSteps:
            made.append(StaticSteps(decoder, store, layout, at_hand=at_hand))
            return made[0]

        runner = ModelRunner(decoder, layout, eos_ids=[], static=static if is_static else None)
        limits = SchedulerConfig(
            max_batch_tokens=32, max_running=4, max_waiting=9, max_waiting_tokens=9999, max_model_len=200,
            eos_ids=frozenset(),
        )  # fmt: skip
        engine = Engine(
            scheduler=Scheduler(KVCache(layout), limits),
            runner=runner,
            vocab_size=config.vocab_size,
            available=lambda _missing: True,
        )
        engines.append(engine)
        engine.start()
        found = tokens_of(engine, sequences(config.vocab_size, 5, 60, 30, 7, 3))
        if is_static and config.moe_layers:
            assert at_hand.rows_LE.sum() > 0, "some steps had a fixed shape"
        return found

    yield of
    for engine in engines:
        engine.stop()


def test_the_engine_answers_alike_with_fixed_shapes(answers: Callable[[bool], list[list[int]]]) -> None:
    assert answers(True) == answers(False)


def test_the_store_has_room_for_rows_that_only_fill_a_shape(folder: Path) -> None:
    config = load_config(folder)
    store = KVStore(config, num_global_slots=8, num_local_slots=4, dtype=torch.float32, device=CPU)
    for layer, chunked in enumerate(config.chunked_layers):
        keys, values = store.layer(layer)
        assert len(keys) == len(values) == (4 if chunked else 8) + 2
        assert not keys[store.blank_slot(chunked)].any() and not values[store.blank_slot(chunked)].any()
        assert store.scratch_slot(chunked) == len(keys) - 1


def test_a_shape_that_cannot_be_made_ready_runs_as_it_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tiny("guard", tmp_path / "tiny")
    decoder = load_decoder(tmp_path / "tiny")
    tries: list[int] = []

    def failing(works: list[Callable[[], object]]) -> list[Callable[[], object]]:
        tries.append(len(works))
        raise torch.OutOfMemoryError("no room")

    record: Recorder = failing  # type: ignore[assignment]
    stepper = Stepper(decoder, sequences(decoder.config.vocab_size, 4))
    steps = StaticSteps(decoder, stepper.store, layout_of(stepper), record=record)
    assert steps.run(stepper.pieces({0: 1})) is None
    assert steps.run(stepper.pieces({0: 1})) is None
    assert len(tries) == 1 and "no room" in caplog.text
