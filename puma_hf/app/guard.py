"""What stands before the page's server: only what the page needs is open, and no request is larger than it needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# The browser loads nothing from elsewhere, whatever a text or a library says. Gradio makes functions of strings.
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; form-action 'self'"
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
# What the page asks for. Gradio has more doors, which fetch from other servers, run ffmpeg, or store what was asked.
_API = "/gradio_api/"
_PAGES = ("/", "/config", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css")
_CALLS = ("app_id", "cancel", "info", "queue/data", "queue/join", "queue/status", "upload", "upload_progress")
_OPEN = frozenset((*_PAGES, *(_API + name for name in _CALLS)))
_FILES = f"{_API}file="
_UPLOAD = f"{_API}upload"
_OPEN_FOLDERS = ("/assets/", "/static/", f"{_API}heartbeat/", _FILES)


class TooLarge(Exception):
    """A request has more bytes than it may have."""


class Guard:
    """An ASGI application before another one.

    Args:
        app: The one that answers.
        max_bytes: What a request may have.
        is_full: Whether nobody may upload anything for now.
        hosts: Names that a request may call this server by, or None for any. A page of somebody else that has had its
            own name point to this machine is so kept from reading what is served here.
    """

    def __init__(
        self, app: Application, *, max_bytes: int, is_full: Callable[[], bool], hosts: tuple[str, ...] | None
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.is_full = is_full
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await _answer(send, *refusal)
            return
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            await self.app(scope, self._counted(receive), send_on)
        except TooLarge:
            if not started:
                await _answer(send, *self._too_large())

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and name not in self.hosts:
            return 403, f"This server does not go by the name {name!r}: start it with --host for others than yourself."
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_bytes:
            return self._too_large()
        path = scope["path"]
        if path not in _OPEN and not path.startswith(_OPEN_FOLDERS):
            return 404, "Not served here."
        if path.startswith(_FILES) and "://" in path:
            return 403, "Not served here."
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            return 403, "Pages of other sites may not write to this one."
        if path == _UPLOAD and self.is_full():
            return 507, "Too many pictures were uploaded within the last hour. Search by words, or try again later."
        return None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"File size exceeded maximum allowed size of {self.max_bytes} bytes."

    def _counted(self, receive: Receive) -> Receive:
        """A request without a length may be of any, so its bytes are counted as they come."""
        total = 0

        async def receive_on() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_bytes:
                raise TooLarge
            return message

        return receive_on


def _host_name(value: str) -> str:
    """The name in a Host header, without the port."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].lower()


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
