"""MAC-Loss and its split form equal the formulas written as loops, and InfoNCE where they must; so do their logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.mac_loss import BASELINE, make_steps, peak_bytes
from puma_hf.losses import MultimodalMACLoss, mac_loss, split_loss
from puma_hf.losses.mac_puma import find_false_negatives

MakeModel = Callable[[], SentenceTransformer]
BATCH, DIM = 6, 8
NAMES = ("anchor", "positive", "negative")
TEXT, IMAGE, IMAGE_TEXT, VIDEO, VIDEO_TEXT = range(5)
# Several queries share a target modality, one (video,text) has it alone, anchors and positives differ.
MODALITIES = [
    torch.tensor([TEXT, TEXT, IMAGE, IMAGE_TEXT, TEXT, VIDEO]),
    torch.tensor([IMAGE, IMAGE, TEXT, TEXT, IMAGE, VIDEO_TEXT]),
    torch.tensor([IMAGE, TEXT, TEXT, IMAGE_TEXT, VIDEO, IMAGE]),
]
DIFFERENT = [torch.arange(column * BATCH, (column + 1) * BATCH) for column in range(3)]
# Query 0's positive comes again as query 4's and as query 1's negative, query 2's as its own negative.
COPIES = [ids.clone() for ids in DIFFERENT]
COPIES[1][4] = COPIES[2][1] = COPIES[1][0]
COPIES[2][2] = COPIES[1][2]
OBJECTIVES: list[dict[str, Any]] = [{}, {"objective": "split"}, {"objective": "split", "split_weight": 0.8}]


def make_embeddings(columns: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64) for _ in range(columns)]
    return [column.to(dtype).requires_grad_() for column in made]


def make_loss(temperature: float = 0.2, hard: float = 0.1, **options: Any) -> MultimodalMACLoss:
    return MultimodalMACLoss(nn.Identity(), temperature, hard, schedule="constant", **options)


def naive(
    embeddings: list[Tensor],
    contents: list[Tensor] | None = None,
    *,
    temperature: float = 0.2,
    hard: float = 0.1,
    grouping: str = "target",
    objective: str = "mac",
    split_weight: float = 0.2,
    false_negative_margin: float | None = None,
) -> Tensor:
    """The definition as loops over queries and candidates, each a column and a row."""
    terms = []
    for query in range(BATCH):
        scores = {
            (column, row): cosine_similarity(embeddings[0][query].double(), embeddings[column][row].double(), dim=0)
            for column in range(1, len(embeddings))
            for row in range(BATCH)
        }
        positive = scores[1, query]
        for place in list(scores):
            copy = contents is not None and contents[place[0]][place[1]] == contents[1][query]
            too_good = false_negative_margin is not None and scores[place] > positive + false_negative_margin
            if place != (1, query) and (copy or too_good):
                del scores[place]
        wanted = MODALITIES[1 if grouping == "target" else 0][query]
        intra = {place for place in scores if MODALITIES[place[0]][place[1]] == wanted}
        if objective == "mac":
            tau = {place: hard if place in intra else temperature for place in scores}
            logits = torch.stack([score / tau[place] for place, score in scores.items()])
            terms.append(logits.logsumexp(0) - positive / tau[1, query])
        else:
            whole = torch.stack([score / temperature for score in scores.values()])
            group = torch.stack([scores[place] / hard for place in intra | {(1, query)}])
            terms.append((1 - split_weight) * (whole.logsumexp(0) - positive / temperature))
            terms[-1] = terms[-1] + split_weight * (group.logsumexp(0) - positive / hard)
    return torch.stack(terms).mean()


def assert_equal_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-10)


# --- the formulas


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("margin", [None, 0.0, 0.2])
@pytest.mark.parametrize("contents", [None, DIFFERENT, COPIES])
@pytest.mark.parametrize("grouping", ["target", "query"])
def test_equals_the_loops(options: Any, margin: Any, contents: Any, grouping: Any) -> None:
    options = {**options, "grouping": grouping, "false_negative_margin": margin}
    embeddings = make_embeddings()
    loss = make_loss(**options).compute_loss_from_embeddings(embeddings, MODALITIES, contents)
    assert_equal_with_gradients(loss, naive(embeddings, contents, **options), embeddings)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize(("temperature", "hard"), [(0.05, 0.04), (0.5, 0.1), (0.07, 0.2)])
def test_equals_the_loops_at_any_temperatures(columns: int, temperature: float, hard: float) -> None:
    embeddings = make_embeddings(columns)
    loss = make_loss(temperature, hard).compute_loss_from_embeddings(embeddings, MODALITIES[:columns])
    assert_equal_with_gradients(loss, naive(embeddings, temperature=temperature, hard=hard), embeddings)


def test_by_hand() -> None:
    # The positive at 1, an intra-modality candidate at 0, an inter-modality one at 1; temperatures 1 and 1/2.
    similarities, same = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[True, True, False]])
    problem = similarities, torch.tensor([0]), same, 1.0, 0.5
    assert mac_loss(*problem).item() == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-1)), abs=1e-6)
    whole, group = math.log(2 + math.exp(-1)), math.log(1 + math.exp(-2))
    for weight in (0.0, 0.25, 1.0):
        assert split_loss(*problem, weight).item() == pytest.approx((1 - weight) * whole + weight * group, abs=1e-6)
    # The positive is in its group whatever its modality.
    same = torch.tensor([[False, True, False]])
    assert split_loss(similarities, torch.tensor([0]), same, 1.0, 0.5, 1.0).item() == pytest.approx(group, abs=1e-6)
    # The third candidate left out.
    masked = torch.tensor([[False, False, True]])
    assert mac_loss(*problem, masked).item() == pytest.approx(group, abs=1e-6)


def test_whose_modality_counts_by_hand() -> None:
    # Positives at cosine 1, the other positive at cosine 0; the temperatures decide which logits are 1/tau.
    eye, ids = torch.eye(2), [torch.tensor([TEXT, TEXT]), torch.tensor([TEXT, IMAGE])]
    loss = make_loss(1.0, 0.5).compute_loss_from_embeddings([eye, eye], ids)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)  # both positives at tau 0.5
    by_query = make_loss(1.0, 0.5, grouping="query").compute_loss_from_embeddings([eye, eye], ids)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2  # the image positive at tau 1
    assert by_query.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("columns", [2, 3])
def test_where_it_is_multiple_negatives_ranking(columns: int) -> None:
    embeddings = make_embeddings(columns, torch.float32)
    infonce = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.05)
    expected = infonce.compute_loss_from_embeddings(embeddings, torch.empty(0)).item()
    one_modality = [torch.full((BATCH,), IMAGE)] * columns
    split = {"objective": "split"}
    for loss, ids in (
        (make_loss(0.05, 0.05), MODALITIES[:columns]),
        (make_loss(0.3, 0.05), one_modality),
        (make_loss(0.05, 0.03, **split, split_weight=0.0), MODALITIES[:columns]),
        (make_loss(0.3, 0.05, **split, split_weight=1.0), one_modality),
    ):
        assert loss.compute_loss_from_embeddings(embeddings, ids).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", ["mac", "split"])
def test_progress_moves_the_loss(objective: Any) -> None:
    embeddings = make_embeddings()
    loss = MultimodalMACLoss(nn.Identity(), 0.2, 0.1, schedule="linear", schedule_end=1.0, objective=objective)
    for progress, hard in ((0.0, 0.2), (0.5, 0.15), (1.0, 0.1)):
        loss.progress = progress
        value = loss.compute_loss_from_embeddings(embeddings, MODALITIES).item()
        assert value == pytest.approx(naive(embeddings, hard=hard, objective=objective).item(), abs=1e-10)


@pytest.mark.parametrize("loss", [mac_loss, split_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_similarities_do_not_overflow(loss: Any, dtype: torch.dtype) -> None:
    similarities = torch.tensor([[-500.0, 500.0, 9000.0]], dtype=dtype, requires_grad=True)
    same, masked = torch.tensor([[True, True, True]]), torch.tensor([[False, False, True]])
    value = loss(similarities, torch.tensor([0]), same, 0.05, 0.05, false_negatives=masked)
    assert value.item() == pytest.approx(1000 / 0.05, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, similarities)
    torch.testing.assert_close(gradient, torch.tensor([[-20.0, 20.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("options", OBJECTIVES)
def test_alone_the_positive_costs_nothing(options: dict[str, Any]) -> None:
    """All positives are copies of one: with them masked, nothing but the positive is left."""
    anchors = make_embeddings()[0]
    positives = torch.ones(BATCH, DIM, dtype=torch.float64)
    zeros = [torch.zeros(BATCH, dtype=torch.long)] * 2
    loss = make_loss(**options)
    assert loss.compute_loss_from_embeddings([anchors, positives], zeros, zeros).item() == pytest.approx(0, abs=1e-12)
    counted = loss.compute_loss_from_embeddings([anchors, positives], zeros)
    assert counted.item() == pytest.approx(math.log(BATCH), abs=1e-9)


# --- precision, memory, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_similarities_are_of_at_least_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def dot(left: Tensor, right: Tensor) -> Tensor:
        seen.extend([left.dtype, right.dtype])
        return left @ right.T

    embeddings = make_embeddings(dtype=dtype)
    loss = make_loss(0.05, 0.04).compute_loss_from_embeddings(embeddings, MODALITIES)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(naive(embeddings, temperature=0.05, hard=0.04).item(), abs=1e-5)
    gradients = torch.autograd.grad(loss, embeddings)
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)
    make_loss(similarity_fct=dot).compute_loss_from_embeddings(embeddings, MODALITIES)
    assert seen == [loss.dtype] * 2
    # On a matrix alone, too.
    low = torch.eye(2, dtype=dtype)
    assert mac_loss(low, torch.arange(2), low.bool(), 0.05, 0.04).dtype == loss.dtype


def test_autocast_does_not_reach_the_similarities() -> None:
    embeddings = make_embeddings(dtype=torch.float32)
    outside = make_loss().compute_loss_from_embeddings(embeddings, MODALITIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cos_sim(embeddings[0], embeddings[1]).dtype == torch.bfloat16  # what it guards against
        inside = make_loss().compute_loss_from_embeddings(embeddings, MODALITIES)
    assert inside.item() == outside.item()


def test_it_takes_little_more_memory_than_infonce() -> None:
    matrices = {name: peak_bytes(step) / (4 * 512**2) for name, step in make_steps(512, 1, 8, "cpu").items()}
    assert 3.9 < matrices.pop(BASELINE) < 4.2  # that the measure sees temporaries
    assert len(matrices) == 4
    assert all(4 < count <= 5 for count in matrices.values()), matrices


def test_no_operation_waits_for_the_device() -> None:
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    class Watch(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func.name().split("::")[1].split(".")[0])
            return func(*args, **(kwargs or {}))

    embeddings = make_embeddings()
    with Watch():
        torch.zeros(1).item()
        assert Watch.seen.pop() == "_local_scalar_dense"
        for options in OBJECTIVES:
            loss = make_loss(false_negative_margin=0.1, **options)
            loss.compute_loss_from_embeddings(embeddings, MODALITIES, COPIES).backward()
    assert "_log_softmax" in Watch.seen
    assert [name for name in Watch.seen if name in waiting] == []


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_gathering_in_a_world_of_one_changes_nothing() -> None:
    embeddings = make_embeddings()
    columns = torch.stack(MODALITIES, dim=1).unbind(1)  # strided, as those of a label matrix are
    assert not columns[1].is_contiguous()
    alone = make_loss().compute_loss_from_embeddings(embeddings, columns, COPIES)
    gathered = make_loss(gather_across_devices=True).compute_loss_from_embeddings(embeddings, columns, COPIES)
    assert_equal_with_gradients(gathered, alone, embeddings)


# --- false negatives, statistics


def test_false_negatives_by_hand() -> None:
    # Candidates: three positives, then three explicit negatives; the second negative is query 0's own positive.
    contents = torch.tensor([7, 8, 7, 9, 7, 8])
    found = find_false_negatives(torch.zeros(3, 6), torch.arange(3), contents, contents[:3])
    assert found is not None
    assert found.int().tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]]
    similarities = torch.tensor([[0.5, 0.59, 0.61, 0.9], [0.2, 0.9, 0.95, -1.0]], requires_grad=True)
    for margin, expected in ((0.1, [[0, 0, 1, 1], [0, 0, 0, 0]]), (0.0, [[0, 1, 1, 1], [0, 0, 1, 0]])):
        found = find_false_negatives(similarities, torch.arange(2), margin=margin)
        assert found is not None
        assert found.int().tolist() == expected
    contents = torch.tensor([3, 4, 4, 3])
    found = find_false_negatives(similarities, torch.arange(2), contents, contents[:2], margin=0.1)
    assert found is not None
    assert found.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert find_false_negatives(torch.zeros(2, 2), torch.arange(2)) is None


def test_statistics() -> None:
    # Queries 0 and 1 want texts, query 2 an image; all similarities can be read off the matrix.
    positives = torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
    modalities = [torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])]
    embeddings = [torch.eye(3).requires_grad_(), positives.requires_grad_()]
    loss = make_loss()
    loss.compute_loss_from_embeddings(embeddings, modalities)
    assert loss.statistics is not None
    assert {name: round(value.item(), 5) for name, value in loss.statistics.items()} == {
        "intra_negatives": round(2 / 3, 5),
        "inter_negatives": round(4 / 3, 5),
        "masked_negatives": 0.0,
        "positive_similarity": round((0.8 + 1 + 0.8) / 3, 5),
        "intra_similarity": 0.3,  # 0.0 of query 0 and 0.6 of query 1
        "inter_similarity": 0.15,  # 0.0 of query 0, 0.6 of query 1, 0.0 and 0.0 of query 2
    }
    assert loss.candidates_seen is not None
    assert not any(value.requires_grad for value in (*loss.statistics.values(), loss.candidates_seen))
    assert torch.equal(loss.candidates_seen, positives)

    loss.compute_loss_from_embeddings(embeddings, modalities, [torch.arange(3), torch.tensor([7, 7, 8])])
    assert loss.statistics["masked_negatives"].item() == pytest.approx(2 / 3)
    assert loss.statistics["intra_negatives"].item() == 0
    assert loss.statistics["intra_similarity"].isnan()
    assert loss.statistics["inter_similarity"].item() == pytest.approx(0.15)
    assert [counts.tolist() for counts in loss.negative_counts or ()] == [[0, 0, 0], [1, 1, 2]]

    # They are those of training.
    statistics, seen = loss.statistics, loss.candidates_seen
    loss.model.eval()
    loss.compute_loss_from_embeddings(make_embeddings(), MODALITIES)
    assert loss.statistics is statistics
    assert loss.candidates_seen is seen


# --- features, labels and wrappers


def columns_of(model: SentenceTransformer, pairs: Dataset, contents: list[Tensor] | None = None) -> list[Any]:
    columns = [model.preprocess(pairs[:BATCH][name]) for name in NAMES]
    for features, ids in zip(columns, contents or [], strict=False):
        features["content_ids"] = ids
    return columns


def test_ids_are_those_of_the_features_or_labels(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()  # which pops the modality ids
    loss = MultimodalMACLoss(model, schedule="constant")
    columns = columns_of(model, pairs, COPIES)
    modalities = [features["modality_ids"].clone() for features in columns]
    embeddings = [model(dict(features))["sentence_embedding"] for features in columns]
    expected = loss.compute_loss_from_embeddings(embeddings, modalities, COPIES).item()
    without = loss.compute_loss_from_embeddings(embeddings, modalities).item()
    assert expected < without - 1e-3
    ignored = torch.zeros(BATCH, 3, dtype=torch.long)
    for _ in range(2):  # the ids are there again
        assert loss(columns, ignored).item() == pytest.approx(expected, abs=1e-6)

    labels = torch.stack(modalities, dim=1)
    plain = [{"input_ids": features["input_ids"]} for features in columns]
    assert loss(plain, labels).item() == pytest.approx(without, abs=1e-6)
    plain = [{"input_ids": features["input_ids"]} for features in columns]
    assert loss(plain, (labels + 1) % 2 * labels).item() != pytest.approx(without, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"objective": "split"}, {"false_negative_margin": 0.05}])
def test_matryoshka_is_the_sum_over_cut_embeddings(make_model: MakeModel, pairs: Dataset, options: Any) -> None:
    model = make_model()
    loss = MultimodalMACLoss(model, schedule="constant", **options)
    columns = columns_of(model, pairs, COPIES)
    modalities = [features["modality_ids"] for features in columns]
    whole = [model(dict(features))["sentence_embedding"] for features in columns]
    expected = torch.zeros(())
    for dim, weight in ((8, 1.0), (4, 0.5), (2, 0.25)):
        cut = [normalize(column[:, :dim], dim=1) for column in whole]
        expected = expected + weight * loss.compute_loss_from_embeddings(cut, modalities, COPIES)
    (expected_gradient,) = torch.autograd.grad(expected, list(model.parameters()))
    value = MatryoshkaLoss(model, loss, [8, 4, 2], [1.0, 0.5, 0.25])(columns, None)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(value, list(model.parameters()))
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


# --- bad input


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "hard_temperature"])
def test_temperature_errors(name: str, value: float) -> None:
    temperatures = {"temperature": 0.05, "hard_temperature": 0.04, name: value}
    one = torch.zeros(1, 1), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool)
    message = rf"^{name} is {value}, but it must be a finite number above 0"
    for call in (mac_loss, split_loss):
        with pytest.raises(ValueError, match=message):
            call(*one, **temperatures)
    with pytest.raises(ValueError, match=message):
        MultimodalMACLoss(nn.Identity(), **temperatures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_weight": 1.5}, r"split_weight is 1\.5, but it must be a finite number at least 0 and at most 1"),
        ({"false_negative_margin": -0.1}, r"false_negative_margin is -0\.1, but it must be a finite number at least 0"),
        ({"false_negative_margin": math.nan}, r"false_negative_margin is nan, but"),
        ({"objective": "half"}, "objective is 'half', but it must be one of"),
        ({"schedule": "step"}, r"schedule is 'step', .*'cosine', 'linear', 'constant'"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultimodalMACLoss(nn.Identity(), **options)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (4,)])
def test_masks_are_not_spread(shape: tuple[int, ...]) -> None:
    similarities, index, whole = torch.zeros(2, 4), torch.arange(2), torch.zeros(2, 4, dtype=torch.bool)
    part = torch.zeros(shape, dtype=torch.bool)
    for loss in (mac_loss, split_loss):
        for masks in ({"same_modality": part}, {"same_modality": whole, "false_negatives": part}):
            with pytest.raises(ValueError, match=r"a mask is .* must have the shape of similarities, \(2, 4\)"):
                loss(similarities, index, temperature=0.1, hard_temperature=0.1, **masks)


def test_columns_that_do_not_fit(make_model: MakeModel, pairs: Dataset) -> None:
    embeddings, loss = make_embeddings(), make_loss()
    for columns, ids, contents in (
        (embeddings[:1], MODALITIES[:1], None),
        (embeddings, MODALITIES[:2], None),
        (embeddings, MODALITIES, DIFFERENT[:2]),
        ([embeddings[0], embeddings[1][:-1]], MODALITIES[:2], None),
    ):
        with pytest.raises(ValueError, match=r"needs an anchor, a positive and any negatives of equally many rows"):
            loss.compute_loss_from_embeddings(columns, ids, contents)
    model = make_model()
    loss = MultimodalMACLoss(model)
    columns = columns_of(model, pairs)
    del columns[1]["modality_ids"]
    with pytest.raises(ValueError, match=r"only 2 of 3 columns have the 'modality_ids' feature"):
        loss(columns)
    del columns[0]["modality_ids"], columns[2]["modality_ids"]
    for labels in (None, torch.zeros(BATCH, 3), torch.zeros(BATCH, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"the 3 columns have no 'modality_ids' feature and labels are .*label"):
            loss(columns, labels)
