from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import prune
from puma_hf.checkpoint import plain_forward
from puma_hf.configs import SweepConfig
from puma_hf.data.mbeir import MBEIR
from puma_hf.estimate import count_flops, count_parameters
from puma_hf.evaluation.evaluator import HeldInputs
from puma_hf.evaluation.layer_sweep import (
    decoder_of,
    embed_all_depths,
    encode_all_layers,
    flops_by_depth,
    keep_last_depths,
    layer_costs,
    linear_cka,
    seconds_by_depth,
    sweep,
)
from puma_hf.evaluation.mbeir import evaluate_mbeir, read_searches
from puma_hf.evaluation.sweep_report import SweepReport, SweepRow
from puma_hf.modeling.inputs_puma import is_image_name
from tests.data import mbeir_builder as builder
from tests.tiny import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, build_checkpoint, build_qwen2_vl

ALL: dict[str, Any] = {"nano_queries": 0, "nano_candidates": 0, "batch_size": 64, "split": "test"}


def pruned(source: Path, folder: Path, **options: Any) -> SentenceTransformer:
    prune(source, folder, **options)
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def models(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SentenceTransformer]:
    """The models of k = 1 .. 4 layers, each pruned from the original and loaded by itself: what a sweep must equal."""
    folder = tmp_path_factory.mktemp("depths")
    return [pruned(qwen_dir, folder / f"k{k}", num_kept_layers=k) for k in range(1, NUM_LAYERS + 1)]


def encode(model: SentenceTransformer, inputs: list[Any], prompt: str = "", batch_size: int = 32) -> torch.Tensor:
    return torch.as_tensor(model.encode(inputs, prompt=prompt, batch_size=batch_size, show_progress_bar=False))


@pytest.fixture
def inputs(images: list[Image.Image]) -> list[Any]:
    """Of different lengths, so that batches are padded and sorted."""
    return ["a red apple", {"image": images[0]}, "a", {"image": images[2], "text": "red"}, "a table, red " * 5]


# --- The embeddings of all depths


@pytest.mark.parametrize(("prompt", "batch_size"), [("", 32), ("Find what fits.", 2)])
def test_equals_each_pruned_model(models: list[Any], inputs: list[Any], batch_size: int, prompt: str) -> None:
    full = models[-1]
    before, hooks = encode(full, inputs), sum(len(module._forward_hooks) for module in full.modules())
    full.truncate_dim = 8  # it would cut the depths off
    embeddings = encode_all_layers(full, inputs, prompt=prompt, batch_size=batch_size)
    assert (full.truncate_dim, embeddings.dtype) == (8, torch.float32)
    full.truncate_dim = None
    assert embeddings.shape == (NUM_LAYERS, len(inputs), HIDDEN_SIZE)
    expected = torch.stack([encode(model, inputs, prompt, batch_size) for model in models])
    assert (embeddings - expected).abs().max() <= 1e-5
    between = (expected[:, None] - expected[None]).abs().amax(dim=(2, 3)) + torch.eye(NUM_LAYERS)
    assert between.min() > 0.1  # the depths differ, so the comparison says something
    with pytest.raises(Exception, match="nowhere"):
        encode_all_layers(full, [{"image": "nowhere.png"}])
    assert sum(len(module._forward_hooks) for module in full.modules()) == hooks
    assert torch.equal(encode(full, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_kept_equals_each_such_model(family: str, tmp_path: Path, inputs: list[Any]) -> None:
    depth = 4 if family == "qwen3_5" else 6  # whose fourth layer has another kind of attention than the first three
    source = build_checkpoint(tmp_path / "original", family, num_layers=depth)
    full = pruned(source, tmp_path / "full", num_kept_layers=depth)
    first = 4 if family == "qwen3_vl" else 1  # DeepStack needs three layers before the last
    depths = keep_last_depths(full)
    assert list(depths) == list(range(first, depth))
    embeddings = encode_all_layers(full, inputs, batch_size=3, keep_last=True)
    assert embeddings.shape == (depth + len(depths), len(inputs), HIDDEN_SIZE)
    less = pruned(source, tmp_path / "less", num_kept_layers=depth - 1)
    assert (embeddings[depth - 2] - encode(less, inputs)).abs().max() <= 1e-5
    for k, found in zip(depths, embeddings[depth:], strict=True):
        model = pruned(source, tmp_path / f"last{k}", keep_layers=[*range(k - 1), depth - 1])
        assert (encode(model, inputs) - found).abs().max() <= 1e-5
        assert (embeddings[k - 1] - found).abs().max() > 0.05  # not the first k


def test_costs_one_forward_pass(models: list[SentenceTransformer], inputs: list[Any]) -> None:
    flops = []
    for run in (encode, encode_all_layers):
        with plain_forward(models[-1]), FlopCounterMode(display=False) as counter:
            run(models[-1], inputs)  # type: ignore[operator]
        flops.append(counter.get_total_flops())
    assert flops[0] * 0.9999 < flops[1] <= 1.15 * flops[0]


def test_only_puma_models_alone(models: list[SentenceTransformer]) -> None:
    with pytest.raises(ValueError, match=r"has 2 modules, must be a PUMA model alone.*puma-hf prune"):
        decoder_of(SentenceTransformer(modules=[models[0][0], Normalize()]))


# --- Closeness


def test_cka() -> None:
    # Centred columns (-1, 0, 1) and (-1/3, -1/3, 2/3): 1 / sqrt(2 * 2/3), squared.
    first, second = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    assert linear_cka(first, second) == pytest.approx(0.75, abs=1e-12)
    space, other = torch.randn(50, 6), torch.randn(50, 4)
    # Through the inputs' similarities: HSIC of centred Gram matrices, equation 3 of the paper.
    centre = torch.eye(50, dtype=torch.float64) - 1 / 50
    grams = [centre @ (one.double() @ one.double().T) @ centre for one in (space, other)]
    hsic = [[float((one * two).sum()) for two in grams] for one in grams]
    assert linear_cka(space, other) == pytest.approx(hsic[0][1] / math.sqrt(hsic[0][0] * hsic[1][1]), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(space, 3 * space @ rotation + 7) == pytest.approx(1, abs=1e-6)
    assert linear_cka(space, space * torch.tensor([1.0, 1, 1, 1, 1, 20])) < 0.8  # one axis alone: another space
    assert math.isnan(linear_cka(space, torch.zeros(50, 3)))


# --- Costs


def test_costs_equal_those_of_each_pruned_model(models: list[SentenceTransformer], images: list[Image.Image]) -> None:
    for item in ("a red apple", {"image": images[1], "text": "red"}):
        features = models[-1].preprocess([item])
        assert flops_by_depth(models[-1], features) == [count_flops(model, item) for model in models]
    costs, image_tokens = layer_costs(models[-1])
    assert [cost["parameters"] for cost in costs] == [count_parameters(model) for model in models]
    assert [cost["bytes"] for cost in costs] == [4 * cost["parameters"] for cost in costs]
    # 256 visual tokens are 16 x 16, of 2 x 2 patches of 8 x 8 pixels each.
    assert image_tokens == 256
    image = {"image": Image.new("RGB", (256, 256))}
    assert [cost["flops_image"] for cost in costs] == [count_flops(model, image) for model in models]
    # A text has nothing but layers: 64 tokens through each.
    assert costs[3]["flops_text"] == 4 * costs[0]["flops_text"]


def test_reading_is_timed_with_the_layers(models: list[SentenceTransformer]) -> None:
    features = models[-1].preprocess(["a red apple"])

    def read() -> dict[str, Any]:
        time.sleep(0.05)
        return features

    for batch, least in ((features, 0), (read, 0.05)):
        seconds = seconds_by_depth(models[-1], batch)
        assert len(seconds) == NUM_LAYERS
        assert sorted(seconds) == seconds
        assert seconds[0] > least
    costs, _ = layer_costs(models[-1], time_text=True)
    assert 0 < costs[0]["seconds_text"] < costs[-1]["seconds_text"]


# --- The sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build_mbeir(tmp_path_factory.mktemp("data") / "toys")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 layers and other weights, to compare with."""
    folder = tmp_path_factory.mktemp("other")
    prune(build_qwen2_vl(folder / "original", seed=1), folder / "distilled", num_kept_layers=3)
    return folder / "distilled"


@pytest.fixture(scope="module")
def report(qwen_dir: Path, other: Path, data: Path) -> SweepReport:
    config = SweepConfig(model=qwen_dir, data=data, pool="both", compare=(str(other),), keep_last=True, **ALL)
    return sweep(config, show_progress_bar=False)


def assert_equals_evaluation(row: SweepRow, model: SentenceTransformer, data: Path, **options: Any) -> None:
    results = evaluate_mbeir(model, data, batch_size=64, show_progress_bar=False, pool="both", encode_kwargs=options)
    for pool in results.pools:
        assert row.quality[pool] == pytest.approx(results.mean(pool), abs=1e-12)
        scores = {result.task.name: result.score for result in results.rows if result.pool == pool}
        assert row.scores[pool] == pytest.approx(scores, abs=1e-12)


def test_equals_evaluating_each_pruned_model(
    report: SweepReport, models: list[SentenceTransformer], data: Path, other: Path, qwen_dir: Path, tmp_path: Path
) -> None:
    last = ", first k - 1 layers and the last"
    assert [(model.name, [row.k for row in model.rows]) for model in report.models] == [
        ("tiny-qwen2-vl", [1, 2, 3, 4]),
        (f"tiny-qwen2-vl{last}", [1, 2, 3, 4]),
        ("distilled", [1, 2, 3]),
        (f"distilled{last}", [1, 2, 3]),
    ]
    assert (report.data, report.split, report.pool, report.metric) == ("toys", "test", "local", "score")
    # One query a task has no answer.
    assert (report.num_queries, report.num_candidates) == (8 * 3, 8 * 6)
    full, kept, compared, _ = (model.rows for model in report.models)
    for row, model in zip(full, models, strict=True):
        assert_equals_evaluation(row, model, data)
        assert row.parameters == count_parameters(model)
    assert len({row.quality["local"]["ndcg@10"] for row in full}) == NUM_LAYERS  # the depths differ
    assert_equals_evaluation(compared[-1], SentenceTransformer(str(other), trust_remote_code=True, device="cpu"), data)
    assert compared[-1].cka < 0.9  # type: ignore[operator]  # to the full model, not to itself
    assert kept[-1] == full[-1] == report.full
    model = pruned(qwen_dir, tmp_path / "cut", keep_layers="0,3")
    assert_equals_evaluation(kept[1], model, data)
    assert kept[1].parameters == full[1].parameters == count_parameters(model)


def test_every_depth_at_every_pixel_limit(qwen_dir: Path, models: list[SentenceTransformer], tmp_path: Path) -> None:
    data = builder.build_mbeir(tmp_path / "toys")
    for number, path in enumerate(sorted(file for file in data.rglob("*") if is_image_name(file.name))):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    config = SweepConfig(model=qwen_dir, data=data, pool="both", max_pixels="1024,4096", **ALL)
    report = sweep(config, show_progress_bar=False)
    assert [(model.max_pixels, model.image_tokens) for model in report.models] == [(4096, 16), (1024, 4)]
    assert report.image_tokens == 16
    assert report.full == report.models[0].rows[-1]
    for swept in report.models:
        processing = {"image": {"max_pixels": swept.max_pixels}}
        for row, model in zip(swept.rows, models, strict=True):
            assert_equals_evaluation(row, model, data, processing_kwargs=processing)
        assert all(row.seconds_image > 0 for row in swept.rows)  # type: ignore[operator]
    with pytest.raises(ValueError, match="max_pixels=1100 and another limit both leave 4 visual tokens"):
        sweep(replace(config, max_pixels="1024,1100"), show_progress_bar=False)
    large, small = (model.rows for model in report.models)
    assert [row.quality for row in large] != [row.quality for row in small]
    assert all(one.flops_image > other.flops_image for one, other in zip(large, small, strict=True))


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 layers that says it was trained at three depths; at the second nobody has trained it."""
    folder = tmp_path_factory.mktemp("elastic")
    prune(build_qwen2_vl(folder / "original", seed=2), folder / "any-depth", num_kept_layers=4)
    config = json.loads((folder / "any-depth" / "config.json").read_text()) | {"trained_depths": [1, 3, 4]}
    (folder / "any-depth" / "config.json").write_text(json.dumps(config))
    return folder / "any-depth"


def test_elastic_and_distilled_models(qwen_dir: Path, elastic: Path, other: Path, data: Path, tmp_path: Path) -> None:
    prune(other, tmp_path / "one", num_kept_layers=1)
    settings = {"compare": (str(elastic),), "distilled": (str(other), str(tmp_path / "one")), "keep_last": True}
    tasks = ("toys_task1", "toys_task7")
    config = SweepConfig(model=qwen_dir, data=data, pool="both", max_query_ms=1e6, **settings, **ALL, tasks=tasks)
    report = sweep(config, show_progress_bar=False)
    assert [(model.name, [row.k for row in model.rows]) for model in report.models[2:]] == [
        ("any-depth, elastic", [1, 3, 4]),
        ("distilled for one depth", [1, 3]),
    ]
    assert report.full == report.models[0].rows[-1]
    swept, points = report.models[2:]
    assert [row.name for row in points.rows] == ["one", "distilled"]
    copies = {k: pruned(elastic, tmp_path / f"k{k}", num_kept_layers=k) for k in (1, 3, 4)}
    assert [row.parameters for row in swept.rows] == [count_parameters(model) for model in copies.values()]
    held = HeldInputs(read_searches(MBEIR(data), "test", tasks, "both"))
    vectors = {k: held.embed(partial(model.encode, show_progress_bar=False)) for k, model in copies.items()}
    found = {(pair.query_k, pair.candidate_k): pair.quality for pair in swept.pairs}
    assert [*found] == [(1, 1), (1, 3), (1, 4), (3, 3), (3, 4), (4, 4)]
    for (query_k, candidate_k), quality in found.items():
        candidates, queries = vectors[candidate_k][: held.num_candidates], vectors[query_k][held.num_candidates :]
        results = held.results(torch.cat((candidates, queries)), "test")
        for pool in results.pools:
            assert quality[pool] == pytest.approx(results.mean(pool), abs=1e-12)
    assert [row.quality for row in swept.rows] == [found[row.k, row.k] for row in swept.rows]
    assert len({quality["local"]["ndcg@10"] for quality in found.values()}) == 6  # the pairs differ
    model = SentenceTransformer(str(other), trust_remote_code=True, device="cpu")
    results = held.results(held.embed(partial(model.encode, show_progress_bar=False)), "test")
    assert points.rows[1].quality == {pool: pytest.approx(results.mean(pool), abs=1e-12) for pool in results.pools}
    assert points.rows[1].parameters == count_parameters(model)
    assert report.recommended_pair == report.recommend_pair(1e6)
    assert (report.recommend_pair(1e-9) or report).query_k == 1  # type: ignore[union-attr]
    assert SweepReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_pairs_at_the_largest_pixel_limit(qwen_dir: Path, elastic: Path, other: Path, data: Path) -> None:
    settings = {"compare": (str(elastic),), "distilled": (str(other),), "max_pixels": "1024,4096"}
    config = SweepConfig(model=qwen_dir, data=data, **settings, **ALL | {"tasks": ("toys_task0",)})
    large, small = (f", {pixels} pixels ({tokens} visual tokens)" for pixels, tokens in (("4,096", 16), ("1,024", 4)))
    assert [(model.name, len(model.pairs)) for model in sweep(config, show_progress_bar=False).models] == [
        *[(f"tiny-qwen2-vl{limit}", 0) for limit in (large, small)],
        (f"any-depth, elastic{large}", 6),
        (f"any-depth, elastic{small}", 0),
        *[(f"distilled for one depth{limit}", 0) for limit in (large, small)],
    ]
    with pytest.raises(ValueError, match=r"max_query_ms=5 is for pairs.*nothing here was trained for.*--compare"):
        sweep(replace(config, compare=(str(other),), max_query_ms=5), show_progress_bar=False)


def test_closeness_to_the_full_model(report: SweepReport, models: list[SentenceTransformer], data: Path) -> None:
    held = HeldInputs(read_searches(MBEIR(data), "test", None, "local"))
    embeddings = embed_all_depths(held, models[-1], batch_size=1)
    assert embeddings.shape == (NUM_LAYERS, 8 * (6 + 4), HIDDEN_SIZE)
    for row, depth in zip(report.models[0].rows, embeddings, strict=True):
        assert row.cka == pytest.approx(linear_cka(depth, embeddings[-1]), abs=1e-5)
        assert row.cosine == pytest.approx(float((depth * embeddings[-1]).sum(dim=1).mean()), abs=1e-5)


def test_files_of_a_subset_and_repetition(qwen_dir: Path, data: Path, tmp_path: Path) -> None:
    changes = {"nano_queries": 2, "nano_candidates": 3, "tasks": ("toys_task1", "toys_task7")}
    config = SweepConfig(model=qwen_dir, data=data, **ALL | changes)
    reports = [sweep(replace(config, output=tmp_path / name), show_progress_bar=False) for name in ("one", "two")]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]
    assert (reports[0].num_queries, reports[0].num_candidates, len(reports[0].data_hash or "")) == (4, 6, 64)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert SweepReport.from_dict(json.loads((tmp_path / "one" / "sweep.json").read_text())) == reports[0]


def test_two_processes_are_refused(qwen_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puma_hf.evaluation.layer_sweep.connect", lambda: (0, 2))
    with pytest.raises(ValueError, match="one process, not 2"):
        sweep(SweepConfig(model=qwen_dir, data=data, **ALL))
