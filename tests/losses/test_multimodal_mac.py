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
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

from puma_hf.losses import MultimodalMACLoss

MakeModel = Callable[[], SentenceTransformer]
BATCH, DIM = 6, 8
OWN_OPTIONS = {"objective": "mac", "false_negative_margin": None}
TEXT, IMAGE, IMAGE_TEXT, VIDEO, VIDEO_TEXT = range(5)
# Several queries share a target modality, one (video,text) has it alone, anchors and positives differ.
ANCHOR_IDS = torch.tensor([TEXT, TEXT, IMAGE, IMAGE_TEXT, TEXT, VIDEO])
POSITIVE_IDS = torch.tensor([IMAGE, IMAGE, TEXT, TEXT, IMAGE, VIDEO_TEXT])
NEGATIVE_IDS = torch.tensor([IMAGE, TEXT, TEXT, IMAGE_TEXT, VIDEO, IMAGE])


def make_batch(
    num_negatives: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = [
        torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2 + num_negatives)
    ]
    return embeddings, [
        ANCHOR_IDS,
        POSITIVE_IDS,
        *[NEGATIVE_IDS.roll(shift) for shift in range(num_negatives)],
    ]


def naive_mac(
    embeddings: list[Tensor], ids: list[Tensor], temperature: float, hard: float, grouping: str = "target"
) -> Tensor:
    """The formula as loops over scalars."""
    candidates = [(column, row) for column in range(1, len(embeddings)) for row in range(embeddings[0].shape[0])]
    terms = []
    for query in range(embeddings[0].shape[0]):
        wanted = ids[1 if grouping == "target" else 0][query].item()
        anchor = embeddings[0][query].double()
        logits = []
        for column, row in candidates:
            candidate = embeddings[column][row].double()
            cosine = (anchor * candidate).sum() / (anchor.norm() * candidate.norm())
            tau = hard if ids[column][row].item() == wanted else temperature
            logits.append(cosine / tau)
        denominator = sum(torch.exp(logit) for logit in logits)
        terms.append(-torch.log(torch.exp(logits[candidates.index((1, query))]) / denominator))
    return sum(terms) / len(terms)  # type: ignore[return-value]


def constant_loss(temperature: float = 0.05, hard: float = 0.04, **kwargs: Any) -> MultimodalMACLoss:
    return MultimodalMACLoss(nn.Identity(), temperature, hard, schedule="constant", **kwargs)


@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("grouping", ["target", "query"])
@pytest.mark.parametrize(("temperature", "hard"), [(0.05, 0.04), (0.5, 0.1), (0.07, 0.2)])
def test_equals_the_formula(num_negatives: int, grouping: Any, temperature: float, hard: float) -> None:
    embeddings, ids = make_batch(num_negatives)
    loss = constant_loss(temperature, hard, grouping=grouping).compute_loss_from_embeddings(embeddings, ids)
    expected = naive_mac(embeddings, ids, temperature, hard, grouping)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)

    gradients = torch.autograd.grad(loss, embeddings)
    for gradient, naive in zip(gradients, torch.autograd.grad(expected, embeddings), strict=True):
        torch.testing.assert_close(gradient, naive, rtol=0, atol=1e-9)


def test_the_groupings_differ_and_so_do_the_temperatures() -> None:
    embeddings, ids = make_batch(1)
    target = constant_loss().compute_loss_from_embeddings(embeddings, ids)
    query = constant_loss(grouping="query").compute_loss_from_embeddings(embeddings, ids)
    swapped = constant_loss(0.04, 0.05).compute_loss_from_embeddings(embeddings, ids)
    assert len({round(loss.item(), 4) for loss in (target, query, swapped)}) == 3


def test_two_by_hand() -> None:
    # Positives at cosine 1, the other positive at cosine 0; the temperatures decide which logits are 1/tau.
    eye = torch.eye(2)
    mixed = [torch.tensor([TEXT, TEXT]), torch.tensor([TEXT, IMAGE])]
    loss = constant_loss(1.0, 0.5).compute_loss_from_embeddings([eye, eye], mixed)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)  # both positives at tau 0.5
    by_query = constant_loss(1.0, 0.5, grouping="query").compute_loss_from_embeddings([eye, eye], mixed)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2  # the image positive at tau 1
    assert by_query.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_equal_temperatures_are_multiple_negatives_ranking(num_negatives: int) -> None:
    embeddings, ids = make_batch(num_negatives, torch.float32)
    reference = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.05)
    expected = reference.compute_loss_from_embeddings(embeddings, torch.empty(0))
    loss = constant_loss(0.05, 0.05).compute_loss_from_embeddings(embeddings, ids)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_one_modality_is_infonce_at_the_hard_temperature() -> None:
    embeddings, _ = make_batch(1)
    ids = [torch.full((BATCH,), IMAGE)] * 3
    reference = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.03)
    expected = reference.compute_loss_from_embeddings(embeddings, torch.empty(0))
    loss = constant_loss(0.05, 0.03).compute_loss_from_embeddings(embeddings, ids)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


def test_equal_candidates_give_log_of_their_number() -> None:
    ones, ids = torch.ones(BATCH, DIM), torch.full((BATCH,), TEXT)
    loss = constant_loss().compute_loss_from_embeddings([ones, ones, ones], [ids, ids, ids])
    assert loss.item() == pytest.approx(math.log(2 * BATCH), abs=1e-5)


def test_progress_moves_the_loss() -> None:
    embeddings, ids = make_batch(1)
    loss = MultimodalMACLoss(nn.Identity(), 0.08, 0.02, schedule="linear", schedule_end=1.0)
    for progress, hard in ((0.0, 0.08), (0.5, 0.05), (1.0, 0.02)):
        loss.progress = progress
        value = loss.compute_loss_from_embeddings(embeddings, ids).item()
        assert value == pytest.approx(naive_mac(embeddings, ids, 0.08, hard).item(), abs=1e-9)


def test_negative_counts() -> None:
    loss = constant_loss()
    assert loss.negative_counts is None
    loss.compute_loss_from_embeddings(*make_batch(1))
    assert loss.negative_counts is not None
    intra, inter = (counts.tolist() for counts in loss.negative_counts)
    # Candidates: 3 image, 2 text, 1 video,text positives; 2 image, 2 text, 1 image,text, 1 video negatives.
    assert intra == [4, 4, 3, 3, 4, 0]
    assert inter == [11 - count for count in intra]
    # With the anchor's modality the positive of a cross-modal pair is not among the intra candidates.
    by_query = constant_loss(grouping="query")
    by_query.compute_loss_from_embeddings(*make_batch(1))
    assert by_query.negative_counts is not None
    assert by_query.negative_counts[0].tolist() == [4, 4, 5, 1, 4, 1]


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    embeddings, ids = make_batch(1, torch.bfloat16)
    loss = constant_loss().compute_loss_from_embeddings(embeddings, ids)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_mac(embeddings, ids, 0.05, 0.04).item(), abs=1e-5)
    loss.backward()
    assert all(embedding.grad is not None and embedding.grad.isfinite().all() for embedding in embeddings)


def test_any_similarity_fct_gets_at_least_float32() -> None:
    seen: list[torch.dtype] = []

    def dot(left: Tensor, right: Tensor) -> Tensor:
        seen.extend([left.dtype, right.dtype])
        return left @ right.T

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        constant_loss(similarity_fct=dot).compute_loss_from_embeddings(*make_batch(1, dtype))
    assert seen == [torch.float32] * 6 + [torch.float64] * 2


def test_autocast_does_not_reach_the_similarities() -> None:
    embeddings, ids = make_batch(1, torch.float32)
    outside = constant_loss().compute_loss_from_embeddings(embeddings, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cos_sim(embeddings[0], embeddings[1]).dtype == torch.bfloat16  # what it guards against
        inside = constant_loss().compute_loss_from_embeddings(embeddings, ids)
    assert inside.item() == outside.item()


def test_similarity_fct_is_used() -> None:
    embeddings, ids = make_batch(0)
    normalised = [nn.functional.normalize(column, dim=1) for column in embeddings]
    by_dot = constant_loss(similarity_fct=dot_score)
    cosine = constant_loss().compute_loss_from_embeddings(embeddings, ids).item()
    assert by_dot.compute_loss_from_embeddings(normalised, ids).item() == pytest.approx(cosine, abs=1e-9)
    assert by_dot.compute_loss_from_embeddings(embeddings, ids).item() != pytest.approx(cosine, abs=1e-2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_gathering_in_a_world_of_one_changes_nothing() -> None:
    embeddings, ids = make_batch(1)
    alone = constant_loss().compute_loss_from_embeddings(embeddings, ids)
    gathered = constant_loss(gather_across_devices=True).compute_loss_from_embeddings(embeddings, ids)
    assert gathered.item() == alone.item()
    expected = torch.autograd.grad(alone, embeddings)
    for gradient, other in zip(torch.autograd.grad(gathered, embeddings), expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("grouping", ["target", "query"])
def test_gathering_takes_the_other_devices_candidates(monkeypatch: pytest.MonkeyPatch, grouping: Any) -> None:
    # Rank 1 of 2: the other device's columns stand before ours.
    theirs, ours = make_batch(1, seed=1), make_batch(1)
    ours[1][1] = ours[1][1].roll(1)  # the devices' modalities differ
    partner = {id(column): other for part in (0, 1) for column, other in zip(ours[part], theirs[part], strict=True)}

    def gather(tensor: Tensor) -> Tensor:
        return torch.cat([partner[id(tensor)], tensor])

    module = "puma_hf.losses.multimodal_mac"
    monkeypatch.setattr(f"{module}.all_gather", gather)
    monkeypatch.setattr(f"{module}.all_gather_with_grad", gather)
    monkeypatch.setattr(f"{module}.get_rank", lambda: 1)
    loss = constant_loss(gather_across_devices=True, grouping=grouping)
    value = loss.compute_loss_from_embeddings(*ours).item()

    # The loop over both batches averages over all queries; the other half is the loop with the roles swapped.
    both_embeddings = [torch.cat(pair) for pair in zip(theirs[0], ours[0], strict=True)]
    both_ids = [torch.cat(pair) for pair in zip(theirs[1], ours[1], strict=True)]
    expected = []
    for query in range(BATCH, 2 * BATCH):
        order = torch.tensor([query, *[row for row in range(2 * BATCH) if row != query]])
        candidates = [column[order] for column in both_embeddings[1:]]
        ids = [column[order] for column in both_ids]
        similarities = cos_sim(both_embeddings[0][query : query + 1], torch.cat(candidates))[0]
        wanted = ids[1 if grouping == "target" else 0][0]
        logits = similarities / torch.where(torch.cat(ids[1:]) == wanted, 0.04, 0.05)
        expected.append((logits.logsumexp(0) - logits[0]).item())
    assert value == pytest.approx(sum(expected) / BATCH, abs=1e-6)


def test_forward_reads_ids_of_features_even_if_the_model_pops_them(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    rows = pairs[:4]
    names = ("anchor", "positive", "negative")
    columns = [model.preprocess(rows[name]) for name in names]
    ids = [column["modality_ids"].clone() for column in columns]
    embeddings = [model(model.preprocess(rows[name]))["sentence_embedding"] for name in names]
    loss = MultimodalMACLoss(model, schedule="constant")
    expected = naive_mac(embeddings, ids, 0.03, 0.018).item()
    ignored = torch.zeros(4, 3, dtype=torch.long)
    assert loss(columns, ignored).item() == pytest.approx(expected, abs=1e-5)
    for column, column_ids in zip(columns, ids, strict=True):
        assert torch.equal(column["modality_ids"], column_ids)
    matryoshka = MatryoshkaLoss(model, loss, matryoshka_dims=[8, 8])
    assert matryoshka(columns, None).item() == pytest.approx(2 * expected, abs=2e-4)


def test_forward_reads_ids_of_labels(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    rows = pairs[:4]
    loss = MultimodalMACLoss(model, schedule="constant")
    columns = [model.preprocess(rows[name]) for name in ("anchor", "positive")]
    with_features = loss([dict(column) for column in columns], None).item()
    labels = torch.stack([column.pop("modality_ids") for column in columns], dim=1)
    assert loss(columns, labels).item() == pytest.approx(with_features, abs=1e-9)
    columns = [{"input_ids": column["input_ids"]} for column in columns]
    assert loss(columns, (labels + 1) % 2 * labels).item() != pytest.approx(with_features, abs=1e-4)


def test_forward_errors(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    loss = MultimodalMACLoss(model)

    def columns(*without: int) -> list[dict[str, Any]]:
        made = [model.preprocess(pairs[:4][name]) for name in ("anchor", "positive")]
        for index in without:
            made[index].pop("modality_ids")
        return made

    labels = torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"columns \[0, 1\] of 2 have no 'modality_ids'.*labels is None.*label column"):
        loss(columns(0, 1), None)
    with pytest.raises(ValueError, match=r"only the columns \[1\] of 2 lack.*same input module"):
        loss(columns(1), labels)
    wrong = [labels.float(), labels.bool(), labels[:, 0], torch.zeros(4, 3, dtype=torch.long)]
    for value in wrong:
        with pytest.raises(ValueError, match=r"labels are .*must be integers \(batch_size, 2\)\. Pass"):
            loss(columns(0, 1), value)


def test_embedding_errors() -> None:
    loss = constant_loss()
    embeddings, ids = make_batch(1)
    with pytest.raises(ValueError, match=r"got 1 columns of embeddings and 1 .*anchor and a positive.*Pass"):
        loss.compute_loss_from_embeddings(embeddings[:1], ids[:1])
    with pytest.raises(ValueError, match="got 3 columns of embeddings and 2 of modality ids"):
        loss.compute_loss_from_embeddings(embeddings, ids[:2])
    for broken in (embeddings[1][:-1], embeddings[1][:, :-1], embeddings[1][0]):
        with pytest.raises(ValueError, match=r"must be the same \(batch_size, embedding_dim\)\. Give every row"):
            loss.compute_loss_from_embeddings([embeddings[0], broken], ids[:2])
    for wrong in (ids[1][:-1], ids[1].float(), ids[1].unsqueeze(1)):
        with pytest.raises(ValueError, match=r"columns of modality ids are .*must be integers \(6,\).*Pass one"):
            loss.compute_loss_from_embeddings(embeddings[:2], [ids[0], wrong])
    for value in (-1, 5):
        with pytest.raises(ValueError, match=rf"{value}.*must be in 0\.\.4 \(0 = 'text', .*Map each.*MODALITY_IDS"):
            loss.compute_loss_from_embeddings(embeddings[:2], [ids[0], torch.full((BATCH,), value)])
    with pytest.raises(ValueError, match=r"the batch is empty.*Drop"):
        loss.compute_loss_from_embeddings([torch.zeros(0, DIM)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "hard_temperature"])
def test_temperature_errors(name: str, value: float) -> None:
    message = rf"^{name} is {value}, but a temperature must be positive and finite\. Use"
    with pytest.raises(ValueError, match=message):
        MultimodalMACLoss(nn.Identity(), **{name: value})


def test_choice_errors() -> None:
    with pytest.raises(ValueError, match=r"schedule is 'step', .*'cosine', 'linear', 'constant'"):
        MultimodalMACLoss(nn.Identity(), schedule="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grouping is 'task', but it must be one of \('target', 'query'\)"):
        MultimodalMACLoss(nn.Identity(), grouping="task")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective is 'infonce', but it must be one of \('mac', 'split'\)"):
        MultimodalMACLoss(nn.Identity(), objective="infonce")  # type: ignore[arg-type]


def test_idle_schedule_counts_only_training(make_model: MakeModel, pairs: Dataset) -> None:
    model = make_model()
    loss = MultimodalMACLoss(model)
    seen: list[bool] = []
    loss.warn_if_schedule_idles = lambda training: seen.append(training)  # type: ignore[method-assign]
    for training in (True, False):
        model.train(training)
        loss([model.preprocess(pairs[:4][name]) for name in ("anchor", "positive")])
    assert seen == [True, False]


def test_model_card_facts() -> None:
    loss = MultimodalMACLoss(nn.Identity(), 0.06, 0.03, "linear", "query", dot_score, True)
    assert loss.get_config_dict() == {
        **OWN_OPTIONS,
        "temperature": 0.06,
        "hard_temperature": 0.03,
        "schedule": "linear",
        "schedule_end": 0.5,
        "grouping": "query",
        "similarity_fct": "dot_score",
        "gather_across_devices": True,
    }
    assert MultimodalMACLoss(nn.Identity()).get_config_dict() == {
        **OWN_OPTIONS,
        "temperature": 0.03,
        "hard_temperature": 0.018,
        "schedule": "exponential",
        "schedule_end": 0.5,
        "grouping": "target",
        "similarity_fct": "cos_sim",
        "gather_across_devices": False,
    }
    assert "eprint={2507.08064}" in loss.citation
    assert loss.citation.count("{") == loss.citation.count("}")
