"""What must hold in a simulated cluster at all times, and what must have come to pass in the end.

Violations are collected, not raised: the parts under test catch errors of their own, and must not hide these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control.state import ControllerState
from cluster.simulate.faults import Asked
from cluster.simulate.ingress import EXPIRY_GRACE_S
from cluster.simulate.model import END_ID, Model
from cluster.simulate.router import MAX_MODEL_LEN, SimulatedRouter
from cluster.simulate.transport import MAX_IN_FLIGHT
from cluster.simulate.world import World
from experts.errors import HerdError, Overloaded
from experts.placement import ClusterView, ExpertKey, Placement
from experts.transport.base import Shipment
from router.engine.request import Event, FinishEvent, FinishReason, TokenEvent
from router.engine.scheduler import Step
from router.resume import DEADLINE_EXCEEDED, ROUTER_UNAVAILABLE

MAX_HEDGES = 0.1
"""Of a router's shipments, those that were not hedges or re-sends themselves."""
EXPERT_UNAVAILABLE = "expert_unavailable"


@dataclass(kw_only=True)
class Story:
    """What a client has heard so far."""

    asked: Asked
    answer: list[int]
    tokens: list[int] = field(default_factory=list)
    end: FinishEvent | HerdError | None = None
    left: bool = False

    @property
    def is_over(self) -> bool:
        return self.left or self.end is not None

    @property
    def is_answered(self) -> bool:
        return isinstance(self.end, FinishEvent) and self.end.reason is not FinishReason.ERROR


class Invariants:
    """Hears of everything that parts say to each other and to clients."""

    def __init__(self, world: World, model: Model, num_replicas: int) -> None:
        self.violations: list[str] = []
        self.stories: dict[str, Story] = {}
        self.controller_since = 0.0
        """When the present life of the controller began."""
        self._world = world
        self._model = model
        self._num_replicas = num_replicas
        self._newest = Placement()
        self._placements: dict[int, Placement] = {}
        self._views: dict[str, ClusterView] = {}
        self._attempts: dict[str, Attempts] = {}

    def tell(self, who: str, what: str) -> None:
        """Add to the history."""
        self._world.note(who, what)

    def violated(self, what: str) -> None:
        self._world.note("VIOLATION", what)
        self.violations.append(what)

    def check(self, holds: bool, what: Callable[[], str]) -> None:
        if not holds:
            self.violated(what())

    # Clients

    def asks(self, asked: Asked) -> Story:
        room = min(asked.max_tokens, MAX_MODEL_LEN - len(asked.prompt_ids))
        story = Story(asked=asked, answer=self._model.answer(asked.prompt_ids, asked.seed, room))
        self.stories[asked.request_id] = story
        return story

    def hears_token(self, story: Story, token: TokenEvent) -> None:
        """No token without its experts: each is the one that an undisturbed cluster would have given."""
        name, index = story.asked.request_id, len(story.tokens)
        self._world.note("client", f"{name}: token {token.index} is {token.token_id}")
        self.check(not story.is_over, lambda: f"{name} gets token {token.index} after its end")
        wanted = story.answer[index] if index < len(story.answer) else None
        self.check(
            (token.index, token.token_id) == (index, wanted),
            lambda: f"{name} gets {token.token_id} as token {token.index}, and {wanted} is token {index}",
        )
        story.tokens.append(token.token_id)

    def hears_end(self, story: Story, end: FinishEvent | HerdError) -> None:
        """One end, which the answer or the deadline or the deaths of routers explain."""
        name = story.asked.request_id
        text = f"{end.reason} {end.code} {end.message}".strip() if isinstance(end, FinishEvent) else repr(end)
        self._world.note("client", f"{name}: ends, {text}")
        self.check(not story.is_over, lambda: f"{name} ends twice")
        story.end = end
        if story.is_answered:
            assert isinstance(end, FinishEvent)
            right = FinishReason.STOP if story.answer[-1] == END_ID else FinishReason.LENGTH
            whole = (story.tokens, end.reason) == (story.answer, right)
            self.check(whole, lambda: f"{name} ends as {end.reason} with {story.tokens} of {story.answer}")
        else:
            self.check(self._is_excused(story, end), lambda: f"{name} fails without need: {text}")
        late_s = self._world.now - (story.asked.at + story.asked.timeout_s)
        self.check(late_s <= EXPIRY_GRACE_S + 0.01, lambda: f"{name} ends {late_s:.3f} s after its deadline")

    def _is_excused(self, story: Story, end: FinishEvent | HerdError) -> bool:
        if isinstance(end, HerdError):
            return isinstance(end, Overloaded) and not story.tokens
        was_due = self._world.now >= story.asked.at + story.asked.timeout_s - 1e-6
        if end.code == ROUTER_UNAVAILABLE:
            return was_due or "attempts failed" in end.message
        return was_due and end.code in (DEADLINE_EXCEEDED, EXPERT_UNAVAILABLE)

    # Routers

    def attempts_on(self, router: str, is_leaving: Callable[[], bool]) -> Attempts:
        """Who hears of the attempts of `router`."""
        self._attempts[router] = Attempts(self, router, is_leaving)
        return self._attempts[router]

    def watch(self, router: SimulatedRouter) -> None:
        """Check a router between its steps and layers."""
        sent: Counter[ExpertKey] = Counter()
        wanted: Counter[ExpertKey] = Counter()

        def before_step(step: Step) -> None:
            try:
                router.scheduler.check_integrity()
            except AssertionError as error:
                self.violated(f"{router.name}: the scheduler's integrity: {error!r}")

        def before_dispatch(rows: Counter[ExpertKey]) -> None:
            sent.clear()
            wanted.clear()
            wanted.update(rows)

        def on_send(host: str, shipment: Shipment) -> None:
            for segment in shipment.segments:
                sent[segment.key] += segment.num_rows
                most = wanted[segment.key] * (self._num_replicas + 1)
                self.check(sent[segment.key] <= most, lambda: f"{router.name} ships {sent} rows and has {wanted}")
            stats = router.experts.stats
            hedges = sum(stats.hedges[outcome] for outcome in ("won", "late", "failed"))
            few = hedges <= MAX_HEDGES * (stats.shipments - stats.resends)
            self.check(few, lambda: f"{router.name} hedged {hedges} of {stats.shipments} shipments")
            waiting = router.transport.num_waiting
            room = MAX_IN_FLIGHT * max(1, len(router.transport.linked()))
            self.check(waiting <= room, lambda: f"{router.name} waits for {waiting} shipments")

        router.runner.before_step, router.runner.before_dispatch = before_step, before_dispatch
        router.transport.on_send = on_send

    def is_idle(self, router: SimulatedRouter) -> None:
        """Nothing is left of requests that are over."""
        left = [request.request_id for request in router.scheduler.requests]
        self.check(not left, lambda: f"{router.name} still has {left}")
        silent = self._attempts[router.name].open
        self.check(not silent, lambda: f"{router.name} never ended {sorted(silent)}")
        layout, free = router.scheduler.cache.layout, router.scheduler.cache.num_free
        whole = (layout.num_global_blocks, layout.num_local_blocks)
        self.check(tuple(free) == whole, lambda: f"{router.name} has {free} free blocks of {whole}")

    # The controller and its views

    def publishes(self, state: ControllerState, view: ClusterView) -> None:
        """An epoch names one placement for ever; a placement lists what hosts said they hold."""
        placement = view.placement
        known = self._placements.setdefault(placement.epoch, placement)
        same = dict(known.replicas) == dict(placement.replicas)
        self.check(same, lambda: f"epoch {placement.epoch} names two placements")
        newest = max(self._placements)
        self.check(placement.epoch == newest, lambda: f"epoch {placement.epoch} is published after {newest}")
        for key, hosts in placement.replicas.items():
            for host in hosts:
                if not _holds(state, host, key):
                    self.violated(f"epoch {placement.epoch} lists {key} on {host}, which holds it not")
        self._takes_only_what_is_gone(state, known)

    def _takes_only_what_is_gone(self, state: ControllerState, placement: Placement) -> None:
        """A replica leaves the placement because its host lost it or is away, or others serve in its place, and not
        because nobody looked."""
        before, self._newest = self._newest, placement
        heard_out = self._world.now - self.controller_since >= state.timing.lost_after - 1e-6
        for key, hosts in before.replicas.items():
            for host in set(hosts) - set(placement.hosts_of(key)):
                one = state.hosts.get(host)
                if one is None or (key not in one.duty and not one.lost and _holds(state, host, key)):
                    served = bool(placement.hosts_of(key))
                    self.check(served, lambda: f"epoch {placement.epoch} leaves {key} to nobody")  # noqa: B023
                    continue
                unheard = one.report is None and not heard_out
                whole = one.report is not None and key in one.duty <= one.report.held
                if unheard or (whole and not one.lost):
                    self.violated(f"epoch {placement.epoch} takes {key} from {host}, which may still hold it")

    def sees(self, process: str, view: ClusterView) -> None:
        """For everyone versions grow, and epochs never fall."""
        before = self._views.get(process, ClusterView())
        self._views[process] = view
        grows = view.version > before.version and view.placement.epoch >= before.placement.epoch
        self.check(grows, lambda: f"{process} goes from {_numbers(before)} to {_numbers(view)}")

    # The end

    def all_over(self) -> bool:
        return all(story.is_over for story in self.stories.values())

    def judge_end(self) -> None:
        """Everyone got an end, and who had the time got the answer."""
        for name, story in self.stories.items():
            if not story.is_over:
                self.violated(f"{name} never ends")
            elif story.asked.is_probe and not story.is_answered:
                self.violated(f"{name} is not answered: {story.end}")


class Attempts:
    """The attempts of one router; see `cluster.simulate.router.Listener`. Its engine ends each of them once, and says
    nothing of it afterwards."""

    def __init__(self, invariants: Invariants, router: str, is_leaving: Callable[[], bool]) -> None:
        self._is_leaving = is_leaving
        self.open: set[str] = set()
        self._invariants = invariants
        self._router = router
        self._cancelled: Counter[str] = Counter()
        """Attempts that nobody listens to any more, and how much was said of each since."""

    def begins(self, attempt: str) -> None:
        self.open.add(attempt)

    def cancels(self, attempt: str) -> None:
        self._cancelled[attempt] = 0

    def says(self, attempt: str, event: Event) -> None:
        check, name = self._invariants.check, f"{self._router} {attempt}"
        check(attempt in self.open, lambda: f"{name} goes on after its end: {event}")
        if attempt in self._cancelled:
            self._cancelled[attempt] += 1
            check(self._cancelled[attempt] <= 2, lambda: f"{name} goes on though it was cancelled: {event}")
        if isinstance(event, FinishEvent):
            self.open.discard(attempt)
            self._invariants.tell(self._router, f"{attempt} ends, {event.reason} {event.code}")
            sound = event.code in ("", DEADLINE_EXCEEDED, EXPERT_UNAVAILABLE)
            gives_up = event.code == ROUTER_UNAVAILABLE and self._is_leaving()
            check(sound or gives_up, lambda: f"{name} ends as {event.code}: {event.message}")


def _holds(state: ControllerState, host: str, key: ExpertKey) -> bool:
    report = state.hosts[host].report if host in state.hosts else None
    return report is not None and key in report.held


def _numbers(view: ClusterView) -> str:
    return f"version {view.version}, epoch {view.placement.epoch}"
