"""From what a request says to the token ids of a prompt: text encoded, conversations rendered, images loaded.

Knows nothing of HTTP, of sampling or of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from experts.errors import ContextOverflow, InvalidInput
from router.api.backend import Backend, ChatTemplate, Tokenizer
from router.api.data_url import Upload
from router.api.errors import UnknownModel
from router.api.logit_bias import Biases
from router.api.schema import Conversation
from router.engine.images import ImageInput
from router.prompt.images.tiles import ImageTiles
from router.prompt.images.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids of one choice, the `field` of the request that held it, and the text to send before the answer."""

    token_ids: list[int]
    field: str
    echo: str = ""
    images: tuple[ImageInput, ...] = ()


class Prompts:
    """Makes prompts for one model. `served_names` are its names, the first is its own.

    `vision` takes the images of conversations; without it, they are refused. What may take long runs in threads:
    other requests' streams must go on.
    """

    def __init__(
        self,
        *,
        served_names: Sequence[str],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        backend: Backend,
        vision: Vision | None = None,
    ) -> None:
        assert served_names, "a model is served under at least one name"
        self.served_names = tuple(dict.fromkeys(served_names))
        self.tokenizer = tokenizer
        self._template = template
        self._backend = backend
        self._vision = vision

    def check_model(self, model: str) -> None:
        """Raises UnknownModel."""
        if model not in self.served_names:
            raise UnknownModel(model)

    async def of_conversation(self, conversation: Conversation) -> Prompt:
        """Raises InvalidInput for what the template refuses and for images that cannot be decoded, Overloaded when
        too many images wait to be decoded."""
        tiles = await self._load_images(conversation.uploads)
        token_ids = await asyncio.to_thread(
            self._template.render,
            [message.for_template() for message in conversation.messages],
            add_generation_prompt=conversation.add_generation_prompt,
            kwargs=conversation.chat_template_kwargs,
            images=[self._vision.tokens.expand(image.rows, image.cols) for image in tiles] if self._vision else [],
        )
        images = tuple(
            ImageInput(digest=image.digest, num_tiles=image.num_tiles, pixels=image.pixels) for image in tiles
        )
        return Prompt(token_ids=token_ids, field="messages", images=images)

    async def of_text(self, field: str, prompt: str | list[int], *, echo: bool = False) -> Prompt:
        """A prompt of raw text or token ids. Raises InvalidInput for ids outside of the vocabulary."""
        return await asyncio.to_thread(self._of_text, field, prompt, echo)

    def check_vocabulary(self, field: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidInput naming the first id that the model cannot know."""
        for i, token in enumerate(token_ids):
            self._check_known(f"{field}[{i}]", token)

    def check_bias(self, biases: Biases) -> None:
        """The same for the keys of `logit_bias`."""
        for token, _ in biases:
            self._check_known(f"logit_bias.{token}", token)

    def _check_known(self, field: str, token: int) -> None:
        if token >= self.tokenizer.vocab_size:
            raise InvalidInput(field, token, f"must be below the vocabulary's size, {self.tokenizer.vocab_size}")

    def _of_text(self, field: str, prompt: str | list[int], echo: bool) -> Prompt:
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt)
            if not token_ids:
                raise InvalidInput(field, prompt, "must have at least one token")
            return Prompt(token_ids=token_ids, field=field, echo=prompt if echo else "")
        self.check_vocabulary(field, prompt)
        return Prompt(token_ids=prompt, field=field, echo=self._text(prompt) if echo else "")

    def _text(self, token_ids: Sequence[int]) -> str:
        detokenizer = self.tokenizer.detokenizer()
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()

    async def _load_images(self, uploads: Sequence[tuple[str, Upload]]) -> Sequence[ImageTiles]:
        """The tiles of a request's images. Nothing is decoded for a prompt that will not fit."""
        if not uploads:
            return ()
        if self._vision is None:
            raise InvalidInput(uploads[0][0], "an image", "this model takes no images")
        pictures = self._vision.loader.inspect([(field, upload.take()) for field, upload in uploads])
        layouts = [picture.layout for picture in pictures]
        num_tokens = sum(self._vision.tokens.num_tokens(layout.rows, layout.cols) for layout in layouts)
        max_model_len = self._backend.max_model_len()
        if 0 < max_model_len <= num_tokens:
            raise ContextOverflow(num_tokens, 0, max_model_len)
        return await self._vision.loader.load(pictures)
