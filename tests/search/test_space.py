"""A Space: written, read as the Hub would, and searched elsewhere."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

import puma_hf
from puma_hf.cli import show_page
from puma_hf.search import AppConfig, Searcher, open_index, open_searcher, write_space

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def space(page_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_space(open_index(page_index), tmp_path_factory.mktemp("spaces") / "space")


def test_what_is_in_it(space: Path, page_index: Path) -> None:
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "app.py", "index", "requirements.txt"]
    assert (space / "requirements.txt").read_text() == f"puma-hf[app,search]=={puma_hf.__version__}\n"
    assert (space / "index" / "model" / "model.safetensors").is_file()
    assert len(list((space / "index" / "images").iterdir())) == 3
    card = SpaceCard.load(space / "README.md")
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", version("gradio"), "app.py")
    assert "trust_remote_code" not in (space / "app.py").read_text()
    here = str(page_index.parent.parent).encode()  # no file names this machine
    assert not [path for path in space.rglob("*") if path.is_file() and here in path.read_bytes()]


def test_it_answers_elsewhere(space: Path, page_index: Path, tmp_path: Path, page_searcher: Searcher) -> None:
    moved = shutil.copytree(space, tmp_path / "moved")
    copied = open_searcher(moved / "index")
    found, expected = (one.search("a red picture").answers for one in (copied, page_searcher))
    assert [(answer.id, answer.score, answer.text) for answer in found] == [
        (answer.id, pytest.approx(answer.score, abs=1e-6), answer.text) for answer in expected
    ]
    picture = next(Path(answer.image or "") for answer in found if answer.id == "i0")
    assert picture.parent == moved / "index" / "images"
    assert picture.read_bytes() == (page_index.parent / "i0.png").read_bytes()


def test_a_picture_that_is_gone(page_index: Path, tmp_path: Path) -> None:
    shutil.copytree(page_index.parent, tmp_path / "corpus")
    index = open_index(tmp_path / "corpus" / "index")
    (page_index.parent / "i0.png").rename(tmp_path / "i0.png")
    try:
        with pytest.raises(FileNotFoundError, match=r"i0\.png"):
            write_space(index, tmp_path / "space")
    finally:
        (tmp_path / "i0.png").rename(page_index.parent / "i0.png")
    assert not (tmp_path / "space").exists()


def test_by_the_command_with_a_model_on_the_hub(page_index: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    config = AppConfig(
        index=page_index, space=space, model="org/name", num_kept_layers=1, trust_remote_code=True, port=1
    )
    assert show_page(config).startswith(f"saved the Space to {space};")
    assert "num_kept_layers=1, trust_remote_code=True" in (space / "app.py").read_text()
    assert not (space / "index" / "model").exists()
    assert open_index(space / "index").model == "org/name"
    assert SpaceCard.load(space / "README.md").data.models == ["org/name"]
