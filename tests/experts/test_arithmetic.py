"""Ways to compute products and norms: all equal the formula up to rounding, and some promise more."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from compiled import VARIANTS, Threads, Unwanted, native, needs_kernels, same_bits
from expert_hosts import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.arithmetic import Arithmetic, PlainArithmetic, TiledArithmetic, rms_norm
from experts.ffn import ExpertWeights
from experts.kernels.compiler import load
from experts.kernels.helpers import release_helpers
from experts.kernels.native import (
    MAX_ROWS,
    MAX_ROWS_PER_EXPERT,
    LayerOfExperts,
    NativeArithmetic,
    choose_arithmetic,
)

BF16, CPU = torch.bfloat16, torch.device("cpu")
EPS = 1e-5
ROUNDING = 2.0**-8
"""Of a bfloat16, half a step."""
SUMMING = 2.0**-14
"""Of a float32 sum, relative to the sum of what is summed without signs."""
TINY = 1e-33
"""Below, kernels may take numbers for zeros."""
anything = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeArithmetic:
    return native(request.param)


def numbers(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, a tenth of them zeros, some a thousand times as large, some denormal."""
    x = torch.randn(shape, generator=generator) * scale
    fate = torch.randint(0, 40, shape, generator=generator)
    x[fate < 4] = 0.0
    x[fate == 4] *= 1000
    x[fate == 5] = 1e-40
    return x.to(BF16)


def random_expert(generator: torch.Generator, hidden: int, width: int) -> ExpertWeights:
    return ExpertWeights(
        gate_up_FH=torch.randn(2 * width, hidden, generator=generator).div(hidden**0.5).to(BF16),
        down_HF=torch.randn(hidden, width, generator=generator).div(width**0.5).to(BF16),
    )


def assert_product(y_TN: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> None:
    exact = x_TK.double() @ weight_NK.double().T
    allowed = ROUNDING * exact.abs() + SUMMING * (x_TK.double().abs() @ weight_NK.double().abs().T) + TINY
    assert y_TN.dtype == x_TK.dtype and y_TN.shape == exact.shape
    assert ((y_TN.double() - exact).abs() <= allowed).all()


def exact_ffn(rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
    parts = []
    for weights, x in zip(experts, rows_RH.double().split(list(counts)), strict=True):
        gate, up = (x @ weights.gate_up_FH.double().T).chunk(2, dim=-1)
        parts.append((gate * torch.sigmoid(gate) * up) @ weights.down_HF.double().T)
    return torch.cat(parts)


def assert_as_exact_as_torch(
    y_RH: torch.Tensor, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]
) -> None:
    exact = exact_ffn(rows_RH, counts, experts)
    plain = PlainArithmetic().ffn(rows_RH, counts, experts)
    size_R1 = exact.abs().amax(dim=1, keepdim=True)
    error_R, plain_error_R = (((y.double() - exact).abs() / (size_R1 + TINY)).amax(dim=1) for y in (y_RH, plain))
    assert error_R.max() <= 2 * plain_error_R.max() + 2 * ROUNDING
    assert error_R.mean() <= 1.3 * plain_error_R.mean() + 1e-4


# ---- compiled products


@needs_kernels
def test_the_variant_without_tiles_has_none() -> None:
    def macros(flags: Sequence[str]) -> str:
        command = ["cc", *flags, "-dM", "-E", "-x", "c", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "__AMX_BF16__" not in macros(VARIANTS["without AMX"])
    assert "__AVX512BF16__" in macros(VARIANTS["without AMX"])


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(1, 40) | st.integers(1, 600),
    num_in=st.integers(1, 20),
    num_out=st.integers(1, 21),
    scale=st.sampled_from([1.0, 1e-3, 1e4, 1e-18, 1e15]),
    threads=st.sampled_from([1, 1, 2, 3]),
)
def test_linear(
    kernels: NativeArithmetic, seed: int, num_rows: int, num_in: int, num_out: int, scale: float, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TK = numbers(generator, num_rows, 32 * num_in, scale=scale)
    weight_NK = numbers(generator, 16 * num_out, 32 * num_in)
    with Threads(threads):
        assert_product(kernels.linear(x_TK, weight_NK), x_TK, weight_NK)


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    counts=st.lists(st.integers(1, 8) | st.integers(1, 200), min_size=1, max_size=6)
    | st.lists(st.integers(1, 3), min_size=1, max_size=130),
    hidden=st.integers(1, 8),
    width=st.integers(1, 9),
    threads=st.sampled_from([1, 1, 2, 3]),
)
def test_ffn(kernels: NativeArithmetic, seed: int, counts: list[int], hidden: int, width: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = [random_expert(generator, 32 * hidden, 32 * width) for _ in counts]
    rows_RH = torch.randn(sum(counts), 32 * hidden, generator=generator).to(BF16)
    with Threads(threads):
        y_RH = kernels.ffn(rows_RH, counts, experts)
    assert_as_exact_as_torch(y_RH, rows_RH, counts, experts)


@needs_kernels
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 30.0, 1e12])
def test_ffn_of_any_size_of_numbers(kernels: NativeArithmetic, scale: float) -> None:
    """Far gates are cut off or passed on whole, as torch does."""
    generator = torch.Generator().manual_seed(1)
    experts = [random_expert(generator, 64, 96) for _ in range(2)]
    rows_RH = (torch.randn(21, 64, generator=generator) * scale).to(BF16)
    y_RH = kernels.ffn(rows_RH, (20, 1), experts)
    assert_as_exact_as_torch(y_RH, rows_RH, (20, 1), experts)


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(1, MAX_ROWS),
    num_in=st.integers(1, 12),
    num_out=st.integers(1, 15),
    chosen=st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=60),
)
def test_a_row_of_linear_is_the_same_bits_beside_any_rows_and_threads(
    kernels: NativeArithmetic, seed: int, num_rows: int, num_in: int, num_out: int, chosen: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TK = numbers(generator, num_rows, 32 * num_in)
    weight_NK = numbers(generator, 16 * num_out, 32 * num_in)
    with Threads(1):
        y_TN = kernels.linear(x_TK, weight_NK)
    rows = [row % num_rows for row in chosen]
    for threads in (1, 2, 5):
        with Threads(threads):
            assert same_bits(kernels.linear(x_TK, weight_NK), y_TN)
            assert same_bits(kernels.linear(x_TK[rows], weight_NK), y_TN[rows])


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    counts=st.lists(st.integers(1, 5) | st.integers(1, 70), min_size=1, max_size=9),
    hidden=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_a_row_of_an_expert_is_the_same_bits_beside_any_rows_experts_and_threads(
    kernels: NativeArithmetic, seed: int, counts: list[int], hidden: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = [random_expert(generator, 32 * hidden, 32 * width) for _ in counts]
    rows_RH = numbers(generator, sum(counts), 32 * hidden)
    with Threads(1):
        y_RH = kernels.ffn(rows_RH, counts, experts)
    for threads in (2, 5):
        with Threads(threads):
            assert same_bits(kernels.ffn(rows_RH, counts, experts), y_RH)
    for weights, x, y in zip(experts, rows_RH.split(counts), y_RH.split(counts), strict=True):
        last = len(x) // 2
        assert same_bits(kernels.ffn(x[last:], (len(x) - last,), (weights,)), y[last:])


@needs_kernels
def test_rows_that_are_no_numbers_spoil_themselves_alone(kernels: NativeArithmetic) -> None:
    generator = torch.Generator().manual_seed(2)
    x_TK, weight_NK = numbers(generator, 50, 64), numbers(generator, 48, 64)
    experts = [random_expert(generator, 64, 32) for _ in range(3)]
    counts = (20, 1, 29)
    clean_y, clean_z = kernels.linear(x_TK, weight_NK), kernels.ffn(x_TK, counts, experts)
    wild = {0: float("nan"), 7: float("inf"), 20: float("-inf"), 31: 3e38, 49: float("nan")}
    for row, value in wild.items():
        x_TK[row, row : row + 3] = value
    kept = [row for row in range(50) if row not in wild]
    y_TN, z_RH = kernels.linear(x_TK, weight_NK), kernels.ffn(x_TK, counts, experts)
    assert same_bits(y_TN[kept], clean_y[kept]) and same_bits(z_RH[kept], clean_z[kept])
    for row in (0, 49):
        assert y_TN[row].isnan().all() and z_RH[row].isnan().all()
    assert not y_TN[7].isfinite().any() and not y_TN[20].isfinite().any()


@needs_kernels
def test_numbers_that_cannot_be_are_handed_on(kernels: NativeArithmetic) -> None:
    """A gate that is no number makes an output that is none."""
    weights = random_expert(torch.Generator().manual_seed(3), 32, 32)
    weights.gate_up_FH[5] = float("nan")
    assert kernels.ffn(torch.ones(1, 32, dtype=BF16), (1,), (weights,)).isnan().all()


@needs_kernels
def test_calls_from_many_threads_do_not_meet(kernels: NativeArithmetic) -> None:
    generator = torch.Generator().manual_seed(4)
    experts = [random_expert(generator, 64, 96) for _ in range(4)]
    works = []
    for number in range(8):
        counts = [1 + (number * 7 + e) % 40 for e in range(4)]
        works.append((numbers(generator, sum(counts), 64), counts, numbers(generator, 16 * (number + 1), 64)))
    expected = [(kernels.ffn(x, counts, experts), kernels.linear(x, w)) for x, counts, w in works]
    wrong: list[int] = []
    start = threading.Barrier(len(works))

    def work(number: int) -> None:
        x, counts, weight = works[number]
        start.wait(timeout=30)
        for _ in range(60):
            found = kernels.ffn(x, counts, experts), kernels.linear(x, weight)
            if not all(map(same_bits, found, expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong


@needs_kernels
def test_inputs_need_not_be_contiguous(kernels: NativeArithmetic) -> None:
    generator = torch.Generator().manual_seed(5)
    wide, weight_NK = numbers(generator, 24, 128), numbers(generator, 48, 64)
    experts = [random_expert(generator, 64, 32)]
    for x in (wide[:, ::2], wide[:, 64:], numbers(generator, 64, 24).T, wide[::3, :64]):
        whole = x.contiguous()
        assert same_bits(kernels.linear(x, weight_NK), kernels.linear(whole, weight_NK))
        assert same_bits(kernels.ffn(x, (len(x),), experts), kernels.ffn(whole, (len(x),), experts))
        assert same_bits(kernels.norm(x, EPS, weight_NK[0]), kernels.norm(whole, EPS, weight_NK[0]))


@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out"), [(MAX_ROWS + 1, 32, 16), (3, 33, 16), (3, 16, 16), (3, 32, 15), (3, 64, 24)]
)
def test_products_that_do_not_fit_are_torch_s(num_rows: int, num_in: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x_TK, weight_NK = numbers(generator, num_rows, num_in), numbers(generator, num_out, num_in)
    ours = NativeArithmetic(Unwanted(), Unwanted())
    assert same_bits(ours.linear(x_TK, weight_NK), PlainArithmetic().linear(x_TK, weight_NK))


@pytest.mark.parametrize(
    ("counts", "hidden", "width"), [((MAX_ROWS_PER_EXPERT + 1,), 32, 32), ((1, 2), 48, 32), ((2, 1), 32, 48)]
)
def test_experts_that_do_not_fit_are_torch_s(counts: tuple[int, ...], hidden: int, width: int) -> None:
    generator = torch.Generator().manual_seed(7)
    experts = [random_expert(generator, hidden, width) for _ in counts]
    x_TH = numbers(generator, sum(counts), hidden)
    ours = NativeArithmetic(Unwanted(), Unwanted())
    assert same_bits(ours.ffn(x_TH, counts, experts), PlainArithmetic().ffn(x_TH, counts, experts))


def test_weights_that_are_not_contiguous_are_torch_s() -> None:
    generator = torch.Generator().manual_seed(8)
    x_TH = numbers(generator, 4, 64)
    turned = numbers(generator, 64, 128).T
    whole = random_expert(generator, 64, 64)
    ours, plain = NativeArithmetic(Unwanted(), Unwanted()), PlainArithmetic()
    assert same_bits(ours.linear(x_TH, turned), plain.linear(x_TH, turned))
    for weights in (
        ExpertWeights(gate_up_FH=turned, down_HF=whole.down_HF),
        ExpertWeights(gate_up_FH=whole.gate_up_FH, down_HF=whole.down_HF.T),
    ):
        assert same_bits(ours.ffn(x_TH, (4,), (weights,)), plain.ffn(x_TH, (4,), (weights,)))
    assert same_bits(ours.norm(x_TH, EPS, turned[0, :64]), plain.norm(x_TH, EPS, turned[0, :64]))
    narrow = numbers(generator, 3, 24)
    assert same_bits(ours.norm(narrow, EPS, narrow[0]), plain.norm(narrow, EPS, narrow[0]))


def test_experts_of_different_widths_are_torch_s() -> None:
    generator = torch.Generator().manual_seed(9)
    experts = [random_expert(generator, 32, 64), random_expert(generator, 32, 32)]
    x_TH = numbers(generator, 3, 32)
    ours = NativeArithmetic(Unwanted(), Unwanted())
    assert same_bits(ours.ffn(x_TH, (2, 1), experts), PlainArithmetic().ffn(x_TH, (2, 1), experts))


# ---- the gate and the experts of a layer


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(1, 6) | st.integers(1, MAX_ROWS),
    num_experts=st.integers(1, 8),
    hidden=st.integers(1, 4),
    num_choices=st.sampled_from([1, 1, 2, 3, 16]),
)
def test_the_gate_s_choice(
    kernels: NativeArithmetic, seed: int, num_rows: int, num_experts: int, hidden: int, num_choices: int
) -> None:
    """That of the gate's logits to the bit, the smaller expert of equals included."""
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that many logits are equal.
    x_TH, gate_EH = (
        torch.randint(-2, 3, (count, 32 * hidden), generator=generator).to(BF16)
        for count in (num_rows, 16 * num_experts)
    )
    chosen = kernels.choose(x_TH, gate_EH, num_choices)
    assert chosen is not None
    logits_TE = kernels.linear(x_TH, gate_EH).float()
    for row, (experts, scores) in enumerate(zip(*chosen, strict=True)):
        ranked = sorted(range(16 * num_experts), key=lambda expert: (-float(logits_TE[row, expert]), expert))
        assert experts.tolist() == sorted(ranked[:num_choices])
        exact = torch.sigmoid(logits_TE[row, experts].double())
        assert ((scores.double() - exact).abs() <= 1.01 * ROUNDING * exact + TINY).all()


def test_gates_that_do_not_fit_are_left_to_others() -> None:
    ours = NativeArithmetic(Unwanted(), Unwanted())
    for num_rows, hidden, experts in ((MAX_ROWS + 1, 32, 16), (1, 48, 16), (1, 32, 8)):
        assert ours.choose(torch.ones(num_rows, hidden, dtype=BF16), torch.ones(experts, hidden, dtype=BF16), 1) is None
    assert ours.choose(torch.ones(1, 32, dtype=BF16), torch.ones(32, 16, dtype=BF16).T, 1) is None


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(1, 170),
    num_experts=st.integers(3, 40),
    num_choices=st.integers(1, 3),
    threads=st.sampled_from([1, 1, 3]),
)
def test_routed_experts_in_one_call(
    kernels: NativeArithmetic, seed: int, num_rows: int, num_experts: int, num_choices: int, threads: int
) -> None:
    """To the bit what the steps of it are: scale, group, compute, sum."""
    generator = torch.Generator().manual_seed(seed)
    experts = [random_expert(generator, 64, 32) for _ in range(num_experts)]
    x_TH = numbers(generator, num_rows, 64)
    expert_TK = torch.stack([torch.randperm(num_experts, generator=generator)[:num_choices] for _ in range(num_rows)])
    expert_TK = expert_TK.sort(dim=-1).values
    score_TK = torch.rand(num_rows, num_choices, generator=generator).to(BF16)
    with Threads(threads):
        computed = kernels.routed(x_TH, expert_TK, score_TK, LayerOfExperts(experts))
    assert computed is not None
    y_TH, counts = computed
    assert counts == torch.bincount(expert_TK.flatten(), minlength=num_experts).tolist()
    total_TH = torch.zeros(num_rows, 64)
    for choice in range(num_choices):
        for token in range(num_rows):
            weights = experts[int(expert_TK[token, choice])]
            row = x_TH[token : token + 1] * score_TK[token, choice]
            total_TH[token] += kernels.ffn(row, (1,), (weights,))[0].float()
    assert torch.equal(y_TH, total_TH.to(BF16))


def test_layers_that_do_not_fit() -> None:
    generator = torch.Generator().manual_seed(11)
    good, narrow, thin = (random_expert(generator, *shape) for shape in ((64, 32), (48, 32), (64, 48)))
    turned = ExpertWeights(gate_up_FH=good.gate_up_FH, down_HF=good.down_HF.T.contiguous().T)
    assert LayerOfExperts.fits([good, good])
    assert not any(LayerOfExperts.fits(experts) for experts in ([narrow], [thin], [good, thin], [good, turned]))
    ours, layer = NativeArithmetic(Unwanted(), Unwanted()), LayerOfExperts([good])
    many = torch.zeros(MAX_ROWS_PER_EXPERT + 1, 1, dtype=torch.int64)
    assert ours.routed(torch.ones(len(many), 64, dtype=BF16), many, many.to(BF16), layer) is None


# ---- norms


@needs_kernels
@anything
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(1, 5) | st.integers(1, 80),
    width=st.integers(1, 20),
    scale=st.sampled_from([1.0, 1e-4, 1e4, 1e-25]),
    threads=st.sampled_from([1, 2]),
)
def test_norm(seed: int, num_rows: int, width: int, scale: float, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TH, weight_H = numbers(generator, num_rows, 16 * width, scale=scale), numbers(generator, 16 * width)
    kernels = native("without AMX")
    with Threads(threads):
        y_TH = kernels.norm(x_TH, EPS, weight_H)
    x = x_TH.double()
    exact = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_H.double()
    assert y_TH.dtype == BF16
    # Rounded twice: before the product with the weight and after it.
    assert ((y_TH.double() - exact).abs() <= 2.1 * ROUNDING * exact.abs() + TINY).all()
    with Threads(1):
        assert all(same_bits(kernels.norm(x_TH[row : row + 1], EPS, weight_H)[0], y_TH[row]) for row in range(num_rows))


def test_norm_rounds_before_the_product_with_the_weight() -> None:
    x = torch.tensor([[3.0, 1.0]], dtype=BF16)
    weight = torch.tensor([1.0078125, 1.0], dtype=BF16)
    normed = (x.float() / torch.sqrt(torch.tensor(5.0))).to(BF16)
    assert torch.equal(rms_norm(x, 0.0), normed)
    assert torch.equal(rms_norm(x, 0.0, weight), normed * weight)


# ---- tiles


def in_crowds(generator: torch.Generator, num_rows: int, sizes: Sequence[int]) -> list[tuple[list[int], int]]:
    """Crowds of random rows, row 0 at any place in them: (rows, where row 0 is)."""
    crowds = []
    for size in sizes:
        rows = torch.randint(1, num_rows, (size,), generator=generator).tolist()
        place = int(torch.randint(0, size, (1,), generator=generator))
        rows[place] = 0
        crowds.append((rows, place))
    return crowds


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@anything
@given(
    seed=st.integers(0, 1 << 20),
    hidden=st.integers(1, 70) | st.sampled_from([128, 256]),
    width=st.integers(1, 70) | st.sampled_from([128, 192]),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=4),
)
def test_tiles_give_a_row_the_same_bits_anywhere(
    dtype: torch.dtype, seed: int, hidden: int, width: int, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tiled: Arithmetic = TiledArithmetic((hidden, width))
    x_TH, norm_H = (torch.randn(shape, generator=generator).to(dtype) for shape in ((90, hidden), (hidden,)))
    weights = ExpertWeights(
        gate_up_FH=(torch.randn(2 * width, hidden, generator=generator) / hidden**0.5).to(dtype),
        down_HF=(torch.randn(hidden, width, generator=generator) / width**0.5).to(dtype),
    )
    with Threads(1):
        alone = tiled.linear(x_TH[:1], weights.gate_up_FH), tiled.norm(x_TH[:1], EPS, norm_H)
        alone_ffn = tiled.ffn(x_TH[:1], (1,), (weights,))
        for rows, place in in_crowds(generator, 90, sizes):
            x = x_TH[rows]
            there = tiled.linear(x, weights.gate_up_FH), tiled.norm(x, EPS, norm_H), tiled.ffn(x, (len(x),), (weights,))
            for found, expected in zip(there, (*alone, alone_ffn), strict=True):
                assert same_bits(found[place : place + 1], expected)


def test_tiles_do_not_depend_on_layouts() -> None:
    generator = torch.Generator().manual_seed(12)
    wide, weight_NH = torch.randn(70, 96, generator=generator), torch.randn(24, 48, generator=generator)
    tiled = TiledArithmetic()
    for x in (wide[:, ::2], wide[:, 48:], torch.randn(48, 70, generator=generator).T):
        for rows in (32, 70):
            whole = x[:rows].contiguous()
            assert same_bits(tiled.linear(x[:rows], weight_NH), tiled.linear(whole, weight_NH))
            assert same_bits(tiled.norm(x[:rows], EPS, weight_NH[0]), tiled.norm(whole, EPS, weight_NH[0]))


def test_tiles_equal_the_plain_way() -> None:
    generator = torch.Generator().manual_seed(10)
    x_TH, weight_NH = torch.randn(77, 20, generator=generator), torch.randn(13, 20, generator=generator)
    experts = [
        ExpertWeights(
            gate_up_FH=torch.randn(12, 20, generator=generator), down_HF=torch.randn(20, 6, generator=generator)
        )
        for _ in range(3)
    ]
    tiled, plain = TiledArithmetic((20, 6)), PlainArithmetic()
    pairs = [
        (way.linear(x_TH, weight_NH), way.norm(x_TH, EPS, weight_NH[0]), way.ffn(x_TH, (40, 1, 36), experts))
        for way in (tiled, plain)
    ]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tiles_hand_functions_whole_tiles_of_every_argument() -> None:
    tiled = TiledArithmetic()
    seen: list[tuple[torch.Size, torch.Size]] = []

    def double(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append((x.shape, y.shape))
        return 2 * x, y[:, 0]

    x, y = torch.arange(70.0)[:, None], torch.arange(210.0).view(70, 3)
    twice, first = tiled.by_rows(double, x, y)
    assert torch.equal(twice, 2 * x) and torch.equal(first, y[:, 0])
    assert seen == [((32, 1), (32, 3))] * 3


def test_odd_widths_need_taller_tiles() -> None:
    for widths, rows in (((), 32), ((64, 4), 32), ((64, 6), 64), ((5,), 128), ((1, 64), 32)):
        assert TiledArithmetic(widths).tile_rows == rows, widths


# ---- the choice


def test_choice_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.kernels.native._products", lambda: None)
    assert isinstance(choose_arithmetic(BF16, CPU), PlainArithmetic)


def test_choice() -> None:
    assert isinstance(choose_arithmetic(BF16, CPU, deterministic=True), TiledArithmetic)
    for dtype, device in ((torch.float32, CPU), (torch.float16, CPU), (BF16, torch.device("cuda"))):
        assert isinstance(choose_arithmetic(dtype, device), PlainArithmetic)


@needs_kernels
def test_choice_with_kernels() -> None:
    assert isinstance(choose_arithmetic(BF16, CPU), NativeArithmetic)


@needs_kernels
def test_a_cpu_that_may_not_use_its_tiles_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import experts.kernels.native as module

    asked: list[Sequence[str]] = []

    class Refusing:
        def herd_prepare(self) -> int:
            return 0

    def refuse(flags: Sequence[str]) -> object:
        asked.append(flags)
        return Refusing() if flags == VARIANTS["with AMX"] else load(module.HERE / "few_rows.c", flags=flags)

    monkeypatch.setattr(module, "load_products", refuse)
    library = module._products.__wrapped__()
    assert library is not None and library.herd_prepare() == 1
    assert [a != b for a, b in pairwise(asked)] == [True]


@needs_kernels
def test_a_thread_whose_helpers_were_released_computes_as_before() -> None:
    x_TH, weight_NH = torch.randn(32, 256).bfloat16(), torch.randn(1024, 256).bfloat16()
    with Threads(2):
        arithmetic = choose_arithmetic(torch.bfloat16, torch.device("cpu"))
        before = arithmetic.linear(x_TH, weight_NH)
        with_helpers = set(os.listdir("/proc/self/task"))
        release_helpers()
        wait_until(lambda: bool(with_helpers - set(os.listdir("/proc/self/task"))), "a helper ended")
        assert same_bits(arithmetic.linear(x_TH, weight_NH), before)
