"""Decodes clients' pictures off the event loop, a bounded number at a time. Owns the decoding processes.

Processes, not threads: decoders are C code fed with strangers' bytes. One that crashes, hangs or takes too much
memory costs its own picture and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from experts.errors import InvalidInput, Overloaded
from router.prompt.images.canvas import Layout, lay_out
from router.prompt.images.decoder_process import DecoderProcess
from router.prompt.images.header import ImageHeader, read_header
from router.prompt.images.limits import ImageLimits
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import ImageTiles

RETRY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file from the request's `field`, not decoded yet; `layout` is what its header promises."""

    data: bytes = field(repr=False)
    field: str
    header: ImageHeader
    layout: Layout


class ImageLoader:
    """Pictures to tiles, for any number of requests at once. Processes start when they are first needed."""

    def __init__(self, settings: ImageSettings, limits: ImageLimits | None = None) -> None:
        self.settings = settings
        self.limits = limits or ImageLimits()
        self._threads = ThreadPoolExecutor(self.limits.num_workers, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._idle: list[DecoderProcess] = []
        self._all: set[DecoderProcess] = set()
        self._closed = False
        self._num_requests = 0

    def inspect(self, files: Sequence[tuple[str, bytes]]) -> list[Picture]:
        """The pictures of one request, (field, file) each, by their headers; cheap.

        Raises InvalidInput for what is no picture that we decode, and for too many or too large ones.
        """
        limits = self.limits
        if len(files) > limits.max_images:
            rule = f"a request may hold at most {limits.max_images} images"
            raise InvalidInput("messages", f"{len(files)} images", rule)
        pictures = [self._inspect(data, field) for field, data in files]
        num_pixels = sum(picture.header.width * picture.header.height for picture in pictures)
        if num_pixels > limits.max_request_pixels:
            rule = f"the images of a request may have at most {limits.max_request_pixels} pixels together"
            raise InvalidInput("messages", f"{num_pixels} pixels", rule)
        num_tiles = sum(picture.layout.num_tiles for picture in pictures)
        if num_tiles > limits.max_tiles:
            rule = (
                f"the images of a request may have at most {limits.max_tiles} tiles of {self.settings.tile_size} pixels"
            )
            raise InvalidInput("messages", f"{num_tiles} tiles", rule)
        return pictures

    def _inspect(self, data: bytes, field: str) -> Picture:
        header = read_header(data, self.limits, field)
        # Rotation may swap rows and columns, but not change how many tiles there are.
        return Picture(
            data=data, field=field, header=header, layout=lay_out(header.width, header.height, self.settings)
        )

    async def load(self, pictures: Sequence[Picture]) -> list[ImageTiles]:
        """The tiles of all `pictures`, in their order, decoded one after another so that requests take turns.

        Raises InvalidInput naming the picture's field, DecodingFailed, and Overloaded when too many requests wait or
        the machine is too busy.
        """
        if self._num_requests >= self.limits.max_waiting:
            raise Overloaded(f"{self._num_requests} requests wait for their images", RETRY_S)
        self._num_requests += 1
        try:
            loop = asyncio.get_running_loop()
            return [await loop.run_in_executor(self._threads, self._decode, picture) for picture in pictures]
        finally:
            self._num_requests -= 1

    def close(self) -> None:
        """End all processes. Pictures being decoded are given up, as Overloaded."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()

    def _decode(self, picture: Picture) -> ImageTiles:
        process = self._take()
        try:
            return process.decode(picture.data, picture.field, picture.header.kind)
        finally:
            self._give_back(process)

    def _take(self) -> DecoderProcess:
        while (idle := self._pop_idle()) is not None:
            if idle.alive:
                return idle
            # Somebody else ended it.
            self._drop(idle)
        process = DecoderProcess(self.settings, self.limits)
        with self._lock:
            self._all.add(process)
        return process

    def _pop_idle(self) -> DecoderProcess | None:
        with self._lock:
            # The one used last: others may stay out of memory.
            return self._idle.pop() if self._idle else None

    def _give_back(self, process: DecoderProcess) -> None:
        with self._lock:
            reusable = process.alive and not self._closed
            if reusable:
                self._idle.append(process)
        if not reusable:
            self._drop(process)

    def _drop(self, process: DecoderProcess) -> None:
        with self._lock:
            self._all.discard(process)
        process.close()
