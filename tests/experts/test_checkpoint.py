"""Tensors that would be read wrongly are refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.checkpoint import Checkpoint
from experts.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_in_their_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.arange(6).reshape(2, 3).to(dtype)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("w", (2, 3)), weight)
    assert torch.equal(checkpoint.row("w", 1, (2, 3)), weight[1])


@pytest.mark.parametrize(
    ("dtypes", "computed"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float32), torch.float16),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64, torch.bfloat16), torch.float32),
    ],
)
def test_the_type_of_most_weights_is_that_of_the_checkpoint(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype], computed: torch.dtype
) -> None:
    many, few = dtypes
    save_file({"many": torch.ones(8, dtype=many), "few": torch.ones(1, dtype=few)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).dtype() is computed


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
def test_codes_of_quantized_weights_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w: expected a dtype of F64, F32, BF16, F16, found"):
        checkpoint.tensor("w", (2, 3))
    with pytest.raises(CheckpointError, match="quantized"):
        checkpoint.row("w", 0, (2, 3))
