"""The commands under the real launchers: two processes on the CPU, one adapter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from puma_hf.trainer.checkpoints_puma import last_whole_checkpoint
from tests.data.mbeir_builder import build_mbeir
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow

STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mbeir(tmp_path_factory.mktemp("data") / "mbeir")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: list[str], words: list[object]) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes; both must end by themselves."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, "-m", "puma_hf.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)


def check_run(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    assert finished.returncode == 0, finished.stderr[-3000:]
    # Only the first process speaks.
    assert finished.stdout.count("saved the adapter to") == 1
    assert finished.stderr.count("Saved the adapter to") == 1
    assert finished.stderr.count("2 device(s) x 4 rows x 1 batch(es)") == 1
    checkpoint = last_whole_checkpoint(output)
    assert checkpoint is not None
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (STEPS, STEPS)
    trained = load_file(output / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    # Each process has a random state of its own, and both reached the end.
    assert len(list(Path(checkpoint).glob("rng_state_*.pth"))) == 2


def quick(output: Path) -> list[object]:
    return ["--output", output, "--batch-size", 4, "--max-steps", STEPS, "--save-steps", STEPS, "--lora-r", 2]


def test_distil_under_torchrun(puma_dir: Path, qwen_dir: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {puma_dir}\ndata: {data}\nteacher: {qwen_dir}\nlogging_steps: 1\n")
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    words = ["distill", "--config", recipe, *quick(tmp_path / "out")]
    check_run(launch(launcher, words), tmp_path / "out")
    assert (tmp_path / "out" / "distill.yaml").is_file()


def test_train_under_accelerate(puma_dir: Path, data: Path, tmp_path: Path) -> None:
    # Of accelerate's launchers that for GPUs needs no MPI; the environment keeps it on the CPU.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    words = ["train", puma_dir, "--data", data, *quick(tmp_path / "out")]
    check_run(launch(launcher, words), tmp_path / "out")
    assert (tmp_path / "out" / "train.yaml").is_file()
