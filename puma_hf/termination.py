"""End well on SIGTERM, which schedulers send before they kill: what is embedded by then is kept."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

STATUS = 128 + signal.SIGTERM  # what shells report of a process that the signal has killed: 143
_CHILD = getattr(signal, "SIGCHLD", None)


class _State:
    """SIGTERM of this process."""

    has_come = False
    num_waiting = 0  # blocks that end by themselves


@contextmanager
def ends_well_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by `SystemExit`: at once, or inside of `sigterm_waits` at the next `stop_if_sigterm`.

    A handler that is already there stays, and so does one that ignores the signal. Outside of the main thread, which
    alone gets signals, this does nothing. A second SIGTERM changes nothing: `timeout` and launchers send two.

    Raises:
        SystemExit: With status 143, if the signal came.

    Example:
        >>> from puma_hf.termination import ends_well_on_sigterm
        >>> with ends_well_on_sigterm():
        ...     pass
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    except RuntimeError as error:
        # Workers of a `DataLoader` get the signal too if it was sent to the whole group.
        if not (_State.has_come and str(error).startswith("DataLoader worker")):
            raise
        raise SystemExit(STATUS) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _State.has_come = False


@contextmanager
def sigterm_waits() -> Iterator[None]:
    """Keep SIGTERM from breaking into the block: it ends where it calls `stop_if_sigterm`."""
    _State.num_waiting += 1
    try:
        yield
    finally:
        _State.num_waiting -= 1


def stop_if_sigterm() -> None:
    """End the program if SIGTERM has come.

    Raises:
        SystemExit: With status 143, if it has.
    """
    if _State.has_come:
        raise SystemExit(STATUS)


def _on_sigterm(*_: object) -> None:
    is_first = not _State.has_come
    _State.has_come = True
    if _CHILD is not None and callable(signal.getsignal(_CHILD)):
        # torch raises the death of a worker wherever the process is, also in the middle of what keeps the work. This
        # stays so, as the process ends, and its workers after the block.
        signal.signal(_CHILD, _nothing)
    if is_first:
        logger.warning("SIGTERM: ending; the same command, run again, goes on from what its output directory holds")
        if not _State.num_waiting:
            raise SystemExit(STATUS)


def _nothing(*_: object) -> None:
    pass
