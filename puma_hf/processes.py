"""The processes that `accelerate launch` or `torchrun` started, what they tell each other, and how SIGTERM ends one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from puma_hf.files import locked

logger = logging.getLogger(__name__)
T = TypeVar("T")

STATUS = 128 + signal.SIGTERM  # what shells report of a process that the signal has killed: 143
# One process may wait for another that imports or encodes; if that one dies, the launcher ends them all.
_LONGEST_WAIT = timedelta(hours=12)


def _state() -> Any:
    """What accelerate knows of this process; it joins the others when it is first asked for."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without cpu=True, accelerate takes processes on a machine without an accelerator for strangers.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_LONGEST_WAIT)


def connect() -> tuple[int, int]:
    """The number of this process, 0 for the main one, and how many there are; the first call joins them."""
    if int(os.environ.get("LOCAL_RANK", -1)) < 0:  # no launcher started it, so accelerate need not be imported
        return 0, 1
    return _state().process_index, _state().num_processes


def gather(value: T) -> list[T]:
    """What every process gives, in order, for all of them; so it waits for all, too."""
    if connect()[1] == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


def broadcast(value: T) -> T:
    """What the main process gives, for all of them."""
    return gather(value)[0]


def own_device() -> str | None:
    """The device that a launcher's settings give this process; None if it is alone and may choose."""
    return None if connect()[1] == 1 else str(_state().device)


def main_process_first() -> AbstractContextManager[None]:
    """The main process does it before the others, which then find it done."""
    first: AbstractContextManager[None] = nullcontext() if connect()[1] == 1 else _state().main_process_first()
    return first


@contextmanager
def locked_for_all(folder: str | Path | None) -> Iterator[None]:
    """Lock a folder, if one is given, for all processes of this run; the OSError of `locked` is raised in each."""
    with ExitStack() as stack:
        refused: OSError | None = None
        if folder is not None and connect()[0] == 0:
            try:
                stack.enter_context(locked(folder))
            except OSError as error:
                refused = error
        # The others would wait for a main process that has given up.
        if folder is not None and (said := broadcast(refused)) is not None:
            raise said
        yield


@contextmanager
def shared_folder(folder: str | Path | None) -> Iterator[Path]:
    """A folder that all processes use: the given one, locked, or a temporary one that ends with the block."""
    with locked_for_all(folder):
        temporary = tempfile.mkdtemp(prefix="puma-hf-") if folder is None and connect()[0] == 0 else None
        shared = Path(broadcast(temporary) or str(folder))
        try:
            if blind := [number for number, sees in enumerate(gather(shared.is_dir())) if not sees]:
                problem = f"Processes {blind} do not see the folder {str(shared)!r} of the main process"
                raise ValueError(f"{problem}. Choose an output on a file system that all machines share.")
            yield shared
            gather(None)  # nobody may still be reading
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def ends_well_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, which schedulers send before they kill, end the block by `SystemExit(143)`: `finally` is run.

    A handler that is already there stays, and outside of the main thread, which alone gets signals, this does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` and launchers send two
        # torch raises the death of a worker wherever the process is, also in the middle of what keeps the work.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        logger.warning("SIGTERM: ending; the same command, run again, goes on from what its output directory holds")
        raise SystemExit(STATUS)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except RuntimeError as error:
        # Workers of a `DataLoader` get the signal too if it was sent to the whole group, and torch raises their death.
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # it has not come
            raise
        raise SystemExit(STATUS) from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
