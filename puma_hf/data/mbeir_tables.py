"""M-BEIR's two tables: the instructions, and which candidates are relevant to which query.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136; TIGER-Lab/M-BEIR on the Hub).
"""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path

from puma_hf.data.mbeir_format import RECORD_ID, cut_off, location
from puma_hf.data.mbeir_problems import MBEIRFormatError, Problems, check_is_file
from puma_hf.data.mbeir_tasks import dataset_id_of
from puma_hf.values import shown

logger = logging.getLogger(__name__)

InstructionKey = tuple[int, str, str]
Qrels = dict[str, dict[str, int]]
_SHOWN = 3


def read_instructions(path: Path) -> tuple[dict[InstructionKey, tuple[str, ...]], dict[int, str]]:
    """M-BEIR's table of instructions.

    Args:
        path: `query_instructions.tsv`: query modality, candidate modality, dataset name, dataset id, prompts.

    Returns:
        Prompts by (dataset_id, query modality, candidate modality), and the name of each dataset id.

    Raises:
        FileNotFoundError: If the file is missing.
        MBEIRFormatError: If a row is malformed or a key comes twice.
    """
    check_is_file(path)
    prompts: dict[InstructionKey, tuple[str, ...]] = {}
    names: dict[int, str] = {}
    try:
        table = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MBEIRFormatError(f"{path} is not UTF-8 ({error}); download it again, or convert it") from error
    for number, line in enumerate(table.split("\n"), start=1):
        if number == 1 or not line.strip():  # line 1 is the header
            continue
        cells = [cell.strip().strip('"').strip() for cell in line.split("\t")]
        wordings = tuple(cell for cell in cells[4:] if cell)
        if not wordings or not cells[3].isdecimal():
            raise MBEIRFormatError(
                f"{location(path, number)}: expected query modality, candidate modality, dataset name, a "
                f"dataset id and at least one prompt, separated by tabs, got {shown(line)}"
            )
        key = (int(cells[3]), cells[0], cells[1])
        if key in prompts:
            raise MBEIRFormatError(f"{location(path, number)}: instruction key {key} was already given; keep one row")
        prompts[key] = wordings
        names[key[0]] = cells[2].lower()
    return prompts, names


def read_qrels(path: Path, qids: Container[str], dids: Container[str]) -> Qrels:
    """Relevance judgements: lines of `qid 0 did relevance task_id`.

    OVEN and InfoSeek judge each other's candidates, which a local pool does not hold: a did of another
    dataset than its query's that is absent from the pool is left out, and the log says how many were.  Any other
    unknown did is an error.

    Args:
        path: The qrels file.
        qids: Known queries.
        dids: Candidates of the pool to be searched.

    Returns:
        For each qid, the relevance of each did, positive ones only.

    Raises:
        FileNotFoundError: If the file is missing.
        MBEIRFormatError: If a line is malformed, contradicts another, or has an unknown qid or did.
    """
    check_is_file(path)
    qrels: Qrels = {}
    foreign: dict[str, None] = {}
    with Problems(path) as problems, path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                problems.attempt(_judge, qrels, foreign, line, location(path, number), qids, dids)
    if foreign:
        logger.info(
            "%s: left out %d judged candidates of other datasets that this pool does not hold, such as %s",
            path.name,
            len(foreign),
            ", ".join(list(foreign)[:_SHOWN]),
        )
    return {qid: {d: r for d, r in judged.items() if r > 0} for qid, judged in qrels.items()}


def _judge(
    qrels: Qrels, foreign: dict[str, None], line: bytes, where: str, qids: Container[str], dids: Container[str]
) -> None:
    qid, did, relevance = _qrels_line(line, where)
    if qid not in qids:
        raise MBEIRFormatError(f"{where}: qid {shown(qid)} is not in the query file of this task", "unknown qid")
    if did not in dids:
        if dataset_id_of(did) == dataset_id_of(qid):
            raise MBEIRFormatError(f"{where}: did {shown(did)} is not in the candidate pool", "did that is in no pool")
        foreign[did] = None
        return
    judged = qrels.setdefault(qid, {})
    if judged.setdefault(did, relevance) != relevance:
        raise MBEIRFormatError(
            f"{where}: {shown(qid)} and {shown(did)} were judged {judged[did]} before, now {relevance}", "contradiction"
        )


def _qrels_line(line: bytes, where: str) -> tuple[str, str, int]:
    text = line.decode(errors="replace")
    fields = text.split()
    if (
        len(fields) != 5
        or not fields[3].isdecimal()
        or not (RECORD_ID.fullmatch(fields[0]) and RECORD_ID.fullmatch(fields[2]))
    ):
        expected = "expected 'qid 0 did relevance task_id' with ids such as 9:12 and a relevance of 0 or more"
        message = f"{where}: {expected}, got {shown(text.removesuffix(chr(10)))}"
        raise MBEIRFormatError(message, "malformed line") if text.endswith("\n") else cut_off(message)
    return fields[0], fields[2], int(fields[3])
