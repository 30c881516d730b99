from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from puma_hf import PumaModel, checkpoint, prune
from puma_hf.checkpoint import INDEX_NAME, SINGLE_NAME, is_kept, kept_weights, open_checkpoint
from tests.tiny import LAYOUTS, copy_checkpoint, read_weights

REPOSITORY = "org/tiny-qwen2-vl"


@pytest.fixture
def sharded(qwen_dir: Path, tmp_path: Path) -> Path:
    """Four shards; the last holds decoder layer 3 alone."""
    return copy_checkpoint(qwen_dir, tmp_path / "sharded", num_shards=4, head=True)


def weight_map(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    return names


# --- which tensors are kept


@pytest.mark.parametrize("prefix", [text for text, _ in LAYOUTS.values()])
def test_layers_are_told_apart_by_number(prefix: str) -> None:
    name = prefix + "layers.{}.mlp.up_proj.weight"
    assert [is_kept(name.format(layer), range(2)) for layer in (0, 1, 2, 10, 21)] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.30.mlp.fc1.weight",
        "model.visual.blocks.30.mlp.fc1.weight",
        "model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "visual.merger.layers.9.weight",
    ],
)
def test_all_but_decoder_layers_and_the_head_is_kept(name: str) -> None:
    assert is_kept(name, [0])


def test_the_head_is_dropped() -> None:
    assert not is_kept("lm_head.weight", range(28))


# --- local folders


def test_a_single_file(qwen_dir: Path) -> None:
    opened = open_checkpoint(qwen_dir)
    assert (opened.name, opened.folder, opened.repo_id, opened.revision) == (
        str(qwen_dir),
        qwen_dir,
        None,
        None,
    )
    assert opened.weight_files == dict.fromkeys(load_file(qwen_dir / SINGLE_NAME), SINGLE_NAME)
    assert opened.fetch(SINGLE_NAME) == qwen_dir / SINGLE_NAME


def test_shards(sharded: Path) -> None:
    assert open_checkpoint(str(sharded)).weight_files == weight_map(sharded)


def test_kept_weights_link_to_needed_shards_only(sharded: Path, qwen_dir: Path) -> None:
    with kept_weights(open_checkpoint(sharded), range(2)) as folder:
        kept = weight_map(folder)
        assert set(kept) == {name for name in weight_map(sharded) if is_kept(name, range(2))}
        assert {path.name for path in folder.iterdir()} == {"config.json", INDEX_NAME, *kept.values()}
        assert len(set(kept.values())) < 4
        assert all((folder / name).is_symlink() for name in kept.values())
        model = PumaModel.from_pretrained(folder, num_kept_layers=2)
    assert not folder.exists()
    original = read_weights(qwen_dir)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_shards_of_dropped_layers_may_be_missing(sharded: Path, tmp_path: Path) -> None:
    files = weight_map(sharded)
    needed = {file for name, file in files.items() if is_kept(name, range(2))}
    unneeded = set(files.values()) - needed
    assert unneeded
    for name in unneeded:
        (sharded / name).write_bytes(b"not a safetensors file")
    report = prune(sharded, tmp_path / "out", num_kept_layers=2)
    assert report.num_kept_layers == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d: (d / "config.json").unlink(),
            FileNotFoundError,
            "has no config.json. Point to the folder",
        ),
        (
            lambda d: (d / INDEX_NAME).unlink(),
            FileNotFoundError,
            f"neither {SINGLE_NAME} nor {INDEX_NAME}. Download the checkpoint again",
        ),
        (
            lambda d: (d / INDEX_NAME).write_text("{"),
            ValueError,
            f"'{INDEX_NAME}' is not a JSON file that names the shard of each tensor .*Download",
        ),
        (lambda d: (d / INDEX_NAME).write_text("{}"), ValueError, "KeyError: 'weight_map'"),
        (lambda d: (d / INDEX_NAME).write_text('{"weight_map": [1]}'), ValueError, "AttributeError"),
        (
            lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"visual.a": "../b.safetensors"}}'),
            ValueError,
            "names shards outside its own folder. Choose a checkpoint that you trust",
        ),
    ],
)
def test_a_broken_folder_is_refused(sharded: Path, change: Any, error: Any, message: str) -> None:
    change(sharded)
    with pytest.raises(error, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickles_are_refused(qwen_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(qwen_dir / "config.json", tmp_path / "config.json")
    (tmp_path / name).touch()
    message = f"holds its weights as '{name}', a pickle file that can run code when opened. Only safetensors"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 4, 2000, -2000])
def test_a_file_that_is_cut_off_is_refused(qwen_dir: Path, tmp_path: Path, keep_bytes: int) -> None:
    folder = copy_checkpoint(qwen_dir, tmp_path / "copy")
    content = (folder / SINGLE_NAME).read_bytes()
    (folder / SINGLE_NAME).write_bytes(content[:keep_bytes])
    message = f"'{SINGLE_NAME}' is not a whole safetensors file .*cut off: download it again"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    name = weight_map(sharded)["model.layers.1.mlp.up_proj.weight"]
    (sharded / name).unlink()
    message = f"lacks the shard '{name}' that {INDEX_NAME} names. Download the checkpoint again"
    with pytest.raises(FileNotFoundError, match=message), kept_weights(open_checkpoint(sharded), range(2)):
        pass


def test_a_shard_that_is_cut_off_is_named(sharded: Path) -> None:
    name = weight_map(sharded)["model.layers.1.mlp.up_proj.weight"]
    (sharded / name).write_bytes((sharded / name).read_bytes()[:-8])
    message = f"'{name}' is not a whole safetensors file"
    with pytest.raises(ValueError, match=message), kept_weights(open_checkpoint(sharded), range(2)):
        pass


def test_an_index_that_names_absent_tensors_is_refused(sharded: Path) -> None:
    files = weight_map(sharded)
    name = files["model.norm.weight"]
    files |= {"model.extra.weight": name, "model.other.weight": name}
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    message = f"'{name}' lacks 2 tensors that {INDEX_NAME} places in it .first: 'model.extra.weight'"
    with pytest.raises(ValueError, match=message), kept_weights(open_checkpoint(sharded), range(2)):
        pass


@pytest.mark.parametrize("source", ["nonsense", "./gone", "/gone/too", "~/gone", "a/b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{source}' is neither a folder nor a Hub id of the form"):
        open_checkpoint(source)


# --- the Hub


class FakeHub:
    """Serves one local folder as a repository and notes what is asked of it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.fetched: list[str] = []
        self.calls: list[tuple[str, Any, Any]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
        monkeypatch.setattr(checkpoint, "HfApi", lambda token=None: self)
        monkeypatch.setattr(checkpoint, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(checkpoint, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(checkpoint, "_offline", lambda: offline)

    def model_info(self, repo_id: str, revision: str | None = None) -> Any:
        self.calls.append(("model_info", repo_id, revision))
        return SimpleNamespace(sha="c0ffee")

    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        self.calls.append(("list_repo_files", repo_id, revision))
        return os.listdir(self.folder)

    def snapshot_download(
        self, repo_id: str, revision: str | None, token: str | None, allow_patterns: list[str]
    ) -> str:
        self.calls.append(("snapshot_download", revision, token))
        assert not any(pattern.endswith("safetensors") for pattern in allow_patterns)
        self.cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in self.folder.glob(pattern):
                shutil.copyfile(path, self.cache / path.name)
        return str(self.cache)

    def hf_hub_download(self, repo_id: str, name: str, revision: str | None, token: str | None) -> str:
        self.calls.append(("hf_hub_download", revision, token))
        self.fetched.append(name)
        shutil.copyfile(self.folder / name, self.cache / name)
        return str(self.cache / name)


def test_only_shards_with_kept_tensors_are_downloaded(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(sharded, tmp_path / "cache")
    hub.install(monkeypatch)
    prune(REPOSITORY, tmp_path / "out", num_kept_layers=2, revision="main", token="secret")
    files = weight_map(sharded)
    needed = {file for name, file in files.items() if is_kept(name, range(2))}
    assert sorted(hub.fetched) == sorted(needed)
    assert len(needed) < len(set(files.values()))
    # The branch is resolved once; all else asks for the commit, so that files are of one version.
    assert hub.calls[0] == ("model_info", REPOSITORY, "main")
    assert {call[2 if call[0] == "list_repo_files" else 1] for call in hub.calls[1:]} == {"c0ffee"}
    tokens = {call[2] for call in hub.calls if "download" in call[0]}
    assert tokens == {"secret"}


def test_a_hub_checkpoint_equals_the_local_one(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(sharded, tmp_path / "local", num_kept_layers=2)
    FakeHub(sharded, tmp_path / "cache").install(monkeypatch)
    report = prune(REPOSITORY, tmp_path / "hub", num_kept_layers=2)
    assert report.source == REPOSITORY
    weights = [(tmp_path / name / SINGLE_NAME).read_bytes() for name in ("local", "hub")]
    assert weights[0] == weights[1]
    config = PumaModel.from_pretrained(tmp_path / "hub").config
    assert (config.source_name_or_path, config.source_revision) == (REPOSITORY, "c0ffee")


def test_a_single_file_is_downloaded_for_its_names(
    qwen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(qwen_dir, tmp_path / "cache")
    hub.install(monkeypatch)
    opened = open_checkpoint(REPOSITORY)
    assert opened.weight_files == dict.fromkeys(load_file(qwen_dir / SINGLE_NAME), SINGLE_NAME)
    assert opened.repo_id == REPOSITORY
    assert set(hub.fetched) == {SINGLE_NAME}


def test_offline_the_cache_is_enough(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(sharded, tmp_path / "cache")
    hub.install(monkeypatch, offline=True)
    opened = open_checkpoint(REPOSITORY, revision="abc")
    assert opened.weight_files == weight_map(sharded)
    assert [call[0] for call in hub.calls] == ["snapshot_download"]
    assert opened.revision == "abc"


def test_pickles_on_the_hub_are_refused(qwen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(qwen_dir, tmp_path / "copy")
    (tmp_path / "copy" / SINGLE_NAME).rename(tmp_path / "copy" / "pytorch_model.bin")
    hub = FakeHub(tmp_path / "copy", tmp_path / "cache")
    hub.install(monkeypatch)
    with pytest.raises(ValueError, match=rf"'{REPOSITORY}' holds its weights as 'pytorch_model.bin', a pickle"):
        open_checkpoint(REPOSITORY)
    assert hub.fetched == []


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, RepositoryNotFoundError])
def test_an_unknown_id_is_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    message = rf"'no/such' is no folder here, and the Hub has no such model.*\({kind.__name__}\). Check the name"
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint("no/such")


def test_offline_without_a_cache_is_an_error_that_names_the_id() -> None:
    with pytest.raises(FileNotFoundError, match=r"'no/such' is no folder here.*HF_HUB_OFFLINE"):
        open_checkpoint("no/such")


def test_a_hub_that_cannot_be_asked(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(sharded, tmp_path / "cache")
    hub.install(monkeypatch)

    def refuse(repo_id: str, revision: str | None = None) -> None:
        raise RuntimeError("connection refused")

    monkeypatch.setattr(hub, "model_info", refuse)
    with pytest.raises(ConnectionError, match=r"'org/name' is no folder here.*connection refused.*network"):
        open_checkpoint("org/name")
