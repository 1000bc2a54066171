"""Sends requests to an OpenAI-compatible server and measures each. All instants are `time.perf_counter()`'s."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.load.settings import LoadSettings
from cluster.load.stream import AnswerStream, RequestFailed

MAX_REFUSAL_BYTES = 4096
IDLE_S = 2.0
"""Servers close idle connections after five seconds or more, and a request must not meet the closing."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A whole answer: when its request was sent, when each piece of text came, when the stream was over; its text."""

    sent: float
    times: tuple[float, ...]
    ended: float
    prompt_tokens: int | None
    output_tokens: int | None
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """No whole answer. `kind` is what it is counted under; `times` are the instants of the pieces that came."""

    kind: str
    message: str
    times: tuple[float, ...] = ()


Outcome = Answered | Failed


class Client:
    """A connection pool to one server; to be entered and left in one event loop."""

    def __init__(self, settings: LoadSettings) -> None:
        self._base = settings.base_url
        self._path = settings.path
        self._timeout_s = settings.timeout_s
        self._api_key = settings.api_key

    async def __aenter__(self) -> Client:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=headers,
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._session.close()

    async def send(self, body: bytes) -> Outcome:
        """Send one request and read its answer to the end."""
        stream = AnswerStream()
        try:
            return await self._send(body, stream)
        except RequestFailed as error:
            return Failed(kind=error.kind, message=str(error), times=tuple(stream.times))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return Failed(kind=_kind(error), message=_text(error), times=tuple(stream.times))

    async def _send(self, body: bytes, stream: AnswerStream) -> Answered:
        sent = time.perf_counter()
        headers = {"content-type": "application/json"}
        async with self._session.post(self._base + self._path, data=body, headers=headers) as response:
            if response.status != 200:
                raise await _refusal(response)
            try:
                async for data in response.content.iter_any():
                    stream.feed(data, time.perf_counter())
            except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError) as error:
                raise RequestFailed("cut_off", f"the connection broke in the stream: {_text(error)}") from None
            stream.end()
        return Answered(
            sent=sent,
            times=tuple(stream.times),
            ended=time.perf_counter(),
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            text="".join(stream.texts),
        )

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that GET (or, with a body, POST) of `path` gives. Raises RequestFailed."""
        method = "GET" if body is None else "POST"
        try:
            async with self._session.request(method, self._base + path, json=body) as response:
                if response.status != 200:
                    raise await _refusal(response)
                return json.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise RequestFailed(_kind(error), _text(error)) from None


async def _refusal(response: aiohttp.ClientResponse) -> RequestFailed:
    """What a response of another status than 200 says."""
    text = (await response.content.read(MAX_REFUSAL_BYTES)).decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return RequestFailed(f"http_{response.status}", " ".join(text.split())[:500] or str(response.reason))


def _kind(error: Exception) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(error, aiohttp.ClientConnectionError | ConnectionError):
        return "disconnect"
    return "bad_response"


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
