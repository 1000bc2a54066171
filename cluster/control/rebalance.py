"""Evens layers out: by small steps from where experts are, or packed anew where that wins more than it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.control.balance import LayerBalance
from cluster.control.draft import Draft
from cluster.control.fleet import Load
from cluster.control.fresh import fresh
from cluster.control.improve import Prices, improve, trim
from cluster.control.repair import repair

FINAL_ROUNDS = 40
IDLE = 0.01
"""A replica with so small a share of a layer's time is idle."""


@dataclass(frozen=True, kw_only=True)
class Futile:
    """Nothing better by `needed` was found for a layer when its imbalance was `imbalance`."""

    imbalance: float
    needed: float
    at: float

    def is_over(self, imbalance: float, needed: float, now: float, retry_s: float) -> bool:
        """Whether it is time to look again: by the clock, or because more is to be won, or less is asked for."""
        return now - self.at >= retry_s or imbalance > 1.1 * self.imbalance or needed < 0.8 * self.needed


@dataclass(frozen=True, kw_only=True)
class LayerNote:
    """What a plan thinks of a layer: imbalance (slowest host over mean) before and after, and why it is changed or not.
    Before anything was placed there is none."""

    layer: int
    before: float | None
    after: float
    is_changed: bool
    why: str


def place_all(draft: Draft, dispatches: float, max_trials: int) -> tuple[str, ...]:
    """Place the experts of a draft that has none on any host; returns problems in words."""
    layers = list(draft.layers)
    room = sum(draft.free[host] for host in draft.targets)
    needed = sum(len(experts) for experts in draft.experts.values()) * draft.min_replicas
    if room < needed:
        return (f"{needed} replicas are needed, and there is room for {room}", *repair(draft))
    packed = fresh(draft, layers, draft.free, dispatches)
    improve(packed, layers, Prices(), max_trials)
    trim(packed, layers)
    _settle(packed, layers)
    draft.layers, draft.free, draft.is_touched = packed.layers, packed.free, True
    return repair(draft)


def uneven_layers(draft: Draft, load: Load, min_gain: float) -> dict[int, float]:
    """Layers whose slowest host could become faster by enough: layer → how much is enough, as a share.

    Few rows are uneven by chance: what chance alone would explain is not acted upon.
    """
    uneven = {}
    for layer, balance in draft.layers.items():
        mean = balance.mean_s
        if mean <= 0.0:
            continue
        counted = sum(balance.rows) * load.window_s / len(balance.best)
        needed = max(min_gain, 2.0 / math.sqrt(max(counted, 1.0)))
        if _is_uneven(balance, needed):
            uneven[layer] = needed
    return uneven


def rebalance(
    draft: Draft, layers: Mapping[int, float], dispatches: float, load_price: float, max_trials: int
) -> tuple[LayerNote, ...]:
    """Change those of `layers` that get faster by what is asked of them, and leave the others as they are."""
    if not layers:
        return ()
    before = {layer: (draft.layers[layer].slowest_s, draft.layers[layer].imbalance) for layer in layers}
    homes = {layer: draft.layers[layer].all_homes for layer in layers}
    prices = Prices(load=load_price)
    idle = _release(draft, len(layers))
    trials = improve(draft, list(layers), prices, max_trials // 2)
    uneven = {layer: needed for layer, needed in layers.items() if _is_uneven(draft.layers[layer], needed)}
    if uneven and _pack_anew(draft, uneven, homes, dispatches, prices):
        improve(draft, list(uneven), prices, max_trials - trials)
    trim(draft, list(layers))
    _take_back(draft, idle)
    _settle(draft, layers)
    return tuple(_judge(draft, layer, layers[layer], homes[layer], *before[layer]) for layer in layers)


def _release(draft: Draft, most: int) -> list[tuple[int, int, int]]:
    """Free up to `most` slots on each host that has none, of (layer, expert, host) that do next to nothing there and
    that others have too: all layers share the slots."""
    idle = []
    for host in draft.targets:
        if draft.free[host] > 0:
            continue
        little = sorted(
            (balance.even_seconds(expert, host) / max(balance.mean_s, 1e-300), layer, expert)
            for layer, balance in draft.layers.items()
            for expert in balance.experts_on[host]
            if balance.even_seconds(expert, host) <= IDLE * balance.mean_s and draft.may_drop(layer, expert, host)
        )
        for _, layer, expert in little[:most]:
            # Another host may have given it up meanwhile.
            if draft.may_drop(layer, expert, host):
                rest = tuple(home for home in draft.layers[layer].homes(expert) if home != host)
                draft.put(layer, (expert, rest))
                idle.append((layer, expert, host))
    return idle


def _take_back(draft: Draft, idle: Iterable[tuple[int, int, int]]) -> None:
    """Leave where it was what was released for nothing."""
    for layer, expert, host in idle:
        homes = draft.layers[layer].homes(expert)
        if draft.free[host] > 0 and host not in homes:
            draft.put(layer, (expert, (*homes, host)))


def _settle(draft: Draft, layers: Iterable[int]) -> None:
    """The search is content with splits that are about right; what is promised should be what routers reach."""
    for layer in layers:
        draft.layers[layer].settle(FINAL_ROUNDS)


def _is_uneven(balance: LayerBalance, needed: float) -> bool:
    return balance.slowest_s * (1.0 - needed) > balance.mean_s


def _judge(
    draft: Draft, layer: int, needed: float, homes: list[tuple[int, ...]], slowest_s: float, imbalance: float
) -> LayerNote:
    """Keep what was done to a layer if it is worth it."""
    balance = draft.layers[layer]
    if not _num_loads(balance.all_homes, homes) and not _num_loads(homes, balance.all_homes):
        why = "nothing better was found for the price of moving"
        return LayerNote(layer=layer, before=imbalance, after=imbalance, is_changed=False, why=why)
    gain = 1.0 - balance.slowest_s / slowest_s
    if gain < needed and _put_back(draft, layer, homes):
        why = f"{gain:.0%} of its slowest host is less than the {needed:.0%} that a change must bring"
        return LayerNote(layer=layer, before=imbalance, after=imbalance, is_changed=False, why=why)
    why = f"its slowest host becomes {gain:.0%} faster"
    if gain < 0.0:
        why = f"it gives way to other layers: its slowest host becomes {-gain:.0%} slower"
    return LayerNote(layer=layer, before=imbalance, after=balance.imbalance, is_changed=True, why=why)


def _pack_anew(
    draft: Draft,
    layers: Mapping[int, float],
    old: Mapping[int, list[tuple[int, ...]]],
    dispatches: float,
    prices: Prices,
) -> bool:
    """Pack `layers` from nothing into the room that they have, if that is better by more than its loads cost."""
    if draft.staying != draft.targets:
        # A sick host keeps what it has.
        return False
    room = list(draft.free)
    for layer in layers:
        for host, experts in enumerate(draft.layers[layer].experts_on):
            room[host] += len(experts)
    if sum(max(0, room[host]) for host in draft.targets) < sum(map(len, old.values())) * draft.min_replicas:
        return False
    packed = fresh(draft, list(layers), [max(0, slots) for slots in room], dispatches)
    # Everything is moved at once: the gain of them all is asked for, beyond the price of the bytes.
    gain = 0.0
    for layer, needed in layers.items():
        now, new = draft.layers[layer], packed.layers[layer]
        more = _num_loads(new.all_homes, old[layer]) - _num_loads(now.all_homes, old[layer])
        gain += (1.0 - needed) * now.slowest_s - new.slowest_s - max(0, more) * prices.load * now.mean_s
    if gain <= 0.0 or not all(_is_allowed(draft, packed, layer) for layer in layers):
        return False
    draft.layers.update(packed.layers)
    draft.free, draft.is_touched = packed.free, True
    return True


def _num_loads(new: Sequence[tuple[int, ...]], old: Sequence[tuple[int, ...]]) -> int:
    return sum(len(set(to) - set(at)) for to, at in zip(new, old, strict=True))


def _is_allowed(draft: Draft, packed: Draft, layer: int) -> bool:
    """Whether `packed` leaves alone what cools down, and no expert has too few replicas."""
    balance = draft.layers[layer]
    for expert, homes in enumerate(packed.layers[layer].all_homes):
        before, after = set(balance.homes(expert)), set(homes)
        if len(after) < draft.min_replicas:
            return False
        if not all(draft.may_leave(layer, expert, host) for host in before - after):
            return False
        if not all(draft.may_come(layer, expert, host) for host in after - before):
            return False
    return True


def _put_back(draft: Draft, layer: int, homes: list[tuple[int, ...]]) -> bool:
    """Undo all changes of a layer, unless others have taken the room since."""
    balance = draft.layers[layer]
    room = [free + len(balance.experts_on[host]) for host, free in enumerate(draft.free)]
    for where in homes:
        for host in where:
            room[host] -= 1
    if min(room) < 0:
        return False
    for expert, where in enumerate(homes):
        if balance.homes(expert) != where:
            draft.put(layer, (expert, where))
    return True
