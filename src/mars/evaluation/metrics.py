"""What retrieval is summed up in: ranks, rates, and how sure they are. Knows numbers only.

Letters: N prompts, Q queries of one prompt, C candidates, D features.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

SAME = 1e-5
"""Cosines closer than this are equal: a picture's features differ that much between batches."""

Floats = npt.NDArray[np.float64]


def ranks(queries_QD: Tensor, candidates_CD: Tensor, *, right: int) -> Tensor:
    """How many candidates are at least as close to each query as the right one; (Q,) int64, 0 is best.

    Args:
        queries_QD, candidates_CD: features of length 1; closeness is their cosine.
        right: which candidate is the true one. One that is equally close counts against it.
    """
    closeness_QC = queries_QD @ candidates_CD.T
    at_least_QC = closeness_QC >= closeness_QC[:, right : right + 1] - SAME
    return at_least_QC.sum(dim=1) - 1


def hits(ranks_N: npt.NDArray[np.int64], *, top: int) -> Floats:
    """1 where the right one is among the `top` closest, else 0."""
    return (ranks_N < top).astype(np.float64)


def share_of_way(model: float, *, floor: float, ceiling: float) -> float | None:
    """How far the model is on the way from floor (0) to ceiling (1); None where there is no way to go."""
    return (model - floor) / (ceiling - floor) if ceiling > floor else None


def resample(values: list[Floats], *, seed: int, times: int = 2000) -> list[Floats]:
    """Bootstrap means (times,) of each of the arrays (N,), the same entries drawn in all of them."""
    count = len(values[0])
    chosen = np.random.default_rng(seed).integers(count, size=(times, count))
    return [one[chosen].mean(axis=1) for one in values]


def interval(means: Floats) -> list[float]:
    """The middle 95 % of resampled figures, as [low, high]."""
    return [float(edge) for edge in np.quantile(means, (0.025, 0.975))]


def summary(model: Floats, *, floor: Floats, ceiling: Floats, seed: int) -> dict[str, object]:
    """Rates of model, floor and ceiling over the same prompts (N,), the share of the way, and 95 % intervals."""
    rates = {"model": model, "floor": floor, "ceiling": ceiling}
    means = {name: float(values.mean()) for name, values in rates.items()}
    drawn = dict(zip(rates, resample(list(rates.values()), seed=seed), strict=True))
    share = share_of_way(means["model"], floor=means["floor"], ceiling=means["ceiling"])
    way = drawn["ceiling"] - drawn["floor"]
    shares = (drawn["model"] - drawn["floor"])[way > 0] / way[way > 0]
    return {
        **means,
        "share_of_way": share,
        **{f"{name}_interval": interval(values) for name, values in drawn.items()},
        "share_of_way_interval": interval(shares) if share is not None and len(shares) else None,
    }
