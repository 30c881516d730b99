"""Two processes that gather their candidates compute what one process with the whole batch does."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from tests import released
from tests.forks import SHARES
from tests.losses.two_processes import ROWS, compute, distinct_features, run
from tests.tiny import FAMILIES, build_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MAC = "puma_hf.losses.mac_puma.MultimodalMACLoss"
CACHED = "puma_hf.losses.cached_mac_puma.CachedMultimodalMACLoss"
CONSTANT = {"schedule": "constant", "temperature": 0.1, "hard_temperature": 0.05}
GATHERED = {**CONSTANT, "gather_across_devices": True}
CASES: dict[str, dict[str, Any]] = {
    "mac": {"loss": MAC, "arguments": GATHERED},
    "mac, by query": {"loss": MAC, "arguments": {**GATHERED, "grouping": "query"}},
    "mac, margin": {"loss": MAC, "arguments": {**GATHERED, "false_negative_margin": 0.02}},
    "split": {"loss": MAC, "arguments": {**GATHERED, "objective": "split"}},
    "cached": {"loss": CACHED, "arguments": {**GATHERED, "mini_batch_size": 3}},
    "cached, split, margin": {
        "loss": CACHED,
        "arguments": {**GATHERED, "mini_batch_size": 2, "objective": "split", "false_negative_margin": 0.02},
    },
    "depths": {"loss": MAC, "arguments": GATHERED, "depths": [[1, 2], "linear"]},
    "depths, cached": {"loss": CACHED, "arguments": {**GATHERED, "mini_batch_size": 3}, "depths": [[1, 2]]},
    "depths, sampled": {"loss": MAC, "arguments": GATHERED, "depths": [[1, 2], "sampled"]},
    "apart": {"loss": MAC, "arguments": CONSTANT},
}
OTHERS = tuple(FAMILIES)[1:]
# The recipes as released, a third of the way through: stage 2's are the defaults.
RELEASED: dict[str, dict[str, Any]] = {
    name: {"settings": settings, "progress": 1 / 3}
    for name, settings in {
        "stage 1": released.STAGE_1,
        "stage 1, growing": released.STAGE_1_GROWING,
        "stage 2": {},
    }.items()
}
RELATIONAL = {"relational": {"settings": {"metric": "relational", "distillation_weight": 1.0}, "progress": 1 / 3}}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Those above, and one of a model of each further family, in which no part of Qwen3-VL's tower goes unused."""
    folder = tmp_path_factory.mktemp("families")
    for family in OTHERS:
        layers = [2, 3] if family == "qwen3_5" else [0, 1, 2]
        prune(build_checkpoint(folder / f"tiny-{family}", family), folder / family, keep_layers=layers)
    others = {family: {**CASES["mac"], "model": str(folder / family)} for family in OTHERS}
    return CASES | RELEASED | RELATIONAL | others


@pytest.fixture(scope="module")
def results(cases: Any, puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Of both processes, for all cases: starting them takes longer than what they compute."""
    return run(cases, puma_dir, tmp_path_factory.mktemp("processes"))


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors).mean(dim=0)


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5
) -> None:
    assert set(found) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1
    assert {name.split(".")[2] for name in expected} == {"language_model", "visual"}
    for name, gradient in expected.items():
        bound = atol * max(1.0, float(gradient.abs().max()))  # a share of the largest, where that is large
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", [*(name for name in CASES if name != "apart"), *OTHERS])
def test_two_processes_equal_one_with_the_whole_batch(
    cases: dict[str, dict[str, Any]], puma_dir: Path, results: list[dict[str, dict[str, Any]]], name: str
) -> None:
    halves = [result[name] for result in results]
    left_out = ("gather_across_devices", "mini_batch_size")
    plain = {option: value for option, value in cases[name]["arguments"].items() if option not in left_out}
    whole = compute({**cases[name], "loss": MAC, "arguments": plain}, str(puma_dir), slice(ROWS))

    torch.testing.assert_close(mean([half["loss"] for half in halves]), whole["loss"], rtol=0, atol=1e-5)
    for half in halves:
        assert_same_gradients(half["gradients"], whole["gradients"])
    counts = torch.cat([half["negative_counts"] for half in halves], dim=1)
    assert torch.equal(counts, whole["negative_counts"])
    for key in ("intra_negatives", "inter_negatives", "masked_negatives", "positive_similarity"):
        torch.testing.assert_close(
            mean([half["statistics"][key] for half in halves]), whole["statistics"][key], rtol=0, atol=1e-5
        )


def test_copies_on_the_other_device_are_masked(results: list[dict[str, dict[str, Any]]]) -> None:
    masked = [result["mac"]["statistics"]["masked_negatives"].item() * ROWS / len(SHARES) for result in results]
    # Of rows 0, 1, 2 and 3: the positive of 5, the negative of 0, that of 4, the positive of 6. Of rows 5, 6 and 7:
    # the positives of 0 and 3, the own negative.
    assert masked == [4, 3]
    for result, count in zip(results, masked, strict=True):
        assert result["mac"]["negative_counts"].sum() == ROWS / len(SHARES) * (2 * ROWS - 1) - count


def test_the_margin_masks_more(results: list[dict[str, dict[str, Any]]]) -> None:
    for result in results:
        masked = [result[name]["statistics"]["masked_negatives"] for name in ("mac", "mac, margin")]
        assert masked[0] < masked[1] < 2 * ROWS - 1


def test_without_gathering_each_device_has_its_own_candidates(
    puma_dir: Path, results: list[dict[str, dict[str, Any]]]
) -> None:
    share = ROWS // len(SHARES)
    halves = [compute(CASES["apart"], str(puma_dir), slice(rank * share, (rank + 1) * share)) for rank in SHARES]
    for result, half in zip(results, halves, strict=True):
        torch.testing.assert_close(result["apart"]["loss"], half["loss"], rtol=0, atol=1e-5)
        average = {name: mean([half["gradients"][name] for half in halves]) for name in halves[0]["gradients"]}
        assert_same_gradients(result["apart"]["gradients"], average)
    assert mean([half["loss"] for half in halves]) < mean([result["mac"]["loss"] for result in results]) - 0.1


def test_relations_reach_over_processes(puma_dir: Path, results: list[dict[str, dict[str, Any]]]) -> None:
    whole = compute(RELATIONAL["relational"], str(puma_dir), slice(ROWS))
    halves = [result["relational"] for result in results]
    torch.testing.assert_close(mean([half["loss"] for half in halves]), whole["loss"], rtol=0, atol=1e-9)
    for half in halves:
        assert_same_gradients(half["gradients"], whole["gradients"], 1e-9)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_losses(puma_dir: Path, results: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Of all rows together, and the whole gradient; the released code's is this one divided by the devices."""
    model = SentenceTransformer(modules=[PumaTransformer(str(puma_dir))], device="cpu").train().double()
    features = distinct_features(model, slice(ROWS))
    teachers, modalities = [column["teacher_state"] for column in features], features[1]["modality_ids"].tolist()
    students = [model(column)["pooler_output"] for column in features]
    progress = RELEASED[name]["progress"]
    if name == "stage 2":
        expected = released.stage_2(students, modalities, progress, decay=math.log(0.03 / 0.018))
    else:
        expected = released.stage_1(students, teachers, progress if "growing" in name else None)
    expected.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    assert len(set(modalities)) == 3
    halves = [result[name] for result in results]
    torch.testing.assert_close(mean([half["loss"] for half in halves]), expected.detach(), rtol=0, atol=1e-9)
    for half in [*halves, compute(RELEASED[name], str(puma_dir), slice(ROWS))]:
        assert_same_gradients(half["gradients"], gradients, 1e-9)
