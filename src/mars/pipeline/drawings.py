"""Drawing for several callers at once: orders come and go, previews and pictures come back.

    drawings = Drawings(pipe)
    drawing = drawings.submit(draw_order(pipe, "a red apple", n=2), previews=3)
    while drawings.busy:
        for news in drawings.step():        # of any drawing: Preview, then at last Drawn or Failed
            ...

One thread drives it; `cancel` goes between two steps. A picture's codes are those that a call of the pipeline draws,
whatever else is drawn beside it, and whether previews are shown or not.

Letters: R rows, C columns.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from mars.errors import RequestError
from mars.generation.scheduler import MAX_TOKENS, Event, Failed, Finished, RowDrawn, Scheduler
from mars.pipeline.orders import Generated, Order

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

MAX_PREVIEWS = 16


@dataclass(eq=False, kw_only=True)
class Drawing:
    """An order on its way."""

    order: Order
    previews: int
    started: float
    tickets: dict[int, int] = field(default_factory=dict)
    """The scheduler's, and which picture each is."""
    shown: list[int]
    """Previews of each picture so far."""
    codes: dict[int, Tensor] = field(default_factory=dict)
    """(R, C) of pictures that are done."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture half-way: rows that are not drawn yet are empty."""

    drawing: Drawing
    picture: int
    """Which one of the order."""
    number: int
    """Which of its previews, from 0; a picture whose rows come several at a time may skip some."""
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An order is done."""

    drawing: Drawing
    generated: Generated


@dataclass(frozen=True, kw_only=True)
class DrawingFailed:
    """An order could not be met."""

    drawing: Drawing
    error: Exception


News = Preview | Drawn | DrawingFailed


class Drawings:
    """Draws orders together, as a `Scheduler` does; its ceilings are explained there."""

    def __init__(self, pipe: "MarsPipeline", *, rows: int | None = None, tokens: int = MAX_TOKENS) -> None:
        self.pipe = pipe
        self.scheduler = Scheduler(pipe.model.transformer, rows=rows, tokens=tokens, prompts=pipe.prompts)
        self._drawings: dict[int, Drawing] = {}
        """By ticket."""

    @property
    def busy(self) -> bool:
        """Whether anything is left to draw."""
        return self.scheduler.busy

    def submit(self, order: Order, *, previews: int = 0) -> Drawing:
        """Takes an order in.

        Args:
            previews: how many of each picture, spread evenly over its rows: each costs a decoding of its codes.

        Raises:
            RequestError: if a picture does not fit, or there are too many previews; nothing is drawn then.
        """
        if not 0 <= previews <= MAX_PREVIEWS:
            raise RequestError(f"there can be 0 to {MAX_PREVIEWS} previews of a picture, got {previews}")
        drawing = Drawing(
            order=order, previews=previews, started=time.perf_counter(), shown=[0] * len(order.requests)
        )  # fmt: skip
        try:
            for index, request in enumerate(order.requests):
                ticket = self.scheduler.submit(request)
                drawing.tickets[ticket] = index
                self._drawings[ticket] = drawing
        except Exception:
            self.cancel(drawing)
            raise
        return drawing

    def cancel(self, drawing: Drawing) -> None:
        """Forgets an order and frees its rows at once; one that is done is no error."""
        for ticket in drawing.tickets:
            self.scheduler.cancel(ticket)
            self._drawings.pop(ticket, None)

    def step(self) -> list[News]:
        """One more code of every picture, or block of codes."""
        news: list[News] = []
        for event in self.scheduler.step():
            drawing = self._drawings.get(event.ticket)
            if drawing is not None:  # others of an order that failed in this step
                news += self._tell(drawing, event)
        return news

    def _tell(self, drawing: Drawing, event: Event) -> list[News]:
        index = drawing.tickets[event.ticket]
        match event:
            case RowDrawn():
                due = len(event.codes) * (drawing.previews + 1) // drawing.order.requests[index].grid[0]
                if due <= drawing.shown[index]:
                    return []
                drawing.shown[index] = due
                image = self.pipe.preview(event.codes, rows=drawing.order.requests[index].grid[0])
                return [Preview(drawing=drawing, picture=index, number=due - 1, image=image)]
            case Failed():
                self.cancel(drawing)
                return [DrawingFailed(drawing=drawing, error=event.error)]
            case Finished():
                drawing.codes[index] = event.codes
                del self._drawings[event.ticket]
        if len(drawing.codes) < len(drawing.order.requests):
            return []
        codes = torch.stack([drawing.codes[number] for number in range(len(drawing.codes))])
        return [Drawn(drawing=drawing, generated=self.pipe.finish(drawing.order, codes, started=drawing.started))]


def unfinished(codes_RC: Tensor, *, rows: int) -> Tensor:
    """Codes of a grid with `rows` rows of which the first are known; the last known one stands for all others."""
    missing: Sequence[Tensor] = [codes_RC[-1:]] * (rows - len(codes_RC))
    return torch.cat([codes_RC, *missing])
