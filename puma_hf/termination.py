"""End well on SIGTERM, which schedulers send before they kill: as on Ctrl-C, but with a status of its own."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

logger = logging.getLogger(__name__)

STATUS = 128 + signal.SIGTERM  # what shells report of a process that the signal has killed: 143
# Workers of a `DataLoader` may get the same SIGTERM, and torch raises their death wherever the process is.
_CHILD = getattr(signal, "SIGCHLD", None)


class _Terminated(SystemExit):
    """As it is no error, what catches errors lets it pass."""


@contextmanager
def ends_well_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that work can be kept and temporary files go.

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
    before: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL}
    is_ending = False

    def end(*_: Any) -> None:
        # Not SIG_IGN: Python complains of a signal that has arrived already.
        signal.signal(signal.SIGTERM, _nothing)
        if _CHILD is not None and callable(handler := signal.getsignal(_CHILD)):
            before[_CHILD] = handler
            signal.signal(_CHILD, _nothing)
        nonlocal is_ending
        is_ending = True
        # A worker that died first ends the block already: what is kept on the way out must not be cut short.
        if not _is_death_of_worker(sys.exc_info()[1]):
            raise _Terminated(STATUS)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException as error:
        if not is_ending or not (isinstance(error, _Terminated) or _is_death_of_worker(error)):
            raise
        _let_go(error)
        logger.warning("ended by SIGTERM; the same command, run again, goes on from what is stored")
        raise _Terminated(STATUS) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_death_of_worker(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _let_go(error: BaseException | None) -> None:
    """End what its frames still hold, such as workers, as long as their death is not told."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def _nothing(*_: Any) -> None:
    pass
