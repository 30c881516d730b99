from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from puma_hf.data import whole_folder
from puma_hf.data.whole_folder import make_folder


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def write(folder: Path) -> None:
    (folder / "a").write_text("a")


def test_it_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    make_folder(folder, write)
    assert (folder / "a").read_text() == "a"
    make_folder(folder, lambda _: pytest.fail("written again"))
    assert visible(folder.parent) == ["data"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), FileNotFoundError("no image")])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        make_folder(tmp_path / "data", fail)
    assert caught.value is error
    assert visible(tmp_path) == []


def test_what_a_killed_process_left_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole_folder.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            make_folder(tmp_path / "data", die)
    assert visible(tmp_path) == [".data.partial"]
    make_folder(tmp_path / "data", write)
    assert visible(tmp_path / "data") == ["a"]
    assert visible(tmp_path) == ["data"]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"data could not be written \(No space left on device\)\. Make room or"):
        make_folder(tmp_path / "data", full)
    assert visible(tmp_path) == []


def test_who_comes_at_the_same_time_waits(tmp_path: Path) -> None:
    started, calls = threading.Event(), []

    def slow(folder: Path) -> None:
        calls.append(folder)
        started.set()
        write(folder)

    first = threading.Thread(target=make_folder, args=(tmp_path / "data", slow))
    first.start()
    assert started.wait(10)
    make_folder(tmp_path / "data", slow)
    first.join()
    assert len(calls) == 1
