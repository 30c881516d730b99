from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from puma_hf.evaluation.mbeir_results import MBEIRResults, MBEIRTaskResult
from puma_hf.hub import card_results
from puma_hf.hub.card_results import MeasuredModel, find_results, read_results
from tests.evaluation.sweep_reports import make_model, make_report

PRINT = "f" * 64


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeasuredModel:
    """A model of 2 of 5 layers whose fingerprint is known without loading it."""
    folder = tmp_path / "work" / "puma"
    folder.mkdir(parents=True)
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: f"{truncate_dim or PRINT}")
    return MeasuredModel(folder, 2, 5, 10**9 + 2 * 10**8)


def write_results(path: Path, **made_from: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = MBEIRTaskResult("mscoco", 0, "local", 100, 50, 0, 0.625, {"hit@1": 0.5, "hit@5": 0.625})
    values = {"model_fingerprint": PRINT, "truncate_dim": None, **made_from}
    MBEIRResults("test", [row], made_from=values).to_json(path)
    return path


def test_results_are_found_in_the_directory_and_beside_it_if_they_are_its_own(model: MeasuredModel) -> None:
    folder = model.directory
    own = [folder / "results.json", folder / "test" / "results.json", folder.parent / "puma-test" / "results.json"]
    for path in own:
        write_results(path)
    write_results(folder.parent / "other" / "results.json", model_fingerprint="0" * 64)
    (folder.parent / "damaged").mkdir()
    (folder.parent / "damaged" / "results.json").write_text("{")
    found = read_results(model, None)
    assert [source.name for source, _ in found.evaluations] == [
        "puma/results.json",
        "test/results.json",
        "puma-test/results.json",
    ]
    assert found.evaluations[0][1].rows[0].score == 0.625


def test_what_others_keep_to_themselves_beside_it_is_passed_by(
    model: MeasuredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /tmp, where programs have folders that nobody else may look into."""
    work = model.directory.parent
    own, closed, unreadable = (write_results(work / name / "results.json") for name in ("mine", "closed", "unreadable"))

    def refusing(plain: Callable[..., Any], where: Path) -> Callable[..., Any]:
        def refuse(path: Any, **options: Any) -> Any:
            if path == where:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return plain(path, **options)

        return refuse

    monkeypatch.setattr(os, "stat", refusing(os.stat, closed))
    monkeypatch.setattr(card_results, "read_mapping", refusing(card_results.read_mapping, unreadable))
    assert [source.path for source, _ in read_results(model, None).evaluations] == [own.resolve()]
    with pytest.raises(PermissionError):
        read_results(model, [unreadable])


def test_results_of_another_model_cannot_get_in(model: MeasuredModel) -> None:
    path = write_results(model.directory / "results.json", model_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"results\.json' is of another model: fingerprint 0{12}, that of .* f{12}"):
        read_results(model, [path])
    path = write_results(model.directory / "results.json", model_fingerprint=None)
    with pytest.raises(ValueError, match=r"does not say which model it is of"):
        read_results(model, [path])


def test_truncated_results_are_compared_with_the_truncated_model(model: MeasuredModel) -> None:
    path = write_results(model.directory / "results.json", model_fingerprint="32", truncate_dim=32)
    assert read_results(model, [path]).evaluations[0][1].made_from["truncate_dim"] == 32
    write_results(path, truncate_dim=32)  # by encode_kwargs of `evaluate_mbeir`: the model itself was not truncated
    assert read_results(model, [path]).evaluations[0][1].made_from["truncate_dim"] == 32
    write_results(path, model_fingerprint="16", truncate_dim=32)
    with pytest.raises(ValueError, match="is of another model: fingerprint 16, that of"):
        read_results(model, [path])


def test_the_sweep_must_have_this_depth_and_this_size(model: MeasuredModel) -> None:
    path = model.directory.parent / "sweep" / "sweep.json"
    path.parent.mkdir()
    path.write_text(json.dumps(make_report().to_dict()))
    _, report, row, full = read_results(model, None).costs[0]
    assert (report.text_tokens, row.k, full.k, row.flops_text) == (64, 2, 5, 2 * 10**9)
    path.write_text(json.dumps(make_report(make_model("full", [0.1, 0.2, 0.3, 0.4])).to_dict()))
    assert read_results(model, None).costs == []
    with pytest.raises(ValueError, match=r"it has no row of 2 of 5 layers with 1,200,000,000 parameters"):
        read_results(model, [path])


def test_files_from_elsewhere_are_refused(model: MeasuredModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lies neither in .*puma' nor beside it"):
        read_results(model, [write_results(tmp_path / "results.json")])
    with pytest.raises(FileNotFoundError, match=r"results 'nowhere\.json' is no file"):
        read_results(model, ["nowhere.json"])
    (model.directory / "table.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be named results\.json, sweep\.json"):
        read_results(model, [model.directory / "table.json"])


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ("[]", "must hold names with values, not list"), ("{}", r"is not what puma-hf writes")],
)
@pytest.mark.parametrize("name", ["results.json", "sweep.json"])
def test_damaged_files_are_named(model: MeasuredModel, name: str, content: str, words: str) -> None:
    (model.directory / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}' {words}"):
        read_results(model, [model.directory / name])
    assert read_results(model, None).evaluations == []


def test_recipes_are_followed_back_to_the_first_stage(model: MeasuredModel) -> None:
    work = model.directory.parent
    for name, file, base in (("puma", "train", "distilled"), ("distilled", "distill", "pruned")):
        (work / f"{name}-lora").mkdir()
        (work / f"{name}-lora" / f"{file}.yaml").write_text(yaml.safe_dump({"model": f"/home/somebody/{base}"}))
    found = [path.relative_to(work).as_posix() for path in find_results(model.directory)]
    assert found == ["puma-lora/train.yaml", "distilled-lora/distill.yaml"]
    assert [recipe["model"] for _, recipe in read_results(model, None).recipes][1] == "/home/somebody/pruned"


def test_a_recipe_that_names_no_directory_is_the_last(model: MeasuredModel) -> None:
    (model.directory / "train.yaml").write_text("model: .")
    assert find_results(model.directory) == [model.directory / "train.yaml"]


def test_a_recipe_that_cannot_be_read_is_passed_by(model: MeasuredModel, caplog: pytest.LogCaptureFixture) -> None:
    recipe = model.directory / "train.yaml"
    for content in (b"model: [", b"- a list", b"model: \xff"):
        recipe.write_bytes(content)
        with caplog.at_level(logging.INFO, logger="puma_hf"):
            assert read_results(model, None).recipes == []
        assert "not in the card: " in caplog.text
        with pytest.raises(ValueError, match=r"train\.yaml' (cannot be read|must hold names)"):
            read_results(model, [recipe])


def test_recipes_that_name_each_other_end(model: MeasuredModel) -> None:
    for name, base in (("puma", "other"), ("other", "puma")):
        model.directory.with_name(f"{name}-lora").mkdir()
        (model.directory.with_name(f"{name}-lora") / "train.yaml").write_text(f"model: {base}")
    assert [path.parent.name for path in find_results(model.directory)] == ["puma-lora", "other-lora"]


def test_an_adapter_that_was_trained_on_the_model_tells_nothing_of_it(model: MeasuredModel) -> None:
    lora = model.directory.with_name("puma-lora")
    lora.mkdir()
    (lora / "train.yaml").write_text("model: work/puma/")
    assert find_results(model.directory) == []
    assert find_results(lora) == [lora / "train.yaml"]


def test_the_fingerprint_is_that_of_the_evaluation(
    puma_dir: Path, tmp_path: Path, sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puma_hf.fingerprint import model_fingerprint

    moved = tmp_path / "moved"
    shutil.copytree(puma_dir, moved)
    measured = MeasuredModel(moved, 2, 4, 1)
    assert measured.fingerprint(None) == model_fingerprint(sentence_transformer)
    monkeypatch.setattr(sentence_transformer, "truncate_dim", 16)
    assert measured.fingerprint(16) == model_fingerprint(sentence_transformer)
    assert measured.fingerprint(16) != measured.fingerprint(None)
