from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from puma_hf import PumaModel, PumaProcessor
from puma_hf.modeling import sentence_transformers_files_puma as files
from puma_hf.modeling.sentence_transformers_files_puma import MODULE_FILE, write_sentence_transformers_files

WRITTEN = {
    "attention_puma.py",
    "config_sentence_transformers.json",
    "content_ids_puma.py",
    "fast_path_puma.py",
    "modules.json",
    "packer_puma.py",
    "packing_puma.py",
    "sentence_bert_config.json",
    "shared_prefix_puma.py",
    MODULE_FILE,
}


def prompts(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    found: dict[str, str] = content["prompts"]
    return found


def test_model_and_processor_saved_apart_are_a_sentence_transformer(
    puma_dir: Path, sentence_transformer: SentenceTransformer, tmp_path: Path
) -> None:
    PumaModel.from_pretrained(puma_dir).save_pretrained(tmp_path)
    PumaProcessor.from_pretrained(puma_dir).save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert [type(module).__name__ for module in model] == ["PumaTransformer"]
    expected = sentence_transformer.encode(["a red apple"])
    np.testing.assert_allclose(model.encode(["a red apple"]), expected, rtol=0, atol=1e-6)


def test_a_loaded_model_is_saved_without_a_false_warning(
    puma_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loaded from a directory, the processor's code lies apart from the module's."""
    SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").save(str(tmp_path / "copy"))
    assert "lacks" not in caplog.text
    assert {path.name for path in puma_dir.glob("*.py")} == {path.name for path in (tmp_path / "copy").glob("*.py")}


def test_a_saved_processor_leaves_the_prompts_that_are_there(processor: PumaProcessor, tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, {"find": "Finde es: ä"})
    processor.save_pretrained(tmp_path)
    assert prompts(tmp_path) == {"find": "Finde es: ä"}


def test_files_are_replaced_only_if_asked(tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, {"a": "A"})
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN
    (tmp_path / MODULE_FILE).write_text("mine")
    write_sentence_transformers_files(tmp_path, {"b": "B"}, overwrite=False)
    assert prompts(tmp_path) == {"a": "A"}
    assert (tmp_path / MODULE_FILE).read_text() == "mine"
    write_sentence_transformers_files(tmp_path, {"b": "B"})
    assert prompts(tmp_path) == {"b": "B"}
    assert (tmp_path / MODULE_FILE).read_text() == Path(files.__file__).with_name(MODULE_FILE).read_text()


def test_a_missing_module_file_is_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a process that fetched the processor's code alone: better no SentenceTransformer than mean pooling."""
    alone = tmp_path / "code" / "sentence_transformers_files_puma.py"
    alone.parent.mkdir()
    shutil.copyfile(files.__file__, alone)
    monkeypatch.setattr(files, "__file__", str(alone))
    write_sentence_transformers_files(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "modules.json", "sentence_bert_config.json"}
    assert "lacks sentence_transformers_puma.py, which SentenceTransformer needs" in caplog.text


def test_packages_that_are_absent_have_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise files.PackageNotFoundError(package)

    monkeypatch.setattr(files, "version", absent)
    write_sentence_transformers_files(tmp_path, {})
    content = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert set(content["__version__"].values()) == {"unknown"}
