from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from puma_hf import MultimodalMACLoss, PumaTrainer
from puma_hf.configs import TrainConfig
from puma_hf.trainer import arguments
from puma_hf.trainer.arguments import training_arguments
from tests.trainer.conftest import MakeStudent


def config(**values: Any) -> TrainConfig:
    return TrainConfig(model="model", output="out", data="data", **values)


def test_values_of_a_file_become_those_of_the_trainer() -> None:
    made = training_arguments(config(training_arguments={"weight_decay": "1e-2", "optim": "sgd", "data_seed": None}))
    assert (made.weight_decay, str(made.optim.value), made.data_seed) == (0.01, "sgd", None)
    assert made.save_strategy == "steps"
    assert training_arguments(config(save_steps=0)).save_strategy == "no"


def test_the_optimiser_is_the_one_that_was_asked_for(make_student: MakeStudent) -> None:
    """As released: the adapter of layer 0 at half the rate, and AdamW's numbers."""
    model = make_student()
    values = {"first_layer_learning_rate": 1e-4, "adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-7}
    made = training_arguments(config(learning_rate=2e-4, **values, training_arguments={"use_cpu": True}))
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    trainer = PumaTrainer(model=model, args=made, train_dataset=rows, loss=MultimodalMACLoss(model))
    optimizer = trainer.create_optimizer()
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    slower = {name for name, weight in trained.items() if rates[id(weight)] == 1e-4}
    assert slower == {name for name in trained if "language_model.layers.0." in name}
    assert {name.split(".layers.")[1].split(".lora_")[1][0] for name in slower} == {"A", "B"}
    assert {rates[id(trained[name])] for name in trained.keys() - slower} == {2e-4}
    assert any("token_adapter" in name for name in trained.keys() - slower)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.98), 1e-7)}
    assert not training_arguments(config()).learning_rate_mapping


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"training_arguments": {"weight_decay": "abc"}},
            r"^training_arguments: weight_decay='abc' must be a number, not text\. Correct it, or leave it out\.$",
        ),
        ({"training_arguments": {"tf32": "yes"}}, r"tf32='yes' must be true or false or null, not text"),
        ({"training_arguments": {"weight_decai": 1}}, r"has 'weight_decai', .* Did you mean 'weight_decay'\?$"),
        (
            {"training_arguments": {"optim": "adamm"}},
            r"^training_arguments=\{'optim': 'adamm'\} were refused by .*adamm.* Change or remove the value\.$",
        ),
        ({"report_to": "wandbb"}, r"^report_to='wandbb' must be one of .*wandb.* Did you mean 'wandb'\?$"),
    ],
)
def test_what_the_trainer_would_fail_on(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_arguments(config(**values))


def test_a_reporter_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"report_to='wandb' needs the package of that name\. Install it, or leave"):
        training_arguments(config(report_to="wandb"))
    assert training_arguments(config(report_to="tensorboard")).report_to == ["tensorboard"]


@pytest.mark.parametrize(("accelerator", "settings"), [(False, {}), (True, {"use_cpu": True})])
def test_bfloat16_without_a_gpu_for_it(
    accelerator: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    made = training_arguments(config(bf16=True, training_arguments=settings))
    assert (made.bf16, made.use_cpu) == (True, True)


def test_a_gpu_that_does_not_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^bf16=True needs .*the one here does not\. Set bf16=False \(--no-bf16\)"):
        training_arguments(config(bf16=True))
    assert not training_arguments(config()).use_cpu
