"""Starts a training run from a configuration file: progress on the terminal, sample grids, a clean stop."""

import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from mars.pipeline import MarsPipeline
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
        tokenizer_config = load_config(TokenizerTrainingConfig, config, overrides)
        tokenizer_trainer = TokenizerTrainer(tokenizer_config)
        with bar("training") as progress:
            report = tokenizer_trainer.train(say, progress=progress)
        say("  ".join(f"{name} {value:.3f}" for name, value in report.items()))
        return
    stage_config = load_config(StageConfig, config, overrides)
    trainer = Trainer(stage_config, notify=say)
    if trainer.step >= stage_config.steps:
        raise ConfigError(
            f"{stage_config.out} has already been trained for {trainer.step} steps; ask for more with --set steps=N, "
            "or for a new run with --set out=DIR"
        )
    base = None if stage_config.lora is None else stage_config.model.start_from
    say(f"continuing {stage_config.out} at step {trainer.step}" if trainer.step else stage_config.describe())
    with _signals(say) as caught, _Display(stage_config.steps, say=say) as display:
        sampler = partial(draw_samples, base=base)
        done = trainer.train(report=display, sampler=sampler, stopping=lambda: bool(caught))
    if not done:
        say(f"stopped at step {trainer.step}, which is saved; run the same command again to continue")
        sys.exit(128 + caught[0])  # as a shell reports a program that a signal has ended
    say(f"the {trainer.product.name} is in {stage_config.out / trainer.product.name}")


@contextmanager
def _signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT as they come; the second one ends the program at once."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        say("this step is finished and saved; again to stop at once, without saving")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """A progress bar with speed and time left on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, *, say: Callable[[str], None]) -> None:
        self.steps = steps
        self.say = say
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not sys.stderr.isatty()
        )
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
    """A row of pictures, one per prompt, drawn by the model in a folder, or by `base` with the adapter in it; the seed
    is 0."""
    model = load_model(folder) if base is None else load_adapted(base, folder)
    drawn = MarsPipeline(model)(list(prompts), seed=0)
    width, height = drawn.images[0].size
    sheet = Image.new("RGB", (width * len(prompts), height + 16), "white")
    for index, (image, prompt) in enumerate(zip(drawn.images, prompts, strict=True)):
        sheet.paste(image, (index * width, 16))
        if prompt.isascii():  # Pillow's own font has no Chinese
            ImageDraw.Draw(sheet).text((index * width + 2, 2), prompt, fill="black")
    return sheet
