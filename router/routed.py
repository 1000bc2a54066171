"""What travels between the decoder and whatever computes routed experts. Neither side knows the other.

Shape letters: T rows (tokens of a packed step), K experts per token, H hidden size, R = T · K rows to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experts.placement import ExpertKey


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The gate's choice for T tokens: `expert_TK` int64 expert indices, ascending per token, `score_TK` sigmoid
    scores in the model's dtype. Scores scale the expert's *input* row (Llama 4)."""

    expert_TK: torch.Tensor
    score_TK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The routed experts' sum per token, `y_TH` in the model's dtype.

    `lost` maps row indices whose experts were not available to the experts they wanted; those rows of `y_TH` are
    meaningless and must leave the step.
    """

    y_TH: torch.Tensor
    lost: dict[int, tuple[ExpertKey, ...]]


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """The rows of one dispatch, grouped by expert.

    `rows_RH` are the scaled input rows, all rows of `experts[0]` first, `counts[i]` rows per expert; `choice_R` says
    which (token, choice) = divmod(choice, K) each row belongs to.
    """

    rows_RH: torch.Tensor
    choice_R: torch.Tensor
    experts: tuple[int, ...]
    counts: tuple[int, ...]


def to_host(x_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
    """Rows and what was chosen for them in the host's memory, by a single copy."""
    if x_TH.device.type == "cpu":
        return x_TH, routing
    # The widest type first, so that each part is aligned to its own.
    parts = (routing.expert_TK, routing.score_TK, x_TH)
    expert_TK, score_TK, x_TH = unpack_bytes(pack_bytes(parts).cpu(), parts)
    return x_TH, Routing(expert_TK=expert_TK, score_TK=score_TK)


def pack_bytes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of all parts, uint8, one after the other."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def unpack_bytes(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Undo `pack_bytes`: views of `packed` in the shapes and types of `like`."""
    pieces = torch.split(packed, [part.nbytes for part in like])
    return [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, like, strict=True)]


def group_rows(x_TH: torch.Tensor, routing: Routing) -> RowGroups:
    """Scale every token's row by its scores and bring rows of one expert together, in token order."""
    num_choices = routing.expert_TK.shape[1]
    # Numpy: the host must know the counts anyway, and on few numbers each of torch's calls costs ten times as much.
    expert_R = routing.expert_TK.cpu().numpy().ravel()
    order_R = np.argsort(expert_R, kind="stable")
    count_E = np.bincount(expert_R)
    experts = np.flatnonzero(count_E)
    choice_R = torch.from_numpy(order_R).to(x_TH.device)
    token_R = choice_R if num_choices == 1 else choice_R // num_choices
    rows_RH = x_TH[token_R] * routing.score_TK.flatten()[choice_R][:, None]
    counts = count_E[experts].tolist()
    return RowGroups(rows_RH=rows_RH, choice_R=choice_R, experts=tuple(experts.tolist()), counts=tuple(counts))


def ungroup_rows(groups: RowGroups, y_RH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Undo `group_rows` for results: per token the sum of its experts' rows, in ascending expert order."""
    return sum_choices(groups.choice_R, y_RH, routing)


def sum_choices(choice_R: torch.Tensor, y_RH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The same for rows of which row i belongs to (token, choice) = divmod(`choice_R[i]`, K)."""
    num_tokens, num_choices = routing.expert_TK.shape
    y_choice_RH = torch.empty_like(y_RH).index_copy_(0, choice_R, y_RH)
    if num_choices == 1:
        return y_choice_RH
    parts_TKH = y_choice_RH.view(num_tokens, num_choices, -1)
    total_TH = parts_TKH[:, 0].float()
    for choice in range(1, num_choices):
        total_TH = total_TH + parts_TKH[:, choice]
    return total_TH.to(y_RH.dtype)
