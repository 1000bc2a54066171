"""Pictures inside requests: base64 data URLs to the bytes of a file. Nothing is ever fetched."""

from __future__ import annotations

import base64
import re
from io import BytesIO

from experts.errors import InvalidInput
from router.api.errors import Unsupported

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}:")
_MAX_HEAD = 256
"""Characters before the comma of a data URL; what a picture needs is a tenth of that."""
_PIECE = 1 << 16
"""Characters of base64 decoded together, a multiple of four."""
_OTHER_NAMES = {"image/jpg": "image/jpeg"}


class Upload:
    """The file of a data URL. It is handed over once: nobody else keeps megabytes for as long as an answer takes.

    `num_chars` is how much of the request's body it was.
    """

    def __init__(self, url: object) -> None:
        """Raises InvalidInput without a field: the caller knows where the URL stood."""
        if not isinstance(url, str):
            raise InvalidInput("", url, "must be a string")
        self.num_chars = len(url)
        self._data: bytes | None = decode_data_url(url)

    def take(self) -> bytes:
        """The file. For one caller only."""
        assert self._data is not None, "taken before"
        data, self._data = self._data, None
        return data


def decode_data_url(url: str) -> bytes:
    """The bytes that the data URL holds. Their declared type must be one that we read; their content decides.

    Raises InvalidInput without a field, and with only so much of the URL as says what is wrong.
    """
    scheme = _SCHEME.match(url)
    if scheme is None or scheme.group().lower() != "data:":
        raise _no_data_url(scheme.group().lower() if scheme else url[:16])
    head, comma, _ = url[5 : 5 + _MAX_HEAD].partition(",")
    if not comma:
        raise InvalidInput("", "data:" + head[:40], "must hold its data after a comma")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if _OTHER_NAMES.get(media_type, media_type) not in MEDIA_TYPES:
        raise Unsupported("", media_type[:40], f"must be one of {', '.join(MEDIA_TYPES)}")
    if "base64" not in parameters:
        raise InvalidInput("", "data:" + head[:40], "must be in base64, and say so before the comma")
    return _from_base64(url, 5 + len(head) + 1)


def _no_data_url(found: str) -> InvalidInput:
    if found in ("http:", "https:", "file:", "ftp:"):
        return Unsupported("", found, "must be a base64 data URL: fetching is off on this server")
    return InvalidInput("", found, "must be a data URL of an image in base64")


def _from_base64(url: str, start: int) -> bytes:
    """Piece by piece, so that nothing of the file's size is made but the file."""
    data = BytesIO()
    try:
        # Python's decoder lets whole groups end in more of it.
        if (len(url) - start) % 4 or url.endswith("==="):
            raise ValueError("padding of another length")
        for begin in range(start, len(url), _PIECE):
            piece = url[begin : begin + _PIECE]
            if "=" in piece and begin + _PIECE < len(url):
                raise ValueError("padding before the end")
            data.write(base64.b64decode(piece, validate=True))
    except ValueError:
        raise InvalidInput("", url[start : start + 16] + "...", "must hold valid base64 after the comma") from None
    return data.getvalue()
