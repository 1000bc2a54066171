"""The error tree of Herd; foreign errors are translated into it once, at the edge where they appear.

HerdError
├── InvalidInput              a user's mistake: names field, value and rule
│   └── ContextOverflow       the prompt does not fit the context
├── CheckpointError           a model folder is not what it claims to be
├── Overloaded                a bounded queue is full; says when to come back
├── ExpertUnavailable         no replica of an expert served before the request's deadline
├── RouterLost                the router of a request died or stopped, and nothing took over in time
├── ControllerUnreachable     nobody answers at the controller's address
└── TransportError            a shipment got no result
    ├── HostLost              the link to the host ended (EOF) or never was
    ├── DeadlinePassed        no answer by the shipment's deadline
    ├── NotHosted             the host does not hold an expert that the shipment names
    ├── HostFailed            the host answered that it could not compute
    └── BadFrame              bytes that break the protocol
"""

from __future__ import annotations

import math
from collections.abc import Iterable


class HerdError(Exception):
    """Base of every error that Herd raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # An actor's error reaches its caller as a copy, and Python would copy by calling the class with `args`: the
        # finished message, which is not what the constructors below take.
        return _copied, (type(self), self.args, self.__dict__)


def _copied(kind: type[HerdError], args: tuple[object, ...], fields: dict[str, object]) -> HerdError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InvalidInput(HerdError, ValueError):
    """A user's mistake.

    `field` is the name the user wrote, `rule` what must hold, `value` what was found (shortened when long).
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: {rule} (got {shown})")


class ContextOverflow(InvalidInput):
    """The prompt (and what it asks for) is longer than the context. Lengths in tokens; `field` held the prompt."""

    def __init__(
        self, num_prompt_tokens: int, num_output_tokens: int, max_model_len: int, field: str = "messages"
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_output_tokens
        self.max_model_len = max_model_len
        asked = f" and asks for {num_output_tokens} more" if num_output_tokens else ""
        super().__init__(
            field,
            num_prompt_tokens,
            f"this model's maximum context length is {max_model_len} tokens; "
            f"the prompt has {num_prompt_tokens} tokens{asked}",
        )


class CheckpointError(HerdError):
    """A model folder is not what it claims to be. `where` names the file, tensor or field."""

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        self.problem = problem
        super().__init__(f"{where}: {problem}")


class Overloaded(HerdError):
    """A bounded queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        self.what = what
        self.retry_after_s = retry_after_s
        super().__init__(f"{what}; try again in {math.ceil(retry_after_s)} s")


class ExpertUnavailable(HerdError):
    """No replica of (layer, expert) served before the request's deadline."""

    def __init__(self, experts: Iterable[tuple[int, int]]) -> None:
        self.experts = sorted(experts)
        names = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in self.experts[:4])
        more = f" and {len(self.experts) - 4} more" if len(self.experts) > 4 else ""
        super().__init__(f"no host served {names}{more} in time")


class RouterLost(HerdError):
    """The router of a request died or stopped, and no other took over in time."""


class ControllerUnreachable(HerdError):
    """Nobody answers at the controller's `address`, or there is none to ask. Serving goes on without it."""

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        super().__init__(f"controller {address or '(no address)'}: {problem}")


class TransportError(HerdError):
    """A shipment got no result. `host` is the name of the host it went to, `problem` what went wrong there."""

    def __init__(self, host: str, problem: str) -> None:
        self.host = host
        self.problem = problem
        super().__init__(f"host {host}: {problem}")


class HostLost(TransportError):
    """The link to the host ended or never was."""


class DeadlinePassed(TransportError):
    """No answer by the shipment's deadline."""


class NotHosted(TransportError):
    """The host does not hold some of the experts that a shipment names; `missing` lists (layer, expert)."""

    def __init__(self, host: str, missing: Iterable[tuple[int, int]]) -> None:
        self.missing = frozenset(missing)
        super().__init__(host, f"does not hold {sorted(self.missing)}")


class HostFailed(TransportError):
    """The host answered that it could not compute the shipment."""


class BadFrame(TransportError):
    """Bytes that break the protocol: wrong lengths, unknown dtype, impossible shape."""
