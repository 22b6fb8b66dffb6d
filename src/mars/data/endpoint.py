"""A captioner behind HTTP: any server that speaks OpenAI's chat completions with pictures, as vLLM or llama.cpp.

Requests are paced, retried with exponential back-off, and wait as long as `Retry-After` says.
"""

import asyncio
import base64
import io
import random
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from PIL import Image

from mars.data.recaption import NoAnswer, UnusableAnswer
from mars.data.shards import Picture
from mars.errors import DataError
from mars.picture import on_white_page

PROMPTS = {
    "en": "Describe this picture in one paragraph of two to five plain English sentences, for someone who is to draw "
    "it without seeing it: what is shown, how many, colours, materials, where things are, background, light and style. "
    "Quote any text in it. Say only what can be seen. Answer with the description alone.",
    "zh": "请用简体中文写一段话（两到五句）描述这幅图，让没有看到它的人也能画出来：画的是什么、有几个、颜色、材质、"
    "位置关系、背景、光线和风格。图中如有文字，请照原样引用。只说看得见的内容。只回答描述本身。",
}
MAX_TOKENS = 512
RETRIED = frozenset({408, 409, 425, 429})
"""And everything from 500 on."""
FATAL = frozenset({401, 403, 404, 405})
"""Answers that no other picture would change."""
LONGEST_WAIT = 300.0
"""Seconds."""


class Endpoint:
    """Asks one model of one server.

    Args:
        url: up to `/v1`, as `http://127.0.0.1:8000/v1`.
        model: as the server calls it.
        key: is sent as a bearer token.
        at_once: requests that are under way at the same time.
        per_minute: requests that are begun in a minute.
        side: pixels of the longer side of what is sent, as JPEG.
        timeout: seconds for one request.
        tries: requests for one answer.
        backoff: seconds before the second try, doubled for each further one.

    Raises:
        DataError: if the URL cannot be used.
    """

    prompts = PROMPTS
    answers = 3

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key: str | None = None,
        at_once: int = 8,
        per_minute: float = 600,
        side: int = 768,
        timeout: float = 60,
        tries: int = 6,
        backoff: float = 1,
    ) -> None:
        self.name, self.at_once, self.url = model, at_once, url.rstrip("/") + "/chat/completions"
        self._key, self._side, self._timeout, self._tries, self._backoff = key, side, timeout, tries, backoff
        self._gap, self._next = 60 / per_minute, 0.0
        self._random = random.Random(0)
        try:
            parsed = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise DataError(
                f"--endpoint must be a URL such as http://127.0.0.1:8000/v1, got {url!r}: {error}"
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise DataError(f"--endpoint must be a URL such as http://127.0.0.1:8000/v1, got {url!r}")
        self._client: httpx2.AsyncClient | None = None

    async def caption(self, picture: Picture, *, language: str, attempt: int) -> str:
        """See `Captioner`; answers after the first are drawn more freely."""
        sent = await asyncio.to_thread(self._data_url, picture)
        content = [
            {"type": "text", "text": PROMPTS[language]},
            {"type": "image_url", "image_url": {"url": sent}},
        ]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0.0 if attempt == 0 else 0.7,
        }
        trouble = _Trouble("never asked")
        for number in range(self._tries):
            if number:
                backoff = self._backoff * 2 ** (number - 1) * (0.5 + self._random.random() / 2)
                await asyncio.sleep(min(max(backoff, trouble.wait), LONGEST_WAIT))
            await self._turn()
            try:
                return await self._ask(body)
            except _Trouble as problem:
                trouble = problem
        raise NoAnswer(f"{trouble}, {self._tries} times")

    async def close(self) -> None:
        """Ends the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _turn(self) -> None:
        """Waits until a request may begin."""
        now = time.monotonic()
        begins = max(now, self._next)
        self._next = begins + self._gap
        await asyncio.sleep(begins - now)

    async def _ask(self, body: dict[str, Any]) -> str:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            limits = httpx2.Limits(max_connections=self.at_once)
            self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=self._timeout)
        try:
            async with asyncio.timeout(self._timeout):  # of the whole; the client's own counts each read
                response = await self._client.post(self.url, json=body)
        except (TimeoutError, httpx2.TimeoutException):
            raise _Trouble(f"no answer within {self._timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise _Trouble(f"{type(error).__name__}: {error}") from None
        status = response.status_code
        if status == 200:
            return _text(response)
        said = f"HTTP {status}: {self._shown(response)}"
        if status in FATAL:
            raise DataError(f"{self.url} answers {said}; check the URL, the model's name and the key")
        if status not in RETRIED and status < 500:
            raise UnusableAnswer(said)
        wait = min(_retry_after(response), LONGEST_WAIT)
        if status == 429:  # meant for all requests, not for this one alone
            self._next = max(self._next, time.monotonic() + wait)
        raise _Trouble(said, wait=wait)

    def _shown(self, response: httpx2.Response) -> str:
        """The beginning of an answer, without the key that some servers repeat."""
        text = " ".join(response.text.split())
        return (text.replace(self._key, "...") if self._key else text)[:200]

    def _data_url(self, picture: Picture) -> str:
        try:
            with Image.open(io.BytesIO(picture.content)) as image:
                scale = min(1.0, self._side / max(image.size))
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
                page = on_white_page(image, size=size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnusableAnswer(f"the picture is damaged: {error}") from None
        file = io.BytesIO()
        page.save(file, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class _Trouble(Exception):
    """A request that may go better next time, after so many seconds."""

    def __init__(self, said: str, *, wait: float = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


def _text(response: httpx2.Response) -> str:
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        refusal, text = message.get("refusal"), message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Trouble("the answer is no chat completion") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        raise UnusableAnswer(f"a refusal: {str(refusal or text)[:80]}")
    if choice.get("finish_reason") == "length":
        raise UnusableAnswer(f"too long: cut off after {MAX_TOKENS} tokens")
    if not isinstance(text, str):
        raise UnusableAnswer("empty")
    return text


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 where it does not say."""
    given = response.headers.get("retry-after", "").strip()
    if given.replace(".", "", 1).isdigit():
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
