"""The loop: batches to weights. A second run over the same folder continues the first, to the bit.

RUN/checkpoints/   what a run continues from (`training.checkpoints`); RUN/last and RUN/best link into it
RUN/model/         the finished model, fp16; or RUN/adapter/, if an adapter was trained
RUN/log.jsonl      numbers, and RUN/tensorboard/ where the package is installed
RUN/samples/       pictures
RUN/skipped-step-000123.json   the batch after which a run gave up; with `-rank-N`, what process N had of it
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mars.errors import ConfigError, TrainingError
from mars.files import tidy_folder, whole_file
from mars.model.precision import halve_frozen
from mars.training.checkpoints import Checkpoints
from mars.training.meters import Meter, Pace, measured_peak, peak_memory
from mars.training.optim import Average, build_optimizers, optimizer_tensors, rate_at, restore_optimizers
from mars.training.process import Process, choose_device, has_fast_bf16
from mars.training.product import product_of
from mars.training.runlog import RunLog
from mars.training.runstate import continue_from, fixed_values, read_state, write_state
from mars.training.setup import open_stage
from mars.training.stages import FREE, StageConfig
from mars.training.task import Task, TaskContext
from mars.training.tasks import TaskMix

Sampler = Callable[[Path, Sequence[str]], Image.Image]
"""Draws a grid of prompts with the model saved in a folder; the trainer itself cannot generate."""
Report = Callable[[int, Mapping[str, float]], None]


class Trainer:
    """Runs a stage.

    Args:
        process: where to compute and with whom; by default alone, on the device of the configuration.
        notify: is told in a line what a person should know.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        process: Process | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.notify = notify or (lambda _: None)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.process = process or Process(choose_device(config.device))
        device = self.process.device
        bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        opened = open_stage(config, notify=notify)
        self.info, self.transformer = opened.info, opened.transformer
        self.product = product_of(config, opened)  # adapters are placed with the rest
        if bf16:
            halve_frozen(self.transformer)
        self.process.place(self.transformer, dtype=self.dtype)
        self.transformer.recompute = config.recompute
        if config.compile:
            self.transformer.compile_layers()
        self.mix = TaskMix(
            TaskContext(
                config=config,
                process=self.process,
                transformer=self.transformer,
                text_tokenizer=opened.text_tokenizer,
                loaders=opened.loaders,
                documents=opened.documents,
            )
        )
        if config.batch_size < config.accumulate * self.process.world:
            raise ConfigError(
                f"batch_size must be at least accumulate x processes, {config.accumulate} x {self.process.world}, "
                f"got {config.batch_size}"
            )
        self.weights = self.product.weights()
        """All that is trained, by name."""
        self.optimizers = build_optimizers(self.weights.items(), config.optimizer, dtype=self.dtype)
        decay = config.optimizer.average
        self.average = None if decay is None else Average(self.weights, decay=decay)
        self.meter, self.since_save = Meter(), Meter()
        self.step = 0
        self.skipped = 0
        """Steps in a row whose numbers were not finite, up to now."""
        self.fixed = fixed_values(config, free=FREE) | {"tasks": config.mix} | opened.contents
        """What a run that is continued must share, by the names of the configuration."""
        self.checkpoints = Checkpoints(config.out, keep=config.keep, process=self.process)
        newest = self.process.decide(self._newest)
        if newest is not None:
            self._resume(newest)

    def train(
        self,
        *,
        report: Report | None = None,
        sampler: Sampler | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the last step and saves what was made in `out/model` (fp16) or `out/adapter`; returns whether it
        came so far.

        Args:
            stopping: asked after each step; once true, the step is saved and the run ends.

        Raises:
            TrainingError: if too many steps in a row are not finite, or the log cannot be written.
            CheckpointError: if a checkpoint cannot be written; the checkpoint before stays.
        """
        if not self.process.is_main:
            return self._loop(None, report=None, sampler=sampler, stopping=stopping)
        with closing(RunLog(self.config.out, step=self.step)) as log:
            return self._loop(log, report=report, sampler=sampler, stopping=stopping)

    def _loop(
        self, log: RunLog | None, *, report: Report | None, sampler: Sampler | None, stopping: Callable[[], bool]
    ) -> bool:
        config, pace = self.config, Pace(peak=self._peak())
        while self.step < config.steps:
            values = self.train_step(pace)
            self.meter.add(values)
            self.since_save.add(values)
            if self.step % config.report_every == 0:
                speed = self.process.sum(pace.per_second())
                speed["mfu"] /= self.process.world
                means = self.meter.means() | speed | {"memory_gib": peak_memory(self.process.device)}
                self.meter = Meter()
                if log is not None:
                    log.write(self.step, means)
                if report is not None:
                    report(self.step, means)
                pace.start()
            if self.step == config.steps:  # before its checkpoint, behind which a run that was killed would not look
                with self.process.folder(config.out / self.product.name) as folder:
                    self._write_product(folder, dtype=torch.float16)
            stop = self.process.any(stopping())
            samples = sampler is not None and self.step % config.sample_every == 0
            if samples or stop or self.step % config.save_every == 0 or self.step == config.steps:
                self.save()
            if samples and sampler is not None and log is not None:
                self._sample(sampler, log)
            if stop and self.step < config.steps:
                return False
        return True

    def train_step(self, pace: Pace | None = None) -> dict[str, float]:
        """One step; a function of the weights and the step's number alone. Returns its losses.

        A step whose loss or gradient is not finite moves nothing.

        Raises:
            TrainingError: if there were too many of these in a row.
        """
        config, process = self.config, self.process
        rate = rate_at(self.step, steps=config.steps, config=config.optimizer)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        task, batch = self.mix.draw(self.step)
        torch.manual_seed(config.seed * 1_000_003 + self.step)  # for dropout in adapters
        own = self._backward(task, batch, pace=pace)
        values = process.sum(own)
        values["gradient_norm"] = process.clip(self.weights.values(), limit=config.optimizer.clip)
        broken = {name: value for name, value in values.items() if not math.isfinite(value)}
        if broken:
            self._skip(task, batch, broken, own)
        else:
            self.skipped = 0
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update(self.weights, step=self.step)
        self.step += 1
        return values | {"skipped": float(bool(broken))}

    def _backward(self, task: Task[Any], batch: Sequence[Any], *, pace: Pace | None) -> dict[str, float]:
        """Leaves the gradients of a batch in the weights, part by part; returns this process's share of its losses."""
        process, count = self.process, self.config.accumulate
        whole = process.sum({"targets": task.targets(batch)})["targets"]
        parts = [batch[part::count] for part in range(count)]
        sums: dict[str, Tensor] = {}
        for part in parts:
            share = task.targets(part) / whole
            with process.synchronizing(self.transformer, last=part is parts[-1]):
                with self._autocast():
                    losses = task.losses(part)
                # Gradients are averaged over processes, so that each counts as its share of all.
                (losses["total"] * share * process.world).backward()
            for name, value in losses.items():
                name = f"{task.name}/{name}"
                sums[name] = sums.get(name, torch.zeros_like(value.detach())) + share * value.detach()
            if pace is not None:
                pace.add(images=len(part), tokens=task.targets(part), flops=task.flops(part))
        return {name: float(value) for name, value in sums.items()}

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is torch.bfloat16
        return torch.autocast(self.process.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _skip(
        self, task: Task[Any], batch: Sequence[Any], broken: Mapping[str, float], own: Mapping[str, float]
    ) -> None:
        """Counts a step whose numbers are not finite, and gives up after too many in a row.

        Each process then stores its part of the batch with its `own` share of the losses, which tells whose it was.
        """
        self.skipped += 1
        name, value = next(iter(broken.items()))
        found = f"{name} must be finite, got {value} at step {self.step}"
        if self.skipped < self.config.max_skipped:
            self.notify(f"{found}; the step is skipped")
            return
        stem, many = f"skipped-step-{self.step:06d}", self.process.world > 1
        path = self.config.out / (f"{stem}-rank-{self.process.rank}.json" if many else f"{stem}.json")
        table = {"step": self.step, "task": task.name, "values": {**broken, **own}}
        table["examples"] = [asdict(example) for example in batch]
        told = f"the batch is in {self.config.out / f'{stem}-rank-*.json' if many else path}"
        try:
            with whole_file(path, error=TrainingError) as partial:
                partial.write_text(json.dumps(table, default=Tensor.tolist) + "\n", "utf-8")
        except TrainingError as error:
            told = str(error)
        self.process.any(True)  # nobody ends, and so ends the others, before all have written
        rest = continue_from(self.checkpoints.last)
        raise TrainingError(f"{found}, and so were {self.skipped} steps in a row; {told}; {rest}")

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Mean loss of the main task on held-out pictures, of the weights that are drawn with; none without any."""
        task = self.mix.main
        examples = task.held_out()
        whole = self.process.sum({"targets": task.targets(examples)})["targets"]
        if not whole:
            return None
        loss = 0.0
        self.transformer.eval()
        with self.average.swapped(self.weights) if self.average is not None else nullcontext(), self._autocast():
            for start in range(0, len(examples), self.config.batch_size):
                part = examples[start : start + self.config.batch_size]
                loss += float(task.losses(part)["loss"]) * task.targets(part) / whole
        self.transformer.train()
        return self.process.sum({"loss": loss})["loss"]

    def save(self) -> None:
        """Writes a checkpoint of the present state; it becomes `out/last`, and `out/best` if it has the lowest score.

        Raises:
            CheckpointError: if the disk is full or cannot be written; the checkpoint before stays.
        """
        score = self.held_out_loss()
        if score is None:
            score = self.since_save.means().get(f"{self.mix.main.name}/loss")
        state = optimizer_tensors(self.optimizers, {id(weight): name for name, weight in self.weights.items()})
        if self.average is not None:
            state |= {f"weights/{name}": weight.detach() for name, weight in self.weights.items()}
        with self.checkpoints.saving(self.step) as folder:
            self._write_product(folder, dtype=torch.float32)
            self.process.write_state(folder, state)
            if self.process.is_main:
                progress = {"score": score, "skipped": self.skipped, "means": self.meter.state()}
                write_state(folder, step=self.step, fixed=self.fixed, progress=progress)
        self.since_save = Meter()

    def _write_product(self, folder: Path, *, dtype: torch.dtype) -> None:
        """The model or adapter in a folder of its own, with averaged weights where there are some."""
        weights = self.process.whole(self.average.values if self.average is not None else self.weights)
        if self.process.is_main:
            self.product.write(folder, weights, dtype=dtype)

    def _newest(self) -> Path | None:
        """The checkpoint to continue from; what a killed process left half written is removed."""
        tidy_folder(self.config.out / self.product.name)
        return self.checkpoints.newest(notify=self.notify)

    def _resume(self, folder: Path) -> None:
        step, progress = read_state(folder, fixed=self.fixed)
        model, state = self.product.read(folder), self.process.read_state(folder, weights=self.weights)
        own = {name.removeprefix("weights/"): state.pop(name) for name in list(state) if name.startswith("weights/")}
        self.process.load(own or model, into=self.weights, where=str(folder))
        if self.average is not None:
            self.process.load(model, into=self.average.values, where=str(folder))
        restore_optimizers(self.optimizers, state, self.weights)
        self.meter.load(progress.get("means", {}))
        self.step, self.skipped = step, progress.get("skipped", 0)

    def _peak(self) -> float:
        """FLOP/s to which MFU is relative."""
        if self.config.peak_tflops is not None:
            return self.config.peak_tflops * 1e12
        peak = measured_peak(self.process.device, self.dtype)
        self.notify(f"MFU is relative to {peak / 1e12:.2f} TFLOP/s, measured on one large product")
        return peak

    def _sample(self, sampler: Sampler, log: RunLog) -> None:
        """Draws with what was just saved."""
        image = sampler(self.checkpoints.last, self.config.sample_prompts)
        folder = self.config.out / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{self.step:06d}.png")
        shutil.copyfile(folder / f"step-{self.step:06d}.png", folder / "latest.png")
        log.picture(self.step, "samples", image)
