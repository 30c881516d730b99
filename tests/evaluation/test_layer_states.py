from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import prune
from puma_hf.evaluation.layer_states import _Watch, decoder_of, encode_all_layers, keep_last_depths, progress_bar
from puma_hf.flops import plain_forward
from tests.evaluation.layer_models import pruned_to_every_depth
from tests.tiny import HIDDEN_SIZE, NUM_LAYERS, build_checkpoint

PROMPT = "Find what fits."


@pytest.fixture(scope="module")
def models(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SentenceTransformer]:
    return pruned_to_every_depth(qwen_dir, tmp_path_factory.mktemp("depths"))


@pytest.fixture
def inputs(images: list[Image.Image]) -> list[Any]:
    """Of different lengths, so that batches are padded and sorted."""
    return ["a red apple", {"image": images[0]}, "a", {"image": images[2], "text": "red"}, "a table, red " * 5]


def encode(model: SentenceTransformer, inputs: list[Any], prompt: str = "", batch_size: int = 32) -> torch.Tensor:
    return torch.as_tensor(model.encode(inputs, prompt=prompt, batch_size=batch_size, show_progress_bar=False))


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_equals_each_pruned_model(
    models: list[SentenceTransformer], inputs: list[Any], batch_size: int, prompt: str
) -> None:
    embeddings = encode_all_layers(models[-1], inputs, prompt=prompt, batch_size=batch_size)
    assert embeddings.shape == (NUM_LAYERS, len(inputs), HIDDEN_SIZE)
    assert embeddings.dtype == torch.float32
    expected = torch.stack([encode(model, inputs, prompt, batch_size) for model in models])
    assert (embeddings - expected).abs().max() <= 1e-5
    between = (expected[:, None] - expected[None]).abs().amax(dim=(2, 3)) + torch.eye(NUM_LAYERS)
    assert between.min() > 0.1  # the depths differ, so the comparison says something


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_backbones(family: str, tmp_path: Path, inputs: list[Any]) -> None:
    models = pruned_to_every_depth(build_checkpoint(tmp_path / "original", family), tmp_path)
    embeddings = encode_all_layers(models[-1], inputs)
    assert (embeddings - torch.stack([encode(model, inputs) for model in models])).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_last_layer_kept_equals_each_such_model(family: str, tmp_path: Path, inputs: list[Any]) -> None:
    source = build_checkpoint(tmp_path / "original", family, num_layers=6)
    prune(source, tmp_path / "full", num_kept_layers=6)
    full = SentenceTransformer(str(tmp_path / "full"), trust_remote_code=True, device="cpu")
    first = 4 if family == "qwen3_vl" else 1  # DeepStack needs three layers before the last
    depths = keep_last_depths(full)
    assert list(depths) == list(range(first, 6))
    embeddings = encode_all_layers(full, inputs, batch_size=3, keep_last=True)
    assert embeddings.shape == (6 + len(depths), len(inputs), HIDDEN_SIZE)
    assert torch.equal(embeddings[:6], encode_all_layers(full, inputs, batch_size=3))
    for k, found in zip(depths, embeddings[6:], strict=True):
        prune(source, tmp_path / f"k{k}", keep_layers=[*range(k - 1), 5])
        model = SentenceTransformer(str(tmp_path / f"k{k}"), trust_remote_code=True, device="cpu")
        assert (encode(model, inputs) - found).abs().max() <= 1e-5
        assert (embeddings[k - 1] - found).abs().max() > 0.05  # not the first k


def test_the_last_layer_takes_one_more_call_a_depth(models: list[SentenceTransformer], inputs: list[Any]) -> None:
    full, last = models[-1], decoder_of(models[-1]).layers[-1]
    forward, calls = last.forward, []
    last.forward = lambda *args, **options: (calls.append(1), forward(*args, **options))[1]
    try:
        encode_all_layers(full, inputs, keep_last=True)
    finally:
        del last.forward
    assert len(calls) == 1 + (NUM_LAYERS - 1)
    decoder_of(full).config.layer_types[0] = "sliding_attention"
    try:
        with pytest.raises(ValueError, match=r"\['full_attention', 'sliding_attention'\], have masks of their own"):
            encode_all_layers(full, inputs, keep_last=True)
    finally:
        decoder_of(full).config.layer_types[0] = "full_attention"


def test_costs_one_forward_pass(models: list[SentenceTransformer], inputs: list[Any]) -> None:
    def flops(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with plain_forward(models[-1]):
        full = flops(lambda: encode(models[-1], inputs))
    assert full < flops(lambda: encode_all_layers(models[-1], inputs)) * 1.0001
    assert flops(lambda: encode_all_layers(models[-1], inputs)) <= 1.15 * full


def test_keeps_one_state_a_layer_and_input(models: list[SentenceTransformer], inputs: list[Any]) -> None:
    watch = _Watch(models[-1])
    with watch.watching():
        encode(models[-1], inputs)
        held = [state.untyped_storage().nbytes() for state in watch.states]
    assert held == [4 * len(inputs) * HIDDEN_SIZE] * NUM_LAYERS  # not views of all positions
    assert watch.states == []


def test_leaves_the_model_as_it_was(models: list[SentenceTransformer], inputs: list[Any]) -> None:
    full = models[-1]
    before, hooks = encode(full, inputs), sum(len(module._forward_hooks) for module in full.modules())
    encode_all_layers(full, inputs)
    with pytest.raises(Exception, match="nowhere"):
        encode_all_layers(full, [{"image": "nowhere.png"}])
    assert sum(len(module._forward_hooks) for module in full.modules()) == hooks
    assert torch.equal(encode(full, inputs), before)


def test_a_model_that_truncates_is_swept_whole(models: list[SentenceTransformer]) -> None:
    full, texts = models[-1], ["a red apple"]
    whole = encode_all_layers(full, texts)
    full.truncate_dim = 8
    try:
        assert torch.equal(encode_all_layers(full, texts), whole)
        assert full.truncate_dim == 8
    finally:
        full.truncate_dim = None


def test_the_bar() -> None:
    with progress_bar(3, "model", show=False) as bar:
        assert (bar.total, bar.disable) == (3, True)


def test_only_puma_models() -> None:
    from sentence_transformers.models import Normalize

    with pytest.raises(ValueError, match=r"made of \['Normalize'\], must be a PUMA model alone.*puma-hf prune"):
        decoder_of(SentenceTransformer(modules=[Normalize()]))


def test_nothing_may_follow_the_puma_model(models: list[SentenceTransformer]) -> None:
    from sentence_transformers.models import Normalize

    with pytest.raises(ValueError, match=r"'Normalize'.*must be a PUMA model alone"):
        decoder_of(SentenceTransformer(modules=[models[0][0], Normalize()]))


def test_spoilt_states_are_named(qwen_dir: Path, tmp_path: Path) -> None:
    prune(qwen_dir, tmp_path / "full", num_kept_layers=NUM_LAYERS)
    model = SentenceTransformer(str(tmp_path / "full"), trust_remote_code=True, device="cpu")
    with torch.no_grad():
        decoder_of(model).layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="After layer 3 of 4, 2 of 2 embeddings hold NaN or infinity"):
        encode_all_layers(model, ["a", "b"])
