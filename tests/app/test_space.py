"""A Space: written, read as the Hub would, and run in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

import pytest
from huggingface_hub import SpaceCard

import puma_hf
from puma_hf.app import write_space
from puma_hf.search.index import open_index
from tests.app.client import request, search

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def space(index_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_space(open_index(index_dir), tmp_path_factory.mktemp("spaces") / "space")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_what_is_in_it(space: Path) -> None:
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "app.py", "index", "requirements.txt"]
    assert (space / "requirements.txt").read_text() == f"puma-hf[app]=={puma_hf.__version__}\n"
    assert (space / "index" / "model" / "model.safetensors").is_file()
    assert len(list((space / "index" / "images").iterdir())) == 3


def test_its_settings_are_the_hubs(space: Path) -> None:
    card = SpaceCard.load(space / "README.md")
    assert card.data.to_dict() == {
        "title": "Search by words and pictures",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "tags": ["puma", "multimodal-retrieval"],
    }
    assert "9 items (2 pictures, 1 picture with a text, 6 texts) · tiny-puma." in card.text
    assert "and, in `index/`, the embeddings, texts\nand pictures that it searches, and the model." in card.text


def test_no_file_names_this_machine(space: Path, index_dir: Path) -> None:
    here = str(index_dir.parent.parent).encode()
    for path in space.rglob("*"):
        assert path.is_dir() or here not in path.read_bytes(), path


def test_a_model_on_the_hub(index_dir: Path, tmp_path: Path) -> None:
    written = write_space(open_index(index_dir), tmp_path / "space", model="org/name")
    assert not (written / "index" / "model").exists()
    assert open_index(written / "index").model == "org/name"
    card = SpaceCard.load(written / "README.md")
    assert card.data.models == ["org/name"]
    assert "· org/name." in card.text
    assert "trust_remote_code" not in (written / "app.py").read_text()


def test_it_is_written_whole_or_not_at_all(index_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("puma_hf.app.space._readme", full)
    with pytest.raises(OSError, match="No space left"):
        write_space(open_index(index_dir), tmp_path / "space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty(index_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_space(open_index(index_dir), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_it_runs_elsewhere_until_it_is_stopped(space: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(space, tmp_path / "moved")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    url = f"http://127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": url.rpartition(":")[2],
        "PYTHONPATH": str(Path(puma_hf.__file__).parents[1]),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
    }
    # Another directory than the Space's: nothing of it may hang on where it is started.
    with subprocess.Popen(
        [sys.executable, moved / "app.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{url}\n"
            message = search(url, "a table")
            assert message["success"]
            assert message["output"]["data"][0].index('title="t1"') < message["output"]["data"][0].index('title="t0"')
            assert message["output"]["data"][0].count("data:image/") == 3
            assert request(url, "GET", f"/gradio_api/file={moved}/index/index.json")[0] == 403
            assert [path.name for path in temporary.iterdir() if path.name.startswith("puma-hf-app-")]
            with urlopen(f"{url}/gradio_api/heartbeat/open-page", timeout=30):  # as every open page does
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not [path.name for path in temporary.iterdir() if path.name.startswith("puma-hf-app-")]


def test_on_a_space_it_is_reached_from_outside(space: Path) -> None:
    """The names are those that Gradio itself reads."""
    from puma_hf.app.config import FIRST_PORT

    code = (space / "app.py").read_text()
    assert 'os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")' in code
    assert f'os.environ.get("GRADIO_SERVER_PORT", "{FIRST_PORT}")' in code
    compile(code, "app.py", "exec")
