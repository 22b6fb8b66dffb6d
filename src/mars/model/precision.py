"""How a model's weights are kept in memory.

fp32    whole
fp16    whole, and drawing reads copies of the visual expert's in 16 bits, where there is a kernel for it
int8    linear layers in 8 bits and tables in 16
int4    linear layers in 4 bits and tables in 16
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mars.errors import ConfigError
from mars.memory import CLOSE_PROGRAMS, check_memory
from mars.model.decoding import HalfWeights
from mars.model.kernel import find_kernel
from mars.model.quantized import BLOCK, Bits, QuantizedLinear, check_fits, quantize_linears
from mars.model.transformer import MarsTransformer, is_language

Precision = Literal["fp32", "fp16", "int8", "int4"]
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


def check_precision(precision: str) -> None:
    """Raises ConfigError unless it is one of `Precision`."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def is_rounded(precision: Precision) -> bool:
    """Whether the weights in memory are not those on disk any more."""
    return precision in _BITS


@torch.no_grad()
def lower_precision(transformer: MarsTransformer, precision: Precision) -> None:
    """Keeps a model as a precision says: with 8 or 4 bits, linear layers are rounded in place, one after the other, and
    it can only draw and write from then on.

    Tables stay at 16 bits, norms at 32: they are small. A head that is the embedding table becomes a layer of its own.

    Raises:
        ConfigError: for an unknown precision.
        ModelError: if a width is no multiple of what 8 or 4 bits need; nothing is changed then.
    """
    check_precision(precision)
    if not is_rounded(precision):
        copied = precision == "fp16" and find_kernel() is not None and transformer.dtype is torch.float32
        transformer.halves = HalfWeights() if copied else None
        return
    bits = _BITS[precision]
    quantize_linears(transformer, bits=bits)
    if not hasattr(transformer, "language_head"):
        transformer.add_module("language_head", QuantizedLinear(transformer.language_embedding.weight, bits=bits))
    for module in transformer.modules():
        table = isinstance(module, nn.Embedding)
        for name, weight in list(module.named_parameters(recurse=False)):
            halves = weight.dtype if weight.dtype.itemsize == 2 else torch.float16
            kept = nn.Parameter(weight.to(halves if table else torch.float32), requires_grad=False)
            if isinstance(module, nn.ParameterDict):
                module[name] = kept
            else:
                setattr(module, name, kept)


@torch.no_grad()
def replace_weights(transformer: MarsTransformer, weights: Iterable[tuple[str, Tensor]], precision: Precision) -> None:
    """Puts weights of linear layers in the place of those of the same names, before `lower_precision`; with 8 or 4 bits
    each is rounded before the next is asked for, so that they never stand whole in memory.

    Raises:
        ModelError: if a width is no multiple of what 8 or 4 bits need.
    """
    for name, weight in weights:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        module = transformer.get_submodule(parent)
        linear = getattr(module, child)
        if is_rounded(precision):
            check_fits(linear.in_features, name=f"model.{parent}.{child}")
            setattr(module, child, QuantizedLinear(weight, linear.bias, bits=_BITS[precision]))
        else:
            linear.weight.copy_(weight)
        del weight


def halve_frozen(transformer: MarsTransformer) -> None:
    """Keeps the matrices of frozen linear layers in bf16, for training whose products round them to bf16 anyway: they
    take half the memory, no product casts them, and no graph holds the cast copies. An embedding that is also the head
    is looked up in fp32, and multiplied by as a copy. Losses do not change by a bit."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()
    if not hasattr(transformer, "language_head") and not transformer.language_embedding.weight.requires_grad:
        transformer.text_half = transformer.language_embedding.weight.detach().bfloat16()


def bytes_needed(transformer: MarsTransformer, precision: Precision) -> int:
    """Bytes that a model's weights will take in memory, by their shapes alone; rounding needs a little more on the way.

    In fp32 and fp16 the visual side's only: the language expert stays in its file, unless it must be converted.
    """
    if not is_rounded(precision):
        size = 4 if precision == "fp32" else 6
        return size * sum(weight.numel() for weight in transformer.visual_tensors().values())
    linear = _BITS[precision] + 16 / BLOCK
    bits = 0.0 if hasattr(transformer, "language_head") else linear * transformer.language_embedding.weight.numel()
    for module in transformer.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Linear) and weight.dim() == 2:
                bits += linear * weight.numel()
            else:
                bits += (16 if isinstance(module, nn.Embedding) else 32) * weight.numel()
    return int(bits / 8)


def check_model_memory(transformer: MarsTransformer, converted: int, *, name: str, precision: Precision) -> None:
    """Raises ModelError if a model will not fit; `converted` are the bytes of an LLM that cannot stay in its file."""
    larger = "open it with precision int8 or int4, or "
    smaller = {"fp32": larger, "fp16": larger, "int8": "open it with precision int4, or "}
    needed = bytes_needed(transformer, precision) + converted
    check_memory(needed, what=f"{name} in {precision}", advice=smaller.get(precision, "") + CLOSE_PROGRAMS)


def weights_held(transformer: MarsTransformer) -> dict[str, tuple[int, int]]:
    """Weights and the bytes that they take, of the `language` expert and of everything `visual`."""
    held = {"language": (0, 0), "visual": (0, 0)}
    for name, module in transformer.named_modules():
        tensors = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
        for own, tensor in tensors:
            part = "language" if is_language(f"{name}.{own}".lstrip(".")) else "visual"
            count, size = tensor.numel(), tensor.numel() * tensor.element_size()
            if isinstance(module, QuantizedLinear) and own != "bias":
                again = name == "language_head" and transformer.config.language.tied_embeddings  # the table as a layer
                count = module.out_features * module.in_features if own == "codes" and not again else 0
            held[part] = held[part][0] + count, held[part][1] + size
    return held
