from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoModel, AutoProcessor

from puma_hf import PumaModel
from puma_hf.data.tasks import MBEIR_INSTRUCTIONS
from puma_hf.modeling import sentence_transformers_puma
from puma_hf.modeling.fast_path_puma import FastPath, packed_states
from puma_hf.modeling.packing_puma import PackedPart
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer


def inputs_of_every_kind(images: list[Image.Image]) -> list[Any]:
    chat = [{"type": "text", "text": "what is this?"}, {"type": "image", "image": images[2]}]
    both = {"image": images[1:], "text": "both", "instruction": "Find them."}
    user = {"role": "user", "content": chat}
    return ["a red apple", images[0], {"image": images[1], "text": "on a table"}, both, [user]]


@torch.inference_mode()
def reference(folder: Path, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
    """What AutoProcessor and AutoModel make of the inputs."""
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor.process_inputs(inputs, prompt=prompt)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    model = AutoModel.from_pretrained(folder).eval()
    embeddings: np.ndarray = model(**{name: batch[name] for name in names if name in batch}).embeddings.numpy()
    return embeddings


def assert_close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


# --- the same vectors


def test_encode_equals_the_transformers_classes(
    sentence_transformer: SentenceTransformer, puma_dir: Path, images: list[Image.Image]
) -> None:
    inputs = inputs_of_every_kind(images)
    encoded = sentence_transformer.encode(inputs)
    assert (encoded.shape, encoded.dtype) == ((5, 32), np.float32)
    assert_close(encoded, np.concatenate([reference(puma_dir, [item]) for item in inputs]))
    assert_close(np.linalg.norm(encoded, axis=1), 1.0)


def test_the_task_instructions_are_named_prompts(sentence_transformer: SentenceTransformer, puma_dir: Path) -> None:
    assert {**sentence_transformer.prompts, **MBEIR_INSTRUCTIONS} == sentence_transformer.prompts
    name = "mbeir_mscoco_task0"
    encoded = sentence_transformer.encode(["a red apple"], prompt_name=name)
    assert_close(encoded, reference(puma_dir, ["a red apple"], MBEIR_INSTRUCTIONS[name]))
    assert np.abs(encoded - reference(puma_dir, ["a red apple"])).max() > 1e-3


# --- options


def test_processing_options_reach_the_processor(sentence_transformer: SentenceTransformer) -> None:
    module: Any = sentence_transformer[0]
    image = Image.new("RGB", (64, 64))
    size = {"shortest_edge": 256, "longest_edge": 1024}
    features = module.preprocess([image], processing_kwargs={"image": {"size": size}})
    assert features["image_grid_thw"].prod() * 64 == 1024
    assert module.preprocess(["apple " * 50], max_length=75)["input_ids"].shape[1] in range(70, 76)
    assert sentence_transformer.max_seq_length == 512
    sentence_transformer.max_seq_length = 80
    assert module.preprocess(["apple " * 50])["input_ids"].shape[1] in range(75, 81)
    sentence_transformer.max_seq_length = 512


@pytest.mark.parametrize(
    ("item", "options"), [("a <|im_end|> b", {}), ("apple " * 9, {"text": {"max_length": 40}})], ids=["special", "long"]
)
def test_the_remedy_of_an_error_is_an_argument_of_encode(
    sentence_transformer: SentenceTransformer, item: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="processing_kwargs=") as caught:
        sentence_transformer.encode([item], processing_kwargs=options)
    written = str(caught.value).partition("processing_kwargs=")[2]
    remedy = ast.literal_eval(re.sub(r"\.\.\.", "4096", written[: written.index("}}") + 2 + ("edge" in written)]))
    assert sentence_transformer.encode([item], processing_kwargs=remedy).shape == (1, 32)


# --- states of tokens and of layers


@pytest.mark.parametrize(("side", "fast_path"), [("left", FastPath()), ("right", FastPath()), ("left", None)])
def test_token_embeddings_are_the_states_of_the_tokens(
    sentence_transformer: SentenceTransformer, fast_path: FastPath | None, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sentence_transformer[0]
    monkeypatch.setattr(module, "fast_path", fast_path)
    monkeypatch.setattr(module.processor.tokenizer, "padding_side", side)
    texts = ["a", "a red apple on a table"]
    states = sentence_transformer.encode(texts, output_value="token_embeddings")
    for text, found in zip(texts, states, strict=True):
        features = sentence_transformer.preprocess([text])
        with torch.inference_mode():
            expected = module.model(features["input_ids"]).last_hidden_state[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert_close(torch.nn.functional.normalize(found[-1], dim=-1), sentence_transformer.encode(text))


@pytest.mark.parametrize("dims", [(), (32, 8)], ids=["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_losses_over_layers_see_what_models_of_fewer_layers_embed(puma_dir: Path, dims: tuple[int, ...]) -> None:
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True)
    base = MultipleNegativesRankingLoss(model)
    inner: Any = MatryoshkaLoss(model, base, list(dims)) if dims else base
    columns = [model.preprocess(texts) for texts in (["a red apple", "two cats"], ["an apple", "cats"])]
    expected = []
    for depth in (1, 2):
        cut = PumaModel.from_pretrained(puma_dir, num_kept_layers=depth).eval()
        given = [{name: column[name] for name in ("input_ids", "attention_mask")} for column in columns]
        queries, answers = (cut(**features).embeddings for features in given)
        for dim in dims or (32,):
            first, second = (torch.nn.functional.normalize(rows[:, :dim], dim=-1) for rows in (queries, answers))
            expected.append(torch.nn.functional.cross_entropy(20 * first @ second.T, torch.arange(2)))
    adaptive = AdaptiveLayerLoss(model.eval(), inner, n_layers_per_step=-1, kl_temperature=0)
    with torch.no_grad():  # as an evaluation
        evaluated = adaptive([dict(column) for column in columns], None)
    loss = adaptive(columns, None)
    for found in (evaluated, loss):
        torch.testing.assert_close(found, torch.stack(expected).sum(), rtol=0, atol=1e-4)
    loss.backward()


# --- the fast path


@pytest.fixture
def fast(puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PumaTransformer, list[int]]:
    """A model of the package's own classes, and the number of inputs of every batch that was packed."""
    packed: list[int] = []

    def watched(model: Any, part: PackedPart, *args: Any) -> torch.Tensor:
        packed.append(len(part.rows))
        return packed_states(model, part, *args)

    monkeypatch.setattr(sentence_transformers_puma, "packed_states", watched)
    return PumaTransformer(str(puma_dir)).eval(), packed


def embedded(module: PumaTransformer, features: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    embedding: torch.Tensor = module(dict(features), **kwargs)["sentence_embedding"]
    return embedding


def test_encode_takes_the_fast_path(fast: tuple[PumaTransformer, list[int]], images: list[Image.Image]) -> None:
    module, packed = fast
    inputs = inputs_of_every_kind(images)
    model = SentenceTransformer(modules=[module], device="cpu")
    vectors = model.encode(inputs, batch_size=3, prompt="Find it.")
    assert packed == [3, 2]
    module.fast_path = FastPath(max_tokens=100)
    assert_close(vectors, model.encode(inputs, prompt="Find it."))
    assert (len(packed), sum(packed)) == (2 + 5, 5 + 5)  # one batch, but no two inputs fit into 100 tokens
    module.fast_path = None
    assert_close(vectors, model.encode(inputs, batch_size=3, prompt="Find it."))
    assert sum(packed) == 10


def test_training_and_gradients_take_the_plain_path(fast: tuple[PumaTransformer, list[int]]) -> None:
    module, packed = fast
    features = module.preprocess(["a red apple", "a"])
    assert embedded(module, features).requires_grad
    with torch.no_grad():
        module.train()
        plain = embedded(module, features)
        module.eval()
        assert packed == []
        assert_close(embedded(module, features), plain)
        assert packed == [2]


@torch.no_grad()
def test_what_the_fast_path_does_not_know_takes_the_plain_path(
    fast: tuple[PumaTransformer, list[int]], images: list[Image.Image]
) -> None:
    module, packed = fast
    model: Any = module.model
    features = module.preprocess([images[0], "a red apple"])
    expected = embedded(module, features)
    assert packed.pop() == 2
    assert_close(embedded(module, features, output_hidden_states=True), expected)
    pixels = {name: features.pop(name) for name in ("pixel_values", "image_grid_thw")}
    given = model.get_image_features(**pixels, return_dict=True)
    grid = {"image_grid_thw": pixels["image_grid_thw"]}
    assert_close(embedded(module, {**features, **grid, "mm_encoder_outputs": {"image": given}}), expected)
    types = features["mm_token_type_ids"]
    positions, _ = model.get_rope_index(features["input_ids"], types, **grid, attention_mask=features["attention_mask"])
    assert_close(embedded(module, {**features, **pixels, "position_ids": positions}), expected)
    assert packed == []


@torch.no_grad()
def test_videos_take_the_plain_path(fast: tuple[PumaTransformer, list[int]]) -> None:
    """Their frames are batched all the same."""
    module, packed = fast
    config: Any = module.model.config
    row = [50, config.vision_start_token_id, *[config.video_token_id] * 12, 51, config.ret_token_id]
    features = {
        "input_ids": torch.tensor([row, [*[0] * 8, 52, *row[1:6], 53, row[-1]]]),
        "attention_mask": torch.tensor([[1] * 16, [0] * 8 + [1] * 8]),
        "pixel_values_videos": torch.randn(48 + 16, 384, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[3, 4, 4], [1, 4, 4]]),
    }
    vectors = embedded(module, features)
    module.fast_path = None
    assert_close(vectors, embedded(module, features))
    assert packed == []


@torch.no_grad()
@pytest.mark.parametrize("path", [None, FastPath()])
def test_embed_batch_takes_what_a_packer_makes(
    fast: tuple[PumaTransformer, list[int]], images: list[Image.Image], path: FastPath | None
) -> None:
    module, _ = fast
    inputs = [*inputs_of_every_kind(images), "a red apple"]
    module.fast_path = path
    batch = module.packer("Find it.")(inputs)
    assert isinstance(batch, dict) is not (path == FastPath())
    outputs = module.embed_batch(batch)
    assert set(outputs) == {"sentence_embedding", "pooler_output"}
    expected = module(module.preprocess(inputs, prompt="Find it."))
    for name in outputs:
        assert_close(outputs[name], expected[name])


# --- saving


def loaded(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize("built", [False, True])
def test_a_saved_model_is_complete_and_reloads(
    puma_dir: Path, images: list[Image.Image], tmp_path: Path, built: bool
) -> None:
    model = SentenceTransformer(modules=[PumaTransformer(str(puma_dir))]) if built else loaded(puma_dir)
    inputs = inputs_of_every_kind(images)
    expected = model.encode(inputs)
    for name in ("first", "second"):
        folder = tmp_path / name
        model.save_pretrained(str(folder))
        assert {path.name for path in folder.iterdir()} >= {path.name for path in puma_dir.iterdir()}
        modules = json.loads((folder / "modules.json").read_text())
        assert [module["type"] for module in modules] == ["sentence_transformers_puma.PumaTransformer"]
        # The model in memory still works after it was saved.
        assert_close(model.encode(inputs), expected)
        model = loaded(folder)
        assert_close(model.encode(inputs), expected)
        assert_close(reference(folder, inputs), expected)
