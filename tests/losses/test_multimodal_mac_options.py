"""False negatives, the split objective, statistics and wrappers; the paper's loss is in test_multimodal_mac.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from puma_hf.losses import MultimodalMACLoss
from puma_hf.losses.multimodal_mac import read_content_ids

MakeModel = Callable[[], SentenceTransformer]
BATCH, DIM = 6, 8
MODALITIES = [torch.tensor(ids) for ids in ([0, 0, 1, 2, 0, 3], [1, 1, 0, 0, 1, 4], [1, 0, 0, 2, 3, 1])]
DIFFERENT = [torch.arange(column * BATCH, (column + 1) * BATCH) for column in range(3)]
OBJECTIVES: list[dict[str, Any]] = [{}, {"objective": "split"}, {"objective": "split", "split_weight": 0.8}]


def make_embeddings(dim: int = DIM, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, dim, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def make_loss(temperature: float = 0.2, hard: float = 0.1, **options: Any) -> MultimodalMACLoss:
    return MultimodalMACLoss(nn.Identity(), temperature, hard, schedule="constant", **options)


def naive(
    embeddings: list[Tensor],
    contents: list[Tensor],
    *,
    weight: float | None = None,
    margin: float | None = None,
    temperature: float = 0.2,
    hard: float = 0.1,
) -> Tensor:
    """Loops over the definition: candidates one by one; `weight` is that of the split objective."""
    terms = []
    for query in range(BATCH):
        wanted, own = MODALITIES[1][query], contents[1][query]
        scores = {
            (column, row): torch.cosine_similarity(embeddings[0][query], embeddings[column][row], dim=0)
            for column in (1, 2)
            for row in range(BATCH)
        }
        positive = scores[1, query]
        kept = {
            place: score
            for place, score in scores.items()
            if place == (1, query)
            or (contents[place[0]][place[1]] != own and (margin is None or score <= positive + margin))
        }
        intra = {place for place in kept if MODALITIES[place[0]][place[1]] == wanted}
        if weight is None:
            logits = [score / (hard if place in intra else temperature) for place, score in kept.items()]
            terms.append(torch.stack(logits).logsumexp(0) - positive / hard)
        else:
            whole = torch.stack([score / temperature for score in kept.values()]).logsumexp(0) - positive / temperature
            group = torch.stack([kept[place] / hard for place in intra]).logsumexp(0) - positive / hard
            terms.append((1 - weight) * whole + weight * group)
    return torch.stack(terms).mean()


def copies() -> list[Tensor]:
    """Content ids: query 0's positive comes again as query 4's and as query 1's negative, query 2's as its own."""
    contents = [ids.clone() for ids in DIFFERENT]
    contents[1][4] = contents[2][1] = contents[1][0]
    contents[2][2] = contents[1][2]
    return contents


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("margin", [None, 0.0, 0.2])
@pytest.mark.parametrize("contents", [DIFFERENT, copies()])
def test_equals_the_loops(options: dict[str, Any], margin: float | None, contents: list[Tensor]) -> None:
    embeddings = make_embeddings()
    loss = make_loss(false_negative_margin=margin, **options)
    value = loss.compute_loss_from_embeddings(embeddings, MODALITIES, contents)
    weight = options.get("split_weight", 0.2) if options else None
    expected = naive(embeddings, contents, weight=weight, margin=margin)
    assert value.item() == pytest.approx(expected.item(), abs=1e-10)
    gradients = torch.autograd.grad(value, embeddings)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, embeddings), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_masked_copies_are_as_if_they_were_not_there(options: dict[str, Any]) -> None:
    """Negatives that repeat the only positive of all queries: with them masked, the loss of the pairs remains."""
    anchors, _, _ = make_embeddings()
    one = torch.randn(1, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positives = one.repeat(BATCH, 1)
    zeros = torch.zeros(BATCH, dtype=torch.long)
    loss = make_loss(**options)
    masked = loss.compute_loss_from_embeddings([anchors, positives], [zeros, zeros], [zeros, zeros])
    assert masked.item() == pytest.approx(0, abs=1e-12)  # nothing but the positive is left
    counted = loss.compute_loss_from_embeddings([anchors, positives], [zeros, zeros])
    assert counted.item() == pytest.approx(math.log(BATCH), abs=1e-9)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_different_contents_change_nothing(options: dict[str, Any]) -> None:
    embeddings, loss = make_embeddings(), make_loss(**options)
    without = loss.compute_loss_from_embeddings(embeddings, MODALITIES)
    assert loss.compute_loss_from_embeddings(embeddings, MODALITIES, DIFFERENT).item() == without.item()
    assert loss.compute_loss_from_embeddings(embeddings, MODALITIES, copies()).item() < without.item() - 1e-3


def test_a_wide_margin_changes_nothing_and_a_narrow_one_does() -> None:
    embeddings = make_embeddings()
    without = make_loss().compute_loss_from_embeddings(embeddings, MODALITIES)
    values = [
        make_loss(false_negative_margin=margin).compute_loss_from_embeddings(embeddings, MODALITIES).item()
        for margin in (2.0, 0.1, 0.0)
    ]
    assert values[0] == without.item()
    assert values[0] > values[1] > values[2]


def test_split_at_the_ends_is_multiple_negatives_ranking() -> None:
    embeddings = [column.float() for column in make_embeddings()]
    reference = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.2)
    expected = reference.compute_loss_from_embeddings(embeddings, torch.empty(0)).item()
    whole = make_loss(objective="split", split_weight=0.0)
    assert whole.compute_loss_from_embeddings(embeddings, MODALITIES).item() == pytest.approx(expected, abs=1e-6)
    group = make_loss(0.7, 0.2, objective="split", split_weight=1.0)
    one_modality = [torch.zeros(BATCH, dtype=torch.long)] * 3
    assert group.compute_loss_from_embeddings(embeddings, one_modality).item() == pytest.approx(expected, abs=1e-6)
    assert group.compute_loss_from_embeddings(embeddings, MODALITIES).item() < expected - 0.1


def test_the_split_objective_follows_the_schedule() -> None:
    embeddings = make_embeddings()
    loss = MultimodalMACLoss(nn.Identity(), 0.2, 0.1, schedule="linear", schedule_end=1.0, objective="split")
    for progress, hard in ((0.0, 0.2), (0.5, 0.15), (1.0, 0.1)):
        loss.progress = progress
        value = loss.compute_loss_from_embeddings(embeddings, MODALITIES).item()
        assert value == pytest.approx(naive(embeddings, DIFFERENT, weight=0.2, hard=hard).item(), abs=1e-10)


# --- statistics


def test_statistics() -> None:
    # Queries 0 and 1 want texts, query 2 an image; all similarities can be read off the matrix.
    anchors = torch.eye(3)
    positives = torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
    texts, wanted = torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])
    loss = make_loss()
    assert loss.statistics is None
    assert loss.candidates_seen is None
    embeddings = [anchors.requires_grad_(), positives.requires_grad_()]
    loss.compute_loss_from_embeddings(embeddings, [texts, wanted])
    assert loss.statistics is not None
    assert {name: round(value.item(), 5) for name, value in loss.statistics.items()} == {
        "intra_negatives": round(2 / 3, 5),
        "inter_negatives": round(4 / 3, 5),
        "masked_negatives": 0.0,
        "positive_similarity": round((0.8 + 1 + 0.8) / 3, 5),
        "intra_similarity": 0.3,  # 0.0 of query 0 and 0.6 of query 1
        "inter_similarity": 0.15,  # 0.0 of query 0, 0.6 of query 1, 0.0 and 0.0 of query 2
    }
    assert not any(value.requires_grad for value in loss.statistics.values())
    assert loss.candidates_seen is not None
    assert not loss.candidates_seen.requires_grad
    assert torch.equal(loss.candidates_seen, positives)

    contents = [torch.arange(3), torch.tensor([7, 7, 8])]
    loss.compute_loss_from_embeddings(embeddings, [texts, wanted], contents)
    assert loss.statistics["masked_negatives"].item() == pytest.approx(2 / 3)
    assert loss.statistics["intra_negatives"].item() == 0
    assert loss.statistics["intra_similarity"].isnan()
    assert loss.statistics["inter_similarity"].item() == pytest.approx(0.15)
    assert loss.negative_counts is not None
    assert [counts.tolist() for counts in loss.negative_counts] == [[0, 0, 0], [1, 1, 2]]


def test_statistics_are_those_of_training() -> None:
    loss = make_loss()
    loss.compute_loss_from_embeddings(make_embeddings(), MODALITIES)
    statistics, seen = loss.statistics, loss.candidates_seen
    loss.model.eval()
    loss.compute_loss_from_embeddings(make_embeddings(seed=1), MODALITIES)
    assert loss.statistics is statistics
    assert loss.candidates_seen is seen


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
            loss.compute_loss_from_embeddings(embeddings, MODALITIES, copies()).backward()
    assert "exp_" in Watch.seen
    assert [name for name in Watch.seen if name in waiting] == []


# --- features and wrappers


def columns_with_copies(model: SentenceTransformer, pairs: Dataset) -> list[dict[str, Any]]:
    columns = [model.preprocess(pairs[:BATCH][name]) for name in ("anchor", "positive", "negative")]
    for features, contents in zip(columns, copies(), strict=True):
        features["content_ids"] = contents
    return columns


def test_contents_are_read_from_the_features(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    loss = MultimodalMACLoss(model, schedule="constant")
    columns = columns_with_copies(model, pairs)
    modalities = [features["modality_ids"] for features in columns]
    embeddings = [model(dict(features))["sentence_embedding"] for features in columns]
    value = loss(columns, None)
    expected = loss.compute_loss_from_embeddings(embeddings, modalities, copies())
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert value.item() < loss.compute_loss_from_embeddings(embeddings, modalities).item() - 1e-3
    assert all("modality_ids" in features and "content_ids" in features for features in columns)

    for features in columns:
        del features["content_ids"]
    assert read_content_ids(columns) is None
    assert loss(columns, None).item() == loss.compute_loss_from_embeddings(embeddings, modalities).item()


@pytest.mark.parametrize("options", [{}, {"objective": "split"}, {"false_negative_margin": 0.05}])
def test_matryoshka_is_the_sum_over_cut_embeddings(
    make_model: MakeModel, pairs: Dataset, options: dict[str, Any]
) -> None:
    model = make_model()
    loss = MultimodalMACLoss(model, schedule="constant", **options)
    dims, weights = [8, 4, 2], [1.0, 0.5, 0.25]
    columns = columns_with_copies(model, pairs)
    modalities = [features["modality_ids"] for features in columns]
    whole = [model(dict(features))["sentence_embedding"] for features in columns]
    expected = torch.zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        cut = [nn.functional.normalize(column[:, :dim], dim=1) for column in whole]
        expected = expected + weight * loss.compute_loss_from_embeddings(cut, modalities, copies())
    (expected_gradient,) = torch.autograd.grad(expected, list(model.parameters()))

    value = MatryoshkaLoss(model, loss, matryoshka_dims=dims, matryoshka_weights=weights)(columns, None)
    (gradient,) = torch.autograd.grad(value, list(model.parameters()))
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


def test_labels_are_gathered_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Tensor] = []

    def gather(tensor: Tensor) -> Tensor:
        gathered.append(tensor)
        return tensor

    for name in ("all_gather", "all_gather_with_grad"):
        monkeypatch.setattr(f"puma_hf.losses.multimodal_mac.{name}", gather)
    columns = torch.stack(MODALITIES, dim=1).unbind(1)
    assert not columns[1].is_contiguous()
    make_loss(gather_across_devices=True).compute_loss_from_embeddings(make_embeddings(), columns, DIFFERENT)
    assert len(gathered) == 6
    assert all(tensor.is_contiguous() for tensor in gathered)


# --- bad input


def test_content_errors(make_model: MakeModel, pairs: Dataset) -> None:
    loss, embeddings = make_loss(), make_embeddings()
    with pytest.raises(
        ValueError, match=r"got 3 columns of embeddings and 2 of content ids.*the anchor's too, or None"
    ):
        loss.compute_loss_from_embeddings(embeddings, MODALITIES, DIFFERENT[:2])
    for wrong in (DIFFERENT[1].float(), DIFFERENT[1][:-1]):
        with pytest.raises(ValueError, match=r"columns of content ids are .*integers \(6,\).*Pass one content id"):
            loss.compute_loss_from_embeddings(embeddings, MODALITIES, [DIFFERENT[0], wrong, DIFFERENT[2]])
    model = make_model()
    columns = columns_with_copies(model, pairs)
    del columns[1]["content_ids"]
    with pytest.raises(ValueError, match=r"only the columns \[1\] of 3 lack the 'content_ids'.*same input module"):
        MultimodalMACLoss(model)(columns, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_weight": 1.5}, r"split_weight is 1\.5, but .* \[0, 1\]\. Use 0\.5"),
        (
            {"false_negative_margin": -0.1},
            r"false_negative_margin is -0\.1, but .*at least 0.*Use a value such as 0\.1",
        ),
        ({"objective": "half"}, r"objective is 'half', but it must be one of \('mac', 'split'\)"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


def test_the_card_names_the_options() -> None:
    settings = make_loss(objective="split", split_weight=0.3, false_negative_margin=0.1).get_config_dict()
    assert {"objective": "split", "split_weight": 0.3, "false_negative_margin": 0.1}.items() <= settings.items()
    assert "split_weight" not in make_loss().get_config_dict()
