"""What a placement needs whatever the load: room kept, no drained host in use, every expert somewhere."""

from __future__ import annotations

from cluster.control.draft import Draft


def repair(draft: Draft) -> tuple[str, ...]:
    """Mend `draft` with as few changes as may be; returns what could not be mended, in words."""
    _make_room(draft)
    problems = []
    staying = set(draft.staying)
    for layer, balance in draft.layers.items():
        for expert in range(len(balance.rows)):
            homes = balance.shares[expert]
            if len(homes) >= draft.min_replicas and staying.issuperset(homes):
                continue
            good = [host for host in homes if host in staying]
            while len(good) < draft.min_replicas:
                host = _heir(draft, layer, good)
                if host is None:
                    break
                good.append(host)
                draft.put(layer, (expert, (*good, *(home for home in balance.homes(expert) if home not in good))))
            if good and len(good) >= draft.min_replicas:
                draft.put(layer, (expert, tuple(good)))
            elif len(balance.homes(expert)) < draft.min_replicas or len(good) < len(balance.homes(expert)):
                where = [draft.hosts[host].name for host in balance.homes(expert)]
                problems.append(f"no room for expert {draft.experts[layer][expert]} of layer {layer}: on {where}")
    return tuple(problems)


def _heir(draft: Draft, layer: int, homes: list[int]) -> int | None:
    """The host to take one more replica of an expert on `homes`: on another node, with little to do in the layer."""
    balance = draft.layers[layer]
    nodes = {draft.hosts[host].node for host in homes}
    able = [host for host in draft.targets if host not in homes]
    free = [host for host in able if draft.free[host] > 0]
    if not free:
        return next((host for host in sorted(able, key=balance.best.__getitem__) if _give_way(draft, host)), None)
    return min(free, key=lambda host: (draft.hosts[host].node in nodes, balance.best[host], -draft.free[host], host))


def _make_room(draft: Draft) -> None:
    """A host may hold more than it has room for since its room has become less."""
    for host, free in enumerate(draft.free):
        for _ in range(-free):
            if not _give_way(draft, host) and not _move_away(draft, host):
                break


def _give_way(draft: Draft, host: int) -> bool:
    """Evict the replica of `host` that is missed least, of those that others have too; what came lately comes last."""
    spare = [
        (
            not draft.may_leave(layer, expert, host),
            balance.seconds(expert, host) / max(balance.mean_s, 1e-300),
            layer,
            expert,
        )
        for layer, balance in draft.layers.items()
        for expert in balance.experts_on[host]
        if len(balance.shares[expert]) > draft.min_replicas
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
