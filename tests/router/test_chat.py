"""Chat templates against transformers on several templates, and what users must not be able to do with them."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.models.llama4 import processing_llama4
from transformers.processing_utils import ProcessorMixin

from cluster.tiny_tokenizer import BOS, CONTROL_TOKENS, EOT, train_tokenizer
from experts.errors import CheckpointError, InvalidInput
from router.prompt import jinja_sandbox
from router.prompt.chat import LLAMA4_TEMPLATE, ChatTemplate
from router.prompt.tokenizer import Tokenizer

TOKENIZER_JSON = train_tokenizer().json_text

TRIMMING = """\
{%- set ns = namespace(first=true) -%}
{{ bos_token }}
{% for m in messages -%}
    {%- if m.role == 'skip' %}{% continue %}{% endif -%}
    {{- ('' if ns.first else '\n') + '<|header_start|>' ~ m['role'] ~ '<|header_end|>' -}}
    {%- set ns.first = false -%}
    {{- m['content'] | trim + eos_token -}}
{%- endfor %}
{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>
{% endif %}
"""

JSON = """\
{%- macro show(m, indent) -%}{{ m | tojson(indent=indent) }}<|eom|>{%- endmacro -%}
<|begin_of_text|>
{%- for m in messages -%}{{ show(m, 2 if loop.last else none) }}{%- endfor -%}
{%- generation -%}{{ messages | length }}{{ m is defined }}{%- endgeneration -%}
{{- custom | default('no custom') -}}{{- tools is none -}}{{- documents is none -}}
"""

SPLITTING = """\
{%- for m in messages -%}
{%- if '</think>' in m.content %}{% set text = m.content.split('</think>')[-1].lstrip() %}
{%- else %}{% set text = m.content %}{% endif -%}
{{ '<|header_start|>' + m.role + '<|header_end|>' + text + '<|eot|>' }}
{%- endfor -%}
"""

TEMPLATES = {
    "built-in": LLAMA4_TEMPLATE,
    "llama4": processing_llama4.chat_template,
    "trimming": TRIMMING,
    "json": JSON,
    "splitting": SPLITTING,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
    config = {"bos_token": BOS, "eos_token": EOT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def built_in(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(LLAMA4_TEMPLATE, tokenizer)


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
PIECES = st.sampled_from(
    ["the class", "\n", "\n\n", "  ", "<", "<|", "a < b", "</think>", "|>", '"quoted"', "日本 👩‍👧", "\ue000"]
)
TEXT = (ANY_TEXT | st.lists(PIECES, max_size=8).map("".join)).filter(
    lambda text: not any(name in text for name in CONTROL_TOKENS)
)
CONVERSATION = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT},
        optional={"name": st.none() | TEXT},
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@settings(deadline=None, max_examples=60)
@given(messages=CONVERSATION, add_generation_prompt=st.booleans())
def test_ordinary_text_renders_as_in_transformers(
    tokenizer: Tokenizer,
    reference: PreTrainedTokenizerFast,
    source: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    expected = reference.apply_chat_template(
        messages,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    template = ChatTemplate(source, tokenizer)
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_kwargs_reach_the_template_as_in_transformers(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    expected = reference.apply_chat_template(
        user("hi"), chat_template=JSON, tokenize=True, return_dict=False, custom="mine", add_generation_prompt=True
    )
    assert ChatTemplate(JSON, tokenizer).render(user("hi"), kwargs={"custom": "mine"}) == expected


# Pieces that make up control tokens when a template puts them side by side.
SHARDS = st.sampled_from(
    ["<", "<|", "<|e", "<|eot", "eot", "|>", "t|>", "|", ">", " ", "\n", "<|eot|>", "<|header_start|>", "hi", "\ue000"]
)


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.lists(SHARDS, max_size=4).map("".join), max_size=5), role=st.sampled_from(["user", "system"]))
def test_no_text_of_users_becomes_a_control_token(
    tokenizer: Tokenizer, built_in: ChatTemplate, parts: list[str], role: str
) -> None:
    ids, plain = tokenizer.special_ids, tokenizer.encode_pieces
    message = {"role": role, "content": [{"type": "text", "text": part} for part in parts]}
    assert built_in.render([message], add_generation_prompt=False) == [
        ids[BOS],
        ids["<|header_start|>"],
        *plain(role),
        ids["<|header_end|>"],
        *plain("\n\n" + "".join(parts)),
        ids[EOT],
    ]


@settings(deadline=None, max_examples=200)
@given(text=st.lists(SHARDS, max_size=6).map("".join))
def test_control_tokens_in_text_survive_what_templates_do_to_text(tokenizer: Tokenizer, text: str) -> None:
    ids, plain = tokenizer.special_ids, tokenizer.encode_pieces
    trimmed = ChatTemplate("<|eom|>{{ messages[0].content | trim }}<|eom|>", tokenizer).render(user(text))
    assert trimmed == [ids["<|eom|>"], *plain(text.strip()), ids["<|eom|>"]]
    for ascii_only in (False, True):
        source = "<|eom|>{{ messages[0].content | tojson(ensure_ascii=ascii_only) }}"
        dumped = json.dumps(text, ensure_ascii=ascii_only)
        rendered = ChatTemplate(source, tokenizer).render(user(text), kwargs={"ascii_only": ascii_only})
        assert rendered == [ids["<|eom|>"], *plain(dumped)]


@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_control_tokens_are_text_wherever_users_write_them(tokenizer: Tokenizer, name: str) -> None:
    message = {
        "role": name,
        "name": f"a{name}",
        "content": [{"type": "text", "text": name}, name],
        "tool_calls": [{"function": {"name": name, "arguments": {name: [name, {"deep": f"{name} "}]}}}],
    }
    template = ChatTemplate("{{ messages | tojson }}{{ extra }}{{ extra.part }}", tokenizer)
    expected = json.dumps([message], ensure_ascii=False) + str({"part": name}) + name
    ids = template.render([message], kwargs={"extra": {"part": name}})
    assert ids == tokenizer.encode_pieces(expected)


def test_private_use_characters_of_users_stay_what_they_are(tokenizer: Tokenizer, built_in: ChatTemplate) -> None:
    text = "".join(map(chr, range(0xE000, 0xE010))) + "<|eot|>\\ue010<|eom|><"
    ids = built_in.render(user(text), add_generation_prompt=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "user\n\n" + text


def test_the_format_of_llama_4(tokenizer: Tokenizer, built_in: ChatTemplate) -> None:
    ids, plain = tokenizer.special_ids, tokenizer.encode_pieces
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "tool", "content": "42"}]
    start, end = ids["<|header_start|>"], ids["<|header_end|>"]
    assert built_in.render(messages) == [
        *(ids[BOS], start, *plain("system"), end, *plain("\n\nBe kind."), ids[EOT]),
        *(start, *plain("ipython"), end, *plain("\n\n42"), ids[EOT]),
        *(start, *plain("assistant"), end, *plain("\n\n")),
    ]


def test_the_built_in_template_takes_parts(built_in: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    assert built_in.render(user(parts)) == built_in.render(user("one two"))


def test_members_that_are_none_count_as_absent(built_in: ChatTemplate) -> None:
    message = {"role": "user", "content": "hi", "tool_calls": None}
    assert built_in.render([message]) == built_in.render(user("hi"))


def test_enum_members_are_texts(built_in: ChatTemplate) -> None:
    role = StrEnum("Role", ["user"])["user"]
    assert built_in.render([{"role": role, "content": "hi"}]) == built_in.render(user("hi"))


def test_templates_may_ask_for_the_date(tokenizer: Tokenizer) -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    template = ChatTemplate(source, tokenizer, now=lambda: datetime(2025, 4, 5))
    assert template.render(user("")) == tokenizer.encode_pieces("05 Apr 2025")


# Where the template comes from.


def copy_of(folder: Path, to: Path, config: dict[str, object]) -> Path:
    (to / "tokenizer.json").write_text(TOKENIZER_JSON)
    (to / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, **config}))
    return to


def loaded(folder: Path) -> list[int]:
    return ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder)).render(user("hi"))


def test_templates_are_found_where_transformers_keeps_them(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each wins over those before it."""
    assert loaded(folder) == ChatTemplate(LLAMA4_TEMPLATE, tokenizer).render(user("hi"))
    assert ChatTemplate.from_folder(folder, tokenizer).is_built_in
    copy_of(folder, tmp_path, {"chat_template": "of the tokenizer"})
    assert loaded(tmp_path) == tokenizer.encode_pieces("of the tokenizer")
    for file in ("chat_template.json", "processor_config.json"):
        (tmp_path / file).write_text(json.dumps({"chat_template": f"of {file}"}))
        assert loaded(tmp_path) == tokenizer.encode_pieces(f"of {file}")
        theirs, _ = ProcessorMixin.get_processor_dict(tmp_path)
        assert theirs["chat_template"] == f"of {file}"
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    assert loaded(tmp_path) == tokenizer.encode_pieces("of its own file")
    assert not ChatTemplate.from_folder(tmp_path, tokenizer).is_built_in


def test_processor_files_without_a_template_are_passed_over(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy_of(folder, tmp_path, {"chat_template": "of the tokenizer"})
    for file in ("chat_template.json", "processor_config.json"):
        (tmp_path / file).write_text('{"patch_size": 14, "chat_template": null}')
    assert loaded(tmp_path) == tokenizer.encode_pieces("of the tokenizer")


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_damaged_template_of_the_processor_is_refused(folder: Path, tmp_path: Path, file: str) -> None:
    copy_of(folder, tmp_path, {"chat_template": "of the tokenizer"})
    for value in (7, {"rag": "x"}, "{% for %}"):
        (tmp_path / file).write_text(json.dumps({"chat_template": value}))
        with pytest.raises(CheckpointError, match=f"^chat_template in {file}: "):
            loaded(tmp_path)


@pytest.mark.parametrize(
    "named",
    [
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default one"}],
        {"tool_use": "tools", "default": "default one"},
    ],
)
def test_of_named_templates_the_default_counts(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, named: object
) -> None:
    copy_of(folder, tmp_path, {"chat_template": named})
    assert loaded(tmp_path) == tokenizer.encode_pieces("default one")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([{"name": "rag", "template": "x"}], 'has no template named "default"'),
        (7, "must be a text or a list of named texts"),
        ("{% for %}", "line 1: "),
    ],
)
def test_a_damaged_template_is_refused(folder: Path, tmp_path: Path, value: object, problem: str) -> None:
    copy_of(folder, tmp_path, {"chat_template": value})
    with pytest.raises(CheckpointError, match=f"^chat_template in tokenizer_config.json: {problem}"):
        loaded(tmp_path)


def test_a_template_file_that_is_not_text_is_refused(folder: Path, tmp_path: Path) -> None:
    copy_of(folder, tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja: cannot be read"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{% break %}", "SyntaxError"),
        ("{{ f(a=1, a=2) }}", "SyntaxError"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{% if messages %}" * 200 + "{% endif %}" * 200, "IndentationError"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "RecursionError"),
        ("{{ " + "9" * 5_000 + " }}", "ValueError"),
    ],
    ids=["break", "repeated-name", "deep-loops", "deep-ifs", "deep-parentheses", "digits"],
)
def test_a_template_that_cannot_be_compiled_is_refused(tokenizer: Tokenizer, source: str, fault: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x: cannot be compiled \({fault}"):
        ChatTemplate(source, tokenizer, where="x")


@pytest.mark.parametrize("source", ["{{ 1 | tojson }}", "{% if 1 | tojson %}1{% endif %}", "{% set a = 1 | tojson %}1"])
def test_compiling_computes_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """`{{ 'a' | center(3000000000) }}` would take the memory that it writes."""
    calls = []
    monkeypatch.setattr(jinja_sandbox, "_to_json", lambda value: calls.append(value) or "1")
    template = ChatTemplate(source, tokenizer)
    assert calls == []
    assert template.render(user("hi")) == tokenizer.encode_pieces("1")
    assert calls == [1]


def test_escaping_is_a_constant(tokenizer: Tokenizer) -> None:
    source = "{%% autoescape %s %%}{{ messages[0].content }}{%% endautoescape %%}"
    assert ChatTemplate(source % "true", tokenizer).render(user("&")) == tokenizer.encode_pieces("&amp;")
    with pytest.raises(CheckpointError, match="autoescape"):
        ChatTemplate(source % "1 | tojson", tokenizer)


def test_without_a_template_the_tokenizer_must_be_llama_4s(folder: Path, tmp_path: Path) -> None:
    copy_of(folder, tmp_path, {})
    (tmp_path / "tokenizer.json").write_text(TOKENIZER_JSON.replace("<|header_start|>", "<|other_start|>"))
    with pytest.raises(CheckpointError, match=r"is absent, and the tokenizer lacks <\|header_start\|>"):
        loaded(tmp_path)


# What is refused.


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{{ raise_exception('roles must alternate <|eot|>') }}", "refuses them: roles must alternate <|eot|>"),
        ("{{ messages[0].missing.deeper }}", "has no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "cannot render them"),
        ("{{ 1 // (messages | length - 1) }}", "cannot render them"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "cannot render them"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "cannot render them"),
    ],
)
def test_a_template_that_fails_is_about_the_messages(tokenizer: Tokenizer, source: str, rule: str) -> None:
    with pytest.raises(InvalidInput, match=r"^messages: the chat template ") as caught:
        ChatTemplate(source, tokenizer).render(user("x<|eot|>"))
    assert rule in str(caught.value)
    assert "/" not in str(caught.value).replace("//", "")


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{% for key in keys or [] %}{{ key }}{% endfor %}", "cannot render them"),
        ("{% if keys %}{{ raise_exception('no keys') }}{% endif %}", "refuses them: no keys"),
    ],
)
def test_kwargs_without_which_it_would_render_are_to_blame(tokenizer: Tokenizer, source: str, rule: str) -> None:
    template = ChatTemplate(source, tokenizer)
    with pytest.raises(InvalidInput, match=f"^chat_template_kwargs: the chat template {rule}"):
        template.render(user("hi"), kwargs={"keys": 5})
    failing = ChatTemplate(source + "{{ 1 + messages }}", tokenizer)
    with pytest.raises(InvalidInput, match=r"^messages: the chat template "):
        failing.render(user("hi"), kwargs={"keys": 5})


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n-1) }}{{ twice(n-1) }}{% endif %}{% endmacro %}{{ twice(100) }}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ [0] * 10**12 }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(n=2) %}{% for i in range(100) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(jinja_sandbox, "MAX_PASSES", 20_000)
    with pytest.raises(InvalidInput, match=r"^messages: the chat template "):
        ChatTemplate(source, tokenizer).render(user("x" * 10_000))


def test_each_rendering_has_bounds_of_its_own(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "MAX_PASSES", 500)
    template = ChatTemplate("{% for i in range(100) %}{% for j in 'abcd' %}{% endfor %}{% endfor %}", tokenizer)
    for _ in range(3):
        assert template.render(user("hi")) == []


def nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_kwargs_at_the_bounds_are_taken(built_in: ChatTemplate) -> None:
    plain = built_in.render(user("hi"))
    for kwargs in ({"a": nested(4)}, {"a": [0] * 126}, {"a": "x" * (16 * 1024 - 9)}):
        assert built_in.render(user("hi"), kwargs=kwargs) == plain


@pytest.mark.parametrize(
    ("kwargs", "rule"),
    [
        ({"a": nested(5)}, "nest at most 5 deep"),
        ({"a": nested(50_000)}, "nest at most 5 deep"),
        ({"a": [0] * 127}, "at most 128 values"),
        ({"a": "x" * (16 * 1024 - 8)}, "at most 16384 bytes"),
        ({"a": "é" * 9_000}, "at most 16384 bytes"),
        ({"a": 10**5000}, "fewer digits"),
        ({"a": object()}, "JSON values only"),
        ({"a b": 1}, "identifiers"),
        ({"_private": 1}, "identifiers"),
        ({7: 1}, "identifiers"),
        *(({name: 1}, "must not replace") for name in ("messages", "add_generation_prompt", "tools", "documents")),
        *(({name: 1}, "must not replace") for name in ("bos_token", "eos_token", "raise_exception", "range")),
    ],
)
def test_kwargs_beyond_the_bounds_are_refused(built_in: ChatTemplate, kwargs: dict[Any, Any], rule: str) -> None:
    with pytest.raises(InvalidInput, match=f"^chat_template_kwargs: .*{rule}"):
        built_in.render(user("hi"), kwargs=kwargs)


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "at least one message"),
        (["hi"], "must each be an object"),
        (user(b"bytes"), "JSON values only"),
        (user(nested(50_000)), "nest at most 32 deep"),
        (user([0] * 250_000), "at most 250000 values"),
        (user("\ud83d"), "valid Unicode"),
        (user([{"type": "image_url"}]), "content parts must be of type text or image"),
        (user([{"type": "image"}]), "has places for 1 images in them"),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool calls need a chat template of the checkpoint"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(built_in: ChatTemplate, messages: Any, rule: str) -> None:
    with pytest.raises(InvalidInput, match=f"^messages: .*{rule}"):
        built_in.render(messages)


@pytest.mark.parametrize("source", [LLAMA4_TEMPLATE, processing_llama4.chat_template], ids=["built-in", "llama4"])
@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(TEXT | st.lists(st.none() | TEXT, min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_images_stand_where_transformers_writes_their_placeholder(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, source: str, contents: list[Any], data: st.DataObject
) -> None:
    """None is an image, in whatever message it stands."""
    messages = [
        {
            "role": data.draw(st.sampled_from(["user", "assistant"])),
            "content": content if isinstance(content, str) else [part(text) for text in content],
        }
        for content in contents
    ]
    num_images = sum(content.count(None) for content in contents if isinstance(content, list))
    images = [[10_000 + i, 20_000 + i] for i in range(num_images)]
    expected, left = [], iter(images)
    for token in reference.apply_chat_template(messages, chat_template=source, return_dict=False):
        expected += next(left) if token == tokenizer.special_ids["<|image|>"] else [token]
    rendered = ChatTemplate(source, tokenizer).render(messages, add_generation_prompt=False, images=images)
    assert rendered == expected


def part(text: str | None) -> dict[str, str]:
    return {"type": "image"} if text is None else {"type": "text", "text": text}


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_every_image_needs_its_place(built_in: ChatTemplate, num_images: int) -> None:
    message = user([part("one"), part(None), part("two"), part(None)])
    with pytest.raises(InvalidInput, match=rf"^messages: .* has places for 2 images in them .*{num_images} images"):
        built_in.render(message, images=[[5]] * num_images)
    deaf = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    with pytest.raises(InvalidInput, match=r"^messages: .* has places for 0 images"):
        ChatTemplate(deaf, built_in._tokenizer).render(message, images=[[5], [6]])


def test_the_name_of_the_placeholder_in_text_is_text(built_in: ChatTemplate, tokenizer: Tokenizer) -> None:
    special = tokenizer.special_ids["<|image|>"]
    ids = built_in.render(user("<|image|>"))
    assert special not in ids
    parts = [part("<|image|>"), part(None), part("<|ima"), part("ge|>")]
    assert built_in.render(user(parts), images=[[7777, 7777]]).count(7777) == 2
    with pytest.raises(InvalidInput):
        built_in.render(user("<|image|>"), images=[[5]])
