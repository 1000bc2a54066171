"""Composition of one process without Ray: a model folder opened, an expert host, a router with all its parts.

Everything is built here and nowhere else; the Ray shell only decides in which process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config import ServeSettings
from experts.checkpoint import Checkpoint
from experts.config import ModelConfig, load_config, read_json, token_ids
from experts.grpc_control import MemberLink
from experts.placement import ClusterView, ExpertKey
from experts.reports import HostReport, MemberKind, MemberReport
from experts.transport.grpc_client import GrpcTransport
from experts.weights import ExpertStore
from experts.wire.codec import LinkTerms
from router.checkpoint import load_trunk
from router.dispatch import RemoteExperts
from router.engine.engine import Engine
from router.engine.kv_cache import KVCache, KVLayout, plan_layout
from router.engine.runner import ModelRunner, bytes_per_block
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.grpc_server import RouterServer
from router.local_experts import LocalExperts
from router.model.decoder import Decoder, RoutedExperts

log = logging.getLogger(__name__)

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened checkpoint and the type that it is computed in."""

    config: ModelConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    eos_ids: frozenset[int]

    def terms(self) -> LinkTerms:
        """What both ends of a link must agree on."""
        return LinkTerms(
            checkpoint_digest=self.checkpoint.digest(), dtype=self.dtype, hidden_size=self.config.hidden_size
        )

    def store(self) -> ExpertStore:
        return ExpertStore(self.checkpoint, self.config, self.dtype)


def open_model(model_dir: Path, dtype: str = "auto") -> Model:
    """Read config and tensor tables, no weights. `dtype` "auto" is the checkpoint's own. Raises CheckpointError."""
    config = load_config(model_dir)
    return Model(
        config=config,
        checkpoint=Checkpoint(model_dir),
        dtype=getattr(torch, config.dtype if dtype == "auto" else dtype),
        eos_ids=frozenset(config.eos_token_ids) | _generation_eos(model_dir),
    )


def _generation_eos(model_dir: Path) -> frozenset[int]:
    path = model_dir / "generation_config.json"
    return frozenset(token_ids("eos_token_id", read_json(path).get("eos_token_id"))) if path.exists() else frozenset()


def build_engine(
    model: Model, settings: ServeSettings, experts: RoutedExperts, available: Callable[[frozenset[ExpertKey]], bool]
) -> Engine:
    """Load the trunk and put an engine around it, not started. Raises CheckpointError and InvalidInput."""
    layout = plan_kv(model, settings)
    capacity = layout.capacity_tokens(model.config.max_position)
    scheduler = Scheduler(
        KVCache(layout),
        SchedulerConfig(
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_waiting_tokens=settings.max_waiting * capacity,
            max_model_len=settings.max_model_len or capacity,
            eos_ids=model.eos_ids,
        ),
    )
    device = torch.device(settings.device)
    trunk = load_trunk(model.checkpoint, model.config, model.dtype, device)
    runner = ModelRunner(Decoder(model.config, trunk, experts), layout, eos_ids=sorted(model.eos_ids))
    return Engine(scheduler=scheduler, runner=runner, vocab_size=model.config.vocab_size, available=available)


def plan_kv(model: Model, settings: ServeSettings) -> KVLayout:
    """The block pools that `settings.kv_memory` bytes pay for."""
    per_global, per_local = bytes_per_block(model.config, BLOCK_SIZE, model.dtype)
    return plan_layout(
        kv_bytes=settings.kv_memory,
        bytes_per_global_block=per_global,
        bytes_per_local_block=per_local,
        block_size=BLOCK_SIZE,
        chunk_size=model.config.chunk_size,
        has_global=per_global > 0,
        has_local=per_local > 0,
        max_running=settings.max_running,
        min_tokens=settings.max_model_len or 1,
    )


class RouterProcess:
    """A router with all its parts: engine, links to hosts (or the experts themselves), listener, controller link.

    `resolve` gives the controller's address. Constructing loads the weights and may take long; `start` does not.
    """

    def __init__(self, settings: ServeSettings, *, name: str, node: str, bind: str, resolve: Callable[[], str]) -> None:
        self.name = name
        self.model = open_model(settings.model_dir, settings.dtype)
        self.experts = self._experts(settings)
        available = self.experts.available if isinstance(self.experts, RemoteExperts) else _always
        self.engine = build_engine(self.model, settings, self.experts, available)
        self.server = RouterServer(self.engine, bind=bind, ports=settings.router_ports)
        self.link = MemberLink(resolve=resolve, report=self.report, on_view=self._use)
        self.metrics_address = ""
        self._node = node
        self._incarnation = time.time_ns()

    def _experts(self, settings: ServeSettings) -> RemoteExperts | LocalExperts:
        if settings.transport == "local":
            store = self.model.store()
            return LocalExperts({key: store.load(*key) for key in store.all_keys()})
        return RemoteExperts(
            GrpcTransport(router_name=self.name, terms=self.model.terms(), on_change=lambda: self.engine.wake())
        )

    def start(self) -> None:
        """Begin to serve and to tell the controller so."""
        self.engine.start()
        self.server.start()
        self.link.start()

    @property
    def alive(self) -> bool:
        """False once the engine has ended: then this process is of no use any more."""
        return self.engine.alive

    def report(self) -> MemberReport:
        """How this router is now, for the controller."""
        running, waiting, parked = self.engine.load()
        return MemberReport(
            kind=MemberKind.ROUTER,
            name=self.name,
            address=self.server.address,
            node=self._node,
            pid=os.getpid(),
            state="ready" if self.alive else "stopping",
            running=running + parked,
            waiting=waiting,
            metrics_address=self.metrics_address,
            max_model_len=self.engine.max_model_len,
            inner_host=self._inner_host(),
        )

    def _inner_host(self) -> HostReport | None:
        if isinstance(self.experts, RemoteExperts):
            return None
        return HostReport(
            name=f"{self.name}-local",
            incarnation=self._incarnation,
            node=self._node,
            pid=os.getpid(),
            transport="local",
            held=frozenset(self.experts.weights),
            held_bytes=sum(weights.num_bytes for weights in self.experts.weights.values()),
            rows_total=self.experts.load.snapshot().rows_total,
        )

    def _use(self, view: ClusterView) -> None:
        if isinstance(self.experts, RemoteExperts):
            self.experts.connect(view)
            self.engine.wake()

    def stop(self) -> None:
        """Give requests up (other routers continue them), then end every part."""
        self.link.close()
        self.engine.stop()
        self.server.stop()
        if isinstance(self.experts, RemoteExperts):
            self.experts.transport.close()


def _always(_missing: frozenset[ExpertKey]) -> bool:
    return True
