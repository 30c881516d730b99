"""Scripts take the place of the real one, which takes seconds; tests/hub/test_push.py runs that."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from puma_hf.hub.load_check import check_loads, compare_loaders


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script.py"
    monkeypatch.setattr("puma_hf.hub.load_check._SCRIPT", path)
    return path


def test_the_reason_calls_a_copy_by_the_name_of_what_it_was_made_from(script: Path, tmp_path: Path) -> None:
    found = json.dumps({"error": f"OSError: {tmp_path} has no tokenizer"})
    script.write_text(f"import sys\nopen(sys.argv[2], 'w').write({found!r})")
    with pytest.raises(ValueError, match=r"^'mine' does not load .*not installed \(OSError: mine has no tokenizer\)"):
        check_loads(tmp_path, shown_as="mine")
    script.write_text("import os\nos._exit(9)")  # as when the machine has no memory left
    with pytest.raises(ValueError, match=r"\(the process ended with 9\)"):
        check_loads(tmp_path, shown_as="mine")


@pytest.mark.parametrize(
    ("found", "dtype", "told"),
    [
        ([[1.0, 1e-6]], torch.float32, "2 dimensions in torch.float32, largest difference 1.0e-06"),
        ([[1.0, 2e-4]], torch.float32, None),
        ([[1.0, math.nan]], torch.float32, None),
        # The entries of 3,584 dimensions are 0.017 on average: a difference says little there.
        ([[0.9, 0.02]], torch.bfloat16, "2 dimensions in torch.bfloat16, largest 1 - cosine 2.5e-04"),
        ([[0.9, 0.5]], torch.bfloat16, None),
    ],
)
def test_loaders_that_differ_are_refused(found: list[list[float]], dtype: torch.dtype, told: str | None) -> None:
    expected = torch.tensor([[1.0, 0.0]])
    if told is not None:
        assert compare_loaders(torch.tensor(found), expected, dtype) == told
        return
    with pytest.raises(ValueError, match="read it differently"):
        compare_loaders(torch.tensor(found), expected, dtype)


@pytest.mark.parametrize("offline", [True, False])
def test_the_process_is_fresh(script: Path, tmp_path: Path, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    seen = tmp_path / "seen.json"
    names = "('HF_HUB_OFFLINE', 'HF_MODULES_CACHE', 'HF_TOKEN')"
    script.write_text(f"""import json, os, sys
seen = [*map(os.environ.get, {names}), os.listdir('.'), sys.path]
json.dump(seen, open({str(seen)!r}, 'w'))
open(sys.argv[2], 'w').write('{{"told": "all is well"}}')""")
    assert check_loads(tmp_path, shown_as="x", offline=offline, token="given").endswith(": all is well")
    setting, modules, token, here, paths = json.loads(seen.read_text())
    assert setting == ("1" if offline else "0")
    assert token == (None if offline else "given")  # code that asks nobody needs none
    assert not Path(modules).exists()  # it is gone with the rest
    assert here == []
    assert str(tmp_path) not in paths
