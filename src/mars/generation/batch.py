"""Pictures that are drawn together, a block of K codes of each in a step; they come and go between steps.

Where positions hold cells of codes, a step runs one position for each cell and then chooses its codes one after the
other, each after those before it (`model/cells.py`).

Letters: B rows, P pictures, N codes of the largest picture, K codes of a step, T positions of a step, S codes of a
position, V ids to choose from.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.generation.guidance import Guidance
from mars.generation.request import DrawRequest
from mars.generation.sampling import Noise, Sampler
from mars.model.cache import Prefix, StaticCache
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment


@dataclass(eq=False, kw_only=True)
class Picture:
    """A candidate of a request on its way: a row of the batch, and another where it is guided."""

    ticket: int
    number: int
    """Which candidate it is."""
    request: DrawRequest
    prefixes: Sequence[Prefix]
    """What each of its rows has read, until they are in the cache."""
    noise: Noise | None
    """None without a temperature."""
    done: int = 0
    """Codes that are drawn."""
    steps: int = 0
    """Steps that drew them."""


def new_picture(
    transformer: MarsTransformer, request: DrawRequest, *, prefixes: Sequence[Prefix], ticket: int = 0, number: int = 0
) -> Picture:
    """A candidate that has not begun."""
    noise = None
    if request.sampling.temperature:
        seed, ids = request.candidate_seed(number), transformer.vocabulary.num_codes
        noise = Noise(seed, block=request.side**2, ids=ids, device=transformer.device)
    return Picture(ticket=ticket, number=number, request=request, prefixes=prefixes, noise=noise)


class Batch:
    """Pictures of one block size, either all with a smaller image that they refine or all without.

    Their rows are those of a cache, in any order. A picture's codes depend on nothing but itself: to the bit where the
    kernel runs the layers (`model/decoding.py`), up to rounding elsewhere, as products of another shape round
    differently there.
    """

    def __init__(self, transformer: MarsTransformer, *, side: int, refines: bool) -> None:
        self.transformer = transformer
        self.side = side
        self.block = side * side
        self.slots = transformer.vocabulary.slots
        self.refines = refines
        self.device = transformer.device
        self.cache: StaticCache | None = None
        self.clear()

    def clear(self) -> None:
        """Lets all pictures go, and the memory of their rows."""
        self.cache = None
        self.pictures: list[Picture] = []
        self.joining: list[Picture] = []
        self.owners: list[tuple[Picture, bool]] = []
        """Of each row, its picture and whether it is the prompt-free one."""
        long = torch.long
        self.codes_PN = torch.zeros(0, 0, dtype=long, device=self.device)
        self.last_PK = torch.zeros(0, self.block, dtype=long, device=self.device)
        """Ids that the next step continues."""
        self.done_P = torch.zeros(0, dtype=long, device=self.device)
        self.likelihoods_P = torch.zeros(0, device=self.device)
        """Of the codes after the prompt, without guidance, in nats; kept where there are candidates to choose from."""

    @property
    def rows(self) -> int:
        """Rows in use, those of pictures that are about to join too."""
        return len(self.owners) + sum(len(picture.request.texts) for picture in self.joining)

    def tokens_with(self, request: DrawRequest | None) -> int:
        """Places in the cache, used or not, once another picture has joined."""
        held, size = (0, 0) if self.cache is None else (self.cache.store.shape[2], self.cache.size)
        rows, longest = self._needs(request)
        return held * size if rows <= held and longest <= size else rows * longest

    def _needs(self, request: DrawRequest | None) -> tuple[int, int]:
        """Rows, and the length of the longest."""
        lengths = [picture.request.length for picture in self.pictures + self.joining]
        if request is None:
            return self.rows, max(lengths, default=0)
        return self.rows + len(request.texts), max(request.length, *lengths, 0)

    def join(self) -> None:
        """Takes in the pictures of `joining`."""
        if not self.joining:
            return
        rows, longest = self._needs(None)
        if self.cache is None:
            self.cache = self.transformer.new_static_cache(batch=rows, size=longest, images_only=True)
        elif rows > self.cache.store.shape[2] or longest > self.cache.size:
            self.cache.resize(batch=rows, size=longest)
        self.cache.load([prefix for picture in self.joining for prefix in picture.prefixes])
        self.owners += [(picture, row > 0) for picture in self.joining for row in range(len(picture.prefixes))]
        for picture in self.joining:
            picture.prefixes = ()
        self.pictures += self.joining
        old, added, places = len(self.done_P), len(self.joining), max(one.request.places for one in self.pictures)
        codes_PN = self.codes_PN.new_zeros(old + added, places)
        codes_PN[:old, : self.codes_PN.shape[1]] = self.codes_PN[:, :places]
        self.codes_PN = codes_PN
        start = self.last_PK.new_full((added, self.block), self.transformer.vocabulary.image_start)
        self.last_PK = torch.cat([self.last_PK, start])
        self.done_P = torch.cat([self.done_P, self.done_P.new_zeros(added)])
        self.likelihoods_P = torch.cat([self.likelihoods_P, self.likelihoods_P.new_zeros(added)])
        self.joining = []
        self._prepare()

    def remove(self, gone: Collection[Picture]) -> None:
        """Frees the rows of pictures."""
        if len(gone) == len(self.pictures):
            self.clear()
            return
        self._free([row for row, (picture, _) in enumerate(self.owners) if picture in gone])
        before = {picture: number for number, picture in enumerate(self.pictures)}
        self.pictures = [picture for picture, free in self.owners if not free]
        kept = [before[picture] for picture in self.pictures]
        self.codes_PN, self.last_PK = self.codes_PN[kept], self.last_PK[kept]
        self.done_P, self.likelihoods_P = self.done_P[kept], self.likelihoods_P[kept]
        self._prepare()

    def _free(self, rows: Sequence[int]) -> None:
        """Lets rows go, which count up; the last ones take their places."""
        assert self.cache is not None
        for row in reversed(rows):
            self.cache.remove(row)
            self.owners[row] = self.owners[-1]
            self.owners.pop()

    def _end_guidance(self) -> None:
        """Frees the prompt-free rows of pictures whose guidance is over, but for those that are done: they leave."""
        over = {one for one in self.pictures if one.request.guided <= one.done < one.request.places}
        if rows := [row for row, (picture, free) in enumerate(self.owners) if free and picture in over]:
            self._free(rows)
            self._prepare()

    def _prepare(self) -> None:
        """What stays the same until pictures come or go."""
        numbers = {picture: number for number, picture in enumerate(self.pictures)}
        requests = [picture.request for picture in self.pictures]
        rows = [(numbers[picture], free) for picture, free in self.owners]
        scales = [request.sampling.guidance for request in requests]
        self.guidance = Guidance(rows, scales, device=self.device)
        self.guided_P = torch.tensor([request.guided for request in requests], device=self.device)
        self.stops = any(0 < request.guided < request.places for request in requests)
        """Whether guidance ends before a picture is done."""
        samplings = [request.sampling for request in requests for _ in range(self.block // self.slots)]
        self.sampler = Sampler(samplings, device=self.device)
        self.ranked = any(request.sampling.candidates > 1 for request in requests)
        columns = torch.tensor([request.grid[1] // request.cell for request in requests], device=self.device)
        self.columns_B1 = self.guidance.spread(columns)[:, None]
        self.inside_K = torch.arange(self.block, device=self.device)
        self.low_PN, self.known_PN = torch.zeros_like(self.codes_PN), torch.full_like(self.codes_PN, -1)
        for number, request in enumerate(requests):
            low = request.refined()
            if low is not None:
                self.low_PN[number, : len(low)] = low
            if request.known is not None:
                places = request.order()
                self.known_PN[number, : len(places)] = request.known.flatten()[places].to(self.device)
        self.low_PN += self.transformer.vocabulary.first_code
        self.priors = [None if one.prior is None else (one.prior.flatten(0, 1), one.order()) for one in requests]
        """Of each picture the prior (N, V) in raster order, and the raster places in the order in which it is drawn."""

    def step(self) -> int:
        """Draws the next block of every picture; returns how many codes that are."""
        assert self.cache is not None
        vocabulary, places_PK = self.transformer.vocabulary, self.done_P[:, None] + self.inside_K
        hidden_BTD = self.transformer(self._segment(places_PK), self.cache)
        chosen_PK = self._choose(hidden_BTD, places_PK)
        self.codes_PN.scatter_(1, places_PK, chosen_PK)
        self.last_PK = chosen_PK + vocabulary.first_code
        self.done_P += self.block
        for picture in self.pictures:
            picture.done += self.block
            picture.steps += 1
        if self.stops:
            self._end_guidance()
        return len(self.pictures) * self.block

    def _segment(self, places_PK: Tensor) -> Segment:
        """The positions that draw the next block, after the last."""
        cell, ids = self.transformer.vocabulary.cell, self.guidance.spread(self.last_PK)
        low_PT = self.low_PN.gather(1, places_PK)[:, :: self.slots] if self.refines else None
        return Segment(
            modality=Modality.IMAGE,
            ids=ids if self.slots == 1 else ids.unflatten(1, (-1, self.slots)),
            columns=self.columns_B1,
            start=self.guidance.spread(self.done_P)[:, None] // self.slots,
            side=self.side // cell,
            low=None if low_PT is None else self.guidance.spread(low_PT),
        )

    def _choose(self, hidden_BTD: Tensor, places_PK: Tensor) -> Tensor:
        """The codes of the next block (P, K): all positions at once, the codes of each one after the other."""
        places_PTS, known_PTS = (
            of_PK.unflatten(1, (-1, self.slots)) for of_PK in (places_PK, self.known_PN.gather(1, places_PK))
        )
        noise = self._noise()
        if noise is not None:
            noise = noise.unflatten(0, (-1, self.slots))
        chosen: list[Tensor] = []
        for slot in range(self.slots):
            states_BTD = self.transformer.next_state(hidden_BTD, [self.guidance.spread(one) for one in chosen])
            guided_PTV, prompted_PTV = self._logits(states_BTD, places_PTS[..., slot])
            if any(prior is not None for prior in self.priors):
                guided_PTV = guided_PTV + self._prior(places_PTS[..., slot])
            drawn = self.sampler.choose(guided_PTV.flatten(0, 1), None if noise is None else noise[:, slot])
            known_PT = known_PTS[..., slot]
            drawn_PT = torch.where(known_PT < 0, drawn.view_as(known_PT), known_PT)
            if prompted_PTV is not None:
                surprises_PT = prompted_PTV.logsumexp(dim=2) - prompted_PTV.gather(2, drawn_PT[..., None])[..., 0]
                self.likelihoods_P -= surprises_PT.sum(dim=1)
            chosen.append(drawn_PT)
        return torch.stack(chosen, dim=2).flatten(1)

    def _prior(self, places_PT: Tensor) -> Tensor:
        """What is added to the logits of codes, (P, T, V)."""
        ids = self.transformer.vocabulary.num_codes
        found = [
            torch.zeros(len(places_T), ids) if prior is None else prior[0][prior[1][places_T.cpu()].to(prior[0].device)]
            for prior, places_T in zip(self.priors, places_PT, strict=True)
        ]
        return torch.stack([one.to(self.device) for one in found])

    def _logits(self, states_BTD: Tensor, places_PT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of codes (P, T, V): guided, and without guidance where candidates are ranked by them, in fp32.

        The head is linear, so that states can be guided instead of their logits: half the work, and the same.
        """
        codes, count = self.transformer.vocabulary.num_codes, len(self.pictures)
        within_PT = None
        if self.stops and self.block > 1:  # guidance may end inside a block
            within_PT = places_PT < self.guided_P[:, None]
        guided_PTD = self.guidance.combine(states_BTD, within_PT)
        if not self.ranked:
            return self.transformer.visual_logits(guided_PTD)[..., :codes], None
        both = torch.cat([guided_PTD, self.guidance.prompted(states_BTD)])
        logits = self.transformer.visual_logits(both)[..., :codes]
        return logits[:count], logits[count:].float()

    def _noise(self) -> Tensor | None:
        """Of the next block of every picture, (P * K, V)."""
        if not self.sampler.warm:
            return None
        ids = self.transformer.vocabulary.num_codes
        none = torch.zeros((), dtype=torch.float64, device=self.device).expand(self.block, ids)
        return torch.cat([none if one.noise is None else one.noise.take() for one in self.pictures])
