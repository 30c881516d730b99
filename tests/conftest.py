"""The environment of the tests: offline, one thread, caches in a temporary directory of their own.

The variables are set while this file is imported, before any test imports torch or transformers: these
libraries read them once, at their own import.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    from puma_hf import PumaModel, PumaProcessor

ROOT = Path(__file__).parents[1]

_CACHES = tempfile.TemporaryDirectory(prefix="puma-hf-tests-", ignore_cleanup_errors=True)
_HF_HOME = Path(_CACHES.name) / "huggingface"

# Each of these would win over HF_HOME and lead back to the user's own files.
_OWN = ("HF_ASSETS", "HF_DATASETS", "HF_EVALUATE", "HF_HUB", "HF_METRICS", "HF_XET", "HUGGINGFACE_HUB", "TRANSFORMERS")
for _name in ("SENTENCE_TRANSFORMERS_HOME", *(f"{_library}_CACHE" for _library in _OWN)):
    os.environ.pop(_name, None)

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_HF_HOME),
    HF_MODULES_CACHE=str(_HF_HOME / "modules"),
    TOKENIZERS_PARALLELISM="false",
)
# torch takes its number of threads from here, so torch itself need not be imported yet. With two threads beside another
# job tiny models run ten times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


# The imports during collection make millions of objects that stay; looking through them again and again takes a
# second meanwhile and, as every training asks for a collection, half a second each time afterwards.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Nor is what earlier files have left looked through: modules imported on first use, fixtures of the session."""
    gc.collect()  # only what the last file made
    gc.freeze()


def pytest_unconfigure() -> None:
    _CACHES.cleanup()


@pytest.fixture(scope="session")
def docs_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of demo/ and configs/, made once."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("demo", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "output"))
    return folder


@pytest.fixture
def docs_directory(docs_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where examples run: paths such as demo/... hold, but what they write stays out of the repository."""
    for source in docs_sources.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- tiny models; imported lazily, so that tests of data or text alone do not pay for torch


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original Qwen2-VL checkpoint of 4 layers. Read only: copy it before changing it."""
    from tests.tiny import build_qwen2_vl

    return build_qwen2_vl(tmp_path_factory.mktemp("original") / "tiny-qwen2-vl")


@pytest.fixture(scope="session")
def puma_dir(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint pruned to 2 layers, complete. Read only."""
    from puma_hf import prune

    folder = tmp_path_factory.mktemp("pruned") / "tiny-puma"
    prune(qwen_dir, folder, num_kept_layers=2)
    return folder


@pytest.fixture(scope="session")
def elastic_dir(qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with all of its 4 layers, said to be trained after 1, 2 and 4 of them. Read only."""
    from puma_hf import prune

    folder = tmp_path_factory.mktemp("elastic") / "tiny-elastic"
    prune(qwen_dir, folder, num_kept_layers=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trained_depths": [1, 2, 4]}))
    return folder


@pytest.fixture(scope="session")
def model(puma_dir: Path) -> PumaModel:
    """The pruned model in evaluation mode. Read only."""
    from puma_hf import PumaModel

    loaded: PumaModel = PumaModel.from_pretrained(puma_dir).eval()
    return loaded


@pytest.fixture
def processor(puma_dir: Path) -> PumaProcessor:
    """Its processor, a new one for each test, which may change it."""
    from puma_hf import PumaProcessor

    loaded: PumaProcessor = PumaProcessor.from_pretrained(puma_dir)
    return loaded


@pytest.fixture(scope="session")
def sentence_transformer(puma_dir: Path) -> SentenceTransformer:
    """The pruned model as a SentenceTransformer. Read only."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="session")
def adapter(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the pruned model that changes its embeddings, as training saves one. Read only."""
    import torch
    from sentence_transformers import SentenceTransformer

    from puma_hf import lora_config
    from puma_hf.trainer.lora_puma import add_lora, save_base_fingerprint

    torch.manual_seed(0)
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
    add_lora(model, lora_config(r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("adapters") / "puma-lora"
    model.save_pretrained(str(folder), create_model_card=False)
    save_base_fingerprint(model, folder)
    return folder


@pytest.fixture(scope="session")
def exported(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model as a plain checkpoint. Read only."""
    from puma_hf.export import export

    folder = tmp_path_factory.mktemp("exported") / "stock"
    export(puma_dir, folder)
    return folder


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three pictures of different sizes and colours, none of one colour alone."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = ((40, 24, 3), (24, 24, 3), (16, 56, 3))
    return [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
