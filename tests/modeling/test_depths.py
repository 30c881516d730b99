"""A model embeds after its first layers as a copy that is cut there does, by every way, and reads no other layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from puma_hf import PumaConfig, PumaModel, embed, prune
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.trainer.lora_puma import BASE_FILE
from tests.modeling.test_modeling_puma import Spy
from tests.tiny import build_checkpoint, layer_of

DEPTHS = [3, 4, 5]
# Of two families layers that are not the first; Qwen3-VL needs its first three.
KEPT = {"qwen2_vl": "0,2,3,5,6", "qwen3_vl": "0-2,4,6", "qwen3_5": "0-4"}


def note(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def opened(folder: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


@pytest.fixture(scope="module", params=KEPT)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By depth, copies that were cut from the deepest."""
    made = tmp_path_factory.mktemp(request.param)
    source = build_checkpoint(made / "source", request.param, num_layers=7)
    prune(source, made / "5", keep_layers=KEPT[request.param])
    for depth in (3, 4):
        prune(made / "5", made / str(depth), num_kept_layers=depth)
    note(made / "5", trained_depths=DEPTHS, teacher_fingerprint="of the full model")
    return {depth: made / str(depth) for depth in DEPTHS}


@pytest.fixture(scope="module")
def copies(folders: dict[int, Path]) -> dict[int, SentenceTransformer]:
    return {depth: opened(folder) for depth, folder in folders.items()}


@pytest.fixture(scope="module")
def inputs(images: list[Image.Image]) -> list[Any]:
    both = {"image": images[1:], "text": "both", "instruction": "Find them."}
    return ["a red apple", images[0], both, {"image": images[1], "text": "on a table"}, "a", "a green apple, or a pear"]


@pytest.fixture(scope="module")
def expected(copies: dict[int, SentenceTransformer], inputs: list[Any]) -> dict[int, Any]:
    """By the plain forward pass of each copy, one by one: without padding."""
    found = {}
    for depth, model in copies.items():
        module: Any = model[0]
        with torch.inference_mode():
            found[depth] = np.concatenate([module.model(**batch_of(model, [one])).embeddings for one in inputs])
    assert min(abs(found[3] - found[4]).max(), abs(found[4] - found[5]).max()) > 0.1
    return found


def batch_of(model: Any, rows: list[Any]) -> dict[str, Any]:
    features = model[0].preprocess(rows)
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    return {name: features[name] for name in names if name in features}


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_exits_are_copies_that_are_cut_there(
    folders: dict[int, Path], copies: dict[int, SentenceTransformer], inputs: list[Any], expected: dict[int, Any]
) -> None:
    whole: Any = copies[5]
    for side in ("left", "right"):
        whole[0].processor.tokenizer.padding_side = side
        batch = batch_of(whole, inputs)
        assert not batch["attention_mask"].all()
        with torch.inference_mode():
            for depths in ((3, 4), DEPTHS, [4]):  # of what is asked first transformers hooks the layers
                found = whole[0].model(**batch, exit_depths=depths)
                assert found.pooler_output.shape == (6, len(depths), 32)
                for number, depth in enumerate(depths):
                    assert_close(found.embeddings[:, number], expected[depth])
            side_by_side = whole({**batch, "exit_depths": tuple(DEPTHS)})["sentence_embedding"]
            assert_close(side_by_side, np.concatenate(list(expected.values()), axis=1))
            assert_close(whole[0].model(**batch).embeddings, expected[5])  # all is as before
        for depth, path in [(depth, path) for depth in DEPTHS for path in (whole[0].fast_path, None)]:
            before, whole[0].fast_path = whole[0].fast_path, path
            found = embed(whole, inputs, num_kept_layers=depth).embeddings
            whole[0].fast_path = before
            assert_close(found, expected[depth])
    for wrong in ([], [0], [4, 3], [3, 6], [2] if whole[0].model.config.num_deepstack_layers else [4, 4]):
        with pytest.raises(ValueError, match=r"depths=\(.*\) must be rising numbers of layers from [13] to 5, which"):
            whole[0].model(**batch, exit_depths=wrong)
    with pytest.raises(ValueError, match=r"depths=\(6,\) must be rising numbers"):
        embed(whole, inputs, num_kept_layers=6)


def test_every_loader_opens_a_depth(
    folders: dict[int, Path], inputs: list[Any], expected: dict[int, Any], tmp_path: Path
) -> None:
    cut = {"num_kept_layers": 4}
    ways = [opened(folders[5], model_kwargs=cut), opened(folders[5], config_kwargs=cut)]
    for model in [*ways, open_sentence_transformer(str(folders[5]), 4, device="cpu")]:
        config: Any = model[0].model.config  # type: ignore[union-attr]
        assert (config.trained_depths, config.teacher_fingerprint) == ([3, 4], "of the full model")
        assert_close(model.encode(inputs), expected[4])
        model[0].fast_path = None  # type: ignore[assignment]
        assert_close(model.encode(inputs), expected[4])
    by_auto = AutoModel.from_pretrained(folders[5], **cut).eval()
    with torch.inference_mode():
        assert_close(by_auto(**batch_of(ways[0], inputs)).embeddings, expected[4])
    # What is saved of it is a copy, which is cut on.
    ways[0].save_pretrained(str(tmp_path / "saved"))
    assert max(map(layer_of, load_file(tmp_path / "saved" / "model.safetensors"))) == 3
    assert_close(opened(tmp_path / "saved").encode(inputs), expected[4])
    again = opened(tmp_path / "saved", model_kwargs={"num_kept_layers": 3})
    assert_close(again.encode(inputs), expected[3])
    assert again[0].model.config.trained_depths == [3]  # type: ignore[union-attr]
    by_auto.save_pretrained(tmp_path / "parts")
    assert AutoModel.from_pretrained(tmp_path / "parts").config.trained_depths == [3, 4]


# --- what is read, and what is said


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve")
    prune(build_checkpoint(folder / "source", "qwen2_vl", num_layers=12), folder / "pruned", num_kept_layers=12)
    note(folder / "pruned", trained_depths=[4, 8, 12])
    return folder / "pruned"


def test_cuts_of_cuts_are_of_what_was_left(twelve: Path) -> None:
    config = PumaConfig.from_pretrained(twelve, keep_layers=[0, 1, 2, 3, 6, 9])
    assert config.trained_depths == [4]  # the first 8 are others than it was trained with
    config.cut(keep_layers=[0, 4, 5])
    name, stored = "language_model.layers.{}.input_layernorm.weight", load_file(twelve / "model.safetensors")
    for model in (PumaModel.from_pretrained(twelve, config=config), AutoModel.from_pretrained(twelve, config=config)):
        assert (model.config.kept_layers, model.config.trained_depths) == ([0, 6, 9], None)
        for number, layer in enumerate([0, 6, 9]):
            assert torch.equal(model.state_dict()[name.format(number)], stored[name.format(layer)])


@pytest.mark.parametrize("way", ["AutoModel", "model_kwargs", "config_kwargs"])
def test_no_other_layer_is_read(twelve: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    safe_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **k: Spy(safe_open(*a, **k), read))
    cut = {"num_kept_layers": 4}
    model = AutoModel.from_pretrained(twelve, **cut) if way == "AutoModel" else opened(twelve, **{way: cut})
    sizes = {name: tensor.nbytes for name, tensor in load_file(twelve / "model.safetensors").items()}
    kept = {name: size for name, size in sizes.items() if layer_of(name) < 4}
    assert sum(parameter.nbytes for parameter in model.parameters()) == sum(kept.values())
    assert kept.keys() <= read  # all reading is seen here
    assert sum(sizes[name] for name in read) <= 1.05 * sum(kept.values()) < sum(sizes.values()) / 1.5


def test_an_untrained_depth_warns_once(twelve: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "num_kept_layers={} is no depth that the model was trained at, which are 4, 8, 12: take one of these"
    note(twelve, teacher_fingerprint="full")
    for _ in range(2):
        config: Any = PumaModel.from_pretrained(twelve, num_kept_layers=9).config
        assert (config.trained_depths, config.teacher_fingerprint) == ([4, 8], None)
    assert caplog.text.count(said.format(9)) == 1
    model = opened(twelve)
    for depth in (5, 5, 8):
        embed(model, ["a red apple"], num_kept_layers=depth)
    assert caplog.text.count(said.format(5)) == 1
    assert caplog.text.count("is no depth") == 2  # of 8, and of all, nothing


def test_the_code_of_an_older_model(twelve: Path) -> None:
    model: Any = opened(twelve)
    expected, embed_batch = model.encode(["a red apple"]), model[0].embed_batch
    model[0].embed_batch = lambda batch: embed_batch(batch)
    assert_close(embed(model, ["a red apple"]).embeddings, expected)
    message = r"num_kept_layers=4 is for PUMA models with the code of this version, which 'pruned' is none of\."
    with pytest.raises(ValueError, match=message):
        embed(model, ["a red apple"], num_kept_layers=4)


# --- an adapter


@pytest.mark.parametrize("way", ["AutoModel", "model_kwargs", "config_kwargs"])
def test_an_adapter_is_opened_at_a_depth(
    adapter: Path, inputs: list[Any], tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    elastic, cut = tmp_path / "elastic", {"num_kept_layers": 1}
    shutil.copytree(adapter, elastic)
    noted = json.loads((elastic / BASE_FILE).read_text()) | {"teacher": "full", "trained_depths": [1, 2]}
    (elastic / BASE_FILE).write_text(json.dumps(noted))
    whole = opened(elastic)
    config: Any = whole[0].model.config  # type: ignore[union-attr]
    assert (config.trained_depths, config.teacher_fingerprint) == ([1, 2], "full")
    expected = embed(whole, inputs, num_kept_layers=1).embeddings
    caplog.clear()
    if way == "AutoModel":
        model = AutoModel.from_pretrained(elastic, trust_remote_code=True, **cut).eval()
        with torch.inference_mode():
            assert_close(model(**batch_of(whole, inputs)).embeddings, expected)
    else:
        cut_model = opened(elastic, **{way: cut})
        assert_close(cut_model.encode(inputs), expected)
        model = cut_model[0].model  # type: ignore[union-attr]
    assert (model.config.trained_depths, model.config.teacher_fingerprint) == ([1], "full")
    assert "UNEXPECTED" not in caplog.text  # what is left out was asked for
    assert max(abs(expected - whole.encode(inputs)).max(axis=1)) > 0.1
    (last,) = PumaModel.from_pretrained(elastic, keep_layers=[1]).language_model.layers
    stored = load_file(elastic / "adapter_model.safetensors")
    (name,) = (name for name in stored if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    assert torch.equal(last.mlp.up_proj.lora_B["default"].weight, stored[name])
