"""A process without puma_hf that has imported the large libraries, and forks for each script that it is to run.

These imports take seconds. With one such process several scripts start as in a process of their own, at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class WarmProcess:
    """Takes the place of `subprocess.run` for Python scripts; it starts to import at once, and nobody waits for it."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.temporary: Any = None  # whoever owns the folder may be kept here
        # -P: neither this folder nor the current one is a place to import from.
        command = [sys.executable, "-P", __file__]
        environment = {**os.environ, **variables}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `python -P SCRIPT ARGUMENTS`, in `cwd`; of the other options the environment is not taken over."""
        assert command[:2] == [sys.executable, "-P"]
        assert self.process.stdin
        assert self.process.stdout
        errors = self.folder / "stderr"
        job = {"argv": command[2:], "cwd": str(options["cwd"]), "stderr": str(errors)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, status, "", errors.read_text(errors="replace"))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _serve() -> None:
    import runpy
    import traceback

    import sentence_transformers  # noqa: F401 - what takes the time

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            os.chdir(job["cwd"])
            sys.argv = job["argv"]
            status = 1
            try:
                runpy.run_path(job["argv"][0], run_name="__main__")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # there is nothing to put in order, which would take a second


if __name__ == "__main__":
    _serve()
