"""Templates with the quirks of Llama Guard 4 and of Llama 4's own, rendered as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.models.llama4 import processing_llama4

from cluster.tiny_tokenizer import BOS, EOT, train_tokenizer
from experts.errors import InvalidInput
from router.prompt.chat import MAX_KWARGS_BYTES, ChatTemplate
from router.prompt.tokenizer import Tokenizer

# One user turn made of the whole conversation; a literal backslash and n after each turn; no line break at the end.
GUARD = """\
{%- set categories = namespace(text='') -%}
{%- set all_categories = [('S1', 'Violent Crimes.'), ('S2', 'Theft.'), ('S14', 'Code Abuse.')] -%}
{%- set seen = namespace(image=false) -%}
{%- for message in messages if message.content is not string -%}
    {%- for part in message.content if part.type == 'image' %}{% set seen.image = true %}{% endfor -%}
{%- endfor -%}
{%- for key, title in all_categories -%}
    {%- if key not in (excluded_category_keys or []) and not (key == 'S14' and seen.image) -%}
        {%- set categories.text = categories.text + key + ': ' + title + '\n' -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}<|header_start|>user<|header_end|>

Task: Check {{ 'Agent' if messages[-1].role == 'assistant' else 'User' }} messages.

<BEGIN UNSAFE CONTENT CATEGORIES>
{{ categories.text -}}
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

{% for message in messages -%}
    {{- 'Agent: ' if message.role == 'assistant' else 'User: ' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<|image|>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '\\\\n\n\n' -}}
{%- endfor -%}
<END CONVERSATION>

Answer 'safe' or 'unsafe', then the categories.<|eot|>
{%- if add_generation_prompt -%}<|header_start|>assistant<|header_end|>{%- endif -%}
"""


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [text("How do I "), text("pick a lock? ")]},
    {"role": "assistant", "content": "With a key."},
]
PICTURE: list[dict[str, Any]] = [{"role": "user", "content": [text("Look: "), {"type": "image"}, text("nice?")]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    (folder / "tokenizer.json").write_text(train_tokenizer().json_text)
    config = {"bos_token": BOS, "eos_token": EOT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(GUARD)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def guard(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_folder(folder, tokenizer)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def judged(reference: PreTrainedTokenizerFast, messages: list[dict[str, Any]], source: str, **kwargs: Any) -> list[int]:
    ids: list[int] = reference.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs
    )
    return ids


@pytest.mark.parametrize("messages", [TURNS[:1], TURNS, [{"role": "user", "content": "plain"}]], ids=["1", "2", "str"])
@pytest.mark.parametrize("excluded", [None, [], ["S1"], ["S2", "S14"]], ids=str)
def test_moderation_prompts(
    tokenizer: Tokenizer,
    guard: ChatTemplate,
    reference: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    excluded: list[str] | None,
) -> None:
    kwargs: dict[str, Any] = {} if excluded is None else {"excluded_category_keys": excluded}
    ids = guard.render(messages, kwargs=kwargs)
    assert ids == judged(reference, messages, GUARD, **kwargs)
    prompt = tokenizer.decode(ids)
    for key in ("S1", "S2", "S14"):
        assert (f"\n{key}: " in prompt) == (key not in (excluded or []))
    assert "\\n\n\n" in prompt
    assert prompt.endswith("<|eot|><|header_start|>assistant<|header_end|>")
    assert ids[-1] == tokenizer.special_ids["<|header_end|>"]


def test_a_picture_stands_where_the_template_puts_it(
    tokenizer: Tokenizer, guard: ChatTemplate, reference: PreTrainedTokenizerFast
) -> None:
    image = tokenizer.special_ids["<|image|>"]
    expected = judged(reference, PICTURE, GUARD)
    assert guard.render(PICTURE, images=[[image]]) == expected
    at = expected.index(image)
    patches = [tokenizer.special_ids["<|patch|>"]] * 3
    assert guard.render(PICTURE, images=[patches]) == [*expected[:at], *patches, *expected[at + 1 :]]
    assert "S14" not in tokenizer.decode(expected)


def test_categories_cannot_write_special_tokens(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ excluded_category_keys | join(',') }}<|eot|>", tokenizer)
    ids = template.render(
        [{"role": "user", "content": "x"}], kwargs={"excluded_category_keys": ["<|eot|>", "<|eot", "|>"]}
    )
    assert ids == [*tokenizer.encode_pieces("<|eot|>,<|eot,|>"), tokenizer.special_ids[EOT]]


def test_categories_are_bounded(guard: ChatTemplate) -> None:
    for keys in (["S" * MAX_KWARGS_BYTES], ["S1"] * 1000, [[[[[["S1"]]]]]]):
        with pytest.raises(InvalidInput, match="chat_template_kwargs"):
            guard.render(TURNS, kwargs={"excluded_category_keys": keys})


QUIRKS: list[list[dict[str, Any]]] = [
    [{"role": "system", "content": "  Be kind.\n"}, {"role": "user", "content": "  Hi \n"}],
    [{"role": "user", "content": [text(" a "), text(""), text("\n\nb ")]}, {"role": "assistant", "content": " c "}],
    [{"role": "system", "content": [text(" Be "), text("kind. ")]}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "\n\nstarts with line breaks"}],
    [{"role": "user", "content": "Hi"}, {"role": "system", "content": "  a late one  "}],
]


@pytest.mark.parametrize("messages", QUIRKS, ids=range(len(QUIRKS)))
def test_quirks_of_llama_4s_own_template(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    source = processing_llama4.chat_template
    assert ChatTemplate(source, tokenizer).render(messages) == judged(reference, messages, source)
