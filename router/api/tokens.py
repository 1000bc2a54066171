"""`/tokenize` and `/detokenize` in the shape that vLLM gave them: what a request's text is in tokens, and back.

Knows nothing of HTTP. Conversations become exactly the prompts that chat requests make of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator

from experts.errors import InvalidInput
from router.api.backend import Backend
from router.api.fields import UNSUPPORTED_TOKENIZE_CHAT, UNSUPPORTED_TOKENIZE_TEXT
from router.api.prompts import Prompts
from router.api.schema import Conversation, RequestModel, checked_token_ids, parse_request


def _tokens(value: object) -> list[int]:
    if not isinstance(value, list):
        raise InvalidInput("", value, "must be a list of token ids")
    return checked_token_ids("", value)


class _TokenRequest(RequestModel):
    """Without a model, the one that is served here is meant."""

    model: str | None = None


class TokenizeText(_TokenRequest):
    """`POST /tokenize` of a raw prompt."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation, _TokenRequest):
    """`POST /tokenize` of a conversation."""

    return_token_strs: bool = False


class Detokenize(_TokenRequest):
    """`POST /detokenize`."""

    tokens: Annotated[list[int], PlainValidator(_tokens)]


def parse_tokenize(document: Mapping[str, Any]) -> TokenizeText | TokenizeChat:
    """A request from its JSON object, told apart by what it holds. Raises InvalidInput."""
    if document.get("messages") is None:
        return parse_request(TokenizeText, document, UNSUPPORTED_TOKENIZE_TEXT)
    if document.get("prompt") is not None:
        raise InvalidInput("prompt", document["prompt"], "must not stand beside messages")
    return parse_request(TokenizeChat, document, UNSUPPORTED_TOKENIZE_CHAT)


def parse_detokenize(document: Mapping[str, Any]) -> Detokenize:
    """A request from its JSON object. Raises InvalidInput."""
    return parse_request(Detokenize, document, {})


class TokenService:
    """Answers both kinds of request with the object to send. What may take long runs in threads."""

    def __init__(self, prompts: Prompts, backend: Backend) -> None:
        self._prompts = prompts
        self._backend = backend

    async def tokenize(self, asked: TokenizeText | TokenizeChat) -> dict[str, Any]:
        """Raises InvalidInput and Overloaded as chat requests do."""
        self._check_model(asked)
        if isinstance(asked, TokenizeChat):
            token_ids = (await self._prompts.of_conversation(asked)).token_ids
        else:
            encode = (
                self._prompts.tokenizer.encode if asked.add_special_tokens else self._prompts.tokenizer.encode_pieces
            )
            token_ids = await asyncio.to_thread(encode, asked.prompt)
        texts = await asyncio.to_thread(self._texts, token_ids) if asked.return_token_strs else None
        # Not known before a router is there.
        max_model_len = self._backend.max_model_len() or None
        return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts}

    async def detokenize(self, asked: Detokenize) -> dict[str, Any]:
        """Special tokens show by their names. Raises InvalidInput for ids outside of the vocabulary."""
        self._check_model(asked)
        return {"prompt": await asyncio.to_thread(self._text, asked.tokens)}

    def _check_model(self, asked: _TokenRequest) -> None:
        if asked.model is not None:
            self._prompts.check_model(asked.model)

    def _texts(self, token_ids: list[int]) -> list[str]:
        return [self._prompts.tokenizer.token_text(token) for token in token_ids]

    def _text(self, token_ids: list[int]) -> str:
        self._prompts.check_vocabulary("tokens", token_ids)
        return self._prompts.tokenizer.decode(token_ids)
