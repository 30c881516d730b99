"""A run that is killed in a step and in a save, and resumed, is the run that was never interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from puma_hf.trainer.checkpoints import last_whole_checkpoint, why_not_whole
from tests.forks import run_worker
from tests.trainer.kill_and_resume_worker import Recorder, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def adapter(trainer: Recorder) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


def losses(folder: Path) -> dict[tuple[int, int, int], float]:
    """By optimizer step, epoch and batch; what was done twice must have been the same."""
    found: dict[tuple[int, int, int], float] = {}
    for line in folder.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        step, epoch, batch, loss = json.loads(line)
        assert found.setdefault((step, epoch, batch), loss) == pytest.approx(loss, abs=1e-6)
    return found


def killed(*paths: Path, runs: list[dict[str, Any]]) -> None:
    """The same run in processes of their own, one after the other, none of which survives."""
    run_worker("tests.trainer.kill_and_resume_worker", *paths, json.dumps(runs))


def test_a_killed_run_continues_as_if_nothing_had_happened(
    puma_dir: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    images[1].save(image)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    uninterrupted = run(puma_dir, image, straight)
    # Short epochs, so that the number of steps alone does not tell where a run is, and one left-over batch in most.
    assert [sum(epoch == number for _, epoch, _ in losses(straight)) for number in range(4)] == [6, 5, 5, 5]
    last = uninterrupted.state.global_step
    assert last == 9

    # In the second step after a checkpoint; then, resumed from that, in the next save.
    killed(puma_dir, image, broken, runs=[{"step": 4}, {"resume": True, "save": 6}])
    assert (broken / "checkpoint-6" / "optimizer.pt").is_file()
    assert why_not_whole(broken / "checkpoint-6") is not None
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-3")
    resumed = run(puma_dir, image, broken, resume=True)

    assert resumed.state.global_step == last
    assert losses(broken) == pytest.approx(losses(straight), abs=1e-6)
    torch.testing.assert_close(adapter(resumed), adapter(uninterrupted), rtol=0, atol=1e-6)
