"""How a host gets an expert from another host: one call on that host's own listener, at a bounded rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from experts.errors import HostLost
from experts.ffn import ExpertWeights
from experts.link_terms import LinkTerms
from experts.placement import ExpertKey
from experts.reports import Peer
from experts.tls import ROWS_RULE, Identity, is_loopback
from experts.transport.grpc_options import SERVICE, WEIGHTS_METHOD, client_options
from experts.transport.grpc_security import explain, open_channel
from experts.wire.codec import DEFAULT_MAX_MESSAGE_BYTES
from experts.wire.weights import decode_pieces, encode_want

BASE_S = 5.0
PATIENCE = 3.0
"""A fetch may take so many times as long as its rate says, and `BASE_S`."""
SLOWEST_BYTES_PER_S = 20e6
"""What is assumed where no rate is asked for."""


@dataclass(frozen=True, kw_only=True)
class PeerWeights:
    """Fetches experts of `expert_size` for the host `name`."""

    name: str
    terms: LinkTerms
    expert_size: int
    tls: Identity | None = None
    insecure: bool = False

    def fetch(self, peer: Peer, key: ExpertKey, bytes_per_s: float = 0.0) -> ExpertWeights:
        """Expert `key` as `peer` holds it, on the CPU; 0: as fast as it goes. Raises TransportError."""
        if not (self.tls or self.insecure or is_loopback(peer.address.rpartition(":")[0])):
            raise HostLost(peer.name, f"its address {ROWS_RULE}")
        num_bytes = self.terms.num_bytes(3 * self.expert_size)
        timeout_s = BASE_S + PATIENCE * num_bytes / (bytes_per_s or SLOWEST_BYTES_PER_S)
        with open_channel(peer.address, client_options(DEFAULT_MAX_MESSAGE_BYTES), self.tls) as channel:
            call = channel.unary_stream(f"/{SERVICE}/{WEIGHTS_METHOD}", None, None)
            pieces = call(encode_want(self.terms, self.name, key), timeout=timeout_s)
            try:
                return decode_pieces(_paced(pieces, bytes_per_s), self.terms, self.expert_size, peer.name)
            except grpc.RpcError as error:
                details = error.details() if isinstance(error, grpc.Call) else "no answer"
                raise HostLost(peer.name, explain(str(details), self.tls)) from None
            finally:
                pieces.cancel()


def _paced(pieces: Any, bytes_per_s: float) -> Iterator[bytes]:
    """Take no more than that: what is not taken, the other end does not send."""
    began, taken = time.monotonic(), 0
    for piece in pieces:
        yield piece
        taken += len(piece)
        if bytes_per_s:
            time.sleep(max(0.0, began + taken / bytes_per_s - time.monotonic()))
