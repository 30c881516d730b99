"""A run that is killed in a step and in a save, and resumed, is the run that was never interrupted."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer_callback import TrainerState

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.trainer.checkpoints_puma import MARKER, last_whole_checkpoint, mark_whole, why_not_whole
from tests.forks import run_worker
from tests.trainer.conftest import MakeArguments, MakeStudent
from tests.trainer.kill_and_resume_worker import Recorder
from tests.trainer.kill_and_resume_worker import run as train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three whole checkpoints, written in the order of their steps, and what is none."""
    for step in (2, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "1_Module").mkdir(parents=True)
        (folder / "large.bin").write_bytes(b"x" * 99)
        (folder / "1_Module" / "small.json").write_text("{}")
        mark_whole(folder)
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())


def test_the_checkpoint_written_last_is_the_last(run: Path) -> None:
    assert last_whole_checkpoint(str(run)) == str(run / "checkpoint-10")
    assert last_whole_checkpoint(run / "runs") is None
    assert last_whole_checkpoint(run / "missing") is None


def test_a_run_that_went_back_goes_on_from_its_own_checkpoint(run: Path) -> None:
    """As after resuming from checkpoint-2: checkpoint-10 is of the branch that was given up."""
    mark_whole(run / "checkpoint-9")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-9")


@pytest.mark.parametrize("damage", ["no marker", "half a marker", "an empty marker", "a file is gone", "a file is cut"])
def test_a_broken_checkpoint_is_passed_over_and_named(damage: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "checkpoint-10"
    if damage == "no marker":
        (folder / MARKER).unlink()
    elif damage.endswith("marker"):
        (folder / MARKER).write_text("[]" if "empty" in damage else '{"files": {"large')
    elif damage == "a file is gone":
        (folder / "large.bin").unlink()
    else:
        (folder / "large.bin").write_bytes(b"x")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-9")
    assert caplog.text.count("Passing over") == 1
    reason = "large.bin is missing or cut off" if "file" in damage else f"it has no {MARKER}, which is written last"
    assert why_not_whole(folder) == reason
    assert why_not_whole(run / "checkpoint-9") is None
    assert why_not_whole(run / "checkpoint-7") is not None  # there is none


# --- of a trainer


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict({"anchor": [f"query {row}" for row in range(8)], "positive": ["a", "b", "c", "d"] * 2})


@pytest.fixture
def make_trainer(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> Callable[..., Any]:
    def make(**changes: Any) -> PumaTrainer:
        model = make_student()
        arguments = make_arguments(**{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **changes})
        return PumaTrainer(model=model, args=arguments, train_dataset=pairs, loss=MultimodalMACLoss(model))

    return make


def test_checkpoints_of_a_run_are_whole_and_rotated(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=3, save_total_limit=2)
    trainer.train()
    run = tmp_path / "run"
    assert names(run) == ["checkpoint-2", "checkpoint-3"]
    assert last_whole_checkpoint(run) == str(run / "checkpoint-3")
    assert trainer.args.save_total_limit == 2
    noted = json.loads((run / "checkpoint-3" / MARKER).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(noted)


def test_rotation_waits_until_the_new_checkpoint_is_whole(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit=1 there is a whole checkpoint at every moment after the first."""
    trainer = make_trainer(max_steps=2)
    seen: list[list[str]] = []

    def note(folder: Path) -> None:
        seen.append(names(tmp_path / "run"))
        mark_whole(folder)

    monkeypatch.setattr("puma_hf.trainer.trainer_puma.mark_whole", note)
    trainer.train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert names(tmp_path / "run") == ["checkpoint-2"]


def safetensors_is_full(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def torch_is_full(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def json_is_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = [
    (transformers.modeling_utils, "safe_save_file", safetensors_is_full),
    (torch, "save", torch_is_full),
    (TrainerState, "save_to_json", json_is_full),
]


@pytest.mark.parametrize(("module", "name", "full"), WRITERS)
def test_a_full_disk_loses_nothing(
    module: Any,
    name: str,
    full: Callable[..., None],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    make_trainer(max_steps=1).train()
    trainer = make_trainer(max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(
            OSError,
            match=r"checkpoint-2' could not be written \(.*\)\. The last .*checkpoint-1': resume .* Free some space",
        ):
            trainer.train(resume_from_checkpoint=True)
    assert trainer.args.save_total_limit == 1
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    assert last_whole_checkpoint(run) == str(run / "checkpoint-1")
    resumed = make_trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_only_whole_checkpoints_are_resumed_from(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"run' holds no whole checkpoint to continue from"):
        make_trainer().train(resume_from_checkpoint=True)
    make_trainer(max_steps=2, save_total_limit=2).train()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    named = r"checkpoint-2' is not whole: optimizer\.pt is missing or cut off\. The last whole .*checkpoint-1'"
    with pytest.raises(ValueError, match=named):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    assert why_not_whole(run / "checkpoint-2") is None
    # From the last step on there is nothing more to do than to take its weights.
    finished = make_trainer(max_steps=2)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == 2
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in finished.model.named_parameters())


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def adapter(trainer: Recorder) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """By optimizer step and rows of the batch; what was done twice must have been the same."""
    found: dict[tuple[int, str], float] = {}
    for line in folder.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        step, rows, loss = json.loads(line)
        assert found.setdefault((step, rows), loss) == pytest.approx(loss, abs=1e-6)
    return found


def killed(*paths: Path | str, runs: list[dict[str, Any]]) -> None:
    """The same run in processes of their own, one after the other, none of which survives."""
    run_worker("tests.trainer.kill_and_resume_worker", *paths, json.dumps(runs))


@pytest.mark.parametrize("weights", ["", "sampled"])  # at two depths, of which each batch draws one
def test_a_killed_run_continues_as_if_nothing_had_happened(
    puma_dir: Path, images: list[Image.Image], tmp_path: Path, weights: str
) -> None:
    image = tmp_path / "image.png"
    images[1].save(image)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    uninterrupted = train(puma_dir, image, straight, weights)
    # Epochs of 6, 5, 5 and 5 batches, most with one left over: the number of steps does not tell where a run is.
    assert len(losses(straight)) == 21
    last = uninterrupted.state.global_step
    assert last == 9

    # In the second step after a checkpoint; then, resumed from that, in the next save.
    killed(puma_dir, image, broken, weights, runs=[{"step": 4}, {"resume": True, "save": 6}])
    assert (broken / "checkpoint-6" / "optimizer.pt").is_file()
    assert why_not_whole(broken / "checkpoint-6") is not None
    assert last_whole_checkpoint(broken) == str(broken / "checkpoint-3")
    resumed = train(puma_dir, image, broken, weights, resume=True)

    assert resumed.state.global_step == last
    assert losses(broken) == pytest.approx(losses(straight), abs=1e-6)
    torch.testing.assert_close(adapter(resumed), adapter(uninterrupted), rtol=0, atol=1e-6)
