"""Turns requests, events and refusals into messages of `router.proto` and back. Knows nothing of calls or routers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from experts.errors import ContextOverflow, InvalidInput, Overloaded
from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from router.wire import router_pb2 as pb

REFUSAL_KEY = "herd-refusal-bin"
"""Trailing metadata key under which a `Refusal` travels."""

MAX_SHOWN = 200
"""Characters of a user's text that an error repeats: metadata is small."""

SEED_MASK = (1 << 64) - 1

MAX_MESSAGE_BYTES = 96 << 20
"""Of one message: eight images of 17 tiles of 448 pixels square, and a prompt of millions of tokens."""

MAX_IMAGES = 64
"""Of one request, as a router bounds it; ingresses take fewer."""

MAX_SALT = 128
"""Characters of a salt, all of them visible ASCII."""

DIGEST_BYTES = 32
CHANNELS = 3

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
REASONS_BACK = {number: reason for reason, number in REASONS.items()}

Refused = Overloaded | InvalidInput
"""What a router may answer instead of taking a request; `ContextOverflow` is an `InvalidInput`."""


def encode_submit(
    *,
    request_id: str,
    attempt: int,
    prompt_ids: Sequence[int],
    emitted_ids: Sequence[int],
    sampling: SamplingParams,
    timeout_s: float,
    images: Sequence[ImageInput] = (),
    priority: int = 0,
    cache_salt: str = "",
) -> pb.SubmitRequest:
    """`timeout_s` is what is left of the request's time, rounded up to whole milliseconds."""
    return pb.SubmitRequest(
        request_id=request_id,
        attempt=attempt,
        prompt_ids=prompt_ids,
        emitted_ids=emitted_ids,
        sampling=encode_sampling(sampling),
        timeout_ms=math.ceil(max(timeout_s, 0.0) * 1000),
        images=[pb.Image(digest=image.digest, num_tiles=image.num_tiles, pixels=image.pixels) for image in images],
        priority=priority,
        cache_salt=cache_salt,
    )


def decode_images(message: pb.SubmitRequest) -> tuple[ImageInput, ...]:
    """The images of a request. Raises InvalidInput for what cannot be tiles; how large tiles are, the engine knows."""
    if len(message.images) > MAX_IMAGES:
        raise InvalidInput("images", len(message.images), f"a request may hold at most {MAX_IMAGES} images")
    return tuple(map(_decode_image, message.images))


def _decode_image(image: pb.Image) -> ImageInput:
    # The message's own size bounds what is copied here.
    digest, pixels = image.digest, image.pixels
    if len(digest) != DIGEST_BYTES:
        raise InvalidInput("images", len(digest), f"digests must have {DIGEST_BYTES} bytes")
    if image.num_tiles < 1 or not pixels or len(pixels) % (CHANNELS * image.num_tiles):
        rule = "pixels must be as many for each tile, in three channels"
        raise InvalidInput("images", f"{len(pixels)} bytes, {image.num_tiles} tiles", rule)
    return ImageInput(digest=digest, num_tiles=image.num_tiles, pixels=pixels)


def decode_salt(message: pb.SubmitRequest) -> str:
    """The salt of a request, empty for none. Raises InvalidInput."""
    salt = message.cache_salt
    if len(salt) > MAX_SALT or not all("!" <= char <= "~" for char in salt):
        raise InvalidInput("cache_salt", salt[:MAX_SHOWN], f"must have at most {MAX_SALT} characters of visible ASCII")
    return salt


def encode_sampling(sampling: SamplingParams) -> pb.Sampling:
    """The message of `sampling`."""
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[pb.LogitBias(token_id=token, bias=bias) for token, bias in sampling.logit_bias],
        seed=sampling.seed & SEED_MASK,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        num_logprobs=sampling.num_logprobs,
    )


def decode_sampling(message: pb.Sampling) -> SamplingParams:
    """A negative seed arrives as its two's complement. Numbers out of range are the engine's to refuse."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def encode_events(events: Iterable[Event]) -> pb.SubmitResponse:
    """One response for all `events`; a FinishEvent may only be the last of them."""
    response = pb.SubmitResponse()
    for event in events:
        assert not response.HasField("finish"), "an event after the finish"
        if isinstance(event, TokenEvent):
            logprobs = _encode_logprobs(event.logprobs) if event.logprobs is not None else None
            response.tokens.add(index=event.index, token_id=event.token_id, logprobs=logprobs)
        else:
            response.finish.CopyFrom(_encode_finish(event))
    return response


def decode_events(request_id: str, response: pb.SubmitResponse) -> tuple[tuple[TokenEvent, ...], FinishEvent | None]:
    """Tokens of a response in their order, and the finish where it carries one."""
    tokens = tuple(_decode_token(request_id, token) for token in response.tokens)
    if not response.HasField("finish"):
        return tokens, None
    return tokens, _decode_finish(request_id, response.finish)


def _decode_token(request_id: str, token: pb.Token) -> TokenEvent:
    logprobs = _decode_logprobs(token.logprobs) if token.HasField("logprobs") else None
    return TokenEvent(request_id=request_id, index=token.index, token_id=token.token_id, logprobs=logprobs)


def _encode_logprobs(logprobs: TokenLogprobs) -> pb.Logprobs:
    top = [pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in logprobs.top]
    return pb.Logprobs(chosen=logprobs.logprob, top=top)


def _decode_logprobs(message: pb.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(logprob=message.chosen, top=tuple((one.token_id, one.logprob) for one in message.top))


def _encode_finish(event: FinishEvent) -> pb.Finish:
    return pb.Finish(
        reason=REASONS[event.reason],
        code=event.code,
        message=event.message,
        retry_after_s=event.retry_after_s,
    )


def _decode_finish(request_id: str, finish: pb.Finish) -> FinishEvent:
    """A reason that this version does not know is an error that names it."""
    reason = REASONS_BACK.get(finish.reason)
    if reason is None:
        return FinishEvent(
            request_id=request_id,
            reason=FinishReason.ERROR,
            code="bad_response",
            message=f"the router ended the request with the unknown reason {int(finish.reason)}",
        )
    return FinishEvent(
        request_id=request_id,
        reason=reason,
        code=finish.code,
        message=finish.message,
        retry_after_s=finish.retry_after_s,
    )


def encode_refusal(error: Refused) -> bytes:
    """The type and the parts of `error`; long texts of the user are shortened."""
    return _refusal(error).SerializeToString()


def _refusal(error: Refused) -> pb.Refusal:
    if isinstance(error, Overloaded):
        return pb.Refusal(overloaded=pb.Overloaded(what=error.what[:MAX_SHOWN], retry_after_s=error.retry_after_s))
    if isinstance(error, ContextOverflow):
        return pb.Refusal(
            context_overflow=pb.ContextOverflow(
                num_prompt_tokens=error.num_prompt_tokens,
                num_output_tokens=error.num_output_tokens,
                max_model_len=error.max_model_len,
            )
        )
    return pb.Refusal(
        invalid_input=pb.InvalidInput(
            field=error.field[:MAX_SHOWN], value_json=_value_json(error.value), rule=error.rule[:MAX_SHOWN]
        )
    )


def decode_refusal(data: bytes) -> Refused | None:
    """The error that `encode_refusal` was given; None when this version does not know its kind."""
    refusal = pb.Refusal.FromString(data)
    kind = refusal.WhichOneof("kind")
    if kind == "overloaded":
        return Overloaded(refusal.overloaded.what, refusal.overloaded.retry_after_s)
    if kind == "context_overflow":
        overflow = refusal.context_overflow
        return ContextOverflow(overflow.num_prompt_tokens, overflow.num_output_tokens, overflow.max_model_len)
    if kind == "invalid_input":
        invalid = refusal.invalid_input
        return InvalidInput(invalid.field, json.loads(invalid.value_json), invalid.rule)
    return None


def _value_json(value: object) -> str:
    """Plain short values travel as they are, anything else as its shortened description."""
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(value[:MAX_SHOWN])
    if isinstance(value, int) and value.bit_length() <= 64:
        return json.dumps(value)
    return json.dumps(repr(value)[:MAX_SHOWN])
