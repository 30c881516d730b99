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
LAUNCHERS = {
    "distill": "torch.distributed.run --nproc_per_node 2 --master_port",
    # Of accelerate's launchers that for GPUs needs no MPI; the environment keeps it on the CPU.
    "train": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port",
}


@pytest.mark.parametrize("command", LAUNCHERS)
def test_two_processes_train_one_adapter(puma_dir: Path, qwen_dir: Path, tmp_path: Path, command: str) -> None:
    output, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    teacher = f"teacher: {qwen_dir}\n" if command == "distill" else ""
    recipe.write_text(f"model: {puma_dir}\ndata: {build_mbeir(tmp_path / 'mbeir')}\noutput: {output}\n{teacher}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["--batch-size", "4", "--max-steps", str(STEPS), "--save-steps", str(STEPS), "--lora-r", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}
    line = [*LAUNCHERS[command].split(), port, "-m", "puma_hf.cli", command, "--config", str(recipe), *words]
    finished = subprocess.run(
        [sys.executable, "-m", *line], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # Only the first process speaks.
    assert finished.stdout.count("saved the adapter to") == 1
    assert finished.stderr.count("2 device(s) x 4 rows x 1 batch(es)") == 1
    assert (output / f"{command}.yaml").is_file()
    checkpoint = last_whole_checkpoint(output)
    assert checkpoint is not None
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (STEPS, STEPS)
    trained = load_file(output / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    # Each process has a random state of its own, and both reached the end.
    assert len(list(Path(checkpoint).glob("rng_state_*.pth"))) == 2
