"""The process that decodes: takes files over a socket, gives tiles back, and holds nothing else worth stealing.

Bounded in memory and, picture by picture, in time of the processor. It ends when its socket does. Never imported by
the ingress.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from experts.errors import InvalidInput
from router.allocator import return_large_blocks
from router.prompt.images.decode import decode_image
from router.prompt.images.frames import BadMessage, receive, send
from router.prompt.images.limits import ImageLimits
from router.prompt.images.messages import FAILED, READY, REFUSED, TILES, encode_tiles
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import cut

TOO_MUCH_MEMORY = "needs more memory to decode than this server allows"


def main() -> None:
    """Arguments: the socket's number, limits and settings as JSON."""
    link = socket.socket(fileno=int(sys.argv[1]))
    limits = ImageLimits(**json.loads(sys.argv[2]))
    settings = ImageSettings(**json.loads(sys.argv[3]))
    # A terminal sends Ctrl-C to everybody; the ingress decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    # Whoever started us may have ignored or held back what must be able to end this process.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    return_large_blocks()
    _bound_memory(limits.memory_bytes)
    with suppress(BadMessage):
        send(link, READY, ())
        while True:
            _serve_one(link, settings, limits)


def _serve_one(link: socket.socket, settings: ImageSettings, limits: ImageLimits) -> None:
    _, data = receive(link, limits.max_bytes)
    # Time of the processor, not of the clock: a picture is not to blame for a busy machine. The signal's default
    # action ends the process, whatever it is in.
    signal.setitimer(signal.ITIMER_PROF, limits.decode_s)
    kind, parts = _answer(data, settings, limits)
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(link, kind, parts)


def _answer(data: bytearray, settings: ImageSettings, limits: ImageLimits) -> tuple[bytes, list[bytes]]:
    try:
        image = decode_image(bytes(data), limits, "")
        return TILES, encode_tiles(cut(image, settings))
    except InvalidInput as error:
        return REFUSED, [json.dumps([error.value, error.rule]).encode()]
    except MemoryError:
        return REFUSED, [json.dumps(["an image", TOO_MUCH_MEMORY]).encode()]
    except Exception:
        return FAILED, [traceback.format_exc().encode()]


def _bound_memory(num_bytes: int) -> None:
    """So many more than now. Where the system cannot, the bound on pixels still holds."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        allowed = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


if __name__ == "__main__":
    main()
