"""The contract of a transport: shipments out, results or named errors back. Knows nothing of re-sending."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from experts.errors import TransportError
from experts.placement import ExpertKey, HostInfo

Ticket = int
"""Names one `send`; unique within a transport's life."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`num_rows` consecutive rows of a shipment that belong to one expert of one layer."""

    layer: int
    expert: int
    num_rows: int

    @property
    def key(self) -> ExpertKey:
        return (self.layer, self.expert)


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """The rows of one (layer, step) that go to one host.

    `rows_TH` holds the rows of all segments in segment order, T = Σ num_rows; contiguous, on the CPU, in the
    model's dtype. `epoch` is that of the placement it was made under, for explanation only: an answer is a pure
    function of segments and rows, so repeating a shipment is always safe.
    """

    segments: tuple[Segment, ...]
    rows_TH: torch.Tensor
    epoch: int = 0

    def __post_init__(self) -> None:
        total = sum(segment.num_rows for segment in self.segments)
        assert self.rows_TH.ndim == 2, self.rows_TH.shape
        assert self.rows_TH.shape[0] == total, (self.rows_TH.shape, total)


class Transport(Protocol):
    """Independent point-to-point links from one router to many hosts.

    Obligations:
    - `send` never blocks on the network and never raises for a host's trouble: trouble is the ticket's result.
    - every ticket gets exactly one result from `poll`, at the latest once its deadline has passed: then it is
      `DeadlinePassed`, and a later answer is dropped (it only shows up in `revived`).
    - row order in is row order out; a result is whole, of the shipment's shape and dtype, or an error.
    - one link's trouble never delays another link's result.
    - repeating a shipment is harmless.
    Only one thread sends and polls; links may be brought up and down by others.
    """

    def connect(self, hosts: Mapping[str, HostInfo]) -> None:
        """Make `hosts` the set of hosts to hold links to. A host whose incarnation or address changed gets a new
        link, one no longer named loses its link (what is in flight on it fails with `HostLost`)."""
        ...

    def linked(self) -> frozenset[str]:
        """Names of the hosts with a live link now: a `send` to another name fails with `HostLost`."""
        ...

    def send(self, host: str, shipment: Shipment, deadline: float) -> Ticket:
        """Ship `shipment` to `host`. `deadline` is a `time.monotonic()` instant."""
        ...

    def poll(self, until: float) -> list[tuple[Ticket, torch.Tensor | TransportError]]:
        """Results that are there, waiting for at least one until the `time.monotonic()` instant `until`.

        Returns an empty list only once `until` has passed; `until` in the past means "do not wait". Rows come as
        [T, H] on the CPU.
        """
        ...

    def revived(self) -> frozenset[str]:
        """Hosts that, since the last call, answered again after a `DeadlinePassed` of theirs: slow, not dead; and those
        whose link ended after one, for a new link begins with an answer.

        Ask once every result of a `poll` is taken: what a host answered by then may be part of the answer.
        """
        ...

    def close(self) -> None:
        """End all links; what is in flight gets no result any more."""
        ...
