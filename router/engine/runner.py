"""Carries out a step: packs it, runs the decoder over it, samples. Owns the key/value tensors; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from experts.config import ModelConfig
from experts.placement import ExpertKey
from router.engine.draw import Draw
from router.engine.image_features import ImageFeatures
from router.engine.kv_cache import KVLayout
from router.engine.logprobs import logprobs
from router.engine.packing import NO_FEATURES, images_of, pack
from router.engine.request import Request, TokenLogprobs
from router.engine.sampler import sample
from router.engine.scheduler import Piece, Step
from router.engine.static_steps import StaticSteps
from router.model.decoder import Decoder, PackedBatch, StepOutput, run
from router.model.kv_store import KVStore


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """`sampled`: request id → next token. `lost`: request id → the experts that were away; nothing of that piece
    was computed. `failed`: requests whose logits allow no token at all (they overflowed, say). `logprobs`: those of
    sampled tokens whose requests asked for them."""

    sampled: Mapping[str, int]
    lost: Mapping[str, frozenset[ExpertKey]]
    failed: frozenset[str] = frozenset()
    logprobs: Mapping[str, TokenLogprobs] = field(default_factory=dict)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one global and of one local block: keys and values of `block_size` tokens of every layer of a kind."""
    per_layer = 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize
    num_local = sum(config.chunked_layers)
    return (config.num_layers - num_local) * per_layer, num_local * per_layer


class ModelRunner:
    """Runs steps on one decoder. `micro_batches` > 1 splits a step's requests into that many interleaved forwards,
    each computing while another's rows travel. Steps with images need `images`. `static` makes what runs the steps that
    fit a fixed shape; all others run as they come."""

    def __init__(
        self,
        decoder: Decoder,
        layout: KVLayout,
        *,
        eos_ids: Sequence[int],
        micro_batches: int = 1,
        images: ImageFeatures | None = None,
        static: Callable[[KVStore], StaticSteps] | None = None,
    ) -> None:
        self._decoder = decoder
        self._layout = layout
        self._eos_ids = tuple(eos_ids)
        self._micro_batches = micro_batches
        self._images = images
        self._device = decoder.weights.device
        self.store = KVStore(
            decoder.config,
            num_global_slots=layout.num_global_blocks * layout.block_size,
            num_local_slots=layout.num_local_blocks * layout.block_size,
            dtype=decoder.weights.dtype,
            device=self._device,
        )
        self._static = static(self.store) if static else None

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutcome:
        """Compute every piece of `step` and sample where a piece ends at its request's last known token."""
        shares, outputs = self._compute(step)
        sampled: dict[str, int | None] = {}
        reported: dict[str, TokenLogprobs] = {}
        lost: dict[str, frozenset[ExpertKey]] = {}
        for share, output in zip(shares, outputs, strict=True):
            requests = [share[index].request for index in output.samples]
            with self._decoder.meter.time("sampling"):
                tokens = self._sample(requests, output)
                sampled |= tokens
                reported |= _logprobs(requests, output, tokens)
            lost |= {share[index].request.request_id: missing for index, missing in output.lost.items()}
        return StepOutcome(
            sampled={name: token for name, token in sampled.items() if token is not None},
            lost=lost,
            failed=frozenset(name for name, token in sampled.items() if token is None),
            logprobs=reported,
        )

    def _compute(self, step: Step) -> tuple[list[list[Piece]], list[StepOutput]]:
        """The pieces in shares, and what came of each share."""
        whole = self._static.run(step.pieces) if self._static else None
        if whole is not None:
            return [list(step.pieces)], [whole]
        shares = [list(step.pieces[start :: self._micro_batches]) for start in range(self._micro_batches)]
        shares = [share for share in shares if share]
        features = self._features(step)
        return shares, run(*(self._decoder.forward(self._pack(share, features), self.store) for share in shares))

    def _features(self, step: Step) -> Mapping[bytes, torch.Tensor]:
        images = images_of(step.pieces)
        if not images:
            return NO_FEATURES
        assert self._images is not None, "requests with images are refused where nothing encodes them"
        return self._images.of(images)

    def _pack(self, pieces: Sequence[Piece], features: Mapping[bytes, torch.Tensor]) -> PackedBatch:
        return pack(
            pieces,
            block_size=self._layout.block_size,
            chunk_size=self._layout.border,
            device=self._device,
            features=features,
        )

    def _sample(self, requests: Sequence[Request], output: StepOutput) -> dict[str, int | None]:
        if not requests:
            return {}
        tokens = sample(output.logits_SV, [self._draw(request) for request in requests])
        return {request.request_id: token for request, token in zip(requests, tokens, strict=True)}

    def _draw(self, request: Request) -> Draw:
        sampling = request.sampling
        banned: tuple[int, ...] = ()
        if request.num_output < sampling.min_tokens:
            banned = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_ids))
        known = request.token_ids if sampling.penalises else ()
        return Draw(
            sampling=sampling, position=request.num_known, banned=banned, known=known, num_prompt=request.num_prompt
        )


def _logprobs(
    requests: Sequence[Request], output: StepOutput, tokens: Mapping[str, int | None]
) -> dict[str, TokenLogprobs]:
    """By request id, for the requests that ask."""
    params = [request.sampling for request in requests]
    found = logprobs(output.logits_SV, params, [tokens[request.request_id] for request in requests])
    return {request.request_id: one for request, one in zip(requests, found, strict=True) if one is not None}
