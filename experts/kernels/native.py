"""Products of few bfloat16 rows by `few_rows.c`; everything else by torch.

Shape letters as in `experts.arithmetic`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from experts.arithmetic import Arithmetic, PlainArithmetic, TiledArithmetic
from experts.ffn import ExpertWeights
from experts.kernels.compiler import NUMBER, POINTER, REAL, THREADS, declare, load, prepared

MAX_ROWS = 256
"""Torch's product is as fast from about here on."""
MAX_ROWS_PER_EXPERT = 512
STRIP, STEP = 16, 32
HERE = Path(__file__).parent


def choose_arithmetic(
    dtype: torch.dtype, device: torch.device, *, deterministic: bool = False, widths: Sequence[int] = ()
) -> Arithmetic:
    """The fastest way that this machine has; with `deterministic`, the one whose bits depend on nothing but the row.

    `widths` are those of the model's rows.
    """
    if deterministic:
        return TiledArithmetic(widths)
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return PlainArithmetic()
    products, norms = _products(), load_norms()
    return PlainArithmetic() if products is None or norms is None else NativeArithmetic(products, norms)


class NativeArithmetic:
    """Reads a weight matrix about twice as fast as torch where rows are few."""

    def __init__(self, products: ctypes.CDLL, norms: ctypes.CDLL) -> None:
        self._products = products
        self._norms = norms
        self._plain = PlainArithmetic()

    @property
    def functions(self) -> tuple[object, object]:
        """For callers in C: norm and linear."""
        return (self._norms.herd_norm, self._products.herd_linear)

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        (num_rows, num_in), num_out = x_TK.shape, weight_NK.shape[0]
        if num_rows > MAX_ROWS or num_in % STEP or num_out % STRIP or not weight_NK.is_contiguous():
            return self._plain.linear(x_TK, weight_NK)
        x_TK = x_TK.contiguous()
        y_TN = x_TK.new_empty((num_rows, num_out))
        self._products.herd_linear(
            x_TK.data_ptr(),
            weight_NK.data_ptr(),
            y_TN.data_ptr(),
            num_rows,
            num_out,
            num_in,
            torch.get_num_threads(),
        )
        return y_TN

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        hidden, width = rows_RH.shape[1], experts[0].down_HF.shape[1]
        fits = max(counts) <= MAX_ROWS_PER_EXPERT and not hidden % STEP and not width % STEP
        if not fits or not all(_is_plain(weights, hidden, width) for weights in experts):
            return self._plain.ffn(rows_RH, counts, experts)
        rows_RH = rows_RH.contiguous()
        y_RH = torch.empty_like(rows_RH)
        num = len(experts)
        self._products.herd_ffn(
            rows_RH.data_ptr(),
            y_RH.data_ptr(),
            (ctypes.c_long * num)(*counts),
            (ctypes.c_void_p * num)(*(weights.gate_up_FH.data_ptr() for weights in experts)),
            (ctypes.c_void_p * num)(*(weights.down_HF.data_ptr() for weights in experts)),
            num,
            hidden,
            width,
            torch.get_num_threads(),
        )
        return y_RH

    def norm(self, x_TH: torch.Tensor, eps: float, weight_H: torch.Tensor) -> torch.Tensor:
        if x_TH.shape[1] % STRIP or not weight_H.is_contiguous():
            return self._plain.norm(x_TH, eps, weight_H)
        x_TH = x_TH.contiguous()
        y_TH = torch.empty_like(x_TH)
        num_rows, hidden = x_TH.shape
        self._norms.herd_norm(
            x_TH.data_ptr(), weight_H.data_ptr(), y_TH.data_ptr(), num_rows, hidden, eps, torch.get_num_threads()
        )
        return y_TH

    def choose(
        self, x_TH: torch.Tensor, gate_EH: torch.Tensor, num_choices: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Experts [T, K], ascending, and their scores by the logits x gate^T; None where shapes do not fit."""
        (num_rows, hidden), num_experts = x_TH.shape, gate_EH.shape[0]
        if num_rows > MAX_ROWS or hidden % STEP or num_experts % STRIP or not gate_EH.is_contiguous():
            return None
        x_TH = x_TH.contiguous()
        expert_TK = torch.empty((num_rows, num_choices), dtype=torch.int64)
        score_TK = torch.empty((num_rows, num_choices), dtype=x_TH.dtype)
        self._products.herd_choose(
            x_TH.data_ptr(),
            gate_EH.data_ptr(),
            expert_TK.data_ptr(),
            score_TK.data_ptr(),
            num_rows,
            hidden,
            num_experts,
            num_choices,
            torch.get_num_threads(),
        )
        return expert_TK, score_TK

    def routed(
        self, x_TH: torch.Tensor, expert_TK: torch.Tensor, score_TK: torch.Tensor, layer: LayerOfExperts
    ) -> tuple[torch.Tensor, list[int]] | None:
        """The sum per token of its experts on its row times their scores, and the rows of each expert; None where
        shapes do not fit."""
        num_rows, num_choices = expert_TK.shape
        num_experts = len(layer.gate_up)
        if num_rows * num_choices > MAX_ROWS_PER_EXPERT or x_TH.shape[1] != layer.hidden:
            return None
        x_TH = x_TH.contiguous()
        y_TH = torch.empty_like(x_TH)
        counts = (ctypes.c_long * num_experts)()
        self._products.herd_routed(
            x_TH.data_ptr(),
            expert_TK.data_ptr(),
            score_TK.data_ptr(),
            layer.gate_up,
            layer.down,
            y_TH.data_ptr(),
            counts,
            num_rows,
            num_choices,
            num_experts,
            layer.hidden,
            layer.width,
            torch.get_num_threads(),
        )
        return y_TH, list(counts)

    def by_rows(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return function(*rows)


class LayerOfExperts:
    """All experts of one layer as `NativeArithmetic.routed` reads them."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        assert self.fits(experts), "ask `fits` first"
        self.hidden, self.width = experts[0].down_HF.shape
        self.gate_up = (ctypes.c_void_p * len(experts))(*(one.gate_up_FH.data_ptr() for one in experts))
        self.down = (ctypes.c_void_p * len(experts))(*(one.down_HF.data_ptr() for one in experts))
        self._kept = tuple(experts)  # What the pointers point to.

    @staticmethod
    def fits(experts: Sequence[ExpertWeights]) -> bool:
        """Whether the kernel can read them."""
        hidden, width = experts[0].down_HF.shape
        whole = all(_is_plain(one, hidden, width) for one in experts)
        return whole and not hidden % STEP and not width % STEP


def _is_plain(weights: ExpertWeights, hidden: int, width: int) -> bool:
    shapes = (weights.gate_up_FH.shape, weights.down_HF.shape)
    whole = weights.gate_up_FH.is_contiguous() and weights.down_HF.is_contiguous()
    return whole and shapes == ((2 * width, hidden), (hidden, width))


@cache
def _products() -> ctypes.CDLL | None:
    """The compiled products; None where the CPU or the compiler lacks something."""
    return prepared(load_products)


def load_products(flags: Sequence[str]) -> ctypes.CDLL | None:
    """`few_rows.c` compiled with `flags`; `herd_prepare` says whether this process may run it."""
    library = load(HERE / "few_rows.c", flags=flags)
    if library is not None:
        declare(library, "herd_linear", [POINTER, POINTER, POINTER, NUMBER, NUMBER, NUMBER, THREADS])
        declare(library, "herd_ffn", [*[POINTER] * 5, *[NUMBER] * 3, THREADS])
        declare(library, "herd_choose", [*[POINTER] * 4, *[NUMBER] * 4, THREADS])
        declare(library, "herd_routed", [*[POINTER] * 7, *[NUMBER] * 5, THREADS])
    return library


@cache
def load_norms() -> ctypes.CDLL | None:
    """`norm.c` compiled."""
    library = load(HERE / "norm.c")
    if library is not None:
        declare(library, "herd_norm", [POINTER, POINTER, POINTER, NUMBER, NUMBER, REAL, THREADS])
    return library
