"""Continuous batching: requests of different prompts, grids, guidance and sampling join and leave a running batch.

A plain object without threads, which one worker drives: `submit` and `cancel` between steps, `step` as long as it is
`busy`. Ids in, ids out: knows neither pixels nor strings.

First come, first served: candidates join in the order in which they were asked for, as soon as they fit under the
ceilings of rows and tokens; nobody overtakes, so nobody starves. Each picture is what it would be alone: up to
rounding, or to the bit where the kernel draws (`batch.py`) and prompts are read one by one (`prompts.py`).

Letters: R rows, C columns, N codes.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.batch import Batch, Picture, new_picture
from mars.generation.jacobi import new_batch
from mars.generation.prompts import Prompt, Prompts
from mars.generation.request import DrawRequest
from mars.model.cache import Prefix
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import low_image

CPU_ROWS, OTHER_ROWS = 32, 256
"""Rows that run at once; more would only wait for each other."""
MAX_TOKENS = 16_384
"""Places of the cache, rows times the longest of them: 75 MB for the model in the package, if the kernel fills it."""


@dataclass(frozen=True, kw_only=True)
class RowDrawn:
    """Another row of codes is done: of the candidate that is the likeliest so far, among those that came this far."""

    ticket: int
    codes: Tensor
    """(rows that are done, C) int64; never the whole grid."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the pictures that were drawn for a request."""

    codes: Tensor
    """(R, C) int64."""
    likelihood: Tensor
    """Of its codes after the prompt, without guidance, in nats: a number. Zero where there was no other candidate."""
    steps: int
    """Steps that drew it."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A picture is done."""

    ticket: int
    candidates: Sequence[Candidate]

    @property
    def likeliest(self) -> Candidate:
        """The one that the model itself finds likeliest; of equals the first."""
        if len(self.candidates) == 1:
            return self.candidates[0]
        return self.candidates[int(torch.stack([one.likelihood for one in self.candidates]).argmax())]

    @property
    def codes(self) -> Tensor:
        """(R, C) of the likeliest."""
        return self.likeliest.codes


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request could not be met; it holds nothing any more."""

    ticket: int
    error: Exception


Event = RowDrawn | Finished | Failed


@dataclass(eq=False, kw_only=True)
class _Job:
    """A request on its way."""

    ticket: int
    request: DrawRequest
    prompts: Sequence[Prompt]
    prefixes: Sequence[Prefix] | None = None
    """What its rows have read, from the first candidate that joins to the last."""
    joined: int = 0
    """Candidates that have joined."""
    finished: dict[int, Candidate] = field(default_factory=dict)
    """By number."""
    told: int = 0
    """Codes that have been told of."""

    @property
    def candidates(self) -> int:
        return self.request.sampling.candidates


class Scheduler:
    """Draws what is asked for, all of it together.

    Args:
        rows: at most so many rows of a batch at once; the default depends on the device. A candidate takes one, or two
            where it is guided.
        tokens: at most so many places in the cache at once: rows times the longest of them, prompt and codes.
        prompts: texts that have been read before; default remembers for this scheduler alone.
    """

    def __init__(
        self,
        transformer: MarsTransformer,
        *,
        rows: int | None = None,
        tokens: int = MAX_TOKENS,
        prompts: Prompts | None = None,
    ) -> None:
        self.transformer = transformer
        self.max_rows = rows or (CPU_ROWS if transformer.device.type == "cpu" else OTHER_ROWS)
        self.max_tokens = tokens
        self.prompts = Prompts(transformer) if prompts is None else prompts
        self.drawn = 0
        """Codes that have been drawn, of all candidates, since the beginning."""
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[_Job] = deque()
        """Those of whom candidates have yet to join."""
        self._batches: dict[tuple[int, int, bool], Batch] = {}
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether anything is left to draw."""
        return bool(self._jobs)

    @property
    def rows(self) -> int:
        """Rows that run."""
        return sum(batch.rows for batch in self._batches.values())

    @property
    def tokens(self) -> int:
        """Places of the caches."""
        return sum(batch.tokens_with(None) for batch in self._batches.values())

    def submit(self, request: DrawRequest) -> int:
        """Takes a request in; returns its ticket, which events name.

        Raises:
            RequestError: if the model cannot draw it, or it would not even fit alone.
            ConfigError: if its grid does not suit what it refines, or its blocks.
        """
        request.check(self.transformer)
        rows = len(request.texts)
        if rows > self.max_rows or rows * request.length > self.max_tokens:
            raise RequestError(
                f"a picture must fit into {self.max_rows} rows and {self.max_tokens} tokens, got {rows} rows and "
                f"{rows * request.length} tokens; shorten the prompt, or ask for a smaller picture"
            )
        ticket, self._next = self._next, self._next + 1
        job = _Job(ticket=ticket, request=request, prompts=[self.prompts.find(text) for text in request.texts])
        self._jobs[ticket] = job
        self._waiting.append(job)
        return ticket

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Forgets a request and frees its rows at once; one that is done, or cancelled already, is no error."""
        job = self._jobs.pop(ticket, None)
        if job is None:
            return
        if job in self._waiting:
            self._waiting.remove(job)
        for batch in self._batches.values():
            if gone := {picture for picture in batch.pictures if picture.ticket == ticket}:
                batch.remove(gone)

    @torch.inference_mode()
    def read_prompts(self) -> None:
        """Reads the prompts of all that wait, which otherwise happens when they join."""
        self.prompts.read_all(prompt for job in self._waiting for prompt in job.prompts)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Lets those join that fit, and draws one more code, or block of codes, of every picture."""
        events = self._admit()
        for batch in self._batches.values():
            if batch.pictures or batch.joining:
                events += self._advance(batch)
        return events

    def _advance(self, batch: Batch) -> list[Event]:
        try:
            batch.join()
            self.drawn += batch.step()
        except Exception as error:  # whatever it is, others go on
            tickets = {picture.ticket for picture in batch.pictures + batch.joining}
            batch.clear()
            return [self._fail(ticket, error) for ticket in sorted(tickets)]
        done = {picture for picture in batch.pictures if picture.done == picture.request.places}
        events = self._tell_rows(batch)
        for number, picture in enumerate(batch.pictures):
            if picture in done:
                codes = picture.request.raster(batch.codes_PN[number, : picture.done])
                found = Candidate(codes=codes, likelihood=batch.likelihoods_P[number], steps=picture.steps)
                self._jobs[picture.ticket].finished[picture.number] = found
        if done:
            batch.remove(done)
        for ticket in sorted({picture.ticket for picture in done}):
            job = self._jobs[ticket]
            if len(job.finished) == job.candidates:
                del self._jobs[ticket]
                candidates = [job.finished[number] for number in range(job.candidates)]
                events.append(Finished(ticket=ticket, candidates=candidates))
        return events

    def _tell_rows(self, batch: Batch) -> list[Event]:
        """Which pictures have come to the end of another row, as the first of their candidates."""
        reached: dict[int, list[int]] = {}
        for number, picture in enumerate(batch.pictures):
            row = picture.request.grid[1] * batch.side
            if self._jobs[picture.ticket].told < picture.done // row * row < picture.request.places:
                reached.setdefault(picture.ticket, []).append(number)
        events: list[Event] = []
        for ticket, numbers in reached.items():
            job, most = self._jobs[ticket], max(batch.pictures[number].done for number in numbers)
            numbers = [number for number in numbers if batch.pictures[number].done == most]
            best = numbers[int(batch.likelihoods_P[numbers].argmax()) if len(numbers) > 1 else 0]
            row = job.request.grid[1] * batch.side
            job.told = most // row * row
            events.append(RowDrawn(ticket=ticket, codes=job.request.raster(batch.codes_PN[best, : job.told])))
        return events

    def _admit(self) -> list[Event]:
        """Candidates that fit, in the order in which they were asked for."""
        events: list[Event] = []
        if self._waiting and self._room_for(self._waiting[0].request):
            coming = islice(self._waiting, self.max_rows - self.rows)
            with suppress(Exception):  # one that cannot be read will fail when it is read alone
                self.prompts.read_all(prompt for job in coming for prompt in job.prompts)
        while self._waiting and (batch := self._room_for(self._waiting[0].request)):
            job = self._waiting[0]
            try:
                picture = self._picture(job)
            except Exception as error:  # a request that cannot be met is no reason to stop
                events.append(self._fail(job.ticket, error))
                continue
            batch.joining.append(picture)
            if job.joined == job.candidates:
                self._waiting.popleft()
                job.prefixes = None
        return events

    def _room_for(self, request: DrawRequest) -> Batch | None:
        """The batch that a candidate can join now, if there is room."""
        kind = request.side, request.sampling.window, request.low is not None
        if kind not in self._batches:
            self._batches[kind] = new_batch(self.transformer, request)
        batch = self._batches[kind]
        others = self.tokens - batch.tokens_with(None)
        fits = others + batch.tokens_with(request) <= self.max_tokens
        return batch if fits and self.rows + len(request.texts) <= self.max_rows else None

    def _picture(self, job: _Job) -> Picture:
        """The job's next candidate."""
        self._read(job)
        assert job.prefixes is not None
        job.joined += 1
        return new_picture(
            self.transformer, job.request, prefixes=job.prefixes, ticket=job.ticket, number=job.joined - 1
        )

    def _read(self, job: _Job) -> None:
        if job.prefixes is None:
            prefixes = [self.prompts.read(prompt) for prompt in job.prompts]
            job.prefixes = prefixes if job.request.low is None else [self._refine(one, job.request) for one in prefixes]

    def _refine(self, prefix: Prefix, request: DrawRequest) -> Prefix:
        """What a row has read when the smaller image follows its text."""
        assert request.low is not None
        cache = self.transformer.new_cache()
        cache.load([prefix])
        low_BRC = request.low[None].to(self.transformer.device)
        return cache.prefixes(self.transformer(low_image(low_BRC, self.transformer.vocabulary), cache))[0]

    def _fail(self, ticket: int, error: Exception) -> Failed:
        self.cancel(ticket)
        return Failed(ticket=ticket, error=error)
