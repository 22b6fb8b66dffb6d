"""Examples for the OpenAPI document; a test sends them."""

from typing import Any

_ERROR = {
    "error": {"message": "n must be at most 10, got 11", "type": "invalid_request_error", "param": "n", "code": "x"}
}
_ERROR_SCHEMA = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "pattern": r"^[^\n]+$"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": "string"},
            },
        }
    },
}  # fmt: skip
_PNG = "iVBORw0KGgo..."
_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAFklEQVR42mP8z0AaYGIY1TCqYdhqAA"
    "BALgEfFO4+AgAAAABJRU5ErkJggg=="
)
GENERATION: Any = {
    "a picture": {"value": {"prompt": "red apple", "seed": 1}},
    "two in Chinese, as JPEG": {
        "value": {"prompt": "红苹果", "n": 2, "seed": 1, "output_format": "jpeg", "output_compression": 90}
    },
    "a stream with previews": {"value": {"prompt": "pizza", "seed": 1, "stream": True, "partial_images": 3}},
    "all settings": {
        "value": {
            "prompt": "pizza", "negative_prompt": "olives", "seed": 1, "guidance_scale": 3.0, "temperature": 0.8,
            "top_k": 100, "top_p": 0.95, "candidates": 2,
        }
    },
}  # fmt: skip
CHAT: Any = {
    "text": {"value": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}},
    "a caption": {
        "value": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": _DOT}},
                    ],
                }
            ],
            "max_tokens": 16,
        }
    },
    "text and pictures": {
        "value": {
            "messages": [{"role": "user", "content": "red apple"}], "modalities": ["text", "image"], "max_tokens": 16,
            "max_images": 1,
        }
    },
}  # fmt: skip


def _error(about: str) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": _ERROR_SCHEMA, "example": _ERROR}}}


_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: _error("What was asked for cannot be done."),
    401: _error("No API key, or one that is not known."),
    404: _error("There is no such model."),
    408: _error("The request did not arrive in time."),
    413: _error("The request is too large."),
    429: _error("The queue is full; Retry-After says when to ask again.") | {"headers": _RETRY},
    503: _error("The server is shutting down."),
    504: _error("It took too long."),
}


def _object(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields), "properties": fields}


_NUMBER, _TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
_PICTURE = _object(seed=_NUMBER) | {"oneOf": [_object(b64_json=_TEXT), _object(url=_TEXT)]}
_CHOICE = _object(
    index=_NUMBER, finish_reason={"enum": ["stop", "length"]},
    message=_object(role={"const": "assistant"}, content={"type": ["string", "array"]}),
)  # fmt: skip
_USAGE = {
    "input_tokens": 2, "input_tokens_details": {"text_tokens": 2, "image_tokens": 0}, "output_tokens": 64,
    "total_tokens": 66,
}  # fmt: skip
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Pictures, or events of them.",
        "content": {
            "application/json": {
                "schema": _object(
                    created=_NUMBER, data={"type": "array", "minItems": 1, "items": _PICTURE}, output_format=_TEXT,
                    size=_TEXT, usage=_object(input_tokens=_NUMBER, output_tokens=_NUMBER, total_tokens=_NUMBER),
                ),
                "example": {
                    "created": 1764000000, "data": [{"b64_json": _PNG, "seed": 1}], "background": "opaque",
                    "output_format": "png", "quality": "auto", "size": "128x128", "usage": _USAGE,
                }
            },
            "text/event-stream": {"example": f'event: image_generation.completed\ndata: {{"b64_json": "{_PNG}"}}\n'},
        },
    },
    **REFUSALS,
}  # fmt: skip
CHAT_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An answer, or chunks of it.",
        "content": {
            "application/json": {
                "schema": _object(
                    id=_TEXT, object={"const": "chat.completion"}, created=_NUMBER, model=_TEXT,
                    choices={"type": "array", "minItems": 1, "maxItems": 1, "items": _CHOICE},
                    usage=_object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER),
                ),
                "example": {
                    "id": "chatcmpl-0", "object": "chat.completion", "created": 1764000000, "model": "mars-mini",
                    "choices": [
                        {
                            "index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"
                        }
                    ],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                }
            },
            "text/event-stream": {"example": 'data: {"choices": [{"index": 0, "delta": {"content": "Paris."}}]}\n'},
        },
    },
    **REFUSALS,
}  # fmt: skip
