"""The least time that a step can take on a machine: every operation reads what it must and multiplies what it must.

Numbers only. The floor of an operation is the larger of its bytes ÷ read rate and its operations ÷ matmul rate; that
of a step is their sum, as operations of a layer depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.measure.machine import Machine
from experts.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step computed: (start, count) of each sequence's tokens, how many tokens were sampled, and per MoE layer
    the rows of each expert that had any."""

    spans: tuple[tuple[int, int], ...]
    num_samples: int
    expert_rows: Mapping[int, Sequence[int]]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.spans)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Bytes that must be read and floating point operations that must be done."""

    num_bytes: float
    flops: float


def floor_s(config: ModelConfig, itemsize: int, step: StepShape, machine: Machine) -> float:
    """Seconds that `step` takes at least. `itemsize` is that of weights, keys and values."""
    return sum(machine.seconds(one.num_bytes, one.flops) for one in operations(config, itemsize, step))


def step_bytes(config: ModelConfig, itemsize: int, step: StepShape) -> float:
    """What `step` must read."""
    return sum(one.num_bytes for one in operations(config, itemsize, step))


def operations(config: ModelConfig, itemsize: int, step: StepShape) -> Iterator[Operation]:
    """Every operation of a step that reads weights, keys or values. Norms, rotations and the like count as free."""
    hidden, tokens = config.hidden_size, step.num_tokens
    queries = config.num_heads * config.head_dim
    keyed = config.num_kv_heads * config.head_dim

    def linear(rows: int, outputs: int, inputs: int) -> Operation:
        return Operation(num_bytes=outputs * inputs * itemsize, flops=2 * rows * outputs * inputs)

    for layer in range(config.num_layers):
        yield linear(tokens, queries + 2 * keyed, hidden)
        yield _attention(config, itemsize, step, config.chunk_size if config.chunked_layers[layer] else None)
        yield linear(tokens, hidden, queries)
        is_moe = layer in config.moe_layers
        if is_moe:
            yield linear(tokens, config.num_experts, hidden)
        # The shared expert or the dense network, then the routed experts: each is three matrices.
        yield linear(tokens, 3 * hidden, config.expert_size if is_moe else config.dense_size)
        for rows in step.expert_rows.get(layer, ()):
            yield linear(rows, 3 * hidden, config.expert_size)
    if step.num_samples:
        yield linear(step.num_samples, config.vocab_size, hidden)


def _attention(config: ModelConfig, itemsize: int, step: StepShape, chunk: int | None) -> Operation:
    """Keys and values that any query of a sequence sees are read once; every query meets each of its own."""
    seen = met = 0
    for start, count in step.spans:
        first = start // chunk * chunk if chunk else 0
        seen += start + count - first
        met += count * (start - first) + count * (count + 1) // 2
    return Operation(
        num_bytes=2 * seen * config.num_kv_heads * config.head_dim * itemsize,
        flops=4 * met * config.num_heads * config.head_dim,
    )
