"""Draw one query of each task with its first five answers; right answers have a green frame."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from puma_hf.data.mbeir import MBEIR, Candidate, Query

CELL = 188
DRAWING = 96
QUERY_WIDTH = 330
HEADER = 34
MARGIN = 10
RIGHT, WRONG, LINE, INK, MUTED = "#1a8f3c", "#c9ccd1", "#e5e7eb", "#111827", "#6b7280"


def draw_answers(results: Path, data_dir: Path, split: str, output: Path, pool: str = "local") -> Path:
    """Write the picture.

    Args:
        results: Directory that `puma-hf evaluate --output` wrote.
        data_dir: Dataset in M-BEIR's layout.
        split: Split that was evaluated.
        output: PNG file.
        pool: "local" or "global".

    Returns:
        `output`. The query of each task is the first one of its file: nothing was picked.
    """
    runs = {path.stem: _answers(path) for path in (results / "runs" / pool).glob("*.trec")}
    data = MBEIR(data_dir)
    tasks = [task for task in data.tasks(split) if task.name in runs]
    canvas = Image.new("RGB", (QUERY_WIDTH + 5 * CELL + 2 * MARGIN, HEADER + len(tasks) * CELL + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 8), "the first query of each task", INK, _font(16))
    draw.text((QUERY_WIDTH + MARGIN, 8), f"its first five answers in the {pool} pool", INK, _font(16))
    draw.text((QUERY_WIDTH + MARGIN + 330, 8), "green frame: right", RIGHT, _font(16))
    for row, task in enumerate(tasks):
        top = HEADER + row * CELL
        query = data.queries(task, split)[0]
        candidates = data.local_pool(task, split) if pool == "local" else data.global_pool(split)
        draw.line((0, top, canvas.width, top), LINE)
        _draw_query(canvas, query, f"{task.arrow}", data.instruction(query, task.candidate_modality), top)
        for column, did in enumerate(runs[task.name][query.id][:5]):
            left = QUERY_WIDTH + MARGIN + column * CELL
            _draw_candidate(canvas, candidates[did], did in query.positives, left, top)
    canvas.save(output)
    return output


def _answers(run: Path) -> dict[str, list[str]]:
    """The dids of each qid, best first, as the lines of a run file are."""
    found: dict[str, list[str]] = {}
    for line in run.read_text(encoding="utf-8").splitlines():
        qid, _, did, *_ = line.split()
        found.setdefault(qid, []).append(did)
    return found


def _draw_query(canvas: Image.Image, query: Query, arrow: str, instruction: str, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, top + 8), arrow, INK, _font(15))
    left = MARGIN
    if query.image is not None:
        _paste(canvas, query.image, MARGIN, top + 34)
        left += DRAWING + 12
    width = (QUERY_WIDTH - left) // 8
    draw.multiline_text((left, top + 34), textwrap.fill(query.text or "", width), INK, _font(15))
    draw.multiline_text((MARGIN, top + 136), textwrap.fill(instruction, 52), MUTED, _font(12))


def _draw_candidate(canvas: Image.Image, candidate: Candidate, right: bool, left: int, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    box = (left + 4, top + 6, left + CELL - 6, top + CELL - 6)
    draw.rectangle(box, outline=RIGHT if right else WRONG, width=4 if right else 1)
    if candidate.image is not None:
        _paste(canvas, candidate.image, left + (CELL - DRAWING) // 2, top + 14)
    if candidate.text is not None:
        height = 112 if candidate.image is not None else 24
        draw.multiline_text((left + 12, top + height), textwrap.fill(candidate.text, 22), INK, _font(14))


def _paste(canvas: Image.Image, path: str, left: int, top: int) -> None:
    with Image.open(path) as image:
        canvas.paste(image.convert("RGB").resize((DRAWING, DRAWING), Image.Resampling.LANCZOS), (left, top))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
