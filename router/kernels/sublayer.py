"""The attention sublayer of decode steps by `sublayer.c`, in one call; every other step part by part.

Shape letters as in `router.model.attention`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from experts.config import ModelConfig
from experts.kernels.compiler import NUMBER, POINTER, REAL, THREADS, load
from experts.kernels.native import MAX_ROWS, NativeArithmetic
from router.kernels.native import MAX_HEAD_DIM, MAX_HEADS_PER_GROUP, STEP, NativeAttend, runs_of
from router.model.attention import Attention, Place, Sublayer
from router.model.weights import LayerWeights


def choose_attention(config: ModelConfig, plain: Sublayer) -> Attention:
    """`plain`, or what does decode steps in one call where its parts are in C and the model's shapes fit."""
    library = _library()
    arithmetic, attend = plain.arithmetic, plain.attend
    native = isinstance(arithmetic, NativeArithmetic) and isinstance(attend, NativeAttend)
    fits = config.head_dim <= MAX_HEAD_DIM and not config.head_dim % STEP and not config.hidden_size % STEP
    fits = fits and config.num_heads // config.num_kv_heads <= MAX_HEADS_PER_GROUP
    if library is None or not native or not fits:
        return plain
    assert isinstance(arithmetic, NativeArithmetic) and isinstance(attend, NativeAttend)
    return NativeSublayer(config, plain, library, _parts(arithmetic, attend))


class _Parts(ctypes.Structure):
    _fields_ = (("norm", POINTER), ("linear", POINTER), ("turn", POINTER), ("decode", POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("norm", "qkv", "out", "keys", "values")),
        *((name, NUMBER) for name in "HNGD"),
        *((name, REAL) for name in ("norm_eps", "qk_eps")),
        *((name, THREADS) for name in ("turns", "warms")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("turns", "temperatures", "slots", "starts", "lengths", "first")),
        ("T", NUMBER),
        ("threads", THREADS),
    )


@dataclass(frozen=True)
class _Prepared:
    """A step as the kernel reads it for one kind of layer, and what its pointers point to."""

    place: Place
    slots_T: torch.Tensor
    step: _Step
    kept: tuple[object, ...]


class NativeSublayer:
    """One instance belongs to one decoder and one store: layers are looked up by their number."""

    def __init__(self, config: ModelConfig, plain: Sublayer, library: ctypes.CDLL, parts: _Parts) -> None:
        self._config = config
        self._plain = plain
        self._call = library.herd_sublayer
        self._parts = parts
        self._layers: dict[int, tuple[LayerWeights, torch.Tensor, _Layer]] = {}
        self._steps: dict[bool, _Prepared] = {}

    def __call__(self, x_TH: torch.Tensor, layer: int, weights: LayerWeights, place: Place) -> torch.Tensor:
        if len(x_TH) > MAX_ROWS or len(place.spans) != len(x_TH):
            return self._plain(x_TH, layer, weights, place)
        config = self._config
        x_TH = x_TH.contiguous()
        y_TH = torch.empty_like(x_TH)
        width = config.hidden_size + 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        work = x_TH.new_empty(len(x_TH) * width)
        self._call(
            ctypes.byref(self._parts),
            ctypes.byref(self._layer(layer, weights, place)),
            ctypes.byref(self._step(config.chunked_layers[layer], place)),
            x_TH.data_ptr(),
            y_TH.data_ptr(),
            work.data_ptr(),
        )
        return y_TH

    def _layer(self, layer: int, weights: LayerWeights, place: Place) -> _Layer:
        keys_SGD, values_SGD = place.store.layer(layer)
        known = self._layers.get(layer)
        if known is not None and known[0] is weights and known[1] is keys_SGD:
            return known[2]
        config, rotates = self._config, self._config.rope_layers[layer]
        made = _Layer(
            norm=weights.attention_norm_H.data_ptr(),
            qkv=weights.qkv_PH.data_ptr(),
            out=weights.out_HQ.data_ptr(),
            keys=keys_SGD.data_ptr(),
            values=values_SGD.data_ptr(),
            H=config.hidden_size,
            N=config.num_heads,
            G=config.num_kv_heads,
            D=config.head_dim,
            norm_eps=config.norm_eps,
            qk_eps=config.norm_eps if rotates and config.use_qk_norm else -1.0,
            turns=rotates,
            warms=not rotates and config.attn_temperature_tuning,
        )
        self._layers[layer] = (weights, keys_SGD, made)
        return made

    def _step(self, chunked: bool, place: Place) -> _Step:
        known = self._steps.get(chunked)
        if known is not None and known.place is place:
            return known.step
        slots_T = place.slots(chunked)
        starts, lengths, first = runs_of(place.spans, chunked)
        step = _Step(
            turns=place.rotation.data_ptr(),
            temperatures=place.temperature.data_ptr(),
            slots=slots_T.data_ptr(),
            starts=ctypes.addressof(starts),
            lengths=ctypes.addressof(lengths),
            first=ctypes.addressof(first),
            T=len(place.spans),
            threads=torch.get_num_threads(),
        )
        self._steps[chunked] = _Prepared(place, slots_T, step, (starts, lengths, first))
        return step


def _parts(arithmetic: NativeArithmetic, attend: NativeAttend) -> _Parts:
    functions: Sequence[object] = (*arithmetic.functions, *attend.functions)
    norm, linear, turn, decode = (ctypes.cast(function, POINTER).value for function in functions)  # type: ignore[arg-type]
    return _Parts(norm=norm, linear=linear, turn=turn, decode=decode)


@cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("sublayer.c"))
    if library is not None:
        library.herd_sublayer.argtypes = [POINTER] * 6
        library.herd_sublayer.restype = None
    return library
