from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from puma_hf import locks
from puma_hf.locks import LOCK_FILE, DirectoryInUseError, locked

ROOT = Path(__file__).parents[1]
REFUSED = (
    r"'.*' is in use: another run writes there, and only one may at a time\. Wait until it has ended, and run the "
    r"same command again, or choose another directory\."
)
HOLD = """
import sys
from puma_hf.locks import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.01)


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
    assert not any(tmp_path.iterdir())


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


def test_it_leaves_what_was_there_and_no_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a/b", tmp_path / "empty"):
        with pytest.raises(KeyError), locked(folder):  # noqa: PT012
            assert (folder / LOCK_FILE).is_file()
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    with locked(tmp_path / "c/d"):
        (tmp_path / "c/file").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "empty", "file"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"output_dir '.*file' is a file\. Choose a directory\."):
        locked(tmp_path / "file").__enter__()
    with pytest.raises(NotADirectoryError, match="file"):  # the system's own words
        locked(tmp_path / "file" / "inside").__enter__()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", missing)
    for _ in range(2):  # a lock that a killed run has left must not be in the way of the next one
        with locked(tmp_path), locked(tmp_path):
            pass
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = f"{tmp_path} cannot be locked ({os.strerror(code)}). See to it yourself that no other run writes there"
    assert [text.startswith(said) for text in warnings] == [True, True]


def test_a_run_that_goes_on_in_a_deleted_directory_does_not_unlock_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with locked(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        next_one = FileLock(folder / LOCK_FILE, timeout=1)
        next_one.acquire()
    assert is_refused(folder)
    next_one.release()


def test_a_directory_that_goes_while_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has failed removes the empty directory that it had made."""
    acquire = FileLock.acquire
    removed = []

    def acquire_too_late(lock: FileLock, *args: Any, **options: Any) -> Any:
        if not removed:
            removed.append((tmp_path / "out").rmdir())
        return acquire(lock, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "acquire", acquire_too_late)
        lock = locked(tmp_path / "out")
        lock.__enter__()
    assert removed
    assert is_refused(tmp_path / "out")
    lock.__exit__(None, None, None)
    assert not any(tmp_path.iterdir())
