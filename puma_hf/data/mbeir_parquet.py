"""Import a Parquet copy of an M-BEIR task into the official layout.

Rows are read a few at a time. Images keep the bytes they have; nothing is decoded but their headers.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puma_hf.data.mbeir_copies import ParquetCopy
from puma_hf.data.mbeir_problems import MBEIRFormatError, Problems
from puma_hf.data.mbeir_tasks import IMAGE, MBEIR_MODALITIES, TEXT
from puma_hf.data.mbeir_writer import MBEIRWriter
from puma_hf.data.tables import read_table
from puma_hf.files import write_whole
from puma_hf.modeling.image_inputs_puma import open_image
from puma_hf.values import cut, shown

IMAGE_FOLDER = "images"  # below the image root

_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}
_ID = re.compile(r"\d+:\S+")
# What some conversions put before an id: the name of the table, and the split.
_ID_PREFIX = re.compile(r"^(?:query|queries|corpus|doc)-(?:(?:train|val|validation|dev|test|corpus)-)?")
_NAMES = {
    "id": ("id", "_id", "qid", "did"),
    "text": ("text", "txt", "query_txt"),
    "image": ("image",),
    "modality": ("modality", "query_modality"),
    "query-id": ("query-id", "query_id"),
    "corpus-id": ("corpus-id", "corpus_id"),
    "score": ("score", "relevance"),
}
_CONTENT = ("text", "image", "modality")  # a copy has some of them


def import_copy(copy: ParquetCopy, folder: Path, image_root: Path, split: str, dataset_id: int | None) -> None:
    """Write the queries, the pool and the judgements of a copy.

    The positives of a query are those that the judgements name; the copies have no hard negatives.

    Args:
        copy: The copy.
        folder: Folder to write into.
        image_root: Folder to write the images below, each named after a hash of its bytes. One that is there
            already is not written again.
        split: The split that the queries are of.
        dataset_id: Number of the dataset, put before ids that have none; None if it is not known.

    Raises:
        MBEIRFormatError: If a file was cut off, or rows are wrong; all of them are counted.
        OSError: If a file cannot be written.
    """
    writer = MBEIRWriter(folder, split)
    images = _ImageStore(image_root)
    with Problems(copy.folder) as problems:
        judged: dict[str, dict[str, int]] = defaultdict(dict)
        for where, row in _rows(copy.qrels, problems, ("query-id", "corpus-id", "score")):
            problems.attempt(_judge, judged, row, where, dataset_id)
        task_id = copy.task.task_id
        writer.qrels(
            copy.task, (f"{qid} 0 {did} {score} {task_id}" for qid in judged for did, score in judged[qid].items())
        )
        queries = (
            _as_query(record, judged.get(record["id"], {}))
            for record in _records(copy.queries, images, problems, dataset_id, copy.task.query_modality)
        )
        writer.queries(copy.task, queries)
        pool = (_as_candidate(record) for record in _records(copy.corpus, images, problems, dataset_id, None))
        writer.local_pool(copy.task, pool)
    for name, path in (("queries", writer.query_path(copy.task)), ("corpus", writer.local_path(copy.task))):
        if not path.stat().st_size:
            raise MBEIRFormatError(f"{copy.folder}: there are no rows in its {name}; download it again", "empty")


def _records(
    files: Sequence[Path], images: _ImageStore, problems: Problems, dataset_id: int | None, modality: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of a corpus or of queries, each with id, text, image path and modality."""
    seen: set[str] = set()
    for where, row in _rows(files, problems, ("id",), _CONTENT):
        record = problems.attempt(_record, row, where, images, dataset_id, modality)
        if record is None:
            continue
        if record["id"] in seen:
            problems.add(MBEIRFormatError(f"{where}: id {shown(record['id'])} was already given", "duplicated id"))
            continue
        seen.add(record["id"])
        yield record


def _rows(
    files: Sequence[Path], problems: Problems, needed: Sequence[str], others: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    only = [column for name in (*needed, *others) for column in _NAMES[name]]
    for path in files:
        columns: dict[str, str] = {}
        for where, row in read_table(
            path, lambda error: problems.add(MBEIRFormatError(str(error), "broken row")), only
        ):
            columns = columns or _columns(path, list(row), needed, others)
            yield where, {name: row[column] for name, column in columns.items()}


def _columns(path: Path, there: Sequence[str], needed: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    columns = {}
    for name in (*needed, *others):
        column = next((column for column in _NAMES[name] if column in there), None)
        if column is not None:
            columns[name] = column
        elif name in needed:
            raise MBEIRFormatError(
                f"{path} has no column {' or '.join(_NAMES[name])}, only {cut(', '.join(there))}; rename the one that "
                "holds it",
                "missing field",
            )
    return columns


def _judge(judged: dict[str, dict[str, int]], row: Mapping[str, Any], where: str, dataset_id: int | None) -> None:
    qid, did = (_full_id(row[name], dataset_id, where, name) for name in ("query-id", "corpus-id"))
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or score != int(score) or score < 0:
        raise MBEIRFormatError(f"{where}: score is {shown(score)}, must be a whole number of 0 or more", "wrong field")
    if judged[qid].setdefault(did, int(score)) != score:
        raise MBEIRFormatError(
            f"{where}: {shown(qid)} and {shown(did)} were judged {judged[qid][did]} before, now {score}",
            "contradiction",
        )


def _full_id(value: Any, dataset_id: int | None, where: str, name: str) -> str:
    record_id = _ID_PREFIX.sub("", str(value).strip())
    if ":" not in record_id and dataset_id is not None:
        record_id = f"{dataset_id}:{record_id}"
    if value is None or not _ID.fullmatch(record_id):
        hint = "" if dataset_id is not None else "; only M-BEIR's own datasets may leave their number out"
        raise MBEIRFormatError(
            f"{where}: {name} is {shown(value)}, must look like '<dataset_id>:<number>'{hint}", "wrong id"
        )
    return record_id


def _record(
    row: Mapping[str, Any], where: str, images: _ImageStore, dataset_id: int | None, modality: str | None
) -> dict[str, Any]:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise MBEIRFormatError(f"{where}: text is {shown(text)}, must be a string or null")
    text = text if text and text.strip() else None
    cell = row.get("image")
    if isinstance(cell, dict) and not any(value is not None for value in cell.values()):
        cell = None  # some writers have a struct of nothing for a row without an image
    present = ",".join(name for name, value in ((IMAGE, cell), (TEXT, text)) if value is not None)
    label = row.get("modality")
    label = present if label is None else ",".join(sorted(part.strip() for part in str(label).split(",")))
    if label != present or label not in MBEIR_MODALITIES:
        raise MBEIRFormatError(
            f"{where}: modality is {shown(row.get('modality'))}, but the row holds "
            f"{present or 'neither text nor image'}",
            "wrong modality label",
        )
    if modality is not None and label != modality:
        raise MBEIRFormatError(
            f"{where}: a query of {label}, but this task has queries of {modality}", "query of another task"
        )
    image = None if cell is None else images.put(cell, where)
    return {"id": _full_id(row["id"], dataset_id, where, "id"), "text": text, "image": image, "modality": label}


def _as_query(record: Mapping[str, Any], judged: Mapping[str, int]) -> dict[str, Any]:
    return {
        "qid": record["id"],
        "query_txt": record["text"],
        "query_img_path": record["image"],
        "query_modality": record["modality"],
        "pos_cand_list": [did for did, score in judged.items() if score > 0],
        "neg_cand_list": [],
    }


def _as_candidate(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "did": record["id"],
        "txt": record["text"],
        "img_path": record["image"],
        "modality": record["modality"],
    }


class _ImageStore:
    """A folder of images named after their contents, so that none is stored twice, and an import can go on."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, cell: Any, where: str) -> str:
        """Store an image; returns its path below the root."""
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or not data:
            raise MBEIRFormatError(
                f"{where}: the image holds no bytes; a copy must have its images inside", "missing image"
            )
        try:
            with warnings.catch_warnings(action="ignore"), open_image(io.BytesIO(data)) as image:
                kind = image.format or ""  # the header alone is read
        except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
            raise MBEIRFormatError(f"{where}: the image cannot be read ({error})", "broken image") from error
        digest = hashlib.sha256(data).hexdigest()
        name = f"{IMAGE_FOLDER}/{digest[:2]}/{digest[2:]}{_SUFFIXES.get(kind, f'.{kind.lower()}')}"
        path = self._root / name
        if not path.is_file() or path.stat().st_size != len(data):
            write_whole(path, data, sync=False)
        return name
