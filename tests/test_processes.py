"""One process alone (two are in the tests of embedding and evaluation), and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from puma_hf import processes
from puma_hf.files import DirectoryInUseError
from puma_hf.processes import ends_well_on_sigterm, locked_for_all, shared_folder


def test_another_process_locks_nothing_and_is_refused_with_the_main_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[DirectoryInUseError | None] = [None, DirectoryInUseError("is in use")]
    monkeypatch.setattr(processes, "connect", lambda: (1, 2))
    monkeypatch.setattr(processes, "broadcast", lambda value: told.pop(0))
    with locked_for_all(tmp_path):
        assert not any(tmp_path.iterdir())
    with pytest.raises(DirectoryInUseError, match="is in use"), locked_for_all(tmp_path):
        pass


def test_a_folder_that_another_machine_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gather", lambda value: [value, False] if value is True else [value])
    message = r"Processes \[1\] do not see the folder '.*' of the main process\. Choose an output on a file system"
    with pytest.raises(ValueError, match=message), shared_folder(tmp_path):
        pass


@pytest.fixture
def worker_died() -> Iterator[Any]:
    """What torch does when a worker dies; and that of SIGTERM is as it was, whatever a test has done."""

    def raise_death(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, raise_death)
    yield raise_death
    signal.signal(signal.SIGCHLD, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_it_ends_at_once_with_a_status_of_its_own(worker_died: Any) -> None:
    done = []
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm():  # noqa: PT012 - what is kept is the point
        try:
            signal.raise_signal(signal.SIGTERM)
            done.append("never")
        finally:
            signal.raise_signal(signal.SIGTERM)  # some send two
            signal.raise_signal(signal.SIGCHLD)  # a worker that got the signal, too
            done.append("kept")
    assert (ended.value.code, done) == (143, ["kept"])


def test_the_death_of_a_worker_is_no_error_then() -> None:
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
    assert ended.value.code == 143


def test_without_the_signal_nothing_ends(worker_died: Any) -> None:
    with ends_well_on_sigterm():
        pass
    with pytest.raises(RuntimeError, match="DataLoader worker"), ends_well_on_sigterm():
        signal.raise_signal(signal.SIGCHLD)
    assert signal.getsignal(signal.SIGCHLD) is worker_died


def test_a_handler_that_is_there_stays_and_a_thread_has_none(worker_died: Any) -> None:
    def handler_inside() -> Any:
        with ends_well_on_sigterm():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(handler_inside).result() is signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert handler_inside() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
