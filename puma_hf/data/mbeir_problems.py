"""What is wrong with a file of M-BEIR: all of it in one report, not the first line alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, ParamSpec, TypeVar

_LFS_POINTER = b"version https://git-lfs.github.com/"
SHOWN: Final = 5  # how many of the wrong lines a report quotes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class MBEIRFormatError(ValueError):
    """A file of an M-BEIR folder is not what the format says; the message names the file and the line.

    Args:
        message: What is wrong, where, and what to do.
        kind: The kind of mistake in a few words, by which `Problems` counts.
    """

    def __init__(self, message: str, kind: str = "wrong field") -> None:
        super().__init__(message)
        self.kind = kind


class Problems:
    """The wrong lines of a file, collected while the reading goes on.

    At the end of the `with` block one error says how many there are, of which kinds, and quotes the first five. A
    single wrong line is raised as it is. Memory does not grow with the number of wrong lines.

    Args:
        path: The file, or the folder of several.

    Raises:
        FileNotFoundError: At the end of the block, if all that is wrong are missing images.
        MBEIRFormatError: At the end of the block, if there is anything else.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from puma_hf.data.mbeir_problems import MBEIRFormatError, Problems

    >>> try:
    ...     with Problems(Path("pool.jsonl")) as problems:
    ...         for line in (3, 8):
    ...             problems.add(MBEIRFormatError(f"pool.jsonl, line {line}: no did", "missing field"))
    ... except MBEIRFormatError as error:
    ...     print(error)
    pool.jsonl: 2 problems (missing field: 2):
    - pool.jsonl, line 3: no did
    - pool.jsonl, line 8: no did
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._shown: list[MBEIRFormatError | FileNotFoundError] = []
        self._all_files_missing = True

    def __bool__(self) -> bool:
        return bool(self._shown)

    def add(self, error: MBEIRFormatError | FileNotFoundError) -> None:
        """Count a wrong line.

        Args:
            error: What would have been raised for it.
        """
        is_missing = isinstance(error, FileNotFoundError)
        self.counts["missing image" if isinstance(error, FileNotFoundError) else error.kind] += 1
        self._all_files_missing &= is_missing
        if len(self._shown) < SHOWN:
            self._shown.append(error)

    def attempt(
        self, read: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result | None:
        """What a function returns, or None if it found something wrong, which is counted.

        Args:
            read: The function.
            args: Its arguments.
            kwargs: Its arguments by name.

        Returns:
            What it returns, or None.
        """
        try:
            return read(*args, **kwargs)
        except (MBEIRFormatError, FileNotFoundError) as error:
            self.add(error)
            return None

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._shown:
            raise self.report()

    def report(self) -> MBEIRFormatError | FileNotFoundError:
        """The error that tells of all of them; there must be one."""
        total = self.counts.total()
        if total == 1:
            return self._shown[0]
        kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())
        first = "" if total <= SHOWN else f" The first {SHOWN}"
        lines = "".join(f"\n- {error}" for error in self._shown)
        message = f"{self.path}: {total} problems ({kinds}){'.' if first else ''}{first}:{lines}"
        return FileNotFoundError(message) if self._all_files_missing else MBEIRFormatError(message, "several")


def check_is_file(path: Path) -> None:
    """Refuse a file that is not there, or of which there is only a note of Git LFS.

    Args:
        path: A file of the layout.

    Raises:
        FileNotFoundError: If it is missing, or a clone without Git LFS left a pointer in its place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; M-BEIR's layout needs it (TIGER-Lab/M-BEIR on the Hub)")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise FileNotFoundError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` there")
