"""A contrastive loss in two processes that share their candidates, for comparison with one process.

Run as `python -m tests.losses.two_processes JOB.json` by `run`; `compute` alone is the one process. A case is
`{"loss": "package.module.Class", "arguments": {...}}`, or in float64 `{"settings": {...}}` of a `TrainConfig`, with the
`"progress"` of the training. It may name a `"model"` of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel

from puma_hf.configs import TrainConfig
from puma_hf.losses import ElasticDepthLoss, find_scheduled_losses
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from puma_hf.trainer.stages import training_loss
from tests.forks import SHARES, in_two_processes, run_worker
from tests.patience import PATIENCE
from tests.released import InFloat64

ROWS = 8
COLUMNS = ("anchor", "positive", "negative")
DISTINCT = ("anchor", "negative")  # pairs without copies, in which nothing is masked


def make_rows() -> dict[str, list[Any]]:
    """Inputs of three modalities in every column and half, with copies of positives near and far.

    Without an image in each column of each half, DistributedDataParallel would wait for the vision tower's gradients.
    """
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(6)]
    both = [{"image": image, "text": f"number {number}"} for number, image in enumerate(images)]
    return {
        "anchor": ["a red apple", images[0], both[1], "a table", "one", images[2], "two", both[3]],
        # Row 5 has row 0's positive and row 6 row 3's: copies on the other device.
        "positive": [images[1], "a pear", both[2], "blue", both[4], images[1], "blue", "a cat"],
        # Row 0 has row 1's positive, row 4 row 2's on the other device, row 7 its own.
        "negative": ["a pear", images[3], "green", both[5], both[2], images[4], images[5], "a cat"],
    }


def compute(case: Mapping[str, Any], model_dir: str, rows: slice, *, parallel: bool = False) -> dict[str, Any]:
    """Loss and gradients of these rows; with `parallel` averaged over the processes, as a trainer would."""
    model = SentenceTransformer(modules=[PumaTransformer(case.get("model", model_dir))], device="cpu").train()
    columns = make_rows()
    if "settings" in case:
        settings = TrainConfig(model=model_dir, output="out", data="data", **case["settings"])
        loss: Any = training_loss(
            model.append(InFloat64()).double(), settings, num_devices=len(SHARES) if parallel else 1
        )
        (mac,) = find_scheduled_losses(loss).values()
        mac.progress = case["progress"]
        features = distinct_features(model, rows)
    else:
        module, _, name = case["loss"].rpartition(".")
        mac = loss = getattr(importlib.import_module(module), name)(model, **case["arguments"])
        features = [model.preprocess(columns[column][rows]) for column in COLUMNS]
        if "depths" in case:
            loss = ElasticDepthLoss(model, mac, *case["depths"])
            torch.manual_seed(0 if rows.start else 1)  # what is drawn in the first process counts
    if parallel:
        find = "sampled" in case.get("depths", ())
        loss.model = mac.model = DistributedDataParallel(model, find_unused_parameters=find)
    value = loss(features, None)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        "loss": value.detach(),
        "gradients": gradients,
        "statistics": dict(mac.statistics),
        "negative_counts": torch.stack(mac.negative_counts),
    }


def distinct_features(model: SentenceTransformer, rows: slice) -> list[dict[str, Any]]:
    """Features of these rows of both `DISTINCT` columns, with what a teacher may have said of them."""
    generator = torch.Generator().manual_seed(0)
    features = []
    for column in DISTINCT:
        features.append(dict(model.preprocess(make_rows()[column][rows])))
        size = model[0].model.config.text_config.hidden_size
        said = torch.randn(ROWS, size, dtype=torch.float64, generator=generator)
        features[-1]["teacher_state"] = said[rows]
    return features


def run(cases: Mapping[str, Mapping[str, Any]], model_dir: Path, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Each process's results by the name of the case; the rows are shared out half and half."""
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "model": str(model_dir)}))
    run_worker("tests.losses.two_processes", job)
    return [torch.load(folder / f"{rank}.pt") for rank in SHARES]


def work(job_file: Path, rank: int) -> None:
    """One of the two processes."""
    job = json.loads(job_file.read_text())
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    share = ROWS // len(SHARES)
    rows = slice(rank * share, (rank + 1) * share)
    results = {name: compute(case, job["model"], rows, parallel=True) for name, case in job["cases"].items()}
    torch.save(results, job_file.with_name(f"{rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_two_processes(partial(work, Path(sys.argv[1])))
