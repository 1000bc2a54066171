"""Which files of a model folder hold weights, by the index if there is one, and what each of them holds.

Collects everything that is wrong with them; knows nothing of models. Reads headers, never weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.findings import Finding, Severity, shown
from experts.model_files import MAX_JSON_BYTES, read_file, why
from experts.safetensors_table import TensorEntry, read_table
from experts.strict_json import parse_strictly

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_FILES = 10_000
MAX_TENSORS = 500_000


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """All tensors of a folder by name. `promised` maps names to files as the index does; empty without an index.

    `unread` are files that are missing or whose tables could not be made out.
    """

    entries: Mapping[str, TensorEntry]
    promised: Mapping[str, str]
    unread: frozenset[str]
    findings: tuple[Finding, ...]

    def may_hold(self, name: str) -> bool:
        """Whether a tensor that is not in `entries` may stand in a file that was not read."""
        return self.promised.get(name) in self.unread if self.promised else bool(self.unread)


@dataclass(frozen=True, kw_only=True)
class _Index:
    """`files` are to be read, `missing` cannot be."""

    files: tuple[str, ...] = ()
    missing: frozenset[str] = frozenset()
    promised: Mapping[str, str]
    total_size: float | None = None
    findings: tuple[Finding, ...] = ()


def scan_weights(model_dir: Path) -> WeightFiles:
    """Read the index and every table. As in transformers, model.safetensors wins over an index beside it."""
    if (model_dir / SINGLE_FILE).exists():
        index = _Index(files=(SINGLE_FILE,), promised={})
    elif (model_dir / INDEX_FILE).exists():
        index = _read_index(model_dir)
    else:
        index = _broken_index(f"this file or {SINGLE_FILE}", "neither")
    entries, unread, findings = _read_tables(model_dir, index.files)
    unread |= index.missing
    return WeightFiles(
        entries=entries,
        promised=index.promised,
        unread=unread,
        findings=(
            *index.findings,
            *findings,
            *_broken_promises(index, entries, unread),
            *(() if unread else _size_findings(entries, index.total_size)),
            *_strays(model_dir, index.files),
        ),
    )


def _read_tables(
    model_dir: Path, files: tuple[str, ...]
) -> tuple[dict[str, TensorEntry], frozenset[str], list[Finding]]:
    """Tensors, files without a table, and findings."""
    entries: dict[str, TensorEntry] = {}
    unread: set[str] = set()
    findings: list[Finding] = []
    for file in files:
        if len(entries) > MAX_TENSORS:
            expected = f"at most {MAX_TENSORS} tensors before this file"
            findings.append(Finding(file=file, expected=expected, found=f"{len(entries)}"))
            unread.add(file)
            continue
        table = read_table(model_dir / file)
        findings += table.findings
        unread |= set() if table.is_read else {file}
        for entry in table.entries:
            first = entries.setdefault(entry.name, entry)
            if first is not entry:
                found = f"it also in {first.file}"
                findings.append(Finding(file=file, subject=entry.name, expected="each tensor once", found=found))
    return entries, frozenset(unread), findings


def _read_index(model_dir: Path) -> _Index:
    try:
        content = parse_strictly(read_file(model_dir / INDEX_FILE, MAX_JSON_BYTES))
    except OSError as error:
        return _broken_index("a file that can be read", why(error))
    findings = [Finding(file=INDEX_FILE, expected=expected, found=found) for expected, found in content.faults]
    total_size, odd = _total_size(content.members.get("metadata", {}))
    weight_map = content.members.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        lacking = _in_index("weight_map", "names of tensors and their files", shown(weight_map))
        return _Index(promised={}, missing=frozenset((INDEX_FILE,)), findings=(*(findings or [lacking]), *odd))
    promised = {name: file if isinstance(file, str) else shown(file) for name, file in weight_map.items()}
    problems = _file_problems(model_dir, sorted(set(promised.values())))
    return _Index(
        files=tuple(file for file, problem in problems.items() if not problem),
        missing=frozenset(file for file, problem in problems.items() if problem),
        promised=promised,
        total_size=total_size,
        findings=(
            *findings,
            *odd,
            *(
                _in_index("weight_map", "files of this folder", f"{file}, {problem}")
                for file, problem in problems.items()
                if problem
            ),
        ),
    )


def _broken_index(expected: str, found: str) -> _Index:
    findings = (Finding(file=INDEX_FILE, expected=expected, found=found),)
    return _Index(promised={}, missing=frozenset((INDEX_FILE,)), findings=findings)


def _total_size(metadata: object) -> tuple[float | None, list[Finding]]:
    """Some writers put a float there, some nothing."""
    if not isinstance(metadata, dict):
        return None, [_in_index("metadata", "an object", shown(metadata))]
    if "total_size" not in metadata:
        return None, []
    size = metadata["total_size"]
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < math.inf:
        return None, [_in_index("metadata.total_size", "a number of bytes", shown(size))]
    return size, []


def _file_problems(model_dir: Path, files: Sequence[str]) -> dict[str, str]:
    return {file: _file_problem(model_dir, file) if at < MAX_FILES else "too many" for at, file in enumerate(files)}


def _file_problem(model_dir: Path, file: str) -> str:
    """Empty where there is none."""
    # A link may lead out of the folder, as those of Hugging Face's cache do; a name may not.
    if file in ("", ".", "..") or any(char in file for char in "/\\\0"):
        return "not a plain file name"
    try:
        return "" if (model_dir / file).is_file() else "which is missing"
    except OSError:
        return "which cannot be looked at"


def _broken_promises(index: _Index, entries: Mapping[str, TensorEntry], unread: frozenset[str]) -> Iterator[Finding]:
    for name, file in index.promised.items():
        entry = entries.get(name)
        if entry is not None and entry.file != file:
            yield _in_index(name, f"{entry.file}, which holds it", file)
        elif entry is None and file not in unread:
            yield _in_index(name, f"a tensor of {file}", "no such tensor there")
    if index.promised:
        for entry in entries.values():
            if entry.name not in index.promised:
                yield _in_index(entry.name, f"it listed as in {entry.file}", "nothing", Severity.NOTE)


def _size_findings(entries: Mapping[str, TensorEntry], total_size: float | None) -> Iterator[Finding]:
    num_bytes = sum(entry.end - entry.begin for entry in entries.values())
    if total_size is not None and num_bytes != total_size:
        yield _in_index("metadata.total_size", f"{num_bytes} bytes", shown(total_size), Severity.NOTE)


def _strays(model_dir: Path, files: tuple[str, ...]) -> Iterator[Finding]:
    for path in sorted(model_dir.glob("*.safetensors")):
        if path.name not in files:
            expected = "no weights beside those in use"
            yield Finding(file=path.name, expected=expected, found="a file that is not read", severity=Severity.NOTE)


def _in_index(subject: str, expected: str, found: str, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(file=INDEX_FILE, subject=subject, expected=expected, found=found, severity=severity)
