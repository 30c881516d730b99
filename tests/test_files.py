"""Directories and files appear whole or not at all, and one run at a time writes into a directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from puma_hf import files
from puma_hf.files import (
    LOCK_FILE,
    PUMA_MODEL_TYPES,
    DirectoryInUseError,
    is_hub_id,
    locked,
    new_directory,
    write_whole,
)

ROOT = Path(__file__).parents[1]
REFUSED = r"'.*' is in use: another run writes there\. Wait for its end"
HOLD = """
import sys
from puma_hf.files import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


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
    assert listing(tmp_path) == {"a": None, "a/b": None, "a/b/new.txt": b"new"}
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_full_directory_is_refused_or_replaced_where_a_link_leads(tmp_path: Path) -> None:
    target, link = filled(tmp_path / "out"), tmp_path / "link"
    link.symlink_to("out")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=r"link' is not empty. Choose another, or pass overwrite=True \(--"):
        write(link)
    assert listing(tmp_path) == before
    write(link, overwrite=True)
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new.txt"]


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "qwen2_vl"}'])
def test_only_puma_directories_are_overwritten(tmp_path: Path, config: str) -> None:
    target = filled(tmp_path / "out")
    (target / "config.json").write_text(config)
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=r"out' holds files, but no PUMA model.* empty it yourself"):
        write(target, overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"config\.json"):
        write(target / "config.json", overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("target", [".", "source", "link"])
def test_the_source_is_never_replaced(tmp_path: Path, target: str) -> None:
    source = filled(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"is, or holds, the source itself\. Choose another directory"):
        write(tmp_path / target, overwrite=True, forbidden=source)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("prepare", [lambda target: target.parent.mkdir(parents=True), filled])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: BaseException, prepare: Callable[[Path], None]) -> None:
    target = tmp_path / "a" / "b" / "out"
    prepare(target)
    before = listing(tmp_path)
    with pytest.raises(type(error)), new_directory(target, overwrite=True) as folder:  # noqa: PT012
        (folder / "half.txt").write_text("half")
        raise error
    assert listing(tmp_path) == before


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


def test_names_are_those_of_the_hub() -> None:
    names = ["org/puma", "puma", "../puma", "./puma", "/puma", "org/puma/k14", "org/a--b"]
    assert [name for name in names if is_hub_id(name)] == ["org/puma"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.01)


def is_refused(folder: Path) -> bool:
    """Whether who is not in the block cannot have it: a thread of its own is as good as a process."""

    def attempt() -> bool:
        try:
            with locked(folder):
                return False
        except DirectoryInUseError:
            return True

    with ThreadPoolExecutor(1) as other:
        return other.submit(attempt).result()


def test_another_process_is_kept_out_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DirectoryInUseError, match=REFUSED), locked(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).is_file()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / LOCK_FILE).is_file()  # which locks nothing any more
    with locked(tmp_path):
        assert is_refused(tmp_path)
    assert listing(tmp_path) == {}


def test_inside_it_may_be_locked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    with locked("out"):
        with locked(tmp_path / "link"):
            assert is_refused(tmp_path / "out")
        assert is_refused(tmp_path / "out")
        with locked("other"):
            assert is_refused(tmp_path / "other")
    assert not is_refused(tmp_path / "out")


def test_it_leaves_what_was_written_and_no_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a"):  # noqa: PT012
        assert (tmp_path / "a" / LOCK_FILE).is_file()
        raise KeyError
    with locked(tmp_path / "b"), locked(tmp_path / "b"):
        (tmp_path / "b/file").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "file"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", missing)
    for _ in range(2):  # a lock that a killed run has left must not be in the way of the next one
        with locked(tmp_path / "out"):
            pass
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = f"{tmp_path / 'out'} cannot be locked ([Errno {code}] {os.strerror(code)}). See to it yourself"
    assert [text.startswith(said) for text in warnings] == [True, True]
