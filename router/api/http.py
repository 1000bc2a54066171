"""The OpenAI-compatible HTTP server: routes, bodies in, responses and event streams out, clients that go away.

Owns the client's connection and nothing else; what a request means is decided in `schema` and `service`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experts.errors import HerdError
from router.api.backend import Backend, ChatTemplate, Tokenizer
from router.api.body import parse_object
from router.api.body_budget import BodyBudget, HeldBody
from router.api.defaults import ServingDefaults
from router.api.errors import ApiError, UnknownModel, api_error
from router.api.prompts import Prompts
from router.api.rendering import frames, whole
from router.api.running import RunningAnswers
from router.api.schema import Conversation, GenerationRequest, RequestModel, parse_chat, parse_completion
from router.api.service import Job, Service
from router.api.shapes import ChatShape, CompletionShape, Shape, encode
from router.api.tokens import TokenService, parse_detokenize, parse_tokenize
from router.prompt.images.vision import Vision

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
HELD_BODY = "herd.held_body"
"""Where a request's scope has its `HeldBody`."""
MAX_REQUEST_ID = 128
WRITE_GRACE_S = 30.0
"""How long after its deadline a request may still be writing to a client that reads slowly."""
PARSE_IN_THREAD_BYTES = 64 * 1024
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

_Asked = TypeVar("_Asked", bound=RequestModel)
_Prepared = TypeVar("_Prepared")
_request_id: ContextVar[str] = ContextVar("request_id", default="")


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Bounds of the server. `request_timeout_s` is the time a request has, from its last byte in to its last out.

    A stream says something every `keep_alive_s`; its status waits for the first event at most `start_wait_s`.
    A body may have `max_body_bytes` besides its images, and `max_image_body_bytes` with them. All bodies together
    that arrive, are read or have images to be decoded may have `max_bodies_bytes`.
    """

    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    start_wait_s: float = 5.0
    max_body_bytes: int = 4 * 1024 * 1024
    max_image_body_bytes: int = 32 * 1024 * 1024
    max_bodies_bytes: int = 256 * 1024 * 1024
    body_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        assert max(self.max_body_bytes, self.max_image_body_bytes) <= self.max_bodies_bytes, "every body finds room"


def build_app(
    *,
    served_names: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    backend: Backend,
    defaults: ServingDefaults,
    vision: Vision | None = None,
    version: str = "",
    options: HttpOptions | None = None,
) -> FastAPI:
    """The app of one ingress. `served_names`: what clients may call the model, its own name first.

    Without `vision`, images are refused.
    """
    options = options or HttpOptions()
    prompts = Prompts(served_names=served_names, tokenizer=tokenizer, template=template, backend=backend, vision=vision)
    service = Service(prompts=prompts, backend=backend, defaults=defaults, timeout_s=options.request_timeout_s)
    # No automatic pages: they load their scripts from elsewhere.
    app = FastAPI(title="Herd", version=version or "0", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    _add_generation(app, service, options)
    _add_tokens(app, TokenService(prompts, backend), options)
    _add_models(app, prompts.served_names, backend)
    _add_health(app, backend, version)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(HerdError, _refuse)
    app.add_middleware(_Outermost, bodies=BodyBudget(options.max_bodies_bytes))
    return app


def _add_generation(app: FastAPI, service: Service, options: HttpOptions) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await _parsed(request, parse_chat, options, may_hold_images=True)
        prepare = partial(_prepared, request, partial(service.chat, asked))
        return _Reply(partial(_generate, asked, prepare, ChatShape, options), options)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await _parsed(request, parse_completion, options)
        prepare = partial(_prepared, request, partial(service.complete, asked))
        return _Reply(partial(_generate, asked, prepare, CompletionShape, options), options)


def _add_tokens(app: FastAPI, service: TokenService, options: HttpOptions) -> None:
    @app.post("/tokenize")
    @app.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = await _parsed(request, parse_tokenize, options, may_hold_images=True)
        return _Reply(partial(_answer, partial(_prepared, request, partial(service.tokenize, asked))), options)

    @app.post("/detokenize")
    @app.post("/v1/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await _parsed(request, parse_detokenize, options)
        return _Reply(partial(_answer, partial(_prepared, request, partial(service.detokenize, asked))), options)


def _add_models(app: FastAPI, served_names: Sequence[str], backend: Backend) -> None:
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        root = served_names[0]
        head = {"id": name, "object": "model", "created": created, "owned_by": "herd", "root": root}
        return {**head, "max_model_len": backend.max_model_len() or None}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card(name) for name in served_names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in served_names:
            raise UnknownModel(name)
        return _json(card(name))


def _add_health(app: FastAPI, backend: Backend, version: str) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        if not backend.ready():
            problem = "not ready: no router is ready, or an expert has no replica yet"
            raise ApiError(503, problem, code="not_ready", retry_after_s=2.0)
        return _json({"status": "ready"})

    @app.get("/version")
    async def get_version() -> Response:
        return _json({"version": version})


# A body in


async def _parsed(
    request: Request,
    parse: Callable[[Mapping[str, Any]], _Asked],
    options: HttpOptions,
    *,
    may_hold_images: bool = False,
) -> _Asked:
    """The request that the body holds. Raises ApiError, InvalidInput and Overloaded."""
    _check_body_kind(request)
    max_bytes = options.max_image_body_bytes if may_hold_images else options.max_body_bytes
    body = await _read_body(request, max_bytes, options.body_timeout_s)
    if len(body) <= PARSE_IN_THREAD_BYTES:
        return _parse_body(body, parse, options.max_body_bytes)
    return await asyncio.to_thread(_parse_body, body, parse, options.max_body_bytes)


def _parse_body(body: bytearray, parse: Callable[[Mapping[str, Any]], _Asked], max_plain_bytes: int) -> _Asked:
    """A body may be longer than `max_plain_bytes` by its images only. Empties `body`."""
    num_bytes = len(body)
    # The field's name tells long bodies without images before they are parsed.
    if num_bytes > max_plain_bytes and b"image_url" not in body:
        raise _too_large(max_plain_bytes)
    asked = parse(parse_object(body))
    uploads = asked.uploads if isinstance(asked, Conversation) else []
    if num_bytes - sum(upload.num_chars for _, upload in uploads) > max_plain_bytes:
        raise _too_large(max_plain_bytes, " besides its images")
    return asked


def _too_large(max_bytes: int, besides: str = "") -> ApiError:
    return ApiError(413, f"body: may have at most {max_bytes} bytes{besides}", code="request_too_large")


def _check_body_kind(request: Request) -> None:
    # Strict, because a browser may send any other kind from a foreign page without asking first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type: must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "content-encoding: must be absent; send the body as it is", code="unsupported_media_type")


async def _read_body(request: Request, max_bytes: int, timeout_s: float) -> bytearray:
    held = _held(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if int(announced[:20]) > max_bytes:
            raise _too_large(max_bytes)
        held.expect(int(announced[:20]))
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                held.grow_to(len(body) + len(chunk))
                body += chunk
    except TimeoutError:
        raise ApiError(408, "body: did not arrive in time", code="request_timeout", retry_after_s=1.0) from None
    return body


def _held(request: Request) -> HeldBody:
    held: HeldBody = request.scope[HELD_BODY]
    return held


async def _prepared(request: Request, prepare: Callable[[], Awaitable[_Prepared]]) -> _Prepared:
    """What `prepare` makes of the request. Afterwards neither its body nor a file of it is in memory."""
    try:
        return await prepare()
    finally:
        _held(request).release()


# An answer out


class _Reply(Response):
    """A response made while the client's connection is watched: when it closes, the work ends at once."""

    def __init__(self, work: Callable[[Send], Coroutine[Any, Any, None]], options: HttpOptions) -> None:
        super().__init__()
        self._work = work
        self._timeout_s = options.request_timeout_s + WRITE_GRACE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send))
        gone = asyncio.create_task(_until_gone(receive))
        both: set[asyncio.Task[None]] = {work, gone}
        try:
            await asyncio.wait(both, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both)
        for task in both:
            if not task.cancelled():
                task.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(make: Callable[[], Awaitable[Mapping[str, Any]]], send: Send) -> None:
    """Answer one request with the object that `make` makes."""
    try:
        body = await asyncio.to_thread(encode, await make())
        response = Response(body, media_type="application/json")
    except Exception as error:
        response = _refusal(error)
    await _send(response, send)


async def _generate(
    asked: GenerationRequest,
    prepare: Callable[[], Awaitable[Job]],
    shape_of: type[ChatShape] | type[CompletionShape],
    options: HttpOptions,
    send: Send,
) -> None:
    """Answer one request, whole or as a stream."""
    try:
        job = await prepare()
    except Exception as error:
        await _send(_refusal(error), send)
        return
    usage_asked = asked.stream and asked.include_usage
    shape = shape_of(
        answer_id=job.answer_id,
        created=int(time.time()),
        model=asked.model,
        usage_asked=usage_asked,
        logprobs_asked=asked.num_logprobs is not None,
    )
    async with RunningAnswers(job.answers) as running:
        if asked.stream:
            await _stream(running, job, shape, options, send)
            return
        try:
            response = _json(await whole(running, job, shape))
        except Exception as error:
            response = _refusal(error)
    await _send(response, send)


async def _stream(running: RunningAnswers, job: Job, shape: Shape, options: HttpOptions, send: Send) -> None:
    # What is refused is refused at once, so a short wait gives most errors their proper status.
    try:
        first = await running.pieces(options.start_wait_s)
    except Exception as error:
        await _send(_refusal(error), send)
        return
    headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with aclosing(frames(running, first, job, shape, options.keep_alive_s, _translated)) as body:
        async for frame in body:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


async def _send(response: Response, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


# Errors out


def _refusal(error: Exception) -> Response:
    translated = _translated(error)
    return _json(translated.body(), translated.status, translated.headers())


def _translated(error: Exception) -> ApiError:
    translated = api_error(error)
    if translated.status == 500:
        logger.error("request %s failed", _request_id.get(), exc_info=error)
    return translated


async def _refuse(request: Request, error: Exception) -> Response:
    return _refusal(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    response = _refusal(ApiError(error.status_code, f"Invalid URL ({request.method} {request.url.path[:100]})"))
    response.headers.update(error.headers or {})
    return response


class _Outermost:
    """Gives every response its request id, every body its place in `bodies` while its request lives, and an envelope
    to what nobody else caught."""

    def __init__(self, app: ASGIApp, bodies: BodyBudget) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _wanted_id(scope) or f"req_{secrets.token_hex(16)}"
        _request_id.set(request_id)
        started = False
        held = self._bodies.hold()

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]}
            await send(message)

        try:
            await self._app({**scope, HELD_BODY: held}, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("request %s: the client left before its body was complete", request_id)
        except Exception as error:
            # A response that began cannot be mended; the server closes the connection.
            if started:
                raise
            await _send(_refusal(error), send_with_id)
        finally:
            held.release()


def _wanted_id(scope: Scope) -> str:
    """The id that the client chose, if it is one that headers and logs can carry."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID.encode():
            visible = 0 < len(value) <= MAX_REQUEST_ID and all(0x21 <= byte <= 0x7E for byte in value)
            return value.decode("ascii") if visible else ""
    return ""
