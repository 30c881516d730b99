"""Measure every depth of a model in one pass: how to choose k.

Source: PUMA, ACM MM 2025, arXiv 2507.08064 prunes to the first k layers; measuring all k at once is this library's.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.checkpoint import open_checkpoint
from puma_hf.configs import SweepConfig, parse_parameters
from puma_hf.data.mbeir import MBEIR, MBEIRTask, select_tasks
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.data.mbeir_write import build_nano
from puma_hf.evaluation.alignment import linear_cka, mean_cosine
from puma_hf.evaluation.encoding import encode_named
from puma_hf.evaluation.layer_costs import LayerCosts, layer_costs
from puma_hf.evaluation.layer_states import decoder_of, encode_all_layers, keep_last_depths, progress_bar
from puma_hf.evaluation.mbeir import NDCG_K, POOLS, Search, distinct_candidates, read_searches, task_result
from puma_hf.evaluation.results import MBEIRResults
from puma_hf.evaluation.sweep_report import SweepReport, SweepRow, SweptModel
from puma_hf.evaluation.topk import exact_search
from puma_hf.fingerprint import short_name
from puma_hf.flops import count_parameters
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.opening import open_sentence_transformer
from puma_hf.pruning import prune
from puma_hf.settings import processing_of

logger = logging.getLogger(__name__)

_KS = (1, 5, 10)
# Batches that `encode` orders by length together: enough to pad little, few enough for the bar to move.
_BATCHES_AT_ONCE = 16


@dataclass(frozen=True)
class SweepInputs:
    """What is embedded, and which rows of the embeddings are searched.

    Args:
        records: All distinct candidates, then the queries of each task.
        inputs: What the model sees of each.
        prompts: The instruction of each; empty for candidates.
        modalities: The modality of each.
        searches: The tasks and pools.
        row_of: The row of each candidate, by did.
        first_query: The row of each task's first query.
    """

    records: list[Any]
    inputs: list[Any]
    prompts: list[str]
    modalities: list[str]
    searches: list[Search]
    row_of: dict[str, int]
    first_query: dict[MBEIRTask, int]

    @classmethod
    def read(cls, data: MBEIR, tasks: Sequence[MBEIRTask], split: str, pools: Sequence[str]) -> SweepInputs:
        """Read and check every file, before anything is embedded.

        Args:
            data: The dataset.
            tasks: Its tasks.
            split: Its split.
            pools: "local", "global" or both.

        Returns:
            The inputs.

        Raises:
            MBEIRFormatError: If a file is not what the format says, or a did means two things.
        """
        searches = read_searches(data, tasks, split, pools)
        candidates = distinct_candidates(searches)
        records: list[Any] = list(candidates.values())
        prompts = [""] * len(records)
        first_query = {}
        for search in {search.task: search for search in searches}.values():
            first_query[search.task] = len(records)
            records += search.queries
            prompts += [data.instruction(query, search.task.candidate_modality) for query in search.queries]
        return cls(
            records=records,
            inputs=[record.model_input for record in records],
            prompts=prompts,
            modalities=[record.modality for record in records],
            searches=searches,
            row_of={did: row for row, did in enumerate(candidates)},
            first_query=first_query,
        )

    def num_judged(self, pool: str) -> tuple[int, ...]:
        """Queries of each task to which something in this pool is relevant: those that the figures are means of."""
        return tuple(len(search.relevance) for search in self.searches if search.pool_name == pool)

    def encode(self, model: SentenceTransformer, name: str, *, show_progress_bar: bool, **options: Any) -> Tensor:
        """The embeddings of all depths from one pass, as `encode_all_layers` orders them."""
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row, key in enumerate(zip(self.prompts, self.modalities, strict=True)):
            groups[key].append(row)
        embeddings = self._room(model, name, keep_last=options.get("keep_last", False))
        step = options["batch_size"] * _BATCHES_AT_ONCE  # what is copied is small
        with progress_bar(len(self.inputs), name, show=show_progress_bar) as progress:
            for (prompt, _), rows in groups.items():
                for start in range(0, len(rows), step):
                    part = rows[start : start + step]
                    inputs, records = [self.inputs[row] for row in part], [self.records[row] for row in part]
                    encode = partial(encode_all_layers, model, prompt=prompt, **options)
                    embeddings[:, part] = encode_named(encode, inputs, records)
                    progress.update(len(part))
        return embeddings

    def _room(self, model: SentenceTransformer, name: str, *, keep_last: bool = False) -> Tensor:
        decoder = decoder_of(model)
        depths = len(decoder.layers) + (len(keep_last_depths(model)) if keep_last else 0)
        shape = (depths, len(self.inputs), decoder.config.hidden_size)
        size = math.prod(shape) * 4
        logger.info("Embeddings of all depths of %s: %s, %.0f MB", name, shape, size / 1e6)
        try:
            return torch.empty(shape)
        except RuntimeError as error:  # torch's own says how many bytes, not what for
            raise ValueError(
                f"The embeddings of {shape[1]:,} inputs at {shape[0]} depths take {size / 1e9:,.1f} GB, which must fit "
                "into memory. Choose fewer candidates or tasks."
            ) from error

    def results(self, embeddings: Tensor, split: str) -> MBEIRResults:
        """M-BEIR's table for one depth; `embeddings` is `(len(inputs), hidden_size)`."""
        rows = []
        for search in self.searches:
            first, dids = self.first_query[search.task], list(search.pool)
            queries = embeddings[first : first + len(search.queries)]
            pool = embeddings[[self.row_of[did] for did in dids]]
            found = exact_search(queries, pool, max(*_KS, NDCG_K, search.task.reported_k))
            ranked = [[dids[index] for index in ranking] for ranking in found.indices.tolist()]
            rankings = {query.qid: ranking for query, ranking in zip(search.queries, ranked, strict=True)}
            rows.append(task_result(search, rankings, _KS))
        return MBEIRResults(split=split, rows=rows)


def sweep(config: SweepConfig, *, show_progress_bar: bool = True) -> SweepReport:
    """Measure every depth of a model, and of those it is compared with, in one forward pass of each.

    Args:
        config: The model, the data, and what to decide by.
        show_progress_bar: Whether to show the progress.

    Returns:
        Quality, closeness to the full model, and costs of every k; it recommends one.

    Raises:
        ValueError: If a model is no Qwen2-VL, 2.5 or 3, the budget is below the first layer, or this is one of several
            processes.
        MBEIRFormatError: If a file of the data is not what the format says.
        FileNotFoundError: If a model, a file or an image is missing.
        ImportError: If `output` is given and matplotlib is not installed.

    Example:
        >>> from puma_hf.configs import SweepConfig
        >>> report = sweep(SweepConfig(model="demo/backbone", data="demo/emoji"))  # doctest: +SKIP
        >>> print(report.recommendation.reason)  # doctest: +SKIP
    """
    _check_one_process()
    if config.output is not None:  # better now than after an hour
        _make_output(config.output)
    budget = None if config.max_params is None else parse_parameters(config.max_params)
    with ExitStack() as stack:
        data = _open_data(config, stack)
        tasks = select_tasks(data.tasks(config.split), config.tasks or None)
        inputs = SweepInputs.read(data, tasks, config.split, POOLS[config.pool])
        sources = [str(config.model), *config.compare]
        _check_sources(sources, budget)
        swept: list[SweptModel] = []
        teacher: Tensor | None = None
        for source, name in zip(sources, _names(sources), strict=True):
            with open_model(source, trust_remote_code=config.trust_remote_code) as model:
                costs = layer_costs(model)
                embeddings = inputs.encode(
                    model,
                    name,
                    batch_size=config.batch_size,
                    keep_last=config.keep_last,
                    processing_kwargs=processing_of(config.special_tokens),
                    show_progress_bar=show_progress_bar,
                )
                # Not every accelerator knows float64.
                device = model.device if model.device.type == "cuda" else torch.device("cpu")
                depths = [*range(1, len(decoder_of(model).layers) + 1)]
                joined = [*keep_last_depths(model)] if config.keep_last else []
            full = embeddings[len(depths) - 1]
            if teacher is None:
                teacher, tokens = full.clone(), (costs.text_tokens, costs.image_tokens)
            rows = _rows(inputs, zip(depths, embeddings, strict=False), teacher.to(device), costs, config.split)
            swept.append(SweptModel(name, rows))
            if joined:  # the full model ends that curve, too
                joins = zip(joined, embeddings[len(depths) :], strict=True)
                others = _rows(inputs, joins, teacher.to(device), costs, config.split)
                swept.append(SweptModel(f"{name}, first k - 1 layers and the last", (*others, rows[-1])))
        judged = inputs.num_judged(POOLS[config.pool][0])
        report = SweepReport(
            models=tuple(swept),
            data=short_name(config.data),
            data_hash=data.content_hash,
            split=config.split,
            tasks=tuple(task.name for task in tasks),
            num_queries=sum(judged),
            task_queries=judged,
            num_candidates=len(inputs.row_of),
            pool=POOLS[config.pool][0],
            metric=config.metric,
            text_tokens=tokens[0],
            image_tokens=tokens[1],
            keep=config.keep,
            max_params=budget,
        )
    if config.output is not None:
        try:
            report.save(config.output)
        except OSError:
            logger.error("The files could not be written. What was measured:\n%s", report.to_markdown())
            raise
    return report


def _rows(
    inputs: SweepInputs, depths: Iterable[tuple[int, Tensor]], teacher: Tensor, costs: LayerCosts, split: str
) -> tuple[SweepRow, ...]:
    """One row for each k and its embeddings; all layers cost the same, so it is k that tells the costs."""
    rows = []
    for k, depth in depths:
        number = k - 1
        results = inputs.results(depth, split)
        on_device = depth.to(teacher.device)
        cka = linear_cka(on_device, teacher)
        rows.append(
            SweepRow(
                k=k,
                parameters=costs.parameters[number],
                bytes=costs.bytes[number],
                flops_text=costs.flops_text[number],
                flops_image=costs.flops_image[number],
                cka=None if math.isnan(cka) else cka,
                cosine=mean_cosine(on_device, teacher) if depth.shape == teacher.shape else None,
                quality={pool: results.mean(pool) for pool in results.pools},
                scores={
                    pool: {row.task.name: row.score for row in results.rows if row.pool == pool}
                    for pool in results.pools
                },
            )
        )
    return tuple(rows)


def _make_output(output: str | Path) -> None:
    from puma_hf.evaluation.sweep_plot import load_matplotlib

    load_matplotlib()
    Path(output).mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"output={str(output)!r} may not be written to. Name another directory.")


def _check_one_process() -> None:
    if (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"The sweep was started in {count} processes, must be in one: each would do all the work and write the "
            "same files. Start it without torchrun or accelerate launch."
        )


def _check_sources(sources: Sequence[str], budget: int | None) -> None:
    """Find what is wrong with the last model before the first is embedded; no weights are read."""
    smallest = {}
    for source in sources:
        folder = open_checkpoint(source).folder
        config_class = config_class_of(_model_type(folder))
        config = config_class.from_pretrained(folder, num_kept_layers=1)
        with torch.device("meta"):
            smallest[source] = count_parameters(MODEL_CLASSES[config_class](config))
    least = min(smallest, key=lambda source: smallest[source])
    if budget is not None and smallest[least] > budget:
        raise ValueError(
            f"max_params={budget:,} must be at least {smallest[least]:,}, the parameters of {short_name(least)} cut to "
            "k = 1. Raise the budget, or sweep a smaller model."
        )


def _model_type(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


@contextmanager
def open_model(source: str, *, trust_remote_code: bool = False) -> Iterator[SentenceTransformer]:
    """A PUMA directory as it is; an original checkpoint with `[RET]`, its processor and all its layers.

    Args:
        source: Folder or Hub id.
        trust_remote_code: Whether to run the code of a Hub repository; a local directory's is run.

    Yields:
        The model. An original checkpoint is given what it lacks in a temporary directory, gone when the block ends.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no Qwen2-VL, 2.5 or 3.
    """
    checkpoint = open_checkpoint(source)
    model_type = _model_type(checkpoint.folder)
    config_class = config_class_of(model_type)
    if model_type == config_class.model_type:
        yield open_sentence_transformer(source, trust_remote_code=trust_remote_code)
        return
    with TemporaryDirectory(prefix="puma-hf-") as folder:
        logger.info("%s is an original checkpoint: it gets [RET] in a temporary copy of all its layers", source)
        full = Path(folder, short_name(source))
        prune(source, full, num_kept_layers=config_class.from_pretrained(checkpoint.folder).num_kept_layers)
        yield open_sentence_transformer(str(full))


def _open_data(config: SweepConfig, stack: ExitStack) -> MBEIR:
    tasks = config.tasks or None
    data = open_mbeir(config.data, split=config.split, tasks=tasks)
    if not config.nano_queries and not config.nano_candidates:
        return data
    folder = stack.enter_context(TemporaryDirectory(prefix="puma-hf-"))
    return build_nano(
        data,
        Path(folder, "nano"),
        split=config.split,
        tasks=tasks,
        num_queries=config.nano_queries,
        num_candidates=config.nano_candidates,
        seed=config.nano_seed,
    )


def _names(sources: Sequence[str]) -> list[str]:
    """A short name of each, or all of it where two would be called the same."""
    short = [short_name(source) for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
