"""The processes that `accelerate launch` or `torchrun` started: who this one is, and what they tell each other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from puma_hf.locks import locked

T = TypeVar("T")

# One process may wait for another that imports or encodes; if that one dies, the launcher ends them all.
_LONGEST_WAIT = timedelta(hours=12)


def connect() -> tuple[int, int]:
    """Join the other processes, if a launcher started several.

    Returns:
        The number of this process, 0 for the main one, and how many there are.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("LOCAL_RANK", -1)) >= 0:
        # Without cpu=True, accelerate takes processes on a machine without an accelerator for strangers.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        PartialState(cpu=cpu, timeout=_LONGEST_WAIT)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """What every process gives, in order, for all of them; so it waits for all, too."""
    _, count = connect()
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """What the main process gives, for all of them."""
    return gather(value)[0]


def own_device() -> str | None:
    """The device that a launcher's settings give this process; None if it is alone and may choose."""
    return None if connect()[1] == 1 else str(PartialState().device)


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process does it before the others, which then find it done."""
    rank, _ = connect()
    if rank > 0:
        gather(None)
    yield
    if rank == 0:
        gather(None)


@contextmanager
def locked_for_all(folder: str | Path | None) -> Iterator[None]:
    """Lock a folder for the processes of this run, as `puma_hf.locks.locked` does: the main process holds the lock.

    Args:
        folder: The folder; None for nothing to lock.

    Raises:
        DirectoryInUseError: In every process, if another run has it.
        NotADirectoryError: In every process, if it is a file.
        OSError: In every process, if it cannot be made.
    """
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
    """A folder that all processes use: the given one, locked, or a temporary one that ends with the block.

    Raises:
        DirectoryInUseError: If another run has it.
        ValueError: If another process, on another machine, does not see it.
        NotADirectoryError: If it is a file.
    """
    with locked_for_all(folder), _seen_by_all(folder) as shared:
        yield shared


@contextmanager
def _seen_by_all(folder: str | Path | None) -> Iterator[Path]:
    rank, _ = connect()
    temporary = tempfile.mkdtemp(prefix="puma-hf-") if folder is None and rank == 0 else None
    shared = Path(broadcast(temporary) or str(folder))
    try:
        gather(None)
        blind = [number for number, sees in enumerate(gather(shared.is_dir())) if not sees]
        if blind:
            raise ValueError(
                f"Processes {blind} do not see the folder {str(shared)!r} that the main process uses. Choose "
                "an output on a file system that all machines share."
            )
        yield shared
        gather(None)  # nobody may still be reading
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
