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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from mars.errors import MarsError, RequestError
from mars.generation.scheduler import MAX_TOKENS, Event, Failed, Finished, RowDrawn, Scheduler
from mars.pipeline.finishing import finish
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
    found: dict[int, Finished] = field(default_factory=dict)
    """Pictures that are done."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture half-way: what is not drawn yet is a white page."""

    drawing: Drawing
    picture: int
    """Which one of the order."""
    number: int
    """Which of its previews, from 0; a picture of few rows has fewer than were asked for."""
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
                return self._preview(drawing, index, event.codes)
            case Failed():
                self.cancel(drawing)
                return [DrawingFailed(drawing=drawing, error=event.error)]
            case Finished():
                drawing.found[index] = event
                del self._drawings[event.ticket]
        if len(drawing.found) < len(drawing.order.requests):
            return []
        found = [drawing.found[number] for number in range(len(drawing.found))]
        try:
            return [Drawn(drawing=drawing, generated=finish(self.pipe, drawing.order, found, started=drawing.started))]
        except MarsError as error:  # of a scorer; what else is drawn goes on
            return [DrawingFailed(drawing=drawing, error=error)]

    def _preview(self, drawing: Drawing, index: int, codes_RC: Tensor) -> list[News]:
        """A preview of the first rows, if it is time for one."""
        request, parts = drawing.order.requests[index], drawing.previews + 1
        rows, done = request.grid[0], len(codes_RC)
        if done * parts // rows == (done - request.side) * parts // rows:
            return []
        number = drawing.shown[index]
        drawing.shown[index] += 1
        image = self.pipe.preview(codes_RC, rows=rows)
        return [Preview(drawing=drawing, picture=index, number=number, image=image)]
