"""Shows what was measured: a table on a screen, or JSON with the setup."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from cluster.result_file import STANDARD_OUTPUT, write_result
from cluster.version import herd_version

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def print_results(results: Sequence[DataclassInstance], out: str | None = None) -> None:
    """One row for each result, whose fields are the columns: a table on the screen; `out` also gets JSON with the setup
    ("-": JSON on standard output, and no table)."""
    rows = [asdict(result) for result in results]
    document = json.dumps({"setup": _setup(), "results": rows}, indent=1)
    if out == STANDARD_OUTPUT:
        print(document)
        return
    if out is not None:
        write_result(out, document)
    flat = [_flat(row) for row in rows]
    widths = {name: max(len(name), *(len(str(row[name])) for row in flat)) for name in flat[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in flat:
        print("  ".join(f"{row[name]!s:>{width}}" for name, width in widths.items()))


def _setup() -> dict[str, object]:
    return {
        "herd": herd_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _flat(row: dict[str, object]) -> dict[str, object]:
    """The parts of a split as columns of their own, in milliseconds."""
    split = row.get("split")
    rest = {name: value for name, value in row.items() if name != "split"}
    return rest | {f"{part} ms": value for part, value in split.items()} if isinstance(split, dict) else rest
