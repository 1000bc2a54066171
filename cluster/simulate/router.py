"""A simulated router: real engine, scheduler, cache and dispatch, the hashing model, a listener of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.simulate.control import MemberLink
from cluster.simulate.model import BLOCK_SIZE, CHUNK_SIZE, END_ID, VOCAB_SIZE, Model
from cluster.simulate.network import Corrupt, End, Network
from cluster.simulate.process import Process
from cluster.simulate.runner import HashRunner
from cluster.simulate.transport import Checks, VirtualTransport
from experts.errors import InvalidInput, Overloaded, RouterLost
from experts.placement import ClusterView
from experts.reports import MemberKind, MemberReport
from router.dispatch import RemoteExperts
from router.engine.engine import Engine
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.grpc_server import BEAT_S
from router.resume import Received, Refused

MAX_RUNNING, MAX_WAITING = 4, 6
MAX_MODEL_LEN = 48
LEAVE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Submit:
    """What an ingress asks of a router."""

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    emitted_ids: tuple[int, ...]
    sampling: SamplingParams
    left_s: float


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Asks for beats."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The router lives."""


class Listener(Protocol):
    """Hears of the attempts of one router: what its engine takes, is told to cancel, and says."""

    def begins(self, attempt: str) -> None: ...

    def cancels(self, attempt: str) -> None: ...

    def says(self, attempt: str, event: Event) -> None: ...


class SimulatedRouter:
    """One life of a router."""

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        model: Model,
        name: str,
        rough: bool,
        on_view: Callable[[ClusterView], None],
        listener: Listener,
        checks: Checks,
    ) -> None:
        self.name = name
        self.process = process
        self.is_leaving = False
        self.transport = VirtualTransport(
            network, process, rough=rough, on_change=lambda: self.engine.wake(), checks=checks
        )
        self.experts = RemoteExperts(self.transport, clock=process.world.clock, wall=process.world.clock)
        self.runner = HashRunner(model, self.experts)
        self.scheduler = Scheduler(KVCache(_layout()), _config())
        self.engine = Engine(
            scheduler=self.scheduler,
            runner=self.runner,
            vocab_size=VOCAB_SIZE,
            available=self.experts.available,
            begin_step=self.experts.begin_step,
            clock=process.world.clock,
            threads=process.threads,
        )
        self._on_view = on_view
        self._listener = listener
        self.link = MemberLink(network, process, self._report, self._use)
        network.listen(name, process, self._accept)
        self.engine.start()
        self.link.start()

    def leave(self) -> None:
        """End as a router does that is told to: give its requests up, then go."""
        self.is_leaving = True
        self.engine.stop()
        self.process.after(LEAVE_S, self.process.exit)

    def _report(self, view: ClusterView) -> MemberReport:
        return MemberReport(
            kind=MemberKind.ROUTER,
            name=self.name,
            address=self.name,
            pid=self.process.life,
            view_version=view.version,
            view_epoch=view.placement.epoch,
            max_model_len=MAX_MODEL_LEN,
            hosts=dict(self.experts.stats.hosts),
            longest_wait_s=self.engine.longest_wait_s(),
        )

    def _use(self, view: ClusterView) -> None:
        self._on_view(view)
        self.experts.connect(view)
        self.engine.wake()

    def _accept(self, end: End) -> None:
        end.on_message = lambda message: self._take(end, message)

    def _take(self, end: End, message: Submit | Listen | Corrupt) -> None:
        if isinstance(message, Corrupt):
            end.close()
        elif isinstance(message, Listen):
            self._beat(end)
        else:
            _Call(self.engine, self.process, end, message, self._listener).begin()

    def _beat(self, end: End) -> None:
        if end.open and not self.is_leaving:
            end.send(Beat())
            self.process.after(BEAT_S, lambda: self._beat(end))


class _Call:
    """One attempt of a request, as the real listener treats it."""

    def __init__(self, engine: Engine, process: Process, end: End, submit: Submit, listener: Listener) -> None:
        self._engine = engine
        self._process = process
        self._end = end
        self._submit = submit
        self._listener = listener
        self._name = f"{submit.request_id}/{submit.attempt}"
        self._finished = False
        self._events: list[Event] = []

    def begin(self) -> None:
        submit, end = self._submit, self._end
        # A request is one call: what comes twice on it is the network's doing.
        end.on_message = self._heard
        end.on_end = self._gone
        try:
            self._engine.submit(
                submit.request_id,
                submit.attempt,
                list(submit.prompt_ids),
                list(submit.emitted_ids),
                submit.sampling,
                self._process.world.now + submit.left_s,
                self._tell,
            )
        except (Overloaded, InvalidInput) as error:
            self._finished = True
            end.send(Refused(error=error))
            end.close()
        except RouterLost:
            self._finished = True
            end.close()
        else:
            self._listener.begins(self._name)
            end.send(Received())

    def _heard(self, message: Any) -> None:
        if isinstance(message, Corrupt):
            self._end.close()
            self._gone()

    def _gone(self) -> None:
        if not self._finished:
            self._listener.cancels(self._name)
            self._engine.cancel(self._submit.request_id, self._submit.attempt)

    def _tell(self, event: Event) -> None:
        self._listener.says(self._name, event)
        if not self._events:
            self._process.after(0.0, self._say)
        self._events.append(event)

    def _say(self) -> None:
        """What came of one step goes out as one message."""
        events, self._events = self._events, []
        tokens = tuple(event for event in events if isinstance(event, TokenEvent))
        finish = next((event for event in events if isinstance(event, FinishEvent)), None)
        self._end.send(Received(tokens=tokens, finish=finish))
        if finish is not None:
            self._finished = True
            self._end.close()


def _layout() -> KVLayout:
    """Little memory, so that requests take it from each other."""
    return KVLayout(
        block_size=BLOCK_SIZE,
        num_global_blocks=MAX_MODEL_LEN // BLOCK_SIZE + 4,
        num_local_blocks=2 * CHUNK_SIZE // BLOCK_SIZE + 2,
        chunk_size=CHUNK_SIZE,
        has_global=True,
        has_local=True,
    )


def _config() -> SchedulerConfig:
    return SchedulerConfig(
        max_batch_tokens=16,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        max_waiting_tokens=200,
        max_model_len=MAX_MODEL_LEN,
        eos_ids=frozenset({END_ID}),
    )
