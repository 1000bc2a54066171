"""What a placement needs whatever the load: room kept, no drained host in use, every expert somewhere."""

from __future__ import annotations

from cluster.control.draft import Draft


def repair(draft: Draft) -> tuple[str, ...]:
    """Mend `draft` with as few changes as may be; returns what could not be mended, in words."""
    _make_room(draft)
    experts = [(layer, expert) for layer, balance in draft.layers.items() for expert in range(len(balance.rows))]
    # No expert gets its second replica before every other has its first: room may be short.
    for num_replicas in range(1, draft.min_replicas + 1):
        for layer, expert in experts:
            _place(draft, layer, expert, num_replicas)
    return tuple(problem for layer, expert in experts if (problem := _leave(draft, layer, expert)))


def _place(draft: Draft, layer: int, expert: int, num_replicas: int) -> None:
    """Give an expert so many replicas on hosts that stay, as far as there is room."""
    balance = draft.layers[layer]
    good = _good_homes(draft, layer, expert)
    while len(good) < num_replicas and (host := _heir(draft, layer, good, num_replicas)) is not None:
        good.append(host)
        draft.put(layer, (expert, (*good, *(home for home in balance.homes(expert) if home not in good))))


def _leave(draft: Draft, layer: int, expert: int) -> str:
    """Take an expert from hosts that leave, once it has enough others; returns why it cannot be, in words."""
    good, homes = _good_homes(draft, layer, expert), draft.layers[layer].homes(expert)
    if len(good) < draft.min_replicas:
        names = [draft.hosts[host].name for host in homes]
        return f"no room for expert {draft.experts[layer][expert]} of layer {layer}: on {names}"
    if len(good) < len(homes):
        draft.put(layer, (expert, tuple(good)))
    return ""


def _good_homes(draft: Draft, layer: int, expert: int) -> list[int]:
    return [host for host in draft.layers[layer].homes(expert) if not draft.hosts[host].draining]


def _heir(draft: Draft, layer: int, homes: list[int], num_replicas: int) -> int | None:
    """The host to take one more replica of an expert on `homes`: on another node, with little to do in the layer."""
    balance = draft.layers[layer]
    nodes = {draft.hosts[host].node for host in homes}
    able = [host for host in draft.targets if host not in homes]
    free = [host for host in able if draft.free[host] > 0]
    if not free:
        able.sort(key=balance.best.__getitem__)
        return next((host for host in able if _give_way(draft, host, num_replicas)), None)
    return min(free, key=lambda host: (draft.hosts[host].node in nodes, balance.best[host], -draft.free[host], host))


def _make_room(draft: Draft) -> None:
    """A host may hold more than it has room for since its room has become less."""
    for host, free in enumerate(draft.free):
        for _ in range(-free):
            if not _give_way(draft, host, draft.min_replicas) and not _move_away(draft, host):
                break


def _give_way(draft: Draft, host: int, num_replicas: int) -> bool:
    """Evict the replica of `host` that is missed least, of those that `num_replicas` others have that stay; what came
    lately comes last."""
    spare = [
        (
            not draft.may_leave(layer, expert, host),
            balance.seconds(expert, host) / max(balance.mean_s, 1e-300),
            layer,
            expert,
        )
        for layer, balance in draft.layers.items()
        for expert in balance.experts_on[host]
        if sum(home != host for home in _good_homes(draft, layer, expert)) >= num_replicas
    ]
    if not spare:
        return False
    *_, layer, expert = min(spare)
    rest = tuple(home for home in draft.layers[layer].homes(expert) if home != host)
    draft.put(layer, (expert, rest))
    return True


def _move_away(draft: Draft, host: int) -> bool:
    for layer, balance in draft.layers.items():
        for expert in sorted(balance.experts_on[host]):
            homes = balance.homes(expert)
            able = [to for to in draft.targets if draft.free[to] > 0 and to not in homes]
            if able:
                to = min(able, key=balance.best.__getitem__)
                draft.put(layer, (expert, tuple(to if home == host else home for home in homes)))
                return True
    return False
