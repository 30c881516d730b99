"""Metrics of rankings as an `evaluate.Metric`.

`evaluate` reads the imports of this file line by line: `import a, b` would not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

import datasets
import evaluate

from puma_hf.evaluation.metrics import retrieval_metrics, wrong_modality_at_k

_CITATION = "Wei et al.: UniIR, Training and Benchmarking Universal Multimodal Information Retrievers. ECCV 2024."


class RetrievalMetric(evaluate.Metric):
    """hit@k, recall@k, nDCG@k, MRR@k and wrong modality of rankings: means over queries, as in M-BEIR's table.

    Args:
        predictions: For each query, the ids of candidates, best first, without repetition.
        references: For each query, the ids of its relevant candidates, or graded: {"id": ..., "relevance": ...} for
            each judged candidate, where 0 is not relevant.
        ks: The k of hit@k and recall@k, (1, 5, 10) by default.
        ndcg_k: The k of nDCG, 10 by default.
        mrr_k: The k of MRR, 10 by default.
        modalities: The modality of every candidate by id; adds wrong_modality@k, the share of the first k that have a
            modality which none of the query's relevant candidates has.

    Returns:
        The value of each metric, between 0 and 1, by name.
    """

    def _info(self) -> evaluate.MetricInfo:
        description, _, inputs = cleandoc(RetrievalMetric.__doc__ or "").partition("\n\n")
        string = datasets.Value("string")
        rankings = datasets.Sequence(string)
        judgement = {"id": string, "relevance": datasets.Value("int64")}
        # The first that fits is taken, and to a string everything does.
        graded = datasets.Features({"predictions": rankings, "references": [judgement]})
        plain = datasets.Features({"predictions": rankings, "references": datasets.Sequence(string)})
        return evaluate.MetricInfo(
            description=description,
            citation=_CITATION,
            inputs_description=inputs,
            features=[graded, plain],
            reference_urls=["https://arxiv.org/abs/2311.17136"],
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[Any]],
        ks: Sequence[int] = (1, 5, 10),
        ndcg_k: int = 10,
        mrr_k: int = 10,
        modalities: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        relevance = [_relevance(judged) for judged in references]
        for name, rows in (("predictions", predictions), ("references", [_ids(judged) for judged in references])):
            for row, ids in enumerate(rows):
                if len(set(ids)) < len(ids):  # it would count twice
                    raise ValueError(f"{name}[{row}] has a candidate more than once; give each candidate once")
        metrics = retrieval_metrics(predictions, relevance, ks, ndcg_k=ndcg_k, mrr_k=mrr_k)
        if modalities is not None:
            metrics |= {f"wrong_modality@{k}": wrong_modality_at_k(predictions, relevance, modalities, k) for k in ks}
        return metrics


def _ids(judged: Sequence[Any]) -> list[str]:
    return [item["id"] if isinstance(item, Mapping) else item for item in judged]


def _relevance(judged: Sequence[Any]) -> dict[str, int]:
    gains = [item["relevance"] if isinstance(item, Mapping) else 1 for item in judged]
    return dict(zip(_ids(judged), gains, strict=True))
