"""The model of the simulation: hashes instead of matmuls, so that whatever goes wrong on the way shows in the tokens.

A token depends on every token before it, on the answer of every expert chosen for any of them, and on nothing else. All
numbers are whole and small enough to travel as float32 unharmed. Layer 0 is global, layer 1 sees one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from experts.arithmetic import PlainArithmetic
from experts.ffn import ExpertWeights
from experts.placement import ExpertKey

VOCAB_SIZE = 50
END_ID = 0
BLOCK_SIZE, CHUNK_SIZE = 4, 8
LAYERS = (0, 1)
HIDDEN = 3
_COLUMN_BITS = 20
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1

Row = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Model:
    """`per_token` of `num_experts` experts are chosen for a token in each layer."""

    num_experts: int
    per_token: int

    @property
    def keys(self) -> list[ExpertKey]:
        return [(layer, expert) for layer in LAYERS for expert in range(self.num_experts)]

    def choose(self, state: int, layer: int) -> tuple[list[int], list[float]]:
        """The experts, ascending, and their scores."""
        first = state % self.num_experts
        experts = sorted((first + 1 + other) % self.num_experts for other in range(self.per_token))
        return experts, [1.0 + (state >> expert & 1) for expert in experts]

    def answer(self, tokens: Sequence[int], seed: int, max_tokens: int) -> list[int]:
        """What a request shall get: its output tokens, computed with nobody's help."""
        known = list(tokens)
        before = [0] * len(LAYERS)
        while True:
            state = 0
            start = len(known) if len(known) > len(tokens) else 1
            for position in range(start - 1, len(known)):
                state = self._advance(known[position], position, before)
            known.append(next_token(state, seed, len(known)))
            if known[-1] == END_ID or len(known) - len(tokens) >= max_tokens:
                return known[len(tokens) :]

    def _advance(self, token: int, position: int, before: list[int]) -> int:
        state = embed(token, position)
        for layer in LAYERS:
            state = attend(state, before[layer] if sees_before(layer, position) else 0, layer)
            before[layer] = state
            total = (0.0,) * HIDDEN
            for expert, score in zip(*self.choose(state, layer), strict=True):
                row = [value * score for value in columns(state)]
                total = tuple(map(sum, zip(total, apply_expert(layer, expert, row), strict=True)))
            state = add_experts(state, total)
        return state


def mix(*parts: int) -> int:
    """A hash of 60 bits."""
    total = 0x9E3779B97F4A7C15
    for part in parts:
        total = ((total ^ part) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        total ^= total >> 29
    return total & 0xFFFFFFFFFFFFFFF


def columns(state: int) -> Row:
    """A state as the row that travels."""
    return (
        float(state & _COLUMN_MASK),
        float(state >> _COLUMN_BITS & _COLUMN_MASK),
        float(state >> 2 * _COLUMN_BITS & _COLUMN_MASK),
    )


def embed(token: int, position: int) -> int:
    return mix(token, position)


def sees_before(layer: int, position: int) -> bool:
    return position % CHUNK_SIZE > 0 if layer == 1 else position > 0


def attend(state: int, before: int, layer: int) -> int:
    """`before` is what the layer keeps of the position before: all earlier ones are in it."""
    return mix(state, before, layer)


def apply_expert(layer: int, expert: int, row: Sequence[float]) -> Row:
    return columns(mix(layer, expert, *map(int, row)))


def add_experts(state: int, total: Sequence[float]) -> int:
    return mix(state, *map(int, total))


def next_token(state: int, seed: int, position: int) -> int:
    return mix(state, seed, position) % VOCAB_SIZE


class HashArithmetic(PlainArithmetic):
    """What a host computes with; the weights of an expert are its name."""

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        answers: list[Row] = []
        rows = iter(rows_RH.tolist())
        for count, weights in zip(counts, experts, strict=True):
            layer, expert = map(int, weights.down_HF[0].tolist())
            answers += [apply_expert(layer, expert, next(rows)) for _ in range(count)]
        return torch.tensor(answers, dtype=rows_RH.dtype)


class SlowDisk:
    """Where a host's experts come from: reading one takes `load_s`. See `experts.host.WeightSource`."""

    def __init__(self, sleep: Callable[[float], None], load_s: float) -> None:
        self._sleep = sleep
        self._load_s = load_s

    def load(self, layer: int, expert: int) -> ExpertWeights:
        self._sleep(self._load_s)
        name = torch.tensor([[float(layer), float(expert)]])
        return ExpertWeights(gate_up_FH=name, down_HF=name)
