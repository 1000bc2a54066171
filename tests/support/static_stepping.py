"""Runs decode steps in fixed shapes beside a stepper's ordinary ones."""

from __future__ import annotations

from pathlib import Path

import torch
from stepping import CPU, Stepper

from experts.checkpoint import Checkpoint
from experts.config import load_config
from experts.host import ExpertHost
from experts.placement import ClusterView, HostInfo, Placement
from experts.transport.local import FaultyLocalTransport
from experts.weights import ExpertStore
from router.dispatch import RemoteExperts
from router.engine.kv_layout import KVLayout
from router.engine.static_steps import Recorder, StaticSteps, unrecorded
from router.model.decoder import Decoder, StepOutput
from router.stacked_experts import StackedExperts


def stacked(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> StackedExperts:
    """All experts of a folder."""
    config = load_config(folder)
    store = ExpertStore(Checkpoint(folder), config, dtype, device)
    return StackedExperts({layer: store.load_layer(layer) for layer in config.moe_layers})


def sequences(vocab_size: int, *lengths: int, seed: int = 1) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def layout_of(stepper: Stepper) -> KVLayout:
    """Of the stepper's store."""
    config = stepper.decoder.config
    blocks = sum(len(request.global_blocks) for request in stepper.requests)
    has_global, has_local = not all(config.chunked_layers), any(config.chunked_layers)
    return KVLayout(
        block_size=stepper.block_size,
        num_global_blocks=blocks if has_global else 0,
        num_local_blocks=blocks if has_local else 0,
        chunk_size=config.chunk_size,
        has_global=has_global,
        has_local=has_local,
    )


class StaticStepper(Stepper):
    """A stepper whose decode steps run in fixed shapes. What nobody wrote is no number, so that reading it shows."""

    def __init__(
        self,
        decoder: Decoder,
        ids: list[list[int]],
        at_hand: StackedExperts | None = None,
        record: Recorder = unrecorded,
    ) -> None:
        super().__init__(decoder, ids)
        for layer, chunked in enumerate(decoder.config.chunked_layers):
            for part in self.store.layer(layer):
                part[: self.store.blank_slot(chunked)] = torch.nan
        self.steps = StaticSteps(decoder, self.store, layout_of(self), at_hand=at_hand, record=record)

    def decode(self) -> StepOutput:
        """One more token of each sequence."""
        pieces = self.pieces(dict.fromkeys(range(len(self.requests)), 1))
        output = self.steps.run(pieces)
        assert output is not None
        for index, piece in enumerate(pieces):
            if index not in output.lost:
                piece.request.num_computed += 1
        return output


def compute_to(stepper: Stepper, positions: list[int]) -> None:
    """The first `positions[row]` tokens of each sequence, as an ordinary prefill."""
    while True:
        left = {row: end - stepper.requests[row].num_computed for row, end in enumerate(positions)}
        left = {row: count for row, count in left.items() if count}
        if not left:
            return
        stepper.step(left)


def show_next(stepper: Stepper, ids: list[list[int]]) -> None:
    """Later tokens are hidden, so that the next one is sampled."""
    for request, known in zip(stepper.requests, ids, strict=True):
        request.token_ids = known[: request.num_computed + 1]


def remote(folder: Path, device: torch.device = CPU) -> tuple[RemoteExperts, FaultyLocalTransport]:
    """Hosts in this process, one for each expert of every layer, that compute on `device`."""
    config = load_config(folder)
    store = ExpertStore(Checkpoint(folder), config, torch.float32, device)
    names = [f"host-{number}" for number in range(config.num_experts)]
    hosts = {name: ExpertHost(name, store) for name in names}
    for key in store.all_keys():
        hosts[names[key[1]]].load(key)
    transport = FaultyLocalTransport(hosts)
    experts = RemoteExperts(transport)
    infos = {name: HostInfo(name=name, incarnation=1, address=name) for name in names}
    replicas = {key: (names[key[1]],) for key in store.all_keys()}
    experts.connect(ClusterView(version=1, placement=Placement(epoch=1, replicas=replicas), hosts=infos))
    return experts, transport
