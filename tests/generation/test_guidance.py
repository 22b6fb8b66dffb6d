from collections.abc import Sequence

import torch

from mars.generation.guidance import Guidance

CPU = torch.device("cpu")


def guidance(rows: Sequence[tuple[int, bool]], scales: Sequence[float]) -> Guidance:
    return Guidance(rows, scales, device=CPU)


def test_only_guided_pictures_have_a_second_row() -> None:
    found = guidance([(0, False), (0, True), (1, False), (2, True), (2, False)], [3.0, 1.0, 0.0])
    assert found.guided.tolist() == [0, 2]
    assert found.prompted_P.tolist() == [0, 2, 4]
    assert found.free.tolist() == [1, 3]


def test_logits_move_from_the_free_row_through_the_prompted_one() -> None:
    logits = torch.randn(5, 2, 7)
    rows = [(0, False), (1, False), (2, False), (2, True), (0, True)]
    combined = guidance(rows, [3.0, 1.0, 0.5]).combine(logits)
    assert torch.allclose(combined[0], logits[4] + 3.0 * (logits[0] - logits[4]))
    assert torch.equal(combined[1], logits[1])
    assert torch.allclose(combined[2], 0.5 * (logits[2] + logits[3]))


def test_guidance_0_draws_without_the_prompt() -> None:
    logits = torch.randn(2, 1, 7)
    assert torch.equal(guidance([(0, True), (0, False)], [0.0]).combine(logits)[0], logits[0])


def test_guidance_1_changes_no_bit() -> None:
    logits = torch.randn(2, 1, 7)
    assert torch.equal(guidance([(1, False), (0, False)], [1.0, 1.0]).combine(logits), logits[[1, 0]])


def test_the_logits_of_the_batch_stay_as_they_are() -> None:
    logits = torch.randn(2, 1, 7)
    before = logits.clone()
    guidance([(0, False), (0, True)], [2.0]).combine(logits)
    assert torch.equal(logits, before)


def test_a_picture_and_its_free_row_go_on_with_the_same_id() -> None:
    found = guidance([(0, False), (1, False), (2, False), (2, True), (0, True)], [2.0, 1.0, 2.0])
    assert found.spread(torch.tensor([[7], [8], [9]])).tolist() == [[7], [8], [9], [9], [7]]


def test_codes_behind_the_end_of_guidance_follow_the_prompt_to_the_bit() -> None:
    logits = torch.randn(3, 4, 7)
    found = guidance([(0, False), (0, True), (1, False)], [3.0, 1.0])
    within = torch.tensor([[True, True, False, False], [False, False, False, False]])
    combined = found.combine(logits, within)
    assert torch.equal(combined[0, :2], found.combine(logits)[0, :2])
    assert torch.equal(combined[0, 2:], logits[0, 2:])
    assert torch.equal(combined[1], logits[2])
