"""TREC's files: rankings and relevance judgements as trec_eval reads them, and judgements in M-BEIR's form.

A run has lines `qid Q0 did rank score tag`, qrels have lines `qid 0 did relevance`. Those of UniIR (Wei et al., ECCV
2024, arXiv 2311.17136) end in a fifth field, `task_id`, which its scripts need and trec_eval, pytrec_eval and ranx
refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from puma_hf.data.records import MBEIRFormatError, location
from puma_hf.evaluation.mbeir_results import written_whole

TAG = "puma-hf"
_STEP = 2.0**-30  # the steps that cosines are compared in
_RUN_FIELDS, _QRELS_FIELDS = (6,), (4, 5)


def falling_scores(scores: Sequence[float]) -> list[float]:
    """Scores as float32 numbers, each below the one before it.

    trec_eval goes by the score alone, in float32, and orders ties by id, last one first. Scores that fall keep the
    order that the search gave; one is changed only if it would tie.

    Args:
        scores: Of one query, best first.

    Returns:
        As many numbers, each a float32.

    Example:
        >>> falling_scores([0.5, 0.5, 0.25])
        [0.5, 0.4999999403953552, 0.25]
    """
    given = np.asarray(scores, dtype=np.float32)
    if bool((np.diff(given) < 0).all()):
        return [float(value) for value in given]
    fallen: list[float] = []
    for value in given:
        if fallen and value >= fallen[-1]:
            last = np.float32(fallen[-1])
            value = last - np.maximum(np.abs(np.spacing(last)), np.float32(_STEP))
        fallen.append(float(value))
    return fallen


def write_run(path: str | Path, rankings: Mapping[str, Sequence[tuple[str, float]]], *, tag: str = TAG) -> None:
    """Write rankings for trec_eval, whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        rankings: For each qid, its dids and their scores, best first.
        tag: Name of the run, the last word of each line.

    Example:
        >>> write_run("runs/webqa.trec", {"2:1": [("2:7", 0.9), ("2:5", 0.9)]})
        >>> print(open("runs/webqa.trec").read(), end="")
        2:1 Q0 2:7 1 0.899999976 puma-hf
        2:1 Q0 2:5 2 0.899999917 puma-hf
    """
    with written_whole(path) as file:
        for qid, ranking in rankings.items():
            scores = falling_scores([score for _, score in ranking])
            for rank, ((did, _), score) in enumerate(zip(ranking, scores, strict=True), start=1):
                file.write(f"{qid} Q0 {did} {rank} {score:.9g} {tag}\n")


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Rankings that `write_run` wrote, or any other run.

    Args:
        path: The file.

    Returns:
        For each qid, the score of each did, best first.

    Raises:
        FileNotFoundError: If the file is missing.
        MBEIRFormatError: If a line is malformed or a did comes twice.
    """
    found: dict[str, dict[str, float]] = {}
    for where, fields in _lines(Path(path), _RUN_FIELDS, "qid Q0 did rank score tag"):
        qid, did, score = fields[0], fields[2], _number(fields[4], where)
        if did in found.setdefault(qid, {}):
            raise MBEIRFormatError(f"{where}: {did!r} was ranked for {qid!r} before; keep one line")
        found[qid][did] = score
    return {qid: dict(sorted(scores.items(), key=lambda pair: -pair[1])) for qid, scores in found.items()}


def write_qrels(path: str | Path, relevance: Mapping[str, Mapping[str, int]], task_id: int | None = None) -> None:
    """Write relevance judgements for trec_eval, or in M-BEIR's form, whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        relevance: For each qid, the relevance of each did.
        task_id: M-BEIR's task number, the last word of each line in UniIR's files; None for trec_eval's.

    Example:
        >>> write_qrels("qrels/webqa.txt", {"2:1": {"2:7": 1}})
        >>> print(open("qrels/webqa.txt").read(), end="")
        2:1 0 2:7 1
    """
    end = "" if task_id is None else f" {task_id}"
    with written_whole(path) as file:
        for qid, judged in relevance.items():
            file.writelines(f"{qid} 0 {did} {gain}{end}\n" for did, gain in judged.items())


def read_qrels_file(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance judgements that `write_qrels` wrote, in either form; `puma_hf.data.MBEIR.qrels` also checks the ids.

    Args:
        path: The file.

    Returns:
        For each qid, the relevance of each did.

    Raises:
        FileNotFoundError: If the file is missing.
        MBEIRFormatError: If a line is malformed.
    """
    found: dict[str, dict[str, int]] = {}
    for where, fields in _lines(Path(path), _QRELS_FIELDS, "qid 0 did relevance [task_id]"):
        if not fields[3].isdecimal():
            raise MBEIRFormatError(f"{where}: relevance is {fields[3]!r}, must be a whole number of 0 or more")
        found.setdefault(fields[0], {})[fields[2]] = int(fields[3])
    return found


def _lines(path: Path, num_fields: tuple[int, ...], form: str) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fields = line.split()
            if len(fields) not in num_fields:
                raise MBEIRFormatError(f"{location(path, number)}: expected '{form}', got {line.rstrip()!r}")
            yield location(path, number), fields


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise MBEIRFormatError(f"{where}: score is {text!r}, must be a number") from error
