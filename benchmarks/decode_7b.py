"""How fast the visual expert of a 7B MARS draws on this machine, beside what its memory allows.

    python benchmarks/decode_7b.py [--layers 32] [--seconds 20] [--out FILE.json]

Random weights in the shapes of the preset qwen-7b, rounded layer by layer; the language expert is not there, as image
positions never read it. Drawing a code reads every weight of the visual expert once, so the limit is bandwidth /
bytes. Bandwidth is measured in between, by reading memory with as many threads and doing nothing with it.
Where `llama-cpp-python` is installed, llama.cpp runs a Llama of the same shapes and bytes (Q8_0, Q4_0) beside it.
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from mars.model.cache import Prefix
from mars.model.kernel import find_kernel
from mars.model.presets import find_preset
from mars.model.quantized import Bits, QuantizedLinear
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment
from mars.sequence.vocabulary import Vocabulary

PROMPT = 44
"""Ids of a prompt: the cache holds as many positions before the first code."""


def build(layers: int, bits: Bits) -> MarsTransformer:
    """The visual side of qwen-7b with random weights, each rounded before the next is made; no language expert."""
    preset = find_preset("qwen-7b")
    shapes = replace(preset.model, language=replace(preset.model.language, num_layers=layers))
    with torch.device("meta"):
        transformer = MarsTransformer(shapes)
    transformer.release_language()
    for module in [module for module in transformer.modules() if not isinstance(module, nn.Linear)]:
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


class Bandwidth:
    """Measures how fast memory is read by the kernel's threads, doing nothing with it."""

    def __init__(self, size: int) -> None:
        self.words = torch.randint(2**62, (size // 8,))

    def __call__(self) -> float:
        """Bytes per second, once."""
        kernel = find_kernel()
        assert kernel is not None
        started = time.perf_counter()
        kernel.read(self.words.data_ptr(), len(self.words))
        return 8 * len(self.words) / (time.perf_counter() - started)


@torch.inference_mode()
def draw_codes(transformer: MarsTransformer, *, rows: int, seconds: float, read: Bandwidth) -> tuple[float, float]:
    """Codes per second and row, of `rows` rows together (2 is one guided picture), and bytes per second of memory.

    The median of a whole picture's codes counts. Memory is read after every eighth code, so that what else the machine
    does meanwhile weighs on both.
    """
    cache = transformer.new_static_cache(batch=rows, size=PROMPT + 257, images_only=True)
    config = transformer.config
    shape = len(config.visual_layers), config.language.num_kv_heads, PROMPT, config.language.head_width
    prompt = Prefix(keys=torch.zeros(shape), values=torch.zeros(shape), last_hidden=torch.zeros(0))
    cache.load([prompt] * rows)
    times: list[float] = []
    speeds = [read()]
    ids = torch.full((rows, 1), transformer.vocabulary.image_start)
    while sum(times) < seconds and len(times) < 256:
        started = time.perf_counter()
        segment = Segment(modality=Modality.IMAGE, ids=ids, columns=16, start=len(times))
        logits = transformer.visual_logits(transformer(segment, cache)[:, 0])
        ids = logits[:, : transformer.vocabulary.num_codes].argmax(dim=1)[:, None] + transformer.vocabulary.first_code
        times.append(time.perf_counter() - started)
        if len(times) % 8 == 0:
            speeds.append(read())
    return 1 / median(times), median(speeds)


def write_gguf(path: Path, *, layers: int, bits: Bits) -> int:
    """A Llama of the visual expert's shapes with random weights; returns the bytes that a token reads."""
    import gguf
    import numpy as np

    shapes = find_preset("qwen-7b").model
    language, rows = (
        shapes.language,
        Vocabulary(text_size=shapes.language.vocab_size, num_codes=shapes.num_codes).visual_rows,
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(language.width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(language.ffn)
    writer.add_head_count(language.num_heads)
    writer.add_head_count_kv(language.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    width, ffn, kv = language.width, language.ffn, language.num_kv_heads * language.head_width
    matrices = {"token_embd": (rows, width), "output": (rows, width)}
    norms = ["output_norm"]
    for layer in range(layers):
        shapes_of = {
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, width),
        }
        shapes_of |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in shapes_of.items()}
        norms += [f"blk.{layer}.{name}" for name in ("attn_norm", "ffn_norm")]
    sizes = {name: outputs * inputs // 32 * (18 if bits == 4 else 34) for name, (outputs, inputs) in matrices.items()}
    for name, (outputs, _) in matrices.items():
        shape = (outputs, sizes[name] // outputs)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), sizes[name], raw_dtype=kind)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (width,), np.dtype(np.float32), 4 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for name in matrices:  # one after the other, so that only one is in memory
        blocks = generator.integers(
            0, 256, (sizes[name] // (18 if bits == 4 else 34), 18 if bits == 4 else 34), np.uint8
        )
        blocks[:, :2] = np.array([0.002], dtype=np.float16).view(np.uint8)
        writer.write_tensor_data(blocks)
    for _ in norms:
        writer.write_tensor_data(np.ones(width, dtype=np.float32))
    writer.close()
    return sum(sizes.values()) - sizes["token_embd"]


def llama_cpp(*, layers: int, bits: Bits, seconds: float, read: Bandwidth) -> dict[str, Any]:
    """Tokens per second of llama.cpp on a model of the same bytes, measured in the same way."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        size = write_gguf(path, layers=layers, bits=bits)
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )
        llama.eval(list(range(1, PROMPT + 1)))
        times: list[float] = []
        speeds = [read()]
        while sum(times) < seconds and len(times) < 256:
            started = time.perf_counter()
            llama.eval([1])
            times.append(time.perf_counter() - started)
            if len(times) % 8 == 0:
                speeds.append(read())
        llama.close()
    pace = 1 / median(times)
    return {
        "version": llama_cpp.__version__,
        "bytes per token": size,
        "tokens/s": pace,
        "bandwidth GB/s": median(speeds) / 1e9,
        "share of the limit": pace * size / median(speeds),
    }


def measure(layers: int, seconds: float) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"layers": layers, "threads": torch.get_num_threads()}
    widths: tuple[Bits, ...] = (8, 4)
    for bits in widths:
        started = time.perf_counter()
        transformer = build(layers, bits)
        size = bytes_per_code(transformer)
        read = Bandwidth(min(size, 2**30))
        figures: dict[str, Any] = {
            "seconds to make and round": time.perf_counter() - started,
            "bytes per code": size,
        }
        for rows in (1, 2):
            name = f"{rows} row{'s' if rows > 1 else ''}"
            pace, speed = draw_codes(transformer, rows=rows, seconds=seconds, read=read)
            figures[name] = {
                "codes/s": pace,
                "bandwidth GB/s": speed / 1e9,
                "limit codes/s": speed / size,
                "share of the limit": pace * size / speed,
            }
        del transformer
        gc.collect()
        if find_spec("llama_cpp"):
            figures["llama.cpp, 1 row"] = llama_cpp(layers=layers, bits=bits, seconds=seconds, read=read)
        found[f"int{bits}"] = figures
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
