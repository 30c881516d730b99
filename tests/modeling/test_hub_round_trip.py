"""What is saved or pushed opens where puma_hf is not installed, and gives the same vectors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, RepoUrl
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import PumaModel, PumaProcessor, prune
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from tests.forks import run_worker
from tests.modeling.fresh_process import Blocker, inputs_of_every_kind
from tests.tiny import build_checkpoint

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
NAMES = ("pruned", "pushed parts", "pushed", *FAMILIES)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def install_fake_hub(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Uploads go into folders under `root`, one for each repository."""

    def upload_folder(api: Any, *, repo_id: str, folder_path: str | Path, **kwargs: Any) -> Any:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return commit(repo_id)

    def create_commit(api: Any, repo_id: str, operations: list[CommitOperationAdd], **kwargs: Any) -> Any:
        for operation in operations:
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            with operation.as_file() as stream:
                (root / repo_id / operation.path_in_repo).write_bytes(stream.read())
        return commit(repo_id)

    def commit(repo_id: str) -> Any:
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="0")

    patch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    patch.setattr(HfApi, "upload_folder", upload_folder)
    patch.setattr(HfApi, "create_commit", create_commit)
    patch.setattr(HfApi, "model_info", lambda *a, **k: SimpleNamespace(sha="0", siblings=[]))
    patch.setattr(HfApi, "file_exists", lambda *a, **k: False)


@pytest.fixture(scope="module")
def picture_paths(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(images))]


@pytest.fixture(scope="module")
def directories(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory for each way to a finished model; those of the Hub as they were uploaded."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_fake_hub(root, monkeypatch)
        PumaModel.from_pretrained(puma_dir).push_to_hub("org/parts")
        PumaProcessor.from_pretrained(puma_dir).push_to_hub("org/parts")
        SentenceTransformer(modules=[PumaTransformer(str(puma_dir))], device="cpu").push_to_hub("org/built")
    for family in FAMILIES:
        prune(build_checkpoint(root / f"tiny-{family}", family), root / family, num_kept_layers=2)
    return {
        "pruned": puma_dir,
        "pushed parts": root / "org" / "parts",
        "pushed": root / "org" / "built",
        **{family: root / family for family in FAMILIES},
    }


@pytest.fixture(scope="module")
def fresh_vectors(
    directories: dict[str, Path], picture_paths: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the fresh process made of the directories: one process for all tests, as it takes seconds."""
    folder = tmp_path_factory.mktemp("fresh")
    job = {
        "images": picture_paths,
        "directories": {name: str(path) for name, path in directories.items()},
        "modules": str(folder / "modules"),
        "output": str(folder / "vectors.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_worker("tests.modeling.fresh_process", folder / "job.json")
    results: dict[str, Any] = json.loads((folder / "vectors.json").read_text())
    return results


@pytest.fixture(scope="module")
def expected(
    sentence_transformer: SentenceTransformer, directories: dict[str, Path], picture_paths: list[str]
) -> dict[str, np.ndarray]:
    """The vectors of each directory, made by the classes of the installed package."""
    inputs = inputs_of_every_kind(picture_paths)
    vectors = dict.fromkeys(directories, sentence_transformer.encode(inputs))
    for family in FAMILIES:
        model = SentenceTransformer(str(directories[family]), trust_remote_code=True, device="cpu")
        vectors[family] = model.encode(inputs)
    return vectors


def test_puma_hf_is_really_absent_there(fresh_vectors: dict[str, Any]) -> None:
    assert fresh_vectors["puma_hf modules"] == []
    assert "modeling_puma.py" in fresh_vectors["cached modules"]  # the code is the directories' own
    with pytest.raises(ImportError, match=r"puma_hf\.losses must not be needed here"):
        Blocker().find_spec("puma_hf.losses")


@pytest.mark.parametrize("name", NAMES)
def test_both_loaders_give_the_same_vectors(fresh_vectors: Any, expected: dict[str, np.ndarray], name: str) -> None:
    ways = ("transformers", "sentence-transformers", "one by one", "saved again", "saved again, transformers")
    for way in ways:
        np.testing.assert_allclose(fresh_vectors[f"{name}: {way}"], expected[name], rtol=0, atol=1e-5, err_msg=way)
    single, batched = (np.array(found)[:, 0] for found in fresh_vectors[f"{name}: pipeline"])
    np.testing.assert_allclose(single, expected[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(batched, expected[name][[0, 0]], rtol=0, atol=1e-5)
    # The fast path is taken there, for all inputs at once and one by one, where it knows the layers.
    assert fresh_vectors[f"{name}: batches"] == ["dict" if name == "qwen3_5" else "PackedBatch"] * 6


@pytest.mark.parametrize("save", ["parts", "trained"])
def test_what_transformers_saves_there_is_a_sentence_transformer_with_its_prompts(
    fresh_vectors: dict[str, Any], expected: dict[str, np.ndarray], sentence_transformer: SentenceTransformer, save: str
) -> None:
    found = fresh_vectors["saves"][save]
    np.testing.assert_allclose(found["vectors"], expected["pruned"], rtol=0, atol=1e-5)
    assert found["prompts"] == sentence_transformer.prompts != {}


def test_the_code_in_a_directory_is_the_packages_own(directories: dict[str, Path]) -> None:
    package = Path(sys.modules["puma_hf"].__file__ or "").parent / "modeling"
    sources = {path.name: path.read_text() for path in package.glob("*_puma.py")}
    for name, folder in directories.items():
        found = {path.name: path.read_text() for path in folder.glob("*.py")}
        assert {file_name: found.get(file_name) for file_name in sources} == sources, name
