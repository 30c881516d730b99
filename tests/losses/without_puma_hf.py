"""Runs in a process of its own where puma_hf cannot be imported: trains a directory with the code that lies in it.

Usage: python -m tests.losses.without_puma_hf DIRECTORY CACHE OUTPUT SETTINGS. The directory's code is cached in CACHE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["puma_hf"] = None  # type: ignore[assignment]
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from transformers import dynamic_module_utils

    folder, dynamic_module_utils.HF_MODULES_CACHE, output, settings = sys.argv[1:]
    names = ("mac_puma.MultimodalMACLoss", "cached_mac_puma.CachedMultimodalMACLoss")
    names += ("distillation_puma.JointDistillationLoss", "trainer_puma.PumaTrainer", "lora_puma.add_lora")
    names += ("lora_puma.lora_config", "elastic_puma.ElasticDepthLoss")
    mac, cached, joint, trainer, add_lora, lora_config, elastic = (
        dynamic_module_utils.get_class_from_dynamic_module(name, folder) for name in names
    )

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu").train()
    columns: list[dict[str, Any]] = [model.preprocess(texts) for texts in (["a red apple", "two"], ["a table", "in"])]
    found = {}
    for loss in (mac(model), cached(model, mini_batch_size=1)):
        model.zero_grad()
        loss([dict(features) for features in columns]).backward()
        gradient = sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
        found[type(loss).__name__] = gradient
    for features in columns:
        features["teacher_state"] = torch.zeros(2, model.get_embedding_dimension() or 0)
    found["terms"] = sorted(joint(model, mac(model))(columns))

    add_lora(model, lora_config(r=2))
    arguments = SentenceTransformerTrainingArguments(output, **json.loads(settings))
    rows = Dataset.from_dict({"anchor": ["a red apple", "two"], "positive": ["a table", "in"]})
    loss = elastic(model, mac(model), (1, 2))
    run = trainer(model=model, args=arguments, train_dataset=rows, loss=loss, positives=[["a"], ["b"]])
    run.train()
    found["logs"] = run.state.log_history[0]
    Path(output, "found.json").write_text(json.dumps(found))
