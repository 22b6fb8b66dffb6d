"""What all endpoints share: the worker, settings and figures, and the checks of what is asked."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import anyio
from PIL import Image
from starlette.requests import Request

from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING, Order
from mars.pipeline.writing import Piece
from mars.server.errors import ApiError
from mars.server.hearing import Hearing
from mars.server.metrics import Metrics
from mars.server.settings import Settings
from mars.server.worker import Intake


@dataclass(frozen=True)
class Service:
    """One server."""

    worker: Intake
    settings: Settings
    metrics: Metrics

    @property
    def pipe(self) -> MarsPipeline:
        """The pipeline; outside of the worker's thread only its tokenizer and what never changes may be used."""
        return self.worker.pipe

    @property
    def name(self) -> str:
        """The model's id."""
        return self.pipe.model.info.name

    def ask(
        self,
        request: Request,
        begin: Callable[[MarsPipeline], Order | Iterator[Piece]],
        *,
        size: int = 1,
        previews: int = 0,
    ) -> Hearing:
        """Hands something to the worker."""
        seconds = self.settings.limits.seconds
        return Hearing(self.worker, begin, request=request, seconds=seconds, size=size, previews=previews)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than ours."""
        if name not in (None, self.name):
            raise ApiError(
                404, f"the model must be {self.name}, which is the only one here", code="model_not_found", param="model"
            )

    def check_count(self, number: int, *, param: str, what: str | None = None) -> None:
        """Raises ApiError for too many pictures, which it calls `what`, or by the parameter's name."""
        limit = self.settings.limits.images
        if number > limit:
            raise ApiError(400, f"{what or param} must be at most {limit}, got {number}", param=param)

    def check_text(self, *texts: str, param: str) -> None:
        """Raises ApiError for texts that are too long together."""
        length, limit = sum(map(len, texts)), self.settings.limits.prompt
        if length > limit:
            raise ApiError(400, f"{param} must have at most {limit:,} characters, got {length:,}", param=param)

    async def moderate(self, prompt: str, image: Image.Image | None = None) -> None:
        """Raises ApiError for what must not be."""
        look = self.settings.moderation
        if look is None:
            return
        reason = await anyio.to_thread.run_sync(look, prompt, image)
        if reason is not None:
            raise ApiError(400, f"this was refused by the server's moderation: {reason}", code="moderation_blocked")

    def note(self, request: Request, *, prompt: str, **fields: object) -> None:
        """Adds to the request's line in the log; its prompt only where the server was told to."""
        given = {name: value for name, value in fields.items() if value is not None}
        request.scope["mars"].update(given | ({"prompt": prompt} if self.settings.log_prompts else {}))

    def count(self, text: str) -> int:
        """Ids of a text."""
        return len(self.pipe.model.text_tokenizer.encode(text))


def sampling_of(asked: Any, *, default: Sampling = DEFAULT_SAMPLING) -> Sampling:
    """The settings of a request in place of the default ones."""
    names = {
        "guidance_scale": "guidance", "guidance_stop": "guidance_stop", "temperature": "temperature",
        "top_k": "top_k", "top_p": "top_p", "candidates": "candidates",
    }  # fmt: skip
    given = {ours: getattr(asked, theirs, None) for theirs, ours in names.items()}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def event(data: Mapping[str, Any], *, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")
