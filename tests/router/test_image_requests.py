"""Images in chat requests: data URLs, their limits and refusals, what reaches the routers; over a scripted backend."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import resource
import struct
import zlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripted_backend import BOS, EOS, ByteTokenizer, PlainTemplate, ScriptedBackend, stop

from experts.errors import InvalidInput
from router.api.data_url import decode_data_url
from router.api.defaults import ServingDefaults
from router.api.errors import Unsupported
from router.api.http import HttpOptions, build_app
from router.api.schema import parse_chat
from router.engine.images import ImageInput
from router.prompt.images.decode import decode_image
from router.prompt.images.limits import ImageLimits
from router.prompt.images.loader import ImageLoader, Picture
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import ImageTiles, cut
from router.prompt.images.tokens import ImageTokens
from router.prompt.images.vision import Vision

SETTINGS = ImageSettings(tile_size=28, tokens_per_tile=2)
TOKENS = ImageTokens(start=301, end=302, image=303, patch=304, between_cols=305, after_row=306, tokens_per_tile=2)
ONE_TILE = [301, 303, 304, 304, 302]
WORDS = r"0x[0-9a-f]|Traceback|Error|\.py|site-packages|object at|PIL|Pillow|/tmp|/work|/root|router\.|worker"


def file_of(width: int, height: int, kind: str = "PNG", color: object = (9, 99, 199)) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), color).save(out, kind)  # type: ignore[arg-type]
    return out.getvalue()


def url_of(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def picture(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def chat(*messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": parts} for parts in messages], **fields}


class Server:
    def __init__(self, vision: Vision | None, *, max_model_len: int = 1000, options: HttpOptions | None = None) -> None:
        self.backend = ScriptedBackend(lambda _: ("ok", EOS, stop()), max_model_len)
        self.template = PlainTemplate()
        self._app = build_app(
            served_names=["m"],
            tokenizer=ByteTokenizer(),
            template=self.template,
            backend=self.backend,
            defaults=ServingDefaults(eos_token_ids=frozenset({EOS})),
            vision=vision,
            options=options,
        )

    def post(self, *bodies: object, url: str = "/v1/chat/completions") -> list[httpx.Response]:
        """All of them at the same time."""

        async def go() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://herd", timeout=None) as client:
                return await asyncio.gather(*(client.post(url, json=body) for body in bodies))

        return asyncio.run(go())

    def refusal(self, body: object, status: int = 400, url: str = "/v1/chat/completions") -> dict[str, Any]:
        (response,) = self.post(body, url=url)
        assert response.status_code == status, response.text
        assert not re.search(WORDS, response.text), response.text
        assert not self.backend.submissions
        error: dict[str, Any] = response.json()["error"]
        return error


@pytest.fixture(scope="module")
def vision() -> Iterator[Vision]:
    vision = Vision(loader=ImageLoader(SETTINGS), tokens=TOKENS)
    yield vision
    vision.loader.close()


def as_input(data: bytes) -> ImageInput:
    tiles = cut(decode_image(data, ImageLimits()), SETTINGS)
    return ImageInput(digest=tiles.digest, num_tiles=tiles.num_tiles, pixels=tiles.pixels)


def test_images_stand_where_they_were_sent(vision: Vision) -> None:
    server = Server(vision)
    files = [file_of(20, 20), file_of(60, 20, "JPEG"), file_of(20, 21, "WebP"), file_of(9, 9, "GIF")]
    first = [text("a"), picture(url_of(files[0])), text("b"), picture(url_of(files[1], "image/jpeg"))]
    second = [picture(url_of(files[2], "image/webp")), picture(url_of(files[3], "image/gif")), text("c")]
    (response,) = server.post(chat(first, second))
    assert response.json()["choices"][0]["message"]["content"] == "ok"
    (asked,) = server.backend.submissions
    three_tiles = TOKENS.expand(1, 3)
    assert asked.prompt_ids == [
        BOS, *b"user:a", *ONE_TILE, *b"b", *three_tiles, *b"|user:", *ONE_TILE, *ONE_TILE, *b"c|assistant:",
    ]  # fmt: skip
    assert list(asked.images) == [as_input(data) for data in files]
    assert sum(asked.prompt_ids.count(token) for token in (304,)) == 2 * sum(i.num_tiles for i in asked.images)
    assert response.json()["usage"]["prompt_tokens"] == len(asked.prompt_ids)
    assert server.template.messages[0]["content"][1] == {"type": "image"}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_any_message_may_hold_images(vision: Vision, role: str) -> None:
    body = {"model": "m", "messages": [{"role": role, "content": [picture(url_of(file_of(3, 3)))]}]}
    server = Server(vision)
    assert server.post(body)[0].status_code == 200
    assert len(server.backend.submissions[0].images) == 1


def test_many_requests_side_by_side_get_their_own_images(vision: Vision) -> None:
    server = Server(vision)
    colors = [(i * 15, 0, 255 - i * 15) for i in range(16)]
    bodies = [chat([picture(url_of(file_of(8, 8, color=color))), text(f"{i}")]) for i, color in enumerate(colors)]
    assert [response.status_code for response in server.post(*bodies)] == [200] * 16
    for asked in server.backend.submissions:
        number = int(bytes(token for token in asked.prompt_ids if token < 256).decode()[5:].partition("|")[0])
        assert list(asked.images) == [as_input(file_of(8, 8, color=colors[number]))]


def test_streams_take_images_too(vision: Vision) -> None:
    (response,) = Server(vision).post(
        chat([picture(url_of(file_of(3, 3)))], stream=True, stream_options={"include_usage": True})
    )
    chunks = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
    assert chunks[-1]["usage"]["prompt_tokens"] == len(BOS.to_bytes(2, "big")) - 1 + len("user:|assistant:") + 5


def test_the_same_picture_has_the_same_digest_in_any_file_format(vision: Vision) -> None:
    server = Server(vision)
    server.post(chat([picture(url_of(file_of(30, 30, kind), f"image/{kind.lower()}")) for kind in ("PNG", "GIF")]))
    one, other = server.backend.submissions[0].images
    assert one.pixels == other.pixels and one.digest == other.digest


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/cat.png", "fetching is off"),
        ("http://169.254.169.254/latest", "fetching is off"),
        ("FILE:///etc/passwd", "fetching is off"),
        ("ftp://example.com/cat.png", "fetching is off"),
        ("/etc/passwd", "must be a data URL"),
        ("gopher://x", "must be a data URL"),
        ("", "must be a data URL"),
        ("iVBORw0KGgo=", "must be a data URL"),
        ("data:", "after a comma"),
        ("data:image/png;base64", "after a comma"),
        ("data:,hello", "must be one of image/png"),
        ("data:text/html;base64,AAAA", "must be one of image/png"),
        ("data:image/svg+xml;base64,AAAA", "must be one of image/png"),
        ("data:image/tiff;base64,AAAA", "must be one of image/png"),
        ("data:image/png,AAAA", "must be in base64"),
        ("data:image/png;base32,AAAA", "must be in base64"),
        ("data:image/png;base64,AAA", "valid base64"),
        ("data:image/png;base64,AAAA=AAA", "valid base64"),
        ("data:image/png;base64,AA*A", "valid base64"),
        ("data:image/png;base64,AAAA\nAAAA", "valid base64"),
        ("data:image/png;base64,ÄÄÄÄ", "valid base64"),
        ("data:image/png;base64,", "must be a PNG, JPEG, WebP or GIF"),
        ("data:image/png;base64,AAAA", "must be a PNG, JPEG, WebP or GIF"),
        (url_of(b"BM" + bytes(60)), "must be a PNG, JPEG, WebP or GIF"),
        (url_of(b"\x89PNG\r\n\x1a\n"), "damaged or cut off"),
        (url_of(file_of(40, 40)[:-30]), "damaged or cut off"),
        (5, "must be a string"),
        (["x"], "must be a string"),
        (None, "is required"),
    ],
)
def test_bad_urls_are_named_with_their_reason(vision: Vision, url: object, words: str) -> None:
    good = picture(url_of(file_of(3, 3)))
    error = Server(vision).refusal(chat([good, text("x")], [text("y"), good, picture(url)]))
    assert error["param"] == "messages[1].content[2].image_url.url"
    assert words in error["message"] and "passwd" not in error["message"].partition("(got")[0]
    assert len(error["message"]) < 250


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}, "image_url.detail"),
        ({"type": "image_url", "image_url": {"url": "data:image/gif;base64,", "detail": "odd"}}, "image_url.detail"),
        ({"type": "image"}, "type"),
        ({"type": "input_image", "image_url": "x"}, "type"),
    ],
)
def test_parts_of_the_wrong_shape_are_named(vision: Vision, part: dict[str, Any], param: str) -> None:
    assert Server(vision).refusal(chat([part]))["param"] == f"messages[0].content[0].{param}"


def test_a_mislabelled_file_is_what_it_is(vision: Vision) -> None:
    server = Server(vision)
    data = file_of(20, 20, "JPEG")
    server.post(chat([picture(url_of(data, "image/png"))]), chat([picture(url_of(data, "IMAGE/JPG;q=1"))]))
    assert [list(asked.images) for asked in server.backend.submissions] == [[as_input(data)]] * 2


def test_null_and_known_details_change_nothing(vision: Vision) -> None:
    server = Server(vision)
    for detail in (None, "auto", "high"):
        part = {"type": "image_url", "image_url": {"url": url_of(file_of(3, 3)), "detail": detail}}
        assert server.post(chat([part]))[0].status_code == 200


def test_a_model_without_vision_refuses_images() -> None:
    error = Server(None).refusal(chat([text("look:"), picture(url_of(file_of(3, 3)))]))
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert "this model takes no images" in error["message"]


def test_completions_take_no_images(vision: Vision) -> None:
    error = Server(vision).refusal({"model": "m", "prompt": [picture(url_of(file_of(3, 3)))]}, url="/v1/completions")
    assert error["param"].startswith("prompt")


def test_too_many_images_are_refused(vision: Vision) -> None:
    part = picture(url_of(file_of(3, 3)))
    server = Server(vision)
    assert server.post(chat([part] * 4, [part] * 4))[0].status_code == 200
    for num in (9, 50):
        error = Server(vision).refusal(chat([part] * num))
        assert error["param"] == "messages" and "at most 8 images" in error["message"]


def test_images_that_do_not_fit_the_context_are_refused_before_they_are_decoded() -> None:
    vision = Vision(loader=ImageLoader(SETTINGS), tokens=TOKENS)
    wide = picture(url_of(file_of(28 * 16, 28)))
    error = Server(vision, max_model_len=100).refusal(chat([wide] * 3))
    assert error["code"] == "context_length_exceeded"
    assert not vision.loader._all, "nothing was decoded"
    error = Server(vision, max_model_len=60).refusal(chat([wide, text("x" * 50)]))
    assert error["code"] == "context_length_exceeded"
    vision.loader.close()


def png_bomb(width: int, height: int, num_bytes: int) -> bytes:
    """Zeros, a thousandth of their number in the file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (1_000_000, 1), (100, 640_001)]
)
def test_bombs_are_refused_and_take_no_memory(vision: Vision, width: int, height: int) -> None:
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = Server(vision).refusal(chat([picture(url_of(png_bomb(width, height, 256 << 20)))]))
    assert "may have at most" in error["message"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB more"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 100_000), (100_000, 1), (3, 2)])
def test_odd_sizes_are_answered(vision: Vision, width: int, height: int) -> None:
    server = Server(vision)
    data = file_of(width, height)
    assert server.post(chat([picture(url_of(data))]))[0].status_code == 200
    assert list(server.backend.submissions[0].images) == [as_input(data)]


def test_a_body_may_be_longer_by_its_images_only(vision: Vision) -> None:
    options = HttpOptions(max_body_bytes=10_000, max_image_body_bytes=100_000)
    noise = Image.effect_noise((150, 150), 90.0)
    out = BytesIO()
    noise.save(out, "PNG")
    part = picture(url_of(out.getvalue()))
    assert 20_000 < len(part["image_url"]["url"]) < 45_000
    server = Server(vision, options=options, max_model_len=100_000)
    assert server.post(chat([part, part]))[0].status_code == 200
    for refused in (chat([part, text("x" * 10_000)]), chat([text("x" * 50_000)]), chat([text("image_url" * 2_000)])):
        assert Server(vision, options=options).refusal(refused, 413)["code"] == "request_too_large"
    assert "100000 bytes" in Server(vision, options=options).refusal(chat([part] * 4), 413)["message"]


class GatedLoader(ImageLoader):
    """Decodes when it is told to."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.gate = asyncio.Event()
        self.num_waiting = 0

    async def load(self, pictures: Sequence[Picture]) -> list[ImageTiles]:
        self.num_waiting += 1
        await self.gate.wait()
        return await super().load(pictures)


def test_bodies_in_flight_have_a_budget() -> None:
    """Full while pictures wait to be decoded; text passes all the same; room comes back, whatever became of a body."""
    noise = Image.effect_noise((400, 400), 90.0)
    out = BytesIO()
    noise.save(out, "PNG")
    large = chat([picture(url_of(out.getvalue()))])
    size = len(json.dumps(large))
    assert 150_000 < size < 250_000
    options = HttpOptions(max_body_bytes=100_000, max_image_body_bytes=300_000, max_bodies_bytes=300_000)
    loader = GatedLoader()
    server = Server(Vision(loader=loader, tokens=TOKENS), options=options, max_model_len=10**6)
    answers = asyncio.Event()
    server.backend.script = lambda asked: (*([answers] if asked.images else []), "ok", EOS, stop())

    async def pieces() -> AsyncGenerator[bytes, None]:
        data = json.dumps(large).encode()
        for start in range(0, len(data), 10_000):
            yield data[start : start + 10_000]

    async def submitted(count: int) -> None:
        while len(server.backend.submissions) < count:
            await asyncio.sleep(0)

    async def go() -> None:
        transport = httpx.ASGITransport(server._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://herd", timeout=None) as client:
            post = partial(client.post, "/v1/chat/completions")
            running = [asyncio.create_task(post(json=large)) for _ in range(2)]
            while loader.num_waiting < 2:
                await asyncio.sleep(0)
            for refused in (
                await post(json=large),
                await post(content=pieces(), headers={"content-type": "application/json"}),
            ):
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
                assert refused.json()["error"]["code"] == "server_overloaded"
            assert (await post(json=chat([text("hi")]))).status_code == 200
            loader.gate.set()
            await submitted(3)
            # Answers that still run hold nothing.
            running += [asyncio.create_task(post(json=large)) for _ in range(2)]
            await asyncio.wait([*running, asyncio.create_task(submitted(5))], return_when=asyncio.FIRST_COMPLETED)
            answers.set()
            assert [(await task).status_code for task in running] == [200] * 4
            for body in (large, {**large, "model": "no"}, chat([picture("data:" + "x" * 200_000)]), large, large):
                assert (await post(json=body)).status_code != 429

    asyncio.run(go())
    loader.close()


def test_a_body_that_broke_off_gives_its_room_back() -> None:
    options = HttpOptions(max_body_bytes=100_000, max_image_body_bytes=100_000, max_bodies_bytes=100_000)
    server = Server(None, options=options, max_model_len=10**6)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}

    async def broken_off() -> None:
        messages = iter(
            [{"type": "http.request", "body": b"x" * 99_000, "more_body": True}, {"type": "http.disconnect"}]
        )

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            raise AssertionError("nobody listens")

        await server._app(scope, receive, send)

    for _ in range(5):
        asyncio.run(broken_off())
    assert server.post(chat([text("x" * 99_000)]))[0].status_code == 200


def test_images_are_not_kept_while_the_answer_runs(vision: Vision) -> None:
    request = parse_chat(chat([picture(url_of(file_of(3, 3)))]))
    ((path, upload),) = request.uploads
    assert (path, upload.num_chars) == ("messages[0].content[0].image_url.url", len(url_of(file_of(3, 3))))
    assert upload.take() == file_of(3, 3)
    with pytest.raises(AssertionError):
        upload.take()


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=40), media_type=st.sampled_from(["image/png", "Image/WebP", " image/jpeg ; a=b"]))
def test_data_urls_give_their_bytes(data: bytes, media_type: str) -> None:
    assert decode_data_url(url_of(data, media_type)) == data


@settings(deadline=None, max_examples=300)
@given(
    encoded=st.binary(max_size=30).map(lambda data: base64.b64encode(data).decode())
    | st.lists(st.sampled_from(["AAAA", "+/+/", "AA==", "AAA=", "A", "="]), max_size=6).map("".join)
    | st.lists(st.sampled_from("AB+/=-é\n"), max_size=24).map("".join),
    pieces=st.integers(1, 4),
)
def test_base64_in_pieces_is_base64(encoded: str, pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.api.data_url._PIECE", 4 * pieces)
        try:
            found: bytes | None = decode_data_url("data:image/png;base64," + encoded)
        except InvalidInput:
            found = None
    whole = re.fullmatch(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", encoded)
    expected = base64.b64decode(encoded) if whole else None
    assert found == expected


@settings(deadline=None, max_examples=300)
@given(
    st.text(max_size=60)
    | st.builds("".join, st.lists(st.sampled_from(["data:", "image/png", ";", ",", "base64", "AAAA", "=", "http:"])))
)
def test_any_string_is_a_file_or_a_short_refusal(url: str) -> None:
    try:
        assert isinstance(decode_data_url(url), bytes)
    except InvalidInput as error:
        assert isinstance(error, Unsupported) or type(error) is InvalidInput
        assert len(str(error)) < 250 and not error.field
