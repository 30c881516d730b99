from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from safetensors import SafetensorError

from puma_hf.configs import DistillConfig
from puma_hf.trainer.checkpoints import UNFINISHED
from puma_hf.trainer.lora import BASE_FILE
from puma_hf.trainer.stages import distill

MakeConfig = Callable[..., DistillConfig]


@pytest.fixture
def make_config(puma_dir: Path, qwen_dir: Path, mbeir_root: Path, tmp_path: Path) -> MakeConfig:
    """Builds settings of a few quick steps that save no checkpoint."""

    def make(**changes: Any) -> DistillConfig:
        values: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "lora_r": 2, "save_steps": 0}
        paths = {"model": puma_dir, "output": tmp_path / "out", "data": mbeir_root, "teacher": qwen_dir}
        return DistillConfig(**{**values, **paths, **changes})

    return make


def full(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("save_steps", "kept"), [(0, "There is no whole checkpoint yet"), (2, "checkpoint-2'")])
def test_a_full_disk_at_the_end_leaves_no_half_adapter(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int, kept: str
) -> None:
    config = make_config(save_steps=save_steps)
    write = transformers.modeling_utils.safe_save_file

    def full_at_the_end(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        full() if UNFINISHED in str(path) else write(tensors, path, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_at_the_end)
    with pytest.raises(OSError, match=rf"out' could not be written, as on a full disk .*{kept}") as caught:
        distill(config)
    assert caught.value.errno == errno.ENOSPC
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"distill.yaml", *(["checkpoint-2"] if save_steps else [])}
    monkeypatch.undo()
    saved = distill(make_config(save_steps=save_steps, resume=True))
    assert {"adapter_config.json", "adapter_model.safetensors", "modules.json", BASE_FILE} <= {
        path.name for path in saved.iterdir()
    }
    assert not (saved / UNFINISHED).exists()


def test_a_save_takes_no_row_for_a_usage_example(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    distill(make_config(save_steps=1))
    assert "Could not save predict example" not in caplog.text


def test_weights_that_the_last_step_spoils_are_no_result(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Optimizer step 2 has left .* not finite.* Start again with a lower learn"):
        distill(make_config(learning_rate=1e30))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
