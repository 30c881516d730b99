from __future__ import annotations

from pathlib import Path

from puma_hf.data.mbeir_reader import MBEIR
from puma_hf.data.mbeir_writer import MBEIRWriter, candidate_record, query_record
from tests.data import mbeir_builder as builder


def test_what_is_written_is_read_back_equal(root: Path, tmp_path: Path) -> None:
    # U+2028 ends no line, and an unpaired surrogate, which JSON can hold, must not stop anything.
    builder.change_record(builder.local_pool_path(root, 1), 1, txt="\u00e4 \u2028 \ud800")
    data, copy = MBEIR(root), MBEIR(_write(root, tmp_path / "copy"), image_root=root)
    assert copy.tasks() == data.tasks()
    assert copy.global_pool() == data.global_pool()
    for task in data.tasks():
        queries, pool = data.queries(task), data.local_pool(task)
        assert (copy.queries(task), copy.local_pool(task)) == (queries, pool)
        assert copy.qrels(task, "test", queries, pool) == data.qrels(task, "test", queries, pool)
        assert copy.instruction(queries[0], task.candidate_modality) == f"{task.task_id} wording 1."
    path = builder.local_pool_path(tmp_path / "copy", 4)
    assert builder.read_records(path)[0]["img_path"] == "images/c4_0.png"


def test_candidates_outside_the_pool_are_left_out(root: Path) -> None:
    query = MBEIR(root).queries(MBEIR(root).tasks()[1])[1]
    record = query_record(query, root, {"11:102", "11:104"})
    assert (record["pos_cand_list"], record["neg_cand_list"]) == (["11:102"], ["11:104"])


def _write(root: Path, folder: Path) -> Path:
    data, writer = MBEIR(root), MBEIRWriter(folder, "test")
    everything = data.global_pool()
    rows = []
    for task in data.tasks():
        writer.queries(task, (query_record(query, data.image_root, everything) for query in data.queries(task)))
        pool = data.local_pool(task).values()
        writer.local_pool(task, (candidate_record(candidate, data.image_root) for candidate in pool))
        writer.qrels(task, builder.qrels_path(root, task.task_id, "test").read_text().splitlines())
        names = (task.query_modality, task.candidate_modality, task.dataset, str(builder.DATASET_ID))
        rows.append("\t".join((*names, f"{task.task_id} wording 1.")))
    writer.global_pool(candidate_record(candidate, data.image_root) for candidate in everything.values())
    writer.instructions(rows)
    return folder
