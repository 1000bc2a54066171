"""Reads single tensors, or slices of them, out of a folder of safetensors files; knows nothing of the model.

Files are memory-mapped: reading one expert of a fused [E, …] tensor touches only that expert's bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from experts.config import read_json
from experts.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Numbers that mean what they say; others are codes that need scales, which nothing here reads."""
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype as safetensors spells it, shape, and byte range in that file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """The tensors of one model folder, by name. Safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.entries: dict[str, TensorEntry] = {}
        for file in _weight_files(model_dir):
            for entry in _read_header(model_dir / file):
                if entry.name in self.entries:
                    raise CheckpointError(file, f"tensor {entry.name} also stands in {self.entries[entry.name].file}")
                self.entries[entry.name] = entry
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry. Raises CheckpointError when the folder has no such tensor."""
        if name not in self.entries:
            raise CheckpointError(name, "the tensor is missing from the checkpoint")
        return self.entries[name]

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor, in the file's dtype; `shape` is what the config makes us expect."""
        self._expect(name, shape)
        return self._read(name, None)

    def row(self, name: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        """`tensor[index]` along the first dimension, without reading the others; `shape` is the whole's."""
        self._expect(name, shape)
        return self._read(name, index)

    def digest(self) -> str:
        """Names this checkpoint: equal for equal folders wherever they lie, different for different weights.

        Hashes every tensor's name, dtype and shape and the first and last 4 KiB of its data, so it costs
        kilobytes of reading per tensor whatever the size of the model.
        """
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with open(self.model_dir / entry.file, "rb") as file:
                file.seek(entry.begin)
                digest.update(file.read(min(_SAMPLE_BYTES, entry.end - entry.begin)))
                file.seek(max(entry.begin, entry.end - _SAMPLE_BYTES))
                digest.update(file.read(min(_SAMPLE_BYTES, entry.end - entry.begin)))
        return digest.hexdigest()

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.entry(name)
        if entry.shape != shape:
            raise CheckpointError(f"{entry.file}: {name}", f"shape must be {list(shape)}, found {list(entry.shape)}")
        if entry.dtype not in WEIGHT_DTYPES:
            allowed = ", ".join(WEIGHT_DTYPES)
            rule = f"dtype must be one of {allowed}, found {entry.dtype} (quantized weights are not supported)"
            raise CheckpointError(f"{entry.file}: {name}", rule)

    def _read(self, name: str, index: int | None) -> torch.Tensor:
        entry = self.entry(name)
        try:
            handle = self._handle(entry.file)
            tensor: torch.Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
        except SafetensorError as error:
            raise CheckpointError(f"{entry.file}: {name}", str(error)) from None
        return tensor

    def _handle(self, file: str) -> Any:
        with self._lock:
            if file not in self._open:
                self._open[file] = safe_open(self.model_dir / file, framework="pt")
            return self._open[file]


def _weight_files(model_dir: Path) -> list[str]:
    if (model_dir / INDEX_FILE).exists():
        weight_map = read_json(model_dir / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(INDEX_FILE, "weight_map must be a non-empty object")
        files = sorted({str(file) for file in weight_map.values()})
    elif (model_dir / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        raise CheckpointError(str(model_dir.name), f"has neither {INDEX_FILE} nor {SINGLE_FILE}")
    for file in files:
        if Path(file).name != file or not (model_dir / file).is_file():
            raise CheckpointError(INDEX_FILE, f"names {file}, which is not a file of this folder")
    return files


def _read_header(path: Path) -> list[TensorEntry]:
    """The table at the head of a safetensors file, checked against the file's length."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(path.name, "is truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            return [
                _entry(path.name, name, value, 8 + length, size)
                for name, value in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(path.name, "has a broken safetensors header") from None


def _entry(file: str, name: str, value: dict[str, Any], data_start: int, size: int) -> TensorEntry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    if not 0 <= begin <= end <= size - data_start:
        raise CheckpointError(f"{file}: {name}", "lies outside of its file (is the file truncated?)")
    return TensorEntry(
        name=name,
        file=file,
        dtype=str(value["dtype"]),
        shape=tuple(int(size) for size in value["shape"]),
        begin=data_start + begin,
        end=data_start + end,
    )
