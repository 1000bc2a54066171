"""Where a model folder keeps its chat template. Knows no template language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experts.errors import CheckpointError
from experts.model_files import read_json, read_text
from router.prompt.images.processor_config import PROCESSOR_FILE
from router.prompt.tokenizer_files import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_FILE = "chat_template.json"
MAX_TEMPLATE_BYTES = 1_000_000
FIELD = "chat_template"


@dataclass(frozen=True, kw_only=True)
class FoundTemplate:
    """The template's text; `where` names its file in errors."""

    source: str
    where: str


def find_template(model_dir: Path) -> FoundTemplate | None:
    """The template of its own file, else of the processor's files, else of the tokenizer's; None without any.

    Between the files with that field, the order is that of transformers' processors. Raises CheckpointError.
    """
    source = read_text(model_dir / TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
    if source is not None:
        return FoundTemplate(source=source, where=TEMPLATE_FILE)
    for file in (PROCESSOR_FILE, LEGACY_FILE, CONFIG_FILE):
        content = read_json(model_dir / file)
        source = None if content is None else _default_of(content.get(FIELD), f"{FIELD} in {file}")
        if source is not None:
            return FoundTemplate(source=source, where=f"{FIELD} in {file}")
    return None


def _default_of(value: object, where: str) -> str | None:
    """A template, or several by name in either spelling, of which "default" counts."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
    if isinstance(value, Mapping):
        value = value.get("default")
        if value is None:
            raise CheckpointError(where, 'has no template named "default"')
    if value is not None and not isinstance(value, str):
        raise CheckpointError(where, "must be a text or a list of named texts")
    return value
