"""A corpus to disk from a configuration, with a real model; killed runs are in test_embed_kill_and_two_processes.py."""

from __future__ import annotations

import errno
import json
import os
from array import array
from dataclasses import replace
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
from puma_hf.data.items import Corpus
from puma_hf.data.mbeir import MBEIR
from puma_hf.embedding import run
from puma_hf.embedding.embed import EmbedResult
from puma_hf.embedding.run import ERRORS, embed_corpus
from puma_hf.embedding.store import MANIFEST, EmbeddingStore, open_embeddings
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
    assert (report.num_items, report.num_rows, report.num_errors) == (10, 10, 0)
    assert [len(ids) for ids, _ in open_embeddings(report.output)] == [4, 4, 2]
    assert report.num_new_items == 10
    manifest = open_embeddings(report.output).manifest
    assert (manifest["model"], manifest["data"], manifest["num_rows"]) == ("tiny-puma", "table.jsonl", 10)
    assert manifest["settings"]["prompt"] == "Match the sentence."
    assert len(manifest["settings"]["fingerprint"]) == 64


def test_a_second_run_embeds_nothing_whatever_the_batches_and_shards(config: Any) -> None:
    first = embed_corpus(config())
    before = {path: path.stat().st_mtime_ns for path in Path(first.output).iterdir()}
    others: list[dict[str, Any]] = [{"fast": False}, {"max_batch_tokens": 64}, {"num_workers": 1}, {"shard_size": 3}]
    for values in ({}, *others, {"on_error": "skip"}):
        again = embed_corpus(config(**values))
        assert (again.num_new_items, again.num_rows) == (0, 10)
    assert {path: path.stat().st_mtime_ns for path in Path(first.output).iterdir()} == before


def test_the_first_layers(
    config: Any, table: Path, elastic_dir: Path, sentence_transformer: SentenceTransformer
) -> None:
    first = {"model": str(elastic_dir), "num_kept_layers": 2}  # which are those of the pruned model
    report = embed_corpus(config(**first))
    np.testing.assert_allclose(read(report.output)[1], expected(sentence_transformer, table), **TOLERANCE)
    told = r"num_kept_layers is 2 there and 4 here\. Go on with --num-kept-layers 2, as they were made\. Choose another"
    with pytest.raises(ValueError, match=told):
        embed_corpus(config(model=str(elastic_dir)))
    manifest = Path(report.output, MANIFEST)
    values = json.loads(manifest.read_text())
    assert values["settings"].pop("num_kept_layers") == 2
    manifest.write_text(json.dumps(values))  # as an older version has it: the fingerprint tells the depths apart
    with pytest.raises(ValueError, match="fingerprint is"):
        embed_corpus(config(model=str(elastic_dir)))
    with pytest.raises(ValueError, match="num_kept_layers=5 must be an integer from 1 to 4"):
        embed_corpus(config(model=str(elastic_dir), num_kept_layers=5))


def test_only_the_first_dimensions(config: Any, table: Path, sentence_transformer: SentenceTransformer) -> None:
    report = embed_corpus(config(truncate_dim=8))
    _, rows = read(report.output)
    assert open_embeddings(report.output).embedding_dim == 8
    wanted = expected(sentence_transformer, table, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(rows, wanted, **TOLERANCE)


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_precisions(config: Any, table: Path, sentence_transformer: SentenceTransformer, precision: Any) -> None:
    report = embed_corpus(config(precision=precision))
    ranges = open_embeddings(report.output).settings.get("ranges")
    _, rows = read(report.output)
    floats = expected(sentence_transformer, table)
    if precision == "float16":
        np.testing.assert_allclose(rows.astype(np.float32), floats, rtol=0, atol=1e-3)
        return
    if precision.endswith("int8"):
        # All ten inputs were drawn, so the ranges are those of all, and the same in every shard.
        np.testing.assert_allclose(ranges, np.stack([floats.min(axis=0), floats.max(axis=0)]), **TOLERANCE)
        ranges = np.asarray(ranges, np.float32)
    wanted: Any = quantize_embeddings(floats, precision, ranges=ranges)
    assert rows.dtype == wanted.dtype
    if precision.endswith("int8"):  # a value on the edge of a step may fall on the other side
        assert np.abs(rows.astype(np.int16) - wanted.astype(np.int16)).max() <= 1
    else:  # a sign may be lost in rounding
        assert np.unpackbits((rows ^ wanted).view(np.uint8)).sum() <= (np.abs(floats) < 1e-6).sum()


def test_ranges_outlive_a_changed_corpus_and_come_from_a_sample(config: Any, table: Path) -> None:
    report = embed_corpus(config(precision="int8", calibration_size=3))
    ranges = open_embeddings(report.output).settings["ranges"]
    replace_line(table, 9, text="something else")
    again = embed_corpus(config(precision="int8", calibration_size=3))
    assert again.num_new_items == 1
    assert open_embeddings(report.output).settings["ranges"] == ranges
    with pytest.raises(ValueError, match="calibration_size is 3 there and 4 here"):
        embed_corpus(config(precision="int8", calibration_size=4))


def test_a_folder_of_images_and_a_pool(config: Any, table: Path, tmp_path: Path) -> None:
    assert read(embed_corpus(config(data=table.parent)).output)[0] == ["0.png", "1.png", "2.png"]
    root = build_mbeir(tmp_path / "mbeir")
    output = tmp_path / "pool"
    assert read(embed_corpus(config(data=root, output=output)).output)[0] == list(MBEIR(root).global_pool())


def test_weights_of_another_type_are_another_model(config: Any) -> None:
    embed_corpus(config())
    with pytest.raises(ValueError, match=r"other settings: .*weights_dtype is 'float32' there and 'bfloat16'"):
        embed_corpus(config(dtype="bfloat16"))


def test_broken_rows_of_a_table_are_passed_over(config: Any, table: Path) -> None:
    lines = table.read_text().splitlines()
    lines[1], lines[5] = '{"text": " "}', json.dumps({"id": "wrong", "text": 3})
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="2 problems"):
        embed_corpus(config())
    report = embed_corpus(config(on_error="skip"))
    assert (report.num_items, report.num_rows, report.num_errors) == (10, 8, 2)
    errors = [json.loads(line) for line in Path(report.output, ERRORS).read_text().splitlines()]
    assert [error["row"] for error in errors] == [1, 5]
    assert "line 2: text and image are both empty" in errors[0]["message"]
    table.write_text(table.read_text().replace('{"text": " "}', '{"id": "mended", "text": "on"}'))
    report = embed_corpus(config(on_error="skip"))
    assert (report.num_new_items, report.num_errors) == (1, 1)


# --- going on


def test_only_what_changed_is_embedded_again(
    config: Any, table: Path, sentence_transformer: SentenceTransformer
) -> None:
    embed_corpus(config())
    replace_line(table, 5, text="another text")
    os.utime(table.parent / "0.png", ns=(0, 0))
    report = embed_corpus(config())
    assert (report.num_new_items, report.num_rows) == (2, 10)
    lines = table.read_text().splitlines()
    found = dict(zip(*read(report.output), strict=True))
    rows = np.stack([found[json.loads(line)["id"]] for line in lines])
    np.testing.assert_allclose(rows, expected(sentence_transformer, table), **TOLERANCE)
    table.write_text("\n".join(lines[:4]) + "\n")
    report = embed_corpus(config())
    assert (report.num_new_items, report.num_rows) == (0, 4)
    assert sorted(read(report.output)[0]) == sorted(json.loads(line)["id"] for line in lines[:4])


def test_a_damaged_shard_is_made_anew(config: Any) -> None:
    report = embed_corpus(config())
    before = read(report.output)
    shard = sorted(Path(report.output).glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert embed_corpus(config()).num_new_items == 4
    assert read(report.output)[0] == before[0]
    np.testing.assert_allclose(read(report.output)[1], before[1], **TOLERANCE)


def test_what_waits_for_a_minute_is_written(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_SECONDS", 0.0)
    report = embed_corpus(config(max_batch_tokens=1, shard_size=100))
    assert [len(ids) for ids, _ in open_embeddings(report.output)] == [1] * 10


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


def test_a_broken_input_is_raised_by_its_id_and_the_run_goes_on_when_it_is_mended(config: Any, table: Path) -> None:
    image = table.parent / "2.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Input 'i2' \(row 4\) cannot be embedded: '.*2\.png'.*\(--on-error skip\)"):
        embed_corpus(config())
    done = len(EmbeddingStore(config().output, None))
    assert done > 0
    image.write_bytes(whole)
    report = embed_corpus(config())
    assert (report.num_new_items, report.num_rows) == (10 - done, 10)


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
    assert embed_corpus(config(on_error=on_error)).num_new_items == 0


def test_embeddings_of_another_limit_or_decoding_are_refused(
    config: Any, table: Path, sentence_transformer: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.effect_noise((900, 700), 90).save(table.parent / "0.png")
    own = sentence_transformer[0].processor.image_processor.size["longest_edge"]
    embed_corpus(config(max_pixels=1024, decode="exact"))
    options = {"image": {"size": {"longest_edge": 1024}, "decode": "exact"}}
    wanted = expected(sentence_transformer, table, processing_kwargs=options)
    np.testing.assert_allclose(read(config().output)[1], wanted, **TOLERANCE)
    assert np.abs(wanted - expected(sentence_transformer, table))[0].max() > 1e-3
    remedy = r"Go on with --decode exact and with --max-pixels 1024, as they were made\. Choose another directory"
    with pytest.raises(ValueError, match=rf"max_pixels is 1024 there and None here\. {remedy}"):
        embed_corpus(config())
    # A version without the choice decoded every pixel, and said nothing of it.
    with monkeypatch.context() as patch:
        patch.setattr(run, "image_settings", lambda *_: {})
        embed_corpus(config(output=table.parent / "older", decode="exact"))
    with pytest.raises(
        ValueError, match=r"settings: decode is 'exact' there and 'fast' here\. Go on with --decode exact,"
    ):
        embed_corpus(config(output=table.parent / "older", max_pixels=own))  # which is the model's own
    with pytest.raises(ValueError, match=r"max_pixels is None there and 1024 here\. Go on without --max-pixels,"):
        embed_corpus(config(output=table.parent / "older", decode="exact", max_pixels=1024))
    assert embed_corpus(config(output=table.parent / "older", decode="exact")).num_new_items == 0


def test_embeddings_that_are_not_finite_are_an_error(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, name in (("int8", "embed"), ("float32", "iterate_embeddings")):
        plain = getattr(run, name)

        def broken(*args: Any, plain: Any = plain, **options: Any) -> Any:
            found = plain(*args, **options)
            if isinstance(found, EmbedResult):
                return replace(found, embeddings=found.embeddings * np.nan)
            return ((numbers, rows * np.nan) for numbers, rows in found)

        monkeypatch.setattr(run, name, broken)
        with pytest.raises(ValueError, match=r"of 10 of 10 inputs have NaN or infinity, first \['"):
            embed_corpus(config(precision=precision, max_batch_tokens=100_000))
    monkeypatch.undo()
    assert embed_corpus(config()).num_new_items == 10


@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_broken_inputs_are_passed_over(
    config: Any, table: Path, sentence_transformer: SentenceTransformer, on_error: str
) -> None:
    wanted = expected(sentence_transformer, table)
    (table.parent / "2.png").unlink()
    replace_line(table, 9, text=None)
    for _ in range(2):  # the second run tries the broken ones again, and changes nothing
        report = embed_corpus(config(on_error=on_error))
        ids, rows = read(report.output)
        errors = [json.loads(line) for line in Path(report.output, "errors.jsonl").read_text().splitlines()]
        assert [(error["row"], error["id"]) for error in errors] == [(4, "i2"), (9, "t6")]
        assert errors[0]["message"].startswith("no image file at")
        assert (report.num_items, report.num_errors, report.num_rows) == (10, 2, 8 if on_error == "skip" else 10)
        if on_error == "zero":
            assert not rows[[4, 9]].any()
            rows = np.delete(rows, [4, 9], axis=0)
        np.testing.assert_allclose(rows, np.delete(wanted, [4, 9], axis=0), **TOLERANCE)
        assert len(ids) == report.num_rows
    again = embed_corpus(config(on_error="zero" if on_error == "skip" else "skip"))
    assert (again.num_new_items, again.num_rows) == (0, 10 if on_error == "skip" else 8)


# --- what is refused


@pytest.mark.parametrize("model", ["qwen_dir", "adapter"])
def test_an_original_checkpoint_is_no_embedder(config: Any, model: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=r"is no PUMA model\. Make one of an original checkpoint with puma-hf prune"):
        embed_corpus(config(model=str(request.getfixturevalue(model))))


def test_a_corpus_that_changes_while_it_is_read(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = Corpus.survey
    monkeypatch.setattr(Corpus, "survey", lambda *values: survey(*values)._replace(num_items=11))
    with pytest.raises(ValueError, match=r"inputs changed while they were read\. Run the same command again"):
        embed_corpus(config())


def test_what_was_written_before_the_disk_was_full_is_kept(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = EmbeddingStore.add, 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "add", failing)
        with pytest.raises(OSError, match="the disk is full"):
            embed_corpus(config())
    assert embed_corpus(config()).num_new_items == 6


def test_a_process_without_a_row_of_its_own_takes_part(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "gather", lambda value: [value, array("q")] if isinstance(value, array) else [value])
    assert embed_corpus(config()).num_rows == len(read(config().output)[0]) == 10
