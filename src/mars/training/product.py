"""What a run makes: a model, or an adapter of one. It says which weights are trained, and writes and reads them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mars.adapter import check_base, read_adapter, save_adapter, visual_digest
from mars.checkpoint import read_tensors, save_model
from mars.model.lora import LoraConfig, adapter_of, add_lora, lora_tensors
from mars.training.setup import Opened, check_model
from mars.training.stages import StageConfig


class Product(ABC):
    """What a run makes."""

    name: str
    """Of the folder that it is in when it is done."""

    @abstractmethod
    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, where it is now."""

    @abstractmethod
    def write(self, folder: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
        """Stores weights in an existing folder.

        Raises:
            CheckpointError: if a file cannot be written.
        """

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Tensor]:
        """What was written, by name.

        Raises:
            CheckpointError: if it is damaged, or of another run.
        """


class WholeModel(Product):
    """A model: all of the visual side is trained."""

    name = "model"

    def __init__(self, opened: Opened) -> None:
        self.opened = opened

    def weights(self) -> dict[str, nn.Parameter]:
        """All but the frozen LLM."""
        visual = self.opened.transformer.visual_tensors()
        return {name: weight for name in sorted(visual) if isinstance(weight := visual[name], nn.Parameter)}

    def write(self, folder: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
        """A model's folder."""
        opened = self.opened
        save_model(
            folder,
            info=opened.info,
            transformer=opened.transformer,
            image_tokenizer=opened.image_tokenizer,
            visual=weights,
            dtype=dtype,
        )

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The visual side of a model's folder."""
        info, opened = self.opened.info, self.opened
        llm = (info.language, info.language_digest)
        check_model(folder, shapes=opened.transformer.config, llm=llm, codec=opened.image_tokenizer.config)
        return read_tensors(folder / "visual.safetensors")


class LoraAdapter(Product):
    """An adapter: the model stays as it is, and what is added to it is trained."""

    name = "adapter"

    def __init__(self, opened: Opened, config: LoraConfig, *, base: str, seed: int) -> None:
        self.transformer, self.config, self.base = opened.transformer, config, base
        self.base_digest = visual_digest(self.transformer.visual_tensors())
        add_lora(self.transformer, config, generator=torch.Generator().manual_seed(seed))

    def weights(self) -> dict[str, nn.Parameter]:
        """The adapters' matrices."""
        return dict(sorted(lora_tensors(self.transformer).items()))

    def write(self, folder: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:  # noqa: ARG002
        """A folder as `peft` has it, always in fp32: it is small."""
        adapter = adapter_of(weights, self.config, name=str(folder), base_digest=self.base_digest)
        save_adapter(folder, adapter, self.config, base=self.base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The matrices of such a folder."""
        adapter = read_adapter(folder)
        check_base(adapter, digest=self.base_digest, model=self.base)
        return adapter.tensors()


def product_of(config: StageConfig, opened: Opened) -> Product:
    """What a stage makes; an adapter is added to the transformer that was opened.

    Raises:
        ConfigError: if the visual expert has none of the layers that are to be adapted.
    """
    if config.lora is None:
        return WholeModel(opened)
    base = str(config.model.start_from)
    return LoraAdapter(opened, config.lora, base=base, seed=config.seed)
