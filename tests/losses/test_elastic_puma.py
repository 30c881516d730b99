"""The loss at several depths is the weighted sum of those of models that are cut there, whatever the loss inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, nn

from puma_hf import (
    CachedMultimodalMACLoss,
    ElasticDepthLoss,
    JointDistillationLoss,
    MultimodalMACLoss,
    SelfDistillationLoss,
    lora_config,
    prune,
)
from puma_hf.trainer.lora_puma import add_lora, checkpoint_decoder, puma_model
from tests.losses.conftest import BagOfNumbers

DEPTHS = (1, 2, 4)
# By hand: they sum to 3; linear is as 1, 2 and 4 are, last gives the deepest a half.
WEIGHTS = {"equal": [1, 1, 1], "linear": [3 / 7, 6 / 7, 12 / 7], "last": [1 / 2, 1 / 2, 2]}
CONSTANT: dict[str, Any] = {"temperature": 0.5, "hard_temperature": 0.3, "schedule": "constant"}
Result = tuple[float, dict[str, Tensor]]


def mac(model: Any) -> nn.Module:
    return MultimodalMACLoss(model, **CONSTANT)


def joint(model: Any) -> nn.Module:
    return JointDistillationLoss(model, mac(model), distillation_weight=0.01)


def cached(model: Any) -> nn.Module:
    return CachedMultimodalMACLoss(model, **CONSTANT, mini_batch_size=3)


def of_widths(inner: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda model: MatryoshkaLoss(model, inner(model), [32, 8], [1, 0.5])


LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "mac": mac,
    "mse": SelfDistillationLoss,
    "relational": lambda model: SelfDistillationLoss(model, "relational", relational_temperature=0.5),
    "joint": joint,
    "mac, widths": of_widths(mac),
    "joint, widths": of_widths(joint),
    "cached": cached,
    "cached, widths": of_widths(cached),
}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings as precise as the states, which the model rounds to float32; only its norms still do."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.fixture(scope="module")
def deep_dir(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PUMA directory of four layers."""
    folder = tmp_path_factory.mktemp("deep") / "tiny-puma-4"
    prune(qwen_dir, folder, num_kept_layers=4)
    return folder


def student(folder: Path, num_layers: int = 4, like: Any = None) -> SentenceTransformer:
    """With an adapter as after training; cut to fewer layers it has what the deeper one, `like`, has in these."""
    torch.manual_seed(0)
    cut = {"num_kept_layers": num_layers}
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", model_kwargs=cut)
    add_lora(model, lora_config(r=4, dropout=0.0, ret_token_id=puma_model(model).config.ret_token_id))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                disturbed = parameter + torch.randn_like(parameter) * 0.1
                parameter.copy_(disturbed if like is None else like.get_parameter(name))
    return model.double().train()


@pytest.fixture(scope="module")
def models(deep_dir: Path) -> dict[int, SentenceTransformer]:
    """By depth; the deepest is trained at all."""
    whole = student(deep_dir)
    return {depth: student(deep_dir, depth, whole) for depth in DEPTHS[:-1]} | {4: whole}


@pytest.fixture
def columns(models: dict[int, SentenceTransformer], images: list[Image.Image]) -> list[dict[str, Any]]:
    small, square, wide = images
    anchors = ["a red apple on a table", {"image": small}, {"image": [square, wide], "text": "both"}, "apple"]
    positives = [{"image": wide}, "a table", {"text": "a red apple", "instruction": "Find it."}, "one"]
    found = [models[4].preprocess(rows) for rows in (anchors, positives)]
    generator = torch.Generator().manual_seed(0)
    for features in found:
        features["pixel_values"] = features["pixel_values"].double()
        features["teacher_state"] = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    return found


@pytest.fixture
def whole(models: dict[int, SentenceTransformer]) -> Iterator[SentenceTransformer]:
    yield models[4].train()
    assert models[4].forward.__func__ is SentenceTransformer.forward  # type: ignore[attr-defined]  # whatever happened


def run(loss: nn.Module, columns: list[dict[str, Any]]) -> Result:
    """Value and gradients; a loss of several terms is their sum, as to a trainer."""
    loss.zero_grad()
    value = loss([dict(features) for features in columns], None)
    value = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
    value.backward()
    names = loss.get_submodule("model").named_parameters()
    return value.item(), {name: weight.grad.clone() for name, weight in names if weight.grad is not None}


def assert_equal(found: Result, expected: Result, tolerance: float = 1e-6) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * largest, name


def weighted(singles: list[Result], weights: list[float]) -> Result:
    gradients: dict[str, Tensor] = {}
    for (_, of_one), weight in zip(singles, weights, strict=True):
        for name, gradient in of_one.items():
            gradients[name] = gradients.get(name, torch.zeros(())) + weight * gradient
    return sum(weight * value for (value, _), weight in zip(singles, weights, strict=True)), gradients


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_sum_of_the_single_ones(
    models: dict[int, SentenceTransformer], whole: SentenceTransformer, columns: list[dict[str, Any]], name: str
) -> None:
    # Of a cached loss the plain one's, in models of their own, which know of no exits.
    make = LOSSES[name.replace("cached", "mac")]
    singles = [run(make(models[depth]), columns) for depth in DEPTHS]
    assert len({round(value, 3) for value, _ in singles}) == len(DEPTHS)
    for depth_weights, weights in WEIGHTS.items() if name == "mac" else [("last", WEIGHTS["last"])]:
        loss = ElasticDepthLoss(whole, LOSSES[name](whole), DEPTHS, depth_weights)  # type: ignore[arg-type]
        assert_equal(run(loss, columns), weighted(singles, weights))
        with torch.no_grad():
            value = loss(columns, None)
        value = sum(value.values()) if isinstance(value, dict) else value
        assert value.item() == pytest.approx(weighted(singles, weights)[0], rel=1e-6)
    assert puma_model(whole).config.trained_depths == [1, 2, 4]
    assert loss.get_config_dict()["depths"] == [1, 2, 4]


@pytest.mark.parametrize("name", ["joint", "cached"])
def test_checkpointing_changes_nothing(deep_dir: Path, columns: list[dict[str, Any]], name: str) -> None:
    model = student(deep_dir)
    loss = ElasticDepthLoss(model, LOSSES[name](model), DEPTHS)
    before, calls = run(loss, columns), [0]
    checkpoint_decoder(puma_model(model))
    puma_model(model).language_model.layers[0].self_attn.register_forward_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    assert_equal(run(loss, columns), before)
    assert calls[0] == {"joint": 4, "cached": 12}[name]  # a layer runs once more in each backward pass


@pytest.mark.parametrize("name", ["mac", "cached, widths"])
def test_sampled_computes_one_depth(
    models: dict[int, SentenceTransformer], whole: SentenceTransformer, columns: list[dict[str, Any]], name: str
) -> None:
    singles = {depth: run(LOSSES[name](models[depth]), columns) for depth in DEPTHS}
    loss = ElasticDepthLoss(whole, LOSSES[name](whole), DEPTHS, "sampled")
    layers = puma_model(whole).language_model.layers
    drawn, ran = [], [0] * 4
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.__setitem__(number, 1))  # type: ignore[misc]
        for number, layer in enumerate(layers)
    ]
    torch.manual_seed(1)
    for _ in range(5):
        whole.zero_grad(set_to_none=True)
        ran[:] = [0] * 4
        found = run(loss, columns)
        drawn.append(sum(ran))
        assert ran == [1] * drawn[-1] + [0] * (4 - drawn[-1])
        assert_equal(found, singles[drawn[-1]])  # with no gradient for what lies above
    assert {*drawn} == {*DEPTHS}
    whole.eval()  # an evaluation is of all depths, and draws nothing
    state = torch.get_rng_state()
    value = run(loss, columns)[0]
    assert value == pytest.approx(sum(value for value, _ in singles.values()), rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    for hook in hooks:
        hook.remove()


# --- what is refused


@pytest.mark.parametrize("name", ["mac", "joint", "cached"])
def test_a_matryoshka_loss_must_be_inside(whole: SentenceTransformer, columns: list[dict[str, Any]], name: str) -> None:
    loss = MatryoshkaLoss(whole, ElasticDepthLoss(whole, LOSSES[name](whole), DEPTHS), [32, 8])
    with pytest.raises(ValueError, match=r"Take ElasticDepthLoss\(model, MatryoshkaLoss\(\.\.\.\)\)"):
        loss(columns, None)


@pytest.mark.parametrize("depths", [(), (0, 4), (2, 1, 4), (1, 1, 4), (1, 5), (1.0, 4), (True, 4)])
def test_bad_depths_are_refused(whole: SentenceTransformer, depths: Any) -> None:
    with pytest.raises(ValueError, match=r"depths=\(.*\) must be rising numbers of layers from 1 to 4, which the mo"):
        ElasticDepthLoss(whole, mac(whole), depths)


def test_what_else_is_refused(whole: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"depths=\(1, 2\) must end in the model's own 4 layers\. Add .* prune, to 2"):
        ElasticDepthLoss(whole, mac(whole), (1, 2))
    with pytest.raises(ValueError, match="depth_weights is 'deepest', but it must be one of"):
        ElasticDepthLoss(whole, mac(whole), DEPTHS, "deepest")  # type: ignore[arg-type]
    bag = SentenceTransformer(modules=[BagOfNumbers()], device="cpu")
    with pytest.raises(ValueError, match="is not a PUMA model alone"):
        ElasticDepthLoss(bag, mac(bag), (1, 2))
