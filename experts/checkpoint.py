"""Reads single tensors, or slices of them, out of a folder of safetensors files; knows nothing of the model.

Files are memory-mapped: reading one expert of a fused [E, …] tensor touches only that expert's bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from experts.errors import CheckpointError
from experts.findings import Finding, raise_first
from experts.safetensors_table import TensorEntry
from experts.weight_files import scan_weights

WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Numbers that mean what they say; others are codes that need scales, which nothing here reads."""
_SAMPLE_BYTES = 4096


class Checkpoint:
    """The tensors of one model folder, by name. Safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        """Read and check all tables. Raises CheckpointError for the first error in them."""
        self.model_dir = model_dir
        weights = scan_weights(model_dir)
        raise_first(weights.findings)
        self.entries = weights.entries
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

    def dtype(self) -> torch.dtype:
        """The type that most of the weights' bytes are in; float32 for what is wider."""
        num_bytes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.dtype in WEIGHT_DTYPES:
                num_bytes[entry.dtype] += entry.end - entry.begin
        most = max(num_bytes, key=num_bytes.__getitem__, default="F32")
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)

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
        raise_first(misfits(self.entry(name), shape))

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


def misfits(entry: TensorEntry, shape: tuple[int, ...]) -> Iterator[Finding]:
    """What keeps a tensor from being used where one of `shape` is expected."""
    if entry.shape != shape:
        expected, found = f"shape {list(shape)}", f"{list(entry.shape)}"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=found)
    if entry.dtype not in WEIGHT_DTYPES:
        expected = f"a dtype of {', '.join(WEIGHT_DTYPES)}"
        found = f"{entry.dtype} (quantized weights are not supported)"
        yield Finding(file=entry.file, subject=entry.name, expected=expected, found=found)
