"""A placement in the making: every layer's balance, the room that is left on each host, and what may not be touched.

Hosts and experts are numbers in here; names come in with `Draft.of` and go out with `Draft.replicas`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.control.balance import Change, LayerBalance, Trial
from cluster.control.fleet import Fleet, HostSpec
from cluster.control.replicas import Replicas
from experts.placement import ExpertKey

Replica = tuple[ExpertKey, str]
"""An expert on a host, by name."""


@dataclass
class Draft:
    """`free[host]` is the number of slots left, `targets` are hosts that may be given experts, `staying` those that may
    keep them. `kept` are replicas that have to stay and `shunned` those that may not be made, while they cool down."""

    hosts: list[HostSpec]
    layers: dict[int, LayerBalance]
    experts: dict[int, list[int]]
    """Of each layer, the experts' own numbers, in the order of the layer's `rows`."""
    free: list[int]
    targets: list[int]
    staying: list[int]
    min_replicas: int
    kept: set[tuple[int, int, int]] = field(default_factory=set)
    shunned: set[tuple[int, int, int]] = field(default_factory=set)
    is_touched: bool = False

    @staticmethod
    def of(
        fleet: Fleet,
        replicas: Replicas,
        rows: Mapping[ExpertKey, float],
        dispatches: float,
        min_replicas: int,
    ) -> Draft:
        """`replicas` as they are, less hosts that are not in `fleet`. Experts may end up without any host."""
        hosts = list(fleet.hosts.values())
        number = {host.name: place for place, host in enumerate(hosts)}
        able = frozenset(fleet.able)
        held: Counter[int] = Counter()
        by_layer: dict[int, list[int]] = {}
        for layer, expert in sorted(replicas):
            by_layer.setdefault(layer, []).append(expert)
        layers = {}
        for layer, experts in by_layer.items():
            homes = [
                [number[name] for name in dict.fromkeys(replicas[layer, expert]) if name in number]
                for expert in experts
            ]
            held.update(host for where in homes for host in where)
            layers[layer] = LayerBalance([rows[layer, expert] for expert in experts], homes, hosts, dispatches)
        return Draft(
            hosts=hosts,
            layers=layers,
            experts=by_layer,
            free=[host.slots - host.surplus - held[place] for place, host in enumerate(hosts)],
            targets=[place for place, host in enumerate(hosts) if host.name in able],
            staying=[place for place, host in enumerate(hosts) if not host.draining],
            min_replicas=min(min_replicas, max(1, len(fleet.staying))),
        )

    def cool(self, added: Iterable[Replica], removed: Iterable[Replica]) -> None:
        """Keep what was `added` lately, and do not bring back what was `removed` lately."""
        self.kept |= self._numbered(added)
        self.shunned |= self._numbered(removed)

    def _numbered(self, replicas: Iterable[Replica]) -> set[tuple[int, int, int]]:
        number = {host.name: place for place, host in enumerate(self.hosts)}
        places = {layer: {expert: i for i, expert in enumerate(experts)} for layer, experts in self.experts.items()}
        return {
            (layer, places[layer][expert], number[name])
            for (layer, expert), name in replicas
            if name in number and expert in places.get(layer, ())
        }

    def replicas(self) -> Replicas:
        """The placement, by name. Hosts of an expert keep their order."""
        return MappingProxyType(
            {
                (layer, expert): tuple(self.hosts[host].name for host in self.layers[layer].homes(place))
                for layer, experts in self.experts.items()
                for place, expert in enumerate(experts)
            }
        )

    def may_leave(self, layer: int, expert: int, host: int) -> bool:
        """Whether this replica may be taken away as long as another takes its place."""
        return (layer, expert, host) not in self.kept

    def may_drop(self, layer: int, expert: int, host: int) -> bool:
        """Whether it may be taken away with nothing in its place."""
        return len(self.layers[layer].shares[expert]) > self.min_replicas and self.may_leave(layer, expert, host)

    def may_come(self, layer: int, expert: int, host: int) -> bool:
        """Whether `host` may be given `expert`, were there room."""
        return host not in self.layers[layer].shares[expert] and (layer, expert, host) not in self.shunned

    def crowding(self, homes: Iterable[int]) -> int:
        """Replicas that share a node with another one of the same expert."""
        nodes = [self.hosts[host].node for host in homes]
        return len(nodes) - len(set(nodes))

    def apply(self, layer: int, trial: Trial) -> None:
        """Make a change, and account for the slots."""
        balance = self.layers[layer]
        self.is_touched = True
        for expert, homes in trial.changes:
            self._account(balance.homes(expert), homes)
        balance.apply(trial)

    def put(self, layer: int, change: Change) -> None:
        """Make a change that has to be."""
        self.apply(layer, self.layers[layer].try_((change,)))

    def _account(self, before: Iterable[int], after: Iterable[int]) -> None:
        for host in before:
            self.free[host] += 1
        for host in after:
            self.free[host] -= 1
