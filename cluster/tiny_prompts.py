"""How tiny checkpoints are prompted: chat templates, and how they want pictures cut. Knows no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.prompt.chat import LLAMA4_TEMPLATE

_GUARD_TEMPLATE = """\
{#- Puts a whole conversation into one user turn and asks whether its last message is safe. -#}
{%- set hazards = [
    ('S1', 'Violent Crimes'), ('S2', 'Non-Violent Crimes'), ('S3', 'Sex-Related Crimes'),
    ('S4', 'Child Sexual Exploitation'), ('S5', 'Defamation'), ('S6', 'Specialized Advice'), ('S7', 'Privacy'),
    ('S8', 'Intellectual Property'), ('S9', 'Indiscriminate Weapons'), ('S10', 'Hate'),
    ('S11', 'Suicide & Self-Harm'), ('S12', 'Sexual Content'), ('S13', 'Elections'),
    ('S14', 'Code Interpreter Abuse')
] %}
{%- set excluded = excluded_category_keys | default([], true) %}
{%- set seen = namespace(image=false) %}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('only messages of user and assistant can be judged') }}
    {%- endif %}
    {%- if message.content is not string %}
        {%- for part in message.content if part.type == 'image' %}
            {%- set seen.image = true %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- set judged = 'Agent' if messages[-1].role == 'assistant' else 'User' %}
{{- bos_token }}{{- '<|header_start|>user<|header_end|>\\n\\n' }}
{{- 'Task: Judge whether the last message of the ' + judged + ' in the conversation below holds unsafe content ' }}
{{- 'by the categories listed here.\\n\\n<BEGIN UNSAFE CONTENT CATEGORIES>\\n' }}
{%- for key, title in hazards if key not in excluded and not (key == 'S14' and seen.image) %}
    {{- key + ': ' + title + '.\\n' }}
{%- endfor %}
{{- '<END UNSAFE CONTENT CATEGORIES>\\n\\n<BEGIN CONVERSATION>\\n\\n' }}
{%- for message in messages %}
    {{- 'Agent: ' if message.role == 'assistant' else 'User: ' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- '<|image|>' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {#- A backslash and the letter n, as the released template writes them. -#}
    {{- '\\\\n\\n\\n' }}
{%- endfor %}
{{- '<END CONVERSATION>\\n\\nAnswer for the last message of the ' + judged + ' only:\\n' }}
{{- '- The first line is \\'safe\\' or \\'unsafe\\'.\\n' }}
{{- '- After \\'unsafe\\', a second line lists the categories, separated by commas.<|eot|>' }}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>' }}
{%- endif %}
"""
"""Llama Guard's kind of prompt in words of our own; no line break ends it, so answers begin with one."""


def chat_template(kind: str) -> str:
    """The chat template of checkpoints of `kind`."""
    return _GUARD_TEMPLATE if kind == "guard" else LLAMA4_TEMPLATE


def image_processor_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json beside a `vision_config`."""
    half = [0.5, 0.5, 0.5]
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": half,
        "max_patches": 16,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "resize_to_max_canvas": False,
        "size": {"height": vision["image_size"], "width": vision["image_size"]},
    }


def processor_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    """processor_config.json beside a `vision_config`."""
    return {
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
        "patch_size": vision["patch_size"],
        "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
        "processor_class": "Llama4Processor",
    }
