from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation import engine, scheduler
from mars.generation.engine import text_ids
from mars.generation.request import SEED_STRIDE, DrawRequest
from mars.generation.sampling import Sampling
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import drawn_image, read_image, text_segment

GRID = (2, 3)
FREE = (1,)
PROMPTS = [(1, 40, 41, 42, 43, 44), (1, 50), (1, 60, 61, 62), (1, *range(70, 90))]


@pytest.fixture(scope="module", params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def ask(prompt: Sequence[int], seed: int = 0, **sampling: Any) -> DrawRequest:
    return DrawRequest(prompt=tuple(prompt), free=FREE, grid=GRID, seed=seed, sampling=Sampling(**sampling))


def draw(transformer: MarsTransformer, requests: Sequence[DrawRequest], **options: Any) -> Tensor:
    return torch.stack(engine.draw(transformer, requests, **options))


MIXED = [
    ask(PROMPTS[0], 5),
    ask(PROMPTS[1], 6, guidance=3.0),
    ask(PROMPTS[2], 7, guidance=0.5, top_k=9),
    ask(PROMPTS[3], 5, temperature=0),
    ask(PROMPTS[3], 8, guidance=2.0, top_p=0.9, temperature=1.3),
    ask(PROMPTS[1], 6, guidance=3.0),
]


def full_logits(transformer: MarsTransformer, prompt: Sequence[int], codes: Tensor) -> Tensor:
    """The logits of all codes by one pass over the whole sequence, (N, codes)."""
    cache = transformer.new_cache()
    with torch.no_grad():
        transformer(text_segment([prompt]), cache)
        hidden = transformer(drawn_image(codes[None], transformer.vocabulary), cache)
        return transformer.visual_logits(hidden)[0, :, : transformer.vocabulary.num_codes]


def likelihood(transformer: MarsTransformer, prompt: Sequence[int], codes: Tensor) -> float:
    logits = full_logits(transformer, prompt, codes)
    return float(logits.log_softmax(dim=1).gather(1, codes.flatten()[:, None]).sum())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_of_several_candidates_the_likeliest_is_kept(transformer: MarsTransformer, guidance: float) -> None:
    request = ask(PROMPTS[2], 11, guidance=guidance, temperature=1.5, candidates=6)
    kept = draw(transformer, [request])[0]
    seeds = [(11 + number * SEED_STRIDE) % 2**63 for number in range(6)]
    alone = [draw(transformer, [ask(PROMPTS[2], seed, guidance=guidance, temperature=1.5)])[0] for seed in seeds]
    found = [likelihood(transformer, PROMPTS[2], codes) for codes in alone]
    assert torch.equal(kept, alone[found.index(max(found))])
    assert len(set(found)) > 3


def test_candidates_change_no_other_request_however_many_run_at_once(
    transformer: MarsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [*MIXED[:3], ask(PROMPTS[3], 8, candidates=5), ask(PROMPTS[1], 9, candidates=2)]
    wanted = torch.stack([draw(transformer, [request])[0] for request in requests])
    assert torch.equal(draw(transformer, requests), wanted)
    monkeypatch.setattr(scheduler, "CPU_ROWS", 4)
    seen: list[tuple[int, int]] = []
    assert torch.equal(draw(transformer, requests, progress=lambda *both: seen.append(both)), wanted)
    assert seen[0] == (2, 60)  # of three pictures, two are guided: the third waits
    assert seen[-1] == (60, 60)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_batch_is_its_requests_one_by_one(transformer: MarsTransformer) -> None:
    together = draw(transformer, MIXED)
    assert together.shape == (len(MIXED), *GRID)
    assert together.dtype == torch.int64
    for row, request in enumerate(MIXED):
        assert torch.equal(draw(transformer, [request])[0], together[row]), row
    assert torch.equal(together[1], together[5])
    assert len({tuple(codes.flatten().tolist()) for codes in together}) == 5


def test_the_order_of_a_batch_does_not_matter(transformer: MarsTransformer) -> None:
    assert torch.equal(draw(transformer, MIXED[::-1]).flip(0), draw(transformer, MIXED))


def test_greedy_codes_are_those_of_the_full_pass_at_every_place(transformer: MarsTransformer) -> None:
    drawn = draw(transformer, [ask(prompt, temperature=0) for prompt in PROMPTS])
    for prompt, codes in zip(PROMPTS, drawn, strict=True):
        assert full_logits(transformer, prompt, codes).argmax(dim=1).tolist() == codes.flatten().tolist()


def test_guided_codes_are_those_of_two_full_passes(transformer: MarsTransformer) -> None:
    requests = [ask(prompt, temperature=0, guidance=4.0) for prompt in PROMPTS]
    for request, codes in zip(requests, draw(transformer, requests), strict=True):
        prompted, free = (full_logits(transformer, text, codes) for text in (request.prompt, request.free))
        assert (free + 4 * (prompted - free)).argmax(dim=1).tolist() == codes.flatten().tolist()


def test_guidance_1_is_no_guidance(transformer: MarsTransformer) -> None:
    plain = [replace(ask(prompt, 3), free=(99,)) for prompt in PROMPTS]
    assert torch.equal(
        draw(transformer, [replace(one, sampling=Sampling(guidance=1.0)) for one in plain]),
        draw(transformer, [replace(one, free=FREE, sampling=Sampling()) for one in plain]),
    )


def test_the_prompt_the_seed_and_the_free_text_each_matter(transformer: MarsTransformer) -> None:
    base = ask(PROMPTS[0], 1, guidance=3.0)
    others = [replace(base, prompt=PROMPTS[2]), replace(base, seed=2), replace(base, free=(1, 99, 98))]
    drawn = draw(transformer, [base, *others])
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_progress_is_told_after_each_code(transformer: MarsTransformer) -> None:
    told: list[tuple[int, int]] = []
    draw(transformer, [ask(PROMPTS[0])], progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_a_sequence_that_does_not_fit_is_one_line(transformer: MarsTransformer) -> None:
    limit = transformer.config.language.max_positions
    draw(transformer, [ask([1] * (limit - 6))])
    with pytest.raises(RequestError, match=f"must fit into {limit} positions, got {limit + 1}; shorten the prompt"):
        draw(transformer, [ask([1] * (limit - 5))])


def test_drawing_leaves_a_model_that_can_be_trained(transformer: MarsTransformer) -> None:
    codes = draw(transformer, [ask(PROMPTS[0])])
    cache = transformer.new_cache()
    transformer(text_segment([PROMPTS[0]]), cache)
    transformer(drawn_image(codes, transformer.vocabulary), cache).sum().backward()
    gradient = transformer.visual_embedding.weight.grad
    assert gradient is not None
    assert bool(gradient.any())
    transformer.zero_grad()


def continue_text(transformer: MarsTransformer, prompt: Sequence[int], **options: Any) -> list[int]:
    return list(text_ids(transformer, prompt, **options))


def test_text_goes_on_as_transformers_does_it(transformer: MarsTransformer, tiny_llm: Path) -> None:
    import transformers

    oracle = transformers.LlamaForCausalLM.from_pretrained(tiny_llm).eval()
    for prompt in PROMPTS:
        answer = oracle.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=24
        )[0, len(prompt) :].tolist()
        found = continue_text(transformer, prompt, max_tokens=24, end=(2,))
        assert found == (answer[: answer.index(2)] if 2 in answer else answer)


def test_text_after_an_image_is_that_of_the_full_pass(transformer: MarsTransformer) -> None:
    codes = torch.arange(6).view(GRID)
    prompt = [transformer.vocabulary.image_end, 40, 41]
    found = continue_text(transformer, prompt, max_tokens=8, end=(), image=codes)
    assert len(found) == 8

    def logits_after(codes: Tensor) -> Tensor:
        cache = transformer.new_cache()
        with torch.no_grad():
            transformer(read_image(codes[None], transformer.vocabulary), cache)
            return transformer.text_logits(transformer(text_segment([prompt + found]), cache))[0]

    assert logits_after(codes)[2:-1].argmax(dim=1).tolist() == found
    assert not torch.allclose(logits_after(codes), logits_after(codes + 20), atol=0.1)


def test_text_stops_at_an_end_and_at_the_last_position(transformer: MarsTransformer) -> None:
    whole = continue_text(transformer, PROMPTS[0], max_tokens=12, end=())
    heard = text_ids(transformer, PROMPTS[0], max_tokens=100, end=())
    assert [next(heard) for _ in range(12)] == whole
    assert len(whole) == 12
    end = whole[4]
    assert continue_text(transformer, PROMPTS[0], max_tokens=12, end=(end,)) == whole[: whole.index(end)]
    limit = transformer.config.language.max_positions
    assert len(continue_text(transformer, [1] * (limit - 3), max_tokens=50, end=())) == 3
    with pytest.raises(RequestError, match=f"must be shorter than {limit} tokens, got {limit}"):
        continue_text(transformer, [1] * limit, max_tokens=1, end=())


def test_sampled_text_repeats_with_its_seed(transformer: MarsTransformer) -> None:
    def written(seed: int) -> list[int]:
        return continue_text(transformer, PROMPTS[0], max_tokens=10, end=(), sampling=Sampling(), seed=seed)

    assert written(1) == written(1) != written(2)
