from __future__ import annotations

import json
import logging
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.configs import SweepConfig
from puma_hf.data.mbeir import MBEIR
from puma_hf.data.records import MBEIRFormatError
from puma_hf.evaluation import layer_sweep
from puma_hf.evaluation.alignment import linear_cka, mean_cosine
from puma_hf.evaluation.layer_sweep import SweepInputs, open_model, sweep
from puma_hf.evaluation.mbeir import evaluate_mbeir
from puma_hf.evaluation.results import MBEIRResults
from puma_hf.evaluation.sweep_report import SweepReport, SweepRow
from puma_hf.flops import count_parameters
from tests.data import mbeir_builder as builder
from tests.evaluation.layer_models import pruned_to_every_depth
from tests.tiny import NUM_LAYERS, build_qwen2_vl

ROOT = Path(__file__).parents[2]
ALL: dict[str, Any] = {"nano_queries": 0, "nano_candidates": 0, "batch_size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build_mbeir(tmp_path_factory.mktemp("data") / "toys")


@pytest.fixture(scope="module")
def models(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SentenceTransformer]:
    return pruned_to_every_depth(qwen_dir, tmp_path_factory.mktemp("depths"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 layers and other weights, to compare with."""
    folder = tmp_path_factory.mktemp("other")
    prune(build_qwen2_vl(folder / "original", seed=1), folder / "distilled", num_kept_layers=3)
    return folder / "distilled"


@pytest.fixture(scope="module")
def report(qwen_dir: Path, other: Path, data: Path) -> SweepReport:
    config = SweepConfig(model=qwen_dir, data=data, split="test", pool="both", compare=(str(other),), **ALL)
    return sweep(config, show_progress_bar=False)


def evaluated(model: SentenceTransformer, data: Path | MBEIR, **options: Any) -> MBEIRResults:
    return evaluate_mbeir(model, data, batch_size=64, show_progress_bar=False, **options)


def assert_equals_evaluation(row: SweepRow, results: MBEIRResults) -> None:
    for pool in results.pools:
        assert row.quality[pool] == pytest.approx(results.mean(pool), abs=1e-12)
        scores = {result.task.name: result.score for result in results.rows if result.pool == pool}
        assert row.scores[pool] == pytest.approx(scores, abs=1e-12)


def test_equals_evaluating_each_pruned_model(
    report: SweepReport, models: list[SentenceTransformer], data: Path
) -> None:
    full = report.models[0]
    assert [row.k for row in full.rows] == [1, 2, 3, 4]
    for row, model in zip(full.rows, models, strict=True):
        assert_equals_evaluation(row, evaluated(model, data, pool="both"))
        assert row.parameters == count_parameters(model)
    assert len({row.quality["local"]["ndcg@10"] for row in full.rows}) == NUM_LAYERS  # the depths differ


def test_vectors_and_closeness(report: SweepReport, models: list[SentenceTransformer], data: Path) -> None:
    inputs = SweepInputs.read(MBEIR(data), MBEIR(data).tasks("test"), "test", ["local"])
    embeddings = inputs.encode(models[-1], "full", batch_size=1, show_progress_bar=False)  # several parts a group
    assert embeddings.shape[:2] == (NUM_LAYERS, len(inputs.inputs)) == (4, 8 * (6 + 4))
    for number, model in enumerate(models):
        one_by_one = [
            torch.as_tensor(model.encode(item, prompt=prompt, show_progress_bar=False))
            for item, prompt in list(zip(inputs.inputs, inputs.prompts, strict=True))[::7]
        ]
        assert (embeddings[number, ::7] - torch.stack(one_by_one)).abs().max() <= 1e-5
        row = report.models[0].rows[number]
        assert row.cka == pytest.approx(linear_cka(embeddings[number], embeddings[-1]), abs=1e-5)
        assert row.cosine == pytest.approx(mean_cosine(embeddings[number], embeddings[-1]), abs=1e-5)
    assert report.full.cka == pytest.approx(1, abs=1e-12)
    assert report.full.cosine == pytest.approx(1, abs=1e-6)


def test_a_compared_model_is_swept_beside_and_measured_against_the_full_one(
    report: SweepReport, other: Path, data: Path
) -> None:
    assert [(model.name, len(model.rows)) for model in report.models] == [("tiny-qwen2-vl", 4), ("distilled", 3)]
    compared = SentenceTransformer(str(other), trust_remote_code=True, device="cpu")
    rows = report.models[1].rows
    assert_equals_evaluation(rows[-1], evaluated(compared, data, pool="both"))
    assert rows[-1].cka is not None
    assert rows[-1].cka < 0.9  # not to itself
    assert rows[0].parameters == report.models[0].rows[0].parameters


def test_with_the_last_layer_kept(qwen_dir: Path, data: Path, tmp_path: Path) -> None:
    config = SweepConfig(model=qwen_dir, data=data, split="test", keep_last=True, **ALL)
    report = sweep(config, show_progress_bar=False)
    first, last = report.models
    assert (first.name, last.name) == ("tiny-qwen2-vl", "tiny-qwen2-vl, first k - 1 layers and the last")
    assert [row.k for row in first.rows] == [row.k for row in last.rows] == [1, 2, 3, 4]
    assert first.rows[-1] == last.rows[-1] == report.full
    prune(qwen_dir, tmp_path / "cut", keep_layers="0,3")
    model = SentenceTransformer(str(tmp_path / "cut"), trust_remote_code=True, device="cpu")
    assert_equals_evaluation(last.rows[1], evaluated(model, data))
    assert last.rows[1].quality != first.rows[1].quality
    assert last.rows[1].parameters == first.rows[1].parameters == count_parameters(model)
    assert SweepReport.from_dict(report.to_dict()) == report
    assert f"**{last.name}**" in report.to_markdown()


def test_what_was_measured(report: SweepReport, data: Path) -> None:
    assert (report.data, report.split, report.pool, report.metric) == ("toys", "test", "local", "score")
    assert report.tasks == tuple(task.name for task in MBEIR(data).tasks("test"))
    assert (report.num_queries, report.num_candidates, report.data_hash) == (
        8 * 3,
        8 * 6,
        None,
    )  # one query a task has no answer
    assert report.task_queries == (3,) * 8
    assert (report.text_tokens, report.image_tokens) == (64, 256)


def test_a_subset_files_and_repetition(qwen_dir: Path, data: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        report = sweep(
            SweepConfig(
                model=qwen_dir, data=data, split="test", tasks=("toys_task1", "toys_task7"), output=output,
                nano_queries=2, nano_candidates=3,
            ),
            show_progress_bar=False,
        )  # fmt: skip
    assert sorted(path.name for path in outputs[0].iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]
    assert (report.num_queries, report.num_candidates, report.tasks) == (4, 6, ("toys_task1", "toys_task7"))
    assert re.fullmatch("[0-9a-f]{64}", report.data_hash or "")
    for path in outputs[0].iterdir():
        assert path.read_bytes() == (outputs[1] / path.name).read_bytes()
    assert SweepReport.from_dict(json.loads((outputs[0] / "sweep.json").read_text())) == report


def test_the_demo_backbone(tmp_path: Path) -> None:
    """The model and data of the README's command; `benchmarks/sweep.py` compares all of them, at every depth."""
    backbone, tasks = ROOT / "demo" / "backbone", ("emoji_task0", "emoji_task6")
    config = SweepConfig(
        model=backbone, data=ROOT / "demo" / "emoji", tasks=tasks, nano_queries=20, nano_candidates=60, batch_size=64
    )
    report = sweep(config, show_progress_bar=False)
    prune(backbone, tmp_path / "k4", num_kept_layers=4)
    model = SentenceTransformer(str(tmp_path / "k4"), trust_remote_code=True, device="cpu")
    with ExitStack() as stack:
        subset = layer_sweep._open_data(config, stack)
        assert_equals_evaluation(report.models[0].rows[3], evaluated(model, subset, split="val"))
    assert report.quality(report.models[0].rows[-1]) > report.quality(report.models[0].rows[0]) + 0.1


def test_original_and_puma_directory_are_one_model(qwen_dir: Path, models: list[SentenceTransformer]) -> None:
    with open_model(str(qwen_dir)) as model:
        expected = models[-1].encode(["a red apple"], show_progress_bar=False)
        assert (model.encode(["a red apple"], show_progress_bar=False) == expected).all()


def test_the_size_is_told(data: Path, models: list[SentenceTransformer], caplog: pytest.LogCaptureFixture) -> None:
    task = MBEIR(data).tasks("test")[1]
    inputs = SweepInputs.read(MBEIR(data), [task], "test", ["local"])
    with caplog.at_level(logging.INFO, logger="puma_hf"):
        inputs.encode(models[-1], "tiny", batch_size=64, show_progress_bar=False)
    assert "Embeddings of all depths of tiny: (4, 10, 32), 0 MB" in caplog.text


def test_a_did_that_means_two_things(data: Path, tmp_path: Path) -> None:
    root = builder.build_mbeir(tmp_path / "toys")
    builder.change_record(builder.global_pool_path(root, "test"), 7, txt="another text")
    folder = MBEIR(root)
    with pytest.raises(MBEIRFormatError, match=r"did '11:100' of the .* differs from that in another pool"):
        SweepInputs.read(folder, folder.tasks("test"), "test", ["local", "global"])


def test_two_models_of_one_name_keep_their_paths(other: Path, tmp_path: Path) -> None:
    assert layer_sweep._names([str(other), "org/distilled", "org/puma"]) == ["distilled", "org/distilled", "org/puma"]
    assert layer_sweep._names(["/a/full", "/b/full"]) == ["/a/full", "/b/full"]


def test_what_is_wrong_with_any_model_is_told_before_the_first_is_opened(
    qwen_dir: Path, other: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_sweep, "open_model", lambda *_args, **_kwargs: pytest.fail("opened all the same"))
    config = SweepConfig(model=qwen_dir, data=data, split="test", max_params="1k", **ALL)
    with pytest.raises(ValueError, match=r"max_params=1,000 must be at least \d+,\d{3}, the parameters of tiny"):
        sweep(config)
    with pytest.raises(ValueError, match=r"max_params=1,000 must be at least \d+,\d{3}, the parameters of "):
        sweep(replace(config, compare=(str(other),)))
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder"):
        sweep(replace(config, compare=("nowhere",)))


def test_the_budget_is_compared_with_the_real_size(qwen_dir: Path, report: SweepReport) -> None:
    smallest = report.models[0].rows[0].parameters
    layer_sweep._check_sources([str(qwen_dir)], smallest)
    with pytest.raises(ValueError, match="must be at least"):
        layer_sweep._check_sources([str(qwen_dir)], smallest - 1)


def test_several_processes_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"in 2 processes, must be in one: .*without torchrun or accelerate launch"):
        sweep(SweepConfig(model="nowhere", data=data))


def test_embeddings_that_do_not_fit(
    data: Path, models: list[SentenceTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = SweepInputs.read(MBEIR(data), MBEIR(data).tasks("test"), "test", ["local"])

    def full(_shape: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ValueError, match=r"80 inputs at 4 depths take 0\.0 GB, which must fit.*Choose fewer"):
        inputs._room(models[-1], "tiny")


def test_an_output_that_may_not_be_written_to(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_args: False)  # the tests may run as root, who may do all
    with pytest.raises(PermissionError, match=r"output=.* may not be written to. Name another"):
        sweep(SweepConfig(model="nowhere", data=data, output=tmp_path / "out"))


def test_errors_before_the_model_is_opened(
    qwen_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SweepConfig(model="nowhere", data=data, split="val", **ALL)
    with pytest.raises(FileNotFoundError, match="the splits here are"):
        sweep(config)
    with pytest.raises(ValueError, match="tasks is"):
        sweep(SweepConfig(model="nowhere", data=data, split="test", tasks=("webqa_task1",), **ALL))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sweep(SweepConfig(model="nowhere", data=data, split="test", **ALL))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'puma-hf\[plot\]'"):
        sweep(SweepConfig(model="nowhere", data=data, split="test", output=tmp_path / "out", **ALL))
    assert not (tmp_path / "out").exists()
