"""Ask the page's server as a program would: HTTP as it is written, no path tidied up on the way."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from tests.patience import PATIENCE

BOUNDARY = "page-test"


def request(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def upload(url: str, name: str, content: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """What the server says to a file."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    return request(url, "POST", "/gradio_api/upload", body, {**kind, **(headers or {})})


def picture(path: str, **values: Any) -> dict[str, Any]:
    """A picture as the page names it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **values}


def search(url: str, text: str = "", image: Any = None, *, target: str = "any") -> dict[str, Any]:
    """What the server sends at last for a question."""
    return ask(url, "search", [text, image, "", target])


def ask(url: str, name: str, data: list[Any], event_data: Any = None, session: str | None = None) -> dict[str, Any]:
    """Join the queue with an event, and wait for what comes of it."""
    session = session or uuid4().hex
    config = json.loads(request(url, "GET", "/config")[1])
    number = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == name)
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": event_data}
    headers = {"content-type": "application/json"}
    status, answer = request(url, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), headers)
    assert status == 200, (status, answer)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in connection.getresponse():
            message = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    finally:
        connection.close()
    raise ConnectionError("the server has ended without an answer")
