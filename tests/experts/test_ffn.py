"""One expert against the formula spelled out."""

from __future__ import annotations

import pytest
import torch

from experts.ffn import ExpertWeights, expert_ffn

H, F = 5, 3


def weights(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(2 * F, H, generator=generator).to(dtype)
    down = torch.randn(H, F, generator=generator).to(dtype)
    return ExpertWeights(gate_up_FH=gate_up, down_HF=down)


def spelled_out(expert: ExpertWeights, x_TH: torch.Tensor) -> torch.Tensor:
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for row, x in enumerate(x_TH.double()):
        for inner in range(F):
            gate = torch.dot(expert.gate_up_FH[inner].double(), x)
            up = torch.dot(expert.gate_up_FH[F + inner].double(), x)
            y_TH[row] += expert.down_HF[:, inner].double() * (gate * torch.sigmoid(gate) * up)
    return y_TH


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize(("dtype", "loose"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_equals_the_formula(num_rows: int, dtype: torch.dtype, loose: float) -> None:
    x_TH = torch.randn(num_rows, H, generator=torch.Generator().manual_seed(4)).to(dtype)
    y_TH = expert_ffn(weights(dtype), x_TH)
    assert y_TH.dtype == dtype
    torch.testing.assert_close(y_TH.double(), spelled_out(weights(dtype), x_TH), rtol=loose, atol=loose)


def test_counts_its_bytes() -> None:
    assert weights(torch.bfloat16).num_bytes == (2 * F * H + H * F) * 2
