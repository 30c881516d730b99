from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from puma_hf.hub.push_contents import content_problem, holds_secret


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "api_org_" + "aB3" * 12,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1_" * 20,
        "glpat-" + "a-1_" * 5,
        "AKIA" + "A1" * 8,
        "AIza" + "aB-_1" * 7,
        "xoxb-" + "1234-" * 5,
        "sk-proj-" + "aB3_" * 8,
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    ],
)
def test_secrets_are_found_wherever_they_stand(tmp_path: Path, secret: str) -> None:
    path = tmp_path / "notes.txt"
    # The last one lies across two blocks of the reader.
    for text in (secret, f'{{"token": "{secret}"}}', "x" * 40 + f"\n{secret}\n", "." * ((1 << 20) - 9) + secret):
        path.write_text(text)
        assert holds_secret(path), text[-80:]


@pytest.mark.parametrize(
    "text",
    ["HF_TOKEN=...", "hf_hub_download", "shf_" + "a" * 40, "task-" + "a" * 40, "AKIA" + "A" * 30, "PRIVATE KEY", ""],
)
def test_what_is_no_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_text(text)
    assert not holds_secret(tmp_path / "a")


def test_of_weights_the_header_is_searched(tmp_path: Path) -> None:
    path, secret = tmp_path / "model.safetensors", "hf_" + "a" * 34
    numbers = torch.tensor(list(secret.encode()), dtype=torch.uint8)
    save_file({"a": numbers}, path)
    assert not holds_secret(path)
    save_file({"a": numbers}, path, metadata={"note": secret})
    assert holds_secret(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("LICENSE", b"\x80\x04\x95rest", "a pickle or an archive under another name"),
        ("LICENSE", gzip.compress(b"x", mtime=0), "a pickle or an archive under another name"),
        ("LICENSE", b"\xff\xfe\x00", "no text, as its name says; it may be a pickle"),
        ("LICENSE", b"a\0b", "it holds null bytes"),
        ("a.json", b"{", "no JSON, as its name says"),
        ("a.json", b"cposix\nsystem\n(S'id'\ntR.", "no JSON, as its name says"),
        ("a.safetensors", b"PK\x03\x04rest", "a pickle or an archive under another name"),
        ("a.safetensors", b"short", "no whole safetensors file"),
        ("a.safetensors", save({"a": torch.ones(2)})[:-1], "no whole safetensors file"),
        ("a.safetensors", save({"a": torch.ones(2)}) + b"PK\x03\x04", "no whole safetensors file"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    problem = content_problem(tmp_path / name)
    assert problem is not None
    assert words in problem


def test_sound_files_have_no_problem(puma_dir: Path, tmp_path: Path) -> None:
    assert [path.name for path in puma_dir.iterdir() if content_problem(path) or holds_secret(path)] == []
    # The length of this header begins as a pickle does.
    for number in range(480, 640):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"x": "y" * number})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of that length")
    assert content_problem(tmp_path / "a.safetensors") is None


def test_a_large_stray_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puma_hf.hub.push_contents._MAX_BYTES", 1 << 20)
    path = tmp_path / "huge.gguf"
    path.touch()
    os.truncate(path, 4 << 20)  # holes: no room is taken
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(json.dumps("hf_" + "a" * 34).encode())
    assert not holds_secret(path)
    monkeypatch.setattr("puma_hf.hub.push_contents._MAX_BYTES", 3 << 20)
    assert holds_secret(path)
