"""Writes tiny checkpoints in Hugging Face's form: Llama 4 in everything but size, with random weights. Offline.

A few megabytes of float32, for demos and tests. Knows nothing of serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cluster.tiny_prompts import chat_template, image_processor_config, processor_config
from cluster.tiny_tokenizer import BOS, EOM, EOS, EOT, PAD, TinyTokenizer, train_tokenizer
from cluster.tiny_weights import random_weights, steer
from experts.config import parse_config
from experts.errors import InvalidInput
from experts.tensor_names import expected_tensors
from router.prompt.images.processor_config import IMAGE_FILE, PROCESSOR_FILE
from router.prompt.template_files import TEMPLATE_FILE
from router.prompt.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE

KINDS = ("scout", "maverick", "guard")
MAX_SEED = 2**63 - 1
STEERING_FILE = "steering.json"

_TEXT: dict[str, Any] = {
    "attention_bias": False,
    # Small, so that short prompts cross chunk borders and temperature steps.
    "attention_chunk_size": 64,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 32,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "max_position_embeddings": 8192,
    "model_type": "llama4_text",
    "no_rope_layer_interval": 4,
    "num_attention_heads": 6,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}

_KINDS: dict[str, dict[str, Any]] = {
    "scout": {
        "interleave_moe_layer_step": 1,
        "num_local_experts": 8,
        "use_qk_norm": True,
        "rope_parameters": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        },
    },
    "maverick": {
        "interleave_moe_layer_step": 2,
        "num_local_experts": 16,
        "use_qk_norm": False,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
    # Dense, every layer rotates and sees everything before it.
    "guard": {
        "attention_chunk_size": None,
        "interleave_moe_layer_step": 0,
        "intermediate_size": 96,
        "no_rope_layer_interval": 12,
        "num_hidden_layers": 4,
        "num_local_experts": 0,
        "use_qk_norm": True,
        "rope_parameters": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        },
    },
}

_VISION: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 56,
    "initializer_range": 0.02,
    # The adapter reads hidden_size / pixel_shuffle_ratio².
    "intermediate_size": 128,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 48,
}


def make_tiny(kind: str, out: Path, *, seed: int = 0, shards: int = 2, steerable: bool = False) -> None:
    """Write a checkpoint of `kind` ("scout", "maverick" or "guard") into the new or empty folder `out`.

    The same seed gives byte-identical files on one version of Python and of the libraries. `shards` is the number
    of safetensors files. With `steerable`, tokens choose experts (token id modulo the number of experts, in every
    MoE layer) and steering.json lists words for each expert. Raises InvalidInput: "kind", "seed", "shards",
    "steerable", "dir".
    """
    if kind not in KINDS:
        raise InvalidInput("kind", kind, f"must be one of {', '.join(KINDS)}")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput("seed", seed, f"must lie between 0 and {MAX_SEED}")
    if steerable and not _KINDS[kind]["num_local_experts"]:
        raise InvalidInput("steerable", steerable, f"needs a kind with experts, and {kind} has none")
    tokenizer = train_tokenizer()
    config = _config(kind, tokenizer.control_ids)
    shapes = expected_tensors(parse_config(config))
    if not 1 <= shards <= len(shapes):
        raise InvalidInput("shards", shards, f"must lie between 1 and {len(shapes)}, the number of tensors")
    _claim_folder(out)
    weights = random_weights(shapes, seed=seed, control_ids=tokenizer.control_ids, end_names=frozenset((EOS, EOM, EOT)))
    num_experts = config["text_config"]["num_local_experts"]
    if steerable:
        steer(weights, num_experts=num_experts, control_ids=tokenizer.control_ids)
        _write_json(out / STEERING_FILE, _steering(tokenizer, num_experts))
    _write_prompt_files(out, kind, tokenizer, config["text_config"]["max_position_embeddings"])
    _write_json(out / IMAGE_FILE, image_processor_config(_VISION))
    _write_json(out / PROCESSOR_FILE, processor_config(_VISION))
    _write_shards(out, weights, shards)
    _write_json(out / "generation_config.json", _generation_config(tokenizer.control_ids))
    _write_json(out / "config.json", config)


def _config(kind: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json in the spelling of transformers 5, computed lists written out."""
    ends = {"bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[EOM], ids[EOT]], "pad_token_id": ids[PAD]}
    text = {**_TEXT, **_KINDS[kind], **ends, "vocab_size": max(ids.values()) + 1}
    layers = range(text["num_hidden_layers"])
    step, interval = text["interleave_moe_layer_step"], text["no_rope_layer_interval"]
    text["moe_layers"] = list(layers[step - 1 :: step]) if step else []
    text["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in layers]
    text["layer_types"] = [
        "chunked_attention" if uses_rope else "full_attention" for uses_rope in text["no_rope_layers"]
    ]
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        **ends,
        "boi_token_index": ids["<|image_start|>"],
        "dtype": "float32",
        "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": ids["<|patch|>"],
        "model_type": "llama4",
        "text_config": dict(sorted(text.items())),
        "tie_word_embeddings": False,
        "vision_config": _VISION,
    }


def _generation_config(ids: Mapping[str, int]) -> dict[str, Any]:
    """What the instruct models recommend."""
    return {
        "bos_token_id": ids[BOS],
        "do_sample": True,
        "eos_token_id": [ids[EOS], ids[EOM], ids[EOT]],
        "pad_token_id": ids[PAD],
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _steering(tokenizer: TinyTokenizer, num_experts: int) -> dict[str, Any]:
    words: dict[int, list[str]] = {expert: [] for expert in range(num_experts)}
    for token_id, word in tokenizer.words.items():
        words[token_id % num_experts].append(word)
    return {
        "rule": "token id modulo num_experts is the expert of a token in every MoE layer",
        "usage": "write each word with a space before it; every word is one token",
        "num_experts": num_experts,
        "words": {str(expert): found for expert, found in words.items()},
    }


def _claim_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_empty = next(out.iterdir(), None) is None
    except OSError as error:
        rule = f"must be a folder that can be written ({error.strerror or type(error).__name__})"
        raise InvalidInput("dir", str(out), rule) from error
    if not is_empty:
        raise InvalidInput("dir", str(out), "must be a new or empty folder")


def _write_prompt_files(out: Path, kind: str, tokenizer: TinyTokenizer, max_length: int) -> None:
    named = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    settings = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / TOKENIZER_FILE).write_text(tokenizer.json_text, encoding="utf-8")
    (out / TEMPLATE_FILE).write_text(chat_template(kind), encoding="utf-8")
    _write_json(out / CONFIG_FILE, settings)
    _write_json(out / "special_tokens_map.json", named)


def _write_shards(out: Path, weights: Mapping[str, torch.Tensor], num_shards: int) -> None:
    """`num_shards` safetensors files of about equally many tensors, and their index."""
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        members = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: weights[name] for name in members}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    num_values = sum(weight.numel() for weight in weights.values())
    metadata = {"total_parameters": num_values, "total_size": 4 * num_values}
    _write_json(out / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
