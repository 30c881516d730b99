"""A Space: written, read as the Hub would, and run in a process of its own, a fork that imports nothing anew."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

import pytest
from huggingface_hub import SpaceCard

import puma_hf
from puma_hf.app import write_space
from puma_hf.search.index import open_index
from tests.app.client import request, search
from tests.forks import in_a_fork
from tests.patience import PATIENCE

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def space(index_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_space(open_index(index_dir), tmp_path_factory.mktemp("spaces") / "space")


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


def test_an_instruction_is_quoted(index_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Find a \"red\" one.\nAnd {not} a 'green' one."
    written = write_space(open_index(index_dir), tmp_path / "space", model="org/name", instruction=words)
    launched = []
    monkeypatch.setattr("puma_hf.app.launch.launch", lambda config, started: launched.append(config.instruction))
    runpy.run_path(str(written / "app.py"), run_name="__main__")
    assert launched == [words]


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
    output, into = os.pipe()
    errors = tmp_path / "errors"

    def serve() -> None:
        for number, file in ((1, into), (2, os.open(errors, os.O_WRONLY | os.O_CREAT))):
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        os.chdir(tmp_path)  # another directory than the Space's: nothing of it may hang on where it is started
        os.environ.update(GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT="0", TMPDIR=str(temporary))
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_path(str(moved / "app.py"), run_name="__main__")

    process = in_a_fork(serve)
    os.close(into)
    try:
        with open(output, encoding="utf-8") as said:
            url = said.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url), errors.read_text()
        message = search(url, "a table")
        assert message["success"]
        assert message["output"]["data"][0].index('title="t1"') < message["output"]["data"][0].index('title="t0"')
        assert message["output"]["data"][0].count("data:image/") == 3
        assert request(url, "GET", f"/gradio_api/file={moved}/index/index.json")[0] == 403
        assert [path.name for path in temporary.iterdir() if path.name.startswith("puma-hf-app-")]
        with urlopen(f"{url}/gradio_api/heartbeat/open-page", timeout=PATIENCE):  # as every open page does
            os.kill(process, signal.SIGINT)
            status = exit_status(process)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    assert status == 0, errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert not [path.name for path in temporary.iterdir() if path.name.startswith("puma-hf-app-")]


def exit_status(process: int) -> int:
    """Wait for a process to end."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    raise TimeoutError("the page does not end")


def test_on_a_space_it_is_reached_from_outside(space: Path) -> None:
    """The names are those that Gradio itself reads."""
    from puma_hf.app.config import FIRST_PORT

    code = (space / "app.py").read_text()
    assert 'os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")' in code
    assert f'os.environ.get("GRADIO_SERVER_PORT", "{FIRST_PORT}")' in code
    compile(code, "app.py", "exec")
