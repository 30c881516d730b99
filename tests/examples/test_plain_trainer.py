"""A plain Trainer trains, and what it saves is a model that others open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import Trainer

from examples import plain_trainer
from puma_hf import PumaModel, PumaProcessor
from puma_hf.files import model_files
from puma_hf.losses import ScheduledTemperatureLoss
from tests.data.mbeir_builder import build_mbeir


def test_it_trains_and_saves_a_whole_model(
    puma_dir: Path, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[PumaModel, ScheduledTemperatureLoss, list[float]]] = []
    save_model = Trainer.save_model

    def save(self: plain_trainer.PairTrainer) -> None:
        trained.append((self.model, self.mac, [entry["train_loss"] for entry in self.state.log_history[-1:]]))
        save_model(self)

    monkeypatch.setattr(plain_trainer.PairTrainer, "save_model", save)
    data, output = build_mbeir(tmp_path / "mbeir"), tmp_path / "out"
    plain_trainer.main([str(puma_dir), str(output), "--data", str(data), "--max-steps", "2", "--batch-size", "4"])
    [(model, mac, losses)] = trained
    assert np.isfinite(losses).all()
    assert mac.current_hard_temperature == mac.hard_temperature  # the schedule ran to its end
    before, after = (load_file(folder / "model.safetensors") for folder in (puma_dir, output))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model"}

    inputs = ["a red apple", {"image": images[0], "text": "on a table"}]
    batch = PumaProcessor.from_pretrained(puma_dir).process_inputs(inputs)
    with torch.inference_mode():
        expected = model.eval()(**{name: batch[name] for name in plain_trainer.INPUTS}).embeddings
    opened = SentenceTransformer(str(output), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(opened.encode(inputs), expected, atol=1e-6)
    assert opened.prompts == SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").prompts != {}
    assert "training_args.bin" not in model_files(output)
