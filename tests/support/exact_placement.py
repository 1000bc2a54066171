"""The best there is, found by HiGHS: which experts go where, and how rows are split."""

from __future__ import annotations

from collections.abc import Sequence

import highspy


def best_split(loads: Sequence[float], held: Sequence[set[int]]) -> float:
    """Mean over slowest host when the rows of every expert are split over its hosts in the best way."""
    return _solve(loads, len(held), [len(experts) for experts in held], held)


def best_placement(loads: Sequence[float], slots: Sequence[int]) -> float:
    """The same when experts may be anywhere, each host in `slots[host]` slots."""
    return _solve(loads, len(slots), slots, None)


def _solve(loads: Sequence[float], num_hosts: int, slots: Sequence[int], held: Sequence[set[int]] | None) -> float:
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("threads", 1)
    slowest = solver.addVariable(lb=0.0)
    share = {}
    for host in range(num_hosts):
        for expert, load in enumerate(loads):
            if held is None or expert in held[host]:
                share[expert, host] = solver.addVariable(lb=0.0, ub=load)
    if held is None:
        for host in range(num_hosts):
            here = [solver.addBinary() for _ in loads]
            for expert, load in enumerate(loads):
                solver.addConstr(share[expert, host] <= load * here[expert])
            solver.addConstr(sum(here[1:], here[0]) <= slots[host])
    for expert, load in enumerate(loads):
        parts = [share[expert, host] for host in range(num_hosts) if (expert, host) in share]
        solver.addConstr(sum(parts[1:], 1 * parts[0]) == load)
    for host in range(num_hosts):
        parts = [share[expert, host] for expert in range(len(loads)) if (expert, host) in share]
        if parts:
            solver.addConstr(sum(parts[1:], 1 * parts[0]) <= slowest)
    solver.minimize(1 * slowest)
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return sum(loads) / num_hosts / solver.getInfo().objective_function_value
