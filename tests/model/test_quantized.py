import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mars.errors import ModelError
from mars.model.kernel import find_kernel
from mars.model.quantized import (
    Bits,
    HalfWeight,
    QuantizedLinear,
    dequantize,
    quantize,
    quantize_linears,
    quantize_slowly,
)

BITS: tuple[Bits, ...] = (4, 8)
needs_kernel = pytest.mark.usefixtures("_kernel")


@pytest.fixture
def _kernel() -> None:
    if find_kernel() is None:
        pytest.skip("no C compiler, or a processor without AVX2")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernel sees them: 8 bits, a scale per 32."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    whole: torch.Tensor = ((blocks / scale).round() * scale).flatten(-2)
    return whole


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_comes_back_within_half_a_step(bits: Bits) -> None:
    weight = torch.randn(48, 96) * torch.rand(48, 1)
    found = dequantize(*quantize(weight, bits=bits), bits=bits)
    largest = weight.view(48, 3, 32).abs().amax(dim=2).repeat_interleave(32, dim=1)
    steps = 7 if bits == 4 else 127
    # The end of the range that is one step shorter may be cut: by less than a step of 4 bits.
    assert bool(((found - weight).abs() <= largest / steps * (1.0 if bits == 4 else 0.51)).all())
    assert float((found - weight).norm() / weight.norm()) < (0.12 if bits == 4 else 0.008)


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_on_the_grid_are_exact(bits: Bits) -> None:
    zero = 1 << (bits - 1)
    codes = torch.randint(-zero + 1, zero, (32, 4, 32)).float()
    codes[..., 0] = -zero if bits == 4 else -zero + 1
    weight = (codes * (2.0 ** torch.randint(-6, 3, (32, 4, 1)))).view(32, 128)
    assert torch.equal(dequantize(*quantize(weight, bits=bits), bits=bits), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_rounds_as_pytorch_does(bits: Bits, dtype: torch.dtype) -> None:
    weight = torch.randn(37, 96) * torch.logspace(-9, 3, 37)[:, None]
    weight[5], weight[6, 32:40], weight[7, 3] = 0, 0, weight[7].abs().max()
    weight[8, :32] = torch.arange(32) - 16.0  # ties, and the largest value in the middle
    weight = weight.to(dtype)
    for one, other in zip(quantize(weight, bits=bits), quantize_slowly(weight, bits=bits), strict=True):
        assert torch.equal(one, other)
    turned = weight[:32].T.contiguous().T  # a view whose rows do not lie in a row
    assert torch.equal(quantize(turned, bits=bits)[0], quantize_slowly(turned, bits=bits)[0])


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_a_lone_value_survive(bits: Bits) -> None:
    weight = torch.zeros(16, 64)
    weight[3, 40] = -0.25
    found = dequantize(*quantize(weight, bits=bits), bits=bits)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 11, 40])
def test_a_product_is_that_of_the_rounded_weight(bits: Bits, rows: int) -> None:
    weight, bias, x = torch.randn(80, 160), torch.randn(80), torch.randn(rows, 160)
    layer = QuantizedLinear(weight, bias, bits=bits)
    whole = dequantize(layer.codes, layer.scales, bits=bits)
    kernel = find_kernel() is not None
    torch.testing.assert_close(layer(x), F.linear(rounded(x) if kernel else x, whole, bias), rtol=1e-4, atol=1e-4)
    assert float((layer(x) - F.linear(x, whole, bias)).norm() / layer(x).norm()) < 0.01


def test_the_shape_before_the_last_is_kept_and_no_bias_is_none() -> None:
    layer = QuantizedLinear(torch.randn(16, 32), bits=8)
    x = torch.randn(2, 3, 32)
    assert layer(x).shape == (2, 3, 16)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
    assert layer.bias is None
    assert layer(torch.zeros(1, 32)).eq(0).all()


def test_without_the_kernel_the_result_is_the_same_up_to_rounding() -> None:
    program = (
        "import torch; from mars.model.kernel import find_kernel; from mars.model.quantized import QuantizedLinear\n"
        "assert find_kernel() is None\n"
        "torch.manual_seed(0); layer = QuantizedLinear(torch.randn(16, 64), bits=4)\n"
        "print(layer(torch.ones(1, 64)).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"MARS_KERNEL": "off"}, capture_output=True, text=True, check=True
    )
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.randn(16, 64), bits=4)
    wanted = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(layer(torch.ones(1, 64)), wanted, rtol=1e-4, atol=1e-4)


def test_bytes_are_four_and_a_half_or_eight_and_a_half_bits_a_weight() -> None:
    for bits, wanted in ((4, 4.5), (8, 8.5)):
        layer = QuantizedLinear(torch.randn(64, 128), bits=bits)  # type: ignore[arg-type]
        assert layer.num_bytes * 8 == wanted * 64 * 128


def test_outputs_need_not_fill_the_tiles() -> None:
    weight, bias, x = torch.randn(21, 64), torch.randn(21), torch.randn(3, 64)
    layer = QuantizedLinear(weight, bias, bits=8)
    assert layer(x).shape == (3, 21)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=0.05, atol=0.2)
    assert torch.equal(layer(x.repeat(20, 1))[-3:], layer(x))


def test_a_width_that_blocks_do_not_divide_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(40, 16))
    with pytest.raises(ModelError, match=r"model\.1.* got"):
        quantize_linears(model, bits=4)
    assert isinstance(model[0], nn.Linear)


def test_every_linear_layer_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.ReLU(), nn.Linear(64, 16, bias=False)))
    x = torch.randn(2, 32)
    wanted = model(x)
    quantize_linears(model, bits=8)
    assert not any(isinstance(part, nn.Linear) for part in model.modules())
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.02)


@needs_kernel
@pytest.mark.parametrize("shape", [(80, 160), (21, 100), (16, 64), (48, 7)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 37])
def test_16_bits_lie_as_close_as_fp16_and_rows_do_not_matter(shape: tuple[int, int], rows: int) -> None:
    weight, x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None], torch.randn(rows, shape[1])
    x[:, 1] *= 1000  # as language models have
    x[0] *= 1e-6
    packed = HalfWeight.pack(weight)
    found = packed.multiply(x)
    assert found.shape == (rows, -(-shape[0] // 16) * 16)
    assert found[:, shape[0] :].eq(0).all()
    exact = x.double() @ weight.double().T
    apart = (found[:, : shape[0]] - exact).norm(dim=1)
    allowed = (x.double() @ weight.half().double().T - exact).norm(dim=1) + exact.norm(dim=1) * 1e-6
    assert bool((apart <= allowed * 1.1).all())
    for row in range(rows):
        assert torch.equal(packed.multiply(x[row]), found[row])


@needs_kernel
def test_16_bits_take_zeros_and_show_what_is_not_a_number() -> None:
    weight = torch.randn(32, 70)
    weight[3] = 0
    packed, x = HalfWeight.pack(weight), torch.randn(4, 70)
    x[1] = 0
    wanted = packed.multiply(x)
    assert wanted[1].eq(0).all()
    assert wanted[:, 3].eq(0).all()
    x[2, 69] = torch.nan
    x[3, 0] = torch.inf
    found = packed.multiply(x)
    assert torch.equal(found[:2], wanted[:2])
    assert not found[2:, :3].isfinite().any()


@needs_kernel
def test_16_bits_need_inputs_whose_sums_fit() -> None:
    with pytest.raises(ModelError, match=r"65,536 inputs.* got 70000; open the model with precision fp32"):
        HalfWeight.pack(torch.zeros(1, 70000))
