"""Checkpoints, here and on the Hub: which tensors are kept, which files are needed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from puma_hf import PumaModel, checkpoint, prune
from puma_hf.checkpoint import INDEX_NAME, SINGLE_NAME, is_kept, open_checkpoint
from tests.tiny import LAYOUTS, copy_checkpoint

REPOSITORY = "org/tiny-qwen2-vl"


@pytest.fixture
def sharded(qwen_dir: Path, tmp_path: Path) -> Path:
    """Four shards; the last holds decoder layer 3 alone."""
    return copy_checkpoint(qwen_dir, tmp_path / "sharded", num_shards=4, head=True)


def weight_map(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    return names


@pytest.mark.parametrize("prefix", [text for text, _ in LAYOUTS.values()])
def test_layers_by_number_and_all_else_but_the_head_is_kept(prefix: str) -> None:
    names = [prefix + f"layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 2, 10, 21)]
    names += [prefix + "norm.weight", "visual.blocks.30.mlp.fc1.weight", "visual.merger.layers.9.weight"]
    kept = [name for name in (*names, "lm_head.weight") if is_kept(name, range(2))]
    assert kept == names[:2] + names[5:]


# --- local folders


def test_shards_of_dropped_layers_are_never_read(sharded: Path, tmp_path: Path) -> None:
    files = weight_map(sharded)
    for name in set(files.values()) - {file for tensor, file in files.items() if is_kept(tensor, range(2))}:
        (sharded / name).write_bytes(b"not a safetensors file")
    assert prune(sharded, tmp_path / "out", num_kept_layers=2).num_kept_layers == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "has no config.json, or a"),
        (lambda d: (d / "config.json").write_text("{"), FileNotFoundError, "or a damaged one. Point to a"),
        (lambda d: (d / INDEX_NAME).unlink(), FileNotFoundError, f"neither {SINGLE_NAME} nor {INDEX_NAME}. Only"),
        (lambda d: (d / INDEX_NAME).write_text("{}"), ValueError, r"KeyError\('weight_map'\)"),
        (lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"a": "../b"}}'), ValueError, "outside of the folder"),
    ],
)
def test_a_broken_folder_is_refused(sharded: Path, change: Any, error: Any, message: str) -> None:
    change(sharded)
    with pytest.raises(error, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("keep_bytes", [0, 2000, -2000])
def test_a_file_that_is_cut_off_is_refused(qwen_dir: Path, tmp_path: Path, keep_bytes: int) -> None:
    folder = copy_checkpoint(qwen_dir, tmp_path / "copy")
    content = (folder / SINGLE_NAME).read_bytes()
    (folder / SINGLE_NAME).write_bytes(content[:keep_bytes])
    with pytest.raises(ValueError, match=f"'{SINGLE_NAME}' is not a whole safetensors file .*Download it again"):
        open_checkpoint(folder)


def test_a_shard_that_is_gone_or_lacks_a_tensor_is_refused(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / weight_map(sharded)["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"sharded' lacks 1 of .*first: .*layers\.1\.mlp\.up_proj\.weight"):
        prune(sharded, tmp_path / "out", num_kept_layers=2)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 'model-.*'\. Download the checkpoint again"):
        prune(sharded, tmp_path / "out", num_kept_layers=2)


# --- the Hub


class FakeHub:
    """Serves one local folder as a repository and notes what is asked of it."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache = folder, cache / "c0ffee"  # as snapshots lie in huggingface_hub's cache
        self.cache.mkdir(parents=True)
        self.fetched: list[str] = []
        self.asked: list[tuple[str | None, str | None]] = []
        monkeypatch.setattr(checkpoint, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(checkpoint, "hf_hub_download", self.hf_hub_download)

    def snapshot_download(
        self, repo_id: str, revision: str | None, token: str | None, allow_patterns: list[str]
    ) -> str:
        self.asked.append((revision, token))
        assert not any(pattern.endswith("safetensors") for pattern in allow_patterns)
        for path in [path for pattern in allow_patterns for path in self.folder.glob(pattern)]:
            shutil.copyfile(path, self.cache / path.name)
        return str(self.cache)

    def hf_hub_download(self, repo_id: str, name: str, revision: str | None, token: str | None) -> str:
        self.asked.append((revision, token))
        if not (self.folder / name).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        self.fetched.append(name)
        return str(shutil.copyfile(self.folder / name, self.cache / name))


def test_only_shards_with_kept_tensors_are_downloaded(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(sharded, tmp_path / "cache", monkeypatch)
    prune(REPOSITORY, tmp_path / "hub", num_kept_layers=2, revision="main", token="hf_secret")
    needed = {file for name, file in weight_map(sharded).items() if is_kept(name, range(2))}
    assert len(needed) < 4
    assert sorted(hub.fetched) == sorted(needed)
    # The branch is resolved once; all else asks for the commit, so that files are of one version.
    assert hub.asked[0] == ("main", "hf_secret")
    assert set(hub.asked[1:]) == {("c0ffee", "hf_secret")}
    prune(sharded, tmp_path / "local", num_kept_layers=2)
    weights = [(tmp_path / name / SINGLE_NAME).read_bytes() for name in ("local", "hub")]
    assert weights[0] == weights[1]
    config = PumaModel.from_pretrained(tmp_path / "hub").config
    assert (config.source_name_or_path, config.source_revision) == (REPOSITORY, "c0ffee")


def test_pickles_on_the_hub_are_refused(qwen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(qwen_dir, tmp_path / "copy")
    (tmp_path / "copy" / SINGLE_NAME).rename(tmp_path / "copy" / "pytorch_model.bin")
    hub = FakeHub(tmp_path / "copy", tmp_path / "cache", monkeypatch)
    with pytest.raises(FileNotFoundError, match=rf"'{REPOSITORY}' has neither .*a pickle"):
        open_checkpoint(REPOSITORY)
    assert hub.fetched == []


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("not here"), RuntimeError("connection refused")])
def test_a_hub_that_does_not_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "snapshot_download", Mock(side_effect=error))
    message = rf"'no/such' is no folder here, and the Hub has no such model.*{type(error).__name__}: .*Check the name"
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint("no/such")
