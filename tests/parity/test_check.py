from __future__ import annotations

import json
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

from puma_hf import PumaModel, prune
from puma_hf.export import export
from puma_hf.parity import check as check_module
from puma_hf.parity.check import _base_of, _Forms, check
from puma_hf.parity.inputs import check_inputs
from puma_hf.trainer import merge_adapter
from tests.tiny import build_checkpoint

FORMS = [
    "padded on the right",
    "one input at a time",
    "SentenceTransformer",
    "puma_hf.embed",
    "truncated to 16",
    "fast path off",
    "saved and loaded again",
    "in bfloat16",
    "exported, stock classes",
    "exported, stock inputs too",
    "exported, weights",
]
ADAPTER_FORM = "adapter on its base"
MERGED_WEIGHTS = "merged, weights"


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it was merged into. Read only."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(adapter, folder)
    return folder


@pytest.fixture(scope="module")
def forms(puma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> _Forms:
    """The forms of the pruned model, its reference made. Read only."""
    forms = _Forms(puma_dir, tmp_path_factory.mktemp("scratch"), check_inputs(), "cpu")
    assert all(row.ok for row in forms.by_auto_model())
    return forms


@pytest.mark.parametrize("reading", ["puma", "puma-released"])
def test_other_layers_and_another_reading(qwen_dir: Path, tmp_path: Path, reading: str) -> None:
    prune(qwen_dir, tmp_path / "puma", keep_layers="0,3", reading=reading)
    report = check(tmp_path / "puma")
    assert report.ok, str(report)
    # Stock classes do not have the positions of the second.
    assert [row.form for row in report.rows] == (FORMS if reading == "puma" else FORMS[:8])


def differing(report: Any) -> list[str]:
    return [row.form for row in report.rows if not row.ok]


def spoil(folder: Path, name: str, place: tuple[int, ...] = (3, 3)) -> None:
    """Change one number of one tensor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    full_name = next(key for key in tensors if key.endswith(name))
    tensors[full_name][place] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_model(puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = _count_models(monkeypatch)
    report = check(puma_dir)
    assert at_once == [1] * 6  # a float32 model of 7 billion parameters takes 30 GB
    assert report.ok, str(report)
    assert [row.form for row in report.rows] == FORMS
    assert report.num_inputs == 10
    rows = {row.form: row for row in report.rows}
    assert rows["saved and loaded again"].largest == 0
    assert rows["in bfloat16"].largest > 0


def _count_models(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models had their weights in memory, after each was opened."""
    models: list[weakref.ref[torch.nn.Module]] = []
    at_once = []

    def counting(opened: Callable[..., Any]) -> Callable[..., Any]:
        def open_one(*args: Any) -> Any:
            model = opened(*args)
            models.append(weakref.ref(model))
            alive = [one for one in (ref() for ref in models) if one is not None]
            at_once.append(sum(not next(one.parameters()).is_meta for one in alive))
            return model

        return open_one

    for name in ("open_auto_model", "open_sentence_transformer", "open_stock"):
        monkeypatch.setattr(check_module, name, counting(getattr(check_module, name)))
    return at_once


@pytest.mark.parametrize(
    ("family", "kept", "changes"),
    [
        ("qwen2_vl", 1, {"tie_word_embeddings": False}),
        ("qwen2_5_vl", 1, {}),
        ("qwen3_vl", 3, {"tie_word_embeddings": False}),
    ],
)
def test_other_backbones(family: str, kept: int, changes: dict[str, Any], tmp_path: Path) -> None:
    original = build_checkpoint(tmp_path / "original", family, dtype=torch.bfloat16, seed=kept, **changes)
    prune(original, tmp_path / "puma", num_kept_layers=kept)
    report = check(tmp_path / "puma", seed=kept)
    assert report.ok, str(report)


def test_an_adapter_is_merged_and_compared(adapter: Path) -> None:
    report = check(adapter)
    assert report.ok, str(report)
    assert [row.form for row in report.rows] == [*FORMS, ADAPTER_FORM, MERGED_WEIGHTS]


def test_a_spoiled_merge_is_caught(adapter: Path, merged: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(merged, tmp_path / "spoiled"))
    spoil(spoiled, "layers.1.mlp.up_proj.weight")
    report = check(adapter, merged=spoiled)
    # In itself the spoiled model is sound; it is only not what was trained.
    assert differing(report) == [ADAPTER_FORM, MERGED_WEIGHTS]
    assert report.rows[-1].worst == "language_model.layers.1.mlp.up_proj.weight"
    assert str(report).endswith(f"{ADAPTER_FORM}, {MERGED_WEIGHTS}: not what they should be")


@pytest.mark.parametrize(
    ("name", "place", "is_seen"),
    [
        ("layers.0.self_attn.q_proj.weight", (3, 3), True),
        ("layers.1.input_layernorm.weight", (3,), True),
        ("language_model.norm.weight", (3,), True),
        ("embed_tokens.weight", ("ret", 3), True),
        ("embed_tokens.weight", (-1, 3), False),  # beyond the vocabulary: no input reaches it
        ("visual.merger.mlp.2.bias", (3,), True),
    ],
)
def test_one_wrong_number_anywhere_in_a_merge_is_caught(
    adapter: Path, merged: Path, puma_dir: Path, tmp_path: Path, name: str, place: tuple[Any, ...], is_seen: bool
) -> None:
    spoiled = Path(shutil.copytree(merged, tmp_path / "spoiled"))
    ret = json.loads((puma_dir / "config.json").read_text())["ret_token_id"]
    spoil(spoiled, name, tuple(ret if one == "ret" else one for one in place))
    forms = _Forms(spoiled, tmp_path, check_inputs(), "cpu")
    assert next(forms.by_auto_model()).ok
    by_inputs, by_weights = forms.not_merged(adapter, puma_dir)
    assert (by_inputs.ok, by_weights.ok) == (not is_seen, False)
    assert by_weights.worst.endswith(name)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_that_lost_a_matrix_is_not_what_was_merged(
    forms: _Forms, adapter: Path, merged: Path, puma_dir: Path, tmp_path: Path, part: str
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name and "layers.1.mlp.down_proj" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, copy / "adapter_model.safetensors", {"format": "pt"})
    of_merged = _Forms(merged, tmp_path, check_inputs(), "cpu")
    assert next(of_merged.by_auto_model()).ok
    rows = list(of_merged.not_merged(copy, puma_dir))
    assert [row.ok for row in rows] == [False, False]
    assert rows[1].worst == "language_model.layers.1.mlp.down_proj.weight"


def test_a_base_is_not_the_merged_model(forms: _Forms, adapter: Path, puma_dir: Path) -> None:
    row, _ = forms.not_merged(adapter, puma_dir)
    assert (row.form, row.ok, row.measure) == (ADAPTER_FORM, False, "difference")


def test_what_rounding_hides_is_compared_by_cosine(adapter: Path, puma_dir: Path, merged: Path, tmp_path: Path) -> None:
    model = PumaModel.from_pretrained(merged, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "merged")
    for path in merged.iterdir():
        if not (tmp_path / "merged" / path.name).exists():
            shutil.copyfile(path, tmp_path / "merged" / path.name)
    rounded = _Forms(tmp_path / "merged", tmp_path, check_inputs(), "cpu")
    assert next(rounded.by_auto_model()).ok
    row, weights = rounded.not_merged(adapter, puma_dir)
    assert (row.ok, row.measure) == (True, "1 - cosine")
    assert row.largest > 1e-8
    assert (weights.ok, weights.bound) == (True, 1e-2)


def test_a_spoiled_export_is_caught(forms: _Forms, puma_dir: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    export(puma_dir, stock)
    assert [row.ok for row in forms.exported(stock)] == [True, True, True]
    template = (stock / "chat_template.jinja").read_text()
    (stock / "chat_template.jinja").write_text(template.replace("Summarize", "Describe"))
    assert [row.ok for row in forms.exported(stock)] == [True, False, True]
    (stock / "chat_template.jinja").write_text(template)
    spoil(stock, "layers.0.mlp.up_proj.weight")
    assert [row.ok for row in forms.exported(stock)] == [False, False, False]
    export(puma_dir, stock, overwrite=True)
    spoil(stock, "embed_tokens.weight", (-1, 0))
    assert [row.ok for row in forms.exported(stock)] == [True, True, False]


def test_every_row_can_fail(forms: _Forms, puma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # SentenceTransformer's own vectors are what two others are compared with.
    with monkeypatch.context() as patch:
        patch.setattr(check_module, "encode", _negated(check_module.encode, (0,)))
        wrong = [row.form for row in forms.by_sentence_transformer() if not row.ok]
    assert wrong == ["SentenceTransformer", "puma_hf.embed", "fast path off"]
    # Of AutoModel: padded on the right, the first input alone, in bfloat16. Then: truncated, plain, saved.
    for name, calls in {"embed_features": (1, 2, 12), "encode": (1, 2, 4), "embed_stock": (0, 1)}.items():
        monkeypatch.setattr(check_module, name, _negated(getattr(check_module, name), calls))
    others = ("SentenceTransformer", "puma_hf.embed", "exported, weights")
    assert differing(check(puma_dir)) == [form for form in FORMS if form not in others]


def _negated(function: Callable[..., Tensor], calls: tuple[int, ...]) -> Callable[..., Tensor]:
    """The function, whose result is negated in some of its calls."""
    counter = count()

    def changed(*args: Any, **options: Any) -> Tensor:
        result = function(*args, **options)
        return -result if next(counter) in calls else result

    return changed


# --- arguments


def test_what_cannot_be_checked(puma_dir: Path, qwen_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"directory '.*nowhere' is not there\. Name a PUMA directory"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"directory '.*' holds no PUMA model, by its config\.json\. Name one that"):
        check(qwen_dir)
    with pytest.raises(ValueError, match=r"merged and base given, but '.*' is no adapter \(it has no adapter_config"):
        check(puma_dir, merged=puma_dir, base=puma_dir)
    with pytest.raises(ValueError, match=r"merged '.*' holds no PUMA model"):
        check(adapter, merged=qwen_dir)
    with pytest.raises(ValueError, match=r"exported '.*' is not what puma-hf export wrote"):
        check(puma_dir, exported=qwen_dir)
    export(puma_dir, tmp_path / "stock")
    with pytest.raises(ValueError, match=r"It is an export: name the PUMA directory, and this one as --exported\."):
        check(tmp_path / "stock")


@pytest.mark.parametrize("base", ["/moved/away", "../moved/away", "../away", None])
def test_a_base_that_is_gone(adapter: Path, merged: Path, puma_dir: Path, tmp_path: Path, base: str | None) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    for options in ({}, {"merged": merged}):
        with pytest.raises(FileNotFoundError, match=rf"base '{base or ''}' is not a directory\. .*--base"):
            check(copy, **options)
    assert _base_of(copy, puma_dir) == puma_dir


def test_models_that_do_not_belong_together(forms: _Forms, tmp_path: Path) -> None:
    original = build_checkpoint(tmp_path / "original", "qwen2_vl", seed=1)
    prune(original, tmp_path / "other", num_kept_layers=1)
    export(tmp_path / "other", tmp_path / "stock")
    assert [row.ok for row in forms.exported(tmp_path / "stock")] == [False, False, False]
