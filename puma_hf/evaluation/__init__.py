"""Exact retrieval and its metrics, M-BEIR's table, how to choose k, and what other tools' evaluations need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

# Name -> module. Resolved on first use: the command reads `config` for its options, and --help is to be quick.
_NAMES = {
    "EvaluateConfig": "puma_hf.configs",
    "MBEIREvaluator": "puma_hf.evaluation.evaluator",
    "MBEIRResults": "puma_hf.evaluation.results",
    "MBEIRTaskResult": "puma_hf.evaluation.results",
    "SearchResult": "puma_hf.evaluation.topk",
    "SweepConfig": "puma_hf.configs",
    "SweepReport": "puma_hf.evaluation.sweep_report",
    "evaluate": "puma_hf.evaluation.mbeir",
    "evaluate_mbeir": "puma_hf.evaluation.mbeir",
    "exact_search": "puma_hf.evaluation.topk",
    "mbeir_prompts": "puma_hf.evaluation.mteb",
    "mbeir_scores": "puma_hf.evaluation.mteb",
    "merge_results": "puma_hf.evaluation.topk",
    "metric_path": "puma_hf.evaluation.retrieval_metric",
    "puma_model_meta": "puma_hf.evaluation.mteb",
    "retrieval_metrics": "puma_hf.evaluation.metrics",
    "sweep": "puma_hf.evaluation.layer_sweep",
    "wrong_modality_at_1": "puma_hf.evaluation.metrics",
}

__all__ = [
    "EvaluateConfig",
    "MBEIREvaluator",
    "MBEIRResults",
    "MBEIRTaskResult",
    "SearchResult",
    "SweepConfig",
    "SweepReport",
    "evaluate",
    "evaluate_mbeir",
    "exact_search",
    "mbeir_prompts",
    "mbeir_scores",
    "merge_results",
    "metric_path",
    "puma_model_meta",
    "retrieval_metrics",
    "sweep",
    "wrong_modality_at_1",
]


__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.configs import EvaluateConfig, SweepConfig
    from puma_hf.evaluation.evaluator import MBEIREvaluator
    from puma_hf.evaluation.layer_sweep import sweep
    from puma_hf.evaluation.mbeir import evaluate, evaluate_mbeir
    from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_1
    from puma_hf.evaluation.mteb import mbeir_prompts, mbeir_scores, puma_model_meta
    from puma_hf.evaluation.results import MBEIRResults, MBEIRTaskResult
    from puma_hf.evaluation.retrieval_metric import metric_path
    from puma_hf.evaluation.sweep_report import SweepReport
    from puma_hf.evaluation.topk import SearchResult, exact_search, merge_results
