"""A text-conditioned latent diffusion model of the size of our visual expert, on the same pictures and captions.

    python -m benchmarks.diffusion_baseline CONFIG --pictures SHARD... --out RUN [--steps 8000] [--rate 3e-4]

CONFIG is a stage of our own training (`configs/mini-pretrain.toml`): its LLM, image tokenizer, code shards, shares of
captions, batch size, dropped captions and seed are the baseline's too, and the loader is ours, so that both models see
the same pictures with the same captions in the same order. SHARD are the picture shards that its codes were made from.
Model and recipe: `diffusion_model.py`. AdamW at a constant rate after a warm-up, an average of the weights, bf16
products where the CPU has units for them.

    RUN/baseline.json, scales.safetensors    what the model is; sizes; FLOPs of what is computed once
    RUN/latents.safetensors, text/           what is computed once (`diffusion_data.py`), its FLOPs told apart
    RUN/snapshots/step-000500/               averaged weights (fp16), and what they cost: steps, samples, FLOPs, seconds
    RUN/last/                                what a run that was stopped goes on from; the same command again does so
    RUN/log.jsonl

FLOPs are those of the products of forward and backward, counted by PyTorch for each shape of a step. Seconds are those
of steps, reading captions included, as in the log of our own training.
"""

import argparse
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.diffusion_data import TextStates, make_latents, padded, trained_pictures
from benchmarks.diffusion_model import (
    NOISE,
    NOISE_LEVELS,
    Scales,
    build_unet,
    count_parameters,
    noising,
    predict,
    read_scales,
    step_flops,
    unet_config,
    width_for,
)
from mars.checkpoint import codes_digest, copy_tensors, read_tensors, save_tensors, write_json
from mars.config import load_config
from mars.data.crops import Sizes
from mars.errors import ConfigError, DataError
from mars.files import atomic_folder
from mars.model.costs import FlopCount, image_tokenizer_flops
from mars.training.optim import Average, optimizer_tensors, restore_optimizers
from mars.training.process import STATE
from mars.training.runlog import RunLog
from mars.training.runstate import FILE, check_files, check_finite, read_state, write_state
from mars.training.setup import Opened, open_stage
from mars.training.stages import StageConfig

LOOKAHEAD = 64
"""Steps whose captions are read at once."""
CLIP = 1.0
SNAPSHOTS = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the baseline is trained, beside what the stage says."""

    learning_rate: float = 3e-4
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.999
    """Decay of the average of the weights, which is what is drawn with."""


class Baseline:
    """A run.

    Args:
        stage: our own training, for data and text.
        pictures: picture shards.
        size: as of `mars data encode`; null leaves pictures as they are.
        notify: is told in a line what takes long.
    """

    def __init__(
        self,
        stage: StageConfig,
        recipe: Recipe,
        *,
        pictures: Sequence[Path],
        out: Path,
        size: int | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.stage, self.recipe, self.out, self.notify = stage, recipe, out, notify
        if stage.threads:
            torch.set_num_threads(stage.threads)
        opened = open_stage(stage, notify=notify)
        if opened.loaders is None or len(opened.loaders.drawn.grids) != 1:
            raise ConfigError("data.shards must hold codes of one grid for the diffusion baseline")
        self.loader, self.grid = opened.loaders.drawn, opened.loaders.drawn.grids[0]
        self.text = TextStates(out / "text", transformer=opened.transformer, tokenizer=opened.text_tokenizer)
        self.reading = FlopCount(opened.transformer)
        self.latents_NZRC = self._latents(opened, pictures, size=size)
        self.about = self._about(opened)
        started = time.perf_counter()
        self._read_ahead(0)
        self.step, self.flops, self.seconds, self.loss = 0, 0, time.perf_counter() - started, 0.0
        self.scales = self._scales()
        torch.manual_seed(stage.seed)
        self.unet = build_unet(self.about["unet"]).train()
        self.weights = dict(self.unet.named_parameters())
        self.average = Average(self.weights, decay=recipe.average)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.noising = noising()
        data = {"batch_size": stage.batch_size, "seed": stage.seed, "guidance_dropout": stage.guidance_dropout}
        self.fixed = {**self.about, "recipe": asdict(recipe), **data, **opened.contents}
        if (out / "last" / FILE).is_file():
            self._resume()
        write_json(out / "baseline.json", self.about)

    def _latents(self, opened: Opened, pictures: Sequence[Path], *, size: int | None) -> Tensor:
        path, data = self.out / "latents.safetensors", self.stage.data
        if not path.is_file():
            self.notify("encoding the pictures (once)")
            wanted = trained_pictures(data.repeated, kinds=data.kinds, languages=data.languages)
            sizes = Sizes(factor=opened.image_tokenizer.config.factor, sizes=() if size is None else (size,))
            found = make_latents(wanted, pictures, image_tokenizer=opened.image_tokenizer, sizes=sizes)
            save_tensors(path, {"latents": found})
        latents = read_tensors(path)["latents"]
        if len(latents) != len(self.loader):
            raise DataError(
                f"{path} holds {len(latents)} pictures, but the shards {len(self.loader)}; remove {self.out}"
            )
        return latents

    def _about(self, opened: Opened) -> dict[str, Any]:
        """What `baseline.json` holds."""
        channels, rows, columns = self.latents_NZRC.shape[1:]
        ours = sum(weight.numel() for weight in opened.transformer.visual_tensors().values())
        latent, text_width = (channels, rows, columns), opened.transformer.config.language.width
        width = width_for(ours, latent=latent, text_width=text_width)
        unet = unet_config(latent=latent, text_width=text_width, width=width)
        return {
            "unet": unet,
            "parameters": count_parameters(unet),
            "our_parameters": ours,
            "noise": NOISE,
            "language": opened.info.language_digest,
            "image_tokenizer": codes_digest(opened.image_tokenizer),
            "pictures": len(self.latents_NZRC),
            "latents_flops": image_tokenizer_flops(opened.image_tokenizer.config, grid=self.grid)[0]
            * len(self.latents_NZRC),
        }

    def _scales(self) -> Scales:
        """Of all latents and of the first captions; what a run began with stays."""
        if not (self.out / "scales.safetensors").is_file():
            latents = self.latents_NZRC.float()
            mean_D, deviation_D = self.text.moments()
            found = Scales(
                latent_mean_Z=latents.mean(dim=(0, 2, 3)),
                latent_deviation_Z=latents.std(dim=(0, 2, 3)).clamp(min=1e-3),
                text_mean_D=mean_D,
                text_deviation_D=deviation_D,
            )
            save_tensors(self.out / "scales.safetensors", vars(found))
        return read_scales(self.out)

    def _captions(self, step: int) -> tuple[list[int], list[str]]:
        """Pictures of a step and their captions, some emptied."""
        size = self.stage.batch_size
        samples = self.loader.batch(step * size, size)
        generator = torch.Generator().manual_seed(self.stage.seed * 1_000_003 + step)
        dropped = (torch.rand(size, generator=generator) < self.stage.guidance_dropout).tolist()
        texts = ["" if drop else one.caption.text for one, drop in zip(samples, dropped, strict=True)]
        return [one.picture for one in samples], texts

    def _read_ahead(self, step: int) -> None:
        texts = {text for ahead in range(step, step + LOOKAHEAD) for text in self._captions(ahead)[1]}
        self.text.read({"", *texts})

    def train_step(self) -> float:
        """One step; a function of the weights and of the step's number alone. Returns its loss."""
        pictures, texts = self._captions(self.step)
        generator = torch.Generator().manual_seed(self.stage.seed * 1_000_003 + self.step + 2**40)
        latents_BZRC = self.scales.latents(self.latents_NZRC[pictures].float())
        noise_BZRC = torch.randn(latents_BZRC.shape, generator=generator)
        times = torch.randint(NOISE_LEVELS, (len(pictures),), generator=generator)
        noisy_BZRC = self.noising.add_noise(latents_BZRC, noise_BZRC, times)
        states_BTD, real_BT = padded([self.text.states[text].float() for text in texts])
        text = self.scales.text(states_BTD), real_BT
        wanted_BZRC = self.noising.get_velocity(latents_BZRC, noise_BZRC, times)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        error = F.mse_loss(predict(self.unet, noisy_BZRC, times, text), wanted_BZRC)
        error.backward()
        loss = float(error.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP))
        check_finite({"loss": loss, "gradient norm": norm}, step=self.step, last=self.out / "last")
        self.optimizer.step()
        self.average.update(self.weights, step=self.step)
        self.flops += step_flops(self.about["unet"], batch=len(pictures), positions=states_BTD.shape[1])
        self.step += 1
        return loss

    def train(
        self,
        steps: int,
        *,
        snapshots: Sequence[int],
        save_minutes: float = 10.0,
        report_every: int = 10,
        stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to a step; returns whether it came so far. The last step is a snapshot too."""
        saved = time.perf_counter()
        with closing(RunLog(self.out, step=self.step)) as log:
            while self.step < steps and not stopping():
                started = time.perf_counter()
                if any(text not in self.text.states for text in self._captions(self.step)[1]):
                    self._read_ahead(self.step)
                loss = self.train_step()
                self.seconds += time.perf_counter() - started
                self.loss += 0.01 * (loss - self.loss) if self.step > 1 else loss
                if self.step % report_every == 0:
                    log.write(self.step, {"loss": loss, "smooth_loss": self.loss} | self._costs())
                    self.notify(
                        f"step {self.step}/{steps}  loss {self.loss:.4f}  {self.seconds / self.step:.2f} s a step"
                    )
                if self.step in snapshots or self.step == steps:
                    self._snapshot()
                if time.perf_counter() - saved > 60 * save_minutes:
                    self.save()
                    saved = time.perf_counter()
        self.save()
        return self.step >= steps

    def _costs(self) -> dict[str, float]:
        """What was spent up to now. Text and latents, which are computed once, are told apart."""
        return {
            "samples": self.step * self.stage.batch_size,
            "flops": self.flops,
            "text_flops": sum(self.reading.read_text(len(states)) for states in self.text.states.values()),
            "latents_flops": self.about["latents_flops"],
            "seconds": self.seconds,
        }

    def _snapshot(self) -> None:
        with atomic_folder(self.out / "snapshots" / f"step-{self.step:06d}") as folder:
            weights = {name: value.half() for name, value in self.average.values.items()}
            save_tensors(folder / "unet.safetensors", weights)
            write_json(folder / "snapshot.json", {"step": self.step, "loss": self.loss, **self._costs()})

    def save(self) -> None:
        """Writes what a run goes on from."""
        tensors = optimizer_tensors([self.optimizer], {id(weight): name for name, weight in self.weights.items()})
        for name, values in (("weights", self.weights), ("average", self.average.values)):
            tensors |= {f"{name}/{key}": value.detach() for key, value in values.items()}
        with atomic_folder(self.out / "last") as folder:
            save_tensors(folder / STATE, tensors)
            progress = {"flops": self.flops, "seconds": self.seconds, "loss": self.loss}
            write_state(folder, step=self.step, fixed=self.fixed, progress=progress)

    def _resume(self) -> None:
        folder = self.out / "last"
        check_files(folder)
        self.step, progress = read_state(folder, fixed=self.fixed)
        found = read_tensors(folder / STATE)
        for name, into in (("weights", self.weights), ("average", self.average.values)):
            own = {key: found.pop(f"{name}/{key}") for key in into}
            copy_tensors(own, into=into, where=str(folder))
        restore_optimizers([self.optimizer], found, self.weights)
        self.flops, self.seconds, self.loss = progress["flops"], progress["seconds"], progress["loss"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or goes on with training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a stage of our own training")
    parser.add_argument("--pictures", nargs="+", type=Path, required=True, help="what its codes were made from")
    parser.add_argument("--size", type=int, help="as `mars data encode` had it; without, pictures stay as they are")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion"))
    parser.add_argument("--set", action="append", default=[], help="a value of the stage, such as batch_size=32")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--average", type=float, default=Recipe.average)
    parser.add_argument("--snapshots", nargs="*", type=int, default=list(SNAPSHOTS), help="steps")
    parser.add_argument("--save-minutes", type=float, default=10.0)
    given = parser.parse_args(arguments)
    stage = load_config(StageConfig, given.config, given.set)
    recipe = Recipe(learning_rate=given.rate, average=given.average)

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201

    run = Baseline(stage, recipe, pictures=given.pictures, out=given.out, size=given.size, notify=say)
    say(f"{run.about['parameters'] / 1e6:.1f} M parameters (ours: {run.about['our_parameters'] / 1e6:.1f} M)")
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    run.train(given.steps, snapshots=given.snapshots, save_minutes=given.save_minutes, stopping=lambda: bool(stopped))
    say(f"{given.out} is saved at step {run.step}")


if __name__ == "__main__":
    main()
