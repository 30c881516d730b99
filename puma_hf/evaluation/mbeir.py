"""M-BEIR's table: every task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puma_hf import __version__
from puma_hf.data.mbeir import MBEIR, MBEIRTask, select_tasks
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation.candidate_source import StoredCandidates
from puma_hf.evaluation.encoding import SHARD_SIZE, ContentKeys, Embedder, Encoder, plan_shards, settings_of_encode
from puma_hf.evaluation.mbeir_results import MBEIRResults, written_whole
from puma_hf.evaluation.mbeir_searches import NDCG_K, POOLS, Search, distinct_candidates, read_searches, task_result
from puma_hf.evaluation.search import SearchResult, exact_search, less_popular, merge_results
from puma_hf.evaluation.trec import write_qrels, write_run
from puma_hf.fingerprint import model_fingerprint
from puma_hf.fingerprint import model_name as name_of
from puma_hf.processes import connect, gather, main_process_first, shared_folder
from puma_hf.settings import processing_of

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BACKENDS = ("torch", "faiss")
# Whose releases may change the last digits of an embedding.
_LIBRARIES = ("torch", "transformers", "sentence-transformers")
_Ranked = dict[str, list[tuple[str, float]]]  # by qid: did and score, best first
_NAMES_AN_EVALUATION = ("split", "data", "content_hash", "instructions")  # of the same embeddings


def evaluate_mbeir(
    model: Encoder,
    data: str | Path | MBEIR,
    *,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    pool: Literal["local", "global", "both"] = "local",
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 32,
    instruction_seed: int | None = None,
    popularity_penalty: float | None = None,
    output_dir: str | Path | None = None,
    embedding_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    search_device: str | torch.device | None = None,
    search_backend: Literal["torch", "faiss"] = "torch",
    show_progress_bar: bool = True,
    encode_kwargs: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    model_name: str | None = None,
    data_name: str | None = None,
) -> MBEIRResults:
    """Measure a model on M-BEIR or any dataset in its layout.

    Each distinct candidate is encoded once, without instruction, however many pools it is in.  Queries are
    encoded with their task's instruction as `prompt`.  Inputs of one modality go together: text,
    `{"image": path}` or `{"image": path, "text": ...}`.

    Embeddings are stored as they are made, shard by shard: with an `output_dir`, a run that was stopped goes on where
    it was, and comes to the same results. Started by `accelerate launch` or `torchrun`, every process embeds a share
    and searches a share of each pool; all return the same results, which are those of one process.

    Args:
        model: A `SentenceTransformer` or anything with its `encode`.
        data: Folder in M-BEIR's layout or of parquet copies, an id on the Hub (see `open_mbeir`), or an `MBEIR`.
        split: Split to evaluate.
        tasks: Names such as "webqa_task1"; None for all of the split.
        pool: "local" for each task's own pool, "global" for the pool of all tasks, or "both".
        ks: The k of hit@k, recall@k and wrong_modality@k.
        batch_size: Batch size of `encode`.
        instruction_seed: None for the first wording of each instruction, a number to draw one a query.
        popularity_penalty: Also report figures by `similarity - penalty * mean similarity of the candidate to all
            queries of the task`, between 0 and 1; see `less_popular`. Rankings and run files stay the plain ones.
        output_dir: Where to keep `embeddings/` and write `results.json`, `results.md`, and for trec_eval
            `runs/<pool>/<task>.trec` and `qrels/<pool>/<task>.txt`, and for UniIR's scripts
            `qrels_uniir/<pool>/<task>.txt`; None for nowhere. Results of another evaluation that are there are
            replaced, with a warning before the work begins.
        embedding_dtype: Data type that embeddings are stored in.
        search_device: Device of the search; None for the GPU, if there is one and the backend is torch.
        search_backend: "torch", or "faiss" if it is installed; the results are the same.
        show_progress_bar: Whether to show how many inputs are embedded, and the time that is left.
        encode_kwargs: Further arguments of `encode`, but for the prompt and the precision.
        shard_size: Inputs of one stored shard; a process that is stopped loses at most so many.
        model_name: What the results call the model; None for its own name.
        data_name: What the results call the data; None for the name of the folder.

    Returns:
        One row a task and pool, the rankings, and what they were made from.

    Raises:
        ValueError: If an argument is out of range, an embedding is not finite, or `output_dir` holds embeddings of
            another model or setting.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.
        ImportError: If faiss is asked for and not installed.

    Example:
        >>> results = evaluate_mbeir(model, "demo/emoji", pool="both")  # doctest: +SKIP
        >>> print(results.to_markdown())  # doctest: +SKIP
    """
    _check_choice("pool", pool, POOLS)
    _check_choice("embedding_dtype", embedding_dtype, _DTYPES)
    _check_choice("search_backend", search_backend, _BACKENDS)
    if search_backend == "faiss" and find_spec("faiss") is None:  # hours of embedding would come before the search
        raise ImportError("search_backend 'faiss' needs faiss: pip install 'puma-hf[faiss]', or choose 'torch'")
    if popularity_penalty is not None and not 0 <= popularity_penalty <= 1:
        raise ValueError(
            f"popularity_penalty is {popularity_penalty}, must be from 0 to 1, such as 0.2; None for plain figures"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}, must be numbers of 1 or more, such as (1, 5, 10)")
    names = None if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    with main_process_first():  # it imports copies of the Hub, the others read what it made
        opened = open_mbeir(data, split=split, tasks=names) if isinstance(data, str | Path) else data
    chosen = select_tasks(opened.tasks(split), names)
    made_from = {
        **_of_model(model, model_name, encode_kwargs),
        **_of_data(opened, data_name, instruction_seed),
        "pool": pool,
        "embedding_dtype": embedding_dtype,
        **({} if popularity_penalty is None else {"popularity_penalty": popularity_penalty}),
    }
    with shared_folder(output_dir) as folder:
        cache = _open_cache(model, folder / "embeddings", made_from, _DTYPES[embedding_dtype])
        searches = read_searches(opened, chosen, split, POOLS[pool])  # reads and checks every file before encoding
        output = folder if output_dir is not None and connect()[0] == 0 else None
        if output is not None:
            _tell_what_is_replaced(output / "results.json", {"split": split, **made_from}, searches)
        inputs = _Inputs(opened, searches, instruction_seed)
        embedder = Embedder(model, cache, batch_size, show_progress_bar, encode_kwargs)
        embedder.embed(plan_shards(inputs.items, shard_size))
        results = MBEIRResults(split, [], {name: {} for name in POOLS[pool]}, made_from)
        top_k = max(*ks, NDCG_K, *(task.reported_k for task in chosen))
        options = {"device": search_device or _default_device(search_backend), "backend": search_backend}
        for search, ranked, corrected in _rankings(cache, inputs, searches, top_k, popularity_penalty, options):
            _add(results, search, ranked, corrected, ks, output)
        if output is not None:
            results.to_json(output / "results.json")
            with written_whole(output / "results.md") as file:
                file.write(results.to_markdown())
    return results


class _Inputs:
    """What is embedded: every candidate once, without a prompt, and every query with its instruction.

    Attributes:
        items: All of them, the candidates of the largest pool first.
    """

    def __init__(self, data: MBEIR, searches: Sequence[Search], instruction_seed: int | None) -> None:
        keys = ContentKeys(getattr(data, "image_root", data.root))
        candidates = distinct_candidates(searches)
        self.items = keys.items(candidates.values(), [""] * len(candidates))
        self._candidates = {did: item.key for did, item in zip(candidates, self.items, strict=True)}
        self._queries: dict[MBEIRTask, Tensor] = {}
        for search in searches:
            task = search.task
            if task not in self._queries:
                wanted = task.candidate_modality
                prompts = [data.instruction(query, wanted, instruction_seed) for query in search.queries]
                items = keys.items(search.queries, prompts)
                self._queries[task] = torch.tensor([item.key for item in items])
                self.items += items

    def pool_keys(self, pool: Iterable[str]) -> Tensor:
        """Keys `(num_candidates,)` of the candidates of a pool, in its order."""
        return torch.tensor([self._candidates[did] for did in pool])

    def query_keys(self, searches: Iterable[Search]) -> Tensor:
        """Keys `(num_queries,)` of the queries of some searches, one after the other."""
        return torch.cat([self._queries[search.task] for search in searches])


def _rankings(
    cache: EmbeddingStore,
    inputs: _Inputs,
    searches: Sequence[Search],
    top_k: int,
    penalty: float | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[Search, _Ranked, _Ranked | None]]:
    """For each search the best candidates and their scores of each qid, best first; and the corrected ones, if asked.

    Searches of one pool go together, so that its embeddings are read once for all tasks.
    """
    groups: dict[int, list[Search]] = {}
    for search in searches:
        groups.setdefault(id(search.pool), []).append(search)
    for group in groups.values():
        queries, keys = cache.rows(inputs.query_keys(group)), inputs.pool_keys(group[0].pool)
        plain = _ranked(group, _search_pool(queries, cache, keys, top_k, options))
        corrected: Iterable[_Ranked | None] = [None] * len(group)
        if penalty is not None:
            # Each task by the popularity among its own queries, as if it were evaluated alone.
            tasks = queries.split([len(search.queries) for search in group])
            queries = torch.cat([less_popular(rows, penalty) for rows in tasks])
            corrected = _ranked(group, _search_pool(queries, cache, keys, top_k, options))
        yield from zip(group, plain, corrected, strict=True)


def _ranked(group: Sequence[Search], found: SearchResult) -> Iterator[_Ranked]:
    dids = list(group[0].pool)
    rows = zip(found.indices.tolist(), found.scores.tolist(), strict=True)
    for search in group:
        ranked = {}
        for query, (indices, scores) in zip(search.queries, rows, strict=False):  # the next search goes on
            ranked[query.qid] = [(dids[index], score) for index, score in zip(indices, scores, strict=True)]
        yield ranked


def _search_pool(
    queries: Tensor, cache: EmbeddingStore, keys: Tensor, top_k: int, options: Mapping[str, Any]
) -> SearchResult:
    """Search a pool, each process its slice of it."""
    rank, count = connect()
    start, stop = (len(keys) * edge // count for edge in (rank, rank + 1))
    found: SearchResult | None = None
    if stop > start:
        scores, indices = exact_search(queries, StoredCandidates(cache, keys[start:stop]), top_k, **options)
        found = SearchResult(scores.cpu(), indices.cpu() + start)
    return merge_results([part for part in gather(found) if part is not None], top_k)


def _add(
    results: MBEIRResults,
    search: Search,
    ranked: _Ranked,
    corrected: _Ranked | None,
    ks: Sequence[int],
    output: Path | None,
) -> None:
    """Add one search to the results, and write its files."""
    rankings = _dids(ranked)
    row = task_result(search, rankings, ks)
    if corrected is not None:
        other = task_result(search, _dids(corrected), ks)
        row = replace(row, corrected={"score": other.score, **other.metrics})
    results.rankings[search.pool_name][search.task.name] = rankings
    results.rows.append(row)
    logger.info("%s, %s pool: hit@%d %.4f", search.task.name, row.pool, search.task.reported_k, row.score)
    if output is not None:
        write_run(output / "runs" / row.pool / f"{search.task.name}.trec", ranked)
        for folder, task_id in (("qrels", None), ("qrels_uniir", row.task_id)):
            write_qrels(output / folder / row.pool / f"{search.task.name}.txt", search.relevance, task_id)


def _dids(ranked: _Ranked) -> dict[str, list[str]]:
    return {qid: [did for did, _ in ranking] for qid, ranking in ranked.items()}


def _tell_what_is_replaced(path: Path, settings: Mapping[str, Any], searches: Sequence[Search]) -> None:
    """Warn, hours before it happens, if results of another evaluation are in the way."""
    try:
        found = MBEIRResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # nothing there, or nothing of ours
        return
    there = {"split": found.split, **found.made_from}
    reasons = [
        f"{name} is {there.get(name)!r} there and {settings.get(name)!r} here"
        for name in _NAMES_AN_EVALUATION
        if there.get(name) != settings.get(name)
    ]
    lost = {(row.pool, row.task) for row in found.rows} - {(search.pool_name, search.task) for search in searches}
    if lost:
        reasons.append(f"it has {len(lost)} rows that this one will not have")
    if reasons:
        logger.warning(
            "%s is of another evaluation (%s) and is replaced when this one is done, as are run files of the same "
            "tasks; to keep it, choose another output",
            path,
            "; ".join(reasons),
        )


def _open_cache(model: Encoder, folder: Path, made_from: Mapping[str, Any], dtype: torch.dtype) -> EmbeddingStore:
    """The stored embeddings in a folder, which must be of this model and these settings.

    Raises:
        ValueError: If they are not.
    """
    fingerprint = made_from["model_fingerprint"]
    if fingerprint is None and gather(folder.is_dir() and any(folder.iterdir()))[0]:
        raise ValueError(
            f"{str(folder)!r} holds embeddings, and nothing tells whether they are of this model: "
            f"{type(model).__name__} has no weights to compare. Give it an attribute `fingerprint`, a text that "
            "changes with the model; or choose another output_dir."
        )
    prompts = json.dumps(getattr(model, "prompts", None), sort_keys=True, default=str)
    options = made_from.get("encode_kwargs", {})
    settings = {
        "truncate_dim": made_from["truncate_dim"],
        # To read special tokens as text changes no embedding that could be made without.
        "encode_kwargs": {} if options == {"processing_kwargs": processing_of("split")} else options,
        "max_seq_length": getattr(model, "max_seq_length", None),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "default_prompt_name": getattr(model, "default_prompt_name", None),
        "model": fingerprint,
    }
    with main_process_first():
        return EmbeddingStore(folder, settings, dtype=dtype, file_format="safetensors")


def _default_device(backend: str) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and backend == "torch" else "cpu")


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in (known := list(choices)):
        raise ValueError(f"{name} is {value!r}, must be one of {known}")


def _of_model(model: Encoder, name: str | None, encode_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the results say of the model."""
    settings = settings_of_encode(encode_kwargs)
    return {
        "puma_hf": __version__,
        **{library: version(library) for library in _LIBRARIES},
        "model": name or name_of(model),
        "model_fingerprint": model_fingerprint(model),
        "truncate_dim": settings.pop("truncate_dim", None) or getattr(model, "truncate_dim", None),
        **({"encode_kwargs": settings} if settings else {}),
    }


def _of_data(data: MBEIR, name: str | None, instruction_seed: int | None) -> dict[str, Any]:
    """What the results say of the data."""
    content_hash = getattr(data, "content_hash", None)
    return {
        "data": name or data.root.resolve().name,
        **({"content_hash": content_hash} if content_hash else {}),
        "instructions": "first wording" if instruction_seed is None else f"drawn with seed {instruction_seed}",
    }
