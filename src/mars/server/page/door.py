"""The way to the page: which of Gradio's addresses can be reached, who may come in, and what is changed on the way.

Of Gradio only what draws the page and its queue is open: no uploads, no files, no proxy, and no request in which a
file is named, as Gradio would fetch it. A policy tells the browser to ask nobody else for anything.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mars.server.errors import ApiError
from mars.server.page.words import LANGUAGES, Words, preferred
from mars.server.settings import Keys

COOKIE, LANGUAGE_COOKIE = "mars_key", "mars_language"
SIGN_IN = "/sign-in"
_OPEN = re.compile(r"config|theme\.css|(assets|static)/.*|gradio_api/(queue/(join|data)|cancel|reset|startup-events)")
"""What of Gradio is reached, beside the page itself."""
_ADVERTISING = re.compile(r'<meta\s+(property|name)="(og|twitter):[^>]*>|<link rel="manifest"[^>]*>')
"""Gradio's own, which would be shown where a link to the page is sent; the manifest is none of ours."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""'unsafe-eval' is Gradio's: it compiles templates in the browser."""
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Ccircle cx='8' cy='8' r='7' fill='%23c9532a'/%3E%3C/svg%3E"
)


class Door:
    """ASGI middleware before the API.

    Args:
        page: Gradio's app of all languages, each under its name.
        start: starts Gradio's queues; called once, in the event loop, when somebody first comes.
        functions: numbers of what can be called.
    """

    def __init__(
        self, app: ASGIApp, *, page: ASGIApp, start: Callable[[], Awaitable[None]], functions: frozenset[int],
        keys: Keys,
    ) -> None:  # fmt: skip
        self.app = app
        self.page = page
        self.start = start
        self.functions = functions
        self.keys = keys
        self.heads = {language: _head(Words(language)) for language in LANGUAGES}
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        path = scope.get("path", "")  # `*` of "PRI * HTTP/2.0" has no slash
        language, *rest = path.removeprefix("/").split("/", 1)
        if scope["type"] == "http" and (language in LANGUAGES or path in ("/", SIGN_IN)):
            answer = await self._answer(Request(scope, receive), language, rest)
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, request: Request, language: str, rest: list[str]) -> ASGIApp:
        if request.url.path == SIGN_IN:
            return await self._sign_in(request)
        if not language or not rest:  # relative, as a proxy may serve all of this under a name
            return RedirectResponse(f"{language or _language(request)}/", headers={"Vary": "Accept-Language, Cookie"})
        (path,) = rest
        if self.keys and not self.keys.fit_token(request.cookies.get(COOKIE, "")):
            if path:
                raise ApiError(401, "sign in first")
            return RedirectResponse(f"..{SIGN_IN}?language={language}", status_code=303)
        if path and not _OPEN.fullmatch(path):
            raise ApiError(404, "there is nothing at this address")
        if not self._started:
            self._started = True
            await self.start()
        if not path:
            return _Rewritten(self.page, lambda html: self._dress(html, language))
        if path == "gradio_api/queue/join":
            return _Checked(self.page, self.functions)
        return self.page

    def _dress(self, html: str, language: str) -> str:
        """Gradio's page as ours."""
        html = _ADVERTISING.sub("", html).replace('lang="en"', f'lang="{language}"', 1)
        return html.replace("</head>", f"{self.heads[language]}</head>", 1)

    async def _sign_in(self, request: Request) -> Response:
        """A form that asks for a key; a right one is kept in a cookie, as something that only opens the page."""
        asked = request.query_params.get("language", "")
        say = Words(asked if asked in LANGUAGES else _language(request))
        if request.method != "POST":
            return _form(say, "")
        try:
            fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=2)
        except ValueError:
            fields = {}
        token = self.keys.token(fields.get("key", [""])[0].strip())
        if token is None:
            return _form(say, say("key_wrong"))
        found = RedirectResponse(f"{say.language}/", status_code=303)
        found.set_cookie(
            COOKIE, token, max_age=30 * 86400, httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )
        return found


class _Checked:
    """An app that is asked only for functions that there are, with JSON in which no file is named."""

    def __init__(self, app: ASGIApp, functions: frozenset[int]) -> None:
        self.app = app
        self.functions = functions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        _check_call(body, self.functions)
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        await self.app(scope, lambda: _next(parts, receive), send)


async def _next(parts: list[Message], receive: Receive) -> Message:
    return parts.pop() if parts else await receive()


class _Rewritten:
    """An app whose answer is HTML that is changed."""

    def __init__(self, app: ASGIApp, change: Callable[[str], str]) -> None:
        self.app = app
        self.change = change

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[bytes] = []
        status = 200

        async def collect(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self.app({**scope, "headers": plain}, receive, collect)
        html = self.change(b"".join(parts).decode())
        await _html(html, status=status)(scope, receive, send)


def _html(html: str, *, status: int = 200) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, status_code=status, headers=headers)


def _language(request: Request) -> str:
    """The one that was chosen before, or the browser's."""
    chosen = request.cookies.get(LANGUAGE_COOKIE)
    return chosen if chosen in LANGUAGES else preferred(Headers(scope=request.scope).get("accept-language", ""))


def _static(name: str) -> str:
    return files("mars.server.page").joinpath("static", name).read_text(encoding="utf-8")


def _head(say: Words) -> str:
    words = json.dumps(say.all, ensure_ascii=True).replace("<", "\\u003c")
    # Gradio's own texts follow the browser's language, which is then the page's.
    language = f'Object.defineProperty(navigator, "language", {{get: () => "{_LOCALES[say.language]}"}});'
    return (
        f'<link rel="icon" href="{_ICON}"><style>{_static("page.css")}</style>'
        f"<script>{language}window.marsWords = {words};{_static('page.js')}</script>"
    )


_LOCALES: Mapping[str, str] = {"en": "en", "zh": "zh-CN"}


def _form(say: Words, wrong: str) -> Response:
    texts = {"language": say.language, "icon": _ICON, "wrong": wrong, **say.all}
    page = re.sub(r"\{(\w+)\}", lambda name: escape(texts[name[1]]), _static("sign-in.html"))
    return _html(page, status=401)


def _check_call(body: bytes, functions: frozenset[int]) -> None:
    """Raises ApiError for an unknown function, or if a file is named as Gradio does: none of our parts has one."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body must be valid JSON") from None
    if not isinstance(asked, dict) or asked.get("fn_index") not in [*functions]:
        raise ApiError(400, "this is no function of the page; load it again")
    left: list[Any] = [asked]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if "meta" in one or "path" in one:
                raise ApiError(400, "pictures must be data URLs; the server fetches nothing")
            left += one.values()
        elif isinstance(one, list):
            left += one
