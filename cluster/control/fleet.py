"""The hosts that experts can be placed on: how much each holds, how fast it is, where it stands. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from experts.errors import InvalidInput
from experts.placement import ExpertKey


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A host as the planner sees it.

    An expert costs it `touch_s` seconds in each dispatch that has rows of it (one read of its weights) and `row_s` for
    each row; `link_s` is what a row's way there and back takes longer than to the nearest host. `slots` are experts of
    all layers together, of which `surplus` are to be given back. A slot on a device that a KV cache shares may have a
    price: the share of a layer's time that a replica must save to be worth its room. A host that is `is_sick` keeps
    what it has, and gets nothing.
    """

    name: str
    slots: int
    surplus: int = 0
    row_s: float = 1.0
    touch_s: float = 0.0
    link_s: float = 0.0
    node: str = ""
    slot_price: float = 0.0
    draining: bool = False
    is_sick: bool = False

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise InvalidInput("slots", self.slots, f"of host {self.name} must not be negative")
        for name in ("row_s", "touch_s", "link_s", "slot_price"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InvalidInput(name, getattr(self, name), f"of host {self.name} must be a number of at least 0")
        if self.row_s + self.touch_s + self.link_s <= 0.0:
            raise InvalidInput("row_s", self.row_s, f"of host {self.name} must be above 0 when it has no other cost")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All hosts by name, in a fixed order, and the size of one expert. Hosts that are gone are not in it."""

    hosts: Mapping[str, HostSpec]
    expert_bytes: int = 1

    @staticmethod
    def of(hosts: list[HostSpec], expert_bytes: int = 1) -> Fleet:
        return Fleet(hosts=MappingProxyType({host.name: host for host in hosts}), expert_bytes=expert_bytes)

    @property
    def staying(self) -> tuple[str, ...]:
        """Hosts that may keep experts."""
        return tuple(name for name, host in self.hosts.items() if not host.draining)

    @property
    def able(self) -> tuple[str, ...]:
        """Hosts that may be given experts."""
        return tuple(name for name in self.staying if not self.hosts[name].is_sick)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was measured until `at`, over `window_s` seconds.

    `rows` are rows per second of every (layer, expert); `dispatches` how many times per second a layer was dispatched
    to, 0 where nobody counted (each row is then taken to come alone). `busy` is the share of the time that a host
    computed, `queue_s` how long requests waited for a router; both only move the number of hosts.
    """

    at: float
    rows: Mapping[ExpertKey, float]
    window_s: float = 10.0
    dispatches: float = 0.0
    busy: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    queue_s: float | None = None
    steady_s: float = float("inf")
    """How long ago it shifted to what it is; without end where it was the same as long as anybody looked."""
