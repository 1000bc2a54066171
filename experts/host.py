"""An expert host: holds experts in slots and computes shipments. Knows nothing of networks or placements.

Shape letters: T rows, H hidden size. Only this file knows slots; everyone else names (layer, expert).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

import torch

from experts.arithmetic import Arithmetic, PlainArithmetic
from experts.cost import measure_cost
from experts.errors import HostFailed, NotHosted
from experts.ffn import ExpertWeights
from experts.load import LoadSnapshot, LoadWindow
from experts.placement import ComputeCost, ExpertKey
from experts.slot import Slot
from experts.transport.base import Shipment

log = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Where a host gets experts from; called from several threads at once."""

    def load(self, layer: int, expert: int) -> ExpertWeights: ...


class ExpertHost:
    """Experts in slots, and the one computation on them. Safe to use from several threads.

    Computations run one after another (a process has one set of compute threads); loading and evicting never
    wait for a computation nor hold one up.
    """

    def __init__(self, name: str, source: WeightSource, arithmetic: Arithmetic | None = None) -> None:
        self.name = name
        self._source = source
        self._arithmetic = arithmetic or PlainArithmetic()
        self._slots: dict[ExpertKey, Slot] = {}
        self._slots_lock = threading.Lock()
        self._compute_lock = threading.Lock()
        self._load = LoadWindow()
        self._cost: ComputeCost | None = None
        self._num_damaged = 0

    def load(self, key: ExpertKey) -> None:
        """Read an expert into a slot; nothing happens when it is held. Raises CheckpointError."""
        with self._slots_lock:
            if key in self._slots:
                return
        self.put(key, self._source.load(*key))

    def put(self, key: ExpertKey, weights: ExpertWeights) -> None:
        """Hold `weights` as those of expert `key` from now on."""
        slot = Slot.of(weights)
        with self._slots_lock:
            self._slots[key] = slot

    def evict(self, key: ExpertKey) -> None:
        """Free the slot of an expert, if it has one. A computation that already uses the weights finishes."""
        with self._slots_lock:
            self._slots.pop(key, None)

    def held(self) -> frozenset[ExpertKey]:
        """The experts in slots now."""
        with self._slots_lock:
            return frozenset(self._slots)

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights in slots now."""
        with self._slots_lock:
            return sum(slot.weights.num_bytes for slot in self._slots.values())

    @property
    def num_damaged(self) -> int:
        """Slots that were fenced since the start, because their weights had changed."""
        return self._num_damaged

    def slot(self, key: ExpertKey) -> Slot:
        """What is held of an expert. Raises NotHosted."""
        with self._slots_lock:
            if key not in self._slots:
                raise NotHosted(self.name, {key})
            return self._slots[key]

    def scrub(self, key: ExpertKey) -> int:
        """Look whether an expert's weights are still what was loaded, and fence it if not: it is not held any more.
        Returns how many bytes were read."""
        with self._slots_lock:
            slot = self._slots.get(key)
        if slot is None:
            return 0
        if not slot.is_sound():
            with self._slots_lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
                    self._num_damaged += 1
            log.error("host %s: expert %d of layer %d was damaged in memory, and is fenced", self.name, key[1], key[0])
        return slot.weights.num_bytes

    @property
    def rows_total(self) -> int:
        """Rows computed since the start."""
        return self._load.snapshot().rows_total

    def load_snapshot(self) -> LoadSnapshot:
        """What was computed since the start."""
        return self._load.snapshot()

    @property
    def cost(self) -> ComputeCost | None:
        """As measured; None before `measure`."""
        return self._cost

    def measure(self) -> None:
        """Measure what an expert and a row cost, once there is something to measure with; shipments wait meanwhile."""
        with self._slots_lock:
            held = [slot.weights for slot in self._slots.values()]
        if not held:
            return
        with self._compute_lock:
            try:
                self._cost = measure_cost(self._arithmetic, held)
            except Exception:
                # Routers then assume something, and learn.
                log.exception("what computing costs could not be measured")

    def compute(self, shipment: Shipment) -> torch.Tensor:
        """The experts' outputs for `shipment.rows_TH`, [T, H] in the same order and dtype.

        Raises NotHosted naming every missing expert before anything is computed, and HostFailed when the
        computation itself fails; the reason is then in this process's log and nowhere else.
        """
        weights = self._weights_of(shipment)
        asked = time.perf_counter()
        with self._compute_lock:
            started = time.perf_counter()
            try:
                y_TH = self._apply(shipment, weights)
            except Exception as error:
                log.exception("computing %d rows failed", shipment.rows_TH.shape[0])
                raise HostFailed(self.name, "the computation failed; see the host's log") from error
            self._load.record(shipment.segments, time.perf_counter() - started, started - asked)
        return y_TH

    def _apply(self, shipment: Shipment, weights: list[ExpertWeights]) -> torch.Tensor:
        if not shipment.rows_TH.shape[0]:
            return torch.empty_like(shipment.rows_TH)
        segments = zip(shipment.segments, weights, strict=True)
        touched = [(segment.num_rows, one) for segment, one in segments if segment.num_rows]
        # To where the weights are and back; nothing happens where that is the CPU.
        rows_TH = shipment.rows_TH.to(weights[0].down_HF.device)
        y_TH = self._arithmetic.ffn(rows_TH, [count for count, _ in touched], [one for _, one in touched])
        return y_TH.to(shipment.rows_TH.device)

    def _weights_of(self, shipment: Shipment) -> list[ExpertWeights]:
        with self._slots_lock:
            missing = {segment.key for segment in shipment.segments if segment.key not in self._slots}
            if missing:
                raise NotHosted(self.name, missing)
            return [self._slots[segment.key].weights for segment in shipment.segments]
