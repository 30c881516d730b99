from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import EvaluateConfig, SweepConfig
from puma_hf.data.mbeir import MBEIR, Candidate, Query
from puma_hf.data.records import MBEIRFormatError
from puma_hf.data.tasks import TASK_MODALITIES, MBEIRTask
from puma_hf.evaluation.evaluator import MBEIREvaluator
from puma_hf.evaluation.layer_sweep import sweep
from puma_hf.evaluation.mbeir import Search, evaluate, evaluate_mbeir, read_searches, task_result
from puma_hf.evaluation.results import MBEIRResults
from puma_hf.files import LOCK_FILE, DirectoryInUseError
from tests.data import mbeir_builder as builder
from tests.evaluation.fake_encoder import FakeEncoder
from tests.tiny import tiny_tokenizer

TASKS = [MBEIRTask(number, builder.DATASET) for number in TASK_MODALITIES]


def is_right(
    root: Path, task: MBEIRTask, pool_name: str, rankings: dict[str, list[str]], candidates: type[FakeEncoder]
) -> bool:
    """Whether rankings are by cosine, straight from the files with none of the code under test."""
    path = builder.local_pool_path(root, task.task_id)
    pool = builder.read_records(path if pool_name == "local" else builder.global_pool_path(root, "test"))
    right = True
    for query in builder.read_records(builder.query_path(root, task.task_id, "test")):
        vector = embed_record(query["query_txt"], query["query_img_path"], f"{task.task_id} wording 1.")
        scores = {one["did"]: cosine(vector, embed_record(one["txt"], one["img_path"], "", candidates)) for one in pool}
        ranking, best = rankings[query["qid"]], sorted(scores.values(), reverse=True)
        right &= len(ranking) == len(set(ranking)) == min(10, len(pool))
        right &= [scores[did] for did in ranking] == pytest.approx(best[: len(ranking)], abs=2e-7)
    return right


def embed_record(
    text: str | None, img_path: str | None, prompt: str, encoder: type[FakeEncoder] = FakeEncoder
) -> list[int]:
    content = {"text": text, "image": img_path}
    return encoder.embed({key: value for key, value in content.items() if value}, prompt)


def cosine(a: list[int], b: list[int]) -> float:
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


@pytest.mark.parametrize("options", [{}, {"shard_size": 1}, {"embedding_dtype": "float16"}])
def test_equals_brute_force_on_both_pools(root: Path, options: dict[str, Any]) -> None:
    results = evaluate_mbeir(FakeEncoder(), root, pool="both", show_progress_bar=False, **options)
    assert [(row.pool, row.task) for row in results.rows] == list(itertools.product(("local", "global"), TASKS))
    for row in results.rows:
        assert is_right(root, row.task, row.pool, results.rankings[row.pool][row.task.name], FakeEncoder)
        assert row.score == row.metrics["hit@5"]
        assert (row.num_queries, row.num_skipped) == (builder.NUM_QUERIES - 1, 1)
        assert row.pool_size == builder.NUM_CANDIDATES * (1 if row.pool == "local" else len(TASKS))
    for pool in ("local", "global"):
        rows = [row for row in results.rows if row.pool == pool]
        assert results.mean(pool)["ndcg@10"] == pytest.approx(sum(r.metrics["ndcg@10"] for r in rows) / 8)
    assert results.mean("local")["wrong_modality@1"] == 0 < results.mean("global")["wrong_modality@1"]


def test_corrected_figures_stand_beside_the_plain_ones(root: Path) -> None:
    """Each task is corrected by its own queries: it makes no difference which tasks are evaluated with it."""
    plain = evaluate_mbeir(FakeEncoder(), root, pool="global")
    results = evaluate_mbeir(FakeEncoder(), root, pool="global", popularity_penalty=1.0)
    assert results.rankings == plain.rankings
    assert [replace(row, corrected={}) for row in results.rows] == plain.rows
    alone = evaluate_mbeir(FakeEncoder(), root, pool="global", popularity_penalty=1.0, tasks="toys_task7")
    assert alone.rows == [row for row in results.rows if row.task.name == "toys_task7"]
    assert sum(row.corrected["mrr@10"] != row.metrics["mrr@10"] for row in results.rows) > 4
    for row in evaluate_mbeir(FakeEncoder(), root, popularity_penalty=0.0).rows:
        assert row.corrected == {"score": row.score, **row.metrics}


def test_every_input_is_encoded_once_in_one_modality(root: Path) -> None:
    model = FakeEncoder()
    evaluate_mbeir(model, root, pool="both", batch_size=7, show_progress_bar=False, encode_kwargs={"truncate_dim": 2})
    assert all(kwargs == {"batch_size": 7, "show_progress_bar": False, "truncate_dim": 2} for *_, kwargs in model.calls)
    assert all(len({isinstance(item, str) or tuple(item) for item in inputs}) == 1 for inputs, *_ in model.calls)
    candidates = [repr(item) for inputs, prompt, _ in model.calls if not prompt for item in inputs]
    assert len(candidates) == len(set(candidates)) == len(TASKS) * builder.NUM_CANDIDATES
    prompts = [prompt for _, prompt, _ in model.calls if prompt]
    assert prompts == [f"{task.task_id} wording 1." for task in TASKS]
    assert all(len(inputs) == builder.NUM_QUERIES for inputs, prompt, _ in model.calls if prompt)


def test_seeded_instructions(root: Path) -> None:
    model, data = FakeEncoder(), MBEIR(root)
    evaluate_mbeir(model, data, tasks=["toys_task1"], instruction_seed=5)
    expected = Counter(data.instruction(query, "text", 5) for query in data.queries(TASKS[1]))
    assert len(expected) > 1
    assert {prompt: len(inputs) for inputs, prompt, _ in model.calls if prompt} == expected


def test_fashion_reports_hit_at_10_even_if_not_asked_for(root: Path) -> None:
    for path in [*root.rglob("*toys_task7*"), *root.rglob("*toys_task1*")]:
        path.rename(path.with_name(path.name.replace("toys", "fashioniq")))
    results = evaluate_mbeir(FakeEncoder(), root, tasks=["fashioniq_task7", "toys_task8"], ks=[1], pool="global")
    fashion, toys = results.rows
    assert list(fashion.metrics) == list(toys.metrics) == ["hit@1", "recall@1", "ndcg@10", "mrr@10", "wrong_modality@1"]
    expected = evaluate_mbeir(FakeEncoder(), root, tasks=["fashioniq_task7", "toys_task8"], pool="global")
    assert fashion.score == expected.rows[0].metrics["hit@10"] != expected.rows[0].metrics["hit@5"]
    assert toys.score == expected.rows[1].metrics["hit@5"]


def test_candidates_of_other_datasets_count_only_where_they_are(root: Path) -> None:
    """OVEN and InfoSeek: a judged candidate that only the global pool holds."""
    path = builder.global_pool_path(root, "test")
    foreign = {"did": "12:1", "txt": "text of q1_3", "img_path": None, "modality": "text", "src_content": None}
    builder.append_line(path, json.dumps(foreign))
    builder.append_line(builder.qrels_path(root, 1, "test"), f"{builder.qid(1, 3)} 0 12:1 1 1")
    local, everywhere = evaluate_mbeir(FakeEncoder(), root, tasks=["toys_task1"], pool="both").rows
    assert (local.num_queries, local.num_skipped) == (3, 1)
    assert (everywhere.num_queries, everywhere.num_skipped) == (4, 0)


def test_broken_qrels_are_found_before_anything_is_encoded(root: Path) -> None:
    path, model = builder.qrels_path(root, 8, "test"), FakeEncoder()
    line = builder.append_line(path, f"{builder.qid(8, 0)} 0 11:9999 1 8")
    with pytest.raises(MBEIRFormatError, match=rf"_qrels\.txt, line {line}: did '11:9999' is not in the candidate"):
        evaluate_mbeir(model, root)
    path.write_text("")
    with pytest.raises(MBEIRFormatError, match=r"no query of toys_task8 \(test\) has a relevant candidate in its"):
        evaluate_mbeir(model, root)
    wrong: tuple[tuple[str, Any], ...] = (
        ("tasks", ["toys_task5"]),
        ("ks", (5, 0)),
        ("ks", ()),
        ("popularity_penalty", 20),
    )
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name} is .*, must be "):
            evaluate_mbeir(model, root, **{name: value})
    assert not model.calls


# --- searches and rows


def search(relevance: dict[str, dict[str, int]]) -> Search:
    modalities = {"1:1": "text", "1:2": "image", "1:3": "text", "1:4": "image"}
    pool = {
        did: Candidate(did, "a" if "text" in modality else None, "b.png" if "image" in modality else None)
        for did, modality in modalities.items()
    }
    queries = [(Query(f"1:{number}", "q"), "Find it.") for number in (11, 12, 13)]
    return Search(MBEIRTask(1, "toys"), "local", pool, queries, relevance)


def test_a_row_by_hand() -> None:
    """Query 12 has nothing relevant and does not count."""
    dids = {"1:11": ["1:2", "1:1", "1:4", "1:3"], "1:12": ["1:1"] * 4, "1:13": ["1:4", "1:2", "1:1", "1:3"]}
    ranking = {qid: [(did, 0.5) for did in best] for qid, best in dids.items()}
    row = task_result(search({"1:11": {"1:1": 1, "1:3": 1}, "1:13": {"1:2": 2, "1:3": 1}}), ranking, (2, 3))
    assert (row.pool_size, row.num_queries, row.num_skipped, row.score) == (4, 2, 1, 1)
    assert list(row.metrics) == [
        *("hit@2", "hit@3", "recall@2", "recall@3", "ndcg@10", "mrr@10"),
        *("wrong_modality@1", "wrong_modality@2", "wrong_modality@3"),
    ]
    # Of query 11 images are wrong; query 13 has both kinds among its relevant candidates.
    assert row.metrics["wrong_modality@1"] == 1 / 2
    assert row.metrics["wrong_modality@2"] == 1 / 4
    assert row.metrics["wrong_modality@3"] == pytest.approx(2 / 3 / 2)
    assert row.metrics["recall@2"] == row.metrics["mrr@10"] == 1 / 2


def test_a_did_that_means_two_things_is_what_each_pool_says(root: Path) -> None:
    alone = evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", pool="global")
    builder.change_record(builder.local_pool_path(root, 1), 2, txt="another text")
    local = evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", pool="local")
    both = evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", pool="both")
    assert both.rows == [*local.rows, *alone.rows]
    held = MBEIREvaluator(root, split="test", tasks="toys_task1", pool="both")(FakeEncoder())
    assert {held[f"{row.pool}_ndcg@10"] for row in both.rows} == {row.metrics["ndcg@10"] for row in both.rows}


# --- the output


def files(output: Path) -> dict[str, bytes]:
    paths = [path for path in output.rglob("*") if path.is_file() and "embeddings" not in path.parts]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def test_what_is_written(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    results = evaluate_mbeir(FakeEncoder(), root, tasks=["toys_task1", "toys_task8"], pool="both", output_dir=output)
    names = {f"{pool}/toys_task{number}" for pool in ("local", "global") for number in (1, 8)}
    expected = {f"runs/{name}.trec" for name in names} | {f"qrels/{name}.txt" for name in names}
    written = files(output)
    # The first four of the five fields that M-BEIR's own have.
    official = [line.rsplit(" ", 1)[0] for line in builder.qrels_path(root, 8, "test").read_text().splitlines()]
    assert sorted(written["qrels/local/toys_task8.txt"].decode().splitlines()) == sorted(official)
    assert set(written) == expected | {"results.json", "results.md"}
    assert MBEIRResults.from_dict(json.loads(written["results.json"])).rows == results.rows
    assert json.loads(written["results.json"])["made_from"]["model_fingerprint"] == "fake"
    assert written["results.md"].decode() == results.to_markdown()
    assert not any(str(tmp_path).encode() in content for content in written.values())  # nothing of this machine


def test_a_second_run_encodes_only_what_is_new(root: Path, tmp_path: Path) -> None:
    first, again, other = FakeEncoder(), FakeEncoder(), FakeEncoder()
    results = evaluate_mbeir(first, root, tasks="toys_task1", output_dir=tmp_path / "out")
    written = files(tmp_path / "out")
    # What does not change embeddings is not compared.
    options: dict[str, Any] = {"batch_size": 3, "encode_kwargs": {"chunk_size": 3}}
    assert evaluate_mbeir(again, root, tasks="toys_task1", output_dir=tmp_path / "out", **options).rows == results.rows
    evaluate_mbeir(again, root, tasks="toys_task1", output_dir=tmp_path / "out")
    assert files(tmp_path / "out") == written
    assert not again.calls
    evaluate_mbeir(other, root, tasks="toys_task1", output_dir=tmp_path / "out", instruction_seed=5)
    assert all(prompt and prompt != "1 wording 1." for _, prompt, _ in other.calls)  # new wordings of queries alone


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        (
            {"fingerprint": "other", "truncate_dim": 2},
            {},
            r"model is 'fake' there and 'other' here.*truncate_dim is None",
        ),
        ({}, {"encode_kwargs": {"normalize_embeddings": True}}, r"settings: encode_kwargs is \{\} there and \{'n"),
    ],
)
def test_embeddings_of_another_model_or_setting_are_refused(
    root: Path, tmp_path: Path, attributes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", output_dir=tmp_path)
    model = FakeEncoder()
    vars(model).update(attributes)
    with pytest.raises(ValueError, match=message + ".* Choose another directory"):
        evaluate_mbeir(model, root, tasks="toys_task8", output_dir=tmp_path, **options)
    assert not model.calls


def test_a_model_without_fingerprint_uses_no_older_embeddings(root: Path, tmp_path: Path) -> None:
    model: Any = FakeEncoder()
    model.fingerprint = None
    evaluate_mbeir(model, root, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"made with other settings: model is 'unknown, .* Choose another directory"):
        evaluate_mbeir(model, root, output_dir=tmp_path / "out")


# --- candidates of another model


class Large(FakeEncoder):
    """Another space of as many dimensions."""

    fingerprint = "large"

    @staticmethod
    def embed(item: str | dict[str, str], prompt: str | None) -> list[int]:
        return FakeEncoder.embed(item, f"{prompt}, largely")


def test_queries_search_the_candidates_of_another_model(root: Path, tmp_path: Path) -> None:
    small, large, options = FakeEncoder(), Large(), {"tasks": ["toys_task1", "toys_task7"], "pool": "global"}
    own = evaluate_mbeir(Large(), root, output_dir=tmp_path / "large", **options)
    output: Any = {"output_dir": tmp_path / "out", "candidates_dir": tmp_path / "large"}
    results = evaluate_mbeir(small, root, candidates_model=large, popularity_penalty=0.5, **output, **options)
    assert not large.calls  # all that it embeds was there
    assert {prompt for _, prompt, _ in small.calls} == {"1 wording 1.", "7 wording 1."}
    for search, row in zip(read_searches(MBEIR(root), "test", options["tasks"], "global"), results.rows, strict=True):
        theirs, ours = (found.rankings["global"][row.task.name] for found in (own, results))
        assert is_right(root, row.task, "global", ours, Large)
        assert not is_right(root, row.task, "global", theirs, Large)  # with queries of its own
        shares = [len({*ours[qid][:10]} & {*theirs[qid][:10]}) / 10 for qid in search.relevance]
        assert row.metrics["overlap@10"] == pytest.approx(sum(shares) / len(shares))
        assert 0 < row.metrics["overlap@10"] < 1
        assert "overlap@10" not in row.corrected
    written, table = (files(tmp_path / "out")[name].decode() for name in ("results.json", "results.md"))
    assert json.loads(written)["made_from"]["candidates_fingerprint"] == "large"
    assert "| overlap@10 |" in table
    assert "The queries alone are embedded by this model, and all candidates by Large." in table


def test_candidates_of_another_width_are_refused(root: Path, sentence_transformer: SentenceTransformer) -> None:
    narrow = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=12)
    with pytest.raises(
        ValueError, match=r"32 dimensions and those of candidates_model 12: none can be compared\. Take"
    ):
        evaluate_mbeir(sentence_transformer, root, candidates_model=SentenceTransformer(modules=[narrow]))


# --- small and wrong data


def test_k_larger_than_the_pool(root: Path) -> None:
    """Everything is found, and shares are of what there is."""
    row = evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", ks=(1, 100)).rows[0]
    assert row.pool_size == builder.NUM_CANDIDATES
    assert row.metrics["hit@100"] == row.metrics["recall@100"] == 1
    everything = evaluate_mbeir(FakeEncoder(), root, tasks="toys_task1", ks=(100,), pool="global").rows[0]
    # Tasks 1, 3 and 6 have texts as candidates, the other five have not.
    assert everything.metrics["wrong_modality@100"] == pytest.approx(5 / 8)


# --- from a configuration, with a real model

NAMES = ("toys_task1", "toys_task7")


def content_of(one: Query | Candidate, root: Path) -> dict[str, str]:
    values = {"image": one.image and str(root / one.image), "text": one.text}
    return {name: value for name, value in values.items() if value}


def config(puma_dir: Path, root: Path, **values: Any) -> EvaluateConfig:
    return EvaluateConfig(model=str(puma_dir), data=root, **{"tasks": NAMES, "pool": "local", **values})


def test_it_is_evaluate_mbeir(
    puma_dir: Path, root: Path, tmp_path: Path, sentence_transformer: SentenceTransformer
) -> None:
    output = tmp_path / "out"
    results = evaluate(config(puma_dir, root, output=output, pool="both", instruction_seed=1, truncate_dim=4))
    options: dict[str, Any] = {"pool": "both", "instruction_seed": 1, "encode_kwargs": {"truncate_dim": 4}}
    expected = evaluate_mbeir(sentence_transformer, root, tasks=NAMES, **options)
    assert (results.rows, results.rankings) == (expected.rows, expected.rankings)
    assert MBEIRResults.from_dict(json.loads((output / "results.json").read_text())).rows == results.rows
    made_from = results.made_from
    assert (made_from["model"], made_from["data"], made_from["truncate_dim"]) == (puma_dir.name, "mbeir", 4)
    # As candidates of another model its own are the same, and all that it finds by itself it finds.
    itself = {"candidates_model": str(puma_dir), "output": output, "pool": "both", "instruction_seed": 1}
    again = evaluate(config(puma_dir, root, truncate_dim=4, **itself))
    assert again.rankings == results.rankings
    assert again.rows == [replace(row, metrics={**row.metrics, "overlap@10": 1.0}) for row in results.rows]
    assert (output / "candidates" / "embeddings").is_dir()


def test_the_first_layers(puma_dir: Path, elastic_dir: Path, root: Path, tmp_path: Path) -> None:
    first = config(elastic_dir, root, output=tmp_path / "out", num_kept_layers=2)
    results, pruned = evaluate(first), evaluate(config(puma_dir, root))
    assert (results.rows, results.rankings) == (pruned.rows, pruned.rankings)
    assert results.made_from["num_kept_layers"] == pruned.made_from["num_kept_layers"] == 2
    assert ", num-kept-layers 2, data mbeir" in results.to_markdown()
    with pytest.raises(ValueError, match=r"num_kept_layers is 2 there and 4 here\. Go on with --num-kept-layers 2, as"):
        evaluate(replace(first, num_kept_layers=None))


def test_queries_after_fewer_layers_than_candidates(
    elastic_dir: Path, sentence_transformer: SentenceTransformer, root: Path, tmp_path: Path
) -> None:
    """Queries by the model cut to 2 layers, candidates by all 4, each encoded by itself."""
    whole, data, output = open_sentence_transformer(str(elastic_dir)), MBEIR(root), tmp_path / "out"
    both = {"query_layers": 2, "candidate_layers": 4, "output": output}
    results = evaluate(config(elastic_dir, root, **both))
    for search, row in zip(read_searches(data, "test", NAMES, "local"), results.rows, strict=True):
        found, rows = {}, whole.encode([content_of(one, root) for one in search.pool.values()])
        for query, prompt in search.queries:
            vector = sentence_transformer.encode([content_of(query, root)], prompt=prompt)[0]
            found[query.id] = [[*search.pool][place] for place in np.argsort(-(rows @ vector))]
        assert results.rankings["local"][search.task.name] == found
        hits = [bool({*found[qid][:5]} & judged.keys()) for qid, judged in search.relevance.items()]
        assert row.metrics["hit@5"] == sum(hits) / len(hits)
    assert (results.made_from["num_kept_layers"], results.made_from["candidates_num_kept_layers"]) == (2, 4)
    told = "embedded by this model (2 layers), and all candidates by tiny-elastic (4 layers). overlap@10: the share of"
    assert told in (output / "results.md").read_text()
    # The side that is not named has the depth of num_kept_layers, or the model's own.
    for sides in ({"query_layers": 2}, {"candidate_layers": 4, "num_kept_layers": 2}):
        assert evaluate(config(elastic_dir, root, **sides)) == results
    # An evaluation at 4 layers has embedded the candidates.
    deep = evaluate(config(elastic_dir, root, output=tmp_path / "deep"))
    assert deep.rankings != results.rankings
    shared = evaluate(config(elastic_dir, root, query_layers=2, output=output, candidates_output=tmp_path / "deep"))
    assert shared == results
    with pytest.raises(ValueError, match=r"candidates_model='other' is another model, query_layers=2 .* Leave out one"):
        config(elastic_dir, root, query_layers=2, candidates_model="other")


def test_another_run_in_the_output_is_refused_first(puma_dir: Path, root: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / LOCK_FILE):
        with pytest.raises(DirectoryInUseError, match="is in use"):
            evaluate(config(puma_dir, root, output=tmp_path, benchmark="nano"))
        with pytest.raises(DirectoryInUseError, match="is in use"):
            evaluate_mbeir(FakeEncoder(), root, tasks=NAMES, output_dir=tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path != root] == [LOCK_FILE]


def test_nano(puma_dir: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nano = {"benchmark": "nano", "nano_queries": 2, "nano_candidates": 3}
    results = evaluate(config(puma_dir, root, output=tmp_path / "out", **nano))
    assert [row.num_queries for row in results.rows] == [2, 2]
    assert results.rows[0].pool_size < 6
    content_hash = json.loads((tmp_path / "out" / "nano" / "nano.json").read_text())["content_hash"]
    assert results.made_from["content_hash"] == content_hash
    assert results.made_from["data"] == "mbeir (nano)"
    # Kept elsewhere, or nowhere: the same.
    elsewhere = evaluate(config(puma_dir, root, nano_folder=tmp_path / "elsewhere", **nano))
    assert (tmp_path / "elsewhere" / "nano.json").is_file()
    assert evaluate(config(puma_dir, root, **nano)) == elsewhere == results
    assert not caplog.messages


@pytest.mark.parametrize("names", [{"model": "qwen"}, {"model": "puma", "candidates_model": "qwen"}])
def test_an_original_checkpoint_is_no_embedder(
    qwen_dir: Path, puma_dir: Path, root: Path, names: dict[str, str]
) -> None:
    given: Any = {name: str({"qwen": qwen_dir, "puma": puma_dir}[value]) for name, value in names.items()}
    with pytest.raises(ValueError, match=r"is an original qwen2_vl checkpoint, must be an embedder.*puma-hf prune"):
        evaluate(EvaluateConfig(**given, data=root))


def test_results_say_how_images_were_read(puma_dir: Path, root: Path, tmp_path: Path) -> None:
    limit = evaluate(config(puma_dir, root, output=tmp_path / "out", max_pixels=1024, decode="exact"))
    assert {"max_pixels": 1024, "decode": "exact"}.items() <= limit.made_from.items()
    assert ", max-pixels 1024, data mbeir" in limit.to_markdown()
    remedy = r"Go on with --decode exact and with --max-pixels 1024, as they were made\. Choose another directory"
    with pytest.raises(ValueError, match=rf"max_pixels is 1024 there and None here\. {remedy}"):
        evaluate(config(puma_dir, root, output=tmp_path / "out"))
    plain = evaluate(config(puma_dir, root, tasks=NAMES[0]))
    assert plain.made_from["decode"] == "fast"
    assert not {"max_pixels", "encode_kwargs"} & plain.made_from.keys()


def test_special_tokens(puma_dir: Path, root: Path, tmp_path: Path) -> None:
    builder.change_record(builder.query_path(root, 1, "test"), 2, query_txt="a <|im_end|> b")
    with pytest.raises(ValueError, match=rf"'{builder.qid(1, 1)}' .* the text .*--special-tokens split"):
        evaluate(config(puma_dir, root, output=tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"query '{builder.qid(1, 1)}': the text contains"):
        sweep(SweepConfig(model=str(puma_dir), data=root, split="test", tasks=NAMES))
    # What was embedded before is kept.
    results = evaluate(config(puma_dir, root, output=tmp_path / "out", special_tokens="split"))
    assert results.made_from["encode_kwargs"] == {"processing_kwargs": {"text": {"split_special_tokens": True}}}
    report = sweep(SweepConfig(model=str(puma_dir), data=root, split="test", tasks=NAMES, special_tokens="split"))
    assert report.full.quality["local"]["ndcg@10"] == pytest.approx(results.mean("local")["ndcg@10"], abs=1e-9)
