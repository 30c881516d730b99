from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import nn

from puma_hf.embedding import prepare
from puma_hf.embedding.embed import (
    BrokenInputError,
    embed,
    image_settings,
    iterate_embeddings,
    processing_for,
    quantize,
)
from puma_hf.embedding.prepare import BrokenInput
from puma_hf.modeling.processing_puma import DECODE
from puma_hf.settings import Decode

PROMPT = "Find an image that matches."


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "jpeg")
    return stream.getvalue()


@pytest.fixture(scope="module")
def inputs(images: list[Any], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Forty inputs of every kind and many lengths."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    mixed: list[Any] = []
    for number in range(10):
        height, width = generator.integers(16, 120, 2)
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{number}.png")
        mixed += [
            "a red apple " * int(generator.integers(1, 25)),
            str(folder / f"{number}.png") if number % 2 else jpeg(image),
            {"text": "in green", "image": [image, images[0]], "instruction": "Find it." if number % 3 else None},
            [{"role": "user", "content": [{"type": "text", "text": "x" * number + "y"}]}],
        ]
    return mixed


@pytest.fixture(scope="module")
def expected(sentence_transformer: Any, inputs: list[Any]) -> np.ndarray:
    rows: np.ndarray = sentence_transformer.encode(inputs, prompt=PROMPT)
    return rows


# --- the same rows as encode


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 700, "num_workers": 2},
        {"max_batch_tokens": 700, "sort": False},
        {"max_batch_tokens": 100_000},
    ],
    ids=str,
)
def test_rows_are_those_of_encode(
    sentence_transformer: Any, inputs: list[Any], expected: np.ndarray, options: dict[str, Any]
) -> None:
    result = embed(sentence_transformer, inputs, prompt=PROMPT, **options)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-5)
    assert result.embeddings.dtype == np.float32
    assert result.indices.tolist() == list(range(len(inputs)))
    assert result.errors == ()


def test_without_the_fast_path_rows_are_the_same(
    sentence_transformer: Any, inputs: list[Any], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence_transformer[0], "fast_path", None)
    result = embed(sentence_transformer, inputs, prompt=PROMPT, max_batch_tokens=2000, num_workers=1)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("limits", [{"size": {"longest_edge": 1024}}, {"max_pixels": 1024, "decode": "exact"}])
def test_settings_of_the_processor_are_passed_on(sentence_transformer: Any, inputs: list[Any], limits: Any) -> None:
    settings = {"image": limits, "text": {"max_length": 120}}
    size = {"shortest_edge": 256, "longest_edge": 1024}
    expected = sentence_transformer.encode(inputs, processing_kwargs={**settings, "image": {"size": size}})
    result = embed(sentence_transformer, inputs, processing_kwargs=settings)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-5)
    short = embed(sentence_transformer, ["x" * 300], max_length=100).embeddings
    expected = sentence_transformer.encode(["x" * 300], processing_kwargs={"text": {"max_length": 100}})
    np.testing.assert_allclose(short, expected, atol=1e-5)


def test_what_other_models_cannot_do_is_refused(sentence_transformer: Any) -> None:
    """Qwen-VL's processors of images have a limit in pixels, those of other models have none."""
    qwen, other = nn.Linear(1, 1), nn.Linear(1, 1)
    qwen.processor = SimpleNamespace(image_processor=sentence_transformer[0].processor.image_processor)  # type: ignore
    assert (*get_args(Decode), "torchvision") == DECODE  # which is for encode alone
    for one in (nn.Sequential(qwen), nn.Sequential(other)):
        assert processing_for(one, "split", None, "exact") == {"text": {"split_special_tokens": True}}
        with pytest.raises(ValueError, match=r"decode='fast' is for PUMA models alone: .*Leave it out \(--decode\)"):
            processing_for(one, "raise", None, "fast")
    limit = processing_for(nn.Sequential(qwen), "raise", 1024, "exact")
    assert limit == {"image": {"max_pixels": 1024}}
    assert image_settings(nn.Sequential(qwen), limit) == {"max_pixels": 1024, "decode": "exact"}
    with pytest.raises(ValueError, match=r"max_pixels=1024 cannot be passed on .*Leave it out \(--max-pixels\)"):
        processing_for(nn.Sequential(other), "raise", 1024, None)


def test_the_models_default_prompt_holds(sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_transformer, "prompts", {"query": PROMPT})
    monkeypatch.setattr(sentence_transformer, "default_prompt_name", "query")
    rows = embed(sentence_transformer, ["a"]).embeddings
    np.testing.assert_allclose(rows, sentence_transformer.encode(["a"]), atol=1e-5)
    assert np.abs(rows - embed(sentence_transformer, ["a"], prompt="").embeddings).max() > 1e-3


@pytest.mark.parametrize(("own", "given", "dim"), [(None, 8, 8), (8, None, 8), (8, 16, 16), (None, 32, 32)])
def test_truncated_rows(
    sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch, own: int | None, given: int | None, dim: int
) -> None:
    monkeypatch.setattr(sentence_transformer, "truncate_dim", own)
    result = embed(sentence_transformer, ["a", "b"], truncate_dim=given)
    expected = sentence_transformer.encode(["a", "b"], truncate_dim=given, normalize_embeddings=True)
    assert result.embeddings.shape == (2, dim)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-5)


def test_zeros_of_broken_inputs_do_not_widen_the_ranges(sentence_transformer: Any) -> None:
    rows = embed(sentence_transformer, ["a", "", "b", "c"], precision="uint8", on_error="zero").embeddings
    expected = embed(sentence_transformer, ["a", "b", "c"], precision="uint8").embeddings
    np.testing.assert_array_equal(rows[[0, 2, 3]], expected)
    with pytest.raises(ValueError, match=r"precision='int8' is scaled by .* there are 1 here"):
        embed(sentence_transformer, ["a"], precision="int8")


def test_ranges_make_calls_comparable(sentence_transformer: Any) -> None:
    ranges = np.stack([np.full(32, -0.5), np.full(32, 0.5)])
    both = embed(sentence_transformer, ["a", "bb"], precision="int8", ranges=ranges).embeddings
    one = embed(sentence_transformer, ["bb"], precision="int8", ranges=ranges).embeddings
    assert np.abs(both[1].astype(int) - one[0].astype(int)).max() <= 1  # a value on the edge of a step


@pytest.mark.parametrize("precision", ["int8", "ubinary"])
def test_integers_do_not_hide_what_is_not_a_number(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"NaN or infinity, which {precision} cannot hold. Load the weights as"):
        quantize(np.array([[0.5, np.nan]], np.float32), precision, [[0, 0], [1, 1]])


def test_any_sequence_will_do(sentence_transformer: Any) -> None:
    from datasets import Dataset

    assert embed(sentence_transformer, [], truncate_dim=8, precision="int8").embeddings.shape == (0, 8)
    rows = [{"text": "a", "image": None}, {"text": "bb", "image": None}]
    expected = sentence_transformer.encode(["a", "bb"])
    for sequence in (("a", "bb"), np.array(["a", "bb"]), Dataset.from_list(rows), Dataset.from_list(rows)["text"]):
        np.testing.assert_allclose(embed(sentence_transformer, sequence).embeddings, expected, atol=1e-5)


def test_the_model_is_switched_to_evaluation(puma_dir: Path) -> None:
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu").train()
    rows = embed(model, ["a red apple"]).embeddings
    assert not model.training
    assert not torch.is_inference_mode_enabled()
    np.testing.assert_allclose(rows, model.encode(["a red apple"]), atol=1e-5)


# --- broken inputs


BROKEN = {3: b"no image", 11: "", 38: {"image": "missing.png"}}
# What must not stop the plan, either.
ODD = [
    "half a character \ud800",
    {"image": np.zeros((0, 5, 3), np.uint8)},
    Image.new("RGB", (1000, 2)),
    {"image": "\0"},
]


@pytest.fixture
def with_broken(inputs: list[Any]) -> list[Any]:
    return [BROKEN.get(index, item) for index, item in enumerate(inputs)]


@pytest.mark.parametrize(("on_error", "num_workers"), [("skip", 0), ("skip", 2), ("zero", 0)])
def test_broken_inputs_are_left_out_or_become_zeros(
    sentence_transformer: Any,
    with_broken: list[Any],
    expected: np.ndarray,
    on_error: Any,
    num_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_batch_tokens": 1500, "num_workers": num_workers}
    result = embed(sentence_transformer, with_broken, on_error=on_error, **options)
    kept = [index for index in range(len(with_broken)) if index not in BROKEN or on_error == "zero"]
    expected = expected.copy()
    expected[list(BROKEN)] = 0
    assert result.indices.tolist() == kept
    np.testing.assert_allclose(result.embeddings, expected[kept], atol=1e-5)
    assert [error.index for error in result.errors] == list(BROKEN)
    assert result.errors[2].message == "inputs[38]: no image file at 'missing.png'. Check the path."
    assert "3 of 40 inputs are broken: " in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_input_stops_the_others(sentence_transformer: Any, num_workers: int) -> None:
    result = embed(sentence_transformer, ["a", *ODD, "b"], on_error="skip", num_workers=num_workers)
    np.testing.assert_allclose(result.embeddings, sentence_transformer.encode(["a", "b"]), atol=1e-5)
    assert [error.index for error in result.errors] == [1, 2, 3, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_done_before_a_broken_input_is_not_lost(
    sentence_transformer: Any, with_broken: list[Any], expected: np.ndarray, num_workers: int
) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_batch_tokens": 1500, "num_workers": num_workers}
    with pytest.raises(BrokenInputError, match=r"inputs\[(3|11|38)\].*pass on_error='skip'") as error:
        embed(sentence_transformer, with_broken, **options)
    assert error.value.index in BROKEN
    done = error.value.done
    assert done is not None
    assert not multiprocessing.active_children()
    # All of the batches before, and the good ones of its own batch.
    seen: list[int] = []
    batches = iterate_embeddings(sentence_transformer, with_broken, **options)
    with pytest.raises(BrokenInputError) as other:
        seen.extend(index for indices, _ in batches for index in indices.tolist())
    assert other.value.index == error.value.index
    assert other.value.done is None
    assert len(seen) > 2
    assert done.indices.tolist() == sorted(seen)
    np.testing.assert_allclose(done.embeddings, expected[done.indices], atol=1e-5)


def test_the_users_loader(sentence_transformer: Any, images: list[Any]) -> None:
    store = {f"s3://{number}": jpeg(image) for number, image in enumerate(images)}
    for num_workers in (0, 2):
        options: Any = {"load": store.__getitem__, "num_workers": num_workers, "on_error": "skip"}
        result = embed(sentence_transformer, [*store, "s3://gone"], **options)
        np.testing.assert_allclose(result.embeddings, sentence_transformer.encode([*store.values()]), atol=1e-5)
        assert result.errors == (BrokenInput(3, "inputs[3]: load failed with KeyError: 's3://gone'"),)


# --- streams


def test_a_stream_is_not_read_to_its_end(sentence_transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WINDOW", 8)
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "a" * (read % 5 + 1)

    batches = iterate_embeddings(sentence_transformer, stream(), max_batch_tokens=200)
    assert read == 0
    seen: list[int] = []
    for indices, rows in batches:
        assert indices.dtype == torch.int64
        assert rows.shape == (len(indices), 32)
        assert not rows.is_inference()
        seen += indices.tolist()
        assert read - len(seen) <= 8
        if len(seen) == 40:
            break
    assert sorted(seen) == list(range(40))


def test_without_sorting_a_stream_comes_in_order(sentence_transformer: Any, inputs: list[Any]) -> None:
    broken: list[BrokenInput] = []
    stream = iter([*inputs[:5], "", *inputs[5:9]])
    options: Any = {"sort": False, "max_batch_tokens": 60, "on_error": "zero", "report": broken.append}
    batches = iterate_embeddings(sentence_transformer, stream, **options)
    parts = [(indices.tolist(), rows) for indices, rows in batches]
    assert [index for indices, _ in parts for index in indices if index != 5] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert len(parts) > 3
    assert [error.index for error in broken] == [5]
    (zeros,) = [rows for indices, rows in parts if indices == [5]]
    assert (zeros == 0).all()


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "model is a Linear, must be a SentenceTransformer"),
        ({"inputs": "a red apple"}, r"inputs must be a list of inputs, got str. Wrap a single input in \[ \]"),
        ({"inputs": pd.DataFrame({"text": ["a"]})}, "inputs must be a list of inputs, got DataFrame"),
        ({"inputs": [{"role": "user", "content": "a"}]}, r"inputs is one chat.*Wrap it in \[ \]"),
        ({"on_error": "ignore"}, "on_error is 'ignore', must be one of 'raise', 'skip', 'zero'"),
        ({"truncate_dim": 33}, "truncate_dim is 33, must be 1 to 32"),
        ({"truncate_dim": 0}, "truncate_dim is 0, must be 1 to 32"),
        ({"precision": "int8", "ranges": np.zeros((2, 3))}, r"ranges is of shape \(2, 3\), must be \(2, 32\)"),
        ({"precision": "uint8", "ranges": np.zeros((5, 32)), "inputs": []}, r"shape \(5, 32\), must be \(2, 32\)"),
        ({"max_length": 8}, r"inputs\[\d\].*max_length=8"),
        ({"prompt": "<|image_pad|>"}, r"inputs\[\d\].*special token"),
    ],
)
def test_errors(sentence_transformer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(**{"model": sentence_transformer, "inputs": ["a", "b"], **options})


@pytest.mark.parametrize("truncate_dim", [None, 8])
def test_a_model_without_our_packer_embeds_by_its_own_encode(
    puma_dir: Path, inputs: list[Any], truncate_dim: int | None
) -> None:
    model: Any = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
    expected = model.encode(
        inputs, prompt=PROMPT, truncate_dim=truncate_dim, normalize_embeddings=truncate_dim is not None
    )
    own = model[0].packer

    def packer(*args: Any, **kwargs: Any) -> Any:  # as earlier versions had it, whose code lies in their directories
        made = own(*args, **kwargs)
        return type("Packer", (), {"process": made.process, "pack": made.pack})()

    model[0].packer = packer
    broken = [*inputs, b"no image"]
    result = embed(model, broken, prompt=PROMPT, truncate_dim=truncate_dim, on_error="skip", num_workers=2)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-5)
    assert [error.index for error in result.errors] == [len(inputs)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_on_a_gpu(puma_dir: Path, inputs: list[Any], expected: np.ndarray, num_workers: int) -> None:
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cuda")
    result = embed(model, inputs, prompt=PROMPT, max_batch_tokens=700, num_workers=num_workers)
    np.testing.assert_allclose(result.embeddings, expected, atol=1e-3)
