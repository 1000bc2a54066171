"""Hand-made experts, hosts and shipments for the tests of hosts and transports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import torch

from experts.errors import TransportError
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.link_terms import LinkTerms
from experts.placement import ExpertKey
from experts.transport.base import Segment, Shipment, Ticket, Transport

HIDDEN = 8
EXPERT_SIZE = 6
PATIENCE_S = 20.0
"""How long a test waits for what must happen before it fails."""


def make_expert(key: ExpertKey, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Weights that depend on (layer, expert) alone."""
    generator = torch.Generator().manual_seed(1000 * key[0] + key[1])
    gate_up = torch.randn(2 * EXPERT_SIZE, HIDDEN, generator=generator)
    down = torch.randn(HIDDEN, EXPERT_SIZE, generator=generator)
    return ExpertWeights(gate_up_FH=gate_up.to(dtype), down_HF=down.to(dtype))


class Experts:
    """A source of hand-made experts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def load(self, layer: int, expert: int) -> ExpertWeights:
        return make_expert((layer, expert), self.dtype)


class GatedHost(ExpertHost):
    """A host whose computations wait while `gate` is cleared."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, Experts(dtype))
        self.gate = threading.Event()
        self.gate.set()
        self.num_computed = 0

    def compute(self, shipment: Shipment) -> torch.Tensor:
        assert self.gate.wait(PATIENCE_S)
        self.num_computed += 1
        return super().compute(shipment)


def make_host(name: str, keys: Iterable[ExpertKey], dtype: torch.dtype = torch.float32) -> GatedHost:
    host = GatedHost(name, dtype)
    for key in keys:
        host.load(key)
    return host


def make_terms(dtype: torch.dtype = torch.float32, digest: str = "weights-1", hidden: int = HIDDEN) -> LinkTerms:
    return LinkTerms(checkpoint_digest=digest, dtype=dtype, hidden_size=hidden)


def make_shipment(
    rows_per_key: dict[ExpertKey, int], dtype: torch.dtype = torch.float32, seed: int = 0, hidden: int = HIDDEN
) -> Shipment:
    segments = tuple(Segment(layer=layer, expert=expert, num_rows=num) for (layer, expert), num in rows_per_key.items())
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(rows_per_key.values()), hidden, generator=generator)
    return Shipment(segments=segments, rows_TH=rows.to(dtype))


def expected_rows(shipment: Shipment) -> torch.Tensor:
    """What the experts of `shipment` make of its rows, one row at a time, spelled out."""
    keys = [segment.key for segment in shipment.segments for _ in range(segment.num_rows)]
    rows = []
    for key, row in zip(keys, shipment.rows_TH.double(), strict=True):
        weights = make_expert(key, shipment.rows_TH.dtype)
        gate, up = (weights.gate_up_FH.double() @ row).split(EXPERT_SIZE)
        rows.append(weights.down_HF.double() @ (gate / (1 + torch.exp(-gate)) * up))
    return torch.stack(rows) if rows else torch.empty(0, shipment.rows_TH.shape[1], dtype=torch.float64)


def assert_answers(shipment: Shipment, result: torch.Tensor | TransportError) -> None:
    assert isinstance(result, torch.Tensor), result
    assert result.dtype == shipment.rows_TH.dtype and result.shape == shipment.rows_TH.shape
    loose = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[result.dtype]
    torch.testing.assert_close(result.double(), expected_rows(shipment), rtol=loose, atol=loose)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`; fail naming `what` when it does not come."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain: {what}"
        time.sleep(0.002)


def soon() -> float:
    """A deadline that a working link keeps."""
    return time.monotonic() + PATIENCE_S


def collect(transport: Transport, tickets: Iterable[Ticket]) -> dict[Ticket, torch.Tensor | TransportError]:
    """The results of `tickets`; fails when one comes twice, not at all, or for somebody else's ticket."""
    missing = set(tickets)
    results: dict[Ticket, torch.Tensor | TransportError] = {}
    give_up = time.monotonic() + 2 * PATIENCE_S
    while missing:
        assert time.monotonic() < give_up, f"no result for {missing}"
        for ticket, result in transport.poll(time.monotonic() + 0.5):
            assert ticket in missing, f"a second or foreign result for {ticket}"
            missing.discard(ticket)
            results[ticket] = result
    return results


def ask(transport: Transport, host: str, shipment: Shipment, deadline: float) -> torch.Tensor | TransportError:
    """Send one shipment and wait for its result."""
    ticket = transport.send(host, shipment, deadline)
    return collect(transport, [ticket])[ticket]
