"""Computing on another device than the CPU, shown on one that has shapes and no numbers: there, nothing can be read by
the host, and nothing mixed with its memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from static_stepping import sequences
from stepping import CPU, Stepper, load_decoder

from cluster.tiny import make_tiny
from experts.checkpoint import Checkpoint
from experts.config import load_config
from experts.weights import ExpertStore
from router.checkpoint import load_vision
from router.model.decoder import Decoder
from router.model.kv_store import KVStore
from router.model.static_decode import StaticStep
from router.model.static_inputs import DecodeInputs, DecodeShape
from router.model.vision import encode_tiles
from router.routed import Combined, Routing
from router.stacked_experts import StackedExperts

META = torch.device("meta")


@pytest.fixture(scope="module", params=["scout", "maverick", "guard"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    make_tiny(request.param, path, seed=5)
    return path


def without_numbers(thing: Any) -> Any:
    """Weights as they are, their tensors on the meta device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(META)
    if isinstance(thing, tuple):
        return tuple(map(without_numbers, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{field.name: without_numbers(getattr(thing, field.name)) for field in fields(thing)})
    return thing


def test_a_step_needs_no_numbers_on_the_host(folder: Path) -> None:
    config = load_config(folder)
    source = ExpertStore(Checkpoint(folder), config, torch.float32)
    experts = StackedExperts({layer: without_numbers(source.load_layer(layer)) for layer in config.moe_layers})
    weights = without_numbers(load_decoder(folder).weights)
    store = KVStore(config, num_global_slots=64, num_local_slots=64, dtype=torch.float32, device=META)
    inputs = DecodeInputs(DecodeShape(batch=4, num_blocks=(8, 8)), META)
    logits_BV = StaticStep(config, weights, store, inputs, block_size=8).whole(experts)
    assert (logits_BV.shape, logits_BV.device) == ((4, config.vocab_size), META)


def test_tiles_are_encoded_where_the_weights_are(tmp_path: Path) -> None:
    make_tiny("scout", tmp_path / "tiny")
    config = load_config(tmp_path / "tiny")
    assert config.vision is not None
    weights = without_numbers(load_vision(Checkpoint(tmp_path / "tiny"), config, torch.float32, CPU))
    side = config.vision.tile_size
    features_NMH = encode_tiles(torch.empty(2, 3, side, side, device=META), weights, config.vision)
    assert (features_NMH.shape[0], features_NMH.device) == (2, META)


class Echo:
    """Gives rows back as they came."""

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Echoed:
        return Echoed(x_TH)


@dataclass(frozen=True)
class Echoed:
    x_TH: torch.Tensor

    def combine(self) -> Combined:
        return Combined(y_TH=self.x_TH, lost={})


def test_ordinary_steps_ask_the_host_for_nothing_but_experts(folder: Path) -> None:
    config = load_config(folder)
    decoder = Decoder(config, without_numbers(load_decoder(folder).weights), Echo())
    stepper = Stepper(decoder, sequences(config.vocab_size, 70, 9, 20))
    for counts in ({0: 64, 1: 9, 2: 5}, {0: 6, 2: 1}):
        output = stepper.step(counts)
        assert output.logits_SV.device == META
