from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from puma_hf.hub.push_files import files_to_push, is_model_file


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "puma"
    shutil.copytree(puma_dir, copy)
    return copy


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("puma_base.json", "train.yaml", "modules.json"):
        (folder / name).write_text("[]")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "checkpoint-60").mkdir()
    (folder / "checkpoint-60" / "optimizer.pt").write_bytes(b"pickle")
    return folder


def test_a_pruned_directory_is_taken_whole_but_for_its_card(folder: Path) -> None:
    found = files_to_push(folder)
    assert sorted(found.names) == sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    assert {"model.safetensors", "config.json", "modeling_puma.py", "modules.json"} <= set(found.names)
    assert found.left_out == ()
    assert not found.is_adapter


def test_the_trainers_own_arguments_stay_here(folder: Path) -> None:
    torch.save(TrainingArguments(str(folder), hub_token="hf_" + "a1B2" * 9), folder / "training_args.bin")
    found = files_to_push(folder)
    assert found.left_out == ("training_args.bin",)
    assert "training_args.bin" not in found.names


def test_what_evaluation_left_stays_here(folder: Path) -> None:
    (folder / "test").mkdir()
    (folder / ".cache" / "huggingface").mkdir(parents=True)  # of a download
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")  # of a look at the folder on a Mac
    for name in ("results.json", "test/results.json", "results.md"):
        (folder / name).write_text("{}")
    found = files_to_push(folder)
    assert found.left_out == (".DS_Store", ".cache", ".gitattributes", "results.md", "test")
    assert "results.json" in found.names


def test_an_adapter_is_taken_without_its_checkpoints_and_its_recipe_with_paths(adapter: Path) -> None:
    found = files_to_push(adapter)
    assert found.is_adapter
    assert found.names == ("adapter_config.json", "adapter_model.safetensors", "modules.json", "puma_base.json")
    assert found.left_out == ("checkpoint-60", "train.yaml")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".env", "looks like a secret"),
        (".env.local", "looks like a secret"),
        ("hf_token.txt", "looks like a secret"),
        ("my-token", "looks like a secret"),
        ("server.key", "looks like a secret"),
        ("id_rsa", "looks like a secret"),
        ("Credentials.json", "looks like a secret"),
        (".netrc", "looks like a secret"),
        ("pytorch_model.bin", "a pickle"),
        ("optimizer.pt", "a pickle"),
        ("cache.pkl", "a pickle"),
        ("rng_state.pth", "a pickle"),
        ("notes.txt", "not part of a model"),
        ("train.py", "not part of a model"),
        ("token", "looks like a secret"),
        ("server.pem", "looks like a secret"),
        ("vectors.npy", "a pickle"),
        ("model-00001-of-00002.safetensors", "not part of a model"),
    ],
)
def test_what_does_not_load_is_refused_by_its_name(folder: Path, name: str, reason: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=rf"1 entries that must not be published(.|\n)*- {name}: {reason}"):
        files_to_push(folder)


def test_all_offenders_are_named_at_once(folder: Path) -> None:
    for name in (".git", ".idea", "photos"):
        (folder / name).mkdir()
    (folder / "pytorch_model.bin").write_text("x")
    with pytest.raises(
        ValueError, match=r"4 entries(.|\n)*\.git: looks(.|\n)*\.idea: not(.|\n)*photos: not(.|\n)*model\.bin: a pickle"
    ):
        files_to_push(folder)


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 9, "-----BEGIN RSA PRIVATE KEY-----"])
@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "modeling_puma.py", "tokenizer.json", "notes.txt", "results.md"]
)
def test_a_secret_inside_a_file_is_found(folder: Path, name: str, secret: str) -> None:
    with (folder / name).open("a") as file:
        file.write(f"\n# {secret}\n")
    with pytest.raises(ValueError, match=rf"{name}: holds what looks like an access token or a private key"):
        files_to_push(folder)


@pytest.mark.parametrize("name", ["LICENSE", "results.json", "added_tokens.json", "model.safetensors"])
@pytest.mark.parametrize("packed", ["pickle", "zip"])
def test_a_pickle_under_another_name_is_refused(folder: Path, name: str, packed: str) -> None:
    content = pickle.dumps({"a": 1})
    (folder / name).write_bytes(content)
    if packed == "zip":
        torch.save({"a": torch.ones(1)}, folder / name)
    with pytest.raises(ValueError, match=rf"- {name}: a pickle or an archive under another name, which can run code"):
        files_to_push(folder)


def test_a_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "NOTICE")  # to read it would never end
    with pytest.raises(ValueError, match=r"- NOTICE: neither a file nor a folder"):
        files_to_push(folder)


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: a link"):
        files_to_push(folder)


def test_shards_are_those_that_the_index_names(folder: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert {shard, "model.safetensors.index.json"} <= set(files_to_push(folder).names)
    (folder / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {shard}"):
        files_to_push(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        files_to_push(folder)


def test_other_directories_are_refused(qwen_dir: Path, tmp_path: Path) -> None:
    for folder in (qwen_dir, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="neither a PUMA directory nor that of a LoRA adapter"):
            files_to_push(folder)


def test_settings_that_are_no_json_are_named(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"processor_config\.json' is not JSON"):
        files_to_push(folder)


def test_code_of_another_name_travels_if_a_setting_names_it(folder: Path) -> None:
    (folder / "own_code.py").write_text("from .helper import help\n")
    (folder / "helper.py").write_text("help = 1\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "own_code.Own"
    (folder / "config.json").write_text(json.dumps(config))
    assert {"own_code.py", "helper.py"} <= set(files_to_push(folder).names)


def test_code_that_imports_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "packing_puma.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks packing_puma\.py, which its code imports"):
        files_to_push(folder)


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "org/puma--modeling_puma.PumaModel"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"runs code of another repository \(org/puma--modeling_puma\.PumaModel\)"):
        files_to_push(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("modules.json", '{"type": 1}', "does not list modules with their type"),
        ("modules.json", '[{"path": ""}]', "does not list modules with their type"),
        ("processor_config.json", "[]", "must hold names with values"),
        ("tokenizer_config.json", '{"auto_map": "a.B"}', "so must its auto_map"),
    ],
)
def test_settings_of_another_shape_are_named(folder: Path, name: str, content: str, words: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}' .*{words}"):
        files_to_push(folder)


def test_an_index_that_leads_out_of_the_directory_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="names shards outside its own folder"):
        files_to_push(folder)


def test_names_that_a_push_gives() -> None:
    ours = (
        "results-2.json",
        "sweep.json",
        "config.json",
        "model-00001-of-00003.safetensors",
        "modeling_puma.py",
        "tokenizer.json",
    )
    assert all(map(is_model_file, ours))
    assert not any(map(is_model_file, ("notes.md", "train.py", "pytorch_model.bin", "other.safetensors")))
