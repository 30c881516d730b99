from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from puma_hf import MultimodalMACLoss, PumaTrainer
from tests.trainer.conftest import MakeArguments, MakeStudent

ROWS = 16


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict({"anchor": [f"query {row}" for row in range(ROWS)], "positive": ["apple"] * ROWS})


@pytest.mark.parametrize("key", [None, "queries"])
def test_an_empty_dataset_is_refused(
    key: str | None, make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    model = make_student()
    empty = pairs.select([])
    dataset = empty if key is None else DatasetDict({"full": pairs, key: empty})
    name = "train_dataset" if key is None else r"train_dataset\['queries'\]"
    with pytest.raises(ValueError, match=rf"^{name} has no rows\. .*the split and the filters"):
        PumaTrainer(model=model, args=make_arguments(), train_dataset=dataset, loss=MultimodalMACLoss(model))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (ROWS, 1)])
def test_rows_that_never_have_a_negative_are_refused(
    rows: int,
    batch_size: int,
    wrapped: bool,
    make_student: MakeStudent,
    make_arguments: MakeArguments,
    pairs: Dataset,
) -> None:
    model = make_student()
    loss: nn.Module = MatryoshkaLoss(model, MultimodalMACLoss(model), [32]) if wrapped else MultimodalMACLoss(model)
    arguments = make_arguments(per_device_train_batch_size=batch_size)
    few = pairs.select(range(rows))
    message = rf"^train_dataset has {rows} row\(s\), batches have {batch_size} and .*MultimodalMACLoss .* always be 0"
    with pytest.raises(ValueError, match=message):
        PumaTrainer(model=model, args=arguments, train_dataset=few, loss=loss)
    # A column of negatives helps, and so does a loss that needs none.
    negatives = few.add_column("negative_1", ["pear"] * rows)
    PumaTrainer(model=model, args=arguments, train_dataset=negatives, loss=loss)
    PumaTrainer(model=model, args=arguments, train_dataset=few, loss=nn.Identity())


def test_negatives_of_other_devices_count(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_student()
    arguments = make_arguments(per_device_train_batch_size=1)
    monkeypatch.setattr(type(arguments), "world_size", 2)
    PumaTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        loss=MultimodalMACLoss(model, gather_across_devices=True),
    )
    with pytest.raises(ValueError, match="batches have 1"):
        PumaTrainer(model=model, args=arguments, train_dataset=pairs, loss=MultimodalMACLoss(model))


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_that_could_only_be_zero_is_refused(
    several: bool, make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset
) -> None:
    model = make_student()
    loss = MultimodalMACLoss(model)
    held_out: Any = DatasetDict(one=pairs) if several else pairs
    settings = {"model": model, "train_dataset": pairs if not several else held_out, "loss": loss}
    settings["loss"] = {"one": loss} if several else loss
    arguments = make_arguments(per_device_eval_batch_size=1)
    name = r"eval_dataset\['one'\]" if several else "eval_dataset"
    message = rf"^{name} has 16 row\(s\), batches have 1 and .*negatives\.$"
    with pytest.raises(ValueError, match=message):
        PumaTrainer(**settings, args=arguments, eval_dataset=held_out)
    trainer = PumaTrainer(**settings, args=arguments)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(held_out)
    if not several:
        with pytest.raises(ValueError, match=r"^eval_dataset is a stream, batches have 1 and"):
            trainer.evaluate(pairs.to_iterable_dataset())


def test_a_last_row_alone_is_warned_of(
    make_student: MakeStudent, make_arguments: MakeArguments, pairs: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_student()
    for batch_size, warned in ((4, False), (5, True)):
        arguments = make_arguments(per_device_eval_batch_size=batch_size)
        PumaTrainer(model=model, args=arguments, train_dataset=pairs, eval_dataset=pairs, loss=MultimodalMACLoss(model))
        assert ("The last batch of eval_dataset, of 16 rows in batches of 5, has one row" in caplog.text) == warned
