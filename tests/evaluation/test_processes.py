"""One process alone; two are in test_kill_and_two_processes.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from puma_hf.evaluation import processes
from puma_hf.evaluation.processes import (
    broadcast,
    connect,
    gather,
    locked_for_all,
    main_process_first,
    own_device,
    shared_folder,
)
from puma_hf.locks import LOCK_FILE, DirectoryInUseError


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert connect() == (0, 1)
    assert (gather("mine"), broadcast("mine"), own_device()) == (["mine"], "mine", None)
    with main_process_first():
        pass


def test_a_given_folder_stays(tmp_path: Path) -> None:
    with shared_folder(tmp_path / "new" / "folder") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "new" / "folder" / "file").is_file()


def test_a_given_folder_is_locked_and_nothing_needs_no_lock(tmp_path: Path) -> None:
    with shared_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
    assert not any(tmp_path.iterdir())
    with locked_for_all(None), shared_folder(None) as folder:
        assert not any(folder.iterdir())


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


def test_a_temporary_folder_goes_even_after_an_error() -> None:
    def fail(folder: Path) -> None:
        folders.append(folder)
        raise KeyError

    folders: list[Path] = []
    with pytest.raises(KeyError), shared_folder(None) as folder:
        fail(folder)
    assert not folders[0].exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"output_dir '.*file' is a file\. Choose a directory\."
    with pytest.raises(NotADirectoryError, match=message), shared_folder(tmp_path / "file"):
        pass


def test_a_folder_that_another_machine_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gather", lambda value: [value, False] if value is True else [value])
    message = (
        r"Processes \[1\] do not see the folder '.*' that the main process uses\. Choose an output on a file system"
    )
    with pytest.raises(ValueError, match=message), shared_folder(tmp_path):
        pass
