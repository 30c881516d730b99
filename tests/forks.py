"""Runs in processes of their own, for tests of kills and of several processes: real ones, with the imports shared."""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from tests.patience import PATIENCE
from tests.warm_process import WarmProcess

ROOT = Path(__file__).parents[1]
SHARES = (0, 1)


@cache
def _warm() -> WarmProcess:
    """One for all workers of all tests: it has imported the libraries, and nothing of pytest or puma_hf."""
    folder = tempfile.TemporaryDirectory(prefix="puma-hf-tests-", ignore_cleanup_errors=True)
    variables = {"PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    process = WarmProcess(Path(folder.name), **variables)
    # From Python 3.13 a forked worker drops what atexit holds: the folder's last reference there would remove it here.
    process.temporary = folder
    atexit.register(folder.cleanup)
    atexit.register(process.close)  # called before the other
    return process


def run_worker(module: str, *arguments: str | Path) -> None:
    """Run a module of the tests as a script, which may fork: in a process of its own, which nothing ran in before."""
    ended = _warm().run([sys.executable, "-P", __file__, module, *map(str, arguments)], cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


def in_a_fork(action: Callable[[], object]) -> int:
    """Start it in a process of its own, which shares the imported libraries; the id of the process."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # OpenMP's other threads are not in a fork, and whoever gives them work there crashes
        # tqdm's own locks are shared by forks, and whoever is killed with one never gives it back. The class whose bar
        # was the first to be shown has its own, and all that are made of it use that one.
        lock = threading.RLock()
        for shown in (tqdm, auto_tqdm):
            shown.set_lock(lock)
        try:
            action()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1 if sys.exc_info()[0] else 0)
    return process


def exit_signal(process: int) -> int:
    """Wait for a process: the signal that ended it, 0 for none."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code > 0:
        raise SystemExit("A process ended with an error, see above.")
    return -code


def in_two_processes(share: Callable[[int], object]) -> None:
    """Call it in two processes, with the number of each, which know of each other what a launcher tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def launched(rank: int) -> None:
        count = str(len(SHARES))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
        share(rank)
        dist.destroy_process_group()

    for process in [in_a_fork(lambda rank=rank: launched(rank)) for rank in SHARES]:  # type: ignore[misc]
        exit_signal(process)


def kill_in_write(ending: str, number: int) -> None:
    """Kill this process in its n-th write of a file whose name ends so: its name is still to be given."""
    written = 0
    replace = os.replace

    def dying_replace(source: Any, target: Any) -> None:
        nonlocal written
        if str(target).endswith(ending):
            written += 1
            if written == number:
                with open(source, "rb+") as file:  # half of it reached the disk
                    file.truncate(os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying_replace


if __name__ == "__main__":  # what `run_worker` runs
    signal.alarm(PATIENCE)
    gc.freeze()  # see conftest.py
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
