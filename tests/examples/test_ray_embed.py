from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import embed
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
PROMPT = "Represent the given input."
BROKEN = b"no image"
SCHEMA = pa.schema([("id", "string"), ("text", "string"), ("image", "binary"), ("instruction", "string")])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def rows(images: list[Image.Image]) -> list[dict[str, Any]]:
    """Every kind of row, and one that is broken."""
    return [
        {"id": "text", "text": "a red apple on a table"},
        {"id": "bytes", "image": png(images[0])},
        {"id": "broken", "image": BROKEN},
        {"id": "instruction", "text": "a table", "instruction": "Find an apple."},
        {"id": "both", "image": png(images[2]), "text": "a red apple"},
        {"id": "longer", "text": "a red apple on a table on a red table"},
    ]


@pytest.fixture
def ray_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Nothing outside temporary folders; Ray's own is one with a short name, for it names sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        names = {"HOME": str(tmp_path), "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        yield {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ray's sockets")
def test_two_workers_of_a_local_ray_write_what_embed_returns(
    rows: list[dict[str, Any]],
    puma_dir: Path,
    sentence_transformer: SentenceTransformer,
    tmp_path: Path,
    ray_environment: dict[str, str],
) -> None:
    pytest.importorskip("ray")
    corpus, output, done = (tmp_path / name for name in ("corpus", "embeddings", "done"))
    for folder in (corpus, done):
        folder.mkdir()
    table = pa.Table.from_pylist(rows, SCHEMA)
    for number in range(2):  # a file for each worker
        pq.write_table(table.slice(3 * number, 3), corpus / f"{number}.parquet")
    # An earlier run, ended when it had embedded one row.
    pq.write_table(pa.table({"id": ["longer"]}), done / "earlier.parquet")
    command = [sys.executable, ROOT / "examples" / "ray_embed.py", corpus, "--model", puma_dir, "--output", output]
    command += ["--num-workers", "2", "--prompt", PROMPT, "--on-error", "skip", "--checkpoint", done.name]
    ended = subprocess.run(
        list(map(str, command)), env=ray_environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 0, ended.stderr
    found = pq.read_table(output)
    vectors = found["embedding"].combine_chunks().flatten().to_numpy().reshape(len(found), -1)
    written = dict(zip(found["id"].to_pylist(), vectors, strict=True))
    new = [row for row in rows if row["id"] not in ("broken", "longer")]
    assert sorted(written) == sorted(row["id"] for row in new)
    inputs = [{name: value for name, value in row.items() if name != "id"} for row in new]
    expected = embed(sentence_transformer, inputs, prompt=PROMPT, num_workers=0).embeddings
    np.testing.assert_allclose(np.stack([written[row["id"]] for row in new]), expected, atol=1e-5)
    # Ray notes what is done as this test has noted it; what was skipped is tried again the next time.
    noted = [pq.read_table(path) for path in done.glob("*.parquet")]
    assert {part.schema.names[0] for part in noted} == {"id"}
    assert sorted(key for part in noted for key in part["id"].to_pylist()) == sorted([*written, "longer"])
