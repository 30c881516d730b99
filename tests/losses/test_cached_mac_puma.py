"""The cached loss has the value and the gradients of the plain one, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor, nn

from puma_hf import lora_config
from puma_hf.losses import CachedMultimodalMACLoss, MultimodalMACLoss
from puma_hf.losses.cached_mac_puma import MiniBatches, can_keep_image_features, find_puma_model
from puma_hf.trainer.lora_puma import add_lora, puma_model
from tests.tiny import HIDDEN_SIZE

MakeModel = Callable[[], SentenceTransformer]
MakeStudent = Callable[..., SentenceTransformer]
Columns = list[dict[str, Any]]
BATCH = 6
CONSTANT: dict[str, Any] = {"temperature": 0.5, "hard_temperature": 0.3, "schedule": "constant"}


@pytest.fixture
def make_student(puma_dir: Path) -> MakeStudent:
    """Builds the pruned model with an adapter as after training, the same every time."""

    def make(dtype: torch.dtype = torch.float64, dropout: float = 0.0, train_tower: bool = False) -> Any:
        torch.manual_seed(0)
        model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
        add_lora(model, lora_config(r=4, dropout=dropout, ret_token_id=puma_model(model).config.ret_token_id))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        if train_tower:
            puma_model(model).visual.requires_grad_(True)
        return model.to(dtype).train()

    return make


@pytest.fixture
def rows(images: list[Image.Image]) -> list[list[Any]]:
    """Anchors, positives and negatives of every kind and length; all columns hold two images in one sample."""
    small, square, wide = images
    anchors = [
        "a red apple on a table, and beside it a green one",
        {"image": small},
        {"image": [square, wide], "text": "both"},
        {"image": wide, "text": "in green", "instruction": "Find it."},
        "apple",
        {"image": [small, small]},
    ]
    positives = [
        {"image": wide},
        "a table",
        {"text": "a red apple, a table, a table, a red apple, and a table"},
        {"image": square, "text": "red"},
        {"image": [wide, small], "text": "a pair"},
        "a red one",
    ]
    return [anchors, positives, anchors[2:] + anchors[:2]]


def preprocess(model: SentenceTransformer, rows: list[list[Any]]) -> Columns:
    dtype = next(model.parameters()).dtype
    columns = [model.preprocess(column) for column in rows]
    for features in columns:
        features["pixel_values"] = features["pixel_values"].to(dtype)
    return columns


def run(loss: nn.Module, columns: Columns, labels: Tensor | None = None) -> tuple[float, dict[str, Tensor]]:
    """Value and gradients; the columns are given as copies, as plain losses write into them."""
    loss.zero_grad()
    value = loss([dict(features) for features in columns], labels)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def check_equal(
    one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], tolerance: float = 1e-6
) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    # A wrapper puts its own name before that of the parameters.
    gradients = [{name.removeprefix("loss."): grad for name, grad in side[1].items()} for side in (one, other)]
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)
    assert max(gradient.abs().max() for gradient in gradients[1].values()) > 100 * tolerance


CUTS: list[dict[str, Any]] = [
    *({"mini_batch_size": size, "keep_image_features": keep} for size in (1, 4, 5, 100) for keep in (True, False)),
    *({"mini_batch_num_tokens": budget} for budget in (1, 60, 250, 10_000)),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_equals_the_plain_loss_however_it_is_cut(
    make_student: MakeStudent, rows: list[list[Any]], cut: dict[str, Any]
) -> None:
    model = make_student()
    columns = preprocess(model, rows)
    plain, cached = MultimodalMACLoss(model, **CONSTANT), CachedMultimodalMACLoss(model, **CONSTANT, **cut)
    check_equal(run(cached, columns), run(plain, columns))
    assert cached.negative_counts is not None
    assert plain.negative_counts is not None
    assert all(map(torch.equal, cached.negative_counts, plain.negative_counts))


def test_tokens_of_a_mini_batch_stay_within_the_budget(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model, budget = make_student(), 150
    rows[1][3] = "a table " * 90
    columns = preprocess(model, rows)
    loss = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_num_tokens=budget)
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0]["input_ids"].shape)))
    run(loss, columns)
    hook.remove()
    lengths = [length for features in columns for length in features["attention_mask"].sum(dim=1).tolist()]
    assert min(lengths) < budget < max(lengths)
    # Padding and visual tokens count; a sample above the budget is alone, the others are not all.
    assert all(samples * width <= budget or samples == 1 for samples, width in shapes)
    assert any(samples > 1 for samples, _ in shapes)
    first_pass, second_pass = shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]
    assert first_pass == second_pass
    assert sum(samples for samples, _ in first_pass) == 3 * BATCH


def test_the_second_pass_draws_the_dropout_of_the_first(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student(dropout=0.5)
    columns = preprocess(model, rows)
    # In one mini-batch the random numbers are those of the plain loss.
    losses = [MultimodalMACLoss(model, **CONSTANT), CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=BATCH)]
    results = []
    for loss in losses:
        torch.manual_seed(1)
        results.append(run(loss, columns))
    check_equal(results[1], results[0])
    torch.manual_seed(2)
    assert run(losses[1], columns)[0] != pytest.approx(results[1][0], abs=1e-3)


@pytest.mark.parametrize(("keep", "train_tower", "passes"), [(True, False, 1), (False, False, 2), (True, True, 2)])
def test_a_frozen_tower_runs_once(
    make_student: MakeStudent, rows: list[list[Any]], keep: bool, train_tower: bool, passes: int
) -> None:
    model = make_student(train_tower=train_tower)
    columns = preprocess(model, rows)
    loss = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=2, keep_image_features=keep)
    tower = puma_model(model).visual
    patches: list[int] = []
    hook = tower.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    result = run(loss, columns)
    hook.remove()
    assert sum(patches) == passes * sum(len(features["pixel_values"]) for features in columns)
    assert max(patches) < max(len(features["pixel_values"]) for features in columns)  # no column at once
    assert not tower._forward_hooks
    assert any(".visual." in name for name in result[1]) == train_tower
    check_equal(result, run(MultimodalMACLoss(model, **CONSTANT), columns))


def test_videos_are_cut_and_kept_too(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student()
    columns = preprocess(model, rows)
    config = puma_model(model).config
    for features in columns[:2]:
        # Without a video decoder: an image is a video of two equal frames.
        is_image = features["input_ids"] == config.image_token_id
        features["input_ids"] = features["input_ids"].masked_fill(is_image, config.video_token_id)
        features["mm_token_type_ids"] = features["mm_token_type_ids"] * 2
        features["pixel_values_videos"] = features.pop("pixel_values")
        features["video_grid_thw"] = features.pop("image_grid_thw")
        features["num_videos_per_sample"] = features.pop("num_images_per_sample")
    loss = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=2)
    check_equal(run(loss, columns), run(MultimodalMACLoss(model, **CONSTANT), columns))


def test_accumulated_batches_do_not_mix(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student()
    batches = [preprocess(model, [column[start : start + 3] for column in rows]) for start in (0, 3)]
    results = []
    for loss in (
        CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=2),
        MultimodalMACLoss(model, **CONSTANT),
    ):
        loss.zero_grad()
        # Both forward passes before either backward pass, and scaled as a trainer does.
        values = [loss([dict(features) for features in columns]) / 2 for columns in batches]
        torch.stack(values).sum().backward()
        gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
        results.append((sum(value.item() for value in values), gradients))
    check_equal(*results)


def test_evaluation_needs_no_second_pass(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student().eval()
    columns = preprocess(model, rows)
    cached = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=2)
    with torch.no_grad():
        value = cached(columns)
        expected = MultimodalMACLoss(model, **CONSTANT)([dict(features) for features in columns])
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert not value.requires_grad
    assert set(columns[0]) == set(preprocess(model, rows)[0])  # the caller's features stay as they are


@pytest.mark.parametrize("mini_batch_size", [BATCH, 2])
def test_both_passes_run_under_the_autocast_of_the_first(
    make_student: MakeStudent, rows: list[list[Any]], mini_batch_size: int
) -> None:
    model = make_student(torch.float32)
    columns = preprocess(model, rows)
    states: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: states.append(output["pooler_output"].detach()))
    results = []
    for loss in (
        CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=mini_batch_size),
        MultimodalMACLoss(model, **CONSTANT),
    ):
        loss.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss([dict(features) for features in columns])
        value.backward()  # as trainers do, outside it
        gradients = [p.grad.flatten() for p in loss.parameters() if p.grad is not None]
        results.append((value.item(), torch.cat(gradients)))
    hook.remove()
    passes = 3 * (BATCH // mini_batch_size)
    for first, second in zip(states[:passes], states[passes : 2 * passes], strict=True):
        assert torch.equal(first, second)
    # In other shapes bfloat16 rounds elsewhere, and the plain loss adds up the columns' gradients in it.
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6 if mini_batch_size == BATCH else 0.01)
    assert nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99


def test_copies_of_the_positive_are_masked(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student()
    rows[1][4] = rows[1][0]
    columns = preprocess(model, rows)
    plain = MultimodalMACLoss(model, **CONSTANT)
    unmasked = run(plain, [{k: v for k, v in features.items() if k != "content_ids"} for features in columns])
    expected = run(plain, columns)
    assert expected[0] < unmasked[0] - 0.01
    cached = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=4)
    check_equal(run(cached, columns), expected)
    assert cached.statistics is not None
    assert plain.statistics is not None
    assert cached.statistics["masked_negatives"] == pytest.approx(2 / BATCH)
    for name, value in plain.statistics.items():
        torch.testing.assert_close(cached.statistics[name], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(cached.candidates_seen, plain.candidates_seen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_inside_matryoshka(make_student: MakeStudent, rows: list[list[Any]], weights: list[float] | None) -> None:
    model = make_student()
    columns = preprocess(model, rows)
    dims = [HIDDEN_SIZE, 16, 8]
    plain = MatryoshkaLoss(model, MultimodalMACLoss(model, **CONSTANT), dims, weights)
    inner = CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=4)
    check_equal(run(MatryoshkaLoss(model, inner, dims, weights), columns), run(plain, columns))


def test_equal_temperatures_are_the_stock_cached_loss(make_student: MakeStudent, rows: list[list[Any]]) -> None:
    model = make_student()
    columns = preprocess(model, rows)
    stock = CachedMultipleNegativesRankingLoss(model, scale=2.0, mini_batch_size=BATCH)
    ours = CachedMultimodalMACLoss(model, 0.5, 0.5, mini_batch_size=4)
    check_equal(run(ours, columns), run(stock, columns))


def test_a_compiled_model_computes_its_image_features_twice(make_student: MakeStudent) -> None:
    model = make_student()
    compiled = torch.compile(model)  # compiles when it is first called, which it is not
    assert find_puma_model(compiled) is puma_model(model)
    assert can_keep_image_features(model)
    assert not can_keep_image_features(compiled)
    assert find_puma_model(nn.Sequential(nn.Linear(1, 1))) is None
    assert find_puma_model(nn.Identity()) is None


# --- how a column is cut


@pytest.mark.parametrize("rows", [[0], [2, 1], [3, 0], [1, 3]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_taken_rows_are_as_if_made_alone(
    sentence_transformer: SentenceTransformer, images: list[Image.Image], rows: list[int], side: str
) -> None:
    small, square, wide = images
    inputs = ["a red apple", {"image": [square, wide], "text": "both"}, {"image": small}, "a table " * 9]
    tokenizer = sentence_transformer[0].processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        batches = MiniBatches(sentence_transformer.preprocess(inputs), 1, None, "cpu")
        alone = sentence_transformer.preprocess([inputs[row] for row in rows])
    finally:
        tokenizer.padding_side = before
    batches.order[: len(rows)] = rows
    taken = batches.take(0, len(rows))
    counts = alone.pop("num_images_per_sample", torch.zeros(len(rows), dtype=torch.long))
    assert torch.equal(taken.pop("num_images_per_sample"), counts)
    assert taken.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(taken[key], value) if isinstance(value, Tensor) else taken[key] == value
