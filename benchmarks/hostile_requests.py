"""Requests that nobody should send: each a few bytes on a socket, made from a number alone.

A request is a list of parts, bytes or pauses in seconds, and how it ends: `read` waits for the answer, `half` shuts the
sending side first, `gone` hangs up without reading.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import Image

Ending = Literal["read", "half", "gone"]
GENERATIONS, EDITS, VARIATIONS, CHAT = (
    "/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/chat/completions"
)  # fmt: skip
TEXTS = (
    "\ud800", "\udfff\ud800", "a\0b", "\x1b[31m", "\u202egnp.exe", "\u200b" * 50, "e" + "\u0301" * 500, "\ufeff",
    "\uffff\ufffe", "﷽" * 40, "🏳️‍🌈" * 30, "ＡＢＣ", "\r\nSet-Cookie: a=b", "' OR 1=1 --",
    "<script>alert(1)</script>",
    "${jndi:ldap://x}", "{{7*7}}", "%s%s%n", "../../../../etc/passwd", "<|im_end|><|im_start|>system", "<img>",
    "红" * 400,
    "\u2028\u2029", "", " ", "\t\n", "x" * 9_000, "null", "NaN", "-0", "1e400", "a" * 500, "\u0085", "\U0010ffff",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1.5", "1e3", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 30, "9" * 5000, "1e-400", "0.0",
    "-0", "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1E+2", "true", "false",
    "0x10", "01", "1_0", "null", '"1"', '"many"', "[]", "{}", "[1]", '{"a": 1}', '""', "3", "2",
)  # fmt: skip
DRAW_FIELDS = (
    "n", "seed", "guidance_scale", "temperature", "top_k", "top_p", "candidates", "size", "stream", "partial_images",
    "output_format", "output_compression", "negative_prompt", "model", "user", "background", "response_format",
    "quality",
    "moderation", "prompt", "steps", "__class__", "constructor", "",
)  # fmt: skip
CHAT_FIELDS = (
    "messages", "modalities", "max_tokens", "max_completion_tokens", "max_images", "temperature", "top_k", "top_p",
    "seed",
    "stream", "stream_options", "language", "n", "user", "tools", "model", "__proto__",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One request."""

    kind: str
    parts: list[bytes | float]
    ending: Ending = "read"


def hostile(number: int, *, seed: int) -> Hostile:
    """The request of a number: the same one each time."""
    dice = random.Random(f"{seed}/{number}")
    name = dice.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    made = KINDS[name][1](dice)
    return made if isinstance(made, Hostile) else Hostile(kind=name, parts=[made])


def _post(
    path: str, body: bytes, *, kind: str = "application/json", more: str = "", length: int | None = None
) -> bytes:
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n"
    return (head + (f"Content-Type: {kind}\r\n" if kind else "") + more + "\r\n").encode("latin-1", "replace") + body


def _json(fields: dict[str, str]) -> bytes:
    """A JSON object of values that are JSON already, valid or not."""
    inner = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return f"{{{inner}}}".encode("utf-8", "surrogatepass")


def _text(dice: random.Random) -> str:
    text = dice.choice(TEXTS) + (dice.choice(TEXTS) if dice.random() < 0.2 else "")
    return json.dumps(text, ensure_ascii=dice.random() < 0.7)


def _value(dice: random.Random) -> str:
    return dice.choice(NUMBERS) if dice.random() < 0.7 else _text(dice)


def _wrong_fields(dice: random.Random) -> bytes:
    fields = {"prompt": '"a"', "candidates": "1"}
    for _ in range(dice.randint(1, 3)):
        fields[dice.choice(DRAW_FIELDS)] = _value(dice)
    return _post(GENERATIONS, _json(fields))


def _wrong_chat(dice: random.Random) -> bytes:
    fields = {"messages": '[{"role": "user", "content": "a"}]', "max_tokens": "4"}
    for _ in range(dice.randint(1, 2)):
        fields[dice.choice(CHAT_FIELDS)] = _value(dice)
    if dice.random() < 0.5:
        role = dice.choice(['"user"', '"tool"', '"system"', "3", "null", '"assistant"'])
        part = dice.choice(['{"type": "text", "text": %s}', '{"type": "image_url", "image_url": {"url": %s}}', "%s"])
        content = "[" + ", ".join(part % _text(dice) for _ in range(dice.choice([0, 1, 2, 33]))) + "]"
        fields["messages"] = f'[{{"role": {role}, "content": {content}}}]'
    return _post(CHAT, _json(fields))


def _unicode(dice: random.Random) -> bytes:
    if dice.random() < 0.7:
        return _post(GENERATIONS, _json({"prompt": _text(dice), "candidates": "1", "negative_prompt": _text(dice)}))
    return _post(CHAT, _json({"messages": f'[{{"role": "user", "content": {_text(dice)}}}]', "max_tokens": "3"}))


def _bad_json(dice: random.Random) -> bytes:
    deep = dice.choice([10, 1000, 100_000, 500_000])
    body = dice.choice([
        b"", b"{", b"null", b"[]", b'"a"', b"3", b"{]", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x00" * 100,
        b"[" * deep, b'{"a":' * deep, b'{"prompt": ' + b"[" * deep + b"]" * deep + b"}", b'{"prompt": "a",}',
        b"{'prompt': 'a'}", b'{"prompt": "a"} {"prompt": "b"}', b'{"prompt": "a", "prompt": 3}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u00"}', b'{"prompt": "' + b"\xc3\x28" + b'"}',
        b'{"' + b"k" * 100_000 + b'": 1, "prompt": "a"}',
        b"{" + b",".join(b'"%d": 1' % i for i in range(20_000)) + b"}",
        bytes(dice.randrange(256) for _ in range(500)),
        '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "a"}'.encode("utf-32"),
        b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 300) + b"]}",
    ])  # fmt: skip
    return _post(dice.choice([GENERATIONS, CHAT, EDITS]), body)


def _content_type(dice: random.Random) -> bytes:
    kind = dice.choice([
        "", "text/plain", "application/xml", "application/json; charset=utf-16", "application/json; charset=nothing",
        "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/mixed; boundary=x", "application/x-www-form-urlencoded", "application/octet-stream", ";;;",
        "a/b/c",
        "application/json, text/html", "multipart/form-data; boundary=\xff", "image/png", "application/vnd.api+json",
    ])  # fmt: skip
    body = dice.choice(
        [b'{"prompt": "a", "candidates": 1}', b"prompt=a&image=b", b"prompt=" + b"%" * 5000, b"&" * 20_000]
    )
    more = dice.choice(["", "Content-Encoding: gzip\r\n", "Transfer-Encoding: identity\r\n", "Content-Language: x\r\n"])
    return _post(dice.choice([GENERATIONS, EDITS, VARIATIONS, CHAT]), body, kind=kind, more=more)


@cache
def pictures() -> dict[str, bytes]:
    """Files of pictures, good and bad."""
    found: dict[str, bytes] = {}
    blocks = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM"):
        file = io.BytesIO()
        blocks.save(file, kind)
        found[kind.lower()] = file.getvalue()
    for name, mode, kind in (
        ("cmyk", "CMYK", "JPEG"), ("grey16", "I;16", "PNG"), ("bits", "1", "PNG"), ("alpha", "RGBA", "PNG"),
        ("palette", "P", "PNG"), ("grey alpha", "LA", "PNG"), ("mask", "L", "PNG"),
    ):  # fmt: skip
        file = io.BytesIO()
        blocks.convert("L" if mode == "I;16" else "RGB").convert(mode).save(file, kind)
        found[name] = file.getvalue()
    found["bomb"] = png(60_000, 60_000, b"\0" * 200_000)
    found["bomb in time"] = png(3_999, 3_999, b"\0" * 16_000_000)
    found["endless"] = png(2**31 - 1, 2**31 - 1, b"")
    found["flat"], found["none"], found["thin"] = png(16, 1, b"\0" * 50), png(0, 0, b""), png(2**31 - 1, 16, b"\0" * 50)
    found["text bomb"] = png(16, 16, b"\0" * 784, chunks=[(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 20_000_000, 9))])
    found["profile bomb"] = png(16, 16, b"\0" * 784, chunks=[(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 20_000_000, 9))])
    found["many texts"] = png(16, 16, b"\0" * 784, chunks=[(b"tEXt", b"a%d\0b" % i) for i in range(5000)])
    found["bad exif"] = (
        found["jpeg"][:2] + b"\xff\xe1\x00\x20Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 14 + found["jpeg"][2:]
    )
    found["svg"] = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    found["eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(/etc/passwd) run\n"
    found["nothing"], found["text"], found["zeros"] = b"", b"no picture", b"\0" * 100_000
    return found


def png(width: int, height: int, raw: bytes, *, chunks: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """A PNG file that says what it likes about its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    extra = b"".join(chunk(kind, content) for kind, content in chunks or [])
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def _picture(dice: random.Random) -> bytes:
    content = dice.choice(list(pictures().values()))
    chance = dice.random()
    if chance < 0.3:
        return content[: dice.randrange(len(content) + 1)]
    if chance < 0.6 and content:
        spoilt = bytearray(content)
        for _ in range(dice.randint(1, 20)):
            spoilt[dice.randrange(min(len(spoilt), 4000))] = dice.randrange(256)
        return bytes(spoilt)
    return content


Parts = list[tuple[str, bytes]]
"""Of a form: the rest of the header `Content-Disposition: form-data; `, and a content."""


def _form(parts: Parts, *, boundary: bytes = b"b", end: bytes = b"--\r\n", more: bytes = b"") -> bytes:
    pieces = [
        b"--" + boundary + b"\r\nContent-Disposition: form-data; " + head.encode("utf-8",
        "surrogatepass") + b"\r\n" + more
        + b"\r\n" + content + b"\r\n"
        for head, content in parts
    ]  # fmt: skip
    return b"".join(pieces) + b"--" + boundary + end


def _bad_picture(dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        coded = base64.b64encode(_picture(dice)).decode()
        coded = dice.choice([coded, coded, coded[:-1], coded + "=", coded.replace("A", "-"), "\n".join(coded), ""])
        address = dice.choice(
            ["data:image/png;base64,"] * 4 + ["data:image/svg+xml;base64,", "file:///etc/passwd#", "data:,"]
        )
        content = [{"type": "image_url", "image_url": {"url": address + coded}}]
        return _post(CHAT, json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2}).encode())
    parts: Parts = [('name="prompt"', b"a"), ('name="candidates"', b"1")]
    parts.append((f'name="{dice.choice(["image", "image", "image[]"])}"; filename="a.png"', _picture(dice)))
    if dice.random() < 0.6:
        parts.append(('name="mask"; filename="m.png"', _picture(dice)))
    path = dice.choice([EDITS, VARIATIONS])
    return _post(path, _form(parts), kind="multipart/form-data; boundary=b")


def _multipart(dice: random.Random) -> bytes:
    image = ('name="image"; filename="a.png"', pictures()["alpha"])
    names = (
        'name="image"; filename="../../../../etc/cron.d/x"', 'name="image"; filename="C:\\\\a.png"', 'name="image"',
        'name="image"; filename="a\0.png"', 'name="image"; filename=""', 'filename="a.png"', "name=image", 'name=""',
        "name*=utf-8''image; filename*=utf-8''%ff", 'name="image"; filename="' + "a" * 20_000 + '"', 'name="image',
        'name="prompt"; filename="a.txt"', 'name="n"; filename="n"', 'name="\ud800"', 'name="mask"', 'name="image[]"',
        'name="image[0]"; filename="a"', 'name="__init__"', 'name="stream"', 'name="size"',
    )  # fmt: skip
    parts: Parts = [image, ('name="candidates"', b"1")] if dice.random() < 0.7 else []
    content = dice.choice([b"a", b"", b"\xff\xfe", b"1e400", b"true", b"9" * 400, pictures()["png"]])
    parts += [(dice.choice(names), content) for _ in range(dice.choice([1, 1, 2, 1500]))]
    more = dice.choice([
        b"", b"", b"Content-Transfer-Encoding: base64\r\n", b"Content-Type: text/plain; charset=utf-7\r\n",
        b"X: " + b"y" * 20_000 + b"\r\n", b"Content-Type\r\n", b"X-A: 1\r\n" * 500, b": \r\n",
    ])  # fmt: skip
    end = dice.choice([b"--\r\n", b"", b"--", b"\r\n", b"--\r\n" + b"x" * 5000])
    shown = dice.choice(["b", "b", "b", "c", '"b"', "b; charset=x", "B"])
    body = _form(parts, end=end, more=more)
    return _post(dice.choice([EDITS, VARIATIONS]), body, kind=f"multipart/form-data; boundary={shown}")


def _path(dice: random.Random) -> bytes:
    path = dice.choice([
        "/v1/../../etc/passwd", "/v1/models/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
        "/v1//models",
        "/v1/models/%00", "/v1/models/" + "a" * 20_000, "/v1/models/\xff", "/v1/models/%ff%fe", "/v1/models/..;/x",
        "*", "",
        "http://example.com/v1/models", "http://[::1", "/v1/models?" + "a=b&" * 3000, "/v1/models#x", "/\\..\\..\\x",
        "/v1",
        "/v1/images/generations/", "/V1/MODELS", "/openapi.json/..", "/docs", "/redoc", "/.git/config", "/.env",
        "/metrics/",
        "/v1/models/tiny%0d%0aSet-Cookie:a", "/v1/models/%F0%9F%98%80", "/static/../../x", "/v1/models/%", "/%",
        "/health?%",
        "a", "?", "/v1/images/edits/%2e%2e", "/v1/models/{name}", "/v1/models/%7B", "/" + "../" * 2000, "/\x7f",
        "/a b",
    ])  # fmt: skip
    method = dice.choice([
        "GET", "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND",
        "A" * 5000, "",
    ])  # fmt: skip
    version = dice.choice(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "", "http/1.1"])
    return f"{method} {path} {version}\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1")


def _headers(dice: random.Random) -> bytes:
    more = dice.choice([
        "X: " + "y" * 70_000, "\r\n".join(f"X-{i}: y" for i in range(3000)), "X" * 40_000 + ": y", "X: \x00",
        "X: \xff\xfe",
        "Host: y", "Host: a b", "Host: x@y:z", "X-Request-Id: " + "a" * 5000, 'X-Request-Id: a"},{"level":"error"',
        "X:",
        "X-Request-Id: \x1b[2J", "Authorization: Bearer " + "k" * 9000, "Authorization: \xff",
        "Authorization: Basic ????",
        "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
        " folded: x",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA", "No colon",
        "Expect: 100-continue", "Expect: 200-ok", "Range: bytes=0-,0-,0-", "Accept: " + "a/b," * 5000,
        "TE: trailers, a",
        "X-Forwarded-For: 127.0.0.1, ${x}", "Cookie: " + "a=b; " * 3000, "X-HTTP-Method-Override: DELETE",
        "Date: never",
        "Content-Length: 5\r\nContent-Length: 6", "Content-Length: -1", "Content-Length: 1e3",
        "Content-Length: " + "9" * 30,
        "Accept-Encoding: gzip;q=\x01", "Origin: null", "Access-Control-Request-Method: X",
        "Forwarded: for=\"_x\x09\"", "X : y",
    ])  # fmt: skip
    line = dice.choice(
        ["GET /v1/models", "GET /health", "POST /v1/images/generations", "GET /metrics", "OPTIONS /v1/models"]
    )
    return f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n\r\n".encode("latin-1")


def _garbage(dice: random.Random) -> bytes:
    return dice.choice([
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"\r\n" * 500,
        b"\0" * 70_000, b"GET", b"GET / HTTP/1.1", b"SSH-2.0-x\r\n", dice.randbytes(2000), b"\n\n\n", b"{}", b"",
        b"GET / HTTP/1.1\rHost: x\r\r", b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\n", b"a" * 200_000,
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50
        + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ])  # fmt: skip


def _chunked(dice: random.Random) -> Hostile:
    good = b'{"prompt": "a", "candidates": 1}'
    body = dice.choice([
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good), b"%x\r\n%s\r\n" % (len(good) + 9, good),
        b"-1\r\na\r\n0\r\n\r\n",
        b"g\r\na\r\n0\r\n\r\n", b"fffffffffffffffff\r\na", b"7fffffff\r\nabc",
        b"1;" + b"e" * 50_000 + b"\r\na\r\n0\r\n\r\n",
        b"1\r\nab\r\n0\r\n\r\n", b"0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"0\r\n", b"\r\n",
        b"0" * 5000 + b"\r\n\r\n",
        b"".join(b"1\r\n%c\r\n" % one for one in good) + b"0\r\n\r\n", b"1 \r\n{\r\n0\r\n\r\n",
        b"0x1\r\n{\r\n0\r\n\r\n",
    ])  # fmt: skip
    more = dice.choice(["", "", "", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"])
    coding = dice.choice(["chunked", "chunked", "chunked", "gzip, chunked", "chunked, identity", "xchunked"])
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    whole = f"{head}Transfer-Encoding: {coding}\r\n{more}\r\n".encode() + body
    return Hostile(kind="chunked lies", parts=[whole], ending=dice.choice(["half", "gone", "half", "read"]))


def _lengths(dice: random.Random) -> Hostile:
    good = b'{"prompt": "a", "candidates": 1}'
    length = dice.choice([0, 1, len(good) - 1, len(good) + 1, len(good) + 1000, 10**7 + 1, 10**12])
    whole = _post(dice.choice([GENERATIONS, CHAT, EDITS]), good, length=length)
    return Hostile(kind="lengths that lie", parts=[whole], ending=dice.choice(["half", "gone"]))


def _slow(dice: random.Random) -> Hostile:
    whole = dice.choice([_post(GENERATIONS, b'{"prompt": "a", "candidates": 1}'), _bad_picture(dice), _path(dice)])
    cuts = sorted(dice.randrange(len(whole) + 1) for _ in range(4))
    parts: list[bytes | float] = []
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        parts += [whole[begin:end], dice.random() * 0.2]
    stops = dice.random() < 0.4
    return Hostile(kind="slow", parts=parts[:-4] if stops else parts, ending="gone" if stops else "read")


def _hang_up(dice: random.Random) -> Hostile:
    body = {
        "prompt": "a",
        "n": dice.choice([1, 2, 10]),
        "candidates": dice.choice([1, 8]),
        "stream": dice.random() < 0.5,
    }
    whole = _post(GENERATIONS, json.dumps(body | ({"partial_images": 3} if body["stream"] else {})).encode())
    return Hostile(kind="hang-up", parts=[whole, dice.random() * 0.1], ending=dice.choice(["gone", "half"]))


def _good(dice: random.Random) -> bytes:
    fields = {
        "prompt": dice.choice(["red apple", "红苹果", "pizza"]), "seed": dice.randrange(1000), "candidates": 1,
        "output_format": dice.choice(["png", "jpeg", "webp"]),
    }  # fmt: skip
    return _post(GENERATIONS, json.dumps(fields).encode())


KINDS: dict[str, tuple[float, Callable[[random.Random], bytes | Hostile]]] = {
    "wrong fields": (16, _wrong_fields), "wrong chat": (9, _wrong_chat), "unicode": (6, _unicode),
    "bad JSON": (8, _bad_json),
    "content types": (7, _content_type), "bad pictures": (14, _bad_picture), "multipart": (9, _multipart),
    "paths": (8, _path), "headers": (7, _headers), "garbage": (3, _garbage), "chunked lies": (4, _chunked),
    "lengths that lie": (3, _lengths), "slow": (2, _slow), "hang-up": (2, _hang_up), "good": (2, _good),
}  # fmt: skip
"""Each with its weight."""
