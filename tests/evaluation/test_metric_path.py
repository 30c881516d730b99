from __future__ import annotations

from pathlib import Path

import evaluate
from evaluate.loading import evaluation_module_factory

from puma_hf.evaluation.metric_path import metric_path


def test_the_folder_is_one_that_evaluate_loads() -> None:
    folder = Path(metric_path())
    assert folder.name == "retrieval_metric"
    assert {"README.md", "retrieval_metric.py"} <= {path.name for path in folder.iterdir()}
    module = evaluation_module_factory(str(folder))
    assert isinstance(evaluate.load(str(folder)), evaluate.Metric)
    assert module.module_path.endswith("retrieval_metric")
