from __future__ import annotations

import json
import logging
import math
import shutil
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puma_hf import prune
from puma_hf.export import export
from puma_hf.hub import check as module
from puma_hf.hub.check import Forms, ParityReport, check, compare_weights
from puma_hf.hub.load_check import check_inputs, differences
from puma_hf.trainer import merge_adapter
from tests.tiny import build_checkpoint

FORMS = ["padded on the right", "SentenceTransformer", "fast path off", "saved and loaded again", "in bfloat16"]
FORMS += ["exported, stock classes", "exported, stock inputs too", "exported, weights"]
OF_WHOLE = ["whole, opened at this depth", "the same, with encode"]
OF_ADAPTER = ["adapter on its base", "merged, weights"]


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it was merged into. Read only."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(adapter, folder)
    return folder


@pytest.fixture(scope="module")
def forms(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """The forms of the pruned model, its reference made. Read only."""
    forms = Forms(puma_dir, tmp_path_factory.mktemp("scratch"), check_inputs())
    assert next(forms.of_model()).ok
    return forms


def differing(report: ParityReport) -> list[str]:
    return [row.form for row in report.rows if not row.ok]


def spoil(folder: Path, name: str, place: tuple[int, ...] = (3, 3)) -> None:
    """Change one number of one tensor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith(name))][place] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_model(puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    models: list[weakref.ref[torch.nn.Module]] = []

    def counting(*args: Any, **options: Any) -> Any:
        models.append(weakref.ref(found := opened(*args, **options)))
        alive = [one for one in (ref() for ref in models) if one is not None]
        at_once.append(sum(not next(one.parameters()).is_meta for one in alive))
        return found

    opened = module.SentenceTransformer
    monkeypatch.setattr(module, "SentenceTransformer", counting)
    report = check(puma_dir)
    assert at_once == [1] * 3  # a float32 model of 7 billion parameters takes 30 GB
    assert report.ok, str(report)
    assert [row.form for row in report.rows] == FORMS
    rows = {row.form: row.largest for row in report.rows}
    assert rows["saved and loaded again"] == 0
    assert rows["in bfloat16"] > 0


CUTS: list[tuple[str, dict[str, Any]]] = [
    *(("qwen2_vl", {"keep_layers": "0,3", "reading": reading}) for reading in ("puma", "puma-released")),
    *((name, {"num_kept_layers": kept}) for name, kept in (("qwen2_5_vl", 1), ("qwen3_vl", 3), ("qwen3_5", 2))),
]


@pytest.mark.parametrize(("family", "cut"), CUTS)
def test_other_models(family: str, cut: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    untied = {"tie_word_embeddings": False} if family == "qwen3_vl" else {}
    original = build_checkpoint(tmp_path / "original", family, dtype=torch.bfloat16, seed=3, **untied)
    prune(original, tmp_path / "puma", **cut)
    settings = tmp_path / "puma" / "tokenizer_config.json"  # two pictures are longer
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 64}))
    logging.Logger.info_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO):
        report = check(tmp_path / "puma", seed=3)
    assert report.ok, str(report)
    assert ("no fast path is taken" in caplog.text) is (family == "qwen3_5")
    # Stock classes do not have the positions of one.
    assert [row.form for row in report.rows] == (FORMS[:5] if "puma-released" in cut.values() else FORMS)


@pytest.mark.parametrize(("family", "kept"), [("qwen2_vl", 1), ("qwen3_5", 2)])
def test_a_copy_of_the_first_layers(family: str, kept: int, tmp_path: Path) -> None:
    whole = tmp_path / "puma"
    prune(build_checkpoint(tmp_path / "original", family, dtype=torch.bfloat16), whole, num_kept_layers=4)
    report = check(whole, num_kept_layers=kept)
    assert report.ok, str(report)
    assert [row.form for row in report.rows] == [*FORMS, *OF_WHOLE]
    assert str(report).endswith(f"puma, first {kept} layers, 8 inputs: all forms agree")


def test_a_copy_that_is_not_the_first_layers_is_caught(forms: Forms, elastic_dir: Path, puma_dir: Path) -> None:
    assert [row.ok for row in forms.of_whole(elastic_dir, 2)] == [True, True]
    assert [row.ok for row in forms.of_whole(elastic_dir, 4)] == [False, False]


def test_an_adapter_is_merged_and_compared(adapter: Path) -> None:
    report = check(adapter)
    assert report.ok, str(report)
    assert [row.form for row in report.rows] == [*FORMS, *OF_ADAPTER]


def test_a_spoiled_merge_is_caught(adapter: Path, merged: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(merged, tmp_path / "spoiled"))
    spoil(spoiled, "layers.1.mlp.up_proj.weight")
    report = check(adapter, merged=spoiled)
    assert differing(report) == OF_ADAPTER  # in itself the spoiled model is sound; it is only not what was trained
    assert report.rows[-1].worst == "language_model.layers.1.mlp.up_proj.weight"
    assert str(report).endswith(f"{', '.join(OF_ADAPTER)}: not what they should be")


@pytest.mark.parametrize(
    ("name", "place", "is_seen"),
    [
        ("visual.merger.mlp.2.bias", (3,), True),
        ("embed_tokens.weight", ("ret", 3), True),
        ("embed_tokens.weight", (-1, 3), False),  # beyond the vocabulary: no input reaches it
    ],
)
def test_one_wrong_number_anywhere_in_a_merge_is_caught(
    adapter: Path, merged: Path, puma_dir: Path, tmp_path: Path, name: str, place: tuple[Any, ...], is_seen: bool
) -> None:
    spoiled = Path(shutil.copytree(merged, tmp_path / "spoiled"))
    ret = json.loads((puma_dir / "config.json").read_text())["ret_token_id"]
    spoil(spoiled, name, tuple(ret if one == "ret" else one for one in place))
    forms = Forms(spoiled, tmp_path, check_inputs())
    assert next(forms.of_model()).ok
    by_inputs, by_weights = forms.of_adapter(adapter, puma_dir)
    assert (by_inputs.ok, by_weights.ok) == (not is_seen, False)
    assert by_weights.worst.endswith(name)


def test_a_spoiled_export_is_caught(forms: Forms, puma_dir: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    export(puma_dir, stock)
    assert [row.ok for row in forms.of_export(stock)] == [True, True, True]
    template = (stock / "chat_template.jinja").read_text()
    (stock / "chat_template.jinja").write_text(template.replace("Summarize", "Describe"))
    assert [row.ok for row in forms.of_export(stock)] == [True, False, True]
    (stock / "chat_template.jinja").write_text(template)
    spoil(stock, "embed_tokens.weight", (-1, 0))
    assert [row.ok for row in forms.of_export(stock)] == [True, True, False]


def test_every_row_can_fail(puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of AutoModel: padded on the right, in bfloat16. Of SentenceTransformer: by itself and plain, saved again.
    for name, calls in {"embed_features": (1, 2), "encode": (0, 3), "embed_stock": (0, 1)}.items():
        monkeypatch.setattr(module, name, _negated(getattr(module, name), calls))
    assert differing(check(puma_dir)) == [form for form in FORMS if form != "exported, weights"]


def _negated(function: Callable[..., Tensor], calls: tuple[int, ...]) -> Callable[..., Tensor]:
    """The function, whose result is negated in some of its calls."""
    counter = count()

    def changed(*args: Any, **options: Any) -> Tensor:
        result = function(*args, **options)
        return -result if next(counter) in calls else result

    return changed


def test_what_cannot_be_checked(puma_dir: Path, qwen_dir: Path, adapter: Path, tmp_path: Path) -> None:
    for folder in (qwen_dir, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is neither a PUMA directory nor an adapter's"):
            check(folder)
    with pytest.raises(ValueError, match=r"merged or base is given, but '.*' is no adapter"):
        check(puma_dir, base=puma_dir)
    with pytest.raises(ValueError, match=r"merged='.*' holds no PUMA model"):
        check(adapter, merged=qwen_dir)
    with pytest.raises(ValueError, match=r"num_kept_layers=1 is for a whole model, and '.*puma-lora' is an adapter"):
        check(adapter, num_kept_layers=1)
    with pytest.raises(ValueError, match=r"num_kept_layers=3 must be an integer from 1 to 2"):
        check(puma_dir, num_kept_layers=3)


# --- inputs and comparisons


def test_embeddings_are_compared_by_the_worst_number_or_by_cosine() -> None:
    expected = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    found = expected + torch.tensor([[0.0, 0.0], [0.0, 2e-3]])
    assert differences(found, expected).tolist() == pytest.approx([0, 2e-3], rel=1e-3)
    assert differences(3 * expected, expected, "1 - cosine").tolist() == pytest.approx([0, 0], abs=1e-6)
    assert differences(expected * math.nan, expected).isnan().all()
    assert differences(expected[:, :1], expected).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("changes", "largest", "worst"),
    [
        ({}, 0.0, "all tensors"),
        ({"a": torch.tensor([1.02, -4.0])}, 0.005, "a"),  # a share of the largest number
        ({"b": torch.tensor([[2.1]])}, 0.05, "b"),
        ({"b": torch.tensor([2.0])}, math.inf, "b"),
        ({"c": torch.ones(1)}, math.inf, "c"),
        ({"a": torch.tensor([1.0, math.nan])}, math.inf, "a"),
        ({"a": torch.tensor([1.001, -4.0]).bfloat16()}, 0.0, "all tensors"),  # what rounding changed
    ],
)
def test_weights_are_compared_tensor_by_tensor(changes: dict[str, Tensor], largest: float, worst: str) -> None:
    expected = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([[2.0]])}
    row = compare_weights("saved", "model", {**expected, **changes}, expected, bound=1e-2)
    assert row.largest == pytest.approx(largest, rel=1e-3)
    assert (row.worst, row.ok) == (worst, largest <= 1e-2)
