"""A SentenceTransformer of one embedding bag that stamps modality ids, for the losses and their trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn

from puma_hf.modeling.inputs_puma import MODALITY_IDS

VOCABULARY, DIM = 16, 8


class BagOfNumbers(InputModule):
    """Embeds inputs such as "image: 3 1 4" as the mean of three vectors, with the modality in front."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, DIM, mode="mean")

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        modalities, numbers = zip(*(text.split(": ") for text in inputs), strict=True)
        return {
            "input_ids": torch.tensor([[int(number) for number in row.split()] for row in numbers]),
            "modality_ids": torch.tensor([MODALITY_IDS[name] for name in modalities]),
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features.pop("modality_ids", None)  # a loss must have read them before
        features["pooler_output"] = self.bag(features["input_ids"])
        features["sentence_embedding"] = nn.functional.normalize(features["pooler_output"], dim=1)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_torch_weights(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> BagOfNumbers:
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        loaded: BagOfNumbers = cls.load_torch_weights(model_name_or_path, model=cls(), **hub)
        return loaded


@pytest.fixture
def make_model() -> Callable[[], SentenceTransformer]:
    """Builds the same model every time."""

    def make() -> SentenceTransformer:
        torch.manual_seed(0)
        return SentenceTransformer(modules=[BagOfNumbers()], device="cpu")

    return make


@pytest.fixture
def pairs() -> Dataset:
    """16 rows of an image or text anchor, an image or text positive, and a negative of the other modality."""
    names = ("text", "image")
    generator = torch.Generator().manual_seed(0)

    def sample(row: int) -> str:
        numbers = torch.randint(VOCABULARY, (3,), generator=generator).tolist()
        return f"{names[row % 2]}: {' '.join(map(str, numbers))}"

    rows = [{"anchor": sample(row // 2), "positive": sample(row), "negative": sample(row + 1)} for row in range(16)]
    return Dataset.from_list(rows)
