"""What a server is told when it starts: its limits, its keys, and what looks at prompts and pictures."""

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from PIL import Image

from mars.errors import ConfigError
from mars.files import reason

KEYS_VARIABLE = "MARS_API_KEYS"

Moderation = Callable[[str, Image.Image | None], str | None]
"""Looks at a prompt, then at each picture for it; returns why it must not be, or None. Called from several threads."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    body: int = 10_000_000
    """Bytes of a request."""
    pixels: int = 16_000_000
    """Of a picture that is sent."""
    prompt: int = 8_000
    """Characters of a prompt, or of all messages of a chat."""
    images: int = 10
    """Pictures of one request."""
    tokens: int = 1024
    """Text ids of one answer."""
    queue: int = 64
    """Pictures and answers that are drawn or wait; beyond, requests are refused with 429."""
    requests: int = 128
    """Requests that are open at once."""
    seconds: float = 300.0
    """From the last byte of a request to the last one of its answer."""
    body_seconds: float = 30.0
    """For a request to arrive."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise ConfigError(f"the limit {one.name} must be greater than 0, got {getattr(self, one.name)}")
        if self.images > self.queue:
            raise ConfigError(
                f"the queue must hold the pictures of one request ({self.images}), got {self.queue}; raise the queue"
            )


class Keys:
    """API keys; only their digests are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def fit(self, authorization: bytes) -> bool:
        """Whether a header is `Bearer` and one of the keys, in a time that does not depend on how nearly it is."""
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, one) for one in self._digests]
        return scheme.lower() == b"bearer" and any(found)

    def token(self, key: str) -> str | None:
        """What a browser keeps in place of a key, and which opens the page alone; None for a key that is unknown."""
        given = _digest(key.encode())
        found = [_token(one) for one in self._digests if hmac.compare_digest(given, one)]
        return found[0] if found else None

    def fit_token(self, token: str) -> bool:
        """Whether it is that of one of the keys."""
        found = [hmac.compare_digest(token.encode(), _token(one).encode()) for one in self._digests]
        return any(found)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it."""

    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=lambda: Keys([]))
    """Without any, everybody may ask."""
    log_prompts: bool = False
    moderation: Moderation | None = None
    page: bool = False
    """Whether there is a page for people at `/`; it needs Gradio."""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _token(digest: bytes) -> str:
    return hmac.digest(digest, b"page", "sha256").hex()


def read_keys(file: Path | None, *, environment: Mapping[str, str]) -> Keys:
    """Keys from a file (one a line, `#` begins a comment) and from MARS_API_KEYS (spaces or commas in between).

    Raises:
        ConfigError: if the file cannot be read, or one of the two is there and holds none.
    """
    found: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} must be a text file with an API key a line, got: {reason(error)}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"{file} must hold an API key a line, got none")
        found += keys
    if KEYS_VARIABLE in environment:
        keys = environment[KEYS_VARIABLE].replace(",", " ").split()
        if not keys:
            raise ConfigError(f"{KEYS_VARIABLE} must hold API keys, got none; unset it to let everybody ask")
        found += keys
    if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
        raise ConfigError("an API key must be printable ASCII without spaces, as HTTP headers are; one is not")
    return Keys(found)
