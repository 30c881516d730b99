from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from puma_hf import files
from puma_hf.files import PUMA_MODEL_TYPES, new_directory, write_whole


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write(target: Path, *, overwrite: bool = False, forbidden: Path | None = None) -> None:
    with new_directory(target, overwrite=overwrite, forbidden=forbidden) as folder:
        assert folder.is_dir()
        (folder / "new.txt").write_text("new")


def fail_halfway(target: Path, error: BaseException, beside: str = "") -> None:
    with new_directory(target, overwrite=True) as folder:
        (folder / "half.txt").write_text("half")
        if beside:
            (target.parent / beside).write_text("other")
        raise error


def filled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    (folder / "config.json").write_text('{"model_type": "puma"}')
    return folder


def test_it_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_directory(target, overwrite=False) as folder:
        (folder / "new.txt").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent  # the same disk, so that renaming is one step
        assert folder.name.startswith(".b-")
    assert listing(tmp_path) == {"a": None, "a/b": None, "a/b/new.txt": b"new"}
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert listing(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_directory("out", overwrite=False) as folder:
        (folder / "new.txt").write_text("new")
    assert listing(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    filled(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new.txt"]


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    write(filled(tmp_path / "out"), overwrite=True)
    assert listing(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_a_full_directory_is_refused(tmp_path: Path) -> None:
    target = filled(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=r"out' is not empty. Choose another, or pass overwrite=True \(--"):
        write(target)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "qwen2_vl"}'])
def test_only_puma_directories_are_overwritten(tmp_path: Path, config: str | None) -> None:
    target = filled(tmp_path / "out")
    (target / "config.json").unlink()
    if config is not None:
        (target / "config.json").write_text(config)
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=r"out' holds files, but no PUMA model: .* empty it yourself"):
        write(target, overwrite=True)
    assert listing(tmp_path) == before


def test_a_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(NotADirectoryError, match=r"out' is a file\. Choose a directory"):
        write(target, overwrite=True)
    assert listing(tmp_path) == {"out": b"old"}


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for target in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(PermissionError, match=rf"{target.name}' cannot be written .*Choose another dir"):
            write(target)
    assert listing(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("target", [".", "source", "source/../source", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_replaced(tmp_path: Path, target: str, overwrite: bool) -> None:
    source = filled(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"is, or holds, the source itself\. Choose another directory"):
        write(tmp_path / target, overwrite=overwrite, forbidden=source)
    assert listing(tmp_path) == before


def test_beside_and_below_the_source_is_allowed(tmp_path: Path) -> None:
    source = filled(tmp_path / "source")
    write(tmp_path / "source-2", forbidden=source)
    write(source / "pruned", forbidden=source)
    assert (source / "pruned" / "new.txt").is_file()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("prepare", [lambda target: None, lambda target: target.mkdir(parents=True), filled])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: BaseException, prepare: Callable[[Path], None]) -> None:
    target = tmp_path / "a" / "b" / "out"
    prepare(target)
    before = listing(tmp_path)
    with pytest.raises(type(error)):
        fail_halfway(target, error)
    assert listing(tmp_path) == before


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"):
        fail_halfway(tmp_path / "a" / "out", ValueError("bad"), beside="other.txt")
    assert listing(tmp_path) == {"a": None, "a/other.txt": b"other"}


def test_a_failed_replacement_restores_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "out")
    before = listing(tmp_path)
    replace = os.replace

    def fail_for_the_new_one(source: Path, destination: Path) -> None:
        if Path(source).name.startswith(".out-"):
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(files.os, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="disk full"):
        write(target, overwrite=True)
    assert listing(tmp_path) == before


def test_the_model_types_are_those_of_the_configurations() -> None:
    from puma_hf.modeling.configuration_puma import CONFIG_CLASSES

    assert tuple(kind.model_type for kind in CONFIG_CLASSES) == PUMA_MODEL_TYPES


@pytest.mark.parametrize("sync", [True, False])
def test_bytes_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    path = tmp_path / "folder" / "image.png"
    write_whole(path, b"old", sync=sync)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new", sync=sync)
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]
