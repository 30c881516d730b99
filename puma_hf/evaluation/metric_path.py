"""Where the metric for `evaluate.load` is installed."""

from __future__ import annotations

from pathlib import Path


def metric_path() -> str:
    """The folder of the retrieval metric, for `evaluate.load`; it works offline.

    Returns:
        The path of `retrieval_metric`, as a string.

    Example:
        >>> import evaluate
        >>> from puma_hf.evaluation.metric_path import metric_path
        >>> metric = evaluate.load(metric_path())
        >>> metric.compute(predictions=[["b", "a"]], references=[["a"]], ks=[1, 2])["hit@2"]
        1.0
    """
    return str(Path(__file__).parent / "retrieval_metric")
