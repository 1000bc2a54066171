"""From a valid request to answers ready to run: prompts measured, sampling decided, ids given.

Owns the model's defaults. Knows nothing of HTTP or of the shape of a response.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from router.api.answer import Piece, Transcript, answer
from router.api.backend import Backend
from router.api.defaults import ServingDefaults, choice_seed, to_sampling
from router.api.errors import ApiError
from router.api.logprobs import Scores
from router.api.prompts import Prompt, Prompts
from router.api.schema import ChatCompletionRequest, CompletionRequest, GenerationRequest
from router.engine.request import SamplingParams
from router.prompt.stops import StopStrings


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of one HTTP request: one answer, not yet begun, for each choice. Prompts are counted once each."""

    answer_id: str
    num_prompt_tokens: int
    answers: tuple[AsyncGenerator[Piece, None], ...]


class Service:
    """Makes jobs of `prompts` for `backend`."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        backend: Backend,
        defaults: ServingDefaults,
        timeout_s: float = 600.0,
        draw_seed: Callable[[], int] = partial(secrets.randbits, 63),
    ) -> None:
        self._prompts = prompts
        self._backend = backend
        self._defaults = defaults
        self._timeout_s = timeout_s
        self._draw_seed = draw_seed

    async def chat(self, request: ChatCompletionRequest) -> Job:
        """Raises what `Prompts.of_conversation` does, InvalidInput for overflow and UnknownModel."""
        self._prompts.check_model(request.model)
        prompt = await self._prompts.of_conversation(request)
        return self._job("chatcmpl-", request, [prompt])

    async def complete(self, request: CompletionRequest) -> Job:
        """Raises InvalidInput for token ids outside the vocabulary, for overflow and for an unknown model."""
        self._prompts.check_model(request.model)
        prompts = [await self._prompts.of_text(*prompt, echo=request.echo) for prompt in request.prompts]
        return self._job("cmpl-", request, prompts)

    def _job(self, id_prefix: str, request: GenerationRequest, prompts: Sequence[Prompt]) -> Job:
        self._prompts.check_vocabulary("stop_token_ids", request.stop_token_ids)
        self._prompts.check_bias(request.logit_bias)
        answer_id = id_prefix + secrets.token_hex(16)
        deadline = time.monotonic() + self._timeout_s
        max_model_len = self._backend.max_model_len()
        if max_model_len <= 0:
            raise ApiError(503, "the model is still loading", code="model_loading", retry_after_s=5.0)
        samplings = [self._sampling(request, prompt, max_model_len) for prompt in prompts]
        choices = [
            (prompt, replace(sampling, seed=choice_seed(sampling.seed, number)))
            for prompt, sampling in zip(prompts, samplings, strict=True)
            for number in range(request.n)
        ]
        return Job(
            answer_id=answer_id,
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            answers=tuple(
                self._answer(f"{answer_id}-{index}", request, prompt, sampling, deadline)
                for index, (prompt, sampling) in enumerate(choices)
            ),
        )

    def _sampling(self, request: GenerationRequest, prompt: Prompt, max_model_len: int) -> SamplingParams:
        num_tokens = len(prompt.token_ids)
        return to_sampling(request, self._defaults, num_tokens, max_model_len, self._draw_seed, prompt.field)

    def _answer(
        self, request_id: str, request: GenerationRequest, prompt: Prompt, sampling: SamplingParams, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        end_ids = frozenset() if request.ignore_eos else self._defaults.eos_token_ids
        # Their text is part of the answer when stop strings are; end tokens of the model have none to show.
        stop_ids = frozenset() if request.include_stop_str_in_output else frozenset(sampling.stop_token_ids)
        transcript = Transcript(
            self._prompts.tokenizer.detokenizer(),
            StopStrings(request.stop),
            end_ids=end_ids | stop_ids,
            min_tokens=sampling.min_tokens,
            keep_stop=request.include_stop_str_in_output,
            scores=Scores(self._prompts.tokenizer) if sampling.num_logprobs is not None else None,
        )
        submit = partial(
            self._backend.submit,
            request_id=request_id,
            prompt_ids=prompt.token_ids,
            sampling=sampling,
            deadline=deadline,
            images=prompt.images,
            priority=request.priority,
            cache_salt=request.cache_salt or "",
        )
        return answer(submit, transcript, deadline=deadline, prefix=prompt.echo)
