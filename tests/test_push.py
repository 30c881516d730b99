"""Uploads against tests/hub_server.py, a double of the Hub on this machine; nothing leaves it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from sentence_transformers import SentenceTransformer

from puma_hf import fresh_load, lora_config
from puma_hf.load_check import LoadCheck
from puma_hf.push import push
from puma_hf.trainer.lora import add_lora, save_base_fingerprint
from tests.hub_server import TOKEN, HubServer, Repository, hub_server

LOADED = LoadCheck(64, "float32", 1e-7)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the double speaks LFS alone
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    return copy


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Takes the place of the fresh process, which takes seconds; keeps what it was given."""
    given = []

    def check(directory: Path, *, offline: bool) -> LoadCheck:
        content = {path.name: path.read_bytes() for path in directory.iterdir()}
        given.append(SimpleNamespace(content=content, offline=offline))
        return LOADED

    monkeypatch.setattr("puma_hf.push.check_loads", check)
    return given


@pytest.fixture
def adapter(puma_dir: Path, tmp_path: Path) -> Path:
    """A trained adapter of `puma_dir`, as training saves it."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
    add_lora(model, lora_config(r=4))
    folder = tmp_path / "adapters" / "puma-lora"
    model.save_pretrained(str(folder), create_model_card=False)
    save_base_fingerprint(model, folder)
    return folder


def test_what_was_pushed_loads_from_a_fresh_cache_without_puma_hf(
    folder: Path, hub: HubServer, loads: list[Any], tmp_path: Path
) -> None:
    report = push(folder, "org/puma", token=TOKEN, message="first")
    repository = hub.repositories["org/puma"]
    files = repository.branches["main"]
    assert files.keys() == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes(), path.name
    assert files["README.md"].decode() == report.card
    assert report.url == f"{hub.url}/org/puma/commit/{repository.sha('main')}"
    assert repository.messages == ["first"]
    assert not repository.private

    job = {"directory": "org/puma", "output": str(tmp_path / "found.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-P", str(fresh_load.__file__), str(tmp_path / "job.json")]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "found.json").read_text())["difference"] < 1e-4
    assert any(method == "GET" and path.endswith("/model.safetensors") for method, path in hub.requests)


def test_a_dry_run_asks_nobody_and_lists_files_and_card(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    (folder / "results.md").write_text("x")
    report = push(folder, "org/puma", dry_run=True)
    assert hub.requests == []
    assert report.url is None
    shown = str(report)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:>14,} bytes" in shown
    assert f"{report.num_bytes:>14,} bytes" in shown
    assert report.num_bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name not in (
        "README.md", "results.md")) + len(report.card.encode())  # fmt: skip
    assert "left out  results.md" in shown
    assert "dry run" in shown
    assert report.card in shown
    assert str(LOADED) in shown
    assert loads[0].content.keys() == {name for name, _ in report.files}
    assert loads[0].content["README.md"].decode() == report.card
    assert loads[0].offline


def test_a_directory_that_does_not_load_is_refused_with_the_reason(folder: Path, hub: HubServer) -> None:
    code = (folder / "modeling_puma.py").read_text()
    (folder / "modeling_puma.py").write_text(code + "\nimport puma_hf\n")  # here it can be imported, elsewhere not
    with pytest.raises(ValueError, match=r"does not load where puma_hf is not installed \(.*puma_hf"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories == {}


def test_stray_files_are_refused_before_anything_else(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    (folder / ".env").write_text("HF_TOKEN=x")
    with pytest.raises(ValueError, match=r"- \.env: looks like a secret"):
        push(folder, "org/puma", token=TOKEN)
    assert (hub.requests, loads) == ([], [])


@pytest.mark.parametrize("private", [True, False])
def test_visibility_of_a_new_repository(folder: Path, hub: HubServer, loads: list[Any], private: bool) -> None:
    push(folder, "me/puma", token=TOKEN, private=private)
    assert hub.repositories["me/puma"].private == private


def test_visibility_of_an_old_one_is_not_changed(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.repositories["org/puma"] = Repository()
    with pytest.raises(ValueError, match="exists and is public, asked for was private"):
        push(folder, "org/puma", token=TOKEN, private=True)
    assert loads == []


def test_a_branch_and_a_pull_request(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    repository = hub.repositories["org/puma"]
    first = dict(repository.branches["main"])
    (folder / "LICENSE").write_text("Apache-2.0")
    push(folder, "org/puma", token=TOKEN, revision="v2")
    assert repository.branches["v2"]["LICENSE"] == b"Apache-2.0"
    report = push(folder, "org/puma", token=TOKEN, create_pr=True)
    assert repository.branches["refs/pr/1"]["LICENSE"] == b"Apache-2.0"
    assert report.url == f"{hub.url}/org/puma/discussions/1"
    assert repository.branches["main"] == first


def test_an_older_push_is_replaced_and_its_shards_removed(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    files |= {"model-00001-of-00002.safetensors": b"old", ".gitattributes": b"x"}
    report = push(folder, "org/puma", token=TOKEN)
    assert report.removed == ("model-00001-of-00002.safetensors",)
    assert "removed   model-00001-of-00002.safetensors" in str(report)
    left = hub.repositories["org/puma"].branches["main"]
    assert "model-00001-of-00002.safetensors" not in left
    assert ".gitattributes" in left


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"model.safetensors": b"other", "config.json": b"{}"}, "config.json, model.safetensors"),
        ({"notes.txt": b"", "modeling_puma.py": b""}, "notes.txt"),
        ({"adapter_config.json": b"{}", "modeling_puma.py": b""}, "adapter_config.json"),
        ({f"{number}.txt": b"" for number in range(7)}, r"0\.txt, .*4\.txt and 2 more"),
    ],
)
def test_other_content_is_not_mixed(
    folder: Path, hub: HubServer, loads: list[Any], there: dict[str, bytes], named: str
) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = there
    with pytest.raises(ValueError, match=rf"'org/puma' exists with other content: {named}\."):
        push(folder, "org/puma", token=TOKEN)
    assert loads == []


def test_a_repository_with_a_licence_alone_is_empty_enough(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = {".gitattributes": b"", "README.md": b"", "LICENSE": b""}
    push(folder, "org/puma", token=TOKEN)
    assert "config.json" in hub.repositories["org/puma"].branches["main"]


def test_no_token(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(PermissionError, match=r"There is no Hub token to push to 'org/puma' with. Log in with"):
        push(folder, "org/puma")
    assert loads == []


def test_a_wrong_token(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(PermissionError, match="The Hub does not know the token"):
        push(folder, "org/puma", token="wrong")


def test_no_right_to_write(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(PermissionError, match=r"'me' is no member of 'they' and may not write to 'they/puma'. Choose"):
        push(folder, "they/puma", token=TOKEN)
    hub.fail = {"api/repos/create": 403}
    with pytest.raises(PermissionError, match="The token may not write to 'org/puma'"):
        push(folder, "org/puma", token=TOKEN)


def test_a_pull_request_needs_a_repository(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(ValueError, match="'they/puma' does not exist, so no pull request"):
        push(folder, "they/puma", token=TOKEN, create_pr=True)


@pytest.mark.parametrize("part", ["/preupload/", "lfs/", "/commit/"])
def test_the_network_goes_in_the_middle(
    folder: Path, hub: HubServer, loads: list[Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    hub.fail = {part: None}
    with pytest.raises((ConnectionError, OSError), match="'org/puma'"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"] == {}
    hub.fail = {}
    push(folder, "org/puma", token=TOKEN)
    assert "model.safetensors" in hub.repositories["org/puma"].branches["main"]


@pytest.mark.parametrize(("status", "words"), [(412, "changed while this push ran"), (500, "with status 500")])
def test_the_hub_refuses_the_commit(folder: Path, hub: HubServer, loads: list[Any], status: int, words: str) -> None:
    hub.fail = {"/commit/": status}
    with pytest.raises(ConnectionError, match=words):
        push(folder, "org/puma", token=TOKEN)


def test_no_network_and_offline(folder: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set, so 'org/puma' cannot be reached"):
        push(folder, "org/puma", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The connection to the Hub failed while pushing to 'org/puma'"):
        push(folder, "org/puma", token=TOKEN)


def test_an_adapter_alone_names_its_base(adapter: Path, puma_dir: Path, hub: HubServer) -> None:
    with pytest.raises(ValueError, match=r"which nobody else has. Push that first, and name it: base_model"):
        push(adapter, "org/puma-lora", token=TOKEN)
    report = push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    assert report.loaded.difference < 1e-4
    files = hub.repositories["org/puma-lora"].branches["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/puma"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(puma_dir)
    assert "model.safetensors" not in files
    assert str(puma_dir).encode() not in b"".join(files[name] for name in files if not name.endswith(".safetensors"))
    card = ModelCard(report.card)
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/puma", "adapter")
    assert "LoRA adapter alone" in card.text
