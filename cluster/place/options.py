"""The options of the commands about placement. Imports nothing, so that help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_move(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("move"))
    parser.add_argument("--layer", metavar="L", type=int, required=True, help="of the expert")
    parser.add_argument("--expert", metavar="E", type=int, required=True, help="its number in the layer")
    parser.add_argument("--to", metavar="HOST", required=True, help="the host to take it, instead of one that has it")
    _add_wait(parser)
    add_where(parser)


def add_drain(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("drain"))
    parser.add_argument("host", metavar="HOST", help="the host to empty and to end")
    _add_wait(parser)
    add_where(parser)


def add_scale(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("scale"))
    parser.add_argument("--hosts", metavar="N", type=int, required=True, help="how many there shall be")
    _add_wait(parser)
    add_where(parser)


def add_apply(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("apply"))
    parser.add_argument("plan", metavar="PLAN.json", help="what herd plan --json printed; its target counts")
    _add_wait(parser)
    add_where(parser)


def add_rollback(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("rollback"))
    parser.add_argument("epoch", metavar="EPOCH", nargs="?", type=int, help="undo what came after it (the last plan)")
    _add_wait(parser)
    add_where(parser)


def add_plan(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.set_defaults(run=_runner("plan"))
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and do nothing")
    parser.add_argument("--json", action="store_true", help="as JSON")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--load", metavar="FILE", help="plan by a load of herd trace record (by what is measured now)")
    source.add_argument("--prometheus", metavar="URL", help="plan by the load that this server has")
    parser.add_argument("--history", action="store_true", help="show the plans that were applied instead")
    add_where(parser)


def add_trace(parser: argparse.ArgumentParser, add_where: Callable[[argparse.ArgumentParser], None]) -> None:
    kinds = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    record = kinds.add_parser("record", help="write rows per interval of every expert, until interrupted")
    record.set_defaults(run=_runner("record"))
    record.add_argument("file", metavar="FILE", help="where to; a line of JSON for each interval")
    record.add_argument("--interval", metavar="S", type=float, default=5.0, help="seconds of each line (5)")
    record.add_argument("--seconds", metavar="S", type=float, default=None, help="how long (until interrupted)")
    add_where(record)


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="return as soon as it has begun")


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from cluster.place import command

        return int(getattr(command, f"run_{name}")(options))

    return run
