"""What the engine's bench measures with: floors of steps, steps, the machine, reports. No speed is judged."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import needs_kernels

from cluster.cli import main
from cluster.config import ServeSettings
from cluster.local import open_model
from cluster.measure.decisions import bench_decisions
from cluster.measure.dispatch import bench_dispatch
from cluster.measure.engine import SPLIT, bench_engine, bench_of
from cluster.measure.floor import Operation, StepShape, floor_s, operations, step_bytes
from cluster.measure.machine import Machine, measure_machine
from cluster.measure.report import print_results
from cluster.measure.watch import Record, Seen, StopWatch, WatchedExperts
from cluster.tiny import make_tiny
from experts.config import ModelConfig, load_config, parse_config
from experts.errors import InvalidInput
from router.routed import Combined, Routing

OUTPUT = 64
"""Enough that all begin before one ends, were they let in one token at a time."""
MINI: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 65536, "attention_chunk_size": 2048,
    "no_rope_layer_interval": 4, "rms_norm_eps": 1e-5, "num_experts_per_tok": 1, "tie_word_embeddings": False,
    "attn_temperature_tuning": True, "floor_scale": 2048, "attn_scale": 0.1, "model_type": "llama4_text",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
MINI_SCOUT = {"intermediate_size": 1280, "num_local_experts": 16, "interleave_moe_layer_step": 1,
              "intermediate_size_mlp": 1280}  # fmt: skip
MINI_MAVERICK = {"intermediate_size": 384, "num_local_experts": 128, "interleave_moe_layer_step": 2,
                 "intermediate_size_mlp": 768}  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A bench takes those of the process it has to itself."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(fields: Mapping[str, Any]) -> ModelConfig:
    raw = {"architectures": ["Llama4ForCausalLM"], "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    return parse_config({**raw, **MINI, **fields})


# ---- floors


def weights_read(config: ModelConfig, distinct: int) -> int:
    """Parameters that a step reads which touches `distinct` experts in each MoE layer."""
    hidden, moe = config.hidden_size, len(config.moe_layers)
    attention = hidden * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    expert = 3 * hidden * config.expert_size
    dense = (config.num_layers - moe) * 3 * hidden * config.dense_size
    fixed = config.num_layers * attention + moe * (expert + hidden * config.num_experts) + dense
    return fixed + config.vocab_size * hidden + moe * distinct * expert


def kv_read(config: ModelConfig, context: int, num_global: int, chunk: int) -> int:
    """Numbers that one sequence of `context` tokens reads of keys and values."""
    per_token = 2 * config.num_kv_heads * config.head_dim
    return per_token * (num_global * context + (config.num_layers - num_global) * min(context, chunk))


@pytest.mark.parametrize("fields", [MINI_SCOUT, MINI_MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize(("batch", "distinct"), [(1, 1), (8, 5), (32, 16)])
@pytest.mark.parametrize("context", [160, 544, 2048])
def test_bytes_of_a_decode_step(fields: dict[str, Any], batch: int, distinct: int, context: int) -> None:
    config = config_of(fields)
    counts = [batch - distinct + 1, *[1] * (distinct - 1)]
    shape = StepShape(
        spans=((context - 1, 1),) * batch, num_samples=batch, expert_rows=dict.fromkeys(config.moe_layers, counts)
    )
    expected = 2 * weights_read(config, distinct) + 2 * batch * kv_read(config, context, num_global=3, chunk=2048)
    assert step_bytes(config, 2, shape) == expected


def test_chunked_layers_read_their_chunk_alone() -> None:
    config = config_of(MINI_SCOUT)

    def kv_bytes(context: int) -> int:
        shape = StepShape(spans=((context - 1, 1),), num_samples=1, expert_rows={})
        return int(step_bytes(config, 2, shape)) - 2 * weights_read(config, 0)

    per_token = 2 * 2 * 2 * 128
    assert kv_bytes(2048) == per_token * 12 * 2048
    assert kv_bytes(2049) == per_token * (3 * 2049 + 9 * 1)
    assert kv_bytes(5000) == per_token * (3 * 5000 + 9 * (5000 - 4096))


def test_work_of_a_prefill() -> None:
    """Two operations for every weight of every token, four for every pair of query and key; the head once."""
    config, length = config_of(MINI_SCOUT), 512
    rows = dict.fromkeys(config.moe_layers, (length,))
    shape = StepShape(spans=((0, length),), num_samples=1, expert_rows=rows)
    head = config.vocab_size * config.hidden_size
    products = 2 * length * (weights_read(config, 1) - head) + 2 * head
    attention = 4 * config.num_heads * config.head_dim * config.num_layers * length * (length + 1) // 2
    assert sum(one.flops for one in operations(config, 2, shape)) == products + attention


def test_pieces_of_a_prompt_add_up() -> None:
    """The attention of a prompt in pieces is as much work as that of the whole."""
    config = config_of(MINI_SCOUT)

    def flops(*spans: tuple[int, int]) -> float:
        return sum(
            sum(one.flops for one in operations(config, 2, StepShape(spans=(span,), num_samples=0, expert_rows={})))
            for span in spans
        )

    assert flops((0, 100), (100, 1), (101, 399)) == flops((0, 500))


def test_a_floor_by_hand() -> None:
    """One layer, a machine of one byte and ten operations per second."""
    config = config_of({
        "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 2, "attention_chunk_size": 8, "intermediate_size": 3, "num_local_experts": 2,
        "interleave_moe_layer_step": 1, "intermediate_size_mlp": 3, "no_rope_layer_interval": 4,
    })  # fmt: skip
    shape = StepShape(spans=((2, 1), (0, 3)), num_samples=2, expert_rows={0: [3, 1]})
    expected = [
        (8 * 4 * 2, 2 * 4 * 8 * 4),  # queries, keys and values
        (2 * (3 + 3) * 2 * 2, 4 * (3 + 6) * 4),  # attention
        (4 * 4 * 2, 2 * 4 * 4 * 4),  # the way back
        (2 * 4 * 2, 2 * 4 * 2 * 4),  # gate
        (36 * 2, 2 * 4 * 36),  # shared expert
        (36 * 2, 2 * 3 * 36),
        (36 * 2, 2 * 1 * 36),
        (10 * 4 * 2, 2 * 2 * 10 * 4),  # head
    ]
    found = list(operations(config, 2, shape))
    assert found == [Operation(num_bytes=num_bytes, flops=flops) for num_bytes, flops in expected]
    machine = Machine(read_bytes_per_s=1.0, flops_per_s=10.0, threads=1)
    by_hand = sum(max(float(num_bytes), flops / 10) for num_bytes, flops in expected)
    assert floor_s(config, 2, shape, machine) == pytest.approx(by_hand)
    assert floor_s(config, 2, shape, Machine(read_bytes_per_s=1e9, flops_per_s=10.0, threads=1)) == pytest.approx(
        sum(flops / 10 for _, flops in expected)
    )


# ---- the machine


@needs_kernels
def test_the_probe_reads_the_whole_buffer() -> None:
    from cluster.measure.machine import _probe

    library = _probe()
    assert library is not None
    for threads in (1, 2, 3):
        ones = torch.ones(3 << 18)
        found = library.herd_read(ones.data_ptr(), ones.nbytes, threads)
        assert found == pytest.approx(ones.numel(), rel=0.01)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr("cluster.measure.machine._probe", lambda: None)
    monkeypatch.setattr("cluster.measure.machine.MATMUL_SHAPES", ((64, 64, 64),))
    monkeypatch.setattr("cluster.measure.machine.READ_BYTES", (1 << 16, 1 << 20))
    before = torch.get_num_threads()
    machine = measure_machine(num_bytes=1, dtype=torch.bfloat16, threads=1)
    assert machine.read_bytes_per_s > 0 and machine.flops_per_s > 0 and machine.threads == 1
    assert torch.get_num_threads() == before


# ---- looking on


class Echo:
    """Experts that give every row back."""

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Echo:
        self.x_TH = x_TH
        return self

    def combine(self) -> Combined:
        return Combined(y_TH=self.x_TH, lost={})


def test_rows_are_counted_by_expert() -> None:
    watch, record = StopWatch(), Record()
    experts = WatchedExperts(Echo(), watch, record)
    x_TH = torch.ones(3, 4)
    expert_TK = torch.tensor([[0, 5], [2, 5], [0, 5]])
    pending = experts.dispatch(7, x_TH, Routing(expert_TK=expert_TK, score_TK=torch.ones(3, 2)))
    assert torch.equal(pending.combine().y_TH, x_TH)
    seen = Seen(spans=((0, 3),), num_samples=1, chosen=record.chosen, seconds=watch.seconds)
    assert seen.shape() == StepShape(spans=((0, 3),), num_samples=1, expert_rows={7: [2, 1, 3]})
    assert not seen.is_decode_of(3)
    assert set(watch.seconds) == {"experts"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("scout", "maverick", "guard"):
        made[kind] = tmp_path_factory.mktemp("models") / kind
        make_tiny(kind, made[kind])
    return made


@pytest.mark.parametrize("kind", ["scout", "maverick", "guard"])
def test_steps_are_noted_as_they_were(folders: dict[str, Path], kind: str) -> None:
    settings = ServeSettings(model_dir=folders[kind], transport="local", kv_memory=32 << 20, max_batch_tokens=48)
    model = open_model(folders[kind])
    with bench_of(model, settings) as bench:
        bench.warm_up(2, 30, seed=1)
    steps = [seen.shape() for seen in bench.record.steps]
    computed: dict[int, int] = {}
    prefills = [shape for shape in steps if shape.num_tokens > len(shape.spans)]
    assert prefills and all(shape.num_tokens <= 48 for shape in steps)
    assert sum(shape.num_samples for shape in steps) == 2 * 4
    assert sum(shape.num_tokens for shape in steps) == 2 * (30 + 4 - 1)
    for shape in steps:
        assert set(shape.expert_rows) == set(model.config.moe_layers)
        chosen = shape.num_tokens * model.config.experts_per_token
        assert all(sum(rows) == chosen and min(rows) > 0 for rows in shape.expert_rows.values())
        for start, count in shape.spans:
            computed[start] = max(computed.get(start, 0), count)
    parts = {"attention", "shared", "sampling"} | ({"experts"} if model.config.moe_layers else set())
    assert all(set(seen.seconds) == parts for seen in bench.record.steps)
    assert computed[0] == 30 and computed[32] == 1


# ---- from end to end

KEYS = {
    "transport", "hosts", "batch", "prompt", "output", "prefill_tokens_per_s", "decode_tokens_per_s", "step_ms",
    "floor_ratio", "prefill_floor_ratio", "read_gb_per_s", "matmul_tflops", "split",
}  # fmt: skip


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on little, since nobody reads the numbers."""
    monkeypatch.setattr("cluster.measure.machine.MATMUL_SHAPES", ((64, 64, 64),))
    monkeypatch.setattr("cluster.measure.machine.READ_BYTES", (1 << 20, 1 << 20))


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json", "-"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def check(results: Sequence[dict[str, Any]], transport: str, hosts: int, shapes: list[tuple[int, int]]) -> None:
    assert [(one["batch"], one["prompt"]) for one in results] == shapes
    for one in results:
        assert set(one) == KEYS and list(one["split"]) == list(SPLIT)
        assert (one["transport"], one["hosts"], one["output"]) == (transport, hosts, OUTPUT)
        assert all(one[name] > 0 for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "step_ms"))
        assert one["split"]["attention"] > 0 and one["split"]["experts"] >= 0 and one["split"]["dispatch"] >= 0
        assert sum(one["split"].values()) == pytest.approx(one["step_ms"], abs=0.05)


@pytest.mark.parametrize("deterministic", [False, True])
def test_bench_local(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], small_machine: None, deterministic: bool
) -> None:
    document = bench(
        capsys, "engine", str(folders["scout"]), "--transport", "local", "--batch", "1,3", "--prompt", "20,70",
        "--output", str(OUTPUT), "--kv-memory", "32MiB", *(["--deterministic"] if deterministic else []),
    )  # fmt: skip
    assert {"herd", "torch", "python", "cores", "threads"} <= set(document["setup"])
    check(document["results"], "local", 0, [(1, 20), (3, 20), (1, 70), (3, 70)])
    assert all(one["split"]["dispatch"] == 0 for one in document["results"])


def test_bench_grpc(folders: dict[str, Path], capsys: pytest.CaptureFixture[str], small_machine: None) -> None:
    document = bench(
        capsys, "engine", str(folders["maverick"]), "--transport", "grpc", "--hosts", "2", "--batch", "2",
        "--prompt", "20", "--output", str(OUTPUT), "--dtype", "bfloat16", "--kv-memory", "32MiB",
    )  # fmt: skip
    check(document["results"], "grpc", 2, [(2, 20)])


def test_more_at_a_time_than_are_served_by_default(folders: dict[str, Path], small_machine: None) -> None:
    settings = ServeSettings(model_dir=folders["guard"], transport="local", kv_memory=64 << 20, max_running=2)
    [result] = bench_engine(settings, [5], [3], OUTPUT)
    assert result.batch == 5 and result.split["experts"] == 0


def test_nothing_to_measure_is_said(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], small_machine: None
) -> None:
    settings = ServeSettings(model_dir=folders["guard"], transport="local", kv_memory=8 << 20, max_batch_tokens=16)
    with pytest.raises(InvalidInput, match="output: must be at least 2"):
        bench_engine(settings, [1], [3], 1)
    with pytest.raises(InvalidInput, match="output: is too short: of 4 answers some end before all have begun"):
        bench_engine(settings, [4], [60], 2)
    assert main(["bench", "engine", str(folders["guard"]), "--transport", "local", "--output", "1"]) == 2
    assert "must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["engine", "--batch", "1", "--output", "9999", "--prompt", "8"], "prompt: must be at most"),
        (["engine", "--batch", "1", "--output", "4", "--prompt", "8,9999"], "prompt: must be at most"),
        (["loop", "--requests", "1", "--output", "9999"], "prompt: must be at most"),
        (["loop", "--requests", "1", "--output", "1"], "output: must be at least 2"),
        (["engine", "--json", "{tmp}/nowhere/out.json"], "json: must be a file that can be written"),
        (["loop", "--json", "{tmp}"], "json: must be a file that can be written"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    kind, *options = (one.replace("{tmp}", str(tmp_path)) for one in arguments)
    transport = ["--transport", "local"] if kind == "engine" else []
    assert main(["bench", kind, str(folders["guard"]), *transport, *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"herd: {problem}") and not shown.out


def test_bench_dispatch() -> None:
    results = bench_dispatch(hidden=(32,), rows=(1, 5), rounds=3)
    assert [(one.rows, one.hidden) for one in results] == [(1, 32), (5, 32)]
    assert all(one.dispatch_p99_us >= one.dispatch_p50_us > 0 and one.echo_p50_us > 0 for one in results)
    assert all(one.ratio == round(one.dispatch_p50_us / one.echo_p50_us, 2) for one in results)


def test_reports(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], small_machine: None
) -> None:
    settings = ServeSettings(model_dir=folders["guard"], transport="local", kv_memory=32 << 20)
    seen: queue.SimpleQueue[object] = queue.SimpleQueue()
    results = bench_engine(settings, [1], [5], 4, seen.put)
    assert seen.get_nowait() is results[0]
    print_results(results, str(tmp_path / "out.json"))
    header, row = capsys.readouterr().out.splitlines()
    assert [name for name in header.split("  ") if name.strip()][-1].strip() == "other ms"
    assert len(header) == len(row)
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["batch"] == 1


def test_decisions_are_a_share_of_the_step_that_they_are_part_of(folders: dict[str, Path], small_machine: None) -> None:
    settings = ServeSettings(model_dir=folders["maverick"], hosts=2, replicas=2, kv_memory=32 << 20)
    config = load_config(folders["maverick"])
    [one, two] = bench_decisions(settings, [1, 3], rounds=3)
    assert (one.rows, two.rows) == (config.experts_per_token, 3 * config.experts_per_token)
    for result in (one, two):
        assert (result.experts, result.layers) == (config.num_experts, len(config.moe_layers))
        assert 1 <= result.shipments <= min(result.rows, result.hosts)
        assert 0 < result.split_us < result.per_layer_us
        expected = result.layers * result.per_layer_us / result.step_ms / 10
        assert result.of_step_pct == pytest.approx(expected, abs=0.01)
