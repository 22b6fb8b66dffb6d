"""Starts a training run from a configuration file: progress on the terminal, sample grids, a clean stop."""

import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mars.adapter import load_adapted
from mars.checkpoint import load_model
from mars.cli.progress import Bar
from mars.config import load_config
from mars.errors import ConfigError
from mars.files import locked
from mars.pipeline import MarsPipeline
from mars.training.distributed import join
from mars.training.process import Process, choose_device
from mars.training.stages import StageConfig
from mars.training.tokenizer_trainer import TokenizerTrainer, TokenizerTrainingConfig
from mars.training.trainer import Trainer


def start_training(config: Path, overrides: Sequence[str], *, say: Callable[[str], None], bar: Bar) -> None:
    """Trains what the file describes: `stage = "tokenizer"` an image tokenizer, any other stage a model.

    Raises:
        ConfigError: if the file or an override is wrong.
    """
    try:
        stage = tomllib.loads(config.read_text("utf-8")).get("stage")
    except (OSError, ValueError):
        stage = None  # load_config says what is wrong
    if stage == "tokenizer":
        _train_tokenizer(load_config(TokenizerTrainingConfig, config, overrides), say=say, bar=bar)
        return
    stage_config = load_config(StageConfig, config, overrides)
    with join(choose_device(stage_config.device)) as process:
        alone = locked(stage_config.out, error=ConfigError) if process.is_main else nullcontext()
        with alone:
            stopped = _train_stage(stage_config, process, say=say if process.is_main else lambda _: None)
    if stopped:
        sys.exit(128 + stopped)  # as a shell reports a program that a signal has ended


def _train_tokenizer(config: TokenizerTrainingConfig, *, say: Callable[[str], None], bar: Bar) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("an image tokenizer is trained by one process; start it without torchrun")
    with locked(config.out, error=ConfigError):
        trainer = TokenizerTrainer(config)
        with bar("training") as progress:
            report = trainer.train(say, progress=progress)
    say("  ".join(f"{name} {value:.3f}" for name, value in report.items()))


def _train_stage(config: StageConfig, process: Process, *, say: Callable[[str], None]) -> int:
    """Trains until the end or a signal; returns the signal's number, or 0."""
    trainer = Trainer(config, process=process, notify=say)
    if trainer.step >= config.steps:
        raise ConfigError(
            f"{config.out} has already been trained for {trainer.step} steps; ask for more with --set steps=N, "
            "or for a new run with --set out=DIR"
        )
    say(f"continuing {config.out} at step {trainer.step}" if trainer.step else config.describe())
    shown = process.is_main and sys.stderr.isatty()
    sampler = partial(draw_samples, base=None if config.lora is None else config.model.start_from)
    with _signals(say, alone=process.world == 1) as caught, _Display(config.steps, say=say, shown=shown) as display:
        done = trainer.train(report=display, sampler=sampler, stopping=lambda: bool(caught))
    if not done:
        say(f"stopped at step {trainer.step}, which is saved; run the same command again to continue")
        return caught[0] if caught else signal.SIGTERM
    say(f"the {trainer.product.name} is in {config.out / trainer.product.name}")
    return 0


@contextmanager
def _signals(say: Callable[[str], None], *, alone: bool) -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT as they come; the second ends a program that is `alone` at once.

    One of several processes may be told twice of one stop, by a cluster and by torchrun, which kills it at last.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught and alone:
            raise KeyboardInterrupt
        if not caught:
            say("this step is finished and saved" + ("; again to stop at once, without saving" if alone else ""))
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """A progress bar with speed and time left on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, *, say: Callable[[str], None], shown: bool) -> None:
        self.steps = steps
        self.say = say
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not shown)
        self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> "_Display":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the means since the last report."""
        pace = values["images_per_second"]
        losses = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if name.endswith("/loss"))
        text = f"{losses}  {values['tokens_per_second']:.0f} tokens/s  {pace:.1f} images/s"
        self.bar.update(self.task, completed=step, description=text)
        if self.bar.disable:
            self.say(f"step {step}/{self.steps}  {text}")


def draw_samples(folder: Path, prompts: Sequence[str], *, base: Path | None = None) -> Image.Image:
    """A row of pictures, one per prompt, drawn (and upscaled) by a folder's model, or by `base` with the folder's
    adapter; the seed is 0."""
    pipe = MarsPipeline(load_model(folder) if base is None else load_adapted(base, folder))
    drawn = pipe(list(prompts), seed=0)
    if pipe.model.info.upscale is not None:
        drawn = pipe.upscale(drawn)
    width, height = drawn.images[0].size
    sheet = Image.new("RGB", (width * len(prompts), height + 16), "white")
    for index, (image, prompt) in enumerate(zip(drawn.images, prompts, strict=True)):
        sheet.paste(image, (index * width, 16))
        if prompt.isascii():  # Pillow's own font has no Chinese
            ImageDraw.Draw(sheet).text((index * width + 2, 2), prompt, fill="black")
    return sheet
