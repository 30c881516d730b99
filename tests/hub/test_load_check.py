"""Scripts take the place of the real one, which takes seconds; tests/hub/test_push.py runs that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puma_hf.hub.load_check import check_loads

FOUND: dict[str, Any] = {"dim": 64, "difference": 1e-6, "dtype": "float32", "unread": [], "1 - cosine": 1e-7}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script.py"
    monkeypatch.setattr("puma_hf.hub.load_check._SCRIPT", path)
    return path


def write(script: Path, **changes: Any) -> None:
    found = repr(json.dumps(FOUND | changes))
    script.write_text(f"import json, sys\nopen(sys.argv[2], 'w').write({found})")


def test_what_was_found(script: Path, tmp_path: Path) -> None:
    write(script)
    assert check_loads(tmp_path, shown_as="x").endswith("64 dimensions in float32, largest difference 1.0e-06")


def test_the_reason_calls_a_copy_by_the_name_of_what_it_was_made_from(script: Path, tmp_path: Path) -> None:
    write(script, error=f"OSError: {tmp_path} has no tokenizer")
    with pytest.raises(ValueError, match=r"^'mine' does not load .*not installed \(OSError: mine has no tokenizer\)"):
        check_loads(tmp_path, shown_as="mine")
    script.write_text("import os\nos._exit(9)")  # as when the machine has no memory left
    with pytest.raises(ValueError, match=r"\(the process ended with 9\)"):
        check_loads(tmp_path, shown_as="x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unread": ["a.weight", "b.weight"]}, r"holds 2 tensors that no loader reads, first a\.weight"),
        ({"difference": 2e-4}, "read it differently"),
        ({"difference": float("nan")}, "read it differently"),
        # The entries of 3,584 dimensions are 0.017 on average: a difference says little there.
        ({"difference": 0.02, "1 - cosine": 0.1, "dtype": "bfloat16"}, "read it differently"),
    ],
)
def test_loaders_that_differ_are_refused(script: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(script, **changes)
    with pytest.raises(ValueError, match=words):
        check_loads(tmp_path, shown_as="x")


@pytest.mark.parametrize("offline", [True, False])
def test_the_process_is_fresh(script: Path, tmp_path: Path, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    seen = tmp_path / "seen.json"
    write(script)
    names = "('HF_HUB_OFFLINE', 'HF_MODULES_CACHE', 'HF_TOKEN')"
    code = f"import os\nseen = [os.environ.get(name) for name in {names}] + [os.listdir('.'), sys.path]\n"
    script.write_text(f"{script.read_text()}\n{code}json.dump(seen, open({str(seen)!r}, 'w'))")
    check_loads(tmp_path, shown_as="x", offline=offline, token="given")
    setting, modules, token, here, paths = json.loads(seen.read_text())
    assert setting == ("1" if offline else "0")
    assert token == (None if offline else "given")  # code that asks nobody needs none
    assert not Path(modules).exists()  # it is gone with the rest
    assert sorted(here) == ["found.json"]
    assert str(tmp_path) not in paths
