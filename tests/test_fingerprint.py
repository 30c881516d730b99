from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.fingerprint import exit_fingerprint, exit_fingerprints, model_fingerprint, model_name, short_name
from puma_hf.trainer.lora_puma import add_lora, lora_config


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def test_a_moved_copy_has_the_same(sentence_transformer: SentenceTransformer, puma_dir: Path, tmp_path: Path) -> None:
    before = model_fingerprint(sentence_transformer)
    assert before is not None
    assert len(before) == 64
    shutil.copytree(puma_dir, tmp_path / "moved")
    moved = load(tmp_path / "moved")
    moved.encode(["a", {"text": "http://x/y.png"}], prompt="find it")  # use does not change it
    assert model_fingerprint(moved) == before
    assert (model_name(sentence_transformer), model_name(moved)) == (puma_dir.name, "moved")


def change_last_bit(model: Any) -> None:
    parameter = next(model.parameters())
    parameter.data.view(torch.int32)[(0,) * parameter.ndim] ^= 1


def test_the_trained_depths_of_a_checkpoint_share_exits(elastic_dir: Path, puma_dir: Path) -> None:
    whole, second, third = (open_sentence_transformer(str(elastic_dir), depth) for depth in (None, 2, 3))
    before = exit_fingerprints(whole)
    assert {*before} == {"1", "2", "4"}
    assert len({*before.values(), None}) == 4
    del (of_second := dict(before))["4"]
    assert exit_fingerprints(second) == exit_fingerprints(second.bfloat16()) == of_second
    for other in (third, load(puma_dir), nn.Linear(1, 1)):
        assert exit_fingerprint(other, 2) is None
    assert exit_fingerprint(whole, 3) is None
    whole[0].model.language_model.layers[1].mlp.up_proj.weight.data += 1
    after = exit_fingerprints(whole)
    assert {depth for depth in before if before[depth] != after[depth]} == {"2", "4"}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "last bit of a weight": change_last_bit,
    "data type": lambda model: model.bfloat16(),
    "layer norm": lambda model: setattr(model[0].model.config.text_config, "rms_norm_eps", 1e-3),
    "chat template": lambda model: setattr(model[0].processor, "chat_template", "other"),
    "pixels": lambda model: setattr(model[0], "processing_kwargs", {"image": {"size": {"longest_edge": 784}}}),
    "length": lambda model: setattr(model, "max_seq_length", 17),
    "dimensions": lambda model: setattr(model, "truncate_dim", 8),
    "prompts": lambda model: model.prompts.update(query="other"),
    "another module": lambda model: model.append(nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_embeddings_changes_it(sentence_transformer: SentenceTransformer, name: str) -> None:
    changed = copy.deepcopy(sentence_transformer)
    assert model_fingerprint(changed) == model_fingerprint(sentence_transformer)
    CHANGES[name](changed)
    assert model_fingerprint(changed) != model_fingerprint(sentence_transformer)


def test_how_much_of_an_adapter_is_added_counts(sentence_transformer: SentenceTransformer) -> None:
    model: Any = copy.deepcopy(sentence_transformer)
    add_lora(model, lora_config(r=2, alpha=4))
    prints = [model_fingerprint(model)]
    next(layer for layer in model.modules() if hasattr(layer, "lora_A")).scaling["default"] = 1.0
    prints.append(model_fingerprint(model))
    model[0].model.disable_adapters()
    prints.append(model_fingerprint(model))
    assert len({*prints}) == 3


@pytest.mark.parametrize("changed", ["sentence_transformers_puma.py", "content_ids_puma.py"])  # and what it imports
def test_the_code_that_came_with_a_model_counts(puma_dir: Path, tmp_path: Path, changed: str) -> None:
    copied = Path(shutil.copytree(puma_dir, tmp_path / "copied"))
    before = model_fingerprint(load(copied))
    with (copied / changed).open("a") as file:
        file.write("# other\n")
    assert model_fingerprint(load(copied)) != before


def test_any_module_and_any_object() -> None:
    torch.manual_seed(0)
    assert model_fingerprint(nn.Linear(2, 1)) != model_fingerprint(nn.Linear(2, 1))
    assert model_fingerprint(SimpleNamespace(fingerprint=7)) == "7"
    assert model_fingerprint(object()) is None


def test_names_hold_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["out/model", tmp_path / "out" / "model", "/gone/model/", "org/model"]
    assert [short_name(name) for name in names] == ["model"] * 3 + ["org/model"]


def test_a_weight_made_of_several_tensors_counts_with_each_of_them() -> None:
    def fingerprint(first: float, second: float) -> str | None:
        module = nn.Module()
        module.weight = nn.Parameter(TwoTensor(torch.full((2,), first), torch.full((2,), second)))
        return model_fingerprint(module)

    assert fingerprint(1.0, 2.0) == fingerprint(1.0, 2.0) != fingerprint(1.0, 3.0)
    assert fingerprint(0.0, 2.0) != fingerprint(1.0, 2.0)
