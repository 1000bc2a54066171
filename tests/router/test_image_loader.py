"""The decoding processes: answers as in this process, and their ends, by crash, deadline, memory or close."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experts.config import parse_config
from experts.errors import CheckpointError, InvalidInput, Overloaded
from router.prompt.images.decode import decode_image
from router.prompt.images.decoder_process import GAVE_UP, DecoderProcess, DecodingFailed
from router.prompt.images.frames import BadMessage, receive, send
from router.prompt.images.limits import ImageLimits
from router.prompt.images.loader import ImageLoader
from router.prompt.images.messages import decode_tiles, encode_tiles
from router.prompt.images.processor_config import read_settings
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import cut
from router.prompt.images.vision import Vision

SMALL = ImageSettings(tile_size=28, tokens_per_tile=1)


def png(width: int, height: int, *, seed: int | None = None, mode: str = "RGB") -> bytes:
    out = BytesIO()
    image = Image.new(mode, (width, height), 7 if mode == "L" else None)
    if seed is not None:
        image = Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


SLOW = png(7000, 7000, mode="L")
"""Takes a good part of a second to decode."""


@pytest.fixture(scope="module")
def loader() -> Iterator[ImageLoader]:
    loader = ImageLoader(SMALL)
    yield loader
    loader.close()


def load(loader: ImageLoader, *files: bytes) -> Any:
    return asyncio.run(loader.load(loader.inspect([(f"image {i}", data) for i, data in enumerate(files)])))


def test_tiles_are_those_of_this_process_in_order(loader: ImageLoader) -> None:
    files = [png(30 + i, 90 - i, seed=i) for i in range(8)]
    assert load(loader, *files) == [cut(decode_image(data, ImageLimits()), SMALL) for data in files]


def test_requests_side_by_side(loader: ImageLoader) -> None:
    files = [png(20 + i, 20, seed=i) for i in range(12)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(loader.load(loader.inspect([("x", data)])) for data in files))

    expected = [[cut(decode_image(data, ImageLimits()), SMALL)] for data in files]
    assert asyncio.run(all_of_them()) == expected
    assert len(loader._all) <= ImageLimits().num_workers


def test_a_damaged_file_is_named_and_harms_nobody(loader: ImageLoader) -> None:
    whole = png(40, 40, seed=1)
    processes = set(loader._all)
    with pytest.raises(InvalidInput, match=r"^image 1: cannot be decoded: the file is damaged or cut off"):
        load(loader, whole, whole[: len(whole) // 2], whole)
    assert len(load(loader, whole)) == 1
    assert processes <= loader._all, "the process lives on"


def test_headers_decide_before_anything_is_decoded() -> None:
    loader = ImageLoader(SMALL, ImageLimits(max_images=2, max_tiles=20))
    wide = png(28 * 16, 28)
    with pytest.raises(InvalidInput, match="at most 2 images"):
        loader.inspect([("x", png(1, 1))] * 3)
    with pytest.raises(InvalidInput, match="at most 20 tiles"):
        loader.inspect([("x", wide), ("y", wide)])
    with pytest.raises(InvalidInput, match=r"^y: must be a PNG"):
        loader.inspect([("x", wide), ("y", b"text")])
    several = ImageLoader(SMALL, ImageLimits(max_request_pixels=2 * 28 * 16 * 28))
    assert len(several.inspect([("x", wide)] * 2)) == 2
    with pytest.raises(InvalidInput, match=r"^messages: .* at most 25088 pixels together \(got '37632 pixels'\)"):
        several.inspect([("x", wide)] * 3)
    several.close()
    (picture,) = loader.inspect([("x", wide)])
    assert (picture.layout.rows, picture.layout.cols, picture.layout.num_tiles) == (1, 16, 17)
    assert not loader._all
    loader.close()


def test_a_picture_that_takes_too_long_is_given_up() -> None:
    loader = ImageLoader(SMALL, ImageLimits(decode_s=0.02))
    with pytest.raises(InvalidInput, match=GAVE_UP):
        load(loader, SLOW)
    assert not loader._all
    loader.close()


def test_a_picture_that_takes_too_much_memory_is_refused() -> None:
    loader = ImageLoader(SMALL, ImageLimits(memory_bytes=64 << 20))
    with pytest.raises(InvalidInput, match="more memory to decode than this server allows"):
        load(loader, SLOW)
    assert len(load(loader, png(9, 9))) == 1
    loader.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_large_pictures_leave_no_memory_behind(loader: ImageLoader, kind: str) -> None:
    out = BytesIO()
    Image.new("RGB", (7000, 7000), (9, 99, 199)).save(out, kind)
    load(loader, out.getvalue())
    assert max(held_kib(process) for process in loader._all) < 100_000


def held_kib(process: DecoderProcess) -> int:
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


async def load_while_stopped(loader: ImageLoader, data: bytes, after: Callable[[int], object]) -> Any:
    """Load `data` with the only process stopped; `after` gets its pid when the picture is on its way."""
    (process,) = loader._all
    os.kill(process._process.pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(0.05, after, process._process.pid)
    return await loader.load(loader.inspect([("image", data)]))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGPROF])
def test_a_process_that_dies_costs_its_picture_and_is_replaced(how: signal.Signals) -> None:
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1))
    small = png(9, 9)
    load(loader, small)
    (process,) = loader._all
    with pytest.raises(InvalidInput, match=f"^image: {GAVE_UP}"):
        asyncio.run(load_while_stopped(loader, small, partial(end, how)))
    assert len(load(loader, small)) == 1
    assert process not in loader._all and len(loader._all) == 1
    loader.close()


def end(how: signal.Signals, pid: int) -> None:
    os.kill(pid, how)
    os.kill(pid, signal.SIGCONT)


def test_a_picture_that_got_no_time_may_come_again() -> None:
    """A process that the machine does not run: the picture is not to blame."""
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1, patience_s=0.2))
    small = png(9, 9)
    (process,) = (loader._take(),)
    loader._give_back(process)
    with pytest.raises(Overloaded, match="too busy to decode"):
        asyncio.run(load_while_stopped(loader, small, lambda pid: None))
    assert process not in loader._all
    loader.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_was_told_to_end_is_not_its_pictures_fault(how: signal.Signals) -> None:
    if signal.getsignal(how) is signal.SIG_IGN:
        pytest.skip(f"{how.name} is ignored here, and by all that is started from here")
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1))
    load(loader, png(9, 9))
    with pytest.raises(Overloaded):
        asyncio.run(load_while_stopped(loader, png(9, 9), partial(end, how)))
    loader.close()


def test_pictures_that_a_loader_gives_up_as_it_closes_are_not_to_blame() -> None:
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1))
    load(loader, png(9, 9))
    with pytest.raises(Overloaded, match="stops"):
        asyncio.run(load_while_stopped(loader, png(9, 9), lambda pid: loader.close()))


def test_a_process_that_starts_too_slowly_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.prompt.images.decoder_process.START_S", 0.0)
    loader = ImageLoader(SMALL)
    with pytest.raises(Overloaded, match="too busy to decode"):
        load(loader, png(9, 9))
    loader.close()


WORKER = """
import signal, socket, sys, time
from router.prompt.images import worker
from router.prompt.images.frames import receive, send
from router.prompt.images.limits import ImageLimits
from router.prompt.images.settings import ImageSettings

def spin():
    while True:
        pass

def answer(*_):
    {work}
    return b"T", [b"done"]

worker._answer = answer
ours, theirs = socket.socketpair()
send(theirs, b"P", (b"x",))
worker._serve_one(ours, ImageSettings(), ImageLimits(decode_s=0.1))
print(bytes(receive(theirs, 10)[1]).decode())
"""


@pytest.mark.parametrize(
    ("work", "exit_code", "said"), [("time.sleep(0.5)", 0, "done\n"), ("spin()", -signal.SIGPROF, "")]
)
def test_only_the_processors_time_is_held_against_a_picture(work: str, exit_code: int, said: str) -> None:
    command = [sys.executable, "-c", WORKER.replace("{work}", work)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (exit_code, said), ended.stderr


def test_an_idle_process_that_died_is_replaced_unseen() -> None:
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1))
    load(loader, png(9, 9))
    (process,) = loader._all
    process._process.kill()
    process._process.wait(60)
    assert len(load(loader, png(9, 9))) == 1
    assert process not in loader._all
    loader.close()


def test_more_requests_than_may_wait_are_told_to_come_back() -> None:
    loader = ImageLoader(SMALL, ImageLimits(num_workers=1, max_waiting=3))
    pictures = loader.inspect([("x", png(9, 9))])

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(loader.load(pictures) for _ in range(5)), return_exceptions=True)

    answers = asyncio.run(crowd())
    assert [isinstance(answer, Overloaded) for answer in answers] == [False] * 3 + [True] * 2
    assert len(asyncio.run(loader.load(pictures))) == 1
    loader.close()


def test_processes_end_with_their_loader() -> None:
    loader = ImageLoader(SMALL)
    load(loader, png(9, 9))
    (process,) = loader._all
    loader.close()
    assert process._process.poll() is not None


def test_a_process_ends_when_nobody_holds_its_socket() -> None:
    process = DecoderProcess(SMALL, ImageLimits())
    process._link.close()
    assert process._process.wait(60) == 0


def test_a_process_that_cannot_start_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.prompt.images.decoder_process.sys.executable", "/nowhere/python")
    loader = ImageLoader(SMALL)
    with pytest.raises(DecodingFailed):
        load(loader, png(9, 9))
    loader.close()


def test_what_no_settings_can_have_made_is_refused() -> None:
    tiles = cut(Image.new("RGB", (60, 28)), SMALL)
    data = b"".join(encode_tiles(tiles))
    assert decode_tiles(data, SMALL) == tiles
    for wrong in (data[:-1], data + b"x", data[:10], b"\xff" * len(data), bytes(len(data))):
        with pytest.raises(ValueError):
            decode_tiles(wrong, SMALL)


def test_messages_are_bounded_before_memory_is_taken() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, b"x", (b"ab", b"c"))
        assert receive(ours, 3) == (b"x", b"abc")
        theirs.sendall(b"x" + (2**63).to_bytes(8, "big"))
        with pytest.raises(BadMessage):
            receive(ours, 1 << 20)
        with pytest.raises(BadMessage):
            receive(ours, 10, time.monotonic() + 0.01)
        theirs.sendall(b"x" + (5).to_bytes(8, "big") + b"ab")
        theirs.close()
        with pytest.raises(BadMessage):
            receive(ours, 10)


VISION = {
    "hidden_size": 32, "image_size": 56, "intermediate_size": 128, "num_attention_heads": 4, "patch_size": 14,
    "projector_input_dim": 48, "projector_output_dim": 48, "vision_output_dim": 48, "num_hidden_layers": 1,
}  # fmt: skip
CONFIG = parse_config({"model_type": "llama4", "text_config": {}, "vision_config": VISION, "image_token_index": 4})
SPECIALS = {
    "<|image_start|>": 1, "<|image_end|>": 2, "<|image|>": 3, "<|patch|>": 4, "<|tile_x_separator|>": 5,
    "<|tile_y_separator|>": 6,
}  # fmt: skip
IMAGE_FIELDS = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 2,
    "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 56, "width": 56}, "max_patches": 9, "resize_to_max_canvas": True, "input_data_format": None,
}  # fmt: skip


def write(folder: Path, file: str, content: dict[str, Any]) -> None:
    (folder / file).write_text(json.dumps(content))


def test_settings_come_from_the_folder_in_both_spellings(tmp_path: Path) -> None:
    assert CONFIG.vision is not None
    assert read_settings(tmp_path, CONFIG.vision) == ImageSettings(tile_size=56, tokens_per_tile=4)
    write(tmp_path, "preprocessor_config.json", IMAGE_FIELDS)
    expected = ImageSettings(tile_size=56, tokens_per_tile=4, max_patches=9, resize_to_max_canvas=True)
    assert read_settings(tmp_path, CONFIG.vision) == expected
    write(tmp_path, "processor_config.json", {"patch_size": 14, "pixel_shuffle_ratio": 0.5})
    assert read_settings(tmp_path, CONFIG.vision) == expected
    write(tmp_path, "processor_config.json", {"image_processor": {**IMAGE_FIELDS, "max_patches": 5}})
    assert read_settings(tmp_path, CONFIG.vision).max_patches == 5


@pytest.mark.parametrize(
    ("file", "changes", "where"),
    [
        ("preprocessor_config.json", {"image_mean": [0.48, 0.45, 0.4]}, "image_mean"),
        ("preprocessor_config.json", {"image_std": 0.25}, "image_std"),
        ("preprocessor_config.json", {"resample": 3}, "resample"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
        ("preprocessor_config.json", {"size": {"height": 336, "width": 336}}, "size"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 56}}, "size"),
        ("preprocessor_config.json", {"max_patches": 0}, "max_patches"),
        ("preprocessor_config.json", {"max_patches": 1000}, "max_patches"),
        ("preprocessor_config.json", {"max_patches": "4"}, "max_patches"),
        ("preprocessor_config.json", {"resize_to_max_canvas": "no"}, "resize_to_max_canvas"),
        ("processor_config.json", {"patch_size": 28}, "patch_size"),
        ("processor_config.json", {"pixel_shuffle_ratio": 0.25}, "pixel_shuffle_ratio"),
        ("processor_config.json", {"image_processor": {"image_mean": 0}}, "image_mean"),
    ],
)
def test_settings_that_we_do_not_follow_are_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], where: str
) -> None:
    write(tmp_path, file, changes if file.startswith("processor") else {**IMAGE_FIELDS, **changes})
    assert CONFIG.vision is not None
    with pytest.raises(CheckpointError, match=f"^{file}: {where}: must be"):
        read_settings(tmp_path, CONFIG.vision)


def test_models_without_eyes_take_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = Vision.from_folder(tmp_path, CONFIG, SPECIALS)
    assert vision is not None
    assert (vision.tokens.patch, vision.tokens.tokens_per_tile, vision.loader.settings.tile_size) == (4, 4, 56)
    assert Vision.from_folder(tmp_path, parse_config({"model_type": "llama4_text"}), SPECIALS) is None
    assert Vision.from_folder(tmp_path, CONFIG, {"<|image|>": 3}) is None
    assert "the tokenizer" in caplog.text or "tokenizer: lacks" in caplog.text
