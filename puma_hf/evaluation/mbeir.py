"""M-BEIR's table: every task against its own pool, the pool of all tasks, or both.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from sentence_transformers import SentenceTransformer

from puma_hf import __version__
from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import EvaluateConfig, Pool, SweepConfig
from puma_hf.data.mbeir import MBEIR, Candidate, Query
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.data.mbeir_write import build_nano
from puma_hf.data.records import MBEIRFormatError
from puma_hf.data.tasks import MBEIRTask, select_tasks
from puma_hf.embedding.embed import embedding_dim, image_settings, processing_for
from puma_hf.embedding.store import EmbeddingStore
from puma_hf.evaluation.encoding import SHARD_SIZE, embed_into, settings_of_encode
from puma_hf.evaluation.metrics import overlap_at_k, retrieval_metrics, wrong_modality_at_k
from puma_hf.evaluation.results import MBEIRResults, MBEIRTaskResult, Ranking, write_qrels, write_run
from puma_hf.evaluation.topk import SearchResult, exact_search, less_popular, merge_results
from puma_hf.files import read_config, write_whole
from puma_hf.fingerprint import model_fingerprint, noted, short_name
from puma_hf.fingerprint import model_name as name_of
from puma_hf.modeling.configuration_puma import CONFIG_CLASSES
from puma_hf.processes import broadcast, connect, gather, main_process_first, own_device, shared_folder
from puma_hf.settings import processing_of

NDCG_K = 10
POOLS: dict[str, tuple[str, ...]] = {"local": ("local",), "global": ("global",), "both": ("local", "global")}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_Find = Callable[[Sequence["Search"], int], Iterable[SearchResult]]
_BLOCK = 4096  # rows that a search reads at once
# Their releases may change the last digits of an embedding.
_LIBRARIES = ("torch", "transformers", "sentence-transformers")


# --- what is searched, and the rows of the table


@dataclass(frozen=True)
class Search:
    """One task against one pool: queries with their instructions, and those of them that have an answer in the pool."""

    task: MBEIRTask
    pool_name: str
    pool: Mapping[str, Candidate]
    queries: list[tuple[Query, str]]
    relevance: dict[str, dict[str, int]]


def read_searches(
    data: MBEIR, split: str, tasks: Sequence[str] | None, pool: Pool, seed: int | None = None
) -> list[Search]:
    """Read and check the files of an evaluation: for each pool, a search a task; the global pool is read once.

    Tasks are names, None for all. Instructions have the first wording, or one that is drawn by a seed.
    """
    queries = {task: data.queries(task, split) for task in select_tasks(data.tasks(split), tasks)}
    searches = []
    for pool_name in POOLS[pool]:
        global_pool = data.global_pool(split) if pool_name == "global" else None
        for task in queries:
            candidates = data.local_pool(task, split) if global_pool is None else global_pool
            qrels = data.qrels(task, split, queries[task], candidates)
            # The others are left out of the means, as M-BEIR does; the table says how many.
            relevance = {qid: judged for qid, judged in qrels.items() if judged}
            if not relevance:
                problem = f"no query of {task.name} ({split}) has a relevant candidate in its {pool_name} pool"
                raise MBEIRFormatError(f"{data.root}: {problem}; look at its qrels, or name the other tasks (--tasks)")
            prompted = [(one, data.instruction(one, task.candidate_modality, seed)) for one in queries[task]]
            searches.append(Search(task, pool_name, candidates, prompted, relevance))
    return searches


def measure(
    searches: Sequence[Search], find: _Find, ks: Sequence[int], *, has_reference: bool = False
) -> Iterator[tuple[Search, MBEIRTaskResult, Ranking]]:
    """The row of each search, and for each qid the dids and scores of the best candidates.

    `find(searches, top_k)` returns the best candidates of all queries of some searches of one pool. A second result, if
    there is one, has the popularity-corrected figures; the last one, with `has_reference`, what the first is to find.
    """
    top_k = max(*ks, NDCG_K, *(search.task.reported_k for search in searches))
    # Searches of one pool go together: its embeddings are read once for all tasks.
    for pool in {id(search.pool): search.pool for search in searches}.values():
        group = [search for search in searches if search.pool is pool]
        tables = []
        for found in find(group, top_k):
            # Of the dids of a pool, which are read one after the other, those that were found are kept.
            wanted = set(found.indices.flatten().tolist())
            dids = {row: did for row, did in enumerate(pool) if row in wanted}
            best = zip(found.indices.tolist(), found.scores.tolist(), strict=True)
            pairs = ([(dids[row], score) for row, score in zip(*one, strict=True)] for one in best)
            tables.append([{query.id: next(pairs) for query, _ in search.queries} for search in group])
        for search, ranking, *corrected in zip(group, *tables, strict=True):
            row = task_result(search, ranking, ks, corrected.pop() if has_reference else None)
            for other in (task_result(search, one, ks) for one in corrected):
                row = replace(row, corrected={"score": other.score, **other.metrics})
            yield search, row, ranking


def task_result(
    search: Search, rankings: Ranking, ks: Sequence[int], reference: Ranking | None = None
) -> MBEIRTaskResult:
    """The row of one search; its metrics, the overlap with a reference too, are means over `search.relevance`."""
    task, judged = search.task, list(search.relevance.values())
    ranked = [[did for did, _ in rankings[qid]] for qid in search.relevance]
    metrics = retrieval_metrics(ranked, judged, sorted({*ks, task.reported_k}), ndcg_k=NDCG_K)
    score = metrics[f"hit@{task.reported_k}"]
    if task.reported_k not in ks:  # every row must have the same metrics
        del metrics[f"hit@{task.reported_k}"], metrics[f"recall@{task.reported_k}"]
    # Of a pool of millions only what is looked at.
    modalities = {did: search.pool[did].modality for dids in (*ranked, *judged) for did in dids}
    for k in sorted({1, *ks}):
        metrics[f"wrong_modality@{k}"] = wrong_modality_at_k(ranked, judged, modalities, k)
    if reference is not None:
        wanted = [[did for did, _ in reference[qid]] for qid in search.relevance]
        metrics[f"overlap@{NDCG_K}"] = overlap_at_k(ranked, wanted, NDCG_K)
    counts = (len(search.pool), len(judged), len(search.queries) - len(judged))
    return MBEIRTaskResult(task.dataset, task.task_id, search.pool_name, *counts, score, metrics)


def check_ks(ks: Sequence[int]) -> None:
    """ValueError for a wrong k, which the metrics would find only after everything is embedded."""
    if min(ks, default=0) < 1:
        raise ValueError(f"ks is {list(ks)}, must be numbers of 1 or more, such as (1, 5, 10).")


# --- the evaluation


def evaluate_mbeir(
    model: Any,
    data: str | Path | MBEIR,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    pool: Pool = "local",
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 32,
    instruction_seed: int | None = None,
    popularity_penalty: float | None = None,
    candidates_model: Any = None,
    candidates_dir: str | Path | None = None,
    candidates_kwargs: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    embedding_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    show_progress_bar: bool = True,
    encode_kwargs: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    model_name: str | None = None,
    data_name: str | None = None,
) -> MBEIRResults:
    """Measure a model on M-BEIR or any dataset in its layout.

    Each distinct candidate is encoded once, without instruction, queries with their task's instruction as `prompt`.
    Inputs of one modality go together: text, `{"image": path}`, or `{"image": path, "text": ...}`.

    Embeddings go to the disk shard by shard: with an `output_dir`, a run that was stopped goes on where it was. Started
    by `accelerate launch` or `torchrun`, every process embeds and searches a share; all return the same results.

    Args:
        model: A `SentenceTransformer` or anything with its `encode`.
        data: Folder in M-BEIR's layout or of parquet copies, an id on the Hub (see `open_mbeir`), or an `MBEIR`.
        split: Split to evaluate.
        tasks: Names such as "webqa_task1"; None for all of the split.
        pool: "local" for each task's own pool, "global" for the pool of all tasks, or "both".
        ks: The k of hit@k, recall@k and wrong_modality@k.
        batch_size: Inputs of one forward pass. A PUMA fills its batches by tokens: below 32, by 512 for each input.
        instruction_seed: None for the first wording of each instruction, a number to draw one a query.
        popularity_penalty: Also report figures by `similarity - penalty * mean similarity of the candidate to all
            queries of the task`, between 0 and 1; see `less_popular`. Rankings and run files stay the plain ones.
        candidates_model: Embeds the candidates in place of `model`, such as its teacher. Also reported is overlap@10:
            the share of the best ten of this model's own queries that `model`'s find, too.
        candidates_dir: `output_dir` of that model, whose embeddings are shared; None for `output_dir/candidates`.
        candidates_kwargs: Its `encode_kwargs`, if they are others.
        output_dir: Where to keep `embeddings/` and write `results.json`, `results.md`, and for trec_eval
            `runs/<pool>/<task>.trec` and `qrels/<pool>/<task>.txt`; None for nowhere. Earlier results are replaced.
        embedding_dtype: Data type that embeddings are stored in.
        show_progress_bar: Whether to show how many inputs are embedded, and the time that is left.
        encode_kwargs: Further arguments of `encode`, but for the prompt and the precision.
        shard_size: Inputs of one stored shard; a process that is stopped loses at most so many.
        model_name: What the results call the model; None for its own name.
        data_name: What the results call the data; None for the name of the folder.

    Returns:
        One row a task and pool, the rankings, and what they were made from.

    Raises:
        ValueError: If `ks` or `popularity_penalty` is out of range, an embedding is not finite, `output_dir` holds
            embeddings of another model or setting, or the two models' have different dimensions.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:
        >>> results = evaluate_mbeir(model, "demo/emoji", pool="both")  # doctest: +SKIP
        >>> print(results.to_markdown())  # doctest: +SKIP
    """
    check_ks(ks)
    if not 0 <= (popularity_penalty or 0) <= 1:
        raise ValueError(f"popularity_penalty is {popularity_penalty}, must be from 0 to 1, such as 0.2, or None.")
    opened = open_mbeir(data, split=split, tasks=tasks)
    made_from = _made_from(model, opened, settings_of_encode(encode_kwargs), model_name, data_name)
    made_from["instructions"] = "first wording" if instruction_seed is None else f"drawn with seed {instruction_seed}"
    made_from |= {"pool": pool, "embedding_dtype": embedding_dtype}
    made_from |= {} if popularity_penalty is None else {"popularity_penalty": popularity_penalty}
    other, has_other = made_from, candidates_model is not None
    candidates_kwargs = encode_kwargs if candidates_kwargs is None else candidates_kwargs
    if has_other:
        other = _with_candidates(model, candidates_model, made_from, opened, settings_of_encode(candidates_kwargs))
    results = MBEIRResults(split, [], {name: {} for name in POOLS[pool]}, made_from)
    rank, num_processes = connect()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with shared_folder(output_dir) as folder, ExitStack() as stack:
        options: dict[str, Any] = {"shard_size": shard_size, "show_progress_bar": show_progress_bar}
        options |= {"batch_size": batch_size, "root": opened.image_root}
        store = targets = _open_store(folder / "embeddings", made_from)
        embed = embed_other = partial(embed_into, store, model, **options | dict(encode_kwargs or {}))
        if has_other:
            other_folder = stack.enter_context(shared_folder(candidates_dir or folder / "candidates"))
            targets = _open_store(other_folder / "embeddings", other)
            embed_other = partial(embed_into, targets, candidates_model, **options | dict(candidates_kwargs or {}))
        # Every file is read and checked before anything is encoded.
        searches = read_searches(opened, split, tasks, pool, instruction_seed)

        def find(group: Sequence[Search], top_k: int) -> Iterator[SearchResult]:
            # A pool's keys, 8 bytes a candidate, are what is held of it; its rows stay in their files.
            candidates = group[0].pool
            keys = embed_other(pairs=((one, "") for one in candidates.values()), total=len(candidates))
            queries = [pair for search in group for pair in search.queries]
            plain = store.rows(embed(pairs=queries, total=len(queries)))
            rows = [plain]
            if popularity_penalty is not None:
                # Each task by the popularity among its own queries, as if it were evaluated alone.
                by_task = plain.split([len(search.queries) for search in group])
                rows.append(torch.cat([less_popular(own, popularity_penalty) for own in by_task]))
            if has_other:
                rows.append(targets.rows(embed_other(pairs=queries, total=len(queries))))
            # Each process searches its slice of the pool.
            start, stop = (len(keys) * edge // num_processes for edge in (rank, rank + 1))
            for one in rows:
                blocks = ((first + start, block) for first, block in targets.blocks(keys[start:stop], _BLOCK))
                found = exact_search(one, blocks, top_k, block_size=_BLOCK, device=device)
                yield merge_results(gather(found), top_k)

        output = folder if output_dir is not None and rank == 0 else None
        for search, row, ranking in measure(searches, find, ks, has_reference=has_other):
            results.rows.append(row)
            dids = {qid: [did for did, _ in best] for qid, best in ranking.items()}
            results.rankings[search.pool_name][search.task.name] = dids
            if output is not None:
                path = f"{search.pool_name}/{search.task.name}"
                write_run(output / f"runs/{path}.trec", ranking)
                write_qrels(output / f"qrels/{path}.txt", search.relevance)
        if output is not None:
            results.to_json(output / "results.json")
            write_whole(output / "results.md", results.to_markdown().encode())
    return results


def _with_candidates(model: Any, other: Any, made_from: Any, data: MBEIR, encoding: dict[str, Any]) -> dict[str, Any]:
    """What the candidates' embeddings are made from, whose model is noted in `made_from`; ValueError if none fit."""
    theirs = _made_from(other, data, encoding, None, None) | {"embedding_dtype": made_from["embedding_dtype"]}
    made_from |= {"candidates_model": theirs["model"], "candidates_fingerprint": theirs["model_fingerprint"]}
    if "num_kept_layers" in theirs:
        made_from["candidates_num_kept_layers"] = theirs["num_kept_layers"]
    pairs = ((model, made_from["truncate_dim"]), (other, theirs["truncate_dim"]))
    # Of what else has an `encode` only the rows tell.
    dims = [embedding_dim(*pair) for pair in pairs if isinstance(pair[0], SentenceTransformer)]
    if len({*dims}) > 1:
        problem = f"The model's embeddings have {dims[0]} dimensions and those of candidates_model {dims[1]}: none can"
        raise ValueError(f"{problem} be compared. Take the teacher that the model was distilled towards.")
    return theirs


def _made_from(
    model: Any, data: MBEIR, encoding: dict[str, Any], model_name: str | None, data_name: str | None
) -> dict[str, Any]:
    values: dict[str, Any] = {"puma_hf": __version__, **{library: version(library) for library in _LIBRARIES}}
    values |= {"model": model_name or name_of(model), "model_fingerprint": model_fingerprint(model)}
    values["truncate_dim"] = encoding.pop("truncate_dim", None) or getattr(model, "truncate_dim", None)
    processing: dict[str, Any] = encoding.pop("processing_kwargs", None) or {}
    # How images are read is told for every result, whoever has decided it.
    images = image_settings(model, processing)
    seen = {**images, "num_kept_layers": noted(model, "num_kept_layers")}
    values |= {name: value for name, value in seen.items() if value is not None}
    image = {name: value for name, value in processing.pop("image", {}).items() if name not in images}
    processing |= {"image": image} if image else {}
    encoding |= {"processing_kwargs": processing} if processing else {}
    values |= {"encode_kwargs": encoding} if encoding else {}
    values["data"] = data_name or data.root.resolve().name
    return values | ({"content_hash": data.content_hash} if data.content_hash else {})


def _open_store(folder: Path, made_from: Mapping[str, Any]) -> EmbeddingStore:
    # The store refuses embeddings of another model or of other settings. Of a model without a fingerprint nothing
    # tells whether they are its own: none are.
    fingerprint = made_from["model_fingerprint"] or broadcast(f"unknown, {uuid4().hex}")
    # To read special tokens as text changes no embedding that could be made without.
    options = made_from.get("encode_kwargs", {})
    options = {} if options == {"processing_kwargs": processing_of("split")} else options
    settings = {"model": fingerprint, "truncate_dim": made_from["truncate_dim"], "encode_kwargs": options}
    settings |= {name: made_from.get(name) for name in ("max_pixels", "decode", "num_kept_layers")}
    with main_process_first():
        dtype = _DTYPES[made_from["embedding_dtype"]]
        return EmbeddingStore(folder, settings, dtype=dtype, file_format="safetensors")


# --- the command


def evaluate(config: EvaluateConfig) -> MBEIRResults:
    """Measure a model on M-BEIR, on data in its layout, or on a small subset of either, as `puma-hf evaluate` does.

    Args:
        config: What to measure, on what, and how.

    Raises:
        FileNotFoundError: If the model, the data, the split or an image is missing.
        ValueError: If the data are wrong, the output holds embeddings of another model or setting, or `truncate_dim`
            is more than the model has.
        DirectoryInUseError: If another run writes into the output.

    Example:
        >>> config = EvaluateConfig(model="puma-k4-mac", data="demo/emoji", output="results")
        >>> print(evaluate(config).to_markdown())  # doctest: +SKIP
    """
    for name in (config.model, *([] if config.candidates_model is None else [config.candidates_model])):
        kind = read_config(Path(name)).get("model_type")
        is_original = kind in [config_class.source_model_type for config_class in CONFIG_CLASSES]
        if is_original and not Path(name, "modules.json").is_file():  # sentence-transformers would pool its tokens
            remedy = f"Make one of it first: puma-hf prune {name} OUTPUT --num-kept-layers K (or all of them)."
            raise ValueError(f"{name!r} is an original {kind} checkpoint, must be an embedder. {remedy}")
    names = ("split", "pool", "batch_size", "instruction_seed", "popularity_penalty", "embedding_dtype")
    options = {**config.given(*names), "tasks": config.tasks or None, "output_dir": config.output}
    options["model_name"] = short_name(config.model)
    options["data_name"] = short_name(config.data) + (" (nano)" if config.benchmark == "nano" else "")
    with shared_folder(config.output) as folder:
        with main_process_first():  # it imports and draws, the others read what it made
            where: dict[str, Any] = {"split": config.split, "tasks": config.tasks or None}
            data = open_mbeir(config.data, revision=config.data_revision, **where)
            if config.benchmark == "nano":
                data = draw_nano(data, config.nano_folder or folder / "nano", config)
        depths = [given or config.num_kept_layers for given in (config.query_layers, config.candidate_layers)]
        model, options["encode_kwargs"] = _open(config, config.model, config.revision, depths[0])
        other: tuple[Any, ...] = (config.candidates_model, None, None)
        if config.query_layers or config.candidate_layers:
            other = (config.model, config.revision, depths[1])
        if other[0] is not None:
            options["candidates_model"], options["candidates_kwargs"] = _open(config, *other)
            options["candidates_dir"] = config.candidates_output
        return evaluate_mbeir(model, data, **options)


def _open(
    config: EvaluateConfig, name: str, revision: str | None, num_kept_layers: int | None
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """A model, or its first layers, and the arguments of its `encode`."""
    loading = {"truncate_dim": config.truncate_dim, "trust_remote_code": config.trust_remote_code}
    model = open_sentence_transformer(name, num_kept_layers, device=own_device(), revision=revision, **loading)
    if config.truncate_dim is not None:
        embedding_dim(model, config.truncate_dim)  # so many there must be
    processing = processing_for(model, config.special_tokens, config.max_pixels, config.decode)
    return model, {"processing_kwargs": processing} if processing else {}


def draw_nano(data: MBEIR, folder: str | Path, config: EvaluateConfig | SweepConfig) -> MBEIR:
    """The seeded subset that the settings of a command describe, written into a folder."""
    numbers = {"num_queries": config.nano_queries, "num_candidates": config.nano_candidates}
    return build_nano(data, folder, split=config.split, tasks=config.tasks or None, seed=config.nano_seed, **numbers)
