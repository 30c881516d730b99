from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from puma_hf import export_onnx, prune
from puma_hf.export import export, is_export
from puma_hf.hub.check import embed_features, features_of, open_auto_model
from tests.tiny import build_checkpoint

ONE = {"text": "a red apple", "instruction": "Find an image that matches the sentence."}
TEXTS = [ONE, "a", "a longer text, of an apple on a table with a red cloth", {"text": "no", "instruction": "Find it."}]

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, export_onnx._NEEDED)), reason="needs puma-hf[onnx], which the extra `test` installs"
)


@needs_onnx
@pytest.mark.slow
def test_the_graph_embeds_texts_of_any_number_and_length(tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    puma, output = tmp_path / "puma", tmp_path / "onnx"
    prune(build_checkpoint(tmp_path / "original", "qwen2_vl"), puma, num_kept_layers=1)
    report = export(puma, output, format="onnx")
    assert f"1 decoder layers as ONNX, {report.num_bytes:,} bytes" in str(report)
    assert is_export(output)
    graph = {"model.onnx", "model.onnx.data"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in output.iterdir()} == {"README.md", "config.json", *tokenizer, *graph}
    assert report.num_bytes == sum((output / name).stat().st_size for name in graph)
    model, session = open_auto_model(puma, torch.float32, "cpu"), InferenceSession(output / "model.onnx")
    for inputs, side in ((TEXTS, "left"), (TEXTS, "right"), (TEXTS[:1], "left")):
        features = features_of(puma, inputs, padding_side=side)
        given = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        (found,) = session.run(["sentence_embedding"], given)
        torch.testing.assert_close(torch.from_numpy(found), embed_features(model, features), rtol=0, atol=1e-5)
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code.replace("path/to/this/directory", str(output)), "card", "exec"), names)
    expected = embed_features(model, features_of(puma, [ONE]))
    torch.testing.assert_close(torch.from_numpy(names["embedding"]), expected, rtol=0, atol=1e-5)


def test_a_missing_package_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx, onnxruntime, onnxscript, .* pip install 'puma-hf\[onnx\]'"):
        export(tmp_path / "nowhere", tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match=r"format='gguf' must be one of 'stock', 'onnx'"):
        export(tmp_path / "nowhere", tmp_path / "out", format="gguf")  # type: ignore[arg-type]
