"""Build a folder whole or not at all, once for all processes that ask for it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def make_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written, unless it is there.

    It is written beside its place, under a hidden name, and renamed when it is whole. Processes that ask for it at
    the same time wait for the one that writes it. What a killed process left behind is removed by the next one.

    Args:
        folder: The folder. If it exists it is left alone, and `write` is not called.
        write: Writes into the empty folder it is given.

    Raises:
        OSError: If it cannot be written; what was written is removed.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from puma_hf.data.whole_folder import make_folder

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     make_folder(Path(parent, "data"), lambda folder: (folder / "a.txt").write_text("a") and None)
    ...     sorted(path.name for path in Path(parent, "data").iterdir())
    ['a.txt']
    ```
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return
        partial = folder.parent / f".{folder.name}.partial"
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            write(partial)
            os.replace(partial, folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in _NO_ROOM:
                raise
            raise OSError(
                error.errno,
                f"{folder} could not be written ({error.strerror or error}). Make room or choose another folder, and "
                "run it again",
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
