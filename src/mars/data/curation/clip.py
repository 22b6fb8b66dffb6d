"""CLIP (Radford et al. 2021) as a scorer, from a local folder in the Hugging Face layout.

The folder holds config.json, model.safetensors (or shards with an index), tokenizer.json and preprocessor_config.json.
Names of modules are those of the file, so that loading is strict. `transformers`' CLIPModel is the oracle of the tests.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mars.data.shards import Caption
from mars.errors import ModelError
from mars.files import files_digest

BATCH = 32
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}
_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
"""What a config.json that leaves something out means (the hub's defaults, those of ViT-B/32)."""


class _Attention(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, *, causal: bool) -> Tensor:
        q_BHTE, k_BHTE, v_BHTE = (
            linear(x_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=causal)
        mixed: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return mixed


class _Layer(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, eps = shape["hidden_size"], shape["layer_norm_eps"]
        self.self_attn = _Attention(width, heads=shape["num_attention_heads"])
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, shape["intermediate_size"]),
                "fc2": nn.Linear(shape["intermediate_size"], width),
            }
        )
        self.activation = _ACTIVATIONS[shape["hidden_act"]]

    def forward(self, x_BTD: Tensor, *, causal: bool) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD), causal=causal)
        inner = self.activation(self.mlp["fc1"](self.layer_norm2(x_BTD)))
        out: Tensor = x_BTD + self.mlp["fc2"](inner)
        return out


class _Encoder(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape["num_hidden_layers"]))

    def forward(self, x_BTD: Tensor, *, causal: bool) -> Tensor:
        for layer in self.layers:
            x_BTD = layer(x_BTD, causal=causal)
        return x_BTD


class _Text(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width = shape["hidden_size"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(shape["vocab_size"], width),
                "position_embedding": nn.Embedding(shape["max_position_embeddings"], width),
            }
        )
        self.encoder = _Encoder(shape)
        self.final_layer_norm = nn.LayerNorm(width, eps=shape["layer_norm_eps"])

    def forward(self, ids_BT: Tensor, ends_B: Tensor) -> Tensor:
        places = self.embeddings["position_embedding"](torch.arange(ids_BT.shape[1]))
        x_BTD: Tensor = self.embeddings["token_embedding"](ids_BT) + places
        x_BTD = self.final_layer_norm(self.encoder(x_BTD, causal=True))
        return x_BTD[torch.arange(len(ends_B)), ends_B]


class _VisionEmbeddings(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, patch = shape["hidden_size"], shape["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((shape["image_size"] // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches_BTD = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        embedded: Tensor = torch.cat([first, patches_BTD], dim=1) + self.position_embedding.weight
        return embedded


class _Vision(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, eps = shape["hidden_size"], shape["layer_norm_eps"]
        self.embeddings = _VisionEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # misspelt in every file of weights
        self.encoder = _Encoder(shape)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, images: Tensor) -> Tensor:
        x_BTD = self.encoder(self.pre_layrnorm(self.embeddings(images)), causal=False)
        pooled: Tensor = self.post_layernorm(x_BTD[:, 0])
        return pooled


class Clip(nn.Module):
    """Pictures and texts to unit vectors of one space.

    Raises:
        ModelError: if the folder lacks a file, or its weights do not fit its configuration.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config, seen = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
        try:
            text, vision = {**_TEXT, **config["text_config"]}, {**_VISION, **config["vision_config"]}
            width = config.get("projection_dim", 512)
            self.text_model, self.vision_model = _Text(text), _Vision(vision)
            self.text_projection = nn.Linear(text["hidden_size"], width, bias=False)
            self.visual_projection = nn.Linear(vision["hidden_size"], width, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(0.0))
            self.side, self.context = int(vision["image_size"]), int(text["max_position_embeddings"])
            self.mean, self.deviation = (torch.tensor(seen[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ModelError(f"{folder} must hold a CLIP model: its configuration lacks or misuses {error}") from None
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises Exception itself
            raise ModelError(f"{folder} must hold a tokenizer.json that can be read: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.files = [folder / name for name in ("config.json", "preprocessor_config.json", "tokenizer.json")]
        """All that it was read from."""
        self.files += self._load(folder)
        self.eval().requires_grad_(False)

    def _load(self, folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        files = [folder / name for name in names]
        try:
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
            self.load_state_dict(kept)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"the weights in {folder} do not fit: {' '.join(str(error).split())[:300]}") from None
        return files

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to (N, width): the shorter side scaled to the model's side, the middle square taken."""
        batches = torch.stack([self._pixels(image) for image in images]).split(BATCH)
        vectors = [self.visual_projection(self.vision_model(batch)) for batch in batches]
        return F.normalize(torch.cat(vectors), dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to (N, width); what is longer than the model can read is cut, as CLIP does."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        ids = [one if len(one) <= self.context else [*one[: self.context - 1], one[-1]] for one in ids]
        vectors = []
        for first in range(0, len(ids), BATCH):
            batch = ids[first : first + BATCH]
            ends = torch.tensor([len(one) - 1 for one in batch])
            padded = torch.tensor([one + one[-1:] * (int(ends.max()) + 1 - len(one)) for one in batch])
            vectors.append(self.text_projection(self.text_model(padded, ends)))
        return F.normalize(torch.cat(vectors), dim=1)

    def _pixels(self, image: Image.Image) -> Tensor:
        scale = self.side / min(image.size)
        size = tuple(max(self.side, math.floor(side * scale)) for side in image.size)
        image = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.deviation


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"a CLIP folder needs {path}, got: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


class ClipScore:
    """How well a picture fits the best of its captions in one language: the cosine in CLIP's space, -1..1.

    Hessel et al. (2021), without their factor of 2.5. A picture without a caption in that language is not judged.
    """

    name = "clip"

    def __init__(self, *, folder: str, language: str = "en") -> None:
        self.model, self.language = Clip(Path(folder)), language
        self.digest = files_digest(self.model.files)

    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:
        """One cosine each."""
        texts = [[one.text for one in several if one.language == self.language] for several in captions]
        judged = [image for image, several in zip(images, texts, strict=True) if several]
        if not judged:
            return [None] * len(images)
        pictures = iter(self.model.images(judged))
        words = iter(self.model.texts([text for several in texts for text in several]))
        return [
            round(float((torch.stack([next(words) for _ in several]) @ next(pictures)).max()), 4) if several else None
            for several in texts
        ]


class ClipAesthetic:
    """A linear head on CLIP's vector of a picture, as LAION's aesthetic predictors are: about 1..10.

    `head` is a safetensors file with `weight` (1, width) and `bias` (1,).

    Raises:
        ModelError: if the head does not fit the model.
    """

    name = "aesthetic"

    def __init__(self, *, folder: str, head: str) -> None:
        self.model = Clip(Path(folder))
        width = self.model.visual_projection.out_features
        self.head = nn.Linear(width, 1).requires_grad_(False)
        try:
            self.head.load_state_dict(load_file(head))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{head} must hold weight (1, {width}) and bias (1,), got: {error}") from None
        self.digest = files_digest([*self.model.files, Path(head)])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:  # noqa: ARG002
        """Captions do not matter."""
        return [round(float(one), 4) for one in self.head(self.model.images(images))]
