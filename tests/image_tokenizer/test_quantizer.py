import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.metrics import codebook_statistics
from mars.image_tokenizer.quantizer import CodebookTrainer, Quantizer, kmeans, rate_bias


def quantizer(choice: str = "l2", *, num_codes: int = 16, code_width: int = 4) -> Quantizer:
    config = ImageTokenizerConfig(num_codes=num_codes, code_width=code_width, code_choice=choice)
    found = Quantizer(config)
    if choice != "lfq":
        found.embedding.weight.data.normal_()
    return found


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_hand(choice: str, vector: list[float], book: list[list[float]]) -> int:
    """The code of one vector, by trying each."""

    def score(code: list[float]) -> float:
        product = sum(a * b for a, b in zip(vector, code, strict=True))
        if choice == "dot":
            return product
        if choice == "cosine":
            return product / math.hypot(*code)
        return -math.dist(vector, code)

    return max(range(len(book)), key=lambda index: score(book[index]))


@pytest.mark.parametrize("choice", ["l2", "cosine", "dot", "lfq"])
def test_the_code_of_a_vector_has_the_highest_score(choice: str) -> None:
    found = quantizer(choice)
    vectors = torch.randn(50, 4, generator=generator())
    scores = found.scores(vectors)
    assert torch.equal(scores.argmax(dim=1), found.encode(vectors))
    if choice != "dot":
        book = found.decode(torch.arange(16))
        seen = torch.nn.functional.normalize(vectors, dim=1) if choice == "cosine" else vectors
        distances = torch.cdist(seen, book).square()
        assert torch.allclose(scores - scores[:, :1], distances[:, :1] - distances, atol=1e-4)


@pytest.mark.parametrize("choice", ["l2", "cosine", "dot", "lfq"])
@torch.no_grad()
def test_the_code_is_the_best_of_all(choice: str) -> None:
    model = quantizer(choice)
    vectors = torch.randn(100, 4)
    codes = model.encode(vectors)
    assert (codes.shape, codes.dtype) == ((100,), torch.int64)
    book = model.embedding.weight.tolist()
    assert codes.tolist() == [by_hand(choice, vector, book) for vector in vectors.tolist()]


def test_lfq_codes_are_the_bits_of_signs() -> None:
    model = quantizer("lfq")
    assert model.encode(
        torch.tensor([[1.0, -1.0, -1.0, -1.0], [-0.1, -2.0, 0.3, 5.0], [0.0, 0.0, 0.0, 0.0]])
    ).tolist() == [1, 12, 0]
    assert model.decode(torch.tensor([1])).tolist() == [[1, -1, -1, -1]]
    assert not model.embedding.weight.requires_grad


@pytest.mark.parametrize("choice", ["l2", "cosine", "dot", "lfq"])
@torch.no_grad()
def test_every_code_decodes_to_a_vector_of_that_code(choice: str) -> None:
    model = quantizer(choice)
    if choice == "dot":  # a longer vector would win against a code's own
        model.embedding.weight.copy_(torch.nn.functional.normalize(model.embedding.weight, dim=1))
    codes = torch.arange(16)
    vectors = model.decode(codes)
    assert torch.equal(model.encode(vectors), codes)
    assert torch.equal(model.encode(model.embedding.weight), codes)
    assert model.decode(codes.view(2, 2, 4)).shape == (2, 2, 4, 4)
    if choice == "cosine":
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(16))
    else:
        assert torch.equal(vectors, model.embedding.weight)


def clusters(count: int, each: int, *, width: int = 4) -> Tensor:
    """Tight clusters of very different sizes, far apart, in a random order."""
    centres = torch.randn(count, width) * 10
    sizes = [each * (1 + 9 * (index % 2)) for index in range(count)]
    vectors = torch.cat([centre + 0.1 * torch.randn(size, width) for centre, size in zip(centres, sizes, strict=True)])
    return vectors[torch.randperm(len(vectors))]


def test_k_means_start_uses_the_whole_codebook() -> None:
    model = quantizer(num_codes=32)
    vectors = clusters(32, 20)
    before = (vectors - model.decode(model.encode(vectors))).square().mean()
    CodebookTrainer(model).start(vectors, generator=generator())
    codes = model.encode(vectors)
    assert codes.unique().numel() == 32
    assert (vectors - model.decode(codes)).square().mean() < 0.2 * before


def test_k_means_error_falls_with_every_iteration() -> None:
    vectors = torch.randn(500, 4)
    errors = [
        torch.cdist(vectors, kmeans(vectors, 16, generator=generator(), iterations=count))
        .min(dim=1)
        .values.square()
        .sum()
        for count in (0, 1, 2, 4, 8)
    ]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_k_means_of_as_many_clusters_as_vectors_is_exact() -> None:
    vectors = torch.randn(8, 4)
    book = kmeans(vectors, 8, generator=generator(), iterations=2)
    torch.testing.assert_close(torch.cdist(vectors, book).min(dim=1).values, torch.zeros(8), atol=1e-3, rtol=0)


def test_k_means_copes_with_few_distinct_vectors() -> None:
    vectors = torch.randn(3, 4).repeat(20, 1)
    book = kmeans(vectors, 8, generator=generator(), iterations=3)
    assert bool(torch.isfinite(book).all())
    assert torch.cdist(vectors, book).min(dim=1).values.max() < 1e-2


def test_k_means_copes_with_fewer_vectors_than_clusters() -> None:
    book = kmeans(torch.randn(3, 4), 16, generator=generator(), iterations=3)
    assert book.shape == (16, 4)
    assert bool(torch.isfinite(book).all())


def step(trainer: CodebookTrainer, vectors: Tensor, source: torch.Generator) -> int:
    return trainer.update(vectors, trainer.quantizer.encode(vectors), generator=source)


def test_averages_follow_the_mean_of_each_codes_vectors() -> None:
    model = quantizer(num_codes=2, code_width=1)
    model.embedding.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
    trainer, source = CodebookTrainer(model, decay=0.5), generator()
    for _ in range(30):
        assert step(trainer, torch.tensor([[-3.0], [-5.0], [2.0], [4.0]]), source) == 0
    torch.testing.assert_close(model.embedding.weight.data, torch.tensor([[-4.0], [3.0]]), atol=1e-3, rtol=0)


def test_dead_codes_revive_on_the_data() -> None:
    model = quantizer(num_codes=32)
    model.embedding.weight.data.copy_(torch.randn(32, 4) * 0.01 + 1000)
    model.embedding.weight.data[0] = 0
    vectors = clusters(32, 8)
    assert model.encode(vectors).unique().tolist() == [0]
    trainer, source = CodebookTrainer(model, decay=0.9), generator()
    assert sum(step(trainer, vectors, source) for _ in range(150)) >= 31
    assert model.encode(vectors).unique().numel() >= 29
    assert (vectors - model.decode(model.encode(vectors))).square().mean() < 0.1 * vectors.square().mean()


def test_revival_is_a_few_at_a_time() -> None:
    model = quantizer(num_codes=64)
    model.embedding.weight.data[1:] += 1000
    trainer, source = CodebookTrainer(model, decay=0.5), generator()
    assert max(step(trainer, torch.randn(64, 4), source) for _ in range(20)) == 8


def test_a_good_start_is_left_alone_however_large_the_batch() -> None:
    model = quantizer(num_codes=16)
    vectors = torch.randn(16, 4).repeat(256, 1) * 10
    trainer, source = CodebookTrainer(model), generator()
    trainer.start(vectors, generator=source)
    assert step(trainer, vectors, source) == 0


def test_a_resumed_trainer_goes_on_as_the_first() -> None:
    def run(stop: int | None) -> Tensor:
        torch.manual_seed(0)
        model = quantizer()
        trainer, source = CodebookTrainer(model, decay=0.8), generator()
        for index in range(12):
            if index == stop:
                saved: Any = {name: tensor.clone() for name, tensor in trainer.state().items()}
                trainer = CodebookTrainer(model, decay=0.8)
                trainer.load_state(saved)
            step(trainer, torch.randn(64, 4), source)
        return model.embedding.weight.data

    assert torch.equal(run(None), run(6))


def test_training_the_codebook_builds_no_graph() -> None:
    model = quantizer()
    trainer = CodebookTrainer(model)
    vectors = torch.randn(64, 4, requires_grad=True)
    trainer.update(vectors, model.encode(vectors), generator=generator())
    assert not trainer.sums_VZ.requires_grad
    assert model.embedding.weight.grad is None


@torch.no_grad()
def test_a_rate_lowers_the_entropy_of_codes_and_raises_the_error() -> None:
    config = ImageTokenizerConfig(num_codes=32, code_width=3, channels=(32,))
    quantizer = Quantizer(config)
    quantizer.embedding.weight.data.normal_()
    vectors = torch.randn(4000, 3) * torch.tensor([1.0, 0.3, 0.3])
    entropies, errors = [], []
    for rate in (0.0, 0.1, 0.3, 1.0):
        quantizer.bias.copy_(rate_bias(quantizer, vectors, rate=rate))
        codes = quantizer.encode(vectors)
        entropies.append(codebook_statistics(codes, 32)["perplexity"])
        errors.append(float((vectors - quantizer.decode(codes)).square().sum(dim=1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert errors == sorted(errors)
    assert entropies[-1] < 0.5 * entropies[0]


def test_the_bias_is_the_surprise_of_a_code_at_the_given_rate() -> None:
    config = ImageTokenizerConfig(num_codes=2, code_width=1, channels=(32,))
    quantizer = Quantizer(config)
    quantizer.embedding.weight.data.copy_(torch.tensor([[-10.0], [10.0]]))
    vectors = torch.tensor([[-10.0]] * 30 + [[10.0]] * 10)
    torch.testing.assert_close(
        rate_bias(quantizer, vectors, rate=2.0), 2 * torch.tensor([0.75, 0.25]).log(), atol=0.01, rtol=0
    )
