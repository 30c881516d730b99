from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from puma_hf import PumaModel, PumaProcessor
from puma_hf.modeling import processing_puma
from puma_hf.modeling import sentence_transformers_files_puma as files
from puma_hf.modeling.sentence_transformers_files_puma import MODULE_FILE, write_sentence_transformers_files

WRITTEN = {
    "attention_puma.py",
    "config_sentence_transformers.json",
    "configuration_puma.py",
    "content_ids_puma.py",
    "fast_path_puma.py",
    "modeling_puma.py",
    "modules.json",
    "packing_puma.py",
    "sentence_bert_config.json",
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


def test_a_saved_model_has_all_code_of_the_one_loaded(puma_dir: Path, tmp_path: Path) -> None:
    """Loaded from a directory, the processor's code lies apart from the module's."""
    SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").save(str(tmp_path / "copy"))
    assert {path.name for path in puma_dir.glob("*.py")} == {path.name for path in (tmp_path / "copy").glob("*.py")}


@pytest.mark.parametrize("load", [PumaProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_settings_of_the_directory_are_saved_again(load: Any, puma_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(puma_dir, tmp_path / "source")
    file = tmp_path / "source" / "config_sentence_transformers.json"
    settings = json.loads(file.read_text()) | {"prompts": {"find": "Finde es: ä"}, "default_prompt_name": "find"}
    file.write_text(json.dumps(settings | {"__version__": {}}))
    load(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / file.name).read_text(encoding="utf-8")) == settings
    file.unlink()
    load(tmp_path / "source").save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / file.name).exists()


def test_code_opens_without_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before transformers opens code of the Hub, it asks of each file whether all that it imports is installed."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for file in get_relative_import_files(processing_puma.__file__):
        check_imports(file)


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


def test_a_save_without_the_code_of_the_module_fails(
    processor: PumaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "__file__", str(tmp_path / "elsewhere.py"))
    with pytest.raises(FileNotFoundError, match=r"sentence_transformers_puma\.py is missing, without which.*Copy it"):
        processor.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []


@pytest.mark.parametrize("name", [None, "org/mine"])
def test_a_processor_is_uploaded_whole(
    processor: PumaProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """By push_to_hub, which uploads all files; of a save with push_to_hub transformers uploads what it wrote itself."""
    uploads: list[Any] = []
    monkeypatch.setattr(processor, "push_to_hub", lambda *args, **options: uploads.append((*args, options)))
    names = {} if name is None else {"repo_id": name}
    processor.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, **names)
    assert uploads == [(name or "mine", {"private": True})]
    assert (tmp_path / "mine" / "modules.json").is_file()


def test_packages_that_are_absent_have_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise files.PackageNotFoundError(package)

    monkeypatch.setattr(files, "version", absent)
    write_sentence_transformers_files(tmp_path, {})
    content = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert set(content["__version__"].values()) == {"unknown"}
