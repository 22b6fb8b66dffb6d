"""Vectors to codes and back, and a codebook that does not collapse.

Letters: N vectors, V codes, Z code width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.image_tokenizer.config import ImageTokenizerConfig


def sign_codebook(width: int) -> Tensor:
    """The codebook of `lfq`, (2 ** Z, Z): code i is the signs of the bits of i, lowest bit first."""
    bits = torch.arange(2**width)[:, None] >> torch.arange(width) & 1
    return bits * 2.0 - 1


class Quantizer(nn.Module):
    """Chooses the code of each vector; `embedding` is the codebook (V, Z).

    `bias` (V,) is added to a code's score. It is 0, which chooses the nearest code, until `rate_bias` sets it.
    """

    bias: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.choice = config.code_choice
        self.embedding = nn.Embedding(config.num_codes, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1 / config.num_codes, 1 / config.num_codes)
        self.register_buffer("bias", torch.zeros(config.num_codes))
        if self.choice == "lfq":  # nothing is learned
            self.embedding.weight.requires_grad_(False).copy_(sign_codebook(config.code_width))

    def encode(self, vectors_NZ: Tensor) -> Tensor:
        """The code of each vector, (N,) int64."""
        if self.choice == "lfq":
            powers_Z = 2 ** torch.arange(vectors_NZ.shape[1], device=vectors_NZ.device)
            return ((vectors_NZ > 0) * powers_Z).sum(dim=1)
        return (self.scores(vectors_NZ) + self.bias).argmax(dim=1)

    def scores(self, vectors_NZ: Tensor) -> Tensor:
        """How well each code fits each vector, (N, V), `bias` left out: up to a constant of a vector minus the squared
        distance (of unit vectors for `cosine`), but for `dot` the product."""
        book_VZ = self.embedding.weight
        if self.choice == "cosine":
            vectors_NZ, book_VZ = F.normalize(vectors_NZ, dim=1), F.normalize(book_VZ, dim=1)
        score_NV = vectors_NZ @ book_VZ.T
        if self.choice == "dot":
            return score_NV
        if self.choice == "l2":  # |v - b|^2 = |v|^2 - 2 v b + |b|^2, and |v|^2 is the same for all codes
            return 2 * score_NV - book_VZ.square().sum(dim=1)
        return 2 * score_NV  # all codes have one length

    def decode(self, codes: Tensor) -> Tensor:
        """The codebook vector of each code, (..., Z)."""
        vectors: Tensor = self.embedding(codes)
        return F.normalize(vectors, dim=-1) if self.choice == "cosine" else vectors


@torch.no_grad()
def rate_bias(quantizer: Quantizer, vectors_NZ: Tensor, *, rate: float, iterations: int = 8) -> Tensor:
    """The bias (V,) that trades error for entropy: entropy-constrained quantization (Chou, Lookabaugh and Gray 1989).

    A code is chosen by its squared distance plus `rate` times its surprise in nats. Of codes that look alike the common
    one is then taken, so that a sequence model has less to learn. `vectors_NZ` should be many and typical.
    """
    book_VZ = quantizer.embedding.weight
    bias_V = torch.zeros(len(book_VZ))
    for _ in range(iterations):
        counts_V = torch.full((len(book_VZ),), 0.05)
        for chunk_NZ in vectors_NZ.split(8192):
            score_NV = 2 * chunk_NZ @ book_VZ.T - book_VZ.square().sum(dim=1) + bias_V
            counts_V += torch.bincount(score_NV.argmax(dim=1), minlength=len(book_VZ))
        bias_V = rate * (counts_V / counts_V.sum()).log()
    return bias_V


class CodebookTrainer:
    """Moves a codebook by exponential averages (van den Oord et al. 2017, appendix A.1) and revives dead codes.

    Args:
        quantizer: whose `embedding` is trained in place; no gradient reaches it.
        decay: of the averages.
        revive_below: a code whose average use falls below this share of a uniform one is moved onto a vector of
            the current batch.
    """

    def __init__(self, quantizer: Quantizer, *, decay: float = 0.99, revive_below: float = 0.03) -> None:
        self.quantizer = quantizer
        self.decay = decay
        self.revive_below = revive_below
        book_VZ = quantizer.embedding.weight.detach()
        self.counts_V = torch.ones(len(book_VZ))
        self.sums_VZ = book_VZ.clone()

    def start(self, vectors_NZ: Tensor, *, generator: torch.Generator, iterations: int = 8) -> None:
        """Places the codebook by k-means on `vectors_NZ`; N should be several times V."""
        book_VZ = kmeans(vectors_NZ, len(self.counts_V), generator=generator, iterations=iterations)
        self.quantizer.embedding.weight.data.copy_(book_VZ)
        self.counts_V = torch.ones(len(book_VZ))
        self.sums_VZ = book_VZ.clone()

    @torch.no_grad()
    def update(self, vectors_NZ: Tensor, codes_N: Tensor, *, generator: torch.Generator) -> int:
        """One step of the averages; returns how many codes were revived."""
        size = len(self.counts_V)
        share = size / len(codes_N)  # so that a code in average use counts as 1, however large the batch
        counts_V = torch.bincount(codes_N, minlength=size) * share
        sums_VZ = torch.zeros_like(self.sums_VZ).index_add_(0, codes_N, vectors_NZ) * share
        self.counts_V.lerp_(counts_V, 1 - self.decay)
        self.sums_VZ.lerp_(sums_VZ, 1 - self.decay)
        dead_V = self.counts_V < self.revive_below
        revived = min(int(dead_V.sum()), len(vectors_NZ) // 8)  # a few at a time: the batch is a small sample
        if revived:
            dead = dead_V.nonzero()[:, 0]
            dead = dead[torch.randperm(len(dead), generator=generator)[:revived]]
            # Vectors that the codebook serves worst are the likeliest new homes.
            error_N = (vectors_NZ - self.quantizer.decode(codes_N)).square().sum(dim=1)
            chosen = torch.multinomial(error_N + 1e-8, revived, replacement=False, generator=generator)
            self.sums_VZ[dead] = vectors_NZ[chosen]
            self.counts_V[dead] = 1.0
        moved_V = self.counts_V > 1e-4
        self.quantizer.embedding.weight.data[moved_V] = self.sums_VZ[moved_V] / self.counts_V[moved_V, None]
        return revived

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the codebook itself."""
        return {"counts": self.counts_V, "sums": self.sums_VZ}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from `state()`."""
        self.counts_V, self.sums_VZ = state["counts"].clone(), state["sums"].clone()


@torch.no_grad()
def kmeans(vectors_NZ: Tensor, clusters: int, *, generator: torch.Generator, iterations: int) -> Tensor:
    """Lloyd's algorithm from distinct random vectors; empty clusters move onto the worst-served vectors. (V, Z)."""
    distinct_NZ = torch.unique(vectors_NZ.round(decimals=4), dim=0)
    if len(distinct_NZ) < clusters:
        filler = torch.randint(len(distinct_NZ), (clusters - len(distinct_NZ),), generator=generator)
        noise = torch.randn(len(filler), vectors_NZ.shape[1], generator=generator) * vectors_NZ.std() * 0.1
        distinct_NZ = torch.cat([distinct_NZ, distinct_NZ[filler] + noise])
    book_VZ: Tensor = distinct_NZ[torch.randperm(len(distinct_NZ), generator=generator)[:clusters]].clone()
    for _ in range(iterations):
        codes, errors = [], []
        for chunk_NZ in vectors_NZ.split(8192):
            distance_NV = book_VZ.square().sum(dim=1) - 2 * chunk_NZ @ book_VZ.T
            best_N = distance_NV.min(dim=1)
            codes.append(best_N.indices)
            errors.append(best_N.values + chunk_NZ.square().sum(dim=1))
        codes_N, error_N = torch.cat(codes), torch.cat(errors)
        counts_V = torch.bincount(codes_N, minlength=clusters)
        sums_VZ = torch.zeros_like(book_VZ).index_add_(0, codes_N, vectors_NZ)
        used_V = counts_V > 0
        book_VZ[used_V] = sums_VZ[used_V] / counts_V[used_V, None]
        empty = (~used_V).nonzero()[: len(vectors_NZ), 0]
        book_VZ[empty] = vectors_NZ[error_N.topk(len(empty)).indices]
    return book_VZ
