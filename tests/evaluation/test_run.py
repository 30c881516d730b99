"""An evaluation from a configuration, with a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from sentence_transformers import SentenceTransformer

from puma_hf.configs import EvaluateConfig, SweepConfig
from puma_hf.evaluation.layer_sweep import sweep
from puma_hf.evaluation.mbeir import evaluate, evaluate_mbeir
from puma_hf.evaluation.results import MBEIRResults
from puma_hf.files import LOCK_FILE, DirectoryInUseError
from tests.data.mbeir_builder import change_record, qid, query_path
from tests.evaluation.fake_encoder import FakeEncoder

TASKS = ("toys_task1", "toys_task7")


def config(puma_dir: Path, root: Path, **values: Any) -> EvaluateConfig:
    return EvaluateConfig(model=str(puma_dir), data=root, **{"tasks": TASKS, "pool": "local", **values})


def test_it_is_evaluate_mbeir(
    puma_dir: Path, root: Path, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    output = tmp_path / "out"
    results = evaluate(config(puma_dir, root, output=output, pool="both", instruction_seed=1))
    expected = evaluate_mbeir(sentence_transformer, root, tasks=TASKS, pool="both", instruction_seed=1)
    assert results == expected
    assert MBEIRResults.from_dict(json.loads((output / "results.json").read_text())).rows == results.rows
    assert results.made_from["model"] == puma_dir.name
    assert results.made_from["data"] == "mbeir"
    assert {len(row.metrics) for row in results.rows} == {11}


def test_another_run_in_the_output_is_refused_before_anything_is_made(
    puma_dir: Path, root: Path, tmp_path: Path
) -> None:
    with FileLock(tmp_path / LOCK_FILE):
        with pytest.raises(DirectoryInUseError, match="is in use"):
            evaluate(config(puma_dir, root, output=tmp_path, benchmark="nano"))
        with pytest.raises(DirectoryInUseError, match="is in use"):
            evaluate_mbeir(FakeEncoder(), root, tasks=TASKS, output_dir=tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path != root] == [LOCK_FILE]


def test_only_the_first_dimensions(
    puma_dir: Path, root: Path, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    results = evaluate(config(puma_dir, root, output=tmp_path / "out", truncate_dim=4))
    expected = evaluate_mbeir(sentence_transformer, root, tasks=TASKS, encode_kwargs={"truncate_dim": 4})
    assert results.rankings == expected.rankings
    assert results.made_from["truncate_dim"] == expected.made_from["truncate_dim"] == 4
    with pytest.raises(ValueError, match=r"made with other settings: .*truncate_dim is 4 there and None here"):
        evaluate(config(puma_dir, root, output=tmp_path / "out"))


def test_nano(puma_dir: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nano = {"benchmark": "nano", "nano_queries": 2, "nano_candidates": 3}
    results = evaluate(config(puma_dir, root, output=tmp_path / "out", **nano))
    assert [row.num_queries for row in results.rows] == [2, 2]
    assert results.rows[0].pool_size < 6
    content_hash = json.loads((tmp_path / "out" / "nano" / "nano.json").read_text())["content_hash"]
    assert results.made_from["content_hash"] == content_hash
    assert results.made_from["data"] == "mbeir (nano)"
    # Kept elsewhere, or nowhere: the same.
    elsewhere = evaluate(config(puma_dir, root, nano_folder=tmp_path / "elsewhere", **nano))
    assert (tmp_path / "elsewhere" / "nano.json").is_file()
    assert evaluate(config(puma_dir, root, **nano)) == elsewhere == results
    assert not caplog.messages


def test_an_original_checkpoint_is_no_embedder(qwen_dir: Path, root: Path) -> None:
    with pytest.raises(ValueError, match=r"is an original qwen2_vl checkpoint, must be an embedder.*puma-hf prune"):
        evaluate(EvaluateConfig(model=str(qwen_dir), data=root))


def test_special_tokens(puma_dir: Path, root: Path, tmp_path: Path) -> None:
    change_record(query_path(root, 1, "test"), 2, query_txt="a <|im_end|> b")
    with pytest.raises(ValueError, match=rf"query '{qid(1, 1)}': the text contains the .*--special-tokens split"):
        evaluate(config(puma_dir, root, output=tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"query '{qid(1, 1)}': the text contains"):
        sweep(SweepConfig(model=str(puma_dir), data=root, split="test", tasks=TASKS))
    # What was embedded before is kept.
    results = evaluate(config(puma_dir, root, output=tmp_path / "out", special_tokens="split"))
    assert results.made_from["encode_kwargs"] == {"processing_kwargs": {"text": {"split_special_tokens": True}}}
    report = sweep(SweepConfig(model=str(puma_dir), data=root, split="test", tasks=TASKS, special_tokens="split"))
    assert report.full.quality["local"]["ndcg@10"] == pytest.approx(results.mean("local")["ndcg@10"], abs=1e-9)
