"""One run at a time in a directory: a lock of the operating system, which ends with its process, however that ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK_FILE = ".puma-hf.lock"
_PATIENCE = 0.2  # seconds: a run that ends at this moment removes its file, and the next one makes its own

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


class DirectoryInUseError(OSError):
    """Another run writes into the directory."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep every other run out of a directory as long as the block lasts; who only reads is not kept out.

    The directory is made if need be. In it lies a hidden file, removed at the end; one that a killed run has left locks
    nothing. Inside of the block the same directory may be locked again, which does nothing. On a file system that has
    no locks a warning is all that happens.

    Args:
        folder: The directory.

    Raises:
        DirectoryInUseError: At once, if another run has it, in this process or in another.
        NotADirectoryError: If it is a file.
        OSError: If it cannot be made.

    Example:
        >>> import tempfile
        >>> from puma_hf.locks import locked
        >>> with tempfile.TemporaryDirectory() as folder, locked(folder):
        ...     pass
    """
    directory = Path(folder)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"output_dir {str(folder)!r} is a file. Choose a directory.")
    # A chain of links may have another end later, and so may a relative path.
    directory = directory.resolve()
    if directory in _held.get():
        yield
        return
    made = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    path = directory / LOCK_FILE
    # Not filelock's lock by a file alone, which outlives a killed process.
    lock = FileLock(path, timeout=_PATIENCE, thread_local=False, fallback_to_soft=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # makes the directory again if a run that failed has removed it just now
        own = path.stat()
    except Timeout as error:
        raise DirectoryInUseError(
            f"{str(folder)!r} is in use: another run writes there, and only one may at a time. Wait until it has "
            "ended, and run the same command again, or choose another directory."
        ) from error
    except OSError as error:
        if not directory.is_dir():
            raise
        own = None
        logger.warning(
            "%s cannot be locked (%s). See to it yourself that no other run writes there at the same time.",
            folder,
            error.strerror or error,
        )
    token = _held.set(_held.get() | {directory})
    try:
        yield
    finally:
        _held.reset(token)
        _give_back(lock, path, own)
        _remove_if_empty(made)


def _give_back(lock: BaseFileLock, path: Path, own: os.stat_result | None) -> None:
    with suppress(OSError):
        # While it is locked: who has opened it before finds out that it is gone, and makes another. Who deletes the
        # directory in the middle of a run, and starts another one there, has a file that is not ours.
        if own is not None and os.path.samestat(own, path.stat()):
            path.unlink()
    with suppress(OSError):
        lock.release()


def _remove_if_empty(made: Sequence[Path]) -> None:
    """A run that ended before it wrote anything leaves no empty directories."""
    with suppress(OSError):
        for directory in made:
            directory.rmdir()
