"""A metric for `evaluate.load`: this folder's path, or a copy of the folder on the Hub."""

from __future__ import annotations

from pathlib import Path


def metric_path() -> str:
    """The folder of the retrieval metric, for `evaluate.load`; it works offline.

    Example:
        >>> import evaluate
        >>> from puma_hf.evaluation import metric_path
        >>> metric = evaluate.load(metric_path())
        >>> metric.compute(predictions=[["b", "a"]], references=[["a"]], ks=[1, 2])["hit@2"]
        1.0
    """
    return str(Path(__file__).parent)
