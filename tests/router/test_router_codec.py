"""Requests, events and refusals come off the wire as they went onto it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ContextOverflow, InvalidInput, Overloaded
from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from router.wire import router_pb2 as pb
from router.wire.codec import (
    MAX_IMAGES,
    MAX_MESSAGE_BYTES,
    decode_events,
    decode_images,
    decode_refusal,
    decode_salt,
    decode_sampling,
    encode_events,
    encode_refusal,
    encode_submit,
)

IDS = st.integers(0, 2**32 - 1)
WHOLE = settings(deadline=None, max_examples=50)


@WHOLE
@given(
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0.0, 2.0),
        top_k=IDS,
        top_p=st.floats(0.0, 1.0),
        seed=st.integers(0, 2**64 - 1),
        max_tokens=IDS,
        min_tokens=IDS,
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(IDS).map(tuple),
        min_p=st.floats(0.0, 1.0),
        repetition_penalty=st.floats(allow_nan=False),
        presence_penalty=st.floats(allow_nan=False),
        frequency_penalty=st.floats(allow_nan=False),
        logit_bias=st.lists(st.tuples(IDS, st.floats(allow_nan=False))).map(tuple),
        num_logprobs=st.none() | IDS,
    ),
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=128),
    prompt_ids=st.lists(IDS),
    emitted_ids=st.lists(IDS),
)
def test_a_request_survives(
    sampling: SamplingParams, prompt_ids: list[int], emitted_ids: list[int], priority: int, cache_salt: str
) -> None:
    sent = encode_submit(
        request_id="größe",
        attempt=3,
        prompt_ids=prompt_ids,
        emitted_ids=emitted_ids,
        sampling=sampling,
        timeout_s=1.5,
        priority=priority,
        cache_salt=cache_salt,
    )
    got = pb.SubmitRequest.FromString(sent.SerializeToString())
    assert (got.request_id, got.attempt, got.timeout_ms) == ("größe", 3, 1500)
    assert (list(got.prompt_ids), list(got.emitted_ids)) == (prompt_ids, emitted_ids)
    assert decode_sampling(got.sampling) == sampling
    assert (got.priority, decode_salt(got)) == (priority, cache_salt)


def test_what_a_message_leaves_out_changes_nothing() -> None:
    assert decode_sampling(pb.Sampling(top_p=1.0, max_tokens=1)) == SamplingParams(temperature=0.0, max_tokens=1)


@pytest.mark.parametrize("salt", ["x" * 129, "a b", "ä", "a\n"])
def test_other_salts_are_refused(salt: str) -> None:
    with pytest.raises(InvalidInput, match=r"^cache_salt: "):
        decode_salt(pb.SubmitRequest(cache_salt=salt))


LOGPROBS = st.builds(
    TokenLogprobs,
    logprob=st.floats(max_value=0.0),
    top=st.lists(st.tuples(IDS, st.floats(max_value=0.0)), max_size=20).map(tuple),
)
IMAGES = st.builds(
    lambda digest, num_tiles, size: ImageInput(digest=digest, num_tiles=num_tiles, pixels=bytes(3 * num_tiles * size)),
    st.binary(min_size=32, max_size=32),
    st.integers(1, 17),
    st.integers(1, 50),
)


def submit_with(images: list[ImageInput]) -> pb.SubmitRequest:
    sampling = SamplingParams(max_tokens=1)
    return encode_submit(
        request_id="r", attempt=0, prompt_ids=[1], emitted_ids=[], sampling=sampling, timeout_s=1.0, images=images
    )


@WHOLE
@given(images=st.lists(IMAGES, max_size=8))
def test_images_survive(images: list[ImageInput]) -> None:
    got = pb.SubmitRequest.FromString(submit_with(images).SerializeToString())
    assert list(decode_images(got)) == images


def test_the_largest_request_fits_into_a_message() -> None:
    whole = ImageInput(digest=bytes(32), num_tiles=17, pixels=bytes(17 * 3 * 336 * 336))
    assert submit_with([whole] * 8).ByteSize() < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "image",
    [
        pb.Image(digest=b"short", num_tiles=1, pixels=bytes(3)),
        pb.Image(digest=bytes(33), num_tiles=1, pixels=bytes(3)),
        pb.Image(num_tiles=1, pixels=bytes(3)),
        pb.Image(digest=bytes(32), num_tiles=0, pixels=bytes(3)),
        pb.Image(digest=bytes(32), num_tiles=1),
        pb.Image(digest=bytes(32), num_tiles=2, pixels=bytes(9)),
        pb.Image(digest=bytes(32), num_tiles=2**32 - 1, pixels=bytes(3)),
    ],
)
def test_what_cannot_be_tiles_is_refused(image: pb.Image) -> None:
    with pytest.raises(InvalidInput, match=r"^images: "):
        decode_images(pb.SubmitRequest(images=[image]))


def test_too_many_images_are_refused_uncopied() -> None:
    with pytest.raises(InvalidInput, match=f"at most {MAX_IMAGES} images"):
        decode_images(pb.SubmitRequest(images=[pb.Image()] * (MAX_IMAGES + 1)))


def test_time_that_has_passed_is_no_time_and_a_negative_seed_keeps_its_bits() -> None:
    sampling = SamplingParams(max_tokens=1, seed=-2)
    sent = encode_submit(request_id="r", attempt=0, prompt_ids=[1], emitted_ids=[], sampling=sampling, timeout_s=-3.0)
    assert sent.timeout_ms == 0
    assert decode_sampling(sent.sampling).seed == 2**64 - 2


@WHOLE
@given(
    tokens=st.lists(
        st.builds(TokenEvent, request_id=st.just("r"), index=IDS, token_id=IDS, logprobs=st.none() | LOGPROBS)
    ),
    finish=st.none()
    | st.builds(
        FinishEvent,
        request_id=st.just("r"),
        reason=st.sampled_from(FinishReason),
        code=st.text(),
        message=st.text(),
        retry_after_s=st.floats(0.0, 1e6),
    ),
)
def test_events_survive(tokens: list[TokenEvent], finish: FinishEvent | None) -> None:
    events: list[Event] = [*tokens, finish] if finish else [*tokens]
    got = pb.SubmitResponse.FromString(encode_events(events).SerializeToString())
    assert decode_events("r", got) == (tuple(tokens), finish)


def test_nothing_may_follow_a_finish() -> None:
    finish = FinishEvent(request_id="r", reason=FinishReason.STOP)
    with pytest.raises(AssertionError):
        encode_events([finish, TokenEvent(request_id="r", index=0, token_id=0)])


def test_an_unknown_reason_is_an_error() -> None:
    _, finish = decode_events("r", pb.SubmitResponse(finish=pb.Finish()))
    assert finish is not None
    assert (finish.reason, finish.code) == (FinishReason.ERROR, "bad_response")


@pytest.mark.parametrize("value", [None, True, -3, 0.25, "héllo\ud800", 2**63, math.inf])
def test_invalid_input_survives(value: object) -> None:
    error = InvalidInput("temperature", value, "must be small")
    got = decode_refusal(encode_refusal(error))
    assert type(got) is InvalidInput
    assert (got.field, got.value, got.rule) == (error.field, value, error.rule)
    assert str(got) == str(error)


@pytest.mark.parametrize("value", ["x" * 100_000, list(range(100_000)), {"a": object()}, 2**4000])
def test_long_or_odd_values_are_shortened(value: object) -> None:
    data = encode_refusal(InvalidInput("stop" * 1000, value, "must be short" * 1000))
    assert len(data) < 4000
    assert isinstance(decode_refusal(data), InvalidInput)


def test_other_refusals_survive() -> None:
    full = decode_refusal(encode_refusal(Overloaded("the queue is full", 2.5)))
    assert isinstance(full, Overloaded)
    assert (full.what, full.retry_after_s, str(full)) == (
        "the queue is full",
        2.5,
        str(Overloaded("the queue is full", 2.5)),
    )
    long = decode_refusal(encode_refusal(ContextOverflow(5000, 20, 4096)))
    assert isinstance(long, ContextOverflow)
    assert str(long) == str(ContextOverflow(5000, 20, 4096))
    assert decode_refusal(b"") is None
