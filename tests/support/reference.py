"""Random tiny checkpoints written and answered by transformers, to compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

CHUNK_LONGER_THAN_ANY_TEST = 1 << 16
NEAR_TIE = 1e-4
MAX_DRAWS = 20

Model = Llama4ForCausalLM | Llama4ForConditionalGeneration


def random_model(fields: dict[str, Any], seed: int) -> Llama4ForCausalLM:
    """A float32 text model with weights of order one: the default 0.02 makes it nearly linear and hides errors.

    An `attention_chunk_size` of None, which transformers cannot run, becomes a chunk longer than any sequence.
    """
    config = _text_config(fields)
    config._attn_implementation = "eager"
    return _filled(Llama4ForCausalLM(config), seed)


def random_multimodal(
    fields: dict[str, Any], vision: dict[str, Any], seed: int, **top: Any
) -> Llama4ForConditionalGeneration:
    """The same with a vision tower; `top` are fields beside text_config and vision_config."""
    config = Llama4Config(text_config=_text_config(fields), vision_config=Llama4VisionConfig(**vision), **top)
    config._attn_implementation = "eager"
    return _filled(Llama4ForConditionalGeneration(config), seed)


def _text_config(fields: dict[str, Any]) -> Llama4TextConfig:
    chunk = fields["attention_chunk_size"] or CHUNK_LONGER_THAN_ANY_TEST
    return Llama4TextConfig(**{**fields, "attention_chunk_size": chunk})


def _filled(model: Model, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and "patch_embedding" not in name:
                parameter.copy_(0.5 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                fan_in = parameter.shape[1]
                gain = 2.0 if "lm_head" in name or "projector" in name else 1.2
                parameter.copy_(noise * gain / math.sqrt(fan_in))
    return model.eval().float()


def clear_run(
    model: Model, draw: Callable[[], list[int]], pixel_values: torch.Tensor | None = None
) -> tuple[list[int], torch.Tensor]:
    """A drawn sequence in which no gate is nearly tied (there rounding may choose the expert), and its logits."""
    for _ in range(MAX_DRAWS):
        ids = draw()
        logits, gap = reference_run(model, ids, pixel_values)
        if gap >= NEAR_TIE:
            return ids, logits
    raise AssertionError("the gates of this model are tied whatever it reads")


def rounding_error(model: Model, ids: list[int]) -> float:
    """How far the reference's own logits move when each of its float32 weights moves by one rounding step: the
    answer that a few unlucky models (heads of two numbers that are both normalised, say) give is no sharper."""
    expected, _ = reference_run(model, ids)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + signs * torch.finfo(torch.float32).eps)
    moved, _ = reference_run(model, ids)
    return float((moved - expected).abs().max())


def reference_run(model: Model, ids: list[int], pixel_values: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Logits [T, V] of the whole sequence without a cache, and the smallest gap between a chosen and the best rejected
    expert over all tokens and layers; inf without any.

    Where the gap is tiny, rounding decides which expert a token takes, and two right answers may differ.
    """
    decoder = getattr(model, "language_model", model)
    config = decoder.config
    top_k, gaps = config.num_experts_per_tok, [math.inf]

    def note(_module: object, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        best = outputs[1].topk(top_k + 1, dim=-1).values
        gaps.append(float((best[:, top_k - 1] - best[:, top_k]).min()))

    watched = config.moe_layers if top_k < config.num_local_experts else ()
    hooks = [decoder.model.layers[layer].feed_forward.router.register_forward_hook(note) for layer in watched]
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False, **images).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, min(gaps)


def save(model: Model, folder: Path, **options: Any) -> Path:
    """Write the checkpoint as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


def rewrite_config(folder: Path, text: dict[str, Any], *, old_spelling: bool = False) -> None:
    """Put `text` into the saved text configuration (None values too), and spell the file as transformers 4 did."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.get("text_config", raw).update(text)
    if old_spelling:
        raw["torch_dtype"] = raw.pop("dtype")
        for part in (raw.get("text_config", raw), raw.get("vision_config")):
            if part is not None:
                _spell_as_v4(part)
    path.write_text(json.dumps(raw))


def _spell_as_v4(part: dict[str, Any]) -> None:
    rope = part.pop("rope_parameters")
    part["rope_theta"] = rope.pop("rope_theta")
    part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    part.pop("layer_types", None)
    if part.get("attn_temperature_tuning") is True:
        part["attn_temperature_tuning"] = 4
    if part.get("floor_scale") == 8192:
        del part["floor_scale"]
