"""Errors as an HTTP client sees them: status, OpenAI's envelope and whether to come back.

Texts name what the client sent and what must hold; never a path, an address or a class of ours.
"""

from __future__ import annotations

import json
import math

from experts.errors import ContextOverflow, ExpertUnavailable, HerdError, InvalidInput, Overloaded, RouterLost
from router.engine.request import FinishEvent, FinishReason

INTERNAL_TEXT = "the server failed to answer this request; the failure has been logged"
LOST_TEXT = "the server lost this request before it was answered; it is safe to send it again"
DEADLINE_TEXT = "the request was not answered within the time that the server allows"
RETRY_AFTER_S = 2.0
"""When to come back if the error itself does not say."""


class Missing(InvalidInput):
    """A required field is absent or null."""

    def __init__(self, field: str) -> None:
        super().__init__(field, None, "is required")


class Unsupported(InvalidInput):
    """A field that would change the answer, and that this server cannot honour yet."""

    def __init__(self, field: str, value: object, rule: str = "is not supported by this server yet") -> None:
        super().__init__(field, value, rule)


class UnknownModel(InvalidInput):
    """The request names a model that is not served here."""

    def __init__(self, model: str) -> None:
        super().__init__("model", model, "no such model is served here; GET /v1/models lists what is")


class ApiError(HerdError):
    """An error ready to be sent. `retry_after_s` is set exactly when sending the same again may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, object]:
        """OpenAI's envelope."""
        inner = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": inner}

    def headers(self) -> dict[str, str]:
        """What tells clients whether and when to try again (openai-python obeys both)."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"x-should-retry": "true", "retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def api_error(error: BaseException) -> ApiError:
    """The one translation of our error tree to HTTP. What is not in it is a fault of ours: 500, fixed text."""
    match error:
        case ApiError():
            return error
        case InvalidInput():
            return _invalid(error)
        case Overloaded():
            return ApiError(429, str(error), code="server_overloaded", retry_after_s=error.retry_after_s)
        case ExpertUnavailable():
            return _expert_unavailable(str(error), RETRY_AFTER_S)
        case RouterLost():
            return _unavailable(RETRY_AFTER_S)
        case _:
            return internal_error()


def finish_error(event: FinishEvent) -> ApiError:
    """The error of a request that ended with one. Its own text is used only where a router wrote it for users."""
    if event.reason is FinishReason.CANCELLED:
        # We never listen to what we cancelled: the routers gave this one up.
        return _unavailable(RETRY_AFTER_S)
    match event.code:
        case "expert_unavailable":
            return _expert_unavailable(event.message, event.retry_after_s or RETRY_AFTER_S)
        case "router_unavailable":
            return _unavailable(event.retry_after_s or RETRY_AFTER_S)
        case "deadline_exceeded":
            return deadline_error()
        case "invalid_input":
            return ApiError(400, event.message)
        case _:
            return internal_error()


def internal_error() -> ApiError:
    return ApiError(500, INTERNAL_TEXT, code="internal_error")


def deadline_error() -> ApiError:
    """Not retryable: what took this long once is not worth taking this long twice without being asked."""
    return ApiError(504, DEADLINE_TEXT, code="deadline_exceeded")


def _unavailable(retry_after_s: float) -> ApiError:
    return ApiError(503, LOST_TEXT, code="server_unavailable", retry_after_s=retry_after_s)


def _expert_unavailable(message: str, retry_after_s: float) -> ApiError:
    return ApiError(503, message, code="expert_unavailable", retry_after_s=retry_after_s)


def _invalid(error: InvalidInput) -> ApiError:
    match error:
        case ContextOverflow():
            # Clients recognise this text, so nothing stands before it.
            return ApiError(400, error.rule, param=error.field, code="context_length_exceeded")
        case UnknownModel():
            return ApiError(404, _sentence(error), param="model", code="model_not_found")
        case Missing():
            message = f"{error.field}: {error.rule}"
            return ApiError(400, message, param=error.field, code="missing_required_parameter")
        case Unsupported():
            return ApiError(400, _sentence(error), param=error.field, code="unsupported_parameter")
        case _:
            return ApiError(400, _sentence(error), param=error.field)


def _sentence(error: InvalidInput) -> str:
    return f"{error.field}: {error.rule} (got {shown(error.value)})"


def shown(value: object) -> str:
    """A value as the client wrote it, in JSON, shortened when long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return "a value that JSON cannot hold"
    return text if len(text) <= 80 else text[:77] + "..."
