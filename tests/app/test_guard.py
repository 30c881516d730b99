"""What stands before the server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from puma_hf.app.guard import LOOPBACK, Guard


def answer(
    path: str = "/",
    *,
    method: str = "GET",
    host: str = "127.0.0.1:7860",
    body: tuple[bytes, ...] = (),
    headers: tuple[tuple[bytes, bytes], ...] = (),
    hosts: tuple[str, ...] | None = LOOPBACK,
    is_full: bool = False,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """What the guard sends for a request, before an application that echoes its body."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts.append({"type": "http.request", "body": b"", "more_body": False})

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        got, more = b"", True
        while more:
            message = await receive()
            got, more = got + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": got})

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"host", host.encode()), *headers]}
    asyncio.run(Guard(echo, max_bytes=10, is_full=lambda: is_full, hosts=hosts)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def test_a_request_goes_through() -> None:
    status, headers, body = answer("/gradio_api/queue/join", body=(b"12345", b"67890"))
    assert (status, body) == (200, b"1234567890")
    assert headers[b"content-security-policy"].startswith(b"default-src 'self' data: blob:")
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_nothing_more_is_taken_in_when_uploads_have_filled_their_share() -> None:
    status, _, body = answer("/gradio_api/upload", method="POST", is_full=True)
    assert (status, body) == (
        507,
        b"Too many pictures were uploaded within the last hour. Search by words, or try again later.",
    )
    assert answer("/gradio_api/upload", method="POST")[0] == 200
    assert answer("/gradio_api/queue/join", method="POST", is_full=True)[0] == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:7860"])
def test_its_own_names(host: str) -> None:
    assert answer(host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""])
def test_a_name_that_somebody_else_points_here(host: str) -> None:
    status, headers, body = answer(host=host)
    assert status == 403
    assert b"start it with --host" in body
    assert b"content-security-policy" in headers
    assert answer(host=host, hosts=None)[0] == 200


def test_a_request_says_that_it_is_too_large() -> None:
    assert answer(headers=((b"content-length", b"10"),))[0] == 200
    status, _, body = answer(headers=((b"content-length", b"11"),))
    assert (status, body) == (413, b"File size exceeded maximum allowed size of 10 bytes.")


def test_a_request_is_too_large_without_saying_so() -> None:
    assert answer(body=(b"12345", b"678901"))[0] == 413


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=http://example.org/a.png", 403),
        ("/gradio_api/file/https://example.org", 404),
        ("/gradio_api/proxy=https://example.org", 404),
        ("/gradio_api/run-history/connect", 404),
        ("/gradio_api/queue/join/x", 404),
        ("/docs", 404),
        ("//", 404),
    ],
)
def test_doors_that_stay_closed(path: str, status: int) -> None:
    assert answer(path)[0] == status


@pytest.mark.parametrize("path", ["/", "/config", "/assets/a.js", "/gradio_api/file=/a.png", "/gradio_api/upload"])
def test_doors_that_are_open(path: str) -> None:
    assert answer(path)[0] == 200


def test_a_page_of_another_site_writes_nothing() -> None:
    site = ((b"sec-fetch-site", b"cross-site"),)
    assert answer("/gradio_api/upload", method="POST", headers=site)[0] == 403
    assert answer("/gradio_api/upload", method="POST", headers=((b"sec-fetch-site", b"same-origin"),))[0] == 200
    assert answer("/", headers=site)[0] == 200  # a link, or a frame around the page


def test_what_is_no_request_goes_through() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, max_bytes=1, is_full=bool, hosts=LOOPBACK)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
