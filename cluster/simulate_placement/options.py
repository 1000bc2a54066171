"""The options of `herd simulate placement`. Imports nothing, so that help is instant."""

from __future__ import annotations

import argparse


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on `parser`."""
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("--trace", metavar="LOAD", default="zipf:1.0", help="zipf:EXPONENT, or a file of recorded loads (zipf:1.0)")
    add("--hosts", metavar="N", type=int, default=4, help="hosts (4)")
    add("--nodes", metavar="N", type=int, default=1, help="nodes that the hosts are spread over (1)")
    add("--replicas", metavar="R", type=float, default=1.25, help="room, in replicas of every expert (1.25)")
    add("--layers", metavar="L", type=int, default=4, help="layers of a zipf load (4)")
    add("--experts", metavar="E", type=int, default=16, help="experts per layer of a zipf load (16)")
    add("--rows", metavar="R", type=float, default=10_000.0, help="rows/s of every layer of a zipf load (10000)")
    add(
        "--drift",
        metavar="X",
        type=float,
        default=0.0,
        help="by how much shares change within a minute, such as 0.1 (0)",
    )
    add("--shift", metavar="S", type=float, default=0.0, help="seconds between sudden changes of all shares (none)")
    add("--seconds", metavar="S", type=float, default=None, help="how long (3600, or the whole trace)")
    add("--every", metavar="S", type=float, default=300.0, help="seconds that each line of the table covers (300)")
    add("--expert-bytes", metavar="B", type=int, default=100_000_000, help="size of an expert (100000000)")
    add("--bytes-per-s", metavar="B", type=float, default=1e9, help="at which replicas are loaded (1e9)")
    add("--seed", metavar="S", type=int, default=0, help="of load and noise (0)")
    add("--explain", action="store_true", help="show every plan that changes something")
    add("--json", metavar="FILE", help="write the table there as JSON, too; -: only that, to standard output")


def _run(options: argparse.Namespace) -> int:
    from cluster.simulate_placement.command import run_placement

    return run_placement(options)
