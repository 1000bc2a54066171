"""The ingress's end of one decoding process: starts it, asks it, and ends it when it does not answer."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from experts.errors import HerdError, InvalidInput, Overloaded
from router.prompt.images.frames import BadMessage, Late, receive, send
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
BUSY = "this server is too busy to decode images"
STOPPING = "this server stops"
GRACE_S = 5.0
"""How long a process whose link ended, or that was killed, may take to be gone."""
START_S = 60.0
RETRY_S = 10.0
ENDED_FROM_OUTSIDE = frozenset((-signal.SIGHUP, -signal.SIGTERM))
"""Ends of a process that no picture brings about: somebody shuts it down."""

_ROOT = Path(__file__).parents[3]
"""The folder with our packages, where Python looks for the process's module."""


class DecodingFailed(HerdError):
    """A decoding process did not start, or met a mistake of ours."""


class DecoderProcess:
    """One process, for one thread at a time. After an error of the link it is over."""

    def __init__(self, settings: ImageSettings, limits: ImageLimits) -> None:
        """Starts it. Raises DecodingFailed, and Overloaded when that takes too long."""
        self._settings = settings
        self._limits = limits
        self._closed = False
        self._link, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs, settings, limits)
        try:
            kind, _ = receive(self._link, MAX_TEXT_BYTES, time.monotonic() + START_S)
        except Late:
            self.close()
            raise Overloaded(BUSY, RETRY_S) from None
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

        Raises InvalidInput(field), DecodingFailed when the mistake is ours, and Overloaded when it is nobody's: the
        process did not get the time of the processor that the picture may take, or was ended from outside.
        """
        until = time.monotonic() + self._limits.patience_s
        try:
            send(self._link, PICTURE, (data,), until)
            answer, body = receive(self._link, max_answer_bytes(self._settings), until)
        except BadMessage as error:
            raise self._given_up(error, field, kind) from None
        if answer == REFUSED:
            value, rule = json.loads(body)
            raise InvalidInput(field, value, rule)
        if answer == FAILED:
            raise DecodingFailed(body.decode(errors="replace"))
        return decode_tiles(body, self._settings)

    def _given_up(self, error: BadMessage, field: str, kind: str) -> HerdError:
        """Ends what is left of the process, and tells the picture that ended it from the machine or us that did."""
        if self._closed:
            return Overloaded(STOPPING, RETRY_S)
        # Ended by its own bounds or the decoder's fault, which the exit says, unless it is there still.
        exit_code = None if isinstance(error, Late) else self._exit_code()
        self.close()
        if isinstance(error, Late) or exit_code in ENDED_FROM_OUTSIDE:
            return Overloaded(BUSY, RETRY_S)
        return InvalidInput(field, kind, GAVE_UP)

    def _exit_code(self) -> int | None:
        """Of a process whose link ended; None if it lives on all the same."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(GRACE_S)
        return None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
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
