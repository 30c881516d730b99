from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.mac_loss import BASELINE, make_losses, make_step, peak_bytes
from puma_hf.losses import contrastive
from puma_hf.losses.contrastive import mac_loss, row_blocks, split_loss

ROWS, COLUMNS = 7, 19


def make_problem(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities, the positives' columns, who has the wanted modality, and who is left out."""
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    positive_index = torch.randperm(columns, generator=generator)[:rows]
    same_modality = torch.rand(rows, columns, generator=generator) < 0.4
    false_negatives = torch.rand(rows, columns, generator=generator) < 0.2
    false_negatives[torch.arange(rows), positive_index] = False
    return similarities.requires_grad_(), positive_index, same_modality, false_negatives


def naive_cross_entropy(logits: dict[int, Tensor], positive: int) -> Tensor:
    return torch.log(sum(torch.exp(logit) for logit in logits.values())) - logits[positive]  # type: ignore[arg-type]


def naive_mac(problem: tuple[Tensor, ...], temperature: float, hard: float, left_out: bool) -> Tensor:
    similarities, positives, same, false = problem
    terms = []
    for row, positive in enumerate(positives.tolist()):
        taus = [hard if intra else temperature for intra in same[row].tolist()]
        kept = [column for column in range(same.shape[1]) if not (left_out and false[row, column])]
        terms.append(
            naive_cross_entropy({column: similarities[row, column] / taus[column] for column in kept}, positive)
        )
    return torch.stack(terms).mean()


def naive_split(problem: tuple[Tensor, ...], temperature: float, hard: float, weight: float, left_out: bool) -> Tensor:
    similarities, positives, same, false = problem
    terms = []
    for row, positive in enumerate(positives.tolist()):
        kept = [column for column in range(same.shape[1]) if not (left_out and false[row, column])]
        group = [column for column in kept if same[row, column] or column == positive]
        whole = naive_cross_entropy({column: similarities[row, column] / temperature for column in kept}, positive)
        inner = naive_cross_entropy({column: similarities[row, column] / hard for column in group}, positive)
        terms.append((1 - weight) * whole + weight * inner)
    return torch.stack(terms).mean()


def assert_equal_with_gradients(found: Tensor, expected: Tensor, similarities: Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(found, similarities)
    (gradient_of_expected,) = torch.autograd.grad(expected, similarities, retain_graph=True)
    torch.testing.assert_close(gradient, gradient_of_expected, rtol=0, atol=1e-12)


@pytest.fixture(params=["one block", "a row a block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a row a block":
        monkeypatch.setattr(contrastive, "_SMALLEST_BLOCK", {"cpu": 1})
        monkeypatch.setattr(contrastive, "_LARGEST_BLOCK", {"cpu": COLUMNS})
    rows = len(list(row_blocks(torch.empty(ROWS, COLUMNS))))
    assert rows == (1 if request.param == "one block" else ROWS)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize(("temperature", "hard"), [(0.05, 0.04), (0.5, 0.1), (0.07, 0.2), (0.1, 0.1)])
def test_mac_loss_is_the_formula(temperature: float, hard: float, left_out: bool) -> None:
    problem = make_problem()
    similarities, positives, same, false = problem
    loss = mac_loss(similarities, positives, same, temperature, hard, false if left_out else None)
    assert_equal_with_gradients(loss, naive_mac(problem, temperature, hard, left_out), similarities)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_split_loss_is_the_formula(weight: float, left_out: bool) -> None:
    problem = make_problem()
    similarities, positives, same, false = problem
    loss = split_loss(similarities, positives, same, 0.5, 0.1, weight, false if left_out else None)
    assert_equal_with_gradients(loss, naive_split(problem, 0.5, 0.1, weight, left_out), similarities)


def test_split_loss_by_hand() -> None:
    # The positive at 1, an intra-modality candidate at 0, an inter-modality one at 1; temperatures 1 and 1/2.
    similarities, same = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[True, True, False]])
    whole, group = math.log(2 + math.exp(-1)), math.log(1 + math.exp(-2))
    for weight in (0.0, 0.25, 1.0):
        loss = split_loss(similarities, torch.tensor([0]), same, 1.0, 0.5, weight)
        assert loss.item() == pytest.approx((1 - weight) * whole + weight * group, abs=1e-6)


def test_the_positive_is_in_its_group_whatever_its_modality() -> None:
    similarities, same = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[False, True, False]])
    loss = split_loss(similarities, torch.tensor([0]), same, 1.0, 0.5, 1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_split_at_the_ends_is_infonce() -> None:
    similarities, positives, same, _ = make_problem()
    targets = (similarities / 0.07, positives)
    whole = torch.nn.functional.cross_entropy(*targets)
    assert_equal_with_gradients(split_loss(similarities, positives, same, 0.07, 0.02, 0.0), whole, similarities)
    one_modality = torch.ones_like(same)
    group = split_loss(similarities, positives, one_modality, 0.5, 0.07, 1.0)
    assert_equal_with_gradients(group, whole, similarities)
    assert_equal_with_gradients(mac_loss(similarities, positives, one_modality, 0.5, 0.07), whole, similarities)


@pytest.mark.parametrize("loss", [mac_loss, split_loss])
def test_a_column_left_out_for_all_is_as_if_it_were_not_there(loss: Any) -> None:
    similarities, positives, same, _ = make_problem()
    false = torch.zeros_like(same)
    away = sorted(set(range(COLUMNS)) - set(positives.tolist()))[:3]
    false[:, away] = True
    kept = torch.tensor([column for column in range(COLUMNS) if column not in away])
    new_positives = torch.searchsorted(kept, positives)
    expected = loss(similarities[:, kept], new_positives, same[:, kept], 0.1, 0.05)
    assert_equal_with_gradients(
        loss(similarities, positives, same, 0.1, 0.05, false_negatives=false), expected, similarities
    )


@pytest.mark.parametrize("loss", [mac_loss, split_loss])
def test_alone_the_positive_costs_nothing(loss: Any) -> None:
    similarities = torch.tensor([[0.3, 0.9], [0.9, 0.3]], requires_grad=True)
    positives = torch.tensor([0, 1])
    false = torch.tensor([[False, True], [True, False]])
    value = loss(similarities, positives, ~false, 0.05, 0.04, false_negatives=false)
    assert value.item() == 0
    assert torch.autograd.grad(value, similarities)[0].abs().max() == 0


@pytest.mark.parametrize("loss", [mac_loss, split_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_similarities_do_not_overflow(loss: Any, dtype: torch.dtype) -> None:
    similarities = torch.tensor([[-500.0, 500.0, 9000.0]], dtype=dtype, requires_grad=True)
    same, false = torch.tensor([[True, True, True]]), torch.tensor([[False, False, True]])
    value = loss(similarities, torch.tensor([0]), same, 0.05, 0.05, false_negatives=false)
    assert value.item() == pytest.approx(1000 / 0.05, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, similarities)
    torch.testing.assert_close(gradient, torch.tensor([[-20.0, 20.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_raised(dtype: torch.dtype) -> None:
    similarities, positives, same, _ = make_problem()
    low = similarities.detach().to(dtype).requires_grad_()
    loss = mac_loss(low, positives, same, 0.05, 0.04)
    assert loss.dtype == torch.float32
    expected = mac_loss(low.double(), positives, same, 0.05, 0.04)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.autograd.grad(loss, low)[0].dtype == dtype


def test_a_graph_that_is_kept_can_be_used_again() -> None:
    similarities, positives, same, _ = make_problem()
    loss = mac_loss(similarities, positives, same, 0.05, 0.04)
    first, second = (torch.autograd.grad(3 * loss, similarities, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 3 * torch.autograd.grad(loss, similarities, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match=r"create_graph=True .* differentiated once only\. Leave it out"):
        torch.autograd.grad(loss, similarities, create_graph=True)


def test_without_gradients_the_value_is_the_same() -> None:
    similarities, positives, same, false = make_problem()
    expected = split_loss(similarities, positives, same, 0.05, 0.04, 0.5, false)
    with torch.no_grad():
        value = split_loss(similarities, positives, same, 0.05, 0.04, 0.5, false)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 19), (300, 900), (513, 4096), (2, 300_000)])
def test_blocks_cover_all_rows_once(rows: int, columns: int) -> None:
    matrix = torch.empty(rows, columns, device="meta")
    parts = [range(rows)[part] for part in row_blocks(torch.empty(rows, columns))]
    assert [row for part in parts for row in part] == list(range(rows))
    assert len(list(row_blocks(matrix))) >= 1


@pytest.mark.parametrize("size", [512, 768])
def test_memory_is_at_most_three_matrices(size: int) -> None:
    losses = make_losses(size, "cpu")
    matrices = {name: peak_bytes(make_step(loss, size, 8, "cpu")) / (4 * size**2) for name, loss in losses.items()}
    assert matrices.pop(BASELINE) > 3.9  # what it is compared with, and that the measure sees temporaries
    assert len(matrices) == 4
    assert all(1.9 < count <= 3 for count in matrices.values()), matrices


def test_shape_errors() -> None:
    similarities, index = torch.zeros(2, 3), torch.tensor([0, 1])
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert mac_loss(similarities, index, mask, 0.05, 0.04).item() == pytest.approx(math.log(3))
    wrong = [
        (similarities[0], index, mask),
        (similarities[:0], index[:0], mask[:0]),
        (similarities, index[:1], mask),
        (similarities, index, mask[:, :2]),
        (similarities, index.float(), mask),
        (similarities, index, mask.long()),
    ]
    for loss in (mac_loss, split_loss):
        for arguments in wrong:
            with pytest.raises(ValueError, match=r"similarities are float32 .*must be floats.*Pass one row per query"):
                loss(*arguments, 0.05, 0.04)
        for false_negatives in (mask.long(), mask[:1]):
            with pytest.raises(ValueError, match=r"false_negatives are .*must be bool \(2, 3\).*Pass what"):
                loss(similarities, index, mask, 0.05, 0.04, false_negatives=false_negatives)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "hard_temperature"])
@pytest.mark.parametrize("loss", [mac_loss, split_loss])
def test_temperature_errors(loss: Any, name: str, value: float) -> None:
    temperatures = {"temperature": 0.05, "hard_temperature": 0.04, name: value}
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but a temperature must be positive and finite\. Use"):
        loss(torch.zeros(1, 1), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool), **temperatures)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_split_weight_errors(value: float) -> None:
    with pytest.raises(ValueError, match=rf"split_weight is {value}, but .* must be in \[0, 1\]\. Use 0\.5"):
        split_loss(torch.zeros(1, 1), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool), 0.05, 0.04, value)
