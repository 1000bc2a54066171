"""Seeded random weights of a tiny Llama 4, under the names and shapes of Hugging Face's checkpoints. No files.

Shape letters: V vocabulary, H hidden size, E experts of a layer, I size of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Shape = tuple[int, ...]

GROUP_STRENGTH = 8.0
"""Size of a token's group coordinate in steerable weights; the other coordinates grow from 0.5 to about 4."""

GATE_STRENGTH = 0.5
"""A steerable gate's weight on its group: scores stay off 1, so that a score used wrongly would show."""

HEAD_STRENGTH = 4.0
"""A steerable output row's weight on its group: well above what the random rest of the logits reaches."""


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name → shape of every tensor of a checkpoint with this config.json, sorted by name."""
    text, vision = config["text_config"], config["vision_config"]
    shapes = {
        "language_model.model.embed_tokens.weight": (text["vocab_size"], text["hidden_size"]),
        "language_model.model.norm.weight": (text["hidden_size"],),
        "language_model.lm_head.weight": (text["vocab_size"], text["hidden_size"]),
        "multi_modal_projector.linear_1.weight": (text["hidden_size"], vision["vision_output_dim"]),
    }
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _decoder_layer(text, layer)}
    shapes |= {"vision_model." + name: shape for name, shape in _vision_tower(vision)}
    return dict(sorted(shapes.items()))


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


def _decoder_layer(text: Mapping[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, head_dim = text["hidden_size"], text["head_dim"]
    q_size, kv_size = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (q_size, hidden)
    yield "self_attn.k_proj.weight", (kv_size, hidden)
    yield "self_attn.v_proj.weight", (kv_size, hidden)
    yield "self_attn.o_proj.weight", (hidden, q_size)
    if layer in text["moe_layers"]:
        num_experts, size = text["num_local_experts"], text["intermediate_size"]
        yield "feed_forward.router.weight", (num_experts, hidden)
        yield "feed_forward.experts.gate_up_proj", (num_experts, hidden, 2 * size)
        yield "feed_forward.experts.down_proj", (num_experts, size, hidden)
        yield from _swiglu("feed_forward.shared_expert.", hidden, size)
    else:
        yield from _swiglu("feed_forward.", hidden, text["intermediate_size_mlp"])


def _swiglu(prefix: str, hidden: int, size: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (size, hidden)
    yield prefix + "up_proj.weight", (size, hidden)
    yield prefix + "down_proj.weight", (hidden, size)


def _vision_tower(vision: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, size = vision["hidden_size"], vision["intermediate_size"]
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    yield "patch_embedding.linear.weight", (hidden, vision["num_channels"] * vision["patch_size"] ** 2)
    yield "class_embedding", (hidden,)
    yield "positional_embedding_vlm", (num_patches + 1, hidden)
    yield from _with_bias("layernorm_pre", (hidden,))
    yield from _with_bias("layernorm_post", (hidden,))
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from _with_bias(f"{prefix}self_attn.{part}", (hidden, hidden))
        yield from _with_bias(f"{prefix}mlp.fc1", (size, hidden))
        yield from _with_bias(f"{prefix}mlp.fc2", (hidden, size))
        yield from _with_bias(f"{prefix}input_layernorm", (hidden,))
        yield from _with_bias(f"{prefix}post_attention_layernorm", (hidden,))
    yield "vision_adapter.mlp.fc1.weight", (vision["projector_input_dim"], size)
    yield "vision_adapter.mlp.fc2.weight", (vision["projector_output_dim"], vision["projector_input_dim"])


def _with_bias(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


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
