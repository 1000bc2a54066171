"""The controller's journal on disk: one JSON file, replaced as a whole and synced; knows nothing of its use.

A write that is cut short leaves the file of before. A file that cannot be understood is set aside, not trusted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cluster.control.move_journal import decode_history, decode_moves, encode_history, encode_moves
from cluster.control.replicas import decode_replicas, encode_replicas
from cluster.control.state import Journal

FORMAT = 3


class JournalFile:
    """Reads and replaces the journal at `path`. Only one process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Journal | None:
        """The last journal written; None when there is none or none that can be understood."""
        if not self.path.exists():
            return None
        try:
            return decode(json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            os.replace(self.path, self.path.with_name(self.path.name + ".broken"))
            return None

    def write(self, journal: Journal) -> None:
        """Make `journal` durable: when this returns, a crash of the machine keeps it. Raises OSError."""
        fresh = self.path.with_name(self.path.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(encode(journal), file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)
        _sync_folder(self.path.parent)

    def remove(self) -> None:
        """Forget everything; the cluster is over."""
        for suffix in ("", ".new", ".broken"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


def encode(journal: Journal) -> dict[str, Any]:
    """The journal as JSON values."""
    return {
        "format": FORMAT,
        "digest": journal.digest,
        "term": journal.term,
        "epoch": journal.epoch,
        "port": journal.port,
        "away": sorted(journal.away),
        "draining": sorted(journal.draining),
        "added": list(journal.added),
        "next_host": journal.next_host,
        "sized_until": journal.sized_until,
        "kept_until": journal.kept_until,
        "moves": None if journal.moves is None else encode_moves(journal.moves),
        "history": encode_history(journal.history),
        "target": encode_replicas(journal.target),
        "replicas": encode_replicas(journal.replicas),
    }


def decode(raw: Any) -> Journal:
    """The inverse of `encode`. Raises ValueError, KeyError, TypeError, AttributeError or IndexError."""
    if raw["format"] != FORMAT:
        raise ValueError(f"journal format {raw['format']} is not known")
    term, epoch, port = (int(raw[name]) for name in ("term", "epoch", "port"))
    if term < 0 or epoch < 0 or not 0 <= port < 65536:
        raise ValueError("the journal's numbers are out of range")
    return Journal(
        digest=str(raw["digest"]),
        term=term,
        epoch=epoch,
        port=port,
        away=frozenset(str(name) for name in raw["away"]),
        draining=frozenset(str(name) for name in raw["draining"]),
        added=tuple(str(name) for name in raw["added"]),
        next_host=int(raw["next_host"]),
        sized_until=float(raw["sized_until"]),
        kept_until=float(raw["kept_until"]),
        moves=None if raw["moves"] is None else decode_moves(raw["moves"]),
        history=decode_history(raw["history"]),
        target=decode_replicas(raw["target"]),
        replicas=decode_replicas(raw["replicas"]),
    )


def _sync_folder(folder: Path) -> None:
    """Without this the new name itself may be lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
