"""Names of the content of full KV blocks: digests over everything that the keys and values in them follow from.

The name of a block covers its tokens, the parts of images placed in it, and by the name of the block before it
everything earlier; the first stands on the salts of the request. Equal names mean equal keys and values, so that
requests may have the block in common; they are digests that nobody can forge.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from router.engine.request import Request

NAME_BYTES = 32


def names_of_blocks(request: Request, count: int, block_size: int) -> list[bytes]:
    """Names of at least the first `count` blocks, whose tokens are known. Each is made once and kept in the request:
    known tokens never change."""
    assert count * block_size <= request.num_known, f"{request.request_id}: block {count - 1} is not known yet"
    names = request.block_names
    while len(names) < count:
        names.append(
            next_name(names[-1] if names else root_name(request), request, len(names) * block_size, block_size)
        )
    return names


def root_name(request: Request) -> bytes:
    """What stands before the first block."""
    digest = blake2b(digest_size=NAME_BYTES)
    for salt in (request.cache_salt, request.adapter_salt):
        # JSON can bring half a surrogate pair.
        text = salt.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def next_name(parent: bytes, request: Request, start: int, block_size: int) -> bytes:
    """The name of the block of positions start … start + block_size − 1 that follows `parent`."""
    digest = blake2b(parent, digest_size=NAME_BYTES)
    digest.update(array("I", request.token_ids[start : start + block_size]))
    for placed in request.images:
        rows = placed.rows_within(start, block_size)
        if rows:
            offsets = [position - start for position in placed.positions[rows.start : rows.stop]]
            digest.update(array("Q", [len(placed.image.digest), rows.start, len(offsets), *offsets]))
            digest.update(placed.image.digest)
    return digest.digest()
