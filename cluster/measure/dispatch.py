"""Measures one round trip of a block of rows to a host process, beside the same bytes over a bare gRPC stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
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

Action = Callable[[], object]

WARMUP, TURN = 50, 10


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Round trips of one block of rows to a host process that computes nothing, and of the same bytes over a bare
    gRPC stream. Microseconds; `ratio` is that of the medians."""

    rows: int
    hidden: int
    dispatch_p50_us: float
    dispatch_p99_us: float
    echo_p50_us: float
    echo_p99_us: float
    ratio: float


def bench_dispatch(
    hidden: Sequence[int] = (1024, 5120), rows: Sequence[int] = (1, 32, 256), rounds: int = 1000
) -> list[DispatchResult]:
    """Measure send → poll of one shipment of bfloat16 rows, and the bare echo, in turns on the same machine."""
    torch.set_num_threads(1)
    return [result for width in hidden for result in _bench_width(width, rows, rounds)]


def _bench_width(hidden: int, rows: Sequence[int], rounds: int) -> list[DispatchResult]:
    terms = LinkTerms(checkpoint_digest="bench", dtype=torch.bfloat16, hidden_size=hidden)
    transport = GrpcTransport(router_name="bench", terms=terms)
    with child(_mirror_main, terms) as host, child(echo_main) as echo, closing(transport):
        transport.connect({"host": HostInfo(name="host", incarnation=1, address=address_from(host))})
        await_links(transport, 1)
        with echo_stream(address_from(echo)) as round_trip:
            return [_bench_block(transport, round_trip, torch.randn(count, hidden), rounds) for count in rows]


def _bench_block(
    transport: GrpcTransport, round_trip: Callable[[bytes], bytes], x_TH: torch.Tensor, rounds: int
) -> DispatchResult:
    rows_TH = x_TH.bfloat16()
    num_rows, hidden = rows_TH.shape
    message = rows_TH.view(torch.uint8).numpy().tobytes()
    shipment = Shipment(segments=(Segment(layer=0, expert=0, num_rows=num_rows),), rows_TH=rows_TH)
    ours, bare = _in_turns(partial(_there_and_back, transport, shipment), partial(round_trip, message), rounds)
    return DispatchResult(
        rows=num_rows,
        hidden=hidden,
        dispatch_p50_us=_percentile(ours, 50),
        dispatch_p99_us=_percentile(ours, 99),
        echo_p50_us=_percentile(bare, 50),
        echo_p99_us=_percentile(bare, 99),
        ratio=round(_percentile(ours, 50) / _percentile(bare, 50), 2),
    )


def _there_and_back(transport: GrpcTransport, shipment: Shipment) -> None:
    transport.send("host", shipment, time.monotonic() + 10)
    [(_, result)] = transport.poll(time.monotonic() + 10)
    assert isinstance(result, torch.Tensor), result


def _in_turns(first: Action, second: Action, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds of `rounds` calls of each, ascending, after some to warm up. The two change places every few calls,
    so that whatever else the machine does meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(0, WARMUP + rounds, TURN):
        for action, taken in zip((first, second), times, strict=True):
            taken += [_microseconds(action) for _ in range(min(TURN, WARMUP + rounds - number))]
    return sorted(times[0][WARMUP:]), sorted(times[1][WARMUP:])


def _microseconds(action: Action) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e6


def _percentile(ascending: Sequence[float], percent: int) -> float:
    return round(ascending[len(ascending) * percent // 100], 1)


class _MirrorHost(ExpertHost):
    """Answers with the rows that came: all that is left of a round trip is the way."""

    def compute(self, shipment: Shipment) -> torch.Tensor:
        return shipment.rows_TH


class _NoExperts:
    def load(self, layer: int, expert: int) -> ExpertWeights:
        raise AssertionError("a mirror needs no experts")


def _mirror_main(pipe: Connection, terms: LinkTerms) -> None:
    torch.set_num_threads(1)
    serve_until_closed(pipe, _MirrorHost("host", _NoExperts()), terms)
