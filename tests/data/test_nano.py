from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from puma_hf.data import nano as nano_module
from puma_hf.data.mbeir import MBEIR, load_mbeir
from puma_hf.data.mbeir_format import MBEIRFormatError
from puma_hf.data.mbeir_tasks import MBEIRTask
from puma_hf.data.nano import build_nano
from tests.data import mbeir_builder as builder

EMOJI = Path(__file__).parents[2] / "demo" / "emoji"
TEXTS = MBEIRTask(1, builder.DATASET)
# Of toys_task1, which has no images: Pillow's PNG files differ from release to release.
QIDS = ["11:1100", "11:1101"]
DIDS = ["11:100", "11:101", "11:102", "11:103", "11:104"]
HASH = "bbc73a3cfb95801a9c798694c01e07bdde4293a7c74095533f7600138dd71c10"


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> MBEIR:
    return build_nano(MBEIR(EMOJI), tmp_path_factory.mktemp("nano") / "emoji", num_queries=20, num_candidates=50)


def test_the_demo_gets_smaller_and_keeps_all_that_is_relevant(emoji: MBEIR) -> None:
    whole = MBEIR(EMOJI)
    assert emoji.tasks() == whole.tasks()
    together = {}
    for task in whole.tasks():
        queries, pool = emoji.queries(task), emoji.local_pool(task)
        assert (len(queries), len(pool)) == (20, 50)
        own = {query.qid: query for query in whole.queries(task)}
        assert [query.qid for query in queries] == [qid for qid in own if qid in {query.qid for query in queries}]
        relevant = whole.qrels(task, "test", own.values(), whole.local_pool(task))
        found = emoji.qrels(task, "test", queries, pool)
        assert found == {query.qid: relevant[query.qid] for query in queries}
        assert all((own[query.qid].text, own[query.qid].image) == (query.text, query.image) for query in queries)
        original = whole.local_pool(task)
        assert pool == {did: candidate for did, candidate in original.items() if did in pool}
        assert list(pool) == [did for did in original if did in pool]
        together |= pool
        assert emoji.instruction(queries[0], task.candidate_modality) == whole.instruction(
            queries[0], task.candidate_modality
        )
    assert emoji.global_pool() == together
    assert emoji.image_root == EMOJI.resolve()


def test_the_draw_and_the_hash_are_the_same_on_every_machine(root: Path, tmp_path: Path, emoji: MBEIR) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", tasks=["toys_task1"], num_queries=2, num_candidates=5)
    assert [query.qid for query in nano.queries(TEXTS)] == QIDS
    assert list(nano.local_pool(TEXTS)) == DIDS
    assert nano.content_hash == HASH
    assert (emoji.content_hash is None, MBEIR(EMOJI).content_hash) == (False, None)


def test_where_the_data_lies_does_not_change_the_hash(root: Path, tmp_path: Path) -> None:
    first = build_nano(MBEIR(root), tmp_path / "first", num_queries=2, num_candidates=4)
    shutil.copytree(root, tmp_path / "copy")
    second = build_nano(MBEIR(tmp_path / "copy"), tmp_path / "second", num_queries=2, num_candidates=4)
    assert first.content_hash == second.content_hash
    one, other = files(first.root), files(second.root)
    assert one.pop("nano.json") != other.pop("nano.json")  # the images' folder
    assert one == other


@pytest.mark.parametrize("change", ["image", "text", "wording", "qrels", "seed"])
def test_whatever_changes_a_figure_changes_the_hash(root: Path, tmp_path: Path, change: str) -> None:
    def build(name: str, seed: int = 0) -> str | None:
        tasks = ["toys_task1", "toys_task4"]
        return build_nano(MBEIR(root), tmp_path / name, tasks=tasks, num_queries=0, seed=seed).content_hash

    before = build("before")
    assert build("again") == before
    if change == "image":
        shutil.copy(root / "images" / "c0_1.png", root / "images" / "c4_1.png")
    elif change == "text":
        builder.change_record(builder.local_pool_path(root, 1), 1, txt="another text")
    elif change == "wording":
        path = builder.instructions_path(root)
        path.write_text(path.read_text().replace("1 wording 4.", "another"))
    elif change == "qrels":
        builder.append_line(builder.qrels_path(root, 1, "test"), f"{builder.qid(1, 0)} 0 {builder.did(1, 5)} 1 1")
    assert build("after", seed=int(change == "seed")) != before


def test_relevant_ones_first_then_hard_negatives_in_turn_then_others(root: Path, tmp_path: Path) -> None:
    # Query 0 is relevant to 0, query 1 to 1 and 2; their hard negatives are 5 and 4, 3.
    path = builder.query_path(root, 1, "test")
    for line, numbers in ((1, [5]), (2, [5, 3, 4])):
        builder.change_record(path, line, neg_cand_list=[builder.did(1, number) for number in numbers])
    records = builder.read_records(path)[:2]
    builder.write_records(path, records)
    lines = builder.qrels_path(root, 1, "test").read_text().splitlines()[:3]
    builder.write_lines(builder.qrels_path(root, 1, "test"), lines)

    def pool(count: int) -> list[int]:
        nano = build_nano(MBEIR(root), tmp_path / str(count), tasks=["toys_task1"], num_candidates=count)
        assert set(nano.global_pool()) == set(nano.local_pool(TEXTS))
        return [int(did[-1]) for did in nano.local_pool(TEXTS)]

    assert pool(1) == pool(3) == [0, 1, 2]
    assert pool(4) == [0, 1, 2, 5]
    assert pool(5) == [0, 1, 2, 3, 5]
    assert pool(0) == pool(60) == [0, 1, 2, 3, 4, 5]


def test_queries_nobody_judged_are_not_drawn(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano")
    for task in nano.tasks():
        assert [query.qid for query in nano.queries(task)] == [
            builder.qid(task.task_id, number) for number in range(builder.UNJUDGED_QUERY)
        ]
    builder.write_lines(builder.qrels_path(root, 1, "test"), [])
    with pytest.raises(MBEIRFormatError, match=r"no query of toys_task1 \(test\) has a relevant candidate"):
        build_nano(MBEIR(root), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_datasets_judgements_count_where_its_candidates_are(root: Path, tmp_path: Path) -> None:
    line = f"{builder.qid(1, 0)} 0 12:7 1 1"
    builder.append_line(builder.qrels_path(root, 1, "test"), line)
    nano = build_nano(MBEIR(root), tmp_path / "nano")
    queries, pool = nano.queries(TEXTS), nano.local_pool(TEXTS)
    assert set(nano.qrels(TEXTS, "test", queries, pool)[builder.qid(1, 0)]) == {builder.did(1, 0)}
    assert "12:7" in nano.qrels(TEXTS, "test", queries, {*pool, "12:7"})[builder.qid(1, 0)]


def test_it_can_be_trained_on(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", split="test", num_queries=2, num_candidates=3)
    rows = load_mbeir(nano, "test")
    assert len(rows) == 2 * len(builder.MODALITIES)


def test_opening_again_is_no_building(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()  # an empty folder is nobody's
    first = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    monkeypatch.setattr(nano_module, "_write", lambda *_: pytest.fail("built again"))
    again = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    assert again.content_hash == first.content_hash
    for settings, message in (
        ({"num_queries": 3}, "num_queries=2, not 3"),
        ({"num_queries": 2, "seed": 1}, "seed=0, not 1"),
        ({"num_queries": 2, "tasks": ["toys_task1"]}, r"tasks=\['toys_task0', .*, not \['toys_task1'\]"),
        ({"num_queries": 2, "split": "train"}, "split='test', not 'train'"),
    ):
        with pytest.raises(ValueError, match=rf"nano was built with {message}\. Name another folder, remove"):
            build_nano(MBEIR(root), tmp_path / "nano", **settings)  # type: ignore[arg-type]
    shutil.copytree(root, tmp_path / "other")
    with pytest.raises(ValueError, match=r"built with the images in .*mbeir, not .*other"):
        build_nano(MBEIR(tmp_path / "other"), tmp_path / "nano", num_queries=2)


def test_nothing_else_is_overwritten(root: Path, tmp_path: Path) -> None:
    before = files(root)
    with pytest.raises(FileExistsError, match=r"mbeir is there and is no nano folder"):
        build_nano(MBEIR(root), root)
    assert files(root) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"file is there and is no nano folder"):
        build_nano(MBEIR(root), tmp_path / "file")


def test_a_nano_of_a_nano(root: Path, tmp_path: Path) -> None:
    first = build_nano(MBEIR(root), tmp_path / "first", num_queries=3, num_candidates=5)
    second = build_nano(first, tmp_path / "second", num_queries=1, num_candidates=4)
    assert second.image_root == first.image_root == root.resolve()
    assert set(second.global_pool()) < set(first.global_pool())


def test_moved_images(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    root.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError,
        match=r"The images' folder .*mbeir, which .*nano\.json names, is not there; .*MBEIR\(\.\.\., image_root=",
    ):
        MBEIR(nano.root)
    moved = MBEIR(nano.root, image_root=tmp_path / "moved")
    assert moved.content_hash == nano.content_hash
    assert len(moved.global_pool()) == len(builder.MODALITIES) * builder.NUM_CANDIDATES


def test_a_nano_that_was_changed_has_no_hash(root: Path, tmp_path: Path) -> None:
    nano = build_nano(MBEIR(root), tmp_path / "nano", num_queries=2)
    path = builder.qrels_path(nano.root, 1, "test")
    path.write_text(path.read_text().replace(" 1 1", " 2 1"))
    with pytest.raises(MBEIRFormatError, match=r"task1_test_qrels\.txt was changed or removed"):
        _ = MBEIR(nano.root).content_hash


def test_one_did_with_two_meanings(root: Path, tmp_path: Path) -> None:
    builder.change_record(builder.local_pool_path(root, 3), 6, did=builder.did(1, 0))
    with pytest.raises(MBEIRFormatError, match=r"did '11:100' of toys_task3 is something else in another task's pool"):
        build_nano(MBEIR(root), tmp_path / "nano", tasks=["toys_task1", "toys_task3"])


@pytest.mark.parametrize("name", ["num_queries", "num_candidates"])
def test_wrong_numbers(root: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is -1, must be 0 or more; 0 takes all of them"):
        build_nano(MBEIR(root), tmp_path / "nano", **{name: -1})
