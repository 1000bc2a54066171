"""Which router a prompt prefers: requests that begin alike go where their beginning was computed before.

Pure. Preference is by rendezvous hashing: every router draws a number from the key and its own name, the highest wins.
So a router that leaves gives up only its own keys, and one that comes takes only what it will keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from router.engine.images import ImageInput, ImageRules

UNIT_TOKENS = 64
MAX_TOKENS = 256
"""A key is over the first 64, 128, 192 or 256 tokens: long system prompts are cut alike, and short ones get no key."""


def affinity_key(
    prompt_ids: Sequence[int], images: Sequence[ImageInput], rules: ImageRules | None, cache_salt: str
) -> bytes:
    """Equal for prompts that begin with the same tokens and images under the same salt; empty for short prompts.

    All images look alike in `prompt_ids`, so those that begin within the hashed tokens count with their digests.
    """
    num_tokens = min(len(prompt_ids) // UNIT_TOKENS * UNIT_TOKENS, MAX_TOKENS)
    if num_tokens == 0:
        return b""
    head = prompt_ids[:num_tokens]
    key = blake2b(digest_size=16)
    key.update(cache_salt.encode("utf-8", "surrogatepass") + b"\0")
    key.update(",".join(map(str, head)).encode())
    for image in _images_within(head, images, rules):
        key.update(b"\0" + image.digest)
    return key.digest()


def rendezvous(key: bytes, names: Iterable[str]) -> str:
    """The name that `key` prefers among `names`, of which there is at least one."""
    return max(names, key=lambda name: (blake2b(name.encode(), key=key, digest_size=8).digest(), name))


def _images_within(head: Sequence[int], images: Sequence[ImageInput], rules: ImageRules | None) -> Sequence[ImageInput]:
    """Patch tokens are given to images in order; without `rules` any image may be within."""
    if rules is None or not images:
        return images
    patches_left = sum(token == rules.token_id for token in head)
    for count, image in enumerate(images):
        if patches_left <= 0:
            return images[:count]
        patches_left -= image.num_tiles * rules.tokens_per_tile
    return images
