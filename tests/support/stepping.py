"""Runs a decoder over sequences in pieces of chosen lengths, with block tables handed out by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from experts.checkpoint import Checkpoint
from experts.config import load_config
from experts.weights import ExpertStore
from router.checkpoint import load_trunk
from router.engine.images import PlacedImage
from router.engine.packing import NO_FEATURES, pack
from router.engine.request import Request, SamplingParams
from router.engine.scheduler import Piece
from router.local_experts import LocalExperts
from router.model.decoder import Decoder, PackedBatch, RoutedExperts, StepOutput, run
from router.model.kv_store import KVStore

CPU = torch.device("cpu")


def load_decoder(
    model_dir: Path,
    dtype: torch.dtype = torch.float32,
    experts: RoutedExperts | None = None,
    device: torch.device = CPU,
) -> Decoder:
    """The whole model of a folder in this process."""
    config, checkpoint = load_config(model_dir), Checkpoint(model_dir)
    store = ExpertStore(checkpoint, config, dtype, device)
    routed = experts or LocalExperts({key: store.load(*key) for key in store.all_keys()})
    return Decoder(config, load_trunk(checkpoint, config, dtype, device), routed)


class Stepper:
    """Sequences side by side in one key/value store; every known token's logits are collected.

    `images[row]` are the images placed in that sequence, `features` those of all of them by digest.
    """

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[Sequence[int]],
        block_size: int = 4,
        images: Sequence[tuple[PlacedImage, ...]] | None = None,
        features: Mapping[bytes, torch.Tensor] = NO_FEATURES,
    ) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.features = features
        longest = max(len(ids) for ids in sequences)
        blocks = -(-longest // block_size)
        # Tables are interleaved, so that neighbouring blocks of a sequence are never neighbours in the store.
        self.requests = [
            Request(
                request_id=str(row),
                token_ids=list(ids),
                num_prompt=len(ids),
                sampling=SamplingParams(max_tokens=1),
                deadline=0.0,
                arrival=0.0,
                images=images[row] if images else (),
                global_blocks=[block * len(sequences) + row for block in range(blocks)],
                local_blocks=[block * len(sequences) + row for block in range(blocks)],
            )
            for row, ids in enumerate(sequences)
        ]
        slots = blocks * block_size * len(sequences)
        self.store = KVStore(
            decoder.config,
            num_global_slots=slots,
            num_local_slots=slots,
            dtype=decoder.weights.dtype,
            device=decoder.weights.device,
        )

    def step(self, counts: dict[int, int]) -> StepOutput:
        """One step: `counts[row]` more tokens of each named sequence, computed unless lost."""
        pieces = self.pieces(counts)
        [output] = run(self.decoder.forward(self.pack(counts), self.store))
        for index, piece in enumerate(pieces):
            if index not in output.lost:
                piece.request.num_computed += piece.count
        return output

    def pack(self, counts: dict[int, int]) -> PackedBatch:
        chunk = self.decoder.config.chunk_size
        return pack(
            self.pieces(counts),
            block_size=self.block_size,
            chunk_size=chunk,
            device=self.decoder.weights.device,
            features=self.features,
        )

    def pieces(self, counts: dict[int, int]) -> list[Piece]:
        """At most `counts[row]` tokens of each named sequence, stopping at its chunk's border."""
        pieces = []
        for row, count in counts.items():
            request = self.requests[row]
            chunk = self.decoder.config.chunk_size
            left = request.num_known - request.num_computed
            limit = left if chunk is None else min(left, chunk - request.num_computed % chunk)
            pieces.append(Piece(request=request, start=request.num_computed, count=min(count, limit)))
        return pieces


def all_logits(
    decoder: Decoder,
    ids: Sequence[int],
    counts: Iterable[int],
    block_size: int = 4,
    images: tuple[PlacedImage, ...] = (),
    features: Mapping[bytes, torch.Tensor] = NO_FEATURES,
) -> torch.Tensor:
    """Logits [T, V] of one sequence computed in pieces of `counts` (the last one repeats); rows of positions that
    no piece ended at are NaN."""
    [logits] = packed_logits(Stepper(decoder, [ids], block_size, [images], features), [counts])
    return logits


def packed_logits(stepper: Stepper, counts: Sequence[Iterable[int]]) -> list[torch.Tensor]:
    """The same for all of a stepper's sequences packed together, each in pieces of its own counts."""
    known = [request.token_ids for request in stepper.requests]
    logits = [torch.full((len(ids), stepper.decoder.config.vocab_size), float("nan")) for ids in known]
    sizes = [iter(row_counts) for row_counts in counts]
    size = [next(row_sizes) for row_sizes in sizes]
    while True:
        left = [row for row, request in enumerate(stepper.requests) if request.num_computed < len(known[row])]
        if not left:
            return logits
        for row in left:
            # Later tokens are hidden, so that the piece ends where its logits are sampled.
            stepper.requests[row].token_ids = known[row][: stepper.requests[row].num_computed + size[row]]
        output = stepper.step({row: size[row] for row in left})
        for row_logits, sample in zip(output.logits_SV, output.samples, strict=True):
            logits[left[sample]][stepper.requests[left[sample]].num_computed - 1] = row_logits.float()
        for row in left:
            stepper.requests[row].token_ids = known[row]
            size[row] = next(sizes[row], size[row])
