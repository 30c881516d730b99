"""`puma-hf app` as a library function; `test_space.py` runs it in a process and stops that."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from puma_hf.app.config import AppConfig
from puma_hf.app.launch import launch

pytest.importorskip("gradio")


class FakeServer:
    """Runs until it is stopped, at once."""

    def __init__(self) -> None:
        self.served: list[Any] = []

    def run(self, *, sockets: list[socket.socket]) -> None:
        self.served = [bound.getsockname() for bound in sockets]
        raise KeyboardInterrupt


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    from contextlib import nullcontext

    made = FakeServer()
    monkeypatch.setattr("puma_hf.app.launch.server_of", lambda searcher, config: nullcontext(made))
    return made


def test_it_says_where_it_serves_and_ends_with_ctrl_c(
    server: FakeServer, index_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    said: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    launch(AppConfig(index=index_dir, port=0, open_browser=True), started=said.append)
    (host, port) = server.served[0]
    assert said == opened == [f"http://{host}:{port}"]
    assert host == "127.0.0.1"


def test_a_port_in_use_is_told_before_the_index_is_opened() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="cannot be had"):
            launch(AppConfig(index="gone", port=other.getsockname()[1]))


def test_no_index() -> None:
    with pytest.raises(FileNotFoundError, match="'gone' is no index"):
        launch(AppConfig(index="gone", port=0))


def test_the_port_is_free_again(server: FakeServer, index_dir: Path) -> None:
    launch(AppConfig(index=index_dir, port=0))
    port = server.served[0][1]
    launch(AppConfig(index=index_dir, port=port))
    assert server.served[0][1] == port


def test_a_space_instead(index_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    launch(
        AppConfig(index=index_dir, space=tmp_path / "space", model="org/name", trust_remote_code=True, port=1),
        started=said.append,
    )
    assert said == [str(tmp_path / "space")]
    assert "port is ignored: a Space is written" in caplog.text
    app = (tmp_path / "space" / "app.py").read_text()
    assert "trust_remote_code=True" in app
