"""The tensors that a checkpoint of a given config must hold: their names in HF's files, and their shapes.

The one table of them; whoever reads or checks a checkpoint asks here. Knows no files and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from experts.config import ModelConfig
from experts.vision_config import NUM_CHANNELS, VisionConfig

Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_tensors(config: ModelConfig) -> Mapping[str, Shape]:
    """Name → shape of every tensor of the checkpoint, as stored: trunk, routed experts and vision tower."""
    shapes = {config.tensor_prefix + name: shape for name, shape in _text(config)}
    if config.vision is not None:
        shapes |= dict(_vision(config.vision))
        shapes["multi_modal_projector.linear_1.weight"] = (config.hidden_size, config.vision.adapter_size)
    return shapes


def optional_tensors(config: ModelConfig) -> Mapping[str, Shape]:
    """The same of tensors that are used where a checkpoint has them: a head of its own wins over a tied one."""
    if not config.tie_word_embeddings:
        return {}
    return {config.tensor_prefix + HEAD: (config.vocab_size, config.hidden_size)}


def _text(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vocabulary = (config.vocab_size, config.hidden_size)
    yield EMBEDDING, vocabulary
    for layer in range(config.num_layers):
        for name, shape in _text_layer(config, is_moe=layer in config.moe_layers):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield HEAD, vocabulary


def _text_layer(config: ModelConfig, *, is_moe: bool) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (query, hidden)
    yield "self_attn.k_proj.weight", (key, hidden)
    yield "self_attn.v_proj.weight", (key, hidden)
    yield "self_attn.o_proj.weight", (hidden, query)
    yield "post_attention_layernorm.weight", (hidden,)
    if is_moe:
        num, size = config.num_experts, config.expert_size
        yield "feed_forward.router.weight", (num, hidden)
        # Routed experts are [in, out], gate columns before up columns; everything else is [out, in].
        yield "feed_forward.experts.gate_up_proj", (num, hidden, 2 * size)
        yield "feed_forward.experts.down_proj", (num, size, hidden)
        yield from _swiglu("feed_forward.shared_expert.", hidden, size)
    else:
        yield from _swiglu("feed_forward.", hidden, config.dense_size)


def _swiglu(prefix: str, hidden: int, size: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (size, hidden)
    yield prefix + "up_proj.weight", (size, hidden)
    yield prefix + "down_proj.weight", (hidden, size)


def _vision(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, between = config.hidden_size, config.adapter_size
    yield "vision_model.patch_embedding.linear.weight", (width, NUM_CHANNELS * config.patch_size**2)
    yield "vision_model.class_embedding", (width,)
    yield "vision_model.positional_embedding_vlm", (config.patches_per_side**2 + 1, width)
    yield from _with_bias("vision_model.layernorm_pre", (width,))
    for layer in range(config.num_layers):
        yield from _vision_layer(f"vision_model.model.layers.{layer}.", width, config.mlp_size)
    yield from _with_bias("vision_model.layernorm_post", (width,))
    yield "vision_model.vision_adapter.mlp.fc1.weight", (between, config.mlp_size)
    yield "vision_model.vision_adapter.mlp.fc2.weight", (between, between)


def _vision_layer(prefix: str, width: int, size: int) -> Iterator[tuple[str, Shape]]:
    yield from _with_bias(prefix + "input_layernorm", (width,))
    for part in "qkvo":
        yield from _with_bias(f"{prefix}self_attn.{part}_proj", (width, width))
    yield from _with_bias(prefix + "post_attention_layernorm", (width,))
    yield from _with_bias(prefix + "mlp.fc1", (size, width))
    yield from _with_bias(prefix + "mlp.fc2", (width, size))


def _with_bias(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", shape
    yield name + ".bias", shape[:1]
