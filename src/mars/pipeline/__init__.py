"""MarsPipeline: prompts in, pictures out.

Six steps: check the request; prompt to ids; ids to codes; codes to more codes (`upscale`, if asked); codes to pixels;
pixels to PIL with what is needed to draw them again.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mars
from mars.adapter import adapt, load_adapted
from mars.checkpoint import MarsModel, find_model, load_model
from mars.errors import ModelError, PromptError
from mars.generation.engine import Progress
from mars.generation.prompts import Prompts
from mars.generation.sampling import Sampling
from mars.hub import upload
from mars.model.precision import Precision, check_precision
from mars.picture import on_white_page, open_picture
from mars.pipeline.checks import check_device
from mars.pipeline.description import describe_model
from mars.pipeline.drawings import DrawingFailed, Drawings, Drawn, Preview
from mars.pipeline.editing import Margins, edit_order
from mars.pipeline.orders import DEFAULT_SAMPLING, Generated, Order, draw_order, upscale_order
from mars.pipeline.saving import save_with_card
from mars.pipeline.scoring import Scorer
from mars.pipeline.upscaling import UPSCALE_DEVIATION, UPSCALE_SAMPLING
from mars.pipeline.writing import Piece, Said, captioning, document, reply

SHIPPED = Path(__file__).parents[1] / "assets" / "mars-mini"
"""The model that comes with the package."""
MAX_PROMPT_TOKENS = 512


class MarsPipeline:
    """A model that paints, captions and chats.

    Examples:
        >>> pipe = MarsPipeline.from_pretrained()
        >>> pipe("slice of pizza", seed=1).images[0].save("pizza.png")
    """

    def __init__(self, model: MarsModel) -> None:
        self.model = model
        self.prompts = Prompts(model.transformer)
        """Texts that have been read; the empty one is needed again and again."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        precision: Precision = "fp16",
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        notify: Callable[[str], None] | None = None,
    ) -> "MarsPipeline":
        """Opens a model's folder or hub id; without one, the model that comes with the package.

        Args:
            source: a folder, or `owner/name` on the hub, taken from its cache without a network if it is whole there.
            revision: branch, tag or commit on the hub.
            precision: of linear layers in memory. With `fp16` drawing reads the visual expert's in 16 bits, where there
                is a kernel for it, which can hardly be told from fp32; with `fp32` never. `int8` and `int4` take
                a quarter and a seventh of the room of fp32, and round: pictures are no longer those of fp32.
            lora: folder of an adapter, as `peft` lays it out; merged into the weights, so that drawing costs no more.
            lora_scale: how strongly the adapter counts; 1 as it was trained.
            notify: called with one line before anything that takes long.

        Raises:
            ModelError: if there is no such model, or its LLM cannot be found.
            CheckpointError: if a file is damaged or does not fit, or the adapter is of another model.
            ConfigError: for an unknown precision.
            RequestError: for a revision of a folder, or a scale that is not finite.
        """
        check_precision(precision)
        if source is None and not (SHIPPED / "visual.safetensors").is_file():
            raise ModelError(
                "no model comes with this version; train one with `mars train configs/mini-pretrain.toml` and name it"
            )
        folder = find_model(SHIPPED if source is None else source, revision=revision)
        if lora is None:
            return cls(load_model(folder, precision=precision, notify=notify))
        return cls(load_adapted(folder, Path(lora), scale=lora_scale, precision=precision, notify=notify))

    def load_lora(self, folder: str | Path, *, scale: float = 1.0) -> None:
        """Merges an adapter into the weights in memory; `from_pretrained` explains it.

        Raises:
            CheckpointError: if the adapter is damaged or of another model; nothing has changed then.
            RequestError: if the weights are rounded or have an adapter already, or the scale is not finite.
        """
        self.model = adapt(self.model, Path(folder), scale=scale)
        self.prompts = Prompts(self.model.transformer)

    def to(self, device: str | torch.device) -> "MarsPipeline":
        """Moves the weights to a device, such as `cuda`, and returns this pipeline. Not tried on a GPU so far.

        Raises:
            RequestError: if PyTorch has no such device here, or the weights are rounded, which only a CPU multiplies.
        """
        check_device(device, precision=self.model.precision)
        self.model.transformer.to(device)
        self.model.image_tokenizer.to(device)
        self.prompts = Prompts(self.model.transformer)
        return self

    def save_pretrained(
        self, folder: str | Path, *, report: Path | None = None, about: str | None = None, licence: str | None = None
    ) -> None:
        """Writes the visual side in fp16, and a model card, into a folder that appears whole or not at all. The LLM is
        only named, or goes along if it lies in the folder that this model was opened from.

        Args:
            report: `report.json` of `mars eval`, for the card.
            about, licence: more of the card, as Markdown; the licence of the weights, such as `apache-2.0`.

        Raises:
            CheckpointError: if it cannot be written, something else is there, or the weights in memory are rounded.
            DataError, ModelError: if the report is none, or of other weights.
        """
        save_with_card(self.model, Path(folder), report=report, about=about, licence=licence)

    def push_to_hub(
        self, name: str, *, private: bool = False, revision: str | None = None, report: Path | None = None
    ) -> str:
        """Saves into a temporary folder and puts that on the hub as `owner/name`. Returns the commit's address.

        Raises:
            CheckpointError, ModelError: if weights in memory are rounded or the disk is full; if the hub refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            save_with_card(self.model, folder, report=report, hub_id=name)
            return upload(folder, name, private=private, revision=revision, message=f"mars-t2i {mars.__version__}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of the pictures that the model was trained to draw."""
        factor = self.model.image_tokenizer.config.factor
        return [(columns * factor, rows * factor) for rows, columns in self.model.info.grids]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str = "",
        sampling: Sampling = DEFAULT_SAMPLING,
        scorer: Scorer | None = None,
        release_language: bool = False,
        progress: Progress | None = None,
        previews: int = 0,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> Generated:
        """Draws `n` pictures for each prompt, all together.

        Args:
            seed: of the first picture of each prompt, the others count up from it; or one seed per picture. Without
                one it is drawn at random. A picture depends on its prompt, seed and settings; what is drawn beside it
                changes no more than rounding does.
            width, height: pixels; must be a size of `sizes`.
            negative_prompt: what guidance moves away from.
            sampling: temperature, top-k, top-p, guidance, candidates and window.
            scorer: chooses among candidates by their pixels (`pipeline/scoring.py`); default: the model's likelihood.
            release_language: let the language expert go once it has read the prompts. Drawing needs half the memory
                then, and the pipeline can read no further prompt.
            progress: called after each code with how many are done and how many there are, all candidates counted.
            previews, on_preview: how many times to show each picture (its likeliest candidate so far), and to whom.

        Raises:
            PromptError: if a prompt is empty or too long.
            RequestError: if the size, `n`, the seed, the number of previews or the scorer cannot be used.
        """
        order = draw_order(
            self, prompt, n=n, seed=seed, width=width, height=height, negative_prompt=negative_prompt,
            sampling=sampling, scorer=scorer,
        )  # fmt: skip
        return self._draw(
            order, previews=previews, on_preview=on_preview, release_language=release_language, progress=progress
        )

    def _draw(
        self,
        order: Order,
        *,
        previews: int = 0,
        on_preview: Callable[[Preview], None] | None = None,
        release_language: bool = False,
        progress: Progress | None = None,
    ) -> Generated:
        drawings = Drawings(self, tokens=order.tokens)
        drawings.submit(order, previews=previews if on_preview else 0)
        if release_language:
            drawings.scheduler.read_prompts()
            self.model.transformer.release_language()
        generated: Generated | None = None
        while generated is None:
            for news in drawings.step():
                match news:
                    case Preview() if on_preview is not None:
                        on_preview(news)
                    case DrawingFailed():
                        raise news.error
                    case Drawn():
                        generated = news.generated
            if progress is not None:
                progress(drawings.scheduler.drawn, order.codes)
        return generated

    def upscale(
        self,
        picture: str | Path | Image.Image | Tensor | Generated,
        *,
        prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str = "",
        sampling: Sampling = UPSCALE_SAMPLING,
        deviation: float | None = UPSCALE_DEVIATION,
        progress: Progress | None = None,
    ) -> Generated:
        """Draws pictures again, as many times larger as the model was trained to.

        Args:
            picture: a file, a picture (fitted onto a white page of the model's size), codes (B, R, C), or what a call
                drew.
            prompt: what it shows, for all or one for each; default: what it was drawn for, or nothing.
            seed, negative_prompt, sampling, progress: as for a call; default seeds: those that it was drawn with.
            deviation: of codes from a bicubic enlargement's, where the codebook's own is 1; None allows any.

        Raises:
            RequestError: if the model cannot upscale, or not from this grid, or a number of prompts or seeds is wrong.
            PromptError: if a prompt is too long.
            ImageError: if a file is no picture.
        """
        order = upscale_order(self, picture, prompt=prompt, seed=seed, negative_prompt=negative_prompt,
                              sampling=sampling, deviation=deviation)  # fmt: skip
        return self._draw(order, progress=progress)

    def edit(
        self,
        picture: str | Path | Image.Image,
        prompt: str = "",
        *,
        mask: str | Path | Image.Image | None = None,
        margins: Margins | None = None,
        vary: float | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Generated:
        """Draws part of a picture anew, which is fitted onto a white page of the model's size.

        Args:
            prompt: what the whole picture is to show.
            mask: as large as the picture, white (or transparent) where it is drawn anew; the rest keeps its pixels.
            margins: pixels to the left, above, to the right and below the picture, which are drawn around it.
            vary: a share of the picture's codes that are drawn anew, in places that the seed chooses.
            options: `n`, `seed`, `negative_prompt`, `sampling`, `scorer`, as for a call.

        Raises:
            RequestError: unless there is just one of mask, margins and `vary`, and it can be used.
            PromptError: if the prompt is too long.
            ImageError: if a file is no picture.
        """
        order = edit_order(self, picture, prompt, mask=mask, margins=margins, vary=vary, **options)
        return self._draw(order, progress=progress)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises PromptError for a prompt that is empty or too long; a call does so too."""
        for text in prompts:
            if not text.strip():
                raise PromptError("the prompt must not be empty; say what to draw")
            self.prompt_ids(text)

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """A prompt as ids; raises PromptError if it is too long."""
        tokenizer = self.model.text_tokenizer
        ids = (tokenizer.bos_id, *tokenizer.encode(text.strip()))
        if len(ids) > MAX_PROMPT_TOKENS:
            raise PromptError(f"a prompt must have at most {MAX_PROMPT_TOKENS} tokens, got {len(ids)}; shorten it")
        return ids

    def about(self, prompt: str, seed: int, settings: Mapping[str, Any]) -> dict[str, str]:
        """What is written into a picture, so that it can be drawn again."""
        return {
            "prompt": prompt,
            "seed": str(seed),
            "settings": json.dumps(settings, ensure_ascii=False),
            "model": self.model.info.name,
            **({} if self.model.lora is None else {"lora": self.model.lora}),
            "model_digest": self.model.visual_digest,
            "language_digest": self.model.info.language_digest,
            "software": f"mars-t2i {mars.__version__}",
        }

    def describe(self) -> dict[str, int | str]:
        """Parameters per part, vocabulary, digests (the LLM's computed anew from memory) and bytes held."""
        return describe_model(self.model)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes (B, R, C) to pictures."""
        images = self.model.image_tokenizer.decode(codes.to(self.model.transformer.device))
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(one) for one in pixels]

    def preview(self, codes: Tensor, *, rows: int) -> Image.Image:
        """The first rows of a picture's codes (R, C), of `rows` in all, on a white page of the whole picture's size.

        Decoding some rows costs that share of the whole; the last pixels, which lack what comes below, change later.
        """
        (part,) = self.decode(codes[None])
        page = Image.new("RGB", (part.width, part.height * rows // len(codes)), "white")
        page.paste(part)
        return page

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """A picture to codes (R, C); it is fitted onto a white page of the model's size."""
        page = on_white_page(image, size=self.sizes[0])
        pixels = torch.from_numpy(np.asarray(page).copy()).permute(2, 0, 1)[None].float() / 255
        return self.model.image_tokenizer.encode(pixels.to(self.model.transformer.device))[0].cpu()

    def caption(self, image: str | Path | Image.Image, *, language: str = "en", max_tokens: int = 48) -> str:
        """Says what a picture shows.

        Args:
            image: a file (PNG, JPEG or WebP) or a picture.
            language: `en` or `zh`.

        Raises:
            ImageError: if the file is no such picture.
            RequestError: if the language is unknown.
        """
        picture = image if isinstance(image, Image.Image) else open_picture(Path(image))
        pieces = captioning(self, picture, language=language, max_tokens=max_tokens)
        return "".join(piece.text for piece in pieces).strip()

    def chat(
        self,
        text: str,
        *,
        system: str = "You are a helpful assistant.",
        max_tokens: int = 256,
        emit: Callable[[str], None] | None = None,
    ) -> str:
        """The base LLM's likeliest answer, unchanged by anything visual.

        Args:
            system: what the LLM is told about itself, where it has a chat template.
            emit: called with each piece of text as it is written.

        Raises:
            PromptError: if the text is empty.
        """
        said = ""
        for piece in reply(self.model, text, system=system, max_tokens=max_tokens):
            said += piece.text
            if emit is not None:
                emit(piece.text)
        return said

    def write(self, parts: Said | Sequence[Said], **options: Any) -> Iterator[Piece]:
        """Goes on from texts and pictures in any order, a text first: the model writes, and paints where it wants to.

        Args:
            options: `max_tokens` (128) of text and `max_images` (4) at most; `seed`; `writing` and `drawing`, the
                sampling of text (default: the likeliest) and of pictures; `previews`, whether to show each row of one.

        Returns:
            `Words`, `HalfDrawn` and `Painted` (`pipeline/writing.py`) as they come.

        Raises:
            PromptError: if there is no text to begin with.
            RequestError: if all that may follow does not fit into the LLM's positions.
            ImageError: if a file is no picture.
        """
        return document(self, parts, **options)
