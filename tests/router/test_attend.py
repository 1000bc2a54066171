"""Ways to attend: all equal the formula up to rounding, the tiled one to the bit however a sequence is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from attending import Case, break_up, make_span, random_case, spelled_out
from compiled import VARIANTS, Threads, needs_kernels, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.arithmetic import PlainArithmetic, TiledArithmetic
from experts.kernels.compiler import cpu_flags, load
from router.kernels import native as native_module
from router.kernels.native import (
    MAX_HEAD_DIM,
    MAX_HEADS_PER_GROUP,
    NativeAttend,
    choose_attend,
    load_decode,
    load_prefill,
)
from router.model.attend import Attend, FlashAttend, PlainAttend, Turn
from router.model.rope import rotations
from router.model.tiled_attend import TILE, TiledAttend

BF16, CPU = torch.bfloat16, torch.device("cpu")
HALF_STEP = 2.0**-8
"""Of a bfloat16."""
anything = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), print_blob=True)

LENGTHS = st.sampled_from([0, 0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 130]) | st.integers(0, 140)
PIECES = st.lists(
    st.tuples(LENGTHS, st.just(1)) | st.tuples(LENGTHS, st.sampled_from([1, 2, 3, 16, 64, 70])), min_size=1, max_size=5
)
DECODES_FIRST = PIECES.map(lambda pieces: sorted(pieces, key=lambda piece: piece[1] > 1))
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 8), st.sampled_from([8, 16, 24, 32, 64, 96, 128]))


variants = pytest.mark.parametrize("variant", [*VARIANTS])


def native(variant: str = "without AMX") -> NativeAttend:
    if variant == "with AMX" and "amx_bf16" not in cpu_flags():
        pytest.skip("this CPU lacks AMX")
    decode, prefill, turn = load_decode(VARIANTS[variant]), load_prefill(VARIANTS[variant]), native_module._turn()
    assert decode is not None and prefill is not None and turn is not None
    assert decode.herd_prepare() and prefill.herd_prepare()
    return NativeAttend(decode, prefill, turn)


def attend(way: Attend, case: Case) -> torch.Tensor:
    return way(case.query_TND, case.keys_SGD, case.values_SGD, case.spans, case.chunked)


def tiled(head_dim: int) -> TiledAttend:
    return TiledAttend(TiledArithmetic((head_dim // 2,)))


@anything
@given(seed=st.integers(0, 1 << 20), pieces=PIECES | DECODES_FIRST, heads=HEADS)
def test_float32(seed: int, pieces: list[tuple[int, int]], heads: tuple[int, int, int]) -> None:
    case = random_case(seed, pieces, heads, torch.float32)
    exact, _ = spelled_out(case)
    for way in (PlainAttend(), FlashAttend(), tiled(heads[2])):
        torch.testing.assert_close(attend(way, case).double(), exact, atol=1e-5, rtol=1e-5)


@anything
@given(seed=st.integers(0, 1 << 20), pieces=PIECES | DECODES_FIRST, heads=HEADS)
def test_bfloat16(seed: int, pieces: list[tuple[int, int]], heads: tuple[int, int, int]) -> None:
    case = random_case(seed, pieces, heads, BF16)
    exact, sizes = spelled_out(case)
    # Torch rounds shares before they meet the values.
    for way in (PlainAttend(), FlashAttend(), tiled(heads[2])):
        mixed = attend(way, case)
        assert mixed.dtype == BF16
        assert ((mixed.double() - exact).abs() <= HALF_STEP * exact.abs() + 2 * HALF_STEP * sizes).all(), way


@needs_kernels
@variants
@pytest.mark.parametrize("threads", [1, 2])
@anything
@given(seed=st.integers(0, 1 << 20), pieces=DECODES_FIRST, heads=HEADS)
def test_compiled(
    seed: int, pieces: list[tuple[int, int]], heads: tuple[int, int, int], threads: int, variant: str
) -> None:
    case = random_case(seed, pieces, heads, BF16)
    exact, sizes = spelled_out(case)
    with Threads(threads):
        mixed = attend(native(variant), case)
    error = (mixed.double() - exact).abs()
    assert (error <= HALF_STEP * exact.abs() + 2 * HALF_STEP * sizes).all()
    num_decodes = next((at for at, span in enumerate(case.spans) if span.count > 1), len(case.spans))
    if not heads[2] % 32 and variant == "without AMX":
        # Decodes are then in float32 throughout.
        assert (error <= HALF_STEP * exact.abs() + 1e-4 * sizes)[:num_decodes].all()


@needs_kernels
@variants
@pytest.mark.parametrize("head_dim", [32, 256])
def test_compiled_at_its_limits(head_dim: int, variant: str) -> None:
    for per_kv in (MAX_HEADS_PER_GROUP, MAX_HEADS_PER_GROUP + 1):
        for size in (head_dim, MAX_HEAD_DIM + 32):
            case = random_case(per_kv, [(40, 1), (0, 1)], (1, per_kv, size), BF16)
            exact, sizes = spelled_out(case)
            assert ((attend(native(variant), case).double() - exact).abs() <= 3 * HALF_STEP * sizes).all()


@needs_kernels
@variants
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_compiled_decodes_depend_on_neither_threads_nor_neighbours(head_dim: int, variant: str) -> None:
    case = random_case(12, [(past, 1) for past in (0, 31, 64, 200, 463)], (2, 5, head_dim), BF16)
    way = native(variant)
    mixed = attend(way, case)
    exact, sizes = computed_in_float64(case)
    assert ((mixed.double() - exact).abs() <= HALF_STEP * exact.abs() + 2 * HALF_STEP * sizes).all()
    for threads in (1, 3):
        with Threads(threads):
            assert same_bits(attend(way, case), mixed)
            for span in case.spans:
                alone = make_span(0, 1, span.runs(case.chunked), case.chunked)
                found = way(case.query_TND[span.rows], case.keys_SGD, case.values_SGD, [alone], case.chunked)
                assert same_bits(found, mixed[span.rows])


@needs_kernels
def test_compiled_with_queries_out_of_order_in_memory() -> None:
    case = random_case(3, [(40, 1), (7, 1)], (2, 2, 32), BF16)
    expected = attend(native(), case)
    turned = case.query_TND.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert same_bits(native()(turned, case.keys_SGD, case.values_SGD, case.spans, case.chunked), expected)


@needs_kernels
@variants
def test_compiled_hands_on_what_is_no_number(variant: str) -> None:
    case = random_case(4, [(40, 1), (20, 1)], (1, 2, 32), BF16)
    clean = attend(native(variant), case)
    case.query_TND[0, 0, 3] = math.nan
    mixed = attend(native(variant), case)
    assert mixed[0, 0].isnan().all()
    assert same_bits(mixed[0, 1], clean[0, 1]) and same_bits(mixed[1], clean[1])


@needs_kernels
@variants
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1000.0])
def test_compiled_with_scores_of_any_size(scale: float, variant: str) -> None:
    case = random_case(5, [(100, 1), (33, 1)], (2, 3, 64), BF16)
    case.query_TND.mul_(scale)
    exact, sizes = spelled_out(case)
    allowed = HALF_STEP * exact.abs() + (2 * HALF_STEP if variant == "with AMX" else 1e-3) * sizes
    assert ((attend(native(variant), case).double() - exact).abs() <= allowed).all()


# ---- compiled prefills


def computed_in_float64(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """As `spelled_out`, faster and less plain."""
    query, keys, values = case.query_TND.double(), case.keys_SGD.double(), case.values_SGD.double()
    mixed, sizes = (PlainAttend()(query, keys, one, case.spans, case.chunked) for one in (values, values.abs()))
    return mixed, sizes


def check_prefill(way: Attend, case: Case) -> None:
    exact, sizes = computed_in_float64(case)
    error = (attend(way, case).double() - exact).abs()
    # Shares are rounded before they meet the values.
    assert (error <= HALF_STEP * exact.abs() + 2 * HALF_STEP * sizes).all()


@needs_kernels
@variants
@settings(anything, max_examples=30)
@given(
    seed=st.integers(0, 1 << 20),
    pieces=st.lists(st.tuples(st.integers(0, 600), st.integers(2, 400)), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 16), st.sampled_from(range(32, 257, 32))),
    threads=st.integers(1, 3),
)
def test_compiled_prefills(
    seed: int, pieces: list[tuple[int, int]], heads: tuple[int, int, int], threads: int, variant: str
) -> None:
    with Threads(threads):
        check_prefill(native(variant), random_case(seed, pieces, heads, BF16))


@needs_kernels
@variants
@pytest.mark.parametrize("pieces", [[(0, 3000)], [(3000, 2), (1, 2)], [(2900, 300), (0, 2)]], ids=str)
def test_compiled_prefills_of_any_length(pieces: list[tuple[int, int]], variant: str) -> None:
    check_prefill(native(variant), random_case(8, pieces, (1, 5, 64), BF16))


@needs_kernels
@variants
def test_compiled_prefills_depend_on_neither_threads_nor_neighbours(variant: str) -> None:
    case = random_case(9, [(40, 1), (300, 40), (0, 270), (17, 2)], (2, 5, 96), BF16)
    way = native(variant)
    mixed = attend(way, case)
    for threads in (1, 2, 5):
        with Threads(threads):
            assert same_bits(attend(way, case), mixed)
            for span in case.spans:
                alone = make_span(0, span.count, span.runs(case.chunked), case.chunked)
                found = way(case.query_TND[span.rows], case.keys_SGD, case.values_SGD, [alone], case.chunked)
                assert same_bits(found, mixed[span.rows])


@needs_kernels
@variants
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1000.0])
def test_compiled_prefills_with_scores_of_any_size(scale: float, variant: str) -> None:
    case = random_case(10, [(300, 20), (0, 33)], (2, 3, 64), BF16)
    case.query_TND.mul_(scale)
    check_prefill(native(variant), case)


@needs_kernels
@variants
def test_compiled_prefills_hand_on_what_is_no_number(variant: str) -> None:
    case = random_case(11, [(300, 40), (0, 20)], (2, 2, 32), BF16)
    way = native(variant)
    clean = attend(way, case)
    # One head of a token in the middle of its span.
    case.query_TND[7, 1, 3] = math.nan
    mixed = attend(way, case)
    assert mixed[7, 1].isnan().all()
    mixed[7, 1] = clean[7, 1]
    assert same_bits(mixed, clean)


# ---- however a sequence is cut


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@anything
@given(
    seed=st.integers(0, 1 << 20),
    length=st.integers(1, 3 * TILE),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 4, 6, 16, 20, 64, 128])),
    cuts=st.lists(st.integers(1, 80), min_size=1, max_size=8),
)
def test_tiles_do_not_depend_on_how_a_sequence_is_cut(
    dtype: torch.dtype, seed: int, length: int, heads: tuple[int, int, int], cuts: Sequence[int]
) -> None:
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    num_kv, per_kv, head_dim = heads
    query, keys, values = (
        torch.randn(length, number, head_dim, generator=generator).to(dtype)
        for number in (num_kv * per_kv, num_kv, num_kv)
    )
    way = tiled(head_dim)
    whole = way(query, keys, values, [make_span(0, length, (range(length),), False)], False)
    done = 0
    while done < length:
        count = min(random.choice(cuts), length - done)
        free = [number * length for number in range(6)]
        runs = break_up(random, done + count, free, 3)
        slots = [slot for run in runs for slot in run]
        store = [torch.randn(6 * length, num_kv, head_dim, generator=generator).to(dtype) for _ in range(2)]
        for there, here in zip(store, (keys, values), strict=True):
            there[slots] = here[: done + count]
        mixed = way(query[done : done + count], *store, [make_span(0, count, runs, True)], True)
        assert same_bits(mixed, whole[done : done + count])
        done += count


def test_tiles_do_not_depend_on_other_sequences() -> None:
    case = random_case(6, [(70, 1), (0, 90), (5, 3), (64, 64)], (2, 3, 16), torch.float32)
    way = tiled(16)
    mixed = attend(way, case)
    for span in case.spans:
        alone = make_span(0, span.count, span.runs(case.chunked), case.chunked)
        found = way(case.query_TND[span.rows], case.keys_SGD, case.values_SGD, [alone], case.chunked)
        assert same_bits(found, mixed[span.rows])


# ---- turning heads and storing them

TURNS = ("nothing", "rotation", "rotation and norm", "temperature")


def make_turn(kind: str, positions: torch.Tensor, head_dim: int) -> Turn:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    if kind.startswith("rotation"):
        return Turn(rotation=rotations(positions, frequency), norm_eps=1e-5 if "norm" in kind else None)
    if kind == "temperature":
        return Turn(temperature=(1.0 + torch.log1p(positions.float()))[:, None, None])
    return Turn()


def turned_exactly(heads: torch.Tensor, num_queries: int, num_keys: int, turn: Turn) -> torch.Tensor:
    """float64, rounded nowhere."""
    exact = heads.double()
    keyed = exact[:, : num_queries + num_keys]
    if turn.rotation is not None:
        even, odd = keyed[..., ::2], keyed[..., 1::2]
        cosine, sine = turn.rotation.real.double(), turn.rotation.imag.double()
        keyed = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)
    if turn.norm_eps is not None:
        keyed = keyed / (keyed.square().mean(-1, keepdim=True) + turn.norm_eps).sqrt()
    exact[:, : num_queries + num_keys] = keyed
    if turn.temperature is not None:
        exact[:, :num_queries] *= turn.temperature.double()
    return exact


def check_place(
    way: Attend, dtype: torch.dtype, kind: str, seed: int, num_tokens: int, heads: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_kv, per_kv, head_dim = heads
    num_queries, num_heads = num_kv * per_kv, num_kv * (per_kv + 2)
    wide = torch.randn(num_tokens, num_heads + seed % 2, head_dim, generator=generator).to(dtype)
    given = wide[:, :num_heads]
    turn = make_turn(kind, torch.randint(0, 5000, (num_tokens,), generator=generator), head_dim)
    exact = turned_exactly(given, num_queries, num_kv, turn)
    values_in = given[:, num_queries + num_kv :].clone()
    keys, values = (torch.full((3 * num_tokens, num_kv, head_dim), 7.0, dtype=dtype) for _ in range(2))
    slots = torch.randperm(3 * num_tokens, generator=generator)[:num_tokens]
    query = way.place(given, num_queries, turn, keys, values, slots)
    untouched = torch.ones(3 * num_tokens, dtype=torch.bool)
    untouched[slots] = False
    assert (keys[untouched] == 7).all() and (values[untouched] == 7).all()
    assert same_bits(values[slots], values_in)
    half_step = torch.finfo(dtype).eps / 2
    # Rotated numbers are rounded before the norm, which may be of a sum that nearly vanishes; float32 angles are exact
    # in both.
    allowed = 4 * half_step * exact.abs() + 4 * half_step * ("rotation" in kind) * exact.abs().amax(-1, keepdim=True)
    for found, expected, bound in (
        (query, exact[:, :num_queries], allowed[:, :num_queries]),
        (keys[slots], exact[:, num_queries : num_queries + num_kv], allowed[:, num_queries : num_queries + num_kv]),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@anything
@given(seed=st.integers(0, 1 << 20), num_tokens=st.integers(1, 70), heads=HEADS)
def test_place(dtype: torch.dtype, kind: str, seed: int, num_tokens: int, heads: tuple[int, int, int]) -> None:
    for way in (FlashAttend(), tiled(heads[2])):
        check_place(way, dtype, kind, seed, num_tokens, heads)


@needs_kernels
@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("threads", [1, 3])
@anything
@given(seed=st.integers(0, 1 << 20), num_tokens=st.integers(1, 70), heads=HEADS)
def test_place_compiled(threads: int, kind: str, seed: int, num_tokens: int, heads: tuple[int, int, int]) -> None:
    with Threads(threads):
        check_place(native(), BF16, kind, seed, num_tokens, heads)


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@anything
@given(
    seed=st.integers(0, 1 << 20),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 4, 6, 10, 16, 20, 64])),
    num_tokens=st.integers(2, 140),
)
def test_tiles_turn_a_token_to_the_same_bits_anywhere(
    dtype: torch.dtype, kind: str, seed: int, heads: tuple[int, int, int], num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_kv, per_kv, head_dim = heads
    way = tiled(head_dim)
    positions = torch.randint(0, 5000, (num_tokens,), generator=generator)
    whole = torch.randn(num_tokens, num_kv * (per_kv + 2), head_dim, generator=generator).to(dtype)
    turn = make_turn(kind, positions, head_dim)

    def place(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.zeros(len(rows), num_kv, head_dim, dtype=dtype) for _ in range(2))
        mine = Turn(
            rotation=None if turn.rotation is None else turn.rotation[rows],
            norm_eps=turn.norm_eps,
            temperature=None if turn.temperature is None else turn.temperature[rows],
        )
        return way.place(whole[rows], num_kv * per_kv, mine, keys, values, torch.arange(len(rows))), keys

    query, keys = place(list(range(num_tokens)))
    for row in {0, num_tokens // 2, num_tokens - 1}:
        alone_query, alone_keys = place([row])
        assert same_bits(alone_query[0], query[row]) and same_bits(alone_keys[0], keys[row])


# ---- the choice


def test_choice() -> None:
    assert isinstance(choose_attend(BF16, CPU, TiledArithmetic()), TiledAttend)
    assert isinstance(choose_attend(torch.float32, CPU, PlainArithmetic()), FlashAttend)
    assert isinstance(choose_attend(BF16, torch.device("cuda"), PlainArithmetic()), PlainAttend)


@needs_kernels
def test_choice_with_kernels() -> None:
    assert isinstance(choose_attend(BF16, CPU, PlainArithmetic()), NativeAttend)


def test_choice_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "_decode", lambda: load(native_module.HERE / "decode.c", compiler="no-such-cc"))
    assert isinstance(choose_attend(BF16, CPU, PlainArithmetic()), FlashAttend)
