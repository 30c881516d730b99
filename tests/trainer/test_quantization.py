from __future__ import annotations

import importlib.machinery
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from puma_hf import PumaModel
from puma_hf.trainer.lora import DECODER_LINEARS
from puma_hf.trainer.quantization import is_quantized, quantization_config


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library and a GPU were there; nothing is quantised in these tests."""
    module = types.ModuleType("bitsandbytes")
    module.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("bitsandbytes")
def test_recipe() -> None:
    config = quantization_config()
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.usefixtures("bitsandbytes")
def test_what_is_quantised_is_what_has_an_adapter(puma_dir: Path) -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    skipped = quantization_config().llm_int8_skip_modules
    for name, module in PumaModel.from_pretrained(puma_dir).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert utils.should_convert_module(name, skipped) is bool(re.fullmatch(DECODER_LINEARS, name)), name


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs bitsandbytes, which is not installed: pip install 'puma-hf\[qlora\]'"
    ):
        quantization_config()


@pytest.mark.usefixtures("bitsandbytes")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"load_in_4bit needs a CUDA GPU, and there is none"):
        quantization_config()


def test_a_model_in_full_is_not_quantised(puma_dir: Path) -> None:
    model = PumaModel.from_pretrained(puma_dir)
    assert not is_quantized(model)
    model.is_quantized = True  # as transformers marks one
    assert is_quantized(model)
