from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

from puma_hf import PumaDistillationTrainer, SelfDistillationLoss, prune
from puma_hf.checkpoint import Checkpoint, open_checkpoint
from puma_hf.trainer import FrozenTeacher, distillation
from puma_hf.trainer.lora_puma import puma_model
from puma_hf.trainer.teachers import EmbeddingTeacher, Teacher
from tests.forks import exit_signal, in_a_fork
from tests.tiny import FAMILIES, build_qwen2_vl, tiny_tokenizer
from tests.trainer.conftest import MakeArguments, MakeStudent


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder of twice the width, with other token ids."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.tiny.HIDDEN_SIZE", 64)
        patch.setitem(FAMILIES["qwen2_vl"][2], "hidden_size", 64)
        patch.setitem(FAMILIES["qwen2_vl"][3], "mrope_section", [2, 2, 4])
        source = build_qwen2_vl(folder / "source", seed=1, extra_tokens=("apple", "red"))
    prune(source, folder / "wide", num_kept_layers=4)
    return folder / "wide"


def trained_parameters(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def two_columns(items: Dataset) -> Dataset:
    return items.rename_column("item", "anchor").add_column("positive", items["item"][::-1])


@pytest.mark.parametrize(("columns", "metric"), [(1, "mse"), (2, "cosine"), (1, "relational")])
def test_loss_falls(
    qwen_dir: Path,
    wide_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    columns: int,
    metric: Any,
) -> None:
    model, relational = make_student(), metric == "relational"
    trainer = PumaDistillationTrainer(
        model=model,
        teacher=wide_dir if relational else qwen_dir,
        args=make_arguments(max_steps=16, per_device_train_batch_size=8),
        train_dataset=items if columns == 1 else two_columns(items),
        loss=SelfDistillationLoss(model, metric, relational_temperature=0.2),
    )
    rows = ["a red apple", *(cell for cell in items["item"][:3])]
    probe = trainer.data_collator.preprocess_fn(rows)  # with the rows, if the teacher reads them
    teacher_before = trainer.teacher.states(dict(probe))
    if relational:  # by its own token ids and prompt
        embedder = SentenceTransformer(str(wide_dir), trust_remote_code=True, device="cpu")
        torch.testing.assert_close(teacher_before, embedder.encode(rows, convert_to_tensor=True), atol=1e-5, rtol=0)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = trained_parameters(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert torch.equal(trainer.teacher.states(dict(probe)), teacher_before)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(not torch.equal(p, start[name]) for name, p in trained_parameters(model).items())


def test_states_are_in_the_features_and_labels_stay_free(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset
) -> None:
    model = make_student()
    trainer = PumaDistillationTrainer(
        model=model, teacher=qwen_dir, args=make_arguments(), train_dataset=two_columns(items)
    )
    labels = torch.tensor([1, 0])
    batch: dict[str, Any] = {"label": labels}
    texts = {"anchor": ["red", "an apple"], "positive": ["a table", "green"]}
    for column, inputs in texts.items():
        batch |= {f"{column}_{name}": value for name, value in model[0].preprocess(inputs).items()}
    features, found = trainer.collect_features(batch)
    assert found is labels
    teacher = [trainer.teacher.states(model[0].preprocess(inputs)) for inputs in texts.values()]
    for column, states in zip(features, teacher, strict=True):
        assert column["teacher_state"].shape == (2, 32)
        assert torch.equal(column["teacher_state"], states)
    loss = trainer.loss(features, found)
    student = [model(model[0].preprocess(inputs))["pooler_output"] for inputs in texts.values()]
    expected = (torch.stack(student) - torch.stack(teacher)).square().sum(dim=2).mean()
    torch.testing.assert_close(loss, expected)


# --- what is refused


def test_default_teacher(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_student()
    arguments = {"model": model, "args": make_arguments(), "train_dataset": items}
    with pytest.raises(ValueError, match=r"pruned from .tiny-qwen2-vl., which is not here\. .*--teacher"):
        PumaDistillationTrainer(**arguments)
    monkeypatch.chdir(qwen_dir.parent)
    assert len(PumaDistillationTrainer(**arguments).teacher.dropped_layers) == 2
    puma_model(model).config.source_name_or_path = None
    with pytest.raises(ValueError, match=r"was pruned from None, which is not here\. Pass teacher=.* \(--teacher\)"):
        PumaDistillationTrainer(**arguments)


def test_default_teacher_from_the_hub_has_the_revision_that_was_pruned(
    qwen_dir: Path,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    items: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_student()
    puma_model(model).config.source_name_or_path = "org/model"
    puma_model(model).config.source_revision = "0123abc"
    asked = {}

    def find(source: str, **options: Any) -> Checkpoint:
        asked.update(source=source, **options)
        return open_checkpoint(qwen_dir)

    monkeypatch.setattr("puma_hf.trainer.teachers.open_checkpoint", find)
    trainer = PumaDistillationTrainer(model=model, args=make_arguments(), train_dataset=items)
    assert len(trainer.teacher.dropped_layers) == 2
    assert asked == {"source": "org/model", "revision": "0123abc"}
    PumaDistillationTrainer(
        model=model, teacher="org/other", teacher_revision="v2", args=make_arguments(), train_dataset=items
    )
    assert asked == {"source": "org/other", "revision": "v2"}


MakeTrainer = Callable[..., PumaDistillationTrainer]


@pytest.fixture
def make_cached(
    qwen_dir: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> MakeTrainer:
    def make(metric: Any = "mse", **changes: Any) -> PumaDistillationTrainer:
        model = changes.pop("model", None) or make_student()
        arguments: dict[str, Any] = {
            "model": model,
            "loss": SelfDistillationLoss(model, metric, relational_temperature=0.5),
            "teacher": qwen_dir,
            "teacher_mode": "cached",
            "teacher_cache": tmp_path / "cache",
            "args": changes.pop("args", None) or make_arguments(),
            "train_dataset": items,
        }
        return PumaDistillationTrainer(**{**arguments, **changes})

    return make


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six files of 16 rows."""
    monkeypatch.setattr(distillation, "ROWS_PER_FILE", 3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inputs of each batch that a teacher is asked."""
    counts: list[int] = []
    for kind in (FrozenTeacher, EmbeddingTeacher):

        def count(self: Teacher, features: dict[str, Any], states: Any = kind.states) -> Any:
            counts.append(len(features["input_ids"]))
            return states(self, features)

        monkeypatch.setattr(kind, "states", count)
    return counts


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.arrow"))


@pytest.mark.usefixtures("small_files")
def test_stored_states_are_those_of_the_frozen_teacher(
    qwen_dir: Path, make_cached: MakeTrainer, items: Dataset, tmp_path: Path
) -> None:
    rows = two_columns(items)
    trainer = make_cached(train_dataset=rows)
    frozen = FrozenTeacher.from_pretrained(qwen_dir, puma_model(trainer.model))
    for row in (0, 5, 15):
        stored = torch.tensor(trainer.train_dataset[row]["teacher_states"])
        cells = [rows[row]["anchor"], rows[row]["positive"]]
        expected = torch.cat([frozen.states(trainer.model[0].preprocess([cell])) for cell in cells])
        torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)
    assert len(files_of(tmp_path / "cache")) == 6


def test_rows_whose_states_cannot_be_stored(make_cached: MakeTrainer, items: Dataset) -> None:
    rows = {"labels {'label'}": items.add_column("label", [1.0] * len(items)), "a Dataset": items.select([])}
    for what, dataset in {**rows, "a IterableDataset": items.to_iterable_dataset()}.items():
        with pytest.raises(ValueError, match=f"cannot store states for {what}.*teacher_mode='frozen'"):
            make_cached(train_dataset=dataset)


@pytest.mark.parametrize(("columns", "metric"), [(1, "mse"), (2, "mse"), (2, "relational")])
def test_steps_with_stored_states_are_those_with_the_teacher(
    make_cached: MakeTrainer, make_arguments: MakeArguments, wide_dir: Path, items: Dataset, columns: int, metric: str
) -> None:
    rows = items if columns == 1 else two_columns(items)
    held_out = Dataset.from_dict({name: ["a red apple", "a table"] for name in rows.column_names})
    changes: dict[str, Any] = {"train_dataset": rows, "eval_dataset": held_out, "args": make_arguments(max_steps=6)}
    changes |= {"metric": metric, "teacher": wide_dir} if metric == "relational" else {}
    frozen = make_cached(teacher_mode="frozen", teacher_cache=None, **changes)
    cached = make_cached(**changes)
    assert cached.evaluate()["eval_loss"] == pytest.approx(frozen.evaluate()["eval_loss"], abs=1e-4)
    for trainer in (frozen, cached):
        trainer.train()
    of_frozen, of_cached = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (frozen, cached)
    )
    assert len(of_cached) == 6
    assert of_cached == pytest.approx(of_frozen, rel=1e-4, abs=1e-6)
    assert ("teacher_cosine" in cached.state.log_history[0]) == (metric == "mse")


def test_equal_rows_of_two_datasets_are_read_with_the_prompt_of_each(
    make_cached: MakeTrainer, make_student: MakeStudent, make_arguments: MakeArguments, qwen_dir: Path
) -> None:
    model, prompts = make_student(), {"one": "Find a red apple.", "two": "On the table."}
    loss, rows = SelfDistillationLoss(model), Dataset.from_dict({"anchor": ["red", "green", "blue", "an apple"]})
    trainer = make_cached(
        model=model,
        args=make_arguments(prompts={name: {"anchor": prompt} for name, prompt in prompts.items()}),
        train_dataset=DatasetDict({name: rows.select(range(4)) for name in prompts}),
        loss=dict.fromkeys(prompts, loss),
    )
    teacher = FrozenTeacher.from_pretrained(qwen_dir, puma_model(model))
    for name, prompt in prompts.items():
        found = torch.tensor(trainer.train_dataset[name]["teacher_states"][:]).squeeze(1)
        expected = teacher.states(model[0].preprocess(rows["anchor"][:], prompt=prompt))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert trainer.train().global_step == 4


def test_the_deep_layers_are_freed(make_cached: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Any]] = []
    create = FrozenTeacher.__init__

    def watch(self: FrozenTeacher, student: Any, dropped_layers: Any) -> None:
        create(self, student, dropped_layers)
        references.extend(weakref.ref(part) for part in [self, *dropped_layers.modules(), *dropped_layers.parameters()])

    monkeypatch.setattr(FrozenTeacher, "__init__", watch)
    trainer = make_cached()
    gc.collect()
    assert len(references) > 20
    assert all(reference() is None for reference in references)
    assert len(puma_model(trainer.model).language_model.layers) == 2


def test_a_complete_cache_is_not_computed_again(make_cached: MakeTrainer, asked: list[int], tmp_path: Path) -> None:
    make_cached(teacher_cache=None)
    assert sum(asked) == 16
    assert files_of(tmp_path / "run" / "teacher_cache")
    asked.clear()
    make_cached(teacher_cache=None).train()
    assert not asked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(("batch", "kind"), [(1, FrozenTeacher), (4, FrozenTeacher), (2, EmbeddingTeacher)])
def test_a_killed_computation_goes_on(
    make_cached: MakeTrainer, wide_dir: Path, tmp_path: Path, asked: list[int], monkeypatch: Any, batch: int, kind: Any
) -> None:
    """What is lost is the file that was being written."""
    if kind is EmbeddingTeacher:
        make_cached = partial(make_cached, metric="relational", teacher=wide_dir)
    expected = make_cached(teacher_cache=tmp_path / "uninterrupted").train_dataset["teacher_states"][:]
    asked.clear()
    counted = kind.states

    def kill(self: Teacher, features: dict[str, Any]) -> Any:
        if len(asked) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "states", kill)
        assert exit_signal(in_a_fork(make_cached)) == signal.SIGKILL
    assert len(files_of(tmp_path / "cache")) == batch
    asked.clear()
    found = make_cached().train_dataset["teacher_states"][:]
    assert len(asked) == 6 - batch
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=0)


def test_states_of_others_are_never_read(
    make_cached: MakeTrainer,
    make_student: MakeStudent,
    items: Dataset,
    asked: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of another teacher, other rows, another way to read them, another data type."""
    make_cached()
    assert "computing them anew" not in caplog.text
    asked.clear()
    make_cached(train_dataset=items.select(range(15)))
    assert sum(asked) == 15
    other = build_qwen2_vl(tmp_path / "other", seed=1)
    before = len(files_of(tmp_path / "cache"))
    make_cached(teacher=other)
    assert "holds states of another teacher, data or processing: computing them anew" in caplog.text
    model = make_student()
    model[0].processing_kwargs = {"text": {"max_length": 100}}
    make_cached(model=model)
    assert len(files_of(tmp_path / "cache")) == before + 2
    asked.clear()
    make_cached()
    assert not asked


def test_a_picture_that_changed_under_its_path_is_another_row(
    make_cached: MakeTrainer, asked: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "apple.png"
    rows = Dataset.from_dict({"item": [{"image": str(path), "text": None}, {"image": None, "text": "an apple"}]})
    Image.new("RGB", (56, 56), "red").save(path)
    make_cached(train_dataset=rows)
    Image.new("RGB", (84, 56), "green").save(path)
    for _ in range(2):
        make_cached(train_dataset=rows)
    assert sum(asked) == 4


# --- a teacher of another width or family


@pytest.fixture
def foreign() -> SentenceTransformer:
    """A bag of vectors of 12 dimensions, of texts alone."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer().backend_tokenizer
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=12)], device="cpu")


def test_another_family_reads_the_rows_by_itself(
    foreign: SentenceTransformer, make_cached: MakeTrainer, make_student: MakeStudent, tmp_path: Path
) -> None:
    """An instruction is the prompt of its `encode`; what is stored follows the teacher and the rows alone."""
    rows = [{"text": f"apple {row}", "image": None, "instruction": "Find: " if row % 2 else None} for row in range(6)]
    changes: dict[str, Any] = {"teacher": foreign, "train_dataset": Dataset.from_dict({"item": rows})}

    def stored(**reading: Any) -> tuple[Tensor, list[str]]:
        model = make_student()
        model[0].processing_kwargs = {"text": reading}
        trainer = make_cached(metric="relational", model=model, **changes)
        return torch.tensor(trainer.train_dataset["teacher_states"][:]).squeeze(1), files_of(tmp_path / "cache")

    found, files = stored()
    expected = foreign.encode([("Find: " if row % 2 else "") + f"apple {row}" for row in range(6)])
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert stored(max_length=100)[1] == files
    foreign.prompts["query"] = "Find this: "
    foreign.default_prompt_name = "query"
    changed, more = stored()
    assert len(more) == 2 * len(files)
    assert not torch.equal(changed[0], found[0])  # without an instruction it has its own default
    assert torch.equal(changed[1], found[1])


def test_teachers_and_batches_that_do_not_fit_a_metric(
    foreign: SentenceTransformer,
    wide_dir: Path,
    full_dir: Path,
    make_cached: MakeTrainer,
    make_arguments: MakeArguments,
) -> None:
    for metric, teacher in product(("mse", "cosine"), (foreign, wide_dir)):
        with pytest.raises(ValueError, match=r"metric='relational' \(--metric relational\)"):
            make_cached(metric, teacher=teacher)
    with pytest.raises(ValueError, match=r"and a batch has 2 row\(s\)\. Choose a larger batch_size"):
        make_cached("relational", args=make_arguments(per_device_train_batch_size=2))
    # An embedder that was cut still shares its weights.
    assert type(make_cached("relational", teacher=full_dir, teacher_mode="frozen").teacher) is FrozenTeacher
