"""Trains the image tokenizer: a plain auto-encoder first, then k-means, then a quantized one, and late an adversary."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mars.checkpoint import (
    load_into,
    read_tensors,
    save_image_tokenizer,
    save_tensors,
    write_json,
)
from mars.data.shards import read_pictures, shard_paths
from mars.errors import ConfigError, DataError
from mars.files import atomic_folder, files_digest, tidy_folder
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.losses import (
    PatchDiscriminator,
    PerceptualDistance,
    adversarial_weight,
    discriminator_loss,
)
from mars.image_tokenizer.metrics import codebook_statistics, psnr
from mars.image_tokenizer.model import ImageTokenizer, reconstruct
from mars.image_tokenizer.quantizer import CodebookTrainer, rate_bias
from mars.training.process import has_fast_bf16
from mars.training.runlog import RunLog
from mars.training.runstate import check_files, check_finite, fixed_values, read_state, write_state

SHIFT = 8
"""Pixels, fewer than which the pictures that the perceptual loss looks at are cut off by."""
RATE_PICTURES = 2048
"""Pictures on which it is measured how common codes are."""
FREE = ("data", "out", "start_from", "steps", "learning_rate", "warmup", "report_every", "save_every")
"""What may change in a run that is continued; of the data and of what it starts from the places may."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """A run that trains an image tokenizer."""

    stage: Literal["tokenizer"] = "tokenizer"
    data: tuple[Path, ...]
    """Picture shards; the split `train` is trained on, all others are held out."""
    out: Path
    """The tokenizer is in `last` in this folder, beside what a resumed run needs."""
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    start_from: Path | None = None
    """A tokenizer to continue from, as a folder; null starts from nothing."""
    decoder_only: bool = False
    """Keep the encoder and the codebook, so that codes stay what they are."""
    code_rate: float = 0.0
    """Squared distance per nat by which common codes are preferred (`quantizer.rate_bias`); the decoder then learns to
    draw what these lose, so this needs decoder_only. 0 takes the nearest code."""
    steps: int
    batch_size: int = 32
    crop: int = 64
    """Pixels of the random crops of the first part."""
    full_from: float = 0.7
    """Share of the run after which whole pictures replace crops (with the batch made smaller in proportion)."""
    quantize_from: int = 500
    """Step at which k-means places the codebook and quantization begins."""
    learning_rate: float = 1e-3
    warmup: int = 50
    l1_weight: float = 1.0
    l2_weight: float = 4.0
    commitment: float = 0.25
    perceptual_weight: float = 0.1
    perceptual_share: float = 0.125
    """Share of each batch that the perceptual loss looks at; it costs more than the tokenizer itself."""
    adversarial_from: int | None = None
    """Step at which the patch adversary is switched on; null never."""
    adversarial_weight: float = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of convolutions and products; weights, distances of codes and losses stay fp32. `auto` is bf16 where the CPU has
    units for it."""
    seed: int = 0
    report_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "learning_rate", "report_every", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be greater than 0 and finite, got {getattr(self, name)}")
        for name in ("l1_weight", "l2_weight", "commitment", "perceptual_weight", "adversarial_weight", "warmup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.crop % self.tokenizer.factor:
            raise ConfigError(f"crop must be a multiple of {self.tokenizer.factor}, got {self.crop}")
        if self.quantize_from < 0:
            raise ConfigError(f"quantize_from must be at least 0, got {self.quantize_from}")
        if self.tokenizer.code_choice == "lfq" and not self.decoder_only:
            raise ConfigError("tokenizer.code_choice = 'lfq' has a codebook that is not trained; train another choice")
        if self.code_rate < 0 or (self.code_rate and not self.decoder_only):
            raise ConfigError(f"code_rate must be 0, or greater together with decoder_only, got {self.code_rate}")
        if self.decoder_only and self.start_from is None:
            raise ConfigError("decoder_only needs start_from, the tokenizer whose codes are kept")


def load_pictures(shards: Iterable[Path]) -> tuple[Tensor, Tensor]:
    """Training and held-out pictures of picture shards, each (N, 3, height, width) uint8."""
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    for shard in shards:
        for picture in read_pictures(shard):
            (train if picture.record.split == "train" else held_out).append(torch.from_numpy(picture.pixels()))
    if not train or not held_out:
        raise DataError(f"training needs pictures to train on and to hold out, got {len(train)} and {len(held_out)}")
    if len({tuple(picture.shape) for picture in train + held_out}) > 1:
        raise DataError("pictures of a tokenizer's training set must share one size, got several")
    return torch.stack(train).permute(0, 3, 1, 2), torch.stack(held_out).permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer, pictures: Tensor, *, perceptual: PerceptualDistance | None = None
) -> dict[str, float]:
    """PSNR (mean over pictures, dB), SSIM, perceptual distance, codebook usage and perplexity over uint8 pictures."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    noise, similar, distance, codes = [], [], [], []
    for chunk in pictures.split(64):
        images = chunk.float() / 255
        rebuilt, chunk_codes = reconstruct(tokenizer, images)
        noise.append(psnr(rebuilt, images))
        similar.append(ssim(rebuilt, images, data_range=1.0, reduction="none"))
        if perceptual is not None:
            distance += [perceptual(one[None], other[None]) for one, other in zip(rebuilt, images, strict=True)]
        codes.append(chunk_codes)
    report = {"psnr": float(torch.cat(noise).mean()), "ssim": float(torch.cat(similar).mean())}
    if distance:
        report["perceptual"] = float(torch.stack(distance).mean())
    return report | codebook_statistics(torch.cat(codes), tokenizer.config.num_codes)


@torch.no_grad()
def reconstruction_grid(tokenizer: ImageTokenizer, pictures: Tensor, *, columns: int = 12) -> Image.Image:
    """Pictures above their reconstructions: two rows of `columns` where there are enough, else one."""
    columns = min(columns, len(pictures))
    images = pictures[: 2 * columns if len(pictures) >= 2 * columns else columns].float() / 255
    rebuilt, _ = reconstruct(tokenizer, images)
    rows = [images[:columns], rebuilt[:columns], images[columns:], rebuilt[columns:]]
    strips = [torch.cat(list(row), dim=2) for row in rows if len(row)]
    pixels = (torch.cat(strips, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


class TokenizerTrainer:
    """Runs a `TokenizerTrainingConfig`; a second run over the same folder continues the first."""

    def __init__(self, config: TokenizerTrainingConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        self.tokenizer = ImageTokenizer(config.tokenizer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.start_from is not None:
            tensors = read_tensors(config.start_from / "image_tokenizer.safetensors")
            load_into(self.tokenizer, tensors, where=str(config.start_from))
        if config.decoder_only:
            for part in (self.tokenizer.encoder, self.tokenizer.quant_conv, self.tokenizer.quantizer):
                part.requires_grad_(False)
        self.codebook = CodebookTrainer(self.tokenizer.quantizer)
        self.tokenizer.quantizer.requires_grad_(False)
        trained = [weight for weight in self.tokenizer.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
        self.perceptual = PerceptualDistance() if config.perceptual_weight else None
        self.discriminator = PatchDiscriminator()
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=config.learning_rate / 2, betas=(0.5, 0.9)
        )
        device = torch.device("cpu")
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
        self.step = 0
        shards = [shard for path in config.data for shard in shard_paths(path)]
        self.fixed = fixed_values(config, free=FREE) | {
            "data": files_digest(shards),
            "start_from": "nothing" if config.start_from is None else "a tokenizer",
        }
        """What a run that is continued must share."""
        self.last = config.out / "last"
        tidy_folder(self.last)
        if self.last.is_dir():
            self._resume()

    def train(
        self, notify: Callable[[str], None] = print, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Trains to the last step, saves in `out/last`, and returns the held-out report.

        Args:
            notify: called with a line for each report, and without `progress` for every 25 steps.
            progress: called after each step with how many are done and how many there are.

        Raises:
            TrainingError: if a loss or the gradients are not finite; what was saved last stays.
        """
        config = self.config
        pictures, held_out = load_pictures(config.data)
        if config.code_rate and self.step == 0:
            self._set_rate(pictures)
        started = time.perf_counter()
        with closing(RunLog(config.out, step=self.step)) as log:
            while self.step < config.steps:
                losses = self.train_step(pictures)
                self.step += 1
                if progress is not None:
                    progress(self.step, config.steps)
                if self.step % 25 == 0:
                    pace = 25 / (time.perf_counter() - started)
                    started = time.perf_counter()
                    log.write(self.step, {**losses, "steps_per_second": pace})
                    if progress is None:
                        notify(self._line(losses["loss"], pace=pace))
                if self.step % config.report_every == 0:
                    report = evaluate_tokenizer(self.tokenizer, held_out[:256])
                    log.write(self.step, {f"held_out_{name}": value for name, value in report.items()})
                    notify("  ".join(f"{name} {value:.3f}" for name, value in report.items()))
                    reconstruction_grid(self.tokenizer, held_out).save(config.out / "reconstructions.png")
                    started = time.perf_counter()
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
            report = evaluate_tokenizer(self.tokenizer, held_out, perceptual=self.perceptual)
            reconstruction_grid(self.tokenizer, held_out).save(config.out / "reconstructions.png")
            write_json(config.out / "report.json", {**report, "held_out_pictures": len(held_out), "steps": self.step})
            return report

    def _line(self, loss: float, *, pace: float) -> str:
        """Where the run is; `pace` in steps per second."""
        step, steps = self.step, self.config.steps
        return f"step {step}/{steps} loss {loss:.4f} {pace:.2f} steps/s {(steps - step) / pace / 60:.0f} min left"

    def train_step(self, pictures: Tensor) -> dict[str, float]:
        """One step on uint8 pictures (N, 3, height, width); returns its losses."""
        config = self.config
        quantizing = self.step >= config.quantize_from or config.start_from is not None
        if self.step == config.quantize_from and config.start_from is None:
            self._start_codebook(pictures)
        images = self._batch(pictures)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self._rate()
        with self._autocast():
            vectors = self.tokenizer.to_vectors(images).float()
        parts: dict[str, Tensor] = {}
        if quantizing:
            vectors, parts["commitment"] = self._quantize(vectors)
        with self._autocast():
            rebuilt = self.tokenizer.to_images(vectors).float()
        low, high = config.tokenizer.pixel_range
        error = (rebuilt - images) * (high - low)
        parts["pixel"] = config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean()
        if self.perceptual is not None:
            with self._autocast():
                distance = self.perceptual(*self._shifted(rebuilt, images)).float()
            parts["perceptual"] = config.perceptual_weight * distance
        loss = torch.stack(list(parts.values())).sum()
        if config.adversarial_from is not None and self.step >= config.adversarial_from:
            parts["adversarial"] = self._adversarial(loss, rebuilt, images)
            loss = loss + parts["adversarial"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        losses = {"loss": float(loss.detach())} | {name: float(part.detach()) for name, part in parts.items()}
        check_finite({**losses, "gradient_norm": float(norm)}, step=self.step, last=self.last)
        self.optimizer.step()
        return losses

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def save(self) -> None:
        """Replaces `out/last` by the tokenizer and what a resumed run needs."""
        state = {f"codebook.{name}": tensor for name, tensor in self.codebook.state().items()}
        state |= {f"discriminator.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        state["generator"] = self.generator.get_state()
        for label, optimizer in (("optimizer", self.optimizer), ("critic", self.discriminator_optimizer)):
            for index, slots in optimizer.state_dict()["state"].items():
                state |= {f"{label}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        with atomic_folder(self.last) as folder:
            save_image_tokenizer(folder, self.tokenizer)
            save_tensors(folder / "state.safetensors", state)
            write_state(folder, step=self.step, fixed=self.fixed)

    def _resume(self) -> None:
        check_files(self.last)
        step, _ = read_state(self.last, fixed=self.fixed)
        load_into(self.tokenizer, read_tensors(self.last / "image_tokenizer.safetensors"), where=str(self.last))
        state = read_tensors(self.last / "state.safetensors")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.codebook.load_state(part("codebook."))
        load_into(self.discriminator, part("discriminator."), where=str(self.last))
        self.generator.set_state(state["generator"])
        for label, optimizer in (("optimizer.", self.optimizer), ("critic.", self.discriminator_optimizer)):
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in part(label).items():
                index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        self.step = step

    def _rate(self) -> float:
        """Warm-up, then a cosine to 2 %."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup))
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps)))

    def _batch(self, pictures: Tensor) -> Tensor:
        """Random crops first, whole pictures later, as (B, 3, height, width) in 0..1."""
        config, (height, width) = self.config, pictures.shape[-2:]
        whole = self.step >= config.full_from * config.steps
        crop = min(height, width) if whole else min(config.crop, height, width)
        size = max(1, config.batch_size * config.crop**2 // crop**2)
        chosen = torch.randint(len(pictures), (size,), generator=self.generator).tolist()
        tops = torch.randint(height - crop + 1, (size,), generator=self.generator).tolist()
        lefts = torch.randint(width - crop + 1, (size,), generator=self.generator).tolist()
        crops = [
            pictures[index, :, top : top + crop, left : left + crop]
            for index, top, left in zip(chosen, tops, lefts, strict=True)
        ]
        return (torch.stack(crops).float() / 255).contiguous(memory_format=torch.channels_last)

    def _shifted(self, rebuilt: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the perceptual loss looks at: some of a batch, from a random pixel on, so that no pattern of the period
        of its pooling pays (it shows as a fine grid)."""
        most = max(1, min(SHIFT, *(side // 4 for side in images.shape[2:])))
        top, left = torch.randint(most, (2,), generator=self.generator).tolist()
        seen = max(1, round(len(images) * self.config.perceptual_share))
        return rebuilt[:seen, :, top:, left:], images[:seen, :, top:, left:]

    @torch.inference_mode()
    def _set_rate(self, pictures: Tensor) -> None:
        """Measures how common codes are on whole pictures, and prefers the common ones from now on."""
        chosen = torch.randperm(len(pictures), generator=self.generator)[:RATE_PICTURES]
        chunks = [self.tokenizer.to_vectors(pictures[some].float() / 255) for some in chosen.split(64)]
        flat_NZ = torch.cat(chunks).permute(0, 2, 3, 1).flatten(0, 2)
        self.tokenizer.quantizer.bias.copy_(rate_bias(self.tokenizer.quantizer, flat_NZ, rate=self.config.code_rate))

    @torch.no_grad()
    def _start_codebook(self, pictures: Tensor) -> None:
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < 8 * self.config.tokenizer.num_codes:
            found = self.tokenizer.to_vectors(self._batch(pictures))
            vectors.append(found.permute(0, 2, 3, 1).reshape(-1, found.shape[1]))
        self.codebook.start(torch.cat(vectors), generator=self.generator)

    def _quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, Z, R, C) to codebook vectors with a straight-through gradient, and the commitment loss."""
        flat_NZ = vectors.permute(0, 2, 3, 1).reshape(-1, vectors.shape[1])
        with torch.no_grad():
            codes_N = self.tokenizer.quantizer.encode(flat_NZ)
            if not self.config.decoder_only:
                self.codebook.update(flat_NZ, codes_N, generator=self.generator)
        chosen = self.tokenizer.quantizer.decode(codes_N).view(vectors.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        commitment = self.config.commitment * F.mse_loss(vectors, chosen)
        return vectors + (chosen - vectors).detach(), commitment

    def _adversarial(self, reconstruction: Tensor, rebuilt: Tensor, images: Tensor) -> Tensor:
        """Trains the discriminator one step; returns the decoder's share of the game."""
        judged = discriminator_loss(self.discriminator(images), self.discriminator(rebuilt.detach()))
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        judged.backward()
        check_finite({"the discriminator's loss": float(judged.detach())}, step=self.step, last=self.last)
        self.discriminator_optimizer.step()
        fooled: Tensor = -self.discriminator(rebuilt).mean()
        balance = adversarial_weight(reconstruction, fooled, self.tokenizer.decoder.last_weight)
        weight = self.config.adversarial_weight * balance
        return weight * fooled
