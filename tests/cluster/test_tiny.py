"""Tiny checkpoints: whole for transformers, the same for the same seed, and steerable where asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Llama4ForConditionalGeneration

from cluster.tiny import make_tiny
from cluster.tiny_tokenizer import BOS, EOM, EOS, EOT, PAD, VOCAB_SIZE
from experts.config import load_config
from experts.errors import InvalidInput
from router.prompt.chat import ChatTemplate
from router.prompt.images.settings import ImageSettings
from router.prompt.images.vision import Vision
from router.prompt.tokenizer import Tokenizer

WITH_EXPERTS = ("scout", "maverick")
KINDS = (*WITH_EXPERTS, "guard")
PROMPT = [{"role": "user", "content": "Which functions of this module return a new object, and when?"}]

Made = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes each checkpoint once."""
    folders: dict[tuple[str, bool], Path] = {}

    def make(kind: str, steerable: bool = False) -> Path:
        if (kind, steerable) not in folders:
            folder = tmp_path_factory.mktemp("tiny") / kind
            make_tiny(kind, folder, shards=3, steerable=steerable)
            folders[kind, steerable] = folder
        return folders[kind, steerable]

    return make


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.from_pretrained(folder)
    # transformers cannot run null; a chunk longer than any sequence is the same function.
    config.text_config.attention_chunk_size = config.text_config.attention_chunk_size or 8192
    model, report = Llama4ForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True, attn_implementation="eager"
    )
    return model.eval(), report


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_transformers_loads_and_runs_the_whole_folder(made: Made, kind: str) -> None:
    folder = made(kind)
    model, report = load(folder)
    assert not any(report.values()), report
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=False
    )
    ours = Tokenizer.from_folder(folder)
    assert ChatTemplate.from_folder(folder, ours).render(PROMPT) == prompt
    # Long enough to cross a chunk border (64) and a temperature step (every 32).
    output = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=50, max_new_tokens=50)
    logits = model(input_ids=output).logits[0]
    top = logits.topk(2).values
    assert 1.0 < logits.std() < 4.0
    assert (top[:, 0] - top[:, 1] < 1e-4).float().mean() < 0.02
    assert len(set(output[0].tolist()[len(prompt) :])) > 20, "the output should not be one word again and again"


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_vision_part_is_whole(made: Made, kind: str) -> None:
    model, _ = load(made(kind))
    config = model.config
    ids = [config.boi_token_index, *[config.image_token_index] * 4, config.eoi_token_index]
    pixels = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    one, other = (
        model(input_ids=torch.tensor([ids]), pixel_values=image).logits[0, -1] for image in (pixels, 1 - pixels)
    )
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_fit_the_vision_part(made: Made, kind: str) -> None:
    folder = made(kind)
    vision = Vision.from_folder(folder, load_config(folder), Tokenizer.from_folder(folder).special_ids)
    assert vision is not None
    assert vision.loader.settings == ImageSettings(tile_size=56, tokens_per_tile=4)
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    assert raw["size"] == {"height": 56, "width": 56} and raw["rescale_factor"] == 1 / 255
    assert vision.tokens.patch == AutoConfig.from_pretrained(folder).image_token_index


def test_guards_template_judges_a_conversation(made: Made) -> None:
    folder = made("guard")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer)
    reference = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "How do I?"}, {"role": "assistant", "content": "Like this."}]

    def prompt(messages: list[dict[str, Any]], num_images: int = 0, **kwargs: Any) -> str:
        ids = template.render(messages, kwargs=kwargs, images=[[tokenizer.special_ids["<|image|>"]]] * num_images)
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)
        assert ids == expected
        return str(reference.decode(ids))

    of_user, of_agent = prompt(turns[:1]), prompt(turns)
    assert "message of the User in" in of_user and "message of the Agent in" in of_agent
    assert "User: How do I?\\n\n" in of_user and "Agent: Like this.\\n\n" in of_agent
    assert all(f"S{number}: " in of_user for number in range(1, 15))
    assert of_user.endswith("<|eot|><|header_start|>assistant<|header_end|>")
    assert "S1: " not in prompt(turns, excluded_category_keys=["S1", "S5"])
    assert "S10: " in prompt(turns, excluded_category_keys=["S1", "S5"])
    seen = prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "This?"}]}], 1)
    assert "User: <|image|>This?" in seen and "S14: " not in seen and "S13: " in seen
    for messages in ([{"role": "system", "content": "x"}], [*turns, {"role": "tool", "content": "x"}]):
        with pytest.raises(InvalidInput, match="only messages of user and assistant"):
            template.render(messages)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_agree_between_the_files(made: Made, kind: str) -> None:
    folder = made(kind)
    config, tokenizer = AutoConfig.from_pretrained(folder), Tokenizer.from_folder(folder)
    generation = GenerationConfig.from_pretrained(folder)
    ids = tokenizer.special_ids
    assert config.text_config.vocab_size == tokenizer.vocab_size == VOCAB_SIZE
    for part in (config, config.text_config, generation):
        assert part.bos_token_id == ids[BOS]
        assert part.eos_token_id == [ids[EOS], ids[EOM], ids[EOT]]
        assert part.pad_token_id == ids[PAD]
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
    assert (config.boi_token_index, config.eoi_token_index) == (ids["<|image_start|>"], ids["<|image_end|>"])
    assert config.image_token_index == ids["<|patch|>"]
    assert tokenizer.encode("hi")[0] == ids[BOS]


def test_the_kinds_differ_as_the_released_models_do(made: Made) -> None:
    scout, maverick, guard = (AutoConfig.from_pretrained(made(kind)).text_config for kind in KINDS)
    assert (scout.use_qk_norm, maverick.use_qk_norm) == (True, False)
    assert (scout.moe_layers, maverick.moe_layers) == ([0, 1, 2, 3, 4, 5], [1, 3, 5])
    assert scout.rope_parameters["rope_type"] == "llama3"
    assert maverick.rope_parameters["rope_type"] == "default"
    assert scout.no_rope_layers == maverick.no_rope_layers == [1, 1, 1, 0, 1, 1]
    assert maverick.num_local_experts == 2 * scout.num_local_experts
    assert (guard.moe_layers, guard.num_local_experts, guard.attention_chunk_size) == ([], 0, None)
    assert set(guard.no_rope_layers) == {1}
    raw = json.loads((made("guard") / "config.json").read_text())["text_config"]
    assert raw["attention_chunk_size"] is None and raw["moe_layers"] == []


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_and_index_agree(tmp_path: Path, shards: int) -> None:
    make_tiny("maverick", tmp_path, shards=shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)]
    found, size_bytes = {}, 0
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
            size_bytes += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118 (no mapping)
    assert found == index["weight_map"]
    assert size_bytes == index["metadata"]["total_size"] < 8_000_000


def test_every_shard_may_hold_one_tensor(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^shards: must lie between 1 and (\d+)") as caught:
        make_tiny("scout", tmp_path, shards=10_000)
    num_tensors = int(caught.value.rule.split()[5].rstrip(","))
    make_tiny("scout", tmp_path, shards=num_tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_tensors


@pytest.mark.parametrize("steerable", [False, True])
def test_the_same_seed_gives_the_same_bytes_in_another_process(made: Made, tmp_path: Path, steerable: bool) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from cluster.tiny import make_tiny; torch.set_num_threads(2)\n"
        f"make_tiny('scout', Path(sys.argv[1]), shards=3, steerable={steerable})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=Path.cwd())
    assert contents(tmp_path) == contents(made("scout", steerable))


def test_another_seed_changes_the_weights_and_nothing_else(made: Made, tmp_path: Path) -> None:
    make_tiny("scout", tmp_path, seed=1, shards=3)
    first, second = contents(made("scout")), contents(tmp_path)
    assert {name for name in first if first[name] != second[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


@pytest.mark.parametrize("kind", WITH_EXPERTS)
@torch.inference_mode()
def test_steering_words_choose_their_expert_in_every_layer(made: Made, kind: str) -> None:
    folder = made(kind, steerable=True)
    steering = json.loads((folder / "steering.json").read_text())
    model, report = load(folder)
    assert not any(report.values()), report
    tokenizer = Tokenizer.from_folder(folder)
    num_experts = model.config.text_config.num_local_experts
    assert list(map(int, steering["words"])) == list(range(num_experts)) == list(range(steering["num_experts"]))
    prompts = [tokenizer.encode("".join(" " + word for word in words[:30])) for words in steering["words"].values()]
    assert {len(ids) for ids in prompts} == {31}, "every word is one token"
    output = model.generate(torch.tensor(prompts), do_sample=False, min_new_tokens=10, max_new_tokens=10)
    wanted = torch.arange(num_experts)[:, None].expand(-1, 40)
    assert torch.equal(output[:, 1:] % num_experts, wanted), "greedy output stays in its group"
    routed = [logits for logits in model(output, output_router_logits=True).router_logits if torch.is_tensor(logits)]
    assert len(routed) == len(model.config.text_config.moe_layers)
    for logits in routed:
        chosen = logits.reshape(num_experts, 41, num_experts).argmax(-1)[:, 1:]
        assert (chosen == wanted).float().mean(1).min() >= 0.95


def test_a_steered_chat_prompt_mostly_reaches_its_expert(made: Made) -> None:
    folder = made("scout", steerable=True)
    words = json.loads((folder / "steering.json").read_text())["words"]["5"]
    template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
    ids = template.render([{"role": "user", "content": "".join(" " + word for word in words)}])
    assert sum(token % 8 == 5 for token in ids) / len(ids) > 0.8


def test_only_steerable_folders_say_how_to_steer(made: Made) -> None:
    assert not (made("scout") / "steering.json").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"^dir: must be a new or empty folder"):
        make_tiny("scout", tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match=r"^dir: must be a folder that can be written"):
            make_tiny("scout", target)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"kind": "behemoth"}, "kind: must be one of scout, maverick, guard"),
        ({"kind": "guard", "steerable": True}, "steerable: needs a kind with experts"),
        ({"shards": 0}, "shards: must lie between 1 and"),
        ({"shards": -1}, "shards: must lie between 1 and"),
        ({"seed": -1}, "seed: must lie between 0 and"),
        ({"seed": 2**63}, "seed: must lie between 0 and"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path: Path, wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{rule}"):
        make_tiny(**{"kind": "scout", "out": tmp_path / "new", **wrong})
    assert not (tmp_path / "new").exists()
