from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from puma_hf.termination import ends_well_on_sigterm


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """They are as they were, whatever a test has done."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == before


def test_it_ends_with_a_status_of_its_own_and_keeps_what_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done = []
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm():  # noqa: PT012 - what is kept is the point
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            signal.raise_signal(signal.SIGTERM)  # some send two
            done.append("kept")
            raise
    assert ended.value.code == 143
    assert done == ["kept"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "ended by SIGTERM; the same command, run again, goes on from what is stored"
    ]


def test_a_worker_that_got_the_signal_too_does_not_break_into_the_ending() -> None:
    def worker_died(*_: Any) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    done = []
    before = signal.signal(signal.SIGCHLD, worker_died)
    try:
        with pytest.raises(SystemExit), ends_well_on_sigterm():  # noqa: PT012
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                signal.raise_signal(signal.SIGCHLD)
                done.append("kept")
                raise
        assert done == ["kept"]
        assert signal.getsignal(signal.SIGCHLD) is worker_died
        with pytest.raises(RuntimeError, match="worker is killed"), ends_well_on_sigterm():
            signal.raise_signal(signal.SIGCHLD)  # without a SIGTERM it is told
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_death_of_a_worker_that_came_first_is_no_error_then(caplog: pytest.LogCaptureFixture) -> None:
    done = []
    with pytest.raises(SystemExit) as ended, ends_well_on_sigterm():  # noqa: PT012
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated. ")
        except RuntimeError:
            signal.raise_signal(signal.SIGTERM)
            done.append("kept")  # the signal did not cut it short
            raise
    assert (ended.value.code, done) == (143, ["kept"])
    assert "ended by SIGTERM" in caplog.text


def test_what_frames_hold_ends_before_the_death_of_a_worker_is_told_again() -> None:
    seen = []

    def workers() -> Iterator[int]:
        try:
            yield 1
        finally:
            seen.append(signal.getsignal(signal.SIGCHLD))

    def work() -> None:
        held = workers()
        next(held)
        signal.raise_signal(signal.SIGTERM)

    def worker_died(*_: Any) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    before = signal.signal(signal.SIGCHLD, worker_died)
    try:
        with pytest.raises(SystemExit), ends_well_on_sigterm():
            work()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert len(seen) == 1
    assert seen[0] is not worker_died


def test_another_error_after_the_signal_is_told() -> None:
    with pytest.raises(OSError, match="disk"), ends_well_on_sigterm():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OSError("the disk is full")


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
