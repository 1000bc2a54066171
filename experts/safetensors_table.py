"""The table at the head of a safetensors file, checked whole against the file's length. Reads no weights.

The format: 8 bytes of length, that many bytes of JSON (name → dtype, shape, data_offsets), then the tensors' bytes
without a gap between them.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from experts.fields import is_int
from experts.findings import Finding, shown
from experts.strict_json import parse_strictly

MAX_HEADER_BYTES = 25_000_000
"""Many times what any model of this family needs; the format itself ends at 100,000,000."""
MAX_DIMS = 8
MAX_SIZE = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Everything that the format can hold, with the width of one number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype as safetensors spells it, shape, and byte range in that file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class TensorTable:
    """What a file's head says. `is_read` is False where it could not be made out at all."""

    entries: tuple[TensorEntry, ...] = ()
    findings: tuple[Finding, ...] = ()
    is_read: bool = True


def read_table(path: Path) -> TensorTable:
    """Read and check the head of the file at `path`. Never raises for what the file holds."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return _unread(path.name, "a file", "something else")
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, about.st_size - 8):
                return _bad_length(path.name, length, about.st_size)
            header = parse_strictly(file.read(length))
    except OSError as error:
        return _unread(path.name, "a file that can be read", error.strerror or type(error).__name__)
    faults = [
        Finding(file=path.name, subject="header", expected=expected, found=found) for expected, found in header.faults
    ]
    if not header.members and faults:
        return TensorTable(findings=tuple(faults), is_read=False)
    return _table(path.name, header.members, faults, start=8 + length, size=about.st_size)


def _table(file: str, header: Any, findings: list[Finding], *, start: int, size: int) -> TensorTable:
    findings += _metadata_findings(file, header.get("__metadata__", {}))
    entries: list[TensorEntry] = []
    wrong: list[Finding] = []
    for name, value in header.items():
        if name != "__metadata__":
            entry = _entry(file, name, value, start)
            if isinstance(entry, Finding):
                wrong.append(entry)
            else:
                wrong += _entry_findings(entry, size)
                entries.append(entry)
    findings += wrong or _layout_findings(file, entries, start, size)
    return TensorTable(entries=tuple(entries), findings=tuple(findings))


def _unread(file: str, expected: str, found: str) -> TensorTable:
    return TensorTable(findings=(Finding(file=file, expected=expected, found=found),), is_read=False)


def _bad_length(file: str, length: int, size: int) -> TensorTable:
    if size < 10:
        return _unread(file, "a safetensors file", f"{size} bytes (truncated?)")
    if length > MAX_HEADER_BYTES:
        return _unread(file, f"a header of at most {MAX_HEADER_BYTES} bytes", f"one of {length} bytes")
    return _unread(file, f"a header of {length} bytes", f"{size - 8} bytes (truncated?)")


def _metadata_findings(file: str, metadata: object) -> Iterator[Finding]:
    if not isinstance(metadata, dict):
        yield Finding(file=file, subject="__metadata__", expected="an object of texts", found=shown(metadata))
        return
    for name, value in metadata.items():
        if not isinstance(value, str):
            yield Finding(file=file, subject=f"__metadata__.{name}", expected="a text", found=shown(value))


def _entry(file: str, name: str, value: Any, start: int) -> TensorEntry | Finding:
    if not isinstance(value, dict):
        return Finding(file=file, subject=name, expected="dtype, shape and data_offsets", found=shown(value))
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return Finding(file=file, subject=name, expected="a dtype of safetensors", found=shown(dtype))
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        expected = f"a shape of at most {MAX_DIMS} integers ≥ 0"
        return Finding(file=file, subject=name, expected=expected, found=shown(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "data_offsets of two integers, 0 ≤ begin ≤ end"
        return Finding(file=file, subject=name, expected=expected, found=shown(offsets))
    begin, end = offsets
    return TensorEntry(name=name, file=file, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(is_int(size) and 0 <= size <= MAX_SIZE for size in value)


def _entry_findings(entry: TensorEntry, size: int) -> Iterator[Finding]:
    # Other readers multiply in integers of fixed width, and a zero comes too late for them.
    if math.prod(size for size in entry.shape if size) * DTYPE_BITS[entry.dtype] > MAX_SIZE:
        expected = f"a shape that counts at most {MAX_SIZE} bits"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=shown(list(entry.shape)))
        return
    num_bytes, odd_bits = divmod(math.prod(entry.shape) * DTYPE_BITS[entry.dtype], 8)
    if odd_bits:
        expected, found = "whole bytes", f"{entry.dtype} {list(entry.shape)}, which ends inside of one"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=found)
    elif entry.end - entry.begin != num_bytes:
        expected = f"{num_bytes} bytes for {entry.dtype} {list(entry.shape)}"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=f"{entry.end - entry.begin} bytes")
    if entry.end > size:
        expected = f"a file of at least {entry.end} bytes"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=f"{size} bytes (truncated?)")


def _layout_findings(file: str, entries: Sequence[TensorEntry], start: int, size: int) -> Iterator[Finding]:
    """Tensors must cover the bytes after the header once each."""
    at, before = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            kind = "overlaps" if entry.begin < at else "leaves a gap after"
            expected = f"data that begins at byte {at}, where {before} ends"
            found = f"byte {entry.begin}, which {kind} it"
            yield Finding(file=file, subject=entry.name, expected=expected, found=found)
        if entry.end > at:
            at, before = entry.end, entry.name
    if at < size:
        yield Finding(file=file, expected=f"{at} bytes, the end of {before}", found=f"{size} bytes")
