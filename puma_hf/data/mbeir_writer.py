"""Write a folder in M-BEIR's layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from puma_hf.data.mbeir_format import Candidate, Query
from puma_hf.data.mbeir_tasks import MBEIRTask

INSTRUCTIONS_HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"


class MBEIRWriter:
    """Writes the files of one split, as `MBEIR` reads them.

    Args:
        folder: The folder.
        split: The split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self._split = split

    def queries(self, task: MBEIRTask, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the queries of a task."""
        _write_records(self.query_path(task), records)

    def local_pool(self, task: MBEIRTask, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the candidates of a task."""
        _write_records(self.local_path(task), records)

    def global_pool(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the candidates of all tasks."""
        _write_records(self.global_path, records)

    def qrels(self, task: MBEIRTask, lines: Iterable[str]) -> None:
        """Write the judgements of a task, lines of `qid 0 did relevance task_id`."""
        _write_lines(self.qrels_path(task), lines)

    def instructions(self, rows: Iterable[str]) -> None:
        """Write the table of instructions, rows separated by tabs, without the header."""
        _write_lines(self.instruction_path, (INSTRUCTIONS_HEADER, *rows))

    def copy_instructions(self, path: Path) -> None:
        """Take over a table of instructions."""
        self.instruction_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.instruction_path)

    def query_path(self, task: MBEIRTask) -> Path:
        """File of the queries of a task."""
        return self._folder / "query" / self._split / f"mbeir_{task.name}_{self._split}.jsonl"

    def local_path(self, task: MBEIRTask) -> Path:
        """File of the candidates of a task."""
        return self._folder / "cand_pool" / "local" / f"mbeir_{task.name}_cand_pool.jsonl"

    @property
    def global_path(self) -> Path:
        """File of the candidates of all tasks."""
        return self._folder / "cand_pool" / "global" / f"mbeir_union_{self._split}_cand_pool.jsonl"

    def qrels_path(self, task: MBEIRTask) -> Path:
        """File of the judgements of a task."""
        return self._folder / "qrels" / self._split / f"mbeir_{task.name}_{self._split}_qrels.txt"

    @property
    def instruction_path(self) -> Path:
        """The table of instructions."""
        return self._folder / "instructions" / "query_instructions.tsv"


def candidate_record(candidate: Candidate, image_root: Path) -> dict[str, Any]:
    """A candidate as a line of a pool.

    Args:
        candidate: The candidate.
        image_root: Folder that image paths are relative to.

    Returns:
        The JSON object.
    """
    image = _relative(candidate.image, image_root)
    return {"did": candidate.did, "txt": candidate.text, "img_path": image, "modality": candidate.modality}


def query_record(query: Query, image_root: Path, pool: Container[str]) -> dict[str, Any]:
    """A query as a line of a query file.

    Args:
        query: The query.
        image_root: Folder that image paths are relative to.
        pool: Dids of the global pool; other candidates of the query are left out.

    Returns:
        The JSON object.
    """
    return {
        "qid": query.qid,
        "query_txt": query.text,
        "query_img_path": _relative(query.image, image_root),
        "query_modality": query.modality,
        "pos_cand_list": [did for did in query.positives if did in pool],
        "neg_cand_list": [did for did in query.negatives if did in pool],
    }


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False)


def _relative(image: str | None, image_root: Path) -> str | None:
    return None if image is None else Path(os.path.relpath(image, image_root)).as_posix()


def _write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write_lines(path, map(json_line, records))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unpaired surrogates come from JSON escapes and must not stop the writing; the reader takes them back.
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
