"""Random tiny checkpoints written and answered by transformers, to compare with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

CHUNK_LONGER_THAN_ANY_TEST = 1 << 16


def random_model(fields: dict[str, Any], seed: int) -> Llama4ForCausalLM:
    """A float32 text model with weights of order one: the default 0.02 makes it nearly linear and hides errors.

    An `attention_chunk_size` of None, which transformers cannot run, becomes a chunk longer than any sequence.
    """
    fields = {**fields, "attention_chunk_size": fields["attention_chunk_size"] or CHUNK_LONGER_THAN_ANY_TEST}
    config = Llama4TextConfig(**fields)
    config._attn_implementation = "eager"
    model = Llama4ForCausalLM(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[1]
                parameter.copy_(noise * (2.0 if "lm_head" in name else 1.2) / math.sqrt(fan_in))
    return model


def reference_logits(model: Llama4ForCausalLM, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of the whole sequence without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def gate_gaps(model: Llama4ForCausalLM, ids: list[int]) -> float:
    """The smallest gap between a chosen and the best rejected expert over all tokens and layers; inf without any.

    Where it is tiny, rounding decides which expert a token takes, and two right answers may differ.
    """
    top_k, num = model.config.num_experts_per_tok, model.config.num_local_experts
    if not model.config.moe_layers or top_k >= num:
        return math.inf
    gaps = []

    def note(_module: object, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        best = outputs[1].topk(top_k + 1, dim=-1).values
        gaps.append(float((best[:, top_k - 1] - best[:, top_k]).min()))

    hooks = [
        model.model.layers[layer].feed_forward.router.register_forward_hook(note) for layer in model.config.moe_layers
    ]
    reference_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def save(model: Llama4ForCausalLM, folder: Path, **options: Any) -> Path:
    """Write the checkpoint as transformers does."""
    model.save_pretrained(folder, **options)
    return folder
