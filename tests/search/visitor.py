"""Questions to the page, as a browser would ask them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from tests.patience import PATIENCE


def request(url: str, method: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {"content-type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def upload(url: str, name: str, content: bytes) -> tuple[int, bytes]:
    """What the server says to a file."""
    head = f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--limit--\r\n"
    return request(url, "POST", "/gradio_api/upload", body, "multipart/form-data; boundary=limit")


class Visitor:
    """Somebody who has the page open."""

    def __init__(self, url: str) -> None:
        self.url, self.session = url, uuid4().hex
        self.config = json.loads(request(url, "GET", "/config")[1])

    def ask(self, text: str = "", image: str | None = None, target: str = "any") -> dict[str, Any]:
        """What the server sends at last for a question; a picture is named by its path there."""
        file = None if image is None else {"path": image, "meta": {"_type": "gradio.FileData"}}
        return self._send(lambda one: one["api_name"] == "ask", [text, file, "", target], None)

    def choose(self, part: str, place: Any, target: str = "any") -> dict[str, Any]:
        """The same for an answer of the "gallery" or the "dataframe" as the next query."""
        (number,) = [block["id"] for block in self.config["components"] if block["type"] == part]
        event = {"index": place, "value": None}
        return self._send(lambda one: one["targets"] == [[number, "select"]], [None, "", target], event, number)

    def _send(
        self, wanted: Callable[[Any], bool], data: list[Any], event: Any, target: int | None = None
    ) -> dict[str, Any]:
        number = next(one["id"] for one in self.config["dependencies"] if wanted(one))
        body = {"data": data, "fn_index": number, "session_hash": self.session, "event_data": event}
        body |= {} if target is None else {"trigger_id": target}
        status, answer = request(
            self.url, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), "application/json"
        )
        assert status == 200, answer
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
            for line in connection.getresponse():
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        finally:
            connection.close()
        raise ConnectionError("the server has ended without an answer")
