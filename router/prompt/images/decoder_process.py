"""The ingress's end of one decoding process: starts it, asks it, and ends it when it does not answer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from experts.errors import HerdError, InvalidInput
from router.prompt.images.frames import BadMessage, receive, send
from router.prompt.images.limits import ImageLimits
from router.prompt.images.messages import (
    FAILED,
    MAX_TEXT_BYTES,
    PICTURE,
    READY,
    REFUSED,
    decode_tiles,
    max_answer_bytes,
)
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import ImageTiles

GAVE_UP = "cannot be decoded within the time and memory that this server allows"
GRACE_S = 5.0
"""How much later than the process's own alarm we give it up: it may not have been given the processor at once."""
START_S = 60.0

_ROOT = Path(__file__).parents[3]
"""The folder with our packages, where Python looks for the process's module."""


class DecodingFailed(HerdError):
    """A decoding process did not start, or met a mistake of ours."""


class DecoderProcess:
    """One process, for one thread at a time. After an error of the link it is over."""

    def __init__(self, settings: ImageSettings, limits: ImageLimits) -> None:
        """Starts it. Raises DecodingFailed."""
        self._settings = settings
        self._limits = limits
        self._link, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs, settings, limits)
        try:
            kind, _ = receive(self._link, MAX_TEXT_BYTES, time.monotonic() + START_S)
        except BadMessage as error:
            self.close()
            raise DecodingFailed(f"a decoding process did not start: {error}") from error
        assert kind == READY

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return self._process.poll() is None

    def decode(self, data: bytes, field: str, kind: str) -> ImageTiles:
        """The tiles of the picture in the file `data`, which claims to be of `kind`.

        Raises InvalidInput(field), or DecodingFailed when the mistake is ours.
        """
        until = time.monotonic() + self._limits.decode_s + GRACE_S
        try:
            send(self._link, PICTURE, (data,), until)
            answer, body = receive(self._link, max_answer_bytes(self._settings), until)
        except BadMessage:
            # Killed by its bounds, by the decoder's own fault, or by us: in any case by this picture.
            self.close()
            raise InvalidInput(field, kind, GAVE_UP) from None
        if answer == REFUSED:
            value, rule = json.loads(body)
            raise InvalidInput(field, value, rule)
        if answer == FAILED:
            raise DecodingFailed(body.decode(errors="replace"))
        return decode_tiles(body, self._settings)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._link.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)


def _spawn(link: socket.socket, settings: ImageSettings, limits: ImageLimits) -> subprocess.Popen[bytes]:
    number = link.fileno()
    texts = [json.dumps(asdict(limits)), json.dumps(asdict(settings))]
    command = [sys.executable, "-m", "router.prompt.images.worker", str(number), *texts]
    try:
        return subprocess.Popen(command, cwd=_ROOT, pass_fds=[number], stdin=subprocess.DEVNULL)
    except OSError as error:
        raise DecodingFailed(f"a decoding process cannot be started: {type(error).__name__}") from error
