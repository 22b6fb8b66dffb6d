"""The loop: batches to weights. A second run over the same folder continues the first, to the bit."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mars.checkpoint import (
    ModelInfo,
    atomic_folder,
    check_image_tokenizer,
    codes_digest,
    copy_tensors,
    load_image_tokenizer,
    read_info,
    read_tensors,
    recover_folder,
    save_model,
    save_tensors,
)
from mars.data.loader import Loader, Sample
from mars.errors import CheckpointError, ConfigError
from mars.model.base_llm import lasting_source, open_base_llm
from mars.model.config import ModelConfig
from mars.model.transformer import build_transformer, start_visual
from mars.sequence.text import CAPTION_HINTS, TextTokenizer
from mars.training.losses import Neighbours, PrefixStore, begin_image_loss, captioning_loss, text_to_image_loss
from mars.training.optim import build_optimizers, has_fast_bf16, rate_at
from mars.training.runlog import RunLog
from mars.training.runstate import check_finite, read_state, write_state
from mars.training.stages import StageConfig

LOOKAHEAD = 24
"""Steps whose captions are read at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step learns from."""

    samples: list[Sample]
    texts: list[str] | None
    """To draw from; null if the step learns captioning."""
    rows: int
    """Of codes that are learned."""


Sampler = Callable[[Path, Sequence[str]], Image.Image]
"""Draws a grid of prompts with the model saved in a folder; the trainer itself cannot generate."""
Report = Callable[[int, Mapping[str, float]], None]


class Trainer:
    """Runs a stage.

    Letters: B batch, R rows, C columns.
    """

    def __init__(self, config: StageConfig, *, notify: Callable[[str], None] | None = None) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16())
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        llm = open_base_llm(config.model.language, revision=config.model.revision, notify=notify)
        self.text_tokenizer = TextTokenizer(llm.tokenizer, config=llm.tokenizer_config)
        self.image_tokenizer, _ = load_image_tokenizer(config.model.image_tokenizer)
        self.loader = Loader(
            config.data.shards, seed=config.seed, kinds=config.data.kinds, languages=config.data.languages
        )
        wanted = codes_digest(self.image_tokenizer)
        if self.loader.image_tokenizer != wanted:
            raise CheckpointError(
                f"the shards hold codes of image tokenizer {self.loader.image_tokenizer[:19]}…, but "
                f"{config.model.image_tokenizer} is {wanted[:19]}…; encode the pictures again"
            )
        shapes = ModelConfig(
            language=llm.config, semvie=config.model.semvie, num_codes=self.image_tokenizer.config.num_codes
        )
        self.transformer = build_transformer(shapes, llm.tensors)
        codebook_VZ = self.image_tokenizer.quantizer.embedding.weight
        start_visual(self.transformer, generator=torch.Generator().manual_seed(config.seed), codebook_VZ=codebook_VZ)
        if len(self.loader.grids) > 1:
            raise ConfigError(f"pictures of a stage must share one code grid, got {list(self.loader.grids)}")
        grid = self.loader.grids[0]
        semvie = config.model.semvie
        if semvie.grid_embedding and max(grid) > semvie.max_grid:
            raise ConfigError(
                f"model.semvie.max_grid must be at least {max(grid)} for codes of {grid[0]}x{grid[1]}, "
                f"got {semvie.max_grid}"
            )
        self.info = ModelInfo(
            name=config.name,
            language=lasting_source(config.model.language),
            language_revision=config.model.revision,
            language_digest=llm.digest,
            grids=(grid,),
            factor=self.image_tokenizer.config.factor,
        )
        visual = self.transformer.visual_tensors()
        named = [(name, visual[name]) for name in sorted(visual)]
        self.optimizers = build_optimizers(named, config.optimizer, dtype=self.dtype)  # type: ignore[arg-type]
        self.neighbours: Neighbours | None = None
        if config.neighbours > 1:
            self.neighbours = Neighbours(codebook_VZ, count=config.neighbours, spread=config.neighbour_spread)
        self.prefixes = PrefixStore(self.transformer, gib=config.prefix_gib)
        self.ids: dict[str, list[int]] = {}
        self.step = 0
        if config.model.start_from is not None:
            self._load_visual(config.model.start_from)
        recover_folder(config.out / "last")
        if (config.out / "last").is_dir():
            self._resume()

    def train(self, *, report: Report | None = None, sampler: Sampler | None = None) -> None:
        """Trains to the last step and saves the model in `out/last` (fp32, resumable) and `out/model` (fp16)."""
        config = self.config
        started, images, kept = time.perf_counter(), 0, dict[str, list[float]]()
        with closing(RunLog(config.out, step=self.step)) as log:
            while self.step < config.steps:
                losses = self.train_step()
                self.step += 1
                images += config.batch_size
                for name, value in losses.items():
                    kept.setdefault(name, []).append(value)
                if self.step % config.report_every == 0:
                    seconds = time.perf_counter() - started
                    means = {name: sum(values) / len(values) for name, values in kept.items()}
                    places = self.info.grids[0][0] * self.info.grids[0][1]
                    means |= {"images_per_second": images / seconds, "tokens_per_second": images * places / seconds}
                    log.write(self.step, means)
                    if report is not None:
                        report(self.step, means)
                    started, images, kept = time.perf_counter(), 0, {}
                samples = sampler is not None and self.step % config.sample_every == 0
                if samples or self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
                if sampler is not None and samples:
                    self._sample(sampler, log)
            with atomic_folder(config.out / "model") as folder:
                save_model(folder, info=self.info, transformer=self.transformer, image_tokenizer=self.image_tokenizer)

    def train_step(self) -> dict[str, float]:
        """One step; a function of the weights and the step's number alone. Returns its losses.

        Raises:
            TrainingError: if a loss or the gradients are not finite; the weights have not moved then.
        """
        config = self.config
        plan = self._plan(self.step)
        codes_BRC = torch.stack([sample.codes[: plan.rows] for sample in plan.samples])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            if plan.texts is None:
                losses = self._captioning(plan.samples, codes_BRC)
                loss = losses["caption_loss"]
            else:
                name = "loss" if plan.rows == self.info.grids[0][0] else "top_loss"
                losses = self._text_to_image(plan.texts, codes_BRC, name=name)
                loss = losses[name] + config.special_weight * losses["special_loss"]
        rate = rate_at(self.step, steps=config.steps, config=config.optimizer)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        loss.backward()
        trained = list(self.transformer.visual_tensors().values())
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        values = {name: float(value.detach()) for name, value in losses.items()} | {"gradient_norm": float(norm)}
        check_finite(values, step=self.step, last=config.out / "last")
        for optimizer in self.optimizers:
            optimizer.step()
        return values

    def _plan(self, step: int) -> Plan:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows, count = self.info.grids[0][0], config.batch_size
        captioning = float(torch.rand((), generator=generator)) < config.captioning
        top = 0 < config.top_rows < rows and not captioning
        if top and float(torch.rand((), generator=generator)) < config.top_rows_share:
            rows, count = config.top_rows, count * rows // config.top_rows
        samples = self.loader.batch(step * count, count)
        if captioning:
            return Plan(samples=samples, texts=None, rows=rows)
        dropped = (torch.rand(count, generator=generator) < config.guidance_dropout).tolist()
        texts = ["" if drop else sample.caption.text for sample, drop in zip(samples, dropped, strict=True)]
        return Plan(samples=samples, texts=texts, rows=rows)

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.text_tokenizer.bos_id, *self._encode(text)] for text in texts]

    def _prompts_ahead(self) -> Iterator[list[int]]:
        """Prompts of the next steps, whose prefixes are cheaper to read together."""
        for step in range(self.step + 1, min(self.step + LOOKAHEAD, self.config.steps)):
            yield from self._prompts(self._plan(step).texts or [])

    def _captioning(self, samples: Sequence[Sample], codes_BRC: Tensor) -> dict[str, Tensor]:
        rows = [self._encode(sample.caption.text) for sample in samples]
        hints = [self._encode(CAPTION_HINTS[sample.caption.language]) for sample in samples]
        loss = captioning_loss(self.transformer, codes_BRC, rows, hints=hints, end=self.text_tokenizer.eos_id)
        return {"caption_loss": loss}

    def _text_to_image(self, texts: Sequence[str], codes_BRC: Tensor, *, name: str) -> dict[str, Tensor]:
        prefixes = self.prefixes.get(self._prompts(texts), ahead=self._prompts_ahead())
        return {
            name: text_to_image_loss(self.transformer, codes_BRC, prefixes, neighbours=self.neighbours),
            "special_loss": begin_image_loss(self.transformer, prefixes),
        }

    def _encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.text_tokenizer.encode(text)
        return self.ids[text]

    def save(self) -> None:
        """Replaces `out/last` by the present state."""
        with atomic_folder(self.config.out / "last") as folder:
            save_model(
                folder,
                info=self.info,
                transformer=self.transformer,
                image_tokenizer=self.image_tokenizer,
                dtype=torch.float32,
            )
            slots = {
                f"{number}.{index}.{name}": torch.as_tensor(value)
                for number, optimizer in enumerate(self.optimizers)
                for index, state in optimizer.state_dict()["state"].items()
                for name, value in state.items()
            }
            save_tensors(folder / "optimizer.safetensors", slots)
            write_state(folder, step=self.step, fixed=self._fixed())

    def _fixed(self) -> dict[str, int | str]:
        """What decides the samples of each step; steps, rates and shares may change in a run that is continued."""
        return {
            "optimizer": self.config.optimizer.name,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "image_tokenizer": self.loader.image_tokenizer,
            "pictures": len(self.loader),
        }

    def _load_visual(self, folder: Path) -> None:
        info, shapes = read_info(folder)
        codec = self.image_tokenizer.config
        check_image_tokenizer(codec, num_codes=shapes.num_codes, factor=info.factor, where=str(folder))
        if shapes != self.transformer.config:
            raise CheckpointError(f"{folder} has other shapes than the configuration; make [model.semvie] the same")
        if info.language_digest != self.info.language_digest:
            raise CheckpointError(
                f"{folder} was trained on the LLM {info.language_digest[:19]}…, "
                f"but {self.info.language} is {self.info.language_digest[:19]}…"
            )
        path = folder / "visual.safetensors"
        copy_tensors(read_tensors(path), into=self.transformer.visual_tensors(), where=str(path))

    def _resume(self) -> None:
        folder = self.config.out / "last"
        step = read_state(folder, fixed=self._fixed())
        self._load_visual(folder)
        slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in read_tensors(folder / "optimizer.safetensors").items():
            number, index, name = key.split(".")
            slots[int(number)].setdefault(int(index), {})[name] = value
        for optimizer, values in zip(self.optimizers, slots, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
        self.step = step

    def _sample(self, sampler: Sampler, log: RunLog) -> None:
        """Draws with what was just saved."""
        image = sampler(self.config.out / "last", self.config.sample_prompts)
        folder = self.config.out / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{self.step:06d}.png")
        shutil.copyfile(folder / f"step-{self.step:06d}.png", folder / "latest.png")
        log.picture(self.step, "samples", image)
