"""A pushed directory carries the losses and the trainer: they open where puma_hf is not installed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from puma_hf.files import model_files
from puma_hf.hub.push import travelling_files
from puma_hf.losses import MultimodalMACLoss
from puma_hf.trainer import merge_adapter
from puma_hf.trainer.checkpoints_puma import last_whole_checkpoint
from tests.forks import run_worker


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_directory_is_trained_without_puma_hf(puma_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pushed"
    shutil.copytree(puma_dir, folder)
    for name, code in travelling_files().items():
        (folder / name).write_text(code)
    assert {*travelling_files()} <= {*model_files(folder)}  # so that it can be pushed again
    settings = {"max_steps": 1, "save_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none", "seed": 0}
    output = tmp_path / "run"
    run_worker("tests.losses.without_puma_hf", folder, tmp_path / "modules", output, json.dumps(settings))
    found = json.loads((output / "found.json").read_text())

    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").train()
    loss = MultimodalMACLoss(model)
    loss([model.preprocess(texts) for texts in (["a red apple", "two"], ["a table", "in"])]).backward()
    expected = sum(weight.grad.abs().sum().item() for weight in model.parameters() if weight.grad is not None)
    assert expected > 0
    assert found["MultimodalMACLoss"] == pytest.approx(expected, rel=1e-5)
    assert found["CachedMultimodalMACLoss"] == pytest.approx(expected, rel=1e-4)
    assert found["terms"] == ["contrastive", "distillation"]
    assert found["logs"]["hard_temperature"] == 0.03
    assert {"intra_negatives", "items_per_second"} <= found["logs"].keys()
    # What it has trained is an adapter that goes on here.
    assert last_whole_checkpoint(output) == str(output / "checkpoint-1")
    assert merge_adapter(output / "checkpoint-1", tmp_path / "merged") < 1e-5
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["trained_depths"] == [1, 2]
