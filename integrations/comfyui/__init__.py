"""ComfyUI nodes that draw, edit and caption with a MARS server (`mars serve`).

ComfyUI's contract: an IMAGE is (B, H, W, 3) fp32 in 0..1, a MASK (B, H, W) or (H, W) with 1 where something is to be
done. Only torch, numpy and Pillow are needed, which ComfyUI has; the model lives in the server's process. A server that
wants an API key gets it from MARS_API_KEY, since what is typed into a node is saved in the pictures of ComfyUI.
"""

import base64
import io
import json
import os
import secrets
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SECONDS = 600
CATEGORY = "MARS"

_SERVER = ("STRING", {"default": "http://127.0.0.1:8000", "tooltip": "Where `mars serve` listens."})
_SETTINGS = {
    "negative_prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "What guidance moves away from."}),
    "guidance_scale": ("FLOAT", {"default": 1.4, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "1 is none."}),
    "temperature": ("FLOAT", {"default": 0.6, "min": 0.0, "max": 10.0, "step": 0.05}),
    "top_k": ("INT", {"default": 0, "min": 0, "max": 8192, "tooltip": "0 is all codes."}),
    "top_p": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
    "candidates": ("INT", {"default": 4, "min": 1, "max": 64, "tooltip": "Draw so many, keep the likeliest."}),
}
_SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True})
_PROMPT = ("STRING", {"default": "", "multiline": True, "tooltip": "In English or Chinese."})


class MarsTextToImage:
    """Pictures for a prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's widgets."""
        required = {"prompt": _PROMPT, "seed": _SEED, "batch_size": ("INT", {"default": 1, "min": 1, "max": 64})}
        return {"required": required, "optional": {**_SETTINGS, "server": _SERVER}}

    def draw(
        self, prompt: str, seed: int, batch_size: int, server: str = _SERVER[1]["default"], **settings: object
    ) -> tuple[Tensor]:
        """The pictures as one batch (batch_size, H, W, 3)."""
        body = {"prompt": prompt, "seed": seed, "n": batch_size, **settings}
        return (_pictures(_ask_json(server, "images/generations", body)),)


class MarsEdit:
    """The masked part of each picture drawn anew; the answer has the model's size."""

    CATEGORY = CATEGORY
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's widgets."""
        required = {"image": ("IMAGE",), "mask": ("MASK",), "prompt": _PROMPT, "seed": _SEED}
        return {"required": required, "optional": {**_SETTINGS, "server": _SERVER}}

    def edit(
        self,
        image: Tensor,
        mask: Tensor,
        prompt: str,
        seed: int,
        server: str = _SERVER[1]["default"],
        **settings: object,
    ) -> tuple[Tensor]:
        """The edited pictures, as many as came in; one mask serves all of them, or each has its own."""
        masks = mask.reshape(-1, *mask.shape[-2:])
        if len(masks) not in (1, len(image)):
            raise ValueError(f"there must be one mask, or one for each of {len(image)} pictures, got {len(masks)}")
        fields = {"prompt": prompt, "seed": seed, **settings}
        edited = []
        for index, pixels in enumerate(image):
            wanted = _to_image(masks[index % len(masks)]).resize((pixels.shape[1], pixels.shape[0]))
            files = {"image": _png(_to_image(pixels)), "mask": _png(wanted)}
            edited.append(_pictures(_ask_form(server, "images/edits", fields, files)))
        return (torch.cat(edited),)


class MarsCaption:
    """What each picture shows, in words."""

    CATEGORY = CATEGORY
    FUNCTION = "caption"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("caption",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's widgets."""
        required = {"image": ("IMAGE",), "language": (["en", "zh"],)}
        return {"required": required, "optional": {"server": _SERVER}}

    def caption(self, image: Tensor, language: str, server: str = _SERVER[1]["default"]) -> tuple[list[str]]:
        """A text for each picture."""
        texts = []
        for pixels in image:
            url = "data:image/png;base64," + base64.b64encode(_png(_to_image(pixels))).decode()
            message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
            answer = _ask_json(server, "chat/completions", {"messages": [message], "language": language})
            texts.append(answer["choices"][0]["message"]["content"])
        return (texts,)


def _to_image(values: Tensor) -> Image.Image:
    """Values (H, W) or (H, W, 3) in 0..1 as a picture; a fourth channel is left out."""
    pixels = values.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels[..., :3] if pixels.ndim == 3 else pixels)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(answer: dict[str, Any]) -> Tensor:
    """The pictures of an answer (B, H, W, 3) in 0..1."""
    found = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).convert("RGB") for one in answer["data"]]
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) / 255 for image in found]))


def _ask_json(server: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _ask(server, path, json.dumps(body).encode(), kind="application/json")


def _ask_form(server: str, path: str, fields: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Asks with a form: files are PNG."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, content in files.items():
        begin = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n'
        parts.append(f"{begin}Content-Type: image/png\r\n\r\n".encode() + content + b"\r\n")
    return _ask(
        server,
        path,
        b"".join([*parts, f"--{boundary}--\r\n".encode()]),
        kind=f"multipart/form-data; boundary={boundary}",
    )


def _ask(server: str, path: str, body: bytes, *, kind: str) -> dict[str, Any]:
    """The server's answer; RuntimeError with one line if it refuses or is not there, which ComfyUI shows."""
    headers = {"Content-Type": kind}
    if key := os.environ.get("MARS_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    asked = urllib.request.Request(f"{server.rstrip('/')}/v1/{path}", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = text[:200]
        raise RuntimeError(f"the MARS server at {server} refused ({error.code}): {text}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"no MARS server at {server}: {reason}; start one with `mars serve`") from None


NODE_CLASS_MAPPINGS = {"MarsTextToImage": MarsTextToImage, "MarsEdit": MarsEdit, "MarsCaption": MarsCaption}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MarsTextToImage": "MARS: text to image",
    "MarsEdit": "MARS: edit",
    "MarsCaption": "MARS: caption",
}
