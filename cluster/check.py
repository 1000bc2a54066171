"""Whether a model folder can be served: config, tables of tensors, tokenizer, template and defaults, and all that is
wrong with them. Reads headers, never weights; knows nothing of how a model is served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experts.checkpoint import misfits
from experts.config import ModelConfig, parse_config
from experts.errors import CheckpointError, InvalidInput
from experts.findings import Finding, Severity, errors, from_error, shown
from experts.model_files import MAX_JSON_BYTES, read_file, read_json, why
from experts.strict_json import parse_strictly
from experts.tensor_names import expected_tensors, optional_tensors
from experts.weight_files import INDEX_FILE, SINGLE_FILE, WeightFiles, scan_weights
from router.api.defaults import ServingDefaults
from router.prompt.chat import ChatTemplate
from router.prompt.images.processor_config import read_settings
from router.prompt.images.tokens import ImageTokens
from router.prompt.stop_ids import GENERATION_FILE, default_stop_ids
from router.prompt.template_files import TEMPLATE_FILE
from router.prompt.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
MAX_CONFIG_FINDINGS = 64

_IMAGE_TOKENS = (
    ("image_token_index", "<|patch|>"),
    ("boi_token_index", "<|image_start|>"),
    ("eoi_token_index", "<|image_end|>"),
)

_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings, and what the folder holds as far as it could be made out."""

    findings: tuple[Finding, ...]
    config: ModelConfig | None
    num_tensors: int
    num_files: int
    num_bytes: int

    @property
    def is_fit(self) -> bool:
        return not errors(self.findings)


def check_folder(model_dir: Path) -> Report:
    """Look at everything that serving will read, and go on after an error. Raises InvalidInput without a folder."""
    if not model_dir.is_dir():
        raise InvalidInput("MODEL_DIR", str(model_dir), "must be an existing folder")
    findings: list[Finding] = []
    config = _config(model_dir, findings)
    weights = scan_weights(model_dir)
    findings += weights.findings
    if config is not None:
        findings += _tensor_findings(weights, config)
    tokenizer = _tried(findings, "a byte-level tokenizer", lambda: Tokenizer.from_folder(model_dir))
    if tokenizer is not None:
        findings += _template_findings(model_dir, tokenizer)
    if tokenizer is not None and config is not None:
        findings += _id_findings(tokenizer, config)
    defaults = _tried(findings, "defaults that can be followed", lambda: _defaults(model_dir))
    if defaults is not None:
        findings += _unfollowed_findings(defaults)
    if config is not None:
        findings += _stop_findings(model_dir, config)
    if config is not None and (vision := config.vision) is not None:
        _tried(findings, "a processor that can be followed", lambda: read_settings(model_dir, vision))
    return Report(
        findings=tuple(findings),
        config=config,
        num_tensors=len(weights.entries),
        num_files=len({entry.file for entry in weights.entries.values()}),
        num_bytes=sum(entry.end - entry.begin for entry in weights.entries.values()),
    )


def _tried(findings: list[Finding], expected: str, read: Callable[[], _Read]) -> _Read | None:
    """What `read` returns; None where it failed, which is a finding."""
    try:
        return read()
    except CheckpointError as error:
        findings.append(from_error(error, expected))
        return None


def _config(model_dir: Path, findings: list[Finding]) -> ModelConfig | None:
    """The config if there is nothing wrong with it."""
    try:
        content = parse_strictly(read_file(model_dir / CONFIG_FILE, MAX_JSON_BYTES))
    except OSError as error:
        findings.append(Finding(file=CONFIG_FILE, expected="a file that can be read", found=why(error)))
        return None
    for expected, found in content.faults:
        findings.append(Finding(file=CONFIG_FILE, expected=expected, found=found))
    if content.faults and not content.members:
        return None
    config, wrong = _parsed(content.members)
    findings += wrong
    return None if wrong or content.faults else config


def _parsed(raw: Mapping[str, Any]) -> tuple[ModelConfig | None, list[Finding]]:
    """The parser stops at the first wrong field, so fields found wrong are left out and it is asked again."""
    findings: list[Finding] = []
    fields: set[str] = set()
    while len(findings) < MAX_CONFIG_FINDINGS:
        try:
            return parse_config(raw), findings
        except InvalidInput as error:
            if error.field in fields:
                break
            fields.add(error.field)
            findings.append(
                Finding(file=CONFIG_FILE, subject=error.field, expected=error.rule, found=shown(error.value))
            )
            raw = _without(raw, error.field)
    return None, findings


def _without(raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy without `field`, which errors name with its path inside of text_config or of the whole."""
    smaller = copy.deepcopy(dict(raw))
    *path, name = field.split(".")
    for part in (smaller.get("text_config"), smaller):
        for step in path:
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict) and name in part:
            del part[name]
            break
    return smaller


def _tensor_findings(weights: WeightFiles, config: ModelConfig) -> Iterator[Finding]:
    """The tables against what the config promises."""
    expected = expected_tensors(config)
    file = INDEX_FILE if weights.promised else SINGLE_FILE
    for name, shape in expected.items():
        entry = weights.entries.get(name)
        if entry is not None:
            yield from misfits(entry, shape)
        elif name not in weights.promised and not weights.may_hold(name):
            yield Finding(file=file, subject=name, expected=f"a tensor of shape {list(shape)}", found="none")
    optional = {name: shape for name, shape in optional_tensors(config).items() if name in weights.entries}
    for name, shape in optional.items():
        yield from misfits(weights.entries[name], shape)
    extra = [name for name in weights.entries if name not in expected and name not in optional]
    if extra:
        found = f"{len(extra)} more, which are not used, such as {extra[0]}"
        expected_text = "the tensors of this config"
        yield Finding(file=file, expected=expected_text, found=found, severity=Severity.NOTE)


def _template_findings(model_dir: Path, tokenizer: Tokenizer) -> Iterator[Finding]:
    try:
        template = ChatTemplate.from_folder(model_dir, tokenizer)
    except CheckpointError as error:
        yield from_error(error, "a chat template that compiles")
        return
    if template.is_built_in:
        expected, found = "a chat template", "none: chats are written in Llama 4's own format"
        yield Finding(file=TEMPLATE_FILE, expected=expected, found=found, severity=Severity.NOTE)


def _id_findings(tokenizer: Tokenizer, config: ModelConfig) -> Iterator[Finding]:
    """The tokenizer's ids against the config's."""
    if tokenizer.vocab_size > config.vocab_size:
        expected = f"ids below vocab_size {config.vocab_size} of {CONFIG_FILE}"
        yield Finding(file=tokenizer.file, expected=expected, found=f"ids up to {tokenizer.vocab_size - 1}")
    if config.vision is None:
        return
    patch_id = tokenizer.special_ids.get("<|patch|>", config.image_token_id)
    try:
        ImageTokens.from_specials(tokenizer.special_ids, patch_id=patch_id, tokens_per_tile=1)
    except CheckpointError as error:
        expected, found = "all tokens around images, which are refused otherwise", f"one that {error.problem}"
        yield Finding(file=tokenizer.file, expected=expected, found=found, severity=Severity.NOTE)
    ids = (config.image_token_id, config.boi_token_id, config.eoi_token_id)
    for (field, name), config_id in zip(_IMAGE_TOKENS, ids, strict=True):
        known = tokenizer.special_ids.get(name, config_id)
        if known != config_id:
            expected = f"{known}, the id of {name} in {tokenizer.file}"
            yield Finding(file=CONFIG_FILE, subject=field, expected=expected, found=str(config_id))


def _defaults(model_dir: Path) -> ServingDefaults:
    return ServingDefaults.from_generation_config(read_json(model_dir / GENERATION_FILE))


def _unfollowed_findings(defaults: ServingDefaults) -> Iterator[Finding]:
    for field, problem in defaults.unfollowed:
        note = Severity.NOTE
        yield Finding(
            file=GENERATION_FILE, subject=field, expected="none", found=problem, severity=note, sentence=problem
        )


def _stop_findings(model_dir: Path, config: ModelConfig) -> Iterator[Finding]:
    try:
        ids = default_stop_ids(model_dir, config.eos_token_ids)
    except CheckpointError as error:
        # A tokenizer that cannot be read is a finding already.
        if error.where.startswith(GENERATION_FILE):
            yield from_error(error, "token ids")
        return
    outside = sorted(token for token in ids if token >= config.vocab_size)
    if outside:
        # Of no others would any answer ever end by itself.
        severity = Severity.ERROR if len(outside) == len(ids) else Severity.NOTE
        expected, found = f"end tokens below vocab_size {config.vocab_size}", shown(outside)
        file = GENERATION_FILE if (model_dir / GENERATION_FILE).exists() else CONFIG_FILE
        yield Finding(file=file, subject="eos_token_id", expected=expected, found=found, severity=severity)
