"""Speculative Jacobi decoding: several codes a step, the same distribution (Teng et al. 2024, arXiv 2410.01699).

A step reads a window of W places at once: the last code that is certain and guesses for those after it. At each place
it finds the shares p of the next code, given the guesses before it. From the left, a guess x that was drawn from the
shares q of the step before is kept with probability min(1, p(x) / q(x)); the first that is not is drawn again from
what p has more than q, which makes it a draw from p; places behind it get new guesses, drawn from p. So a step makes
at least one code certain, and up to W. Reading W places costs hardly more than reading one, as long as reading the
weights is what takes the time.

Letters: B rows, P pictures, W places of the window, N codes, V ids to choose from.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.generation.batch import Batch, Picture
from mars.generation.request import DrawRequest
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment


@dataclass(kw_only=True)
class _Window:
    """A picture's guesses for the next places."""

    codes_W: Tensor
    shares_WV: Tensor
    """What they were drawn from; zeros where nothing has been guessed yet."""
    generator: torch.Generator


def new_batch(transformer: MarsTransformer, request: DrawRequest) -> Batch:
    """An empty batch that a request's pictures can join."""
    if request.sampling.window > 1:
        return JacobiBatch(transformer, window=request.sampling.window)
    return Batch(transformer, side=request.side, refines=request.low is not None)


class JacobiBatch(Batch):
    """Pictures without smaller ones that they refine, drawn with a window of the same width."""

    def __init__(self, transformer: MarsTransformer, *, window: int) -> None:
        super().__init__(transformer, side=1, refines=False)
        self.block = window
        self.windows: dict[Picture, _Window] = {}
        self.clear()

    def clear(self) -> None:
        """As `Batch.clear`."""
        super().clear()
        self.windows = {}

    def remove(self, gone: Collection[Picture]) -> None:
        """As `Batch.remove`."""
        for picture in gone:
            self.windows.pop(picture, None)
        super().remove(gone)

    def step(self) -> int:
        """Draws at least the next code of every picture; returns how many became certain."""
        assert self.cache is not None
        segment = Segment(
            modality=Modality.IMAGE,
            ids=self.guidance.spread(self.last_PK),
            columns=self.columns_B1,
            start=self.guidance.spread(self.done_P)[:, None],
        )
        hidden_BWD = self.transformer(segment, self.cache)
        guided_PWV, prompted_PWV = self._logits(hidden_BWD, self.done_P[:, None] + self.inside_K)
        shares_PWV = self.sampler.shares(guided_PWV.flatten(0, 1)).view_as(guided_PWV)
        kept_P = torch.zeros_like(self.done_P)
        for number, picture in enumerate(self.pictures):
            done = picture.done
            known_W = self.known_PN[number, done : done + self.block]
            places = (known_W >= 0).nonzero()[:, 0]
            shares_PWV[number, places] = 0
            shares_PWV[number, places, known_W[places]] = 1
            codes_W = self._decide(number, picture, shares_PWV[number])
            kept = len(codes_W)
            self.codes_PN[number, done : done + kept] = codes_W
            kept_P[number] = kept
            picture.done += kept
            picture.steps += 1
        if prompted_PWV is not None:
            for number, (picture, kept) in enumerate(zip(self.pictures, kept_P.tolist(), strict=True)):
                codes_W = self.codes_PN[number, picture.done - kept : picture.done]
                shares_WV = prompted_PWV[number, :kept].log_softmax(dim=1)
                self.likelihoods_P[number] += shares_WV.gather(1, codes_W[:, None]).sum()
        self.done_P += kept_P
        self.cache.forget(self.guidance.spread(self.block - kept_P))
        if self.stops:
            self._end_guidance()
        return int(kept_P.sum())

    def _decide(self, number: int, picture: Picture, shares_WV: Tensor) -> Tensor:
        """The codes (1 to W) that become certain; guesses for the places after them are kept for the next step."""
        window = self.windows.get(picture) or self._begin(picture, shares_WV)
        chances_2W = torch.rand(2, self.block, generator=window.generator, dtype=shares_WV.dtype, device=self.device)
        guessed_W, found_W = (every.gather(1, window.codes_W[:, None])[:, 0] for every in (window.shares_WV, shares_WV))
        agreed_W = (guessed_W > 0) & (chances_2W[0] * guessed_W < found_W)
        agreed = int(agreed_W.long().cumprod(dim=0).sum())
        drawn_W = self._draw(shares_WV, chances_2W[1])
        if agreed < self.block:
            more_V = (shares_WV[agreed] - window.shares_WV[agreed]).clamp(min=0)
            if bool(more_V.sum() > 0):
                drawn_W[agreed] = self._draw(more_V[None], chances_2W[1, agreed, None])[0]
        kept = min(agreed + 1, self.block, picture.request.places - picture.done)
        certain_W = torch.cat([window.codes_W[:agreed], drawn_W[agreed:]])[:kept]
        window.codes_W = torch.cat([drawn_W[kept:], drawn_W[-1:].expand(kept)])
        window.shares_WV = torch.cat([shares_WV[kept:], torch.zeros_like(shares_WV[:kept])])
        self.last_PK[number, 0] = certain_W[-1]
        self.last_PK[number, 1:] = window.codes_W[:-1]
        self.last_PK[number] += self.transformer.vocabulary.first_code
        return certain_W

    @staticmethod
    def _draw(shares_WV: Tensor, chances_W: Tensor) -> Tensor:
        """A draw from each of some shares, which need not sum to 1."""
        sums_WV = shares_WV.cumsum(dim=1)
        drawn_W = torch.searchsorted(sums_WV, chances_W[:, None] * sums_WV[:, -1:], right=True)[:, 0]
        return drawn_W.clamp(max=shares_WV.shape[1] - 1)

    def _begin(self, picture: Picture, shares_WV: Tensor) -> _Window:
        self.windows[picture] = found = _Window(
            codes_W=torch.zeros(self.block, dtype=torch.long, device=self.device),
            shares_WV=torch.zeros_like(shares_WV),
            generator=torch.Generator(self.device).manual_seed(picture.request.candidate_seed(picture.number)),
        )
        return found
