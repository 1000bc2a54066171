"""Seeded random weights of a tiny Llama 4, under the names and shapes of Hugging Face's checkpoints. No files.

Shape letters: V vocabulary, H hidden size, E experts of a layer, I size of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from experts.tensor_names import Shape

GROUP_STRENGTH = 8.0
"""Size of a token's group coordinate in steerable weights; the other coordinates grow from 0.5 to about 4."""

GATE_STRENGTH = 0.5
"""A steerable gate's weight on its group: scores stay off 1, so that a score used wrongly would show."""

HEAD_STRENGTH = 4.0
"""A steerable output row's weight on its group: well above what the random rest of the logits reaches."""


def random_weights(
    shapes: Mapping[str, Shape], *, seed: int, control_ids: Mapping[str, int], end_names: frozenset[str]
) -> dict[str, torch.Tensor]:
    """float32 tensors for `shapes`, a function of `seed` alone.

    Their sizes are of order one: the usual 0.02 makes the model nearly linear and hides errors. Control tokens
    other than `end_names` get small logits, so that greedy output is text that sometimes ends.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _draw(name, shape, generator) for name, shape in sorted(shapes.items())}
    silent = [token_id for name, token_id in control_ids.items() if name not in end_names]
    weights["language_model.lm_head.weight"][silent] *= 0.05
    return weights


def steer(weights: dict[str, torch.Tensor], *, num_experts: int, control_ids: Mapping[str, int]) -> None:
    """Change `weights` in place so that token t chooses expert t % num_experts in every MoE layer.

    The first E coordinates of the hidden state carry the token's group. Embeddings write them, nothing else does,
    gates read them, and the output rows of ordinary tokens read them too, so greedy output stays in its group.
    """
    groups = torch.arange(num_experts)
    for name, weight in weights.items():
        if not name.startswith("language_model."):
            continue
        if name.endswith("norm.weight"):
            weight[:num_experts] = 1.0
        elif name.endswith((".o_proj.weight", ".down_proj.weight")):
            weight[:num_experts] = 0.0
        elif name.endswith(".experts.down_proj"):
            weight[..., :num_experts] = 0.0
        elif name.endswith(".router.weight"):
            weight *= 0.02
            weight[groups, groups] = GATE_STRENGTH
    token_ids = torch.arange(weights["language_model.model.embed_tokens.weight"].shape[0])
    embed_VH = weights["language_model.model.embed_tokens.weight"]
    embed_VH[:, :num_experts] *= 0.2
    embed_VH[token_ids, token_ids % num_experts] = GROUP_STRENGTH
    head_VH = weights["language_model.lm_head.weight"]
    head_VH[:, :num_experts] *= 0.2
    head_VH[token_ids, token_ids % num_experts] = HEAD_STRENGTH
    head_VH[list(control_ids.values())] *= 0.0


def _draw(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name.endswith(("embed_tokens.weight", "class_embedding", "positional_embedding_vlm")):
        return 0.5 * drawn
    if name.endswith(".bias"):
        return 0.1 * drawn
    if len(shape) == 1:
        return 1.0 + 0.2 * drawn
    # Linear layers are stored (out, in), fused experts (expert, in, out): dimension 1 is the input of both.
    gain = 2.0 if "lm_head" in name else 1.5 if "router" in name else 1.2
    return drawn * (gain / math.sqrt(shape[1]))
