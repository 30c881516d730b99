"""Every family of backbones through both stages; the details of each stage are tested on Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from puma_hf import CachedMultimodalMACLoss, MultimodalMACLoss, PumaDistillationTrainer, PumaTrainer, prune
from puma_hf.trainer import FrozenTeacher, merge_adapter
from puma_hf.trainer.lora_puma import PREFIX, save_base_fingerprint
from puma_hf.trainer.teachers import is_of_adapter
from tests.tiny import FAMILIES, build_checkpoint
from tests.trainer.conftest import MakeArguments, MakeStudent

NAMES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, as it was cut, and with all its layers. DeepStack adds to more of these than were kept."""
    made = tmp_path_factory.mktemp(request.param)
    source = build_checkpoint(made / "source", request.param)
    # Of Qwen3.5 a layer of either kind of attention.
    prune(source, made / "cut", keep_layers=[2, 3] if request.param == "qwen3_5" else [0, 1])
    prune(source, made / "full", num_kept_layers=4)
    return made


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_distillation(
    folder: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> None:
    def trained(mode: Any) -> PumaDistillationTrainer:
        args = make_arguments(max_steps=8, learning_rate=3e-3, output_dir=str(tmp_path / mode))
        options: dict[str, Any] = {"teacher": folder / "source", "teacher_mode": mode, "train_dataset": items}
        return PumaDistillationTrainer(model=make_student(folder / "cut"), args=args, **options)

    trainer = trained("frozen")
    model, teacher, cells = trainer.model, trainer.teacher, [*items["item"][:4]]
    assert isinstance(teacher, FrozenTeacher)
    probe = model[0].preprocess(cells)
    before, full = teacher.states(probe), AutoModel.from_pretrained(folder / "full").eval()
    with torch.inference_mode():
        expected = full(**{name: probe[name] for name in NAMES}).pooler_output
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-5)
    model(dict(probe))["pooler_output"].square().sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    # A fresh adapter's first matrices have none, as its second are 0.
    assert all(is_of_adapter(name) and "lora_A" not in name for name in moved)
    linears = [name for name in moved if "lora_B" in name]
    assert len(linears) == len([name for name, _ in model.named_parameters() if "lora_B" in name]) >= 12
    model.zero_grad()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.train()
    assert torch.equal(teacher.states(probe), before)
    assert all(torch.equal(weight, start[name]) != weight.requires_grad for name, weight in model.named_parameters())
    assert sum(losses(trainer)[-3:]) < 0.9 * sum(losses(trainer)[:3])

    cached = trained("cached")
    cached.train()
    assert losses(cached) == pytest.approx(losses(trainer), rel=1e-4)
    model.save_pretrained(str(tmp_path / "adapter"), create_model_card=False)
    save_base_fingerprint(model, tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") <= 1e-5
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode(cells), model.eval().encode(cells), rtol=0, atol=1e-5)


def test_mac(
    folder: Path, make_student: MakeStudent, make_arguments: MakeArguments, items: Dataset, tmp_path: Path
) -> None:
    """Plain, and with gradient caching and checkpointing; and gone on with from the middle."""
    pairs = items.rename_column("item", "anchor").add_column("positive", items["item"][::-1])

    def trainer_of(name: str, kind: Any = MultimodalMACLoss, options: Any = None, **changes: Any) -> PumaTrainer:
        model, output = make_student(folder / "cut", train_ret_token=False), str(tmp_path / name)
        args = make_arguments(output_dir=output, learning_rate=1e-3, max_steps=4, **changes)
        return PumaTrainer(model=model, args=args, train_dataset=pairs, loss=kind(model, **options or {}))

    plain = trainer_of("plain", save_strategy="steps", save_steps=2)
    cached = trainer_of("cached", CachedMultimodalMACLoss, {"mini_batch_size": 2}, **{f"{PREFIX}_checkpointing": True})
    resumed = trainer_of("resumed")
    for trainer, begin in ((plain, None), (cached, None), (resumed, str(tmp_path / "plain" / "checkpoint-2"))):
        trainer.train(resume_from_checkpoint=begin)
    assert losses(cached) == pytest.approx(losses(plain), abs=1e-4)
    weights = {name: weight for name, weight in plain.model.named_parameters() if weight.requires_grad}
    again = {name: weight for name, weight in resumed.model.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(again, weights, rtol=0, atol=1e-6)
