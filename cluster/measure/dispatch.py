"""Measures one round trip of a block of rows to a host process, beside the same bytes over a bare gRPC stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch

from cluster.grpc_echo import echo_main, echo_stream
from cluster.measure.hosts import address_from, await_links, child, serve_until_closed
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.link_terms import LinkTerms
from experts.placement import HostInfo
from experts.transport.base import Segment, Shipment
from experts.transport.grpc_client import GrpcTransport


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Round trips of one block of rows to a host process that computes next to nothing, and of the same bytes over a
    bare gRPC stream. Microseconds."""

    rows: int
    hidden: int
    dispatch_p50_us: float
    dispatch_p99_us: float
    echo_p50_us: float
    echo_p99_us: float


def bench_dispatch(hidden: int = 1024, rows: Sequence[int] = (1, 32, 256), rounds: int = 1000) -> list[DispatchResult]:
    """Measure send → poll of one shipment of bfloat16 rows, and the bare echo, in turns on the same machine."""
    torch.set_num_threads(1)
    terms = LinkTerms(checkpoint_digest="bench", dtype=torch.bfloat16, hidden_size=hidden)
    results = []
    with child(_trivial_host_main, terms) as host, child(echo_main) as echo:
        transport = GrpcTransport(router_name="bench", terms=terms)
        transport.connect({"host": HostInfo(name="host", incarnation=1, address=address_from(host))})
        await_links(transport, 1)
        with echo_stream(address_from(echo)) as round_trip:
            for count in rows:
                rows_TH = torch.randn(count, hidden).bfloat16()
                message = rows_TH.view(torch.uint8).numpy().tobytes()
                shipment = Shipment(segments=(Segment(layer=0, expert=0, num_rows=count),), rows_TH=rows_TH)
                ours = _microseconds(partial(_there_and_back, transport, shipment), rounds)
                bare = _microseconds(partial(round_trip, message), rounds)
                results.append(
                    DispatchResult(
                        rows=count,
                        hidden=hidden,
                        dispatch_p50_us=ours[0],
                        dispatch_p99_us=ours[1],
                        echo_p50_us=bare[0],
                        echo_p99_us=bare[1],
                    )
                )
        transport.close()
    return results


def _there_and_back(transport: GrpcTransport, shipment: Shipment) -> None:
    transport.send("host", shipment, time.monotonic() + 10)
    [(_, result)] = transport.poll(time.monotonic() + 10)
    assert isinstance(result, torch.Tensor), result


def _microseconds(action: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and 99th percentile of `rounds` calls, after some to warm up."""
    times = []
    for _ in range(rounds + 50):
        started = time.perf_counter()
        action()
        times.append((time.perf_counter() - started) * 1e6)
    times = sorted(times[50:])
    return round(times[rounds // 2], 1), round(times[rounds * 99 // 100], 1)


class _TrivialExperts:
    """Experts of size 1: their computation costs next to nothing beside a round trip."""

    def __init__(self, terms: LinkTerms) -> None:
        self._weights = ExpertWeights(
            gate_up_FH=torch.zeros(2, terms.hidden_size, dtype=terms.dtype),
            down_HF=torch.zeros(terms.hidden_size, 1, dtype=terms.dtype),
        )

    def load(self, layer: int, expert: int) -> ExpertWeights:
        return self._weights


def _trivial_host_main(pipe: Connection, terms: LinkTerms) -> None:
    torch.set_num_threads(1)
    host = ExpertHost("host", _TrivialExperts(terms))
    host.load((0, 0))
    serve_until_closed(pipe, host, terms)
