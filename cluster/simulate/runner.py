"""Carries out a router's steps on the hashing model, with the real dispatch; fulfils `router.engine.engine.Runner`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from cluster.simulate.model import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    LAYERS,
    Model,
    add_experts,
    attend,
    columns,
    embed,
    next_token,
    sees_before,
)
from experts.placement import ExpertKey
from router.dispatch import RemoteExperts
from router.engine.request import Request
from router.engine.runner import StepOutcome
from router.engine.scheduler import Piece, Step
from router.routed import Combined, Routing


class HashRunner:
    """Keeps a number per slot and layer where the real one keeps keys and values. `before_step` and `before_dispatch`
    are told what comes, the latter by numbers of rows."""

    def __init__(self, model: Model, experts: RemoteExperts) -> None:
        self.before_step: Callable[[Step], None] = lambda step: None
        self.before_dispatch: Callable[[Counter[ExpertKey]], None] = lambda rows: None
        self._model = model
        self._experts = experts
        self._kept: dict[tuple[int, int], int] = {}

    def run(self, step: Step) -> StepOutcome:
        self.before_step(step)
        spans = [_Span(piece) for piece in step.pieces]
        lost: dict[str, frozenset[ExpertKey]] = {}
        for layer in LAYERS:
            for span in spans:
                self._attend(span, layer)
            combined = self._dispatch(layer, [state for span in spans for state in span.states])
            missing = _missing(spans, combined)
            lost |= missing
            rows = combined.y_TH.tolist()
            for span in spans:
                mine, rows = rows[: len(span.states)], rows[len(span.states) :]
                span.states = [add_experts(state, row) for state, row in zip(span.states, mine, strict=True)]
            spans = [span for span in spans if span.request.request_id not in missing]
            if not spans:
                break
        sampled = {
            span.request.request_id: next_token(span.states[-1], span.request.sampling.seed, span.request.num_known)
            for span in spans
            if span.piece.samples
        }
        return StepOutcome(sampled=sampled, lost=lost)

    def _attend(self, span: _Span, layer: int) -> None:
        for index, state in enumerate(span.states):
            position = span.piece.start + index
            before = self._kept[layer, span.slot(layer, position - 1)] if sees_before(layer, position) else 0
            state = attend(state, before, layer)
            self._kept[layer, span.slot(layer, position)] = span.states[index] = state

    def _dispatch(self, layer: int, states: list[int]) -> Combined:
        chosen = [self._model.choose(state, layer) for state in states]
        self.before_dispatch(Counter((layer, expert) for experts, _ in chosen for expert in experts))
        routing = Routing(
            expert_TK=torch.tensor([experts for experts, _ in chosen]),
            score_TK=torch.tensor([scores for _, scores in chosen]),
        )
        x_TH = torch.tensor([columns(state) for state in states])
        return self._experts.dispatch(layer, x_TH, routing).combine()


class _Span:
    """The rows of one piece on their way through the layers."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.request: Request = piece.request
        tokens = piece.request.token_ids[piece.start : piece.start + piece.count]
        self.states = [embed(token, piece.start + index) for index, token in enumerate(tokens)]

    def slot(self, layer: int, position: int) -> int:
        if layer == 0:
            return self.request.global_blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        offset = position % CHUNK_SIZE
        return self.request.local_blocks[offset // BLOCK_SIZE] * BLOCK_SIZE + offset % BLOCK_SIZE


def _missing(spans: list[_Span], combined: Combined) -> dict[str, frozenset[ExpertKey]]:
    """By request, the experts that none of its rows shall be without."""
    missing: dict[str, frozenset[ExpertKey]] = {}
    row = 0
    for span in spans:
        keys = frozenset(key for index in range(len(span.states)) for key in combined.lost.get(row + index, ()))
        if keys:
            missing[span.request.request_id] = keys
        row += len(span.states)
    return missing
