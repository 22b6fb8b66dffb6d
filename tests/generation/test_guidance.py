import torch

from mars.generation.guidance import Guidance


def test_only_guided_requests_have_a_second_row() -> None:
    guidance = Guidance([3.0, 1.0, 0.0, 1.0])
    assert guidance.guided == [0, 2]
    assert guidance.rows == 6


def test_logits_move_from_the_free_row_through_the_prompted_one() -> None:
    logits = torch.randn(5, 7)
    combined = Guidance([3.0, 1.0, 0.5]).combine(logits)
    assert torch.allclose(combined[0], logits[3] + 3.0 * (logits[0] - logits[3]))
    assert torch.equal(combined[1], logits[1])
    assert torch.allclose(combined[2], 0.5 * (logits[2] + logits[4]))


def test_guidance_0_draws_without_the_prompt() -> None:
    logits = torch.randn(2, 7)
    assert torch.equal(Guidance([0.0]).combine(logits)[0], logits[1])


def test_guidance_1_changes_no_bit() -> None:
    logits, ids = torch.randn(2, 7), torch.tensor([4, 5])
    guidance = Guidance([1.0, 1.0])
    assert guidance.rows == 2
    assert guidance.combine(logits) is logits
    assert guidance.spread(ids) is ids


def test_a_request_and_its_free_row_go_on_with_the_same_id() -> None:
    assert Guidance([2.0, 1.0, 2.0]).spread(torch.tensor([7, 8, 9])).tolist() == [7, 8, 9, 7, 9]
