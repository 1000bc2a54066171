"""The text decoder: a packed batch in, logits out, pausing wherever rows go to routed experts.

It knows neither where experts live nor how rows travel: it declares the protocol it needs (`RoutedExperts`) and is
handed something that fulfils it.
Shape letters: T packed tokens, P rows that are patches of images, S sampled rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from experts.arithmetic import Arithmetic, PlainArithmetic
from experts.config import ModelConfig
from experts.placement import ExpertKey
from router.gate import gate
from router.model.attend import Attend, PlainAttend
from router.model.attention import Attention, Place, Sublayer
from router.model.kv_store import KVStore
from router.model.rope import inverse_frequencies, rotations, temperatures
from router.model.spans import Span, close_up
from router.model.weights import LayerWeights, TrunkWeights
from router.routed import Combined, Routing


class Pending(Protocol):
    """Rows under way. `combine` waits for them (bounded by their deadlines) and may be called once."""

    def combine(self) -> Combined: ...


class RoutedExperts(Protocol):
    """Computes routed experts. `dispatch` sends rows on their way and returns at once; results never depend on
    what else is under way. Rows whose experts are away come back as `Combined.lost`, never as a guess."""

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Pending: ...


class Meter(Protocol):
    """Told which part of a step runs; whoever cares keeps the time."""

    def time(self, part: str) -> AbstractContextManager[None]: ...


class NoMeter:
    """Nobody cares."""

    def time(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One step's tokens, all requests' spans end to end.

    `global_slots_T` and `local_slots_T` are where each token's keys and values go in full-attention and chunked
    layers. `samples` lists the indices of spans whose last row's logits are wanted. Where the batch holds patches of
    images, `image_rows_P` are their rows and `image_features_PH` what stands there instead of embeddings.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    global_slots_T: torch.Tensor
    local_slots_T: torch.Tensor
    spans: tuple[Span, ...]
    samples: tuple[int, ...]
    image_rows_P: torch.Tensor | None = None
    image_features_PH: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """`logits_SV` (model dtype) row i belongs to span `samples[i]`; spans in `lost` left the step because the
    experts listed were away: nothing of them may be used."""

    logits_SV: torch.Tensor
    samples: tuple[int, ...]
    lost: dict[int, frozenset[ExpertKey]]


Forward = Generator[Pending, Combined, StepOutput]
"""A forward pass under way: yields at each dispatch of rows, is sent what came back."""


@dataclass
class _Rows:
    """The rows still in the step; shrinks when experts are away. `live` holds the spans' original indices."""

    x_TH: torch.Tensor
    place: Place
    live: tuple[int, ...]
    lost: dict[int, frozenset[ExpertKey]] = field(default_factory=dict)


class Decoder:
    """The trunk with its weights. One instance serves any number of forwards, which may be interleaved.

    `arithmetic` and `attend` say how products and attention are computed; the plain ones are the readable ones. `fuse`
    may put something faster in the place of the attention sublayer.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: TrunkWeights,
        experts: RoutedExperts,
        arithmetic: Arithmetic | None = None,
        attend: Attend | None = None,
        meter: Meter | None = None,
        fuse: Callable[[ModelConfig, Sublayer], Attention] = lambda _config, plain: plain,
    ) -> None:
        self.config = config
        self.weights = weights
        self.experts = experts
        self._arithmetic = arithmetic or PlainArithmetic()
        self._attention = fuse(config, Sublayer(config, self._arithmetic, attend or PlainAttend()))
        self.meter = meter or NoMeter()
        self._inverse_frequency = inverse_frequencies(config).to(weights.device)

    def forward(self, batch: PackedBatch, store: KVStore) -> Forward:
        """Run `batch` through all layers, writing keys and values to `store`."""
        rotation, temperature = self._arithmetic.by_rows(self._turns, batch.positions_T)
        place = Place(
            spans=batch.spans,
            global_slots_T=batch.global_slots_T,
            local_slots_T=batch.local_slots_T,
            rotation=rotation,
            temperature=temperature,
            store=store,
        )
        rows = _Rows(x_TH=self._embed(batch), place=place, live=tuple(range(len(batch.spans))))
        for layer, weights in enumerate(self.weights.layers):
            if not rows.live:
                break
            with self.meter.time("attention"):
                rows.x_TH = self._attention(rows.x_TH, layer, weights, rows.place)
            normed_TH = self._arithmetic.norm(rows.x_TH, self.config.norm_eps, weights.ffn_norm_H)
            if weights.gate_EH is None:
                rows.x_TH = rows.x_TH + self._ffn(weights, normed_TH)
                continue
            pending = self.experts.dispatch(layer, normed_TH, self._gate(normed_TH, weights.gate_EH))
            # The shared expert is computed while the rows travel.
            shared_TH = self._ffn(weights, normed_TH)
            combined = yield pending
            rows.x_TH = rows.x_TH + (shared_TH + combined.y_TH)
            if combined.lost:
                _drop_lost(rows, combined)
        return self._head(rows, batch.samples)

    def _turns(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotations(positions_T, self._inverse_frequency), temperatures(positions_T, self.config)

    def _gate(self, x_TH: torch.Tensor, gate_EH: torch.Tensor) -> Routing:
        num_choices = self.config.experts_per_token
        chosen = self._arithmetic.choose(x_TH, gate_EH, num_choices)
        if chosen is not None:
            return Routing(expert_TK=chosen[0], score_TK=chosen[1])

        def choose(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            routing = gate(logits_TE, num_choices)
            return routing.expert_TK, routing.score_TK

        expert_TK, score_TK = self._arithmetic.by_rows(choose, self._arithmetic.linear(x_TH, gate_EH))
        return Routing(expert_TK=expert_TK, score_TK=score_TK)

    def _ffn(self, weights: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor:
        with self.meter.time("shared"):
            return self._arithmetic.ffn(x_TH, (len(x_TH),), (weights.ffn,))

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        """Embeddings of the ids; patches of images take their features instead (early fusion)."""
        x_TH = F.embedding(batch.ids_T, self.weights.embedding_VH)
        if batch.image_rows_P is None or batch.image_features_PH is None:
            return x_TH
        return x_TH.index_copy_(0, batch.image_rows_P, batch.image_features_PH.to(x_TH.dtype))

    def _head(self, rows: _Rows, samples: Sequence[int]) -> StepOutput:
        wanted = [index for index, span in enumerate(rows.live) if span in samples]
        last = [rows.place.spans[index].row + rows.place.spans[index].count - 1 for index in wanted]
        logits_SV = self.weights.head_VH.new_empty((0, self.config.vocab_size))
        if last:
            x_SH = self._arithmetic.norm(rows.x_TH[last], self.config.norm_eps, self.weights.norm_H)
            logits_SV = self._arithmetic.linear(x_SH, self.weights.head_VH)
        return StepOutput(
            logits_SV=logits_SV,
            samples=tuple(rows.live[index] for index in wanted),
            lost=rows.lost,
        )


def _drop_lost(rows: _Rows, combined: Combined) -> None:
    """Take every span with a lost row out of the step; the others go on as if it had never been there.

    Later tokens of the span attend to the lost one, so a span leaves as a whole.
    """
    kept: list[int] = []
    keep_rows: list[int] = []
    for index, span in enumerate(rows.place.spans):
        span_rows = range(span.row, span.row + span.count)
        missing = frozenset(key for row in span_rows for key in combined.lost.get(row, ()))
        if missing:
            rows.lost[rows.live[index]] = missing
        else:
            kept.append(index)
            keep_rows.extend(span_rows)
    rows.x_TH = rows.x_TH[keep_rows]
    place = rows.place
    rows.place = replace(
        place,
        spans=tuple(close_up([place.spans[index] for index in kept])),
        global_slots_T=place.global_slots_T[keep_rows],
        local_slots_T=place.local_slots_T[keep_rows],
        rotation=place.rotation[keep_rows],
        temperature=place.temperature[keep_rows],
    )
    rows.live = tuple(rows.live[index] for index in kept)


def run(*forwards: Forward) -> list[StepOutput]:
    """Drive forwards to their ends, interleaved: while one waits for its rows, the next computes.

    One forward is the plain case; with two, each hides the other's travelling time.
    """
    outputs: dict[int, StepOutput] = {}
    waiting: list[tuple[int, Forward, Pending]] = []
    for index, forward in enumerate(forwards):
        _advance(index, forward, None, waiting, outputs)
    while waiting:
        index, forward, pending = waiting.pop(0)
        _advance(index, forward, pending.combine(), waiting, outputs)
    return [outputs[index] for index in range(len(forwards))]


def _advance(
    index: int,
    forward: Forward,
    combined: Combined | None,
    waiting: list[tuple[int, Forward, Pending]],
    outputs: dict[int, StepOutput],
) -> None:
    try:
        pending = next(forward) if combined is None else forward.send(combined)
    except StopIteration as stop:
        outputs[index] = stop.value
    else:
        waiting.append((index, forward, pending))
