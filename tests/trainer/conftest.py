"""A pruned student with an adapter, and rows to train it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from puma_hf import PumaModel, lora_config, prune
from puma_hf.trainer.lora_puma import add_lora, puma_model
from tests.data.mbeir_builder import build_mbeir

MakeStudent = Callable[..., SentenceTransformer]
MakeArguments = Callable[..., SentenceTransformerTrainingArguments]


@pytest.fixture(scope="session")
def full_dir(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that `puma_dir` was pruned from, as a PUMA directory with all its layers. Read only."""
    folder = tmp_path_factory.mktemp("full") / "tiny-puma-full"
    prune(qwen_dir, folder, num_kept_layers=4)
    return folder


@pytest.fixture(scope="session")
def full_model(full_dir: Path) -> PumaModel:
    loaded: PumaModel = PumaModel.from_pretrained(full_dir).eval()
    return loaded


@pytest.fixture(scope="session")
def mbeir_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dataset in M-BEIR's layout. Read only."""
    return build_mbeir(tmp_path_factory.mktemp("data") / "mbeir")


@pytest.fixture
def make_student(puma_dir: Path) -> MakeStudent:
    """Builds the pruned model with a fresh adapter, the same every time."""

    def make(
        folder: Path = puma_dir,
        *,
        adapter: bool = True,
        train_ret_token: bool = True,
        disturbed: bool = False,
        dropout: float = 0.0,
    ) -> SentenceTransformer:
        torch.manual_seed(0)
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        if adapter:
            ret_token_id = puma_model(model).config.ret_token_id if train_ret_token else None
            add_lora(model, lora_config(r=4, dropout=dropout, ret_token_id=ret_token_id))
        if disturbed:
            # As after training: a fresh adapter changes nothing.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture
def make_arguments(tmp_path: Path) -> MakeArguments:
    """Builds arguments for a few quick steps on the CPU."""

    def make(**changes: Any) -> SentenceTransformerTrainingArguments:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 0,
        }
        return SentenceTransformerTrainingArguments(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> Dataset:
    """16 rows of one column: text, image, or both, some with an instruction."""
    folder = tmp_path_factory.mktemp("items")
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    rows = [
        {
            "text": f"apple {number}" if number % 3 else None,
            "image": str(folder / f"{number % 3}.png") if number % 3 != 1 else None,
            "instruction": "Find it." if number % 2 else None,
        }
        for number in range(16)
    ]
    string = Value("string")
    features = Features({"item": {"text": string, "image": string, "instruction": string}})
    return Dataset.from_dict({"item": rows}, features=features)
