"""A model folder opened, and an engine built around it: what routers, hosts and benches of one process share.

Knows nothing of Ray, of the controller or of how rows travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config import ServeSettings
from cluster.image_rules import image_rules
from experts.arithmetic import Arithmetic
from experts.checkpoint import Checkpoint
from experts.config import ModelConfig, load_config
from experts.errors import InvalidInput
from experts.kernels.helpers import release_helpers
from experts.kernels.native import choose_arithmetic
from experts.link_terms import LinkTerms
from experts.placement import ExpertKey
from experts.weights import ExpertStore
from router.checkpoint import load_trunk, load_vision
from router.engine.cuda_graphs import GraphRecorder
from router.engine.engine import Engine, Runner
from router.engine.image_features import MAX_TILES_AT_ONCE, ImageFeatures
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import KVLayout, plan_layout
from router.engine.runner import ModelRunner, bytes_per_block
from router.engine.scheduler import Scheduler, SchedulerConfig
from router.engine.static_steps import StaticSteps
from router.kernels.native import choose_attend
from router.kernels.sublayer import choose_attention
from router.local_experts import LocalExperts
from router.model.decoder import Decoder, Meter, RoutedExperts
from router.model.kv_store import KVStore
from router.model.static_decode import ExpertsAtHand
from router.prompt.stop_ids import default_stop_ids
from router.stacked_experts import StackedExperts

BLOCK_SIZE = 64
SMALL_BLOCK_SIZES = range(BLOCK_SIZE, 7, -1)
WAITING_TOKENS_PER_REQUEST = 4096
"""The waiting queue is full of long prompts before it is full of requests when they are longer than this on average."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened checkpoint and the type that it is computed in."""

    config: ModelConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    eos_ids: frozenset[int]

    def terms(self) -> LinkTerms:
        """What both ends of a link must agree on."""
        return LinkTerms(
            checkpoint_digest=self.checkpoint.digest(), dtype=self.dtype, hidden_size=self.config.hidden_size
        )

    def store(self, device: torch.device) -> ExpertStore:
        return ExpertStore(self.checkpoint, self.config, self.dtype, device)


def open_model(model_dir: Path, dtype: str = "auto") -> Model:
    """Read config and tensor tables, no weights. `dtype` "auto" is the checkpoint's own. Raises CheckpointError."""
    config, checkpoint = load_config(model_dir), Checkpoint(model_dir)
    named = config.dtype if dtype == "auto" else dtype
    return Model(
        config=config,
        checkpoint=checkpoint,
        dtype=getattr(torch, named) if named else checkpoint.dtype(),
        # Ids outside of the vocabulary, as configs of cut-down models have them, never come.
        eos_ids=default_stop_ids(model_dir, config.eos_token_ids).intersection(range(config.vocab_size)),
    )


def choose_device(settings: ServeSettings) -> torch.device:
    """Where this process computes. Raises InvalidInput where it cannot."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device", settings.device, "needs a CUDA device, and torch finds none on this machine")
    return torch.device(settings.device)


def choose_products(model: Model, settings: ServeSettings) -> Arithmetic:
    """How this machine computes products of rows and weights under `settings`."""
    config = model.config
    widths = (config.hidden_size, config.head_dim // 2, config.expert_size, config.dense_size, config.experts_per_token)
    return choose_arithmetic(model.dtype, choose_device(settings), deterministic=settings.deterministic, widths=widths)


def load_local_experts(model: Model, settings: ServeSettings) -> LocalExperts:
    """All routed experts of the model, in this process. Raises CheckpointError."""
    store, arithmetic = model.store(choose_device(settings)), choose_products(model, settings)
    if settings.device == "cpu":
        return LocalExperts({key: store.load(*key) for key in store.all_keys()}, arithmetic)
    stacks = {layer: store.load_layer(layer) for layer in model.config.moe_layers}
    return LocalExperts.over(StackedExperts(stacks), arithmetic)


def build_engine(
    model: Model,
    settings: ServeSettings,
    experts: RoutedExperts,
    available: Callable[[frozenset[ExpertKey]], bool],
    *,
    begin_step: Callable[[float], None] = lambda give_up_at: None,
    at_hand: ExpertsAtHand | None = None,
    meter: Meter | None = None,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> Engine:
    """Load trunk and vision tower and put an engine around them, not started. Raises CheckpointError, InvalidInput.

    `available` and `begin_step` are the engine's. `at_hand` are the same experts for steps in fixed shapes, where they
    are in this process. `meter` and `wrap` let a bench look on.
    """
    layout = plan_kv(model, settings)
    capacity = layout.capacity_tokens(model.config.max_position)
    scheduler = Scheduler(
        KVCache(layout, prefix_cache=settings.prefix_cache),
        SchedulerConfig(
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            decode_stretch=settings.decode_stretch,
            max_waiting_tokens=settings.max_waiting * WAITING_TOKENS_PER_REQUEST,
            max_model_len=settings.max_model_len or capacity,
            eos_ids=model.eos_ids,
        ),
    )
    device = choose_device(settings)
    trunk = load_trunk(model.checkpoint, model.config, model.dtype, device)
    arithmetic = choose_products(model, settings)
    attend = choose_attend(model.dtype, device, arithmetic)
    decoder = Decoder(model.config, trunk, experts, arithmetic, attend, meter, choose_attention)
    runner = ModelRunner(
        decoder,
        layout,
        eos_ids=sorted(model.eos_ids),
        images=_image_features(model, settings),
        static=_static_steps(decoder, layout, settings, at_hand),
    )
    release_helpers()  # This thread has loaded; the engine's computes.
    return Engine(
        scheduler=scheduler,
        runner=wrap(runner),
        vocab_size=model.config.vocab_size,
        available=available,
        begin_step=begin_step,
        image_rules=image_rules(model.config),
    )


def _static_steps(
    decoder: Decoder, layout: KVLayout, settings: ServeSettings, at_hand: ExpertsAtHand | None
) -> Callable[[KVStore], StaticSteps] | None:
    """Only launches cost enough to be recorded; on CPUs, and for one order of sums, steps run as they come."""
    device = choose_device(settings)
    if device.type != "cuda" or settings.deterministic:
        return None
    return lambda store: StaticSteps(decoder, store, layout, at_hand=at_hand, record=GraphRecorder(device))


def _image_features(model: Model, settings: ServeSettings) -> ImageFeatures | None:
    if model.config.vision is None:
        return None
    vision = load_vision(model.checkpoint, model.config, model.dtype, choose_device(settings))
    # Alone, a tile is the same bits whatever else a step needs.
    at_once = 1 if settings.deterministic else MAX_TILES_AT_ONCE
    return ImageFeatures(vision, model.config.vision, tiles_at_once=at_once)


def plan_kv(model: Model, settings: ServeSettings) -> KVLayout:
    """The block pools that `settings.kv_memory` bytes pay for."""
    block_size = choose_block_size(model.config.chunk_size)
    per_global, per_local = bytes_per_block(model.config, block_size, model.dtype)
    return plan_layout(
        kv_bytes=settings.kv_memory,
        bytes_per_global_block=per_global,
        bytes_per_local_block=per_local,
        block_size=block_size,
        chunk_size=model.config.chunk_size,
        has_global=per_global > 0,
        has_local=per_local > 0,
        max_running=settings.max_running,
        min_tokens=settings.max_model_len or 1,
    )


def choose_block_size(chunk_size: int | None) -> int:
    """64 tokens where chunks consist of whole blocks, as real models' do; else the largest size from 8 on that divides
    the chunk size. If none does, 64 again: requests then share prefixes only up to the borders where both fit."""
    sizes = (size for size in SMALL_BLOCK_SIZES if chunk_size is None or chunk_size % size == 0)
    return next(sizes, BLOCK_SIZE)
