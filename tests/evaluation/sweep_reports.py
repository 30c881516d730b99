"""Reports with made-up figures, for what comes after the measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puma_hf.evaluation.sweep_report import SweepReport, SweepRow, SweptModel


def make_model(name: str, qualities: Sequence[float], **changes: Any) -> SweptModel:
    """Each layer costs 100 million parameters, 1 GFLOP a text, and 4 GFLOPs an image; the rest 1, 0 and 10."""
    rows = []
    for k, quality in enumerate(qualities, start=1):
        values: dict[str, Any] = {
            "k": k,
            "parameters": 10**9 + k * 10**8,
            "bytes": 2 * (10**9 + k * 10**8),
            "flops_text": k * 10**9,
            "flops_image": 10**10 + 4 * k * 10**9,
            "cka": k / 10,
            "cosine": k / 20,
            "quality": {"local": {"score": quality, "hit@1": quality / 2, "ndcg@10": quality / 4}},
            "scores": {"local": {"toys_task0": quality}},
        }
        rows.append(SweepRow(**(values | changes)))
    return SweptModel(name, tuple(rows))


def make_report(*models: SweptModel, **changes: Any) -> SweepReport:
    values: dict[str, Any] = {
        "data": "toys",
        "data_hash": None,
        "split": "val",
        "tasks": ("toys_task0",),
        "num_queries": 400,
        "task_queries": (400,),
        "num_candidates": 2000,
        "pool": "local",
        "metric": "score",
        "text_tokens": 64,
        "image_tokens": 256,
    }
    return SweepReport(models=models or (make_model("full", [0.2, 0.7, 0.78, 0.79, 0.8]),), **(values | changes))
