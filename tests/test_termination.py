from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from puma_hf.termination import ends_well_on_sigterm, sigterm_waits, stop_if_sigterm


@pytest.fixture(autouse=True)
def worker_died() -> Iterator[Any]:
    """What torch does when a worker dies; and that of SIGTERM is as it was, whatever a test has done."""

    def raise_death(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, raise_death)
    yield raise_death
    signal.signal(signal.SIGCHLD, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_it_ends_at_once_with_a_status_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
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
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "SIGTERM: ending; the same command, run again, goes on from what its output directory holds"
    ]


def test_where_it_waits_it_ends_between_two_batches() -> None:
    done: list[Any] = []
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm(), sigterm_waits():  # noqa: PT012
        for number in range(3):
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            done.append(number)
            stop_if_sigterm()
    assert (ended.value.code, done) == (143, [0, 1])


def test_one_that_came_where_it_waits_ends_the_next_such_block() -> None:
    """And so does one whose exception was swallowed, as Python does in `__del__`."""
    done = []
    with pytest.raises(SystemExit), ends_well_on_sigterm():  # noqa: PT012
        with sigterm_waits():
            signal.raise_signal(signal.SIGTERM)
        done.append("went on")
        stop_if_sigterm()
        done.append("never")
    assert done == ["went on"]


def test_the_death_of_a_worker_that_came_first_is_no_error_then() -> None:
    done = []
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm(), sigterm_waits():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGCHLD)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("kept")
    assert (ended.value.code, done) == (143, ["kept"])


def test_without_the_signal_nothing_ends(worker_died: Any) -> None:
    with ends_well_on_sigterm(), sigterm_waits():
        stop_if_sigterm()
    with pytest.raises(RuntimeError, match="DataLoader worker"), ends_well_on_sigterm():
        signal.raise_signal(signal.SIGCHLD)
    assert signal.getsignal(signal.SIGCHLD) is worker_died


def test_a_run_after_it_knows_nothing_of_it() -> None:
    with pytest.raises(SystemExit), ends_well_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    stop_if_sigterm()
    with pytest.raises(SystemExit), ends_well_on_sigterm():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("CUDA error")])
def test_another_error_after_the_signal_is_told(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), ends_well_on_sigterm():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise error


def test_a_handler_that_is_there_stays() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with ends_well_on_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_a_thread_it_does_nothing() -> None:
    def work() -> Any:
        with ends_well_on_sigterm():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(work).result() is signal.SIG_DFL
    with ends_well_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
