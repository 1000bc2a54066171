"""`herd check`: the real models' tensor lists at full size pass, and folders damaged in any way do not."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration

from cluster.check import Report, check_folder
from cluster.check_report import as_json, as_text, require_fit
from cluster.cli import main
from cluster.config import parse_settings
from cluster.local import open_model
from cluster.preflight import check_model
from cluster.tiny import make_tiny
from experts.checkpoint import Checkpoint
from experts.config import load_config
from experts.errors import CheckpointError
from experts.findings import errors
from experts.tensor_names import expected_tensors
from router.prompt.chat import LLAMA4_TEMPLATE

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

VISION = {
    "hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
    "image_size": 336, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096, "projector_output_dim": 4096, "vision_output_dim": 4096,
}  # fmt: skip
SCALING = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
FAMILY: dict[str, tuple[int, int, dict[str, Any]]] = {
    "scout": (1133, 108_641_793_536, {"rope_scaling": {"rope_type": "llama3", **SCALING}}),
    "maverick": (
        1061,
        401_583_781_376,
        {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    ),
    "guard": (
        989,
        12_001_097_216,
        {
            "num_local_experts": 0, "moe_layers": [], "interleave_moe_layer_step": 0, "intermediate_size_mlp": 8192,
            "no_rope_layer_interval": 80, "attention_chunk_size": None,
        },
    ),
}  # fmt: skip


# The real models, without their weights


@pytest.mark.parametrize("kind", FAMILY)
def test_the_real_tensor_lists_pass_at_full_size(tmp_path: Path, kind: str) -> None:
    num_tensors, num_parameters, text = FAMILY[kind]
    config = Llama4Config(text_config=text, vision_config=VISION, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(config).to(torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == num_tensors
    folder = tmp_path / kind
    folder.mkdir()
    write_sparse(folder, shapes, num_shards=50)
    config.save_pretrained(folder)
    write_real_sized_ranks(folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(LLAMA4_TEMPLATE)

    code = (
        "import sys; from cluster.cli import main; code = main(['check', sys.argv[1], '--json'])\n"
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(peak[0].split()[1], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert json.loads(done.stdout) == {
        "model": kind, "fit": True, "tensors": num_tensors, "files": 50, "bytes": 2 * num_parameters, "findings": [],
    }  # fmt: skip
    assert int(done.stderr.split()[-1]) < 2_000_000, "KiB of memory at most"


def write_sparse(folder: Path, shapes: dict[str, tuple[int, ...]], num_shards: int) -> None:
    """bfloat16 files of full length, of which only the headers take room."""
    names, weight_map = list(shapes), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names[shard::num_shards]:
            end = at + 2 * int(torch.Size(shapes[name]).numel())
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
            at, weight_map[name] = end, file
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(folder / file, 8 + len(raw) + at)
    total = sum(2 * int(torch.Size(shape).numel()) for shape in shapes.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_real_sized_ranks(path: Path) -> None:
    """As many ranks as Llama 4 has, so that its special tokens get their ids."""
    tokens = [bytes((byte,)) for byte in range(256)]
    tokens += [b"\xff" + struct.pack(">I", number) for number in range(200_000 - 256)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "tiny"
    make_tiny("maverick", folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tiny"))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def write_file(path: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def in_header(change: Callable[[dict[str, Any], list[str]], object]) -> Callable[[Path], None]:
    """Damage that changes the first file's header; `change` gets the tensors' names in the order of their data."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / FIRST)
        names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        changed = change(header, names)
        write_file(folder / FIRST, changed if isinstance(changed, bytes) else header, data)

    return damage


def in_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def in_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return damage


def shift(header: dict[str, Any], name: str, begin: int, end: int) -> None:
    offsets = header[name]["data_offsets"]
    header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


def set_field(name: str, value: object) -> Callable[[dict[str, Any], list[str]], object]:
    return lambda header, names: header[names[0]].update({name: value})


def repeat_first(header: dict[str, Any], names: list[str]) -> bytes:
    return json.dumps(header).replace("{", f'{{"{names[0]}": {json.dumps(header[names[0]])}, ', 1).encode()


def leave_gap(folder: Path) -> None:
    header, data = header_of(folder / FIRST)
    first, *others = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    for name in others:
        shift(header, name, 4, 4)
    begin = header[first]["data_offsets"][1]
    write_file(folder / FIRST, header, data[:begin] + bytes(4) + data[begin:])


def drop_last_tensor(folder: Path) -> None:
    """The file is sound without it; only the index still promises it."""
    header, data = header_of(folder / SECOND)
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, _ = header.pop(last)["data_offsets"]
    write_file(folder / SECOND, header, data[:begin])


def forget_last_tensor(folder: Path) -> None:
    """Neither file nor index know of it."""
    drop_last_tensor(folder)
    header, _ = header_of(folder / SECOND)
    first, _ = header_of(folder / FIRST)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in {**header, **first}}
    (folder / INDEX).write_text(json.dumps(index))


def copy_tensor(folder: Path) -> None:
    """One tensor in both files."""
    header, data = header_of(folder / FIRST)
    name = min(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, end = header[name]["data_offsets"]
    other, other_data = header_of(folder / SECOND)
    other[name] = {**header[name], "data_offsets": [len(other_data), len(other_data) + end - begin]}
    write_file(folder / SECOND, other, other_data + data[begin:end])


def swap_files(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def name_file(file: object) -> Callable[[dict[str, Any]], object]:
    """Let the index say that the first tensor is in `file`."""
    return lambda index: index["weight_map"].update({min(index["weight_map"]): file})


def text_config(**fields: object) -> Callable[[Path], None]:
    return in_json("config.json", lambda config: config["text_config"].update(fields))


def whole_config(**fields: object) -> Callable[[Path], None]:
    return in_json("config.json", lambda config: config.update(fields))


def generation(**fields: object) -> Callable[[Path], None]:
    return in_json("generation_config.json", lambda config: config.update(fields))


def total_size(value: object) -> Callable[[Path], None]:
    return in_json(INDEX, lambda index: index["metadata"].update(total_size=value))


def make_float(index: dict[str, Any]) -> None:
    index["metadata"]["total_size"] = float(index["metadata"]["total_size"])


def transpose_one(header: dict[str, Any], names: list[str]) -> None:
    header[next(name for name in names if "gate_proj" in name)]["shape"].reverse()


def tie_a_transposed_head(folder: Path) -> None:
    text_config(tie_word_embeddings=True)(folder)
    for file in (FIRST, SECOND):
        header, data = header_of(folder / file)
        for name in header:
            if name.endswith("lm_head.weight"):
                header[name]["shape"].reverse()
        write_file(folder / file, header, data)


def halve(header: dict[str, Any], names: list[str]) -> None:
    """Make the first tensor one of 8-bit floats: four times as many numbers in as many bytes."""
    entry = header[names[0]]
    assert entry["dtype"] == "F32"
    entry.update(dtype="F8_E4M3", shape=[4 * entry["shape"][0], *entry["shape"][1:]])


def minus_zero(header: dict[str, Any], names: list[str]) -> bytes:
    return json.dumps(header).replace('"data_offsets": [0,', '"data_offsets": [-0,').encode()


def unbounded_number(header: dict[str, Any], names: list[str]) -> bytes:
    return json.dumps(header).replace('"dtype"', '"scale": 1e999, "dtype"', 1).encode()


def extra(dtype: str, shape: list[int], num_bytes: int) -> Callable[[Path], None]:
    """One more tensor behind the others, which the index knows nothing of."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / FIRST)
        header["extra"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + num_bytes]}
        write_file(folder / FIRST, header, data + bytes(num_bytes))

    return damage


def replaced(file: str, by: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        by(folder / file)

    return damage


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HUGE = struct.pack("<Q", 1 << 40)

WEIGHTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # damage, file and a part of the finding
    "truncated-data": (in_bytes(FIRST, lambda raw: raw[:-100]), FIRST, "truncated"),
    "truncated-header": (in_bytes(FIRST, lambda raw: raw[:300]), FIRST, "truncated"),
    "empty-file": (in_bytes(FIRST, lambda raw: b""), FIRST, "0 bytes"),
    "trailing-bytes": (in_bytes(FIRST, lambda raw: raw + b"more"), FIRST, "bytes, the end of"),
    "oversized-header": (in_bytes(FIRST, lambda raw: HUGE + raw[8:]), FIRST, "a header of at most"),
    "header-longer-than-file": (
        in_bytes(FIRST, lambda raw: struct.pack("<Q", 20_000_000) + raw[8:]),
        FIRST,
        "truncated",
    ),
    "header-not-json": (in_header(lambda header, names: b"{'a': 1}"), FIRST, "expected JSON"),
    "header-not-utf8": (in_header(lambda header, names: b'{"\xff": 1}'), FIRST, "UTF-8"),
    "header-a-list": (in_header(lambda header, names: b"[1, 2]"), FIRST, "a JSON object"),
    "header-deep": (in_header(lambda header, names: b"[" * 100_000), FIRST, "header"),
    "name-twice": (in_header(repeat_first), FIRST, "2 times"),
    "overlap": (in_header(lambda header, names: shift(header, names[1], -4, -4)), FIRST, "overlaps"),
    "gap": (leave_gap, FIRST, "leaves a gap"),
    "swapped-offsets": (in_header(set_field("data_offsets", [8, 0])), FIRST, "data_offsets of two"),
    "negative-offset": (in_header(set_field("data_offsets", [-8, 0])), FIRST, "data_offsets of two"),
    "float-offset": (in_header(set_field("data_offsets", [0.0, 8])), FIRST, "data_offsets of two"),
    "three-offsets": (in_header(set_field("data_offsets", [0, 4, 8])), FIRST, "data_offsets of two"),
    "offset-beyond-file": (in_header(set_field("data_offsets", [0, 1 << 50])), FIRST, "truncated"),
    "float-shape": (in_header(set_field("shape", [1.5])), FIRST, "integers ≥ 0"),
    "negative-shape": (in_header(set_field("shape", [-1])), FIRST, "integers ≥ 0"),
    "bool-shape": (in_header(set_field("shape", [True])), FIRST, "integers ≥ 0"),
    "huge-shape": (in_header(set_field("shape", [10**4000] * 4)), FIRST, "integers ≥ 0"),
    "many-dimensions": (in_header(set_field("shape", [1] * 100_000)), FIRST, "at most 8"),
    "shape-a-text": (in_header(set_field("shape", "64")), FIRST, "integers ≥ 0"),
    "zero-shape": (in_header(set_field("shape", [0])), FIRST, "expected 0 bytes"),
    "unknown-dtype": (in_header(set_field("dtype", "F12")), FIRST, "a dtype of safetensors"),
    "no-dtype": (in_header(set_field("dtype", None)), FIRST, "a dtype of safetensors"),
    "not-a-tensor": (in_header(lambda header, names: header.update({names[0]: 5})), FIRST, "dtype, shape"),
    "metadata-nan": (in_header(lambda header, names: header.update(__metadata__={"x": float("nan")})), FIRST, "NaN"),
    "metadata-number": (in_header(lambda header, names: header.update(__metadata__={"x": 5})), FIRST, "__metadata__.x"),
    "metadata-half-a-character": (
        in_header(lambda header, names: header.update(__metadata__={"x": "\ud800"})),
        FIRST,
        "a lone surrogate",
    ),
    "name-half-a-character": (in_header(lambda header, names: header.update({"\udfff": EMPTY})), FIRST, "surrogate"),
    "offset-minus-zero": (in_header(minus_zero), FIRST, "data_offsets of two"),
    "header-number-unbounded": (in_header(unbounded_number), FIRST, "finite numbers"),
    "half-a-byte": (extra(dtype="F4", shape=[3], num_bytes=2), FIRST, "whole bytes"),
    "shape-overflows-before-a-zero": (extra(dtype="F32", shape=[2**62, 4, 0], num_bytes=0), FIRST, "at most"),
    "index-a-pipe": (replaced(INDEX, os.mkfifo), INDEX, "not a regular file"),
    "index-endless": (replaced(INDEX, link_to_zeros), INDEX, "not a regular file"),
    "metadata-a-list": (in_header(lambda header, names: header.update(__metadata__=[])), FIRST, "an object of texts"),
    "tensor-in-both-files": (copy_tensor, SECOND, "each tensor once"),
    "tensor-not-in-its-file": (drop_last_tensor, INDEX, "no such tensor there"),
    "wrong-shard": (in_json(INDEX, name_file(SECOND)), INDEX, "which holds it"),
    "files-swapped": (swap_files, INDEX, "which holds it"),
    "file-missing": (lambda folder: (folder / SECOND).unlink(), INDEX, "which is missing"),
    "file-a-folder": (in_json(INDEX, name_file("sub")), INDEX, "which is missing"),
    "path-upwards": (in_json(INDEX, name_file("../tiny/" + FIRST)), INDEX, "not a plain file name"),
    "path-absolute": (in_json(INDEX, name_file("/etc/passwd")), INDEX, "not a plain file name"),
    "file-a-number": (in_json(INDEX, name_file(7)), INDEX, "which is missing"),
    "file-name-too-long": (in_json(INDEX, name_file("x" * 5000)), INDEX, "weight_map"),
    "index-not-json": (in_bytes(INDEX, lambda raw: raw[:-5]), INDEX, "expected JSON"),
    "index-empty-map": (in_json(INDEX, lambda index: index.update(weight_map={})), INDEX, "names of tensors"),
    "index-map-a-list": (in_json(INDEX, lambda index: index.update(weight_map=[FIRST])), INDEX, "names of tensors"),
    "index-without-map": (in_json(INDEX, lambda index: index.pop("weight_map")), INDEX, "names of tensors"),
    "index-size-nan": (total_size(float("nan")), INDEX, "NaN"),
    "index-size-negative": (total_size(-1), INDEX, "number of bytes"),
    "index-size-a-text": (total_size("8"), INDEX, "number of bytes"),
    "index-metadata-a-list": (in_json(INDEX, lambda index: index.update(metadata=[1])), INDEX, "an object"),
    "no-weights": (lambda folder: [file.unlink() for file in folder.glob("*.safetensors*")], INDEX, "neither"),
}
"""What a folder's weight files can have wrong whatever the model."""

MODEL: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "tensor-missing-everywhere": (forget_last_tensor, INDEX, "found none"),
    "shape-transposed": (
        in_header(transpose_one),
        FIRST,
        "expected shape",
    ),
    "integers": (in_header(set_field("dtype", "I32")), FIRST, "quantized"),
    "float8": (in_header(halve), FIRST, "F8_E4M3 (quantized"),
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "config.json", "can be read"),
    "config-not-json": (in_bytes("config.json", lambda raw: raw[:-3]), "config.json", "expected JSON"),
    "config-nan": (text_config(rms_norm_eps=float("nan")), "config.json", "NaN"),
    "config-other-model": (whole_config(model_type="llama"), "config.json", "model_type"),
    "config-endless": (text_config(num_hidden_layers=10**12), "config.json", "must be at most"),
    "config-activation": (text_config(hidden_act="gelu"), "config.json", "hidden_act"),
    "config-bias": (text_config(attention_bias=True), "config.json", "attention_bias"),
    "config-rope-kind": (text_config(rope_parameters={"rope_type": "yarn"}), "config.json", "rope_type"),
    "config-quantized": (
        whole_config(quantization_config={"quant_method": "fp8"}),
        "config.json",
        "quantization_config",
    ),
    "config-more-experts": (text_config(num_local_experts=32), FIRST, "expected shape"),
    "config-more-layers": (
        text_config(num_hidden_layers=7, moe_layers=None, no_rope_layers=None, layer_types=None),
        INDEX,
        "layers.6.",
    ),
    "config-image-token": (whole_config(image_token_index=7), "config.json", "image_token_index"),
    "config-small-vocabulary": (text_config(vocab_size=100), "tokenizer.json", "ids below vocab_size 100"),
    "config-quantized-inside": (
        text_config(quantization_config={"quant_method": "compressed-tensors"}),
        "config.json",
        "quantization_config",
    ),
    "config-huge-number": (text_config(attn_scale=10**400), "config.json", "must be a finite number"),
    "config-a-pipe": (replaced("config.json", os.mkfifo), "config.json", "not a regular file"),
    "config-endless-file": (replaced("config.json", link_to_zeros), "config.json", "not a regular file"),
    "tokenizer-a-pipe": (replaced("tokenizer.json", os.mkfifo), "tokenizer.json", "not a regular file"),
    "template-a-pipe": (replaced("chat_template.jinja", os.mkfifo), "chat_template.jinja", "not a regular file"),
    "template-no-python": (
        in_bytes("chat_template.jinja", lambda raw: b"{% break %}"),
        "chat_template.jinja",
        "cannot be compiled",
    ),
    "template-deep": (
        in_bytes("chat_template.jinja", lambda raw: b"{{ " + b"(" * 20_000 + b"1" + b")" * 20_000 + b" }}"),
        "chat_template.jinja",
        "cannot be compiled",
    ),
    "generation-a-pipe": (replaced("generation_config.json", os.mkfifo), "generation_config.json", "regular file"),
    "generation-name-twice": (
        in_bytes("generation_config.json", lambda raw: b'{"eos_token_id": 1, "eos_token_id": 2}'),
        "generation_config.json",
        "2 times",
    ),
    "generation-all-ends-outside": (generation(eos_token_id=[999_999]), "generation_config.json", "end tokens below"),
    "tokenizer-config-nan": (
        in_bytes("tokenizer_config.json", lambda raw: b'{"model_max_length": NaN}'),
        "tokenizer_config.json",
        "finite numbers",
    ),
    "tied-head-of-another-shape": (tie_a_transposed_head, FIRST, "lm_head.weight: expected shape"),
    "tokenizer-missing": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer.json",
        "not in the model folder",
    ),
    "tokenizer-truncated": (in_bytes("tokenizer.json", lambda raw: raw[:-50]), "tokenizer.json", "cannot be read"),
    "tokenizer-other-kind": (
        in_json("tokenizer.json", lambda spec: spec.update(decoder=None)),
        "tokenizer.json",
        "byte-level",
    ),
    "tokenizer-config-broken": (
        in_bytes("tokenizer_config.json", lambda raw: b"{"),
        "tokenizer_config.json",
        "cannot be read",
    ),
    "template-syntax": (
        in_bytes("chat_template.jinja", lambda raw: raw + b"{% endif %}"),
        "chat_template.jinja",
        "line",
    ),
    "template-not-utf8": (
        in_bytes("chat_template.jinja", lambda raw: b"\xff\xfe"),
        "chat_template.jinja",
        "cannot be read",
    ),
    "generation-not-json": (
        in_bytes("generation_config.json", lambda raw: b"x"),
        "generation_config.json",
        "cannot be read",
    ),
    "generation-temperature": (generation(temperature="hot"), "generation_config.json", "temperature"),
    "generation-beams": (generation(num_beams=4), "generation_config.json", "num_beams"),
    "generation-ngrams": (generation(no_repeat_ngram_size=3), "generation_config.json", "no_repeat_ngram_size"),
    "processor-mean": (
        in_json("preprocessor_config.json", lambda config: config.update(image_mean=[0.1, 0.2, 0.3])),
        "preprocessor_config.json",
        "image_mean",
    ),
    "processor-not-json": (
        in_bytes("processor_config.json", lambda raw: b""),
        "processor_config.json",
        "cannot be read",
    ),
    "generation-end-ids": (generation(eos_token_id=["x"]), "generation_config.json", "eos_token_id"),
}
"""What makes a folder another one than its config promises, and what else serving reads."""


@pytest.mark.parametrize("kind", ["scout", "guard"])
def test_other_tiny_kinds_have_no_findings(tmp_path: Path, kind: str) -> None:
    make_tiny(kind, tmp_path / kind)
    assert check_folder(tmp_path / kind).findings == ()


def test_a_sound_folder_has_no_findings(sound: Path) -> None:
    report = check_folder(sound)
    assert report.findings == ()
    assert report.num_tensors == len(expected_tensors(load_config(sound)))
    assert "can be served" in as_text(report, "tiny")
    check_model(parse_settings({"model_dir": str(sound)}))


@pytest.mark.parametrize("name", [*WEIGHTS, *MODEL])
def test_a_damaged_folder_is_refused_with_a_clear_finding(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, file, part = {**WEIGHTS, **MODEL}[name]
    damage(folder)
    report = check_folder(folder)
    wrong = errors(report.findings)
    assert any(finding.file == file and part in str(finding) for finding in wrong), list(map(str, wrong))
    assert all(finding.expected and finding.found for finding in report.findings)
    assert str(folder.parent) not in json.dumps(as_json(report, "tiny"))
    # What is said is about the damage, not about everything that hangs on it.
    assert len(wrong) <= 4 or name in ("files-swapped", "config-more-experts", "config-more-layers")
    with pytest.raises(CheckpointError):
        require_fit(report, folder)
    with pytest.raises(CheckpointError):
        check_model(parse_settings({"model_dir": str(folder)}))
    if name in WEIGHTS:
        with pytest.raises(CheckpointError):
            Checkpoint(folder)
    assert main(["check", str(folder)]) == 1
    assert "cannot be served" in capsys.readouterr().out


def test_herd_serve_refuses_before_anything_starts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages = (WEIGHTS["truncated-data"], MODEL["template-syntax"])
    for damage, _, _ in damages:
        damage(folder)
    assert main(["serve", str(folder), "--port", "1"]) == 2
    said = capsys.readouterr().err
    assert "cannot be served" in said
    assert all(file in said and part in said for _, file, part in damages)


def test_every_finding_is_reported_not_only_the_first(folder: Path) -> None:
    names = ("metadata-number", "index-size-negative", "tokenizer-truncated", "generation-temperature", "config-bias")
    for name in (*names, "config-activation"):
        {**WEIGHTS, **MODEL}[name][0](folder)
    found = {(finding.file, finding.subject) for finding in errors(check_folder(folder).findings)}
    assert {
        (FIRST, "__metadata__.x"),
        (INDEX, "metadata.total_size"),
        ("config.json", "hidden_act"),
        ("config.json", "attention_bias"),
        ("generation_config.json", "temperature"),
        ("tokenizer.json", ""),
    } <= found


# Odd, and fine


def extra_file(folder: Path) -> None:
    write_file(folder / "other.safetensors", {}, b"")


def extra_tensor(folder: Path) -> None:
    header, data = header_of(folder / SECOND)
    header["rotary.inv_freq"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    write_file(folder / SECOND, header, data + bytes(8))


def padded_header(folder: Path) -> None:
    header, data = header_of(folder / FIRST)
    write_file(folder / FIRST, json.dumps(header).encode() + b"   ", data)


def linked_files(folder: Path) -> None:
    """As in the cache of Hugging Face's hub."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in (FIRST, SECOND):
        (folder / file).rename(blobs / file)
        (folder / file).symlink_to(Path("..") / "blobs" / file)


ODD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "extra-file": (extra_file, ("other.safetensors",)),
    "extra-tensor": (extra_tensor, (INDEX, INDEX, INDEX)),
    "other-total-size": (total_size(5), (INDEX,)),
    "float-total-size": (in_json(INDEX, make_float), ()),
    "no-metadata": (in_json(INDEX, lambda index: index.pop("metadata")), ()),
    "padded-header": (padded_header, ()),
    "linked-files": (linked_files, ()),
    "no-tile-tokens": (
        in_bytes("tokenizer.json", lambda raw: raw.replace(b"<|tile_x_separator|>", b"<|no_separator|>")),
        ("tokenizer.json",),
    ),
    "no-tokenizer-config": (lambda folder: (folder / "tokenizer_config.json").unlink(), ()),
    "no-template": (lambda folder: (folder / "chat_template.jinja").unlink(), ("chat_template.jinja",)),
    "tied-with-a-head": (text_config(tie_word_embeddings=True), ()),
    "no-generation-config": (lambda folder: (folder / "generation_config.json").unlink(), ()),
    "generation-max-length": (generation(max_length=4096, num_beams=1), ("generation_config.json",)),
    "end-token-outside": (generation(eos_token_id=[5, 999_999]), ("generation_config.json",)),
    "unknown-config-fields": (text_config(for_llm_compressor=False, cache_implementation="static"), ()),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_served_with_a_note_at_most(folder: Path, name: str) -> None:
    damage, files = ODD[name]
    damage(folder)
    report = check_folder(folder)
    assert errors(report.findings) == []
    assert tuple(finding.file for finding in report.findings) == files, list(map(str, report.findings))
    check_model(parse_settings({"model_dir": str(folder)}))
    Checkpoint(folder).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_dtype_in_the_config_the_weights_decide(folder: Path, dtype: torch.dtype) -> None:
    in_json("config.json", lambda config: [part.pop("dtype", None) for part in (config, config["text_config"])])(folder)
    for file in (FIRST, SECOND):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / file).items()}, folder / file)
    assert open_model(folder).dtype is dtype
    assert open_model(folder, "float16").dtype is torch.float16


def test_one_file_wins_over_an_index_as_in_transformers(folder: Path) -> None:
    first, data = header_of(folder / FIRST)
    second, more = header_of(folder / SECOND)
    second.pop("__metadata__")
    for entry in second.values():
        entry["data_offsets"] = [len(data) + offset for offset in entry["data_offsets"]]
    write_file(folder / "model.safetensors", {**first, **second}, data + more)
    in_json(INDEX, lambda index: index.update(weight_map={"x": "y"}))(folder)
    report = check_folder(folder)
    assert report.is_fit and report.num_files == 1
    assert {entry.file for entry in Checkpoint(folder).entries.values()} == {"model.safetensors"}


def test_what_hostile_files_say_stays_on_its_line(folder: Path) -> None:
    evil = "\x1b[2J\nherd: all is well\u202e"
    in_header(lambda header, names: header.update({evil: {}}))(folder)
    report = check_folder(folder)
    text = as_text(report, "tiny")
    assert "\x1b" not in text and "\u202e" not in text
    assert len(text.splitlines()) == len(report.findings) + 1


# Any bytes at all


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_change_to_a_header_is_refused_or_harmless(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bytes change, looking at the file ends in a report, and an accepted file can be opened."""
    folder = tmp_path_factory.mktemp("changed")
    for path in sound.iterdir():
        os.link(path, folder / path.name)
    raw = bytearray((sound / FIRST).read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    (folder / FIRST).unlink()
    (folder / FIRST).write_bytes(raw)
    report: Report = check_folder(folder)
    if report.is_fit:
        checkpoint = Checkpoint(folder)
        for name, shape in expected_tensors(load_config(folder)).items():
            assert checkpoint.tensor(name, shape).shape == shape
    shutil.rmtree(folder)
