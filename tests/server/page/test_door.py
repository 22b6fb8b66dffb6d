import re
import socket
from typing import Any

import httpx2
import pytest

from mars.server.settings import Keys
from tests.server.conftest import Running, Start
from tests.server.page.conftest import HOW, ask, whole

KEY = "mars-secret"


def test_the_first_address_leads_to_the_language_of_the_browser_or_the_one_chosen(paged: Running) -> None:
    for headers, place in (
        ({}, "en/"), ({"Accept-Language": "zh-CN,zh;q=0.9"}, "zh/"),
        ({"Accept-Language": "zh-CN", "Cookie": "mars_language=en"}, "en/"), ({"Cookie": "mars_language=xx"}, "en/"),
    ):  # fmt: skip
        answer = httpx2.get(f"{paged.url}/", headers=headers)
        assert (answer.status_code, answer.headers["location"]) == (307, place)
    assert httpx2.get(f"{paged.url}/zh").headers["location"] == "zh/"


def test_the_page_names_no_other_machine_and_is_in_its_language(paged: Running) -> None:
    for language, word in (("en", "What shall be drawn?"), ("zh", "\\u60f3\\u753b\\u4ec0\\u4e48")):
        answer = httpx2.get(f"{paged.url}/{language}/")
        assert answer.status_code == 200
        assert f'lang="{language}"' in answer.text
        assert word in answer.text
        assert "window.marsWords" in answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        html = answer.text.partition("window.gradio_config")[0] + answer.text.rpartition("window.gradio_config")[2]
        assert set(re.findall(r"https?://([^/\"'\s]+)", html)) <= {"www.w3.org", f"127.0.0.1:{paged.port}"}
        assert 'rel="manifest"' not in answer.text
    assert "fonts.g" not in httpx2.get(f"{paged.url}/en/theme.css").text


def test_the_api_is_as_it_was(paged: Running) -> None:
    assert httpx2.get(f"{paged.url}/v1/models").json()["data"][0]["id"] == "tiny"
    missing = httpx2.get(f"{paged.url}/v1/images/generations")
    assert (missing.status_code, missing.json()["error"]["code"]) == (405, "method_not_allowed")
    assert httpx2.get(f"{paged.url}/english/").json()["error"]["code"] == "not_found"
    assert not any("gradio" in path for path in httpx2.get(f"{paged.url}/openapi.json").json()["paths"])


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/upload", "gradio_api/file=/etc/passwd", "gradio_api/file/x", "gradio_api/proxy=https://x.hf.space/",
        "gradio_api/info", "gradio_api/runs", "gradio_api/call/draw", "gradio_api/api/draw", "gradio_api/run/draw",
        "gradio_api/vibe-edit", "gradio_api/component_server", "login", "monitoring", "svelte/x", "custom_component/x",
        "gradio_api/heartbeat/x", "gradio_api/openapi.json",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_closed(paged: Running, path: str) -> None:
    for method in ("GET", "POST"):
        assert httpx2.request(method, f"{paged.url}/en/{path}").status_code == 404


@pytest.mark.parametrize("path", ["static/../../routes.py", "assets/..%2f..%2froutes.py", "static/%2e%2e/index.html"])
def test_files_beside_those_of_the_page_are_not_found(paged: Running, path: str) -> None:
    assert httpx2.get(f"{paged.url}/en/{path}").status_code in (403, 404)


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [{"path": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}',
        b'{"data": [], "fn_index": 2}',
        b'{"data": [[{"\\u0070ath": "/etc/passwd"}]], "fn_index": 0}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_no_request_names_a_file(paged: Running, body: bytes) -> None:
    answer = httpx2.post(f"{paged.url}/en/gradio_api/queue/join", content=body)
    assert answer.status_code == 400
    known = ("pictures must be data URLs", "the body must be", "this is no function")
    assert answer.json()["error"]["message"].startswith(known)


def test_hostile_calls_of_the_queue_are_no_failures_of_ours(paged: Running) -> None:
    bodies: list[Any] = [{}, {"data": []}, {"data": [1], "fn_index": 10**9, "session_hash": "x"}, [], {"data": 1}]
    for body in bodies:
        answer = httpx2.post(f"{paged.url}/en/gradio_api/queue/join", json=body)
        assert 400 <= answer.status_code < 500, (body, answer.text)
    with paged.client() as client:
        assert client.images.generate(prompt="x").data


def test_an_address_without_a_slash_is_no_failure_of_ours(paged: Running) -> None:
    with socket.create_connection(("127.0.0.1", paged.port), timeout=60) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"404"


def test_with_keys_the_page_asks_for_one(start: Start) -> None:
    with start(page=True, keys=Keys(["other", KEY])) as found, httpx2.Client(base_url=found.url) as client:
        answer = client.get("/zh/")
        assert (answer.status_code, answer.headers["location"]) == (303, "../sign-in?language=zh")
        for path in ("config", "gradio_api/queue/data?session_hash=x", "assets/x.js", "theme.css"):
            assert client.get(f"/en/{path}").status_code == 401
        assert client.post("/en/gradio_api/queue/join", json={}).status_code == 401
        form = client.get("/sign-in?language=zh")
        assert (form.status_code, 'lang="zh"' in form.text, "API 密钥" in form.text) == (401, True, True)
        wrong = client.post("/sign-in?language=en", data={"key": "<wrong>"})
        assert wrong.status_code == 401
        assert "The server does not know this key." in wrong.text
        assert "<wrong>" not in wrong.text
        assert "set-cookie" not in wrong.headers
        assert client.post("/sign-in", files={"key": KEY.encode()}).status_code == 401
        for content in (b"\xff" * 99, b"a=b&" * 9, b""):
            assert client.post("/sign-in", content=content).status_code == 401
        right = client.post("/sign-in?language=en", data={"key": f" {KEY} "})
        assert (right.status_code, right.headers["location"]) == (303, "en/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=lax" in cookie.lower()
        assert KEY not in cookie
        token = cookie.partition(";")[0]
        assert httpx2.get(f"{found.url}/en/", headers={"Cookie": token}).status_code == 200
        shown = whole(ask(found, "draw", ["x", 1, None, *HOW], cookie=token))[-1]
        assert shown[1]["kind"] == "done"
        bearer = token.partition("=")[2]
        for headers in ({"Cookie": token}, {"Authorization": f"Bearer {bearer}"}):
            assert httpx2.get(f"{found.url}/v1/models", headers=headers).status_code == 401
        assert httpx2.get(f"{found.url}/en/", headers={"Cookie": "mars_key=x"}).status_code == 303


def test_without_a_page_its_addresses_are_closed(start: Start) -> None:
    with start(keys=Keys([KEY])) as found:
        for path in ("", "en/", "sign-in"):
            assert httpx2.get(f"{found.url}/{path}").status_code == 401
