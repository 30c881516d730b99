from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from datasets import Dataset
from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.files import ADAPTER_CONFIG
from puma_hf.trainer import checkpoints
from puma_hf.trainer.checkpoints import (
    HASHED_BYTES,
    MANIFEST_FILE,
    UNFINISHED,
    explain_full_disk,
    last_whole_checkpoint,
    require_whole_checkpoint,
    rotate_checkpoints,
    why_not_whole,
    write_manifest,
    written_whole,
)
from tests.trainer.conftest import MakeArguments, MakeStudent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three whole checkpoints, written in the order of their steps, and what is none."""
    for step in (2, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "1_Module").mkdir(parents=True)
        (folder / "large.bin").write_bytes(b"x" * (HASHED_BYTES + 1))
        (folder / "1_Module" / "small.json").write_text("{}")
        write_manifest(folder)
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())


def test_a_manifest_notes_every_file(run: Path) -> None:
    noted = json.loads((run / "checkpoint-10" / MANIFEST_FILE).read_text())
    assert set(noted["files"]) == {"large.bin", "1_Module/small.json"}
    assert noted["files"]["large.bin"] == {"size": HASHED_BYTES + 1}
    assert noted["files"]["1_Module/small.json"]["size"] == 2
    assert len(noted["files"]["1_Module/small.json"]["sha256"]) == 64
    assert not list(run.rglob("*.unfinished"))
    before = (run / "checkpoint-10" / MANIFEST_FILE).read_text()
    write_manifest(run / "checkpoint-10")  # it does not note itself
    assert (run / "checkpoint-10" / MANIFEST_FILE).read_text() == before
    assert noted["number"] == 3


def test_the_checkpoint_written_last_is_the_last(run: Path) -> None:
    assert last_whole_checkpoint(run) == str(run / "checkpoint-10")
    assert last_whole_checkpoint(str(run)) == str(run / "checkpoint-10")
    assert last_whole_checkpoint(run / "runs") is None
    assert last_whole_checkpoint(run / "missing") is None


def test_a_run_that_went_back_goes_on_from_its_own_checkpoint(run: Path) -> None:
    """As after resuming from checkpoint-2: checkpoint-10 is of the branch that was given up."""
    write_manifest(run / "checkpoint-9")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-9")
    rotate_checkpoints(run / "checkpoint-9", 2)
    assert names(run) == ["checkpoint-10", "checkpoint-9", "checkpoint-best"]
    rotate_checkpoints(run / "checkpoint-9", 1)
    assert names(run) == ["checkpoint-9", "checkpoint-best"]


def test_a_manifest_without_a_number_is_older_than_those_with_one(run: Path) -> None:
    manifest = run / "checkpoint-10" / MANIFEST_FILE
    manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))
    assert why_not_whole(manifest.parent) is None
    assert last_whole_checkpoint(run) == str(run / "checkpoint-9")


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()


def with_half_a_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text('{"files": {"large')


def with_an_empty_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("[]")


def without_a_file(folder: Path) -> None:
    (folder / "large.bin").unlink()


def with_a_cut_file(folder: Path) -> None:
    (folder / "large.bin").write_bytes(b"x" * HASHED_BYTES)


def with_a_changed_file(folder: Path) -> None:
    (folder / "1_Module" / "small.json").write_text("[]")


BROKEN = [
    (without_manifest, rf"it has no {MANIFEST_FILE}, which is written last"),
    (with_half_a_manifest, rf"its {MANIFEST_FILE} cannot be read \("),
    (with_an_empty_manifest, rf"its {MANIFEST_FILE} cannot be read \("),
    (without_a_file, r"large\.bin is missing"),
    (with_a_cut_file, rf"large\.bin has {HASHED_BYTES} bytes instead of {HASHED_BYTES + 1}"),
    (with_a_changed_file, r"1_Module/small\.json was changed"),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN)
def test_a_broken_checkpoint_is_passed_over_and_named(
    damage: Callable[[Path], None], reason: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / "checkpoint-10")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-9")
    assert caplog.text.count("Passing over") == 1
    with pytest.raises(ValueError, match=rf"checkpoint-10' is not whole: {reason}.*last whole one is '.*checkpoint-9'"):
        require_whole_checkpoint(run / "checkpoint-10")
    assert require_whole_checkpoint(run / "checkpoint-9") == str(run / "checkpoint-9")


def test_a_missing_checkpoint_is_an_error_too(run: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-7' is no folder\. The last whole one is '.*checkpoint-10'"
    ):
        require_whole_checkpoint(run / "checkpoint-7")
    with pytest.raises(FileNotFoundError, match=r"No whole checkpoint is in '.*runs': start again without resume_from"):
        require_whole_checkpoint(run / "runs" / "checkpoint-7")


def test_rotation_spares_the_newest_and_the_best(run: Path) -> None:
    for step in (10, 2, 9):  # written in this order
        write_manifest(run / f"checkpoint-{step}")
    rotate_checkpoints(run / "checkpoint-9", None)
    rotate_checkpoints(run / "checkpoint-9", 3)
    assert names(run) == ["checkpoint-10", "checkpoint-2", "checkpoint-9", "checkpoint-best"]
    rotate_checkpoints(run / "checkpoint-9", 2)
    assert names(run) == ["checkpoint-2", "checkpoint-9", "checkpoint-best"]
    rotate_checkpoints(run / "checkpoint-9", 1, best=str(run / "checkpoint-2"))
    assert names(run) == ["checkpoint-2", "checkpoint-9", "checkpoint-best"]
    rotate_checkpoints(run / "checkpoint-9", 1)
    assert names(run) == ["checkpoint-9", "checkpoint-best"]


def test_rotation_deletes_broken_ones_first(run: Path) -> None:
    without_a_file(run / "checkpoint-9")
    rotate_checkpoints(run / "checkpoint-10", 2)
    assert names(run) == ["checkpoint-10", "checkpoint-2", "checkpoint-best"]


def test_a_rotation_that_is_killed_leaves_nothing_that_claims_to_be_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *args, **kwargs: None)
    rotate_checkpoints(run / "checkpoint-10", 1)
    assert why_not_whole(run / "checkpoint-2") is not None
    assert last_whole_checkpoint(run) == str(run / "checkpoint-10")


def test_a_full_disk_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"no whole checkpoint yet.*and start again\.$") as caught:  # noqa: SIM117
        with explain_full_disk(tmp_path / "checkpoint-3"):
            raise full
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is full


def test_other_errors_pass_through_a_save(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), PermissionError(errno.EACCES, "Permission denied")):
        with pytest.raises(type(error), match=r"shapes differ|Permission denied") as caught:  # noqa: SIM117
            with explain_full_disk(tmp_path):
                raise error
        assert caught.value is error


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with an adapter, and what is none of its files."""
    folder = tmp_path / "out"
    (folder / "checkpoint-1").mkdir(parents=True)
    for name in (ADAPTER_CONFIG, "weights", "train.yaml"):
        (folder / name).write_text("old")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_whole_takes_its_place(adapter: Path) -> None:
    (adapter / UNFINISHED).mkdir()
    (adapter / UNFINISHED / "half").write_text("of a run that was killed")
    with written_whole(adapter) as folder:
        (folder / "1_Module").mkdir()
        for name in (ADAPTER_CONFIG, "weights", "1_Module/config.json"):
            (folder / name).write_text("new")
        assert contents(adapter)["weights"] == "old"
    expected = {ADAPTER_CONFIG: "new", "weights": "new", "1_Module/config.json": "new", "train.yaml": "old"}
    assert contents(adapter) == expected
    assert not (adapter / UNFINISHED).exists()


def test_what_cannot_be_written_whole_changes_nothing(adapter: Path) -> None:
    before = contents(adapter)
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"out' could not be written, as on a full disk .*There is no whole checkpoint yet"
    with pytest.raises(OSError, match=message):  # noqa: SIM117, PT012
        with explain_full_disk(adapter, adapter), written_whole(adapter) as folder:
            (folder / "weights").write_text("half")
            raise full
    assert contents(adapter) == before
    assert not (adapter / UNFINISHED).exists()


def test_no_mixture_of_two_adapters_is_one(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, moved = checkpoints.os.replace, []

    def one_file_only(path: Path, place: Path) -> None:
        if moved:
            raise OSError(errno.EIO, "gone")
        moved.append(path.name)
        replace(path, place)

    monkeypatch.setattr(checkpoints.os, "replace", one_file_only)
    with pytest.raises(OSError, match="gone"), written_whole(adapter) as folder:  # noqa: PT012
        for name in (ADAPTER_CONFIG, "weights"):
            (folder / name).write_text("new")
    assert moved == ["weights"]
    assert not (adapter / ADAPTER_CONFIG).exists()


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
    saved = torch.load(run / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 2
    noted = json.loads((run / "checkpoint-3" / MANIFEST_FILE).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(noted)


def test_rotation_waits_until_the_new_checkpoint_is_whole(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit=1 there is a whole checkpoint at every moment after the first."""
    trainer = make_trainer(max_steps=2)
    seen: list[list[str]] = []

    def note(folder: Path) -> Path:
        seen.append(names(tmp_path / "run"))
        return write_manifest(folder)

    monkeypatch.setattr("puma_hf.trainer.puma.write_manifest", note)
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
            OSError, match=r"checkpoint-2' could not be written, as on a full disk .*checkpoint-1'"
        ) as e:
            trainer.train(resume_from_checkpoint=True)
    assert e.value.errno == errno.ENOSPC
    assert "Free some space, or lower save_total_limit, and resume from there." in str(e.value)
    assert "\n" not in str(e.value)
    assert trainer.args.save_total_limit == 1
    assert names(run) == ["checkpoint-1", "checkpoint-2"]
    assert last_whole_checkpoint(run) == str(run / "checkpoint-1")
    resumed = make_trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_a_checkpoint_that_is_written_anew_is_not_whole_meanwhile(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(max_steps=1).train()
    again = make_trainer(max_steps=1)
    monkeypatch.setattr(TrainerState, "save_to_json", json_is_full)
    with pytest.raises(OSError, match="There is no whole checkpoint yet"):
        again.train()
    assert last_whole_checkpoint(tmp_path / "run") is None


def test_only_whole_checkpoints_are_resumed_from(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"run' holds no whole checkpoint to continue from\. Start without"):
        make_trainer().train(resume_from_checkpoint=True)
    make_trainer(max_steps=2, save_total_limit=2).train()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    named = r"checkpoint-2' is not whole: optimizer\.pt is missing\. The last whole one is '.*checkpoint-1'"
    with pytest.raises(ValueError, match=named):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    assert why_not_whole(run / "checkpoint-2") is None
