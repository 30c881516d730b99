from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.sharding import whole_weights
from tests.trainer.conftest import MakeStudent


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_is_saved_whole(make_student: MakeStudent, mesh: DeviceMesh, tmp_path: Path) -> None:
    model = make_student(disturbed=True)
    model.save_pretrained(str(tmp_path / "before"))
    backbone: Any = puma_model(model)
    for layer in backbone.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in backbone.parameters())
    with pytest.raises(RuntimeError, match="invalid python storage"):
        model.save_pretrained(str(tmp_path / "parts"))
    with whole_weights(model):
        model.save_pretrained(str(tmp_path / "after"))
    assert "state_dict" not in vars(backbone)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_whole_model_is_left_alone(make_student: MakeStudent) -> None:
    model = make_student()
    with whole_weights(model):
        assert "state_dict" not in vars(puma_model(model))
