import pytest
import torch
import torch.nn.functional as F

from mars.model.layers import Expert, Linear, Norm, Rotary, attend, rotate


@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (2, 1, 5), (2, 3, 5), (7, 5), (8, 5), (3, 1, 2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_quick_product_is_the_plain_one(shape: tuple[int, ...], bias: bool) -> None:
    linear = Linear(5, 4, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        quick = linear(x)
    assert quick.shape == (*shape[:-1], 4)
    torch.testing.assert_close(quick, F.linear(x, linear.weight, linear.bias), atol=1e-6, rtol=1e-5)


def test_gradients_take_the_plain_product() -> None:
    linear = Linear(5, 4)
    x = torch.randn(3, 5, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(dim=0).expand(3, 5))


def test_the_norm_divides_by_the_root_mean_square() -> None:
    norm = Norm(6, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6) * 10
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, eps=1e-5))


def test_the_norm_computes_in_fp32_and_keeps_the_dtype() -> None:
    x = torch.full((4,), 3e4, dtype=torch.float16)  # its square is beyond fp16
    out = Norm(4, eps=1e-5).half()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(4, dtype=torch.float16))


def test_rotary_positions_turn_pairs_as_complex_numbers() -> None:
    rotary = Rotary(8, theta=100.0)
    positions = torch.tensor([[0, 1, 5], [3, 2, 700]])
    x = torch.randn(2, 4, 3, 8)
    turned = rotate(x, rotary.at(positions, longest=701, dtype=torch.float32))
    speeds = 100.0 ** -(torch.arange(4) / 4)
    angles = positions[:, None, :, None] * speeds
    wanted = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([wanted.real, wanted.imag], dim=-1), atol=1e-4, rtol=1e-4)


def test_rotated_products_depend_on_distance_only() -> None:
    rotary = Rotary(8, theta=100.0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i: int, j: int) -> torch.Tensor:
        turned = [
            rotate(x, rotary.at(torch.tensor([[at]]), longest=64, dtype=torch.float32)) for x, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(50, 45))


def test_a_rotary_table_made_without_gradients_serves_training() -> None:
    rotary = Rotary(8, theta=100.0)
    positions = torch.tensor([[0, 1]])
    with torch.inference_mode():
        rotary.at(positions, longest=2, dtype=torch.float32)
    x = torch.randn(1, 1, 2, 8, requires_grad=True)
    rotate(x, rotary.at(positions, longest=2, dtype=torch.float32)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", ["none", "shared", "per row"])
def test_attention_equals_a_loop_over_heads(groups: int, queries: int, masked: str) -> None:
    q, k, v = torch.randn(2, 4, queries, 6), torch.randn(2, groups, 5, 6), torch.randn(2, groups, 5, 6)
    mask = None
    if masked != "none":
        mask = torch.rand(1 if masked == "shared" else 2, 1, queries, 5) > 0.5
        mask[..., 0] = True
    out = attend(q, k, v, mask)
    assert out.shape == (2, queries, 24)
    for row in range(2):
        for head in range(4):
            key, value = k[row, head * groups // 4], v[row, head * groups // 4]
            scores = q[row, head] @ key.T / 6**0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[row % len(mask), 0], -torch.inf)
            wanted = scores.softmax(dim=-1) @ value
            torch.testing.assert_close(out[row, :, head * 6 : head * 6 + 6], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_an_expert_holds_only_what_is_its_own(own: bool, qk_norm: bool) -> None:
    expert = Expert(
        width=8, ffn=12, heads=(4, 2, 6), eps=1e-5, qkv_bias=False, qk_norm=qk_norm, own_norms=own, own_output=own
    )
    names = {name.removesuffix(".weight") for name, _ in expert.named_parameters()}
    plain = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    norms = {"attention_norm", "ffn_norm"} | ({"q_norm", "k_norm"} if qk_norm else set())
    assert names == plain | (norms | {"o_proj"} if own else set())


def test_projections_split_into_heads_in_order() -> None:
    expert = Expert(width=8, ffn=12, heads=(4, 2, 6), eps=1e-5, qkv_bias=True, qk_norm=False)
    x = torch.randn(2, 3, 8)
    q, k, v = expert.project(x)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 3, 6), (2, 2, 3, 6), (2, 2, 3, 6))
    torch.testing.assert_close(q[:, 1], expert.q_proj(x)[..., 6:12])
    torch.testing.assert_close(v[:, 1], expert.v_proj(x)[..., 6:])


def test_the_feed_forward_is_swiglu() -> None:
    expert = Expert(width=8, ffn=12, heads=(1, 1, 8), eps=1e-5, qkv_bias=False, qk_norm=False)
    x = torch.randn(5, 8)
    gate, up, down = expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight
    gated = x @ gate.T
    wanted = (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T
    torch.testing.assert_close(expert.feed_forward(x), wanted, atol=1e-6, rtol=1e-5)
