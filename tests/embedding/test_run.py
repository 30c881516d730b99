"""A corpus to disk from a configuration, with a real model; killed runs are in test_embed_kill_and_two_processes.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from puma_hf.configs import EmbedConfig
from puma_hf.data.mbeir import MBEIR
from puma_hf.embedding import record_embeddings, run
from puma_hf.embedding.corpus_store import ERRORS, open_embeddings
from puma_hf.embedding.run import EmbedReport, embed_corpus
from puma_hf.files import LOCK_FILE, DirectoryInUseError
from tests.data.mbeir_builder import build_mbeir

TEXTS = ["a red apple", "a table", "on", "a red table on an apple", "a", "apple apple apple", "red"]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Seven texts with ids, two with instructions of their own, and three images."""
    lines: list[dict[str, Any]] = [{"id": f"t{row}", "text": text} for row, text in enumerate(TEXTS)]
    lines[1]["instruction"] = lines[4]["instruction"] = "Find it."
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 256, (24, 16 + 8 * number, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        lines.insert(2 * number, {"id": f"i{number}", "text": None, "image": f"{number}.png"})
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "table.jsonl"


@pytest.fixture
def config(puma_dir: Path, table: Path, tmp_path: Path) -> Any:
    def make(**values: Any) -> EmbedConfig:
        given = {"data": table, "model": str(puma_dir), "output": tmp_path / "out", "shard_size": 4, **values}
        return EmbedConfig(**given)

    return make


def read(folder: str | Path) -> tuple[list[str], NDArray[Any]]:
    parts = list(open_embeddings(folder))
    return [name for ids, _ in parts for name in ids], np.concatenate([rows for _, rows in parts])


def expected(model: SentenceTransformer, table: Path, prompt: str | None = None, **options: Any) -> NDArray[Any]:
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    inputs = []
    for line in lines:
        image = None if line.get("image") is None else str(table.parent / line["image"])
        values = {"image": image, "text": line.get("text"), "instruction": line.get("instruction")}
        inputs.append({name: value for name, value in values.items() if value is not None})
    return np.asarray(model.encode(inputs, prompt=prompt, **options))


def replace_line(table: Path, row: int, **values: Any) -> None:
    lines = table.read_text().splitlines()
    lines[row] = json.dumps({**json.loads(lines[row]), **values})
    table.write_text("\n".join(lines) + "\n")


# --- what comes out


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_it_is_encode(config: Any, table: Path, sentence_transformer: SentenceTransformer, file_format: str) -> None:
    report = embed_corpus(config(format=file_format, prompt="Match the sentence."))
    ids, rows = read(report.output)
    assert ids == [json.loads(line)["id"] for line in table.read_text().splitlines()]
    np.testing.assert_allclose(rows, expected(sentence_transformer, table, "Match the sentence."), **TOLERANCE)
    assert (report.num_items, report.num_rows, report.num_errors, report.num_shards) == (10, 10, 0, 3)
    assert (report.num_new_shards, report.num_new_items, report.embedding_dim) == (3, 10, rows.shape[1])
    manifest = open_embeddings(report.output).manifest
    assert (manifest["model"], manifest["data"], manifest["dtype"]) == ("tiny-puma", "table.jsonl", "float32")
    assert manifest["settings"]["prompt"] == "Match the sentence."
    assert len(manifest["settings"]["fingerprint"]) == 64


def test_a_second_run_embeds_nothing_whatever_the_batches(config: Any) -> None:
    first = embed_corpus(config())
    before = {path: path.stat().st_mtime_ns for path in Path(first.output).iterdir()}
    for values in ({}, {"fast": False}, {"max_batch_tokens": 64}, {"num_workers": 1}, {"on_error": "skip"}):
        again = embed_corpus(config(**values))
        assert (again.num_new_shards, again.num_new_items, again.num_rows) == (0, 0, 10)
    assert {path: path.stat().st_mtime_ns for path in Path(first.output).iterdir()} == before


def test_without_the_fast_path(
    config: Any, table: Path, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    _, rows = read(embed_corpus(config(fast=False, max_batch_tokens=64, num_workers=1)).output)
    np.testing.assert_allclose(rows, expected(sentence_transformer, table), **TOLERANCE)


def test_only_the_first_dimensions(config: Any, table: Path, sentence_transformer: SentenceTransformer) -> None:
    report = embed_corpus(config(truncate_dim=8))
    _, rows = read(report.output)
    assert report.embedding_dim == open_embeddings(report.output).embedding_dim == 8
    wanted = expected(sentence_transformer, table, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(rows, wanted, **TOLERANCE)


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_precisions(config: Any, table: Path, sentence_transformer: SentenceTransformer, precision: Any) -> None:
    report = embed_corpus(config(precision=precision))
    found = open_embeddings(report.output)
    _, rows = read(report.output)
    floats = expected(sentence_transformer, table)
    assert rows.dtype == found.manifest["dtype"] == precision.replace("ubinary", "uint8").replace("binary", "int8")
    assert report.precision == found.precision == precision
    if precision == "float16":
        np.testing.assert_allclose(rows.astype(np.float32), floats, rtol=0, atol=1e-3)
        return
    if precision.endswith("int8"):
        # All ten inputs were drawn, so the ranges are those of all, and the same in every shard.
        assert found.ranges is not None
        np.testing.assert_allclose(found.ranges, np.stack([floats.min(axis=0), floats.max(axis=0)]), **TOLERANCE)
    wanted: Any = quantize_embeddings(floats, precision, ranges=found.ranges)
    # A value on the edge of a step may fall on the other side; every dimension has its least and its largest there.
    if precision.endswith("int8"):
        assert np.abs(rows.astype(np.int16) - wanted.astype(np.int16)).max() <= 1
    else:  # a sign that is lost in rounding
        assert np.all((found.to_float(rows) > 0) == (floats > 0), where=np.abs(floats) > 1e-6)
    assert np.abs(found.to_float(rows) - floats).max() < (0.01 if precision.endswith("int8") else 2)


def test_ranges_outlive_a_changed_corpus_and_come_from_a_sample(config: Any, table: Path) -> None:
    report = embed_corpus(config(precision="int8", calibration_size=3))
    ranges = open_embeddings(report.output).ranges
    assert ranges is not None
    replace_line(table, 9, text="something else")
    again = embed_corpus(config(precision="int8", calibration_size=3))
    assert again.num_new_shards == 1
    np.testing.assert_array_equal(open_embeddings(report.output).ranges, ranges)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration_size is 3 there, 4 here"):
        embed_corpus(config(precision="int8", calibration_size=4))


def test_one_input_has_no_range(config: Any, table: Path) -> None:
    table.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"precision='int8' is scaled by .* 2 inputs or more, and of 1 drawn 1 could"):
        embed_corpus(config(precision="int8"))


def test_a_folder_of_images_and_a_pool(config: Any, table: Path, tmp_path: Path) -> None:
    assert read(embed_corpus(config(data=table.parent)).output)[0] == ["0.png", "1.png", "2.png"]
    root = build_mbeir(tmp_path / "mbeir")
    output = tmp_path / "pool"
    assert read(embed_corpus(config(data=root, output=output)).output)[0] == list(MBEIR(root).global_pool())


def test_weights_of_another_type_are_another_model(config: Any) -> None:
    embed_corpus(config())
    with pytest.raises(
        ValueError, match=r"another model or setting: fingerprint .*weights_dtype is 'float32' there, 'bfloat16'"
    ):
        embed_corpus(config(dtype="bfloat16"))


@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_broken_rows_of_a_table_are_passed_over(
    config: Any, table: Path, sentence_transformer: SentenceTransformer, on_error: Any
) -> None:
    lines = table.read_text().splitlines()
    wanted = np.delete(expected(sentence_transformer, table), [1, 5], axis=0)
    lines[1], lines[5] = '{"text": ', json.dumps({"id": "wrong", "text": 3})
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="2 problems"):
        embed_corpus(config())
    report = embed_corpus(config(on_error=on_error))
    assert (report.num_items, report.num_errors) == (len(lines), 2)
    errors = [json.loads(line) for line in Path(report.output, ERRORS).read_text().splitlines()]
    assert [error["row"] for error in errors] == [1, 5]
    assert "line 2: broken JSON" in json.dumps(errors[0])
    rows = read(report.output)[1]
    if on_error == "zero":
        assert not rows[[1, 5]].any()
        rows = np.delete(rows, [1, 5], axis=0)
    np.testing.assert_allclose(rows, wanted, **TOLERANCE)
    table.write_text(table.read_text().replace('{"text": \n', '{"id": "mended", "text": "on"}\n'))
    report = embed_corpus(config(on_error=on_error))
    assert (report.num_new_shards, report.num_errors) == (1, 1)


# --- going on


def test_only_shards_whose_inputs_changed_are_made_again(
    config: Any, table: Path, sentence_transformer: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    embed_corpus(config())
    replace_line(table, 5, text="another text")
    os.utime(table.parent / "0.png", ns=(0, 0))
    report = embed_corpus(config())
    assert (report.num_new_shards, report.num_new_items) == (2, 8)
    np.testing.assert_allclose(read(report.output)[1], expected(sentence_transformer, table), **TOLERANCE)
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:4]) + "\n")
    with caplog.at_level("INFO"):
        report = embed_corpus(config())
    assert (report.num_new_shards, report.num_shards, report.num_rows) == (0, 1, 4)
    assert "removed 2 files of a longer corpus, from shard-00001.parquet on" in caplog.text
    assert read(report.output)[0] == [json.loads(line)["id"] for line in lines[:4]]


def test_a_full_disk_is_told_and_finished_shards_are_kept(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("shard-00001.parquet"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"could not be written, the disk is full .*Finished shards are kept: make room"):
        embed_corpus(config())
    with pytest.raises(ValueError, match="has not finished"):
        open_embeddings(config().output)
    monkeypatch.undo()
    # The third shard was finished while the second one could not be written.
    assert embed_corpus(config()).num_new_shards == 1


def test_another_run_in_the_directory_is_refused_before_the_corpus_is_read(config: Any, table: Path) -> None:
    settings = config()
    table.unlink()
    with pytest.raises(FileNotFoundError, match=table.name):
        embed_corpus(settings)
    assert not Path(settings.output).exists()
    Path(settings.output).mkdir()
    with FileLock(Path(settings.output, LOCK_FILE)), pytest.raises(DirectoryInUseError, match="is in use"):
        embed_corpus(settings)


# --- broken inputs


def broken_image(table: Path, name: str) -> bytes:
    """Cut an image off; what it was."""
    whole = (table.parent / name).read_bytes()
    (table.parent / name).write_bytes(whole[: len(whole) // 2])
    return whole


def test_a_broken_input_is_raised_by_its_id_and_the_run_goes_on_when_it_is_mended(config: Any, table: Path) -> None:
    whole = broken_image(table, "2.png")
    with pytest.raises(ValueError, match=r"Input 'i2' \(row 4\) cannot be embedded: '.*2\.png'.*\(--on-error skip\)"):
        embed_corpus(config())
    (table.parent / "2.png").write_bytes(whole)
    report = embed_corpus(config())
    assert (report.num_new_shards, report.num_rows) == (2, 10)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_special_tokens_are_read_as_text_when_the_run_goes_on(config: Any, table: Path, on_error: str) -> None:
    replace_line(table, 1, text="a <|im_end|> b")
    if on_error == "raise":
        with pytest.raises(ValueError, match=r"Input '.*' \(row 1\).*'<.im_end.>'.*--special-tokens split"):
            embed_corpus(config())
    else:
        assert embed_corpus(config(on_error=on_error)).num_errors == 1
    report = embed_corpus(config(on_error=on_error, special_tokens="split"))
    assert (report.num_rows, report.num_errors) == (10, 0)
    assert embed_corpus(config(on_error=on_error)).num_new_shards == 0


def test_a_broken_input_costs_nothing_of_its_shard(
    config: Any, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"shard_size": 6, "precision": "int8"}
    replace_line(table, 9, text=None)
    with pytest.raises(ValueError, match=r"Input 't6' .* goes on where this one ended"):
        embed_corpus(config(**options))
    output = Path(config().output)
    assert {".unfinished-00001.safetensors", "shard-00000.parquet"} <= set(os.listdir(output))
    with pytest.raises(ValueError, match="has not finished"):
        open_embeddings(output)
    # Another line is changed, a new one comes before, and the broken one is out: two are new.
    lines = table.read_text().splitlines()
    lines[6:] = ['{"id": "new", "text": "a new line"}', *lines[6:9]]
    table.write_text("\n".join(lines) + "\n")
    replace_line(table, 8, text="another text")
    inputs: list[Any] = []
    iterate = record_embeddings.iterate_embeddings

    def counting(model: Any, given: Any, **options: Any) -> Any:
        inputs.extend(given)
        return iterate(model, given, **options)

    monkeypatch.setattr(record_embeddings, "iterate_embeddings", counting)
    report = embed_corpus(config(**options))
    assert [item["text"] for item in inputs] == ["a new line", "another text"]
    assert (report.num_new_shards, report.num_new_items, report.num_rows) == (1, 2, 10)
    assert not [name for name in os.listdir(output) if name.startswith(".")]
    # As a run that was never interrupted, given the same ranges.
    again = tmp_path / "again"
    again.mkdir()
    for name in ("manifest.json", "ranges.safetensors"):
        (again / name).write_bytes((output / name).read_bytes())
    embed_corpus(config(**options, output=again))
    assert read(again)[0] == read(output)[0]
    assert np.abs(read(again)[1].astype(int) - read(output)[1]).max() <= 1  # a value on the edge of a step


def test_embeddings_that_are_not_finite_make_no_ranges(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = record_embeddings.iterate_embeddings
    monkeypatch.setattr(
        record_embeddings, "iterate_embeddings", lambda *a, **k: ((i, rows * np.nan) for i, rows in iterate(*a, **k))
    )
    with pytest.raises(ValueError, match="of 10 of 10 inputs have NaN or infinity"):
        embed_corpus(config(precision="int8"))
    monkeypatch.undo()
    assert np.isfinite(open_embeddings(embed_corpus(config(precision="int8")).output).ranges).all()


@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_broken_inputs_are_passed_over(
    config: Any, table: Path, sentence_transformer: SentenceTransformer, on_error: str
) -> None:
    wanted = expected(sentence_transformer, table)
    (table.parent / "2.png").unlink()
    replace_line(table, 9, text=None)
    report = embed_corpus(config(on_error=on_error))
    ids, rows = read(report.output)
    errors = [json.loads(line) for line in Path(report.output, "errors.jsonl").read_text().splitlines()]
    assert [(error["row"], error["id"]) for error in errors] == [(4, "i2"), (9, "t6")]
    assert errors[0]["message"].startswith("no image file at")
    assert (report.num_items, report.num_errors) == (10, 2)
    good = [row for row in range(10) if row not in (4, 9)]
    if on_error == "skip":
        assert (len(ids), report.num_rows) == (8, 8)
        assert [row for shard in open_embeddings(report.output).shards() for row in shard.rows] == good
        np.testing.assert_allclose(rows, wanted[good], **TOLERANCE)
    else:
        assert report.num_rows == 10
        assert not rows[[4, 9]].any()
        np.testing.assert_allclose(rows[good], wanted[good], **TOLERANCE)
    assert f"broken   2 inputs, see {Path(report.output, 'errors.jsonl')}" in str(report)
    # Only the shards with broken inputs depend on what was to be done about them.
    again = embed_corpus(config(on_error="zero" if on_error == "skip" else "skip"))
    assert again.num_new_shards == 2


# --- what is refused


def test_wrong_lines_are_found_before_the_model_is_loaded(config: Any, table: Path) -> None:
    replace_line(table, 9, text=3)
    with pytest.raises(ValueError, match=r"line 10: text is 3, must be a text or null"):
        embed_corpus(config(model="no/model"))
    with pytest.raises(FileNotFoundError, match="gone"):
        embed_corpus(config(data=table.parent / "gone", model="no/model"))


def test_an_original_checkpoint_is_no_embedder(config: Any, qwen_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"is no PUMA model\. Make one of an original checkpoint with puma-hf prune"):
        embed_corpus(config(model=str(qwen_dir)))


def test_no_more_dimensions_than_there_are(config: Any) -> None:
    with pytest.raises(ValueError, match=r"truncate_dim=9999, but the embeddings of .* have \d+ dimensions\. Choose"):
        embed_corpus(config(truncate_dim=9999))


def test_a_corpus_that_changes_while_it_is_read(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "gather", lambda value: [value[:1] + value[2:]] if isinstance(value, list) else [value])
    with pytest.raises(ValueError, match=r"table\.jsonl changed while it was read\. Run the same command again"):
        embed_corpus(config())


def test_options_that_are_not_used_are_told(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    embed_corpus(config(calibration_size=9))
    assert "calibration_size=9: not used with precision='float32'." in caplog.messages


def test_the_report() -> None:
    values: dict[str, Any] = {"output": "out", "num_items": 12345, "num_rows": 12344, "num_errors": 1, "num_shards": 2}
    values |= {"num_new_shards": 1, "num_new_items": 10000, "embedding_dim": 8, "precision": "int8", "seconds": 4.0}
    assert str(EmbedReport(**values)) == (
        "embedded 10,000 inputs, 2,500.0 a second; 2,345 already were\n"
        "saved    12,344 embeddings of 8 dimensions as int8 in 2 shards: out\n"
        f"broken   1 input, see {Path('out', 'errors.jsonl')}"
    )
    values |= {"num_new_items": 0, "num_errors": 0, "num_shards": 1}
    assert str(EmbedReport(**values)).splitlines() == [
        "embedded 0 inputs; 12,345 already were",
        "saved    12,344 embeddings of 8 dimensions as int8 in 1 shard: out",
    ]
