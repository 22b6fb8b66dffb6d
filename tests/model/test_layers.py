import pytest
import torch
import torch.nn.functional as F

from mars.model.layers import Expert, Linear, Norm, attend


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
