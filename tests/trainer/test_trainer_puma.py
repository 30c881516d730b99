from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerState

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.trainer.lora_puma import puma_model
from puma_hf.trainer.trainer_puma import whole_weights
from tests.trainer.conftest import MakeArguments, MakeStudent

ROWS = 16
# Four answers, each right for four rows; the last four rows have a second one.
POSITIVES = [[f"answer {row % 4}"] + ([f"answer {(row + 1) % 4}"] if row >= 12 else []) for row in range(ROWS)]


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict(
        {"anchor": [f"query {row}" for row in range(ROWS)], "positive": [f"apple {row % 4}" for row in range(ROWS)]}
    )


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


def test_positives_must_fit(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    model = make_student()
    arguments = {"model": model, "args": make_arguments(), "loss": MultimodalMACLoss(model)}
    trainer = PumaTrainer(**arguments, train_dataset=pairs, positives=POSITIVES[:3])
    with pytest.raises(ValueError, match="positives has 3 rows, the dataset 16"):
        trainer.train()
    several = DatasetDict(one=pairs, other=pairs)
    with pytest.raises(ValueError, match="positives need one Dataset, and train_dataset is a DatasetDict"):
        PumaTrainer(**arguments, train_dataset=several, positives=POSITIVES)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(16, 1), (1, 4)])
def test_rows_without_a_negative_are_refused(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, num_rows: int, batch_size: int
) -> None:
    """Each loss would be 0, and the adapter stay as it was, without a word."""
    model, few = make_student(), pairs.select(range(num_rows))
    arguments = {"model": model, "args": make_arguments(per_device_train_batch_size=batch_size, max_steps=1)}
    arguments["args"].per_device_eval_batch_size = batch_size
    loss, what = MultimodalMACLoss(model), rf"{num_rows} row\(s\) in batches of {batch_size}:"
    for dataset in (few, DatasetDict(one=few)):
        trainer = PumaTrainer(**arguments, train_dataset=dataset, loss=loss)
        with pytest.raises(ValueError, match=f"Nothing is a negative in {what}"):
            trainer.train()
        with pytest.raises(ValueError, match=f"Nothing is a negative in {what}"):  # eval_loss would be 0, too
            trainer.evaluate(dataset)
    with_negatives = few.add_column("negative_1", few["anchor"])
    assert PumaTrainer(**arguments, train_dataset=with_negatives, loss=loss).train().global_step == 1


def test_one_process_takes_one_gpu(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> None:
    arguments = make_arguments()
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"sees 2 GPUs: .*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        PumaTrainer(model=make_student(), args=arguments, train_dataset=pairs)


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
    sampler: Any = loader.batch_sampler.batch_sampler  # type: ignore[union-attr]
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(loader.batch_sampler))  # type: ignore[arg-type]
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    # One batch of the second epoch is done, as a checkpoint says.
    state = TrainerState(epoch=1 + 1 / len(loader), global_step=len(loader) + 1)
    monkeypatch.setattr(Trainer, "_init_training_state", lambda self, *_: setattr(self, "state", state) or (9, 9))
    epoch, batches = trainer._init_training_state(99, 9, 9, None, None)
    assert (epoch, batches) == (1, 1)
    assert list(skip_first_batches(loader, batches).batch_sampler) == epochs[1][1:]


def test_what_an_early_end_of_an_epoch_leaves_over_is_dropped(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    """Gradients of an accumulation that was not completed are in no checkpoint."""
    left: list[bool] = []

    class Watching(PumaTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
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
    assert left[::3] == [False, False]  # at the first batch of each epoch


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
    # Each process reads rows of its own, unless one is asked to read for all.
    assert not trainer.accelerator.dispatch_batches
    arguments = make_arguments(accelerator_config={"dispatch_batches": True})
    trainer = PumaTrainer(model=model, args=arguments, train_dataset=stream, loss=MultimodalMACLoss(model))
    assert trainer.accelerator.dispatch_batches


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


class BreakingLoss(nn.Module):
    """InfoNCE whose n-th call breaks."""

    def __init__(self, model: nn.Module, call: int, value: float, gradient_only: bool = False) -> None:
        super().__init__()
        self.loss = MultipleNegativesRankingLoss(model)
        self.call, self.value, self.gradient_only = call, value, gradient_only

    def forward(self, features: Any, labels: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(features, labels)
        self.call -= 1
        if self.call != 0:
            return loss
        if self.gradient_only:  # the root of 0 is 0, its derivative infinite
            return loss + (loss - loss.detach()).sqrt()
        return loss * self.value


@pytest.fixture
def breaking(make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset) -> Any:
    """A trainer of which the n-th batch breaks."""

    def make(call: int, value: float = math.nan, *, gradient_only: bool = False, **changes: Any) -> PumaTrainer:
        model = make_student()
        loss = BreakingLoss(model, call, value, gradient_only)
        return PumaTrainer(model=model, args=make_arguments(**changes), train_dataset=pairs, loss=loss)

    return make


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (4, {"value": math.nan}),
        (4, {"value": -math.inf}),
        (4, {"gradient_only": True}),
        (4, {"value": math.nan, "max_grad_norm": 0.0}),
        (7, {"value": math.nan, "gradient_accumulation_steps": 2}),  # in the first batch of the fourth step
    ],
)
def test_what_is_not_finite_stops_before_the_step(
    call: int, changes: dict[str, Any], breaking: Any, tmp_path: Any
) -> None:
    """The weights are those of the step before, and there is a checkpoint to go on from."""
    trainer = breaking(call, **changes, save_strategy="steps", save_steps=1)
    message = (
        r"^The gradients of optimizer step 4, in epoch \d\.\d+, are not finite, or too large\. The last .* "
        r"'.*checkpoint-3': resume from there\. Lower learning_rate.*bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 3
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): weight for name, weight in puma_model(trainer.model).named_parameters()}
    found = [torch.equal(tensor, held[name.removeprefix("base_model.model.")]) for name, tensor in saved.items()]
    assert all(found)
    assert len(found) == len(saved) > 20
    goes_on = breaking(99, **{**changes, "value": 1.0}, save_strategy="steps", save_steps=1)
    goes_on.train(resume_from_checkpoint=True)
    assert goes_on.state.global_step == 4


def test_in_float16_a_loss_that_no_scale_mends_stops_the_run(breaking: Any) -> None:
    trainer = breaking(2)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match=r"^The loss of optimizer step 2 is not finite, .* Lower"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("saves", [False, True])
def test_weights_that_are_not_finite_are_no_result(value: float, saves: bool, breaking: Any, tmp_path: Path) -> None:
    """The gradients were, and no loss has seen what the last step has made of them."""
    changes = {"save_strategy": "steps", "save_steps": 1} if saves else {}
    trainer = breaking(99, max_steps=1, **changes)
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)

    class Spoil(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            weight.data.view(-1)[-1] = value

    trainer.add_callback(Spoil())
    with pytest.raises(ValueError, match=r"^The weights after optimizer step 1 are not finite, .* Lower learning_rate"):
        trainer.train()
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_is_saved_whole(make_student: MakeStudent, mesh: DeviceMesh, tmp_path: Path) -> None:
    model = make_student(disturbed=True)
    model.save_pretrained(str(tmp_path / "before"))
    backbone: Any = puma_model(model)
    for layer in backbone.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in backbone.parameters())
    with pytest.raises(RuntimeError, match="invalid python storage"):
        model.save_pretrained(str(tmp_path / "parts"))
    with whole_weights(model):
        model.save_pretrained(str(tmp_path / "after"))
    assert "state_dict" not in vars(backbone)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
