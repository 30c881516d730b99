from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

import puma_hf.trainer.cached_teacher as cached
from puma_hf import PumaDistillationTrainer, SelfDistillationLoss
from puma_hf.trainer import FrozenTeacher
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.teacher_cache import MANIFEST, TeacherCache
from tests.forks import exit_signal, in_a_fork
from tests.tiny import build_qwen2_vl
from tests.trainer.conftest import MakeArguments, MakeStudent

MakeTrainer = Callable[..., PumaDistillationTrainer]


@pytest.fixture
def make_trainer(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> MakeTrainer:
    def make(**changes: Any) -> PumaDistillationTrainer:
        arguments: dict[str, Any] = {
            "model": changes.pop("model", None) or make_student(),
            "teacher": qwen_dir,
            "teacher_mode": "cached",
            "teacher_cache": tmp_path / "cache",
            "args": changes.pop("args", None) or make_arguments(),
            "train_dataset": items,
        }
        return PumaDistillationTrainer(**{**arguments, **changes})

    return make


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five shards of 16 cells."""
    smaller = cached.compute_states

    def compute(cache: TeacherCache, expected: Any, *rest: Any) -> None:
        smaller(cache, cached.replace(expected, shard_size=3), *rest)

    monkeypatch.setattr(cached, "compute_states", compute)


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def features_of(model: SentenceTransformer, rows: list[Any]) -> dict[str, Any]:
    return dict(model[0].preprocess(rows))


def test_states_are_those_of_the_frozen_teacher(
    qwen_dir: Path, make_trainer: MakeTrainer, items: Dataset, small_shards: None
) -> None:
    trainer = make_trainer()
    model = trainer.model
    frozen = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    for rows in (items["item"][:5], items["item"][9:12]):  # other batches than those of the cache
        features = features_of(model, rows)
        expected = frozen.states(features)
        trainer.teacher.add_states(features)
        torch.testing.assert_close(features["teacher_state"], expected, atol=1e-5, rtol=0)
    alone = features_of(model, [items["item"][0]])
    trainer.teacher.add_states(alone)
    assert alone["teacher_state"].dtype == torch.float32
    assert not alone["teacher_state"].requires_grad


def test_equal_cells_are_asked_once(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    texts = ["red", "green", "red", "blue", "green", "red", "an apple"]
    rows = Dataset.from_dict({"anchor": texts, "positive": ["red", "a table", *["blue"] * 5]})
    asked: list[int] = []
    states = FrozenTeacher.states

    def count(self: FrozenTeacher, features: dict[str, Any]) -> Tensor:
        asked.append(len(features["input_ids"]))
        return states(self, features)

    monkeypatch.setattr(FrozenTeacher, "states", count)
    trainer = make_trainer(train_dataset=rows, eval_dataset=rows.select(range(3)))
    assert sum(asked) == 5
    stored = [load_file(path) for path in shard_files(tmp_path / "cache")]
    ids = torch.cat([shard["content_ids"] for shard in stored])
    assert len(ids) == len(ids.unique()) == 5
    trainer.train()  # and every cell is found


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("columns", [1, 2])
def test_training_and_evaluation(
    make_trainer: MakeTrainer, make_arguments: MakeArguments, items: Dataset, columns: int
) -> None:
    rows = items if columns == 1 else items.rename_column("item", "anchor").add_column("positive", items["item"][::-1])
    held_out = Dataset.from_dict({name: ["a red apple", "a table"] for name in rows.column_names})
    args = make_arguments(max_steps=16, per_device_train_batch_size=8)
    trainer = make_trainer(train_dataset=rows, eval_dataset=held_out, args=args)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert trainer.evaluate()["eval_loss"] < before


def test_several_datasets(make_trainer: MakeTrainer, make_student: MakeStudent) -> None:
    model = make_student()
    rows = DatasetDict(
        text=Dataset.from_dict({"anchor": ["red", "green", "blue", "an apple"]}),
        pairs=Dataset.from_dict({"anchor": ["a table", "red"] * 2, "positive": ["x", "y", "z", "w"]}),
    )
    loss = SelfDistillationLoss(model)
    trainer = make_trainer(model=model, train_dataset=rows, loss={"text": loss, "pairs": loss})
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_deep_layers_are_freed(qwen_dir: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Any]] = []
    create = FrozenTeacher.__init__

    def watch(self: FrozenTeacher, student: Any, dropped_layers: Any) -> None:
        create(self, student, dropped_layers)
        references.append(weakref.ref(self))
        references.extend(weakref.ref(module) for module in dropped_layers.modules())
        references.extend(weakref.ref(parameter) for parameter in dropped_layers.parameters())

    monkeypatch.setattr(FrozenTeacher, "__init__", watch)
    trainer = make_trainer()
    gc.collect()
    assert len(references) > 20
    assert all(reference() is None for reference in references)
    assert len(puma_model(trainer.model).language_model.layers) == 2


def test_a_complete_cache_is_read_without_the_teacher(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_trainer()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("puma_hf.trainer.teacher.StoredModel", refuse)
    make_trainer().train()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_default_place_is_in_the_output(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(teacher_cache=None)
    assert (tmp_path / "run" / "teacher_cache" / MANIFEST).is_file()


# --- interrupted


def whole_cache(folder: Path) -> dict[str, dict[str, Tensor]]:
    # Copies: the files themselves are mapped, and change with them.
    return {path.name: {k: v.clone() for k, v in load_file(path).items()} for path in shard_files(folder)}


def same(first: dict[str, dict[str, Tensor]], second: dict[str, dict[str, Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensors[name], second[file][name]) for file, tensors in first.items() for name in tensors
    )


def killed_while(run: Callable[[], Any]) -> None:
    """Run in a process of its own, which is to end by SIGKILL."""
    assert exit_signal(in_a_fork(run)) == signal.SIGKILL


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("when", ["before a shard", "within a shard", "before the last manifest"])
def test_killed_and_continued(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    make_trainer(teacher_cache=tmp_path / "uninterrupted")
    expected = whole_cache(tmp_path / "uninterrupted")
    assert len(expected) == 6
    replace, calls = os.replace, []
    # The manifest comes first and last, the shards between.
    stop = {"before a shard": 3, "within a shard": 4, "before the last manifest": 8}[when]

    def kill(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == stop:
            if when == "within a shard":
                Path(source).write_bytes(Path(source).read_bytes()[:-7])
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    killed_while(make_trainer)
    monkeypatch.setattr(os, "replace", replace)
    written = whole_cache(tmp_path / "cache")
    assert len(written) == stop - 2
    assert list((tmp_path / "cache").glob(".*.tmp"))
    assert json.loads((tmp_path / "cache" / MANIFEST).read_text())["complete"] is False
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path / "cache")}
    make_trainer()
    assert same(whole_cache(tmp_path / "cache"), expected)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was there was not computed again
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert json.loads((tmp_path / "cache" / MANIFEST).read_text())["complete"] is True


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["gone", "cut off", "of another shard"])
def test_a_damaged_shard_is_computed_again(
    make_trainer: MakeTrainer, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer()
    files = shard_files(tmp_path / "cache")
    expected = whole_cache(tmp_path / "cache")
    if damage == "gone":
        files[1].unlink()
    elif damage == "cut off":
        files[1].write_bytes(files[1].read_bytes()[:-1])
    else:
        files[1].write_bytes(files[2].read_bytes())
    make_trainer()
    assert "Shard 1 of the teacher states" in caplog.text
    assert same(whole_cache(tmp_path / "cache"), expected)


# --- what is refused


def test_another_dataset(make_trainer: MakeTrainer, items: Dataset) -> None:
    make_trainer()
    with pytest.raises(ValueError, match=r"are of another dataset: dataset is '\w{12}' there and '\w{12}' here"):
        make_trainer(train_dataset=items.select(range(15)))
    with pytest.raises(ValueError, match="are of another dataset"):
        make_trainer(eval_dataset=items)


def test_another_teacher(
    make_trainer: MakeTrainer, qwen_dir: Path, full_dir: Path, tmp_path: Path, make_student: MakeStudent
) -> None:
    make_trainer()
    other = build_qwen2_vl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"are of another teacher: teacher is '\w{12}' there and '\w{12}' here"):
        make_trainer(teacher=other)
    # The same weights in another directory, or held already, are no other teacher.
    make_trainer(teacher=full_dir)
    model = make_student()
    make_trainer(model=model, teacher=FrozenTeacher.from_pretrained(qwen_dir, puma_model(model)))


def test_another_processing(make_trainer: MakeTrainer, make_student: MakeStudent) -> None:
    make_trainer()
    model = make_student()
    model[0].processing_kwargs = {"text": {"max_length": 40}}
    with pytest.raises(ValueError, match=r"are made with other processing settings: processing is \{.*\} there and"):
        make_trainer(model=model)


def test_another_hidden_size_and_precision(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer()
    path = tmp_path / "cache" / MANIFEST
    for name, value, message in (
        ("hidden_size", 64, r"of another hidden size: hidden_size is 64 there and 32 here"),
        ("precision", "bfloat16", r"computed in another data type: precision is 'bfloat16' there and 'float32' here"),
    ):
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | {name: value}))
        with pytest.raises(ValueError, match=message):
            make_trainer()
        path.write_text(text)


def test_a_manifest_of_something_else(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for content in ("{", '{"name": 1}'):
        (tmp_path / "cache" / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=r"is no manifest of teacher states .*choose another: teacher_cache="):
            make_trainer()


def test_a_cache_that_is_a_file(make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr(cached.StatesJob, "dataset_sha256", lambda job: pytest.fail("the dataset was read first"))
    with pytest.raises(NotADirectoryError, match=r"teacher_cache='.*cache' must be a directory, .* is a file\. Choose"):
        make_trainer()


def test_content_that_was_not_stored(make_trainer: MakeTrainer, images: list[Image.Image]) -> None:
    trainer = make_trainer()
    model = trainer.model
    features = features_of(model, [{"text": "apple 4"}, "never seen", {"image": images[0], "text": "nor this"}])
    with pytest.raises(ValueError, match=r"lack the samples \[.*1, 2\] of this batch.*or choose teacher_mode='frozen'"):
        trainer.teacher.add_states(features)
    del features["content_ids"]
    with pytest.raises(ValueError, match=r"have no 'content_ids', by which stored teacher states are found\. Use"):
        trainer.teacher.add_states(features)


def test_datasets_that_cannot_be_gone_over(make_trainer: MakeTrainer, items: Dataset) -> None:
    with pytest.raises(ValueError, match=r"train_dataset is a IterableDataset, but .*needs a datasets\.Dataset"):
        make_trainer(train_dataset=items.to_iterable_dataset())


def test_states_that_are_not_finite(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    states = FrozenTeacher.states
    monkeypatch.setattr(FrozenTeacher, "states", lambda self, features: states(self, features) * float("nan"))
    with pytest.raises(ValueError, match=r"rows 0 to 3 of column 'item' are NaN or infinite\. Run the teacher in bf"):
        make_trainer()


def test_other_processes_wait_and_read(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = cached.PartialState

    class Second:
        is_main_process, process_index = False, 1

        def wait_for_everyone(self) -> None:
            assert not (tmp_path / "cache").exists()
            with monkeypatch.context() as main:
                main.setattr(cached, "PartialState", real)
                make_trainer()

    monkeypatch.setattr(cached, "PartialState", Second)
    make_trainer().train()


def test_a_cache_that_this_machine_does_not_see(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second:
        is_main_process, process_index = False, 1

        def wait_for_everyone(self) -> None: ...

    monkeypatch.setattr(cached, "PartialState", Second)
    with pytest.raises(RuntimeError, match=r"are not complete for process 1, .*that all machines share"):
        make_trainer()
