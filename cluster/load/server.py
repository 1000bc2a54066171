"""What a load needs to know of its server: the model's name, its version, ids of ordinary tokens."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any

from cluster.load.client import Client
from cluster.load.settings import LoadSettings
from cluster.load.stream import RequestFailed
from cluster.load.workloads import WORDS, Vocabulary, safe_ids
from experts.errors import HerdError, InvalidInput

NUM_PIECES = 4000


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """`model`: what requests call the model; `version`: what the server says of itself, "" if nothing."""

    model: str
    version: str
    vocabulary: Vocabulary


async def look_at(client: Client, settings: LoadSettings) -> ServerFacts:
    """Ask for what `settings` leave open. Raises HerdError when the server cannot say it."""
    model = settings.model or await _only_model(client)
    version = await _version(client)
    return ServerFacts(model=model, version=version, vocabulary=await _vocabulary(client, settings, model))


async def _only_model(client: Client) -> str:
    try:
        answer = await client.ask("/v1/models")
        return str(answer["data"][0]["id"])
    except RequestFailed as error:
        raise HerdError(f"asking for the model's name (or say --model NAME): {error.kind}: {error}") from None
    except (KeyError, IndexError, TypeError):
        raise HerdError("the server's /v1/models names no model; say --model NAME") from None


async def _version(client: Client) -> str:
    try:
        return str((await client.ask("/version"))["version"])
    except (RequestFailed, KeyError, TypeError):
        return ""


async def _vocabulary(client: Client, settings: LoadSettings, model: str) -> Vocabulary:
    if settings.chat:
        return Vocabulary(ids=(), words_per_token=await _words_per_token(client, model))
    if settings.vocab_size is not None:
        return Vocabulary(ids=safe_ids(settings.vocab_size))
    try:
        return Vocabulary(ids=sorted(set(await _tokenize(client, model, _sample()))))
    except RequestFailed as error:
        rule = f"must be given (or --chat), since the server's /tokenize does not help: {error.kind}: {error}"
        raise InvalidInput("vocab-size", None, rule) from None


async def _words_per_token(client: Client, model: str) -> float:
    """1 where the server does not say; what prompts really had is measured anyway."""
    try:
        return len(WORDS) / len(await _tokenize(client, model, " " + " ".join(WORDS)))
    except RequestFailed:
        return 1.0


async def _tokenize(client: Client, model: str, text: str) -> list[int]:
    """Token ids of `text` without special ones. The text goes by the two names that servers know it by."""
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False}
    answer: Any = await client.ask("/tokenize", body)
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise RequestFailed("bad_response", "it gives no list of token ids")
    return ids


def _sample() -> str:
    """Words and pieces of words, so that many different tokens are needed to write it."""
    generator = random.Random(0)
    made = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, 6))) for _ in range(NUM_PIECES)]
    return " ".join([*WORDS, *made])
