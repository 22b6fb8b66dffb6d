"""How fast the visual expert of a 7B MARS draws on this machine, beside what its memory allows.

    python benchmarks/decode_7b.py [--layers 32] [--seconds 20] [--out FILE.json]

Random weights in the shapes of the preset qwen-7b, rounded layer by layer; the language expert is not there, as image
positions never read it. Drawing a code reads every weight of the visual expert once, so the limit is bandwidth /
bytes. Bandwidth is measured in the same run, by reading as many bytes with as many threads and doing nothing with them.
"""

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mars.model.kernel import find_kernel
from mars.model.presets import find_preset
from mars.model.quantized import Bits, QuantizedLinear
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment

PROMPT = 44
"""Ids of a prompt: the cache holds as many positions before the first code."""


def build(layers: int, bits: Bits) -> MarsTransformer:
    """The visual side of qwen-7b with random weights, each rounded before the next is made; no language expert."""
    preset = find_preset("qwen-7b")
    shapes = replace(preset.model, language=replace(preset.model.language, num_layers=layers))
    with torch.device("meta"):
        transformer = MarsTransformer(shapes)
    transformer.release_language()
    for module in list(transformer.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Linear):
                weight = torch.randn(part.out_features, part.in_features).mul_(part.in_features**-0.5)
                bias = None if part.bias is None else torch.zeros(part.out_features)
                setattr(module, name, QuantizedLinear(weight, bias, bits=bits))
        for name, weight in list(module.named_parameters(recurse=False)):
            filled = torch.ones(weight.shape) if weight.dim() == 1 else torch.randn(weight.shape).mul_(0.02).half()
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    return transformer


def bytes_per_code(transformer: MarsTransformer) -> int:
    """What one code reads of the weights."""
    parts: list[nn.Module] = [transformer.visual_head]
    parts += [layer.visual for layer in transformer.layers if isinstance(layer, SemVIELayer) and layer.visual]
    linears = (module for part in parts for module in part.modules() if isinstance(module, QuantizedLinear))
    return sum(linear.num_bytes for linear in linears)


def bandwidth(size: int, *, repeats: int = 5) -> float:
    """Bytes per second at which memory can be read, the best of several."""
    kernel = find_kernel()
    assert kernel is not None
    words = torch.randint(2**62, (size // 8,))
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        kernel.read(words.data_ptr(), len(words))
        best = max(best, 8 * len(words) / (time.perf_counter() - started))
    return best


@torch.inference_mode()
def draw_codes(transformer: MarsTransformer, *, rows: int, seconds: float) -> float:
    """Codes per second and row, of `rows` rows together (2 is one guided picture): the median code counts."""
    cache = transformer.new_static_cache(batch=rows, size=PROMPT + 257, images_only=True)
    cache.used[True] = PROMPT
    cache.columns[1, :, :PROMPT] = True
    cache.lengths_B, cache.longest = torch.full((rows,), PROMPT), PROMPT
    times: list[float] = []
    ids = torch.full((rows, 1), transformer.vocabulary.image_start)
    while sum(times) < seconds and len(times) < 256:
        started = time.perf_counter()
        segment = Segment(modality=Modality.IMAGE, ids=ids, columns=16, start=len(times))
        logits = transformer.visual_logits(transformer(segment, cache)[:, 0])
        ids = logits[:, : transformer.vocabulary.num_codes].argmax(dim=1)[:, None] + transformer.vocabulary.first_code
        times.append(time.perf_counter() - started)
    return 1 / sorted(times)[len(times) // 2]


def measure(layers: int, seconds: float) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"layers": layers, "threads": torch.get_num_threads()}
    widths: tuple[Bits, ...] = (8, 4)
    for bits in widths:
        started = time.perf_counter()
        transformer = build(layers, bits)
        size = bytes_per_code(transformer)
        speed = bandwidth(min(size, 2**31))
        figures: dict[str, Any] = {
            "seconds to make and round": time.perf_counter() - started,
            "bytes per code": size,
            "bandwidth GB/s": speed / 1e9,
            "limit codes/s": speed / size,
        }
        for rows in (1, 2):
            pace = draw_codes(transformer, rows=rows, seconds=seconds)
            figures[f"codes/s, {rows} row{'s' if rows > 1 else ''}"] = pace
            figures[f"share of the limit, {rows} row{'s' if rows > 1 else ''}"] = pace * size / speed
        figures["largest memory GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found[f"int{bits}"] = figures
        del transformer
    return found


def main() -> None:
    """Prints the figures, and writes them if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    figures = measure(given.layers, given.seconds)
    text = json.dumps(figures, indent=2)
    print(text)  # noqa: T201
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
