"""A plan in words and as JSON values: what it changes, what that costs and brings, and why it does or does not."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.control.draft import Replica
from cluster.control.plan import Plan
from cluster.control.rebalance import LayerNote

MOST_LINES = 20


def as_text(plan: Plan) -> str:
    """A few lines for a screen; long lists are cut, and say so."""
    return "\n".join(_lines(plan))


def as_json(plan: Plan) -> dict[str, object]:
    """All of it."""
    return {
        "change": plan.is_change,
        "why": plan.why,
        "held_by": plan.held_by,
        "loads": [_replica(replica) for replica in plan.loads],
        "evictions": [_replica(replica) for replica in plan.evictions],
        "moved_bytes": plan.moved_bytes,
        "seconds": plan.seconds,
        "layers": [
            {
                "layer": note.layer,
                "imbalance_before": note.before,
                "imbalance_after": note.after,
                "changed": note.is_changed,
                "why": note.why,
            }
            for note in plan.layers
        ],
        "hottest": [{"layer": layer, "expert": expert, "rows_per_s": rows} for (layer, expert), rows in plan.hottest],
        "hosts": {
            "wanted": plan.size.hosts,
            "drain": list(plan.size.drain),
            "release": list(plan.size.release),
            "why": plan.size.why,
        },
        "alarms": list(plan.alarms),
        "target": [
            {"layer": layer, "expert": expert, "hosts": list(names)}
            for (layer, expert), names in sorted(plan.target.items())
        ],
    }


def _replica(replica: Replica) -> dict[str, object]:
    (layer, expert), name = replica
    return {"layer": layer, "expert": expert, "host": name}


def _lines(plan: Plan) -> Iterator[str]:
    if plan.is_change:
        size = f"{plan.moved_bytes / 1e6:.1f} MB, about {plan.seconds:.1f} s"
        yield f"change: {len(plan.loads)} replicas to load ({size}), {len(plan.evictions)} to evict"
    else:
        yield "no change"
    if plan.held_by:
        yield f"held: {plan.held_by}"
    if plan.why:
        yield f"why: {plan.why}"
    yield from _cut([_layer(note) for note in plan.layers])
    moved = [(replica, "+") for replica in plan.loads] + [(replica, "-") for replica in plan.evictions]
    yield from _cut([f"  {sign} layer {key[0]} expert {key[1]} on {name}" for (key, name), sign in sorted(moved)])
    for (layer, expert), rows in plan.hottest:
        yield f"  hot: layer {layer} expert {expert}, {rows:.1f} rows/s"
    yield f"hosts: {plan.size.hosts} wanted; {plan.size.why}"
    for alarm in plan.alarms:
        yield f"alarm: {alarm}"


def _layer(note: LayerNote) -> str:
    before = "nothing" if note.before is None else f"{note.before:.3f}"
    return f"  layer {note.layer}: imbalance {before} → {note.after:.3f}; {note.why}"


def _cut(lines: list[str]) -> Iterator[str]:
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"  … and {len(lines) - MOST_LINES} more"
