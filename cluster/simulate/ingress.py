"""A simulated ingress: requests that outlive their routers. The decisions are `router.resume`'s, the timing that of
`router.grpc_client` and `router.grpc_link`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.simulate.control import MemberLink
from cluster.simulate.network import Corrupt, End, Network
from cluster.simulate.process import Process
from cluster.simulate.router import Beat, Listen, Submit
from experts.errors import HerdError
from experts.placement import ClusterView
from experts.reports import MemberKind, MemberReport
from router.affinity import affinity_key
from router.engine.request import FinishEvent, SamplingParams, TokenEvent
from router.grpc_client import SILENCE_S
from router.grpc_link import BLIP, LOOKS_PER_SILENCE
from router.patience import Patience
from router.resume import (
    Begun,
    Broken,
    Candidate,
    Decision,
    Expired,
    Fail,
    Open,
    Received,
    Refused,
    ResumeEvent,
    Resumption,
    Wait,
    Woke,
    step,
)
from router.resume import (
    End as Ended,
)

PROBE_EVERY_S, EXPIRY_GRACE_S = 0.25, 1.0


@dataclass(frozen=True, kw_only=True)
class Client:
    """Whoever asked: hears of tokens, then of one end."""

    on_token: Callable[[TokenEvent], None]
    on_finish: Callable[[FinishEvent | HerdError], None]


class RouterLink:
    """What an ingress knows of one router of the view, and its calls there."""

    def __init__(self, ingress: SimulatedIngress, name: str) -> None:
        self.name = name
        self.well = True
        self.calls: dict[_Call, None] = {}
        self._ingress = ingress
        self._process = ingress.process
        self._wanted = True
        self._patience = Patience(SILENCE_S)
        self._heard_at = self._process.world.now
        self._listen()
        self._watch()

    def hear(self) -> None:
        """The router said something."""
        self._heard_at = self._process.world.now

    def doubt(self) -> None:
        """The router is not well until it beats again."""
        self.well = False

    def retire(self) -> None:
        """The view does not name it any more; its calls go on."""
        self._wanted = False

    def _listen(self) -> None:
        """Hear beats, and ask for new ones whenever they end."""
        if self._wanted:
            self._ingress.network.dial(self._process, self.name, self._opened, lambda problem: self._ended())

    def _opened(self, end: End) -> None:
        def take(message: Beat | Corrupt) -> None:
            if isinstance(message, Corrupt):
                end.close()
                self._ended()
            else:
                self._beat()

        end.on_message, end.on_end = take, self._ended
        end.send(Listen())

    def _ended(self) -> None:
        self.doubt()
        self._process.after(PROBE_EVERY_S, self._listen)

    def _beat(self) -> None:
        silence_s = self._process.world.now - self._heard_at
        self.hear()
        if self.well or not self._wanted:
            return
        if silence_s < BLIP * self._patience.seconds(self._heard_at):
            self._patience.false_alarm(self._heard_at)
        self.well = True
        self._ingress.wake()

    def _watch(self) -> None:
        """Notice silence."""
        now = self._process.world.now
        left_s = self._heard_at + self._patience.seconds(now) - now
        if left_s <= 1e-9:
            left_s = SILENCE_S / LOOKS_PER_SILENCE
            if self.well:
                self.doubt()
                for call in list(self.calls):
                    call.fall_silent()
        if self._wanted or self.calls:
            self._process.after(left_s, self._watch)


class SimulatedIngress:
    """All requests of the cluster's clients."""

    def __init__(
        self, network: Network, process: Process, *, rough: bool, on_view: Callable[[ClusterView], None]
    ) -> None:
        self.network = network
        self.process = process
        self.rough = rough
        self.links: dict[str, RouterLink] = {}
        self._on_view = on_view
        self._requests: dict[str, _Request] = {}
        self._link = MemberLink(network, process, self._report, self._use)
        self._link.start()

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deadline: float, client: Client
    ) -> None:
        request = _Request(self, request_id, tuple(prompt_ids), sampling, deadline, client)
        self._requests[request_id] = request
        request.feed(Begun())

    def leave(self, request_id: str) -> None:
        """The client of a request has gone."""
        request = self._requests.get(request_id)
        if request is not None:
            request.end()

    def candidates(self) -> list[Candidate]:
        return [Candidate(name=link.name, in_flight=len(link.calls)) for link in self.links.values() if link.well]

    def wake(self) -> None:
        """The routers changed."""
        for request in list(self._requests.values()):
            request.woken()

    def forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def _report(self, view: ClusterView) -> MemberReport:
        return MemberReport(
            kind=MemberKind.INGRESS,
            name=self.process.name,
            view_version=view.version,
            view_epoch=view.placement.epoch,
        )

    def _use(self, view: ClusterView) -> None:
        self._on_view(view)
        for name in list(self.links):
            if name not in view.routers:
                self.links.pop(name).retire()
        for name in view.routers:
            if name not in self.links:
                self.links[name] = RouterLink(self, name)
        self.wake()


class _Request:
    """One request over all its attempts; holds at most one call."""

    def __init__(
        self,
        ingress: SimulatedIngress,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        deadline: float,
        client: Client,
    ) -> None:
        affinity = affinity_key(prompt_ids, (), None, "")
        self.state = Resumption(request_id=request_id, sampling=sampling, deadline=deadline, affinity=affinity)
        self._ingress = ingress
        self._process = ingress.process
        self._prompt_ids = prompt_ids
        self._client = client
        self._call: _Call | None = None
        self._waiting = False
        self._num_waits = 0

    def feed(self, event: ResumeEvent) -> None:
        """Take an event in and do what follows."""
        decision = step(self.state, event, self._ingress.candidates(), self._process.world.now)
        for token in decision.tokens:
            self._client.on_token(token)
        self._carry_out(decision)

    def woken(self) -> None:
        if self._waiting:
            self._waiting = False
            self.feed(Woke())

    def end(self) -> None:
        """Drop everything."""
        self._waiting = False
        self._drop()
        self._ingress.forget(self.state.request_id)

    def _carry_out(self, decision: Decision) -> None:
        then = decision.then
        if isinstance(then, Ended):
            self.end()
            self._client.on_finish(then.finish)
        elif isinstance(then, Fail):
            self.end()
            self._client.on_finish(then.error)
        elif isinstance(then, Wait):
            self._drop()
            self._wait(then.until)
        elif isinstance(then, Open):
            self._drop()
            self._open(then)

    def _wait(self, until: float) -> None:
        self._waiting = True
        self._num_waits += 1
        number = self._num_waits

        def due() -> None:
            if number == self._num_waits:
                self.woken()

        self._process.after(until - self._process.world.now, due)

    def _open(self, then: Open) -> None:
        link = self._ingress.links.get(then.router)
        if link is None:
            self.feed(Broken(problem=f"router {then.router} left"))
            return
        left_s = max(self.state.deadline - self._process.world.now, 0.0)
        submit = Submit(
            request_id=self.state.request_id,
            attempt=then.attempt,
            prompt_ids=self._prompt_ids,
            emitted_ids=then.emitted_ids,
            sampling=self.state.sampling,
            left_s=left_s,
        )
        self._call = _Call(self._ingress, link, self.feed, left_s + EXPIRY_GRACE_S)
        self._call.begin(submit)

    def _drop(self) -> None:
        if self._call is not None:
            self._call.close()
            self._call = None


class _Call:
    """One attempt on one router. `on_event` is called until `close`."""

    def __init__(
        self, ingress: SimulatedIngress, link: RouterLink, on_event: Callable[[ResumeEvent], None], timeout_s: float
    ) -> None:
        self._ingress = ingress
        self._process = ingress.process
        self._link = link
        self._on_event = on_event
        self._timeout_s = timeout_s
        self._end: End | None = None
        self._open = True

    def begin(self, submit: Submit) -> None:
        self._link.calls[self] = None
        self._process.note(f"{submit.request_id}/{submit.attempt} goes to {self._link.name}")
        self._process.after(self._timeout_s, self._expire)

        def opened(end: End) -> None:
            if not self._open:
                end.close()
                return
            self._end = end
            end.on_message = self._heard
            end.on_end = lambda: self._fail("the stream ended")
            end.send(submit)

        self._ingress.network.dial(self._process, self._link.name, opened, self._fail, rough=self._ingress.rough)

    def close(self) -> None:
        """Tell the router to stop, unless it is done."""
        if self._open:
            self._open = False
            del self._link.calls[self]
            if self._end is not None:
                self._end.close()

    def _heard(self, message: Any) -> None:
        if not self._open:
            return
        if isinstance(message, Corrupt):
            self._fail("a message that nobody can read")
            return
        self._link.hear()
        assert isinstance(message, Received | Refused), message
        self._on_event(message)

    def fall_silent(self) -> None:
        """The router does not answer."""
        if self._open:
            self._on_event(Broken(problem=f"router {self._link.name} said nothing", silent=True))

    def _expire(self) -> None:
        if self._open:
            self._on_event(Expired())

    def _fail(self, problem: str) -> None:
        if self._open:
            self._link.doubt()
            self._on_event(Broken(problem=f"router {self._link.name}: {problem}"))
