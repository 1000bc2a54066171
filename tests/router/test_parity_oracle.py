"""The decoder against stored float32 results of the reference implementation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stepping import Stepper, all_logits, load_decoder

ORACLE = Path(os.environ.get("HERD_ORACLE_DIR", Path(__file__).parents[3] / "shared" / "llama4" / "oracle"))
ATOL = 1e-4

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no stored reference results at {ORACLE}")


@pytest.fixture(scope="module", params=["scout", "maverick", "guard"])
def folder(request: pytest.FixtureRequest) -> Path:
    return ORACLE / str(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    known = ~ours.isnan().any(-1)
    assert known.any()
    torch.testing.assert_close(ours[known], theirs[known], atol=ATOL, rtol=0)


@pytest.mark.parametrize("counts", [[1], [13, 1], [5], [16], [3, 16, 1, 1, 9]], ids=str)
def test_text_in_pieces(folder: Path, counts: list[int]) -> None:
    """Pieces of any length, across chunk borders (16, 32, 48) and temperature steps (7, 15, …)."""
    oracle = load_file(folder / "oracle.safetensors")
    ids = oracle["text.input_ids"][0].tolist()
    close(all_logits(load_decoder(folder), ids, counts), oracle["text.logits"][0])


def test_packed_batch(folder: Path) -> None:
    """Two sequences of different lengths in one packed batch equal each alone."""
    oracle = load_file(folder / "oracle.safetensors")
    mask = oracle["batch.attention_mask"].bool()
    rows = [oracle["batch.input_ids"][row][mask[row]].tolist() for row in range(2)]
    stepper = Stepper(load_decoder(folder), rows)
    expected = [oracle["batch.logits"][0], oracle["batch.row1_alone.logits"][0]]
    seen = set()
    while any(request.num_computed < request.num_known for request in stepper.requests):
        counts = {row: 7 for row, r in enumerate(stepper.requests) if r.num_computed < r.num_known}
        output = stepper.step(counts)
        for logits, sample in zip(output.logits_SV, output.samples, strict=True):
            row = list(counts)[sample]
            position = stepper.requests[row].num_computed - 1
            torch.testing.assert_close(logits, expected[row][position], atol=ATOL, rtol=0)
            seen.add(row)
    assert seen == {0, 1}


def test_greedy_continuation(folder: Path) -> None:
    oracle = load_file(folder / "oracle.safetensors")
    expected = oracle["greedy.output_ids"][0].tolist()
    stepper = Stepper(load_decoder(folder), [expected])
    [request] = stepper.requests
    request.token_ids = oracle["greedy.input_ids"][0].tolist()
    while len(request.token_ids) < len(expected):
        output = stepper.step({0: 32})
        if output.samples:
            request.token_ids.append(int(output.logits_SV[0].argmax()))
    assert request.token_ids == expected


def test_bfloat16_is_as_close_as_the_reference(folder: Path) -> None:
    oracle = load_file(folder / "oracle.safetensors")
    ids = oracle["text.input_ids"][0].tolist()
    ours = all_logits(load_decoder(folder, torch.bfloat16), ids, [1])
    truth, theirs = oracle["text.logits"][0], oracle["text.logits_bf16_eager"][0]
    assert (ours - truth).abs().median() <= 1.5 * (theirs - truth).abs().median()
    assert (ours.argmax(-1) == truth.argmax(-1)).float().mean() >= 0.9
