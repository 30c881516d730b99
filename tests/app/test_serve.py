"""The page's server, asked by HTTP."""

from __future__ import annotations

import builtins
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from puma_hf.app import AppConfig, serving
from puma_hf.app.guard import LOOPBACK
from puma_hf.app.serve import _hosts, address, listen
from puma_hf.search.query import Searcher
from tests.app.client import ask, picture, request, search, upload
from tests.app.conftest import MAX_UPLOAD_MB, SCRIPT, TEMPLATE
from tests.patience import PATIENCE
from tests.search.small_corpus import TEXTS

pytest.importorskip("gradio")

WRONG = "The search failed"


def html(message: dict[str, Any]) -> str:
    assert message["success"], message
    return str(message["output"]["data"][0])


def name_of(found: str) -> str:
    """The name of the search that has found this."""
    return str(re.findall(r'data-search="(\w+)"', found)[0])


def test_a_question(url: str) -> None:
    found = html(search(url, "a table", target="text"))
    assert found.count("<li ") == 6
    assert "6 of 6 texts" in found
    assert SCRIPT not in found
    assert TEMPLATE not in found


def test_a_picture_that_was_uploaded(url: str, index_dir: Path) -> None:
    status, answer = upload(url, "a.png", (index_dir.parent / "i1.png").read_bytes())
    assert status == 200
    found = html(search(url, image=picture(json.loads(answer)[0], orig_name="a.png")))
    assert found.index('title="i1"') < found.index('title="i0"')


def test_a_kind_that_there_is_not(url: str) -> None:
    message = search(url, "a table", target="video")
    assert not message["success"]
    assert "Traceback" not in json.dumps(message)


def test_answers_are_remembered_by_session_alone(url: str) -> None:
    session = uuid4().hex
    first = html(ask(url, "search", ["a table", None, "", "any"], session=session))
    sent = {"place": 0, "search": name_of(first)}
    text, image, found, _ = ask(url, "again", [None, "", "any"], sent, session)["output"]["data"]
    assert text
    assert image is None or image["path"]
    assert "<li " in found
    forged = [sent["search"], [["stolen", "/etc/hostname"]]]
    other = ask(url, "again", [forged, "", "any"], sent)["output"]["data"]
    assert "stolen" not in json.dumps(other)
    assert "<li " not in json.dumps(other)


def test_a_place_among_earlier_answers_is_none_among_later_ones(url: str) -> None:
    session = uuid4().hex
    first, second = (html(ask(url, "search", [text, None, "", "text"], session=session)) for text in ("on", "a table"))
    wrong: list[Any] = [{"place": 0, "search": name_of(first)}, {"place": 0}, {"search": name_of(second)}, [], None]
    for sent in wrong:
        message = ask(url, "again", [None, "", "text"], sent, session)
        assert message["success"]
        assert "<li " not in json.dumps(message)


def test_two_people_get_their_own_answers(url: str) -> None:
    wanted = {"a table": "t1", TEXTS[0]: "t0", TEXTS[2]: "t2"}
    with ThreadPoolExecutor(6) as people:
        found = list(people.map(lambda text: html(search(url, text, target="text")), [*wanted] * 2))
    for text, answer in zip([*wanted] * 2, found, strict=True):
        assert re.findall(r'ph-id" title="(.*?)"', answer)[0] == wanted[text]
        assert f"“{text}”" in answer


def test_what_the_page_does_not_need_is_closed(url: str, temporary: Path) -> None:
    """Gradio would run ffmpeg on a stranger's file, and keep on the disk what somebody has asked."""
    before = sorted(temporary.rglob("*"))
    session = uuid4().hex
    ask(url, "search", ["a table", None, "", "any"], session=session)
    assert request(url, "GET", f"/gradio_api/deep_link?session_hash={session}")[0] == 404
    for path in ("process_recording", "call/v2/search", "vibe-edit", "component_server", "stream/x"):
        assert request(url, "POST", f"/gradio_api/{path}", b"{}", {"content-type": "application/json"})[0] == 404
    assert sorted(temporary.rglob("*")) == before


def test_another_site_cannot_upload(url: str, temporary: Path) -> None:
    before = sorted(temporary.rglob("*"))
    assert upload(url, "cross.png", b"x", {"sec-fetch-site": "cross-site"})[0] == 403
    assert sorted(temporary.rglob("*")) == before
    assert upload(url, "cross.png", b"x", {"sec-fetch-site": "same-origin"})[0] == 200


# --- no file but those of the page


def paths(index_dir: Path) -> list[str]:
    parent = index_dir.parent
    return [
        "/etc/passwd",
        "/etc/hostname",
        "../../../../../../etc/passwd",
        str(Path.cwd() / "pyproject.toml"),
        "pyproject.toml",
        "./pyproject.toml",
        str(parent / "secret.txt"),
        str(parent / "i0.png"),
        str(index_dir / "index.json"),
        f"{index_dir}/../secret.txt",
        str(parent),
    ]


def encodings(path: str) -> list[str]:
    once = "".join(f"%{ord(letter):02x}" for letter in path)
    return [path, path.replace("/", "%2f").replace(".", "%2e"), once, once.replace("%", "%25"), path + "%00.png"]


def test_no_file_is_served(url: str, index_dir: Path) -> None:
    doors = ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/", "/"]
    answers = {
        f"{door}{form}": request(url, "GET", f"{door}{form}")
        for door in doors
        for path in paths(index_dir)
        for form in encodings(path)
    }
    assert len(answers) == 7 * 11 * 5
    assert {name: got for name, got in answers.items() if got[0] not in (400, 403, 404)} == {}
    assert not [name for name, got in answers.items() if b"root:" in got[1] or b"not to be seen" in got[1]]


def test_nothing_is_fetched_for_others(url: str) -> None:
    assert request(url, "GET", "/gradio_api/file=http://127.0.0.1:9/a") == (403, b"Not served here.")
    assert request(url, "GET", "/gradio_api/proxy=http://127.0.0.1:9/a") == (404, b"Not served here.")


def no_pictures(index_dir: Path) -> list[str]:
    server = [
        "/etc/hostname",
        str(index_dir.parent / "i0.png"),
        str(Path.cwd() / "pyproject.toml"),
        "pyproject.toml",
        "",
    ]
    return [*server, "http://127.0.0.1:9/a.png", "https://example.org/a.png", "file:///etc/hostname"]


@pytest.mark.parametrize("extra", [{}, {"url": "/gradio_api/file=a"}, {"is_stream": True}, {"meta": None}])
def test_what_was_not_uploaded_is_no_picture(url: str, index_dir: Path, temporary: Path, extra: dict[str, Any]) -> None:
    before = sorted(temporary.rglob("*"))
    for path in no_pictures(index_dir):
        message = search(url, image=picture(path, **extra))
        assert not message["success"], path
        assert "<li " not in json.dumps(message)
    assert sorted(temporary.rglob("*")) == before


@pytest.mark.parametrize("field", [0, 2, 3])
def test_no_other_field_takes_a_file(url: str, index_dir: Path, temporary: Path, field: int) -> None:
    before = sorted(temporary.rglob("*"))
    for path in no_pictures(index_dir):
        data = ["a table", None, "", "any"]
        data[field] = picture(path)  # type: ignore[call-overload]
        assert not ask(url, "search", data)["success"], path
    assert sorted(temporary.rglob("*")) == before


def test_a_picture_in_its_own_address_is_not_read(url: str) -> None:
    """Gradio would decode it, past the limit of an upload."""
    assert not search(url, image=picture("a", url="data:image/png;base64,AAAA"))["success"]


def test_questions_wait_for_their_turn(url: str) -> None:
    body = json.dumps({"data": ["a table", None, "", "any"], "fn_index": 0, "session_hash": "x"}).encode()
    for path in ("/gradio_api/run/search", "/gradio_api/api/search"):
        answer = request(url, "POST", path, body, {"content-type": "application/json"})
        assert answer == (404, b"Not served here."), path
    config = json.loads(request(url, "GET", "/config")[1])
    assert [entry["api_visibility"] for entry in config["dependencies"]] == ["private", "private"]


def test_a_flood_is_turned_away(url: str, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = searcher.search

    def slow(*args: Any, **kwargs: Any) -> Any:
        go_on.wait(30)
        return real(*args, **kwargs)

    config = json.loads(request(url, "GET", "/config")[1])
    number = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "search")
    headers = {"content-type": "application/json"}
    with monkeypatch.context() as patched:
        patched.setattr(searcher, "search", slow)
        answers = []
        for session in range(40):
            body = {"data": ["a table", None, "", "any"], "fn_index": number, "session_hash": f"flood{session}"}
            answers.append(request(url, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), headers))
        go_on.set()
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    assert 32 <= statuses.count(200) <= 34
    assert b"Queue is full" in answers[-1][1]
    wait_until_empty(url)
    assert "<li " in html(search(url, "a table"))


def wait_until_empty(url: str) -> None:
    for _ in range(10 * PATIENCE):
        if json.loads(request(url, "GET", "/gradio_api/queue/status")[1])["queue_size"] == 0:
            return
        time.sleep(0.1)
    raise TimeoutError("the queue is not done")


def test_another_name_of_this_machine(url: str) -> None:
    assert request(url, "GET", "/", headers={"host": "evil.example"})[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "LOCALHOST", "::1", "0:0:0:0:0:0:0:1"])
def test_a_page_of_this_machine_alone_goes_by_no_other_name(host: str) -> None:
    names = _hosts(host)
    assert names is not None
    assert {host.lower(), *LOOPBACK} <= {*names}
    assert "evil.example" not in names


def test_a_page_for_other_machines_goes_by_any_name() -> None:
    assert _hosts("0.0.0.0") is None


# --- uploads


def test_an_upload_that_is_too_large(url: str) -> None:
    largest = int(MAX_UPLOAD_MB * 1024 * 1024)
    assert upload(url, "a.png", b"x" * largest)[0] == 200
    status, words = upload(url, "a.png", b"x" * (largest + 1))
    assert (status, words) == (413, f"File size exceeded maximum allowed size of {largest} bytes.".encode())
    assert upload(url, "a.png", b"x" * 10 * 1024 * 1024)[0] == 413


def test_uploads_have_a_directory_of_their_own(searcher: Searcher, temporary: Path) -> None:
    before = set(temporary.iterdir())
    environment = dict(os.environ)
    with serving(searcher, AppConfig(index="index", port=0)) as url:
        (own,) = set(temporary.iterdir()) - before
        status, answer = upload(url, "a.png", b"content")
        assert status == 200
        assert Path(json.loads(answer)[0]).is_relative_to(own / "uploads")
    assert set(temporary.iterdir()) == before
    assert dict(os.environ) == environment


# --- address


def test_any_port() -> None:
    with listen("127.0.0.1", 0) as bound:
        assert address(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port={port} on 127.0.0.1 cannot be had: .* Name another \(--port\)"):
            listen("127.0.0.1", port)


def test_the_next_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr("puma_hf.app.serve.FIRST_PORT", port)
        with listen("127.0.0.1", None) as bound:
            assert port < bound.getsockname()[1] <= port + 99
        monkeypatch.setattr("puma_hf.app.serve._PORTS", 1)
        with pytest.raises(ValueError, match=f"any port from {port} to {port} on 127.0.0.1 cannot be had"):
            listen("127.0.0.1", None)


@pytest.mark.parametrize("host", ["not an address", "", "..", "a" * 64])
def test_no_address(host: str) -> None:
    with pytest.raises(ValueError, match=f"host='{re.escape(host)}' is no address .* Leave it out for 127.0.0.1"):
        listen(host, 0)


def test_all_addresses_are_shown_as_one_that_can_be_opened() -> None:
    with listen("0.0.0.0", 0) as bound:
        assert address(bound).startswith("http://localhost:")


def test_gradio_is_missing(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'puma-hf\[app\]'"), serving(searcher, AppConfig(index="index")):
        pass
