"""From a valid request to answers ready to run: prompts tokenized and measured, sampling decided, ids given.

Owns the model's names and defaults. Knows nothing of HTTP or of the shape of a response.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from experts.errors import ContextOverflow, InvalidInput
from router.api.answer import Piece, Transcript, answer
from router.api.backend import Backend, ChatTemplate, Tokenizer
from router.api.data_url import Upload
from router.api.defaults import ServingDefaults, to_sampling
from router.api.errors import ApiError, UnknownModel
from router.api.schema import ChatCompletionRequest, CompletionRequest, GenerationRequest
from router.engine.images import ImageInput
from router.engine.request import SamplingParams
from router.prompt.images.tiles import ImageTiles
from router.prompt.images.vision import Vision
from router.prompt.stops import StopStrings


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of one HTTP request: one answer, not yet begun, for each choice."""

    answer_id: str
    num_prompt_tokens: int
    answers: tuple[AsyncGenerator[Piece, None], ...]


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """Token ids of one choice, the `field` of the request that held it, and the text to send before the answer."""

    token_ids: list[int]
    field: str
    echo: str = ""
    images: tuple[ImageInput, ...] = ()


class Service:
    """Makes jobs. `served_names` are the names of the one model, the first is its own.

    `vision` takes the images of requests; without it, they are refused.
    """

    def __init__(
        self,
        *,
        served_names: Sequence[str],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        backend: Backend,
        defaults: ServingDefaults,
        vision: Vision | None = None,
        timeout_s: float = 600.0,
        draw_seed: Callable[[], int] = partial(secrets.randbits, 63),
    ) -> None:
        assert served_names, "a model is served under at least one name"
        self.served_names = tuple(dict.fromkeys(served_names))
        self.backend = backend
        self._tokenizer = tokenizer
        self._template = template
        self._defaults = defaults
        self._vision = vision
        self._timeout_s = timeout_s
        self._draw_seed = draw_seed

    async def chat(self, request: ChatCompletionRequest) -> Job:
        """Raises InvalidInput for what the template refuses, for images that cannot be decoded, for overflow and for
        an unknown model; Overloaded when too many images wait to be decoded."""
        self._check_model(request)
        tiles = await self._load_images(request.uploads)
        # In a thread: long prompts take long, and other streams must go on.
        token_ids = await asyncio.to_thread(
            self._template.render,
            [message.for_template() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            kwargs=request.chat_template_kwargs,
            images=[self._vision.tokens.expand(image.rows, image.cols) for image in tiles] if self._vision else [],
        )
        images = tuple(
            ImageInput(digest=image.digest, num_tiles=image.num_tiles, pixels=image.pixels) for image in tiles
        )
        return self._job("chatcmpl-", request, [_Prompt(token_ids=token_ids, field="messages", images=images)])

    async def complete(self, request: CompletionRequest) -> Job:
        """Raises InvalidInput for token ids outside the vocabulary, for overflow and for an unknown model."""
        self._check_model(request)
        prompts = [await asyncio.to_thread(self._prompt, request, *prompt) for prompt in request.prompts]
        return self._job("cmpl-", request, prompts)

    async def _load_images(self, uploads: Sequence[tuple[str, Upload]]) -> Sequence[ImageTiles]:
        """The tiles of a request's images. Nothing is decoded for a prompt that will not fit."""
        if not uploads:
            return ()
        if self._vision is None:
            raise InvalidInput(uploads[0][0], "an image", "this model takes no images")
        pictures = self._vision.loader.inspect([(field, upload.take()) for field, upload in uploads])
        layouts = [picture.layout for picture in pictures]
        num_tokens = sum(self._vision.tokens.num_tokens(layout.rows, layout.cols) for layout in layouts)
        max_model_len = self.backend.max_model_len()
        if 0 < max_model_len <= num_tokens:
            raise ContextOverflow(num_tokens, 0, max_model_len)
        return await self._vision.loader.load(pictures)

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model not in self.served_names:
            raise UnknownModel(request.model)

    def _prompt(self, request: CompletionRequest, field: str, prompt: str | list[int]) -> _Prompt:
        if isinstance(prompt, str):
            token_ids = self._tokenizer.encode(prompt)
            if not token_ids:
                raise InvalidInput(field, prompt, "must have at least one token")
            return _Prompt(token_ids=token_ids, field=field, echo=prompt if request.echo else "")
        self._check_vocabulary(field, prompt)
        return _Prompt(token_ids=prompt, field=field, echo=self._text(prompt) if request.echo else "")

    def _text(self, token_ids: Sequence[int]) -> str:
        detokenizer = self._tokenizer.detokenizer()
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()

    def _check_vocabulary(self, field: str, token_ids: Sequence[int]) -> None:
        for i, token in enumerate(token_ids):
            if token >= self._tokenizer.vocab_size:
                rule = f"must be below the vocabulary's size, {self._tokenizer.vocab_size}"
                raise InvalidInput(f"{field}[{i}]", token, rule)

    def _job(self, id_prefix: str, request: GenerationRequest, prompts: Sequence[_Prompt]) -> Job:
        self._check_vocabulary("stop_token_ids", request.stop_token_ids)
        answer_id = id_prefix + secrets.token_hex(16)
        deadline = time.monotonic() + self._timeout_s
        max_model_len = self.backend.max_model_len()
        if max_model_len <= 0:
            raise ApiError(503, "the model is still loading", code="model_loading", retry_after_s=5.0)
        samplings = [self._sampling(request, prompt, max_model_len) for prompt in prompts]
        return Job(
            answer_id=answer_id,
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            answers=tuple(
                self._answer(f"{answer_id}-{index}", request, prompt, sampling, deadline)
                for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            ),
        )

    def _sampling(self, request: GenerationRequest, prompt: _Prompt, max_model_len: int) -> SamplingParams:
        num_tokens = len(prompt.token_ids)
        return to_sampling(request, self._defaults, num_tokens, max_model_len, self._draw_seed, prompt.field)

    def _answer(
        self, request_id: str, request: GenerationRequest, prompt: _Prompt, sampling: SamplingParams, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        end_ids = frozenset() if request.ignore_eos else self._defaults.eos_token_ids
        # Their text is part of the answer when stop strings are; end tokens of the model have none to show.
        stop_ids = frozenset() if request.include_stop_str_in_output else frozenset(sampling.stop_token_ids)
        transcript = Transcript(
            self._tokenizer.detokenizer(),
            StopStrings(request.stop),
            end_ids=end_ids | stop_ids,
            min_tokens=sampling.min_tokens,
            keep_stop=request.include_stop_str_in_output,
        )
        submit = partial(
            self.backend.submit,
            request_id=request_id,
            prompt_ids=prompt.token_ids,
            sampling=sampling,
            deadline=deadline,
            images=prompt.images,
        )
        return answer(submit, transcript, deadline=deadline, prefix=prompt.echo)
