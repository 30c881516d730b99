from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation.evaluator import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.losses import TemperatureScheduleCallback
from puma_hf.trainer.lora import BASE_FILE
from tests.trainer.conftest import MakeArguments, MakeStudent

ROWS = 16
# Four answers, each right for four rows; the last four rows have a second one.
POSITIVES = [[f"answer {row % 4}"] + ([f"answer {(row + 1) % 4}"] if row >= 12 else []) for row in range(ROWS)]


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict(
        {"anchor": [f"query {row}" for row in range(ROWS)], "positive": [f"apple {row % 4}" for row in range(ROWS)]}
    )


def test_schedule_is_added_and_logged(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    model = make_student()
    loss = MultimodalMACLoss(model, temperature=0.05, hard_temperature=0.04, schedule="linear", schedule_end=1.0)
    trainer = PumaTrainer(model=model, args=make_arguments(max_steps=4), train_dataset=pairs, loss=loss)
    callbacks = trainer.callback_handler.callbacks
    assert sum(isinstance(callback, TemperatureScheduleCallback) for callback in callbacks) == 1
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["temperature"] for entry in logs] == [0.05] * 4
    assert [entry["hard_temperature"] for entry in logs] == pytest.approx([0.05, 0.0475, 0.045, 0.0425])
    assert loss.current_hard_temperature == 0.04


def test_no_schedule_for_other_losses(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    model = make_student()
    loss = MultipleNegativesRankingLoss(model)
    trainer = PumaTrainer(model=model, args=make_arguments(max_steps=1), train_dataset=pairs, loss=loss)
    callbacks = trainer.callback_handler.callbacks
    assert not any(isinstance(callback, TemperatureScheduleCallback) for callback in callbacks)
    trainer.train()
    assert not any("temperature" in entry for entry in trainer.state.log_history)


class Encodes(BaseEvaluator):
    """What every evaluator does; its only figure is the length of an embedding."""

    def __call__(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"length": float(model.encode("an apple", convert_to_tensor=True).float().norm())}


def test_an_evaluator_encodes_in_mixed_precision(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    """accelerate then makes a copy of what the model returns."""
    model = make_student()
    arguments = make_arguments(max_steps=1, bf16=True, eval_strategy="steps", eval_steps=1)
    loss = MultimodalMACLoss(model)
    PumaTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss, evaluator=Encodes()).train()


def test_no_process_encodes_alone_for_the_card_under_fsdp(
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    pairs: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others would not come to the forward pass, in which all put their parts of the weights together."""
    model = make_student()
    trainer = PumaTrainer(model=model, args=make_arguments(), train_dataset=pairs, loss=MultimodalMACLoss(model))
    encoded: list[Any] = []
    monkeypatch.setattr(model, "encode", lambda *args, **kwargs: encoded.append(args))
    trainer.save_model(str(tmp_path / "alone"))
    assert encoded  # sentence-transformers does
    encoded.clear()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    trainer.save_model(str(tmp_path / "sharded"))
    assert not encoded
    assert model.model_card_data.generate_widget_examples


def test_rows_of_a_trained_batch_share_no_answer(
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    pairs: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def batches(positives: list[list[str]] | None) -> list[list[int]]:
        model = make_student()
        trainer = PumaTrainer(
            model=model,
            args=make_arguments(max_steps=-1, num_train_epochs=3),
            train_dataset=pairs,
            loss=MultimodalMACLoss(model),
            positives=positives,
        )
        seen: list[list[int]] = []
        collate = type(trainer.data_collator).__call__

        def record(self: Any, rows: list[dict[str, Any]]) -> Any:
            seen.append([int(row["anchor"].split()[1]) for row in rows])
            return collate(self, rows)

        monkeypatch.setattr(type(trainer.data_collator), "__call__", record)
        trainer.train()
        monkeypatch.undo()
        return seen

    def clashes(batch: list[int]) -> bool:
        answers = [answer for row in batch for answer in POSITIVES[row]]
        return len(set(answers)) < len(answers)

    apart = batches(POSITIVES)
    assert apart
    assert not any(map(clashes, apart))
    assert len({tuple(batch) for batch in apart}) == len(apart)  # each epoch has its own order
    assert any(map(clashes, batches(None)))


def test_evaluation_rows_keep_their_own_sampler(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    model = make_student()
    trainer = PumaTrainer(
        model=model,
        args=make_arguments(per_device_eval_batch_size=8),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(8)),
        loss=MultimodalMACLoss(model),
        positives=POSITIVES,
    )
    train_sampler: Any = trainer.get_train_dataloader().batch_sampler
    eval_sampler: Any = trainer.get_eval_dataloader().batch_sampler
    assert isinstance(train_sampler, DistinctPositivesBatchSampler)
    assert not isinstance(eval_sampler, DistinctPositivesBatchSampler)
    assert sorted(row for batch in eval_sampler for row in batch) == list(range(8))


def test_positives_must_fit(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    model = make_student()
    arguments = {"model": model, "args": make_arguments(), "loss": MultimodalMACLoss(model)}
    with pytest.raises(ValueError, match=r"positives has 3 rows and train_dataset 16\. Pass one list of ids"):
        PumaTrainer(**arguments, train_dataset=pairs, positives=POSITIVES[:3])
    several = DatasetDict(one=pairs, other=pairs)
    with pytest.raises(ValueError, match=r"train_dataset is a DatasetDict\. Concatenate the datasets"):
        PumaTrainer(**arguments, train_dataset=several, positives=POSITIVES)


def test_arguments_are_saved_and_checkpoints_know_their_base(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, tmp_path: Path
) -> None:
    model = make_student()
    trainer = PumaTrainer(
        model,
        make_arguments(max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=pairs,
        loss=MultimodalMACLoss(model),
        positives=POSITIVES,
    )
    trainer.train()
    assert pickle.loads(pickle.dumps(trainer.args)).learning_rate == 1e-2
    checkpoint = tmp_path / "run" / "checkpoint-1"
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert saved.learning_rate == 1e-2
    assert (checkpoint / BASE_FILE).is_file()


def test_one_process_takes_one_gpu(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    arguments = make_arguments()
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"sees 2 GPUs, .*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        PumaTrainer(model=make_student(), args=arguments, train_dataset=pairs)


def test_other_models_are_saved_without_a_note_of_their_base(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, tmp_path: Path
) -> None:
    """MAC-Loss takes modality ids as labels from any SentenceTransformer."""
    model = make_student()
    model[0].model.config.model_type = "another"
    arguments = make_arguments(max_steps=1, save_strategy="steps", save_steps=1)
    PumaTrainer(model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)).train()
    checkpoint = Path(arguments.output_dir) / "checkpoint-1"
    assert checkpoint.is_dir()
    assert not (checkpoint / BASE_FILE).exists()


# --- epochs


def test_a_resumed_epoch_is_shared_out_in_its_own_order(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate wraps the sampler twice then, and the epoch must get through to it."""
    model = make_student()
    loss = MultimodalMACLoss(model)
    trainer = PumaTrainer(model=model, args=make_arguments(), train_dataset=pairs, loss=loss, positives=POSITIVES)
    options = {"num_processes": 2, "process_index": 1, "even_batches": False, "put_on_device": False}
    monkeypatch.setattr(trainer.accelerator, "prepare", lambda loader: prepare_data_loader(loader, **options))
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    second = list(loader.batch_sampler)
    loader.set_epoch(0)
    first = list(loader.batch_sampler)
    assert first != second
    resumed: Any = skip_first_batches(loader, 1)
    resumed.batch_sampler.batch_sampler.set_epoch(1)  # as the trainer reaches for it
    assert list(resumed.batch_sampler) == second[1:]


def test_what_an_early_end_of_an_epoch_leaves_over_is_dropped(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    """Gradients of an accumulation that was not completed are in no checkpoint."""
    left: list[bool] = []

    class Watching(PumaTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self._batches == 0:
                left.append(any(parameter.grad is not None for parameter in self.model.parameters()))
            return super().training_step(*args, **kwargs)

    positives = [["common"] if row < 6 else [str(row)] for row in range(ROWS)]  # three batches of four
    model = make_student()
    arguments = make_arguments(
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, dataloader_drop_last=True
    )
    trainer = Watching(
        model=model, args=arguments, train_dataset=pairs, loss=MultimodalMACLoss(model), positives=positives
    )
    assert len(list(trainer.get_train_dataloader().batch_sampler)) % 2 == 1
    trainer.train()
    assert left == [False, False]


# --- streams, and datasets of structs


@pytest.fixture
def captions(tmp_path: Path, images: list[Image.Image]) -> Dataset:
    """Texts, and pictures of several sizes."""
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    cell = {"text": Value("string"), "image": Value("string")}
    anchors = [{"text": f"query {row}", "image": None} for row in range(ROWS)]
    positives = [{"text": None, "image": str(tmp_path / f"{row % len(images)}.png")} for row in range(ROWS)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives}, Features(anchor=cell, positive=cell))


def test_a_stream_of_pictures_trains_and_evaluates_like_a_dataset(
    make_student: MakeStudent, make_arguments: MakeArguments, captions: Dataset
) -> None:
    model = make_student()
    stream = captions.to_iterable_dataset()
    arguments = make_arguments(max_steps=2, per_device_eval_batch_size=ROWS)
    trainer = PumaTrainer(model=model, args=arguments, train_dataset=stream, loss=MultimodalMACLoss(model))
    of_rows, of_stream = (trainer.evaluate(dataset)["eval_loss"] for dataset in (captions, stream))
    assert of_stream == pytest.approx(of_rows, abs=1e-4)
    assert of_rows > 0.1
    assert trainer.train().global_step == 2


def test_processes_share_a_stream_out(
    make_student: MakeStudent, make_arguments: MakeArguments, captions: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_student()
    stream, loss = captions.to_iterable_dataset(), MultimodalMACLoss(model)
    trainer = PumaTrainer(model=model, args=make_arguments(), train_dataset=stream, loss=loss)
    dispatched = trainer.accelerator.dispatch_batches
    collate: Any = trainer.data_collator
    trainer.data_collator = lambda rows: (rows, collate(rows))  # type: ignore[assignment]
    shares: list[list[str]] = []
    for rank in range(2):
        options: dict[str, Any] = {"num_processes": 2, "process_index": rank, "put_on_device": False}
        prepare = partial(prepare_data_loader, dispatch_batches=dispatched, **options)
        monkeypatch.setattr(trainer.accelerator, "prepare", prepare)
        shares.append([row["anchor"]["text"] for rows, _ in trainer.get_train_dataloader() for row in rows])
    assert sorted(shares[0] + shares[1]) == sorted(row["text"] for row in captions["anchor"])
    # Who asks for one process that reads for all, gets it.
    arguments = make_arguments(accelerator_config={"dispatch_batches": True})
    assert PumaTrainer(model=model, args=arguments, train_dataset=stream, loss=loss).accelerator.dispatch_batches


@pytest.mark.parametrize("prompts", [None, {"one": {"anchor": "Find it."}, "other": "Describe it."}])
def test_several_datasets_of_structs(
    prompts: Any, make_student: MakeStudent, make_arguments: MakeArguments, captions: Dataset
) -> None:
    model = make_student()
    loss = MultimodalMACLoss(model)
    trainer = PumaTrainer(
        model=model,
        args=make_arguments(max_steps=2, prompts=prompts),
        train_dataset=DatasetDict(one=captions, other=captions),
        loss=loss if prompts else {"one": loss, "other": MultimodalMACLoss(model)},
    )
    assert trainer.train().global_step == 2
    assert model.model_card_data.widget == []
