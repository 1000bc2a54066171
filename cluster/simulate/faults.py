"""What a seed draws: the shape of a cluster, its requests, and the faults that befall it. Plain values.

Every seed switches whole kinds of faults on or off, so that rare combinations are tried as well as everything at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.simulate.model import VOCAB_SIZE, Model
from cluster.simulate.network import Weather

CONTROLLER, INGRESS = "controller", "ingress"
BEGIN_S, FAULTS_END_S = 2.0, 14.0
"""When requests and faults begin, and when the last fault is over."""


class Kind(StrEnum):
    """What can befall a cluster. KILL and STOP are SIGKILL and SIGSTOP, RETIRE tells a router to end, SLOW is a host
    that takes 100 times as long, SICK one whose computations fail, CUT a link that lets nothing through one way, SPLIT
    both ways, STORM a worse weather for all messages."""

    KILL = "kill"
    RETIRE = "retire"
    STOP = "stop"
    SLOW = "slow"
    SICK = "sick"
    CUT = "cut"
    SPLIT = "split"
    STORM = "storm"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At `at` it befalls `subject` (and `other`, for links), for `lasts_s` where it lasts."""

    at: float
    kind: Kind
    subject: str
    other: str = ""
    lasts_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}{self.other and ' → ' + self.other} for {self.lasts_s:.2f} s"


class Wish(StrEnum):
    """What a person asks of the controller: to move an expert, to apply a plan made from some load, to undo the last
    plan, to empty a host and end it, to have more hosts or fewer."""

    MOVE = "move"
    PLAN = "plan"
    ROLLBACK = "rollback"
    DRAIN = "drain"
    HOSTS = "hosts"


@dataclass(frozen=True, kw_only=True)
class Wished:
    """`seed` draws which expert, host or load it is about."""

    at: float
    wish: Wish
    seed: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and its client, who leaves after `patience_s`, if that is set."""

    request_id: str
    at: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    timeout_s: float
    patience_s: float | None = None
    is_probe: bool = False
    """Comes when all faults are over, and must be answered."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """All of a seed. `rough_rows`, `rough_tokens`: messages between routers and hosts, or the ingress and routers, fare
    one by one. `same_address`: a new life of a host listens where the old one did."""

    model: Model
    hosts: tuple[str, ...]
    routers: tuple[str, ...]
    num_replicas: int
    rough_rows: bool
    rough_tokens: bool
    same_address: bool
    restart_s: float
    rehome_s: float
    load_s: float
    calm: Weather
    storm: Weather
    requests: tuple[Asked, ...]
    faults: tuple[Fault, ...]
    wishes: tuple[Wished, ...]
    extra_slots: int


def draw(seed: int) -> Drawn:
    """The same for the same seed, everywhere and always."""
    rng = random.Random(f"cluster {seed}")
    hosts = tuple(f"host-{index}" for index in range(rng.randint(2, 4)))
    routers = tuple(f"router-{index}" for index in range(rng.choice((1, 2, 2, 2, 3))))
    delay_s = rng.choice((0.0002, 0.001, 0.005))
    num_experts = rng.randint(2, 4)
    return Drawn(
        model=Model(num_experts=num_experts, per_token=rng.choice((1, 1, 2))),
        hosts=hosts,
        routers=routers,
        num_replicas=min(len(hosts), rng.choice((1, 2, 2, 2, 3))),
        rough_rows=rng.random() < 0.3,
        rough_tokens=rng.random() < 0.3,
        same_address=rng.random() < 0.5,
        restart_s=rng.uniform(0.2, 2.0),
        rehome_s=rng.choice((3.5, 30.0)),
        load_s=rng.choice((0.0, 0.02, 0.3)),
        calm=Weather(delay_s=delay_s),
        storm=_storm(rng, delay_s),
        requests=_requests(rng),
        faults=_faults(rng, hosts, routers),
        wishes=_wishes(seed),
        extra_slots=seed % 2,
    )


def _wishes(seed: int) -> tuple[Wished, ...]:
    """In two of three seeds; no host is drained twice."""
    rng = random.Random(f"wishes {seed}")
    kinds = [Wish.MOVE, Wish.MOVE, Wish.PLAN, Wish.PLAN, Wish.ROLLBACK]
    number = rng.randint(1, 8) if seed % 3 else 0
    wishes = [(rng.uniform(BEGIN_S, FAULTS_END_S), rng.choice(kinds)) for _ in range(number)]
    if number and rng.random() < 0.3:
        wishes.append((rng.uniform(BEGIN_S, FAULTS_END_S - 4.0), Wish.DRAIN))
    if number and rng.random() < 0.4:
        wishes += [(rng.uniform(BEGIN_S, FAULTS_END_S - 4.0), Wish.HOSTS) for _ in range(rng.randint(1, 3))]
    return tuple(
        Wished(at=at, wish=wish, seed=f"wish {seed} {index}") for index, (at, wish) in enumerate(sorted(wishes))
    )


def draw_probes(seed: int, begin: float) -> tuple[Asked, ...]:
    """Requests that come after `begin`."""
    rng = random.Random(f"probes {seed}")
    probes = [_asked_at(rng, f"probe-{index}", begin + rng.uniform(0.0, 2.0), 60.0) for index in range(3)]
    return tuple(replace(probe, is_probe=True) for probe in probes)


def _storm(rng: random.Random, delay_s: float) -> Weather:
    return Weather(
        delay_s=delay_s * rng.choice((1, 5, 20)),
        loss=rng.choice((0.0, 0.002, 0.02)),
        doubled=rng.choice((0.0, 0.05)),
        overtaken=rng.choice((0.0, 0.05)),
        corrupt=rng.choice((0.0, 0.02, 0.05)),
    )


def _requests(rng: random.Random) -> tuple[Asked, ...]:
    number = rng.randint(5, 12)
    first, last = BEGIN_S, FAULTS_END_S - 2
    if rng.random() < 0.15:
        # All at once, and more than the routers take.
        number, first = 20, rng.uniform(first, last)
        last = first + 0.05
    return tuple(
        _asked_at(rng, f"request-{index}", rng.uniform(first, last), rng.choice((rng.uniform(0.5, 4.0), 90.0, 90.0)))
        for index in range(number)
    )


def _asked_at(rng: random.Random, request_id: str, at: float, timeout_s: float) -> Asked:
    # Some prompts begin alike, so that they share blocks.
    beginning = [7] * rng.choice((0, 0, 4, 9))
    return Asked(
        request_id=request_id,
        at=at,
        prompt_ids=(*beginning, *(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 12)))),
        max_tokens=rng.randint(2, 16),
        seed=rng.randrange(1000),
        timeout_s=timeout_s,
        patience_s=rng.uniform(0.0, 1.0) if timeout_s < 60 and rng.random() < 0.3 else None,
    )


def _faults(rng: random.Random, hosts: Sequence[str], routers: Sequence[str]) -> tuple[Fault, ...]:
    kinds = [kind for kind in Kind if rng.random() < 0.5] or [Kind.KILL]
    fragile = [group for group in (hosts, hosts, routers, [CONTROLLER]) if rng.random() < 0.7] or [hosts]
    faults = [
        _fault(rng, rng.choice(kinds), rng.choice(rng.choice(fragile)), hosts, routers)
        for _ in range(rng.randint(1, 10))
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _fault(rng: random.Random, kind: Kind, subject: str, hosts: Sequence[str], routers: Sequence[str]) -> Fault:
    at = rng.uniform(BEGIN_S - 1.0, FAULTS_END_S - 1.0)
    lasts_s = min(rng.choice((0.05, 0.5, 3.0, 9.0)) * rng.uniform(0.5, 1.5), FAULTS_END_S - at)
    other = ""
    if kind in (Kind.SLOW, Kind.SICK):
        subject = rng.choice(hosts)
    elif kind is Kind.RETIRE:
        subject = rng.choice(routers)
    elif kind is Kind.STORM:
        subject, lasts_s = "everything", min(max(lasts_s, 2.0), FAULTS_END_S - at)
    elif kind in (Kind.CUT, Kind.SPLIT):
        subject, other = rng.choice(_links(hosts, routers))
    if kind is Kind.CUT and rng.random() < 0.5:
        subject, other = other, subject
    return Fault(at=at, kind=kind, subject=subject, other=other, lasts_s=lasts_s)


def _links(hosts: Sequence[str], routers: Sequence[str]) -> list[tuple[str, str]]:
    """Who talks to whom."""
    data = [(router, host) for router in routers for host in hosts]
    control = [(member, CONTROLLER) for member in (*hosts, *routers, INGRESS)]
    return [*data, *data, *control, *((INGRESS, router) for router in routers)]
