"""M-BEIR's figures while a model trains: an evaluator for sentence-transformers' trainers.

Source: M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation.evaluator import BaseEvaluator
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.configs import Pool
from puma_hf.data.mbeir import MBEIR
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.evaluation.encoding import Pair, encode_named, float_rows, settings_of_encode
from puma_hf.evaluation.mbeir import POOLS, Search, check_ks, measure, read_searches
from puma_hf.evaluation.results import MBEIRResults
from puma_hf.evaluation.topk import SearchResult, exact_search

logger = logging.getLogger(__name__)

# Inputs of a call of `encode`: enough to sort by length, few enough for the bar to move and for what a call returns.
_PART = 512


class MBEIREvaluator(BaseEvaluator):
    """M-BEIR's table as `evaluator=` of a `PumaTrainer` or a `SentenceTransformerTrainer`.

    The figures are those of `evaluate_mbeir`, whose arguments it has. Embeddings stay in memory, so give it little
    data: a nano benchmark (see `build_nano`), or a few tasks. Files are read and checked when it is made.

    A call returns, by name, for each pool that is measured:

    - `local_score`: M-BEIR's mean of what papers report, hit@10 on the two fashion datasets and else hit@5;
    - `local_hit@1`, `local_ndcg@10`, `local_wrong_modality@1` ...: the means of the other metrics;
    - `local_<task>_score`: the score of one task, such as `local_cirr_task7_score`.

    With a name `val` they are `val_local_score` and so on; a trainer puts `eval_` before them. `primary_metric` is the
    first: for `load_best_model_at_end`, pass `metric_for_best_model=f"eval_{evaluator.primary_metric}"`.

    Args:
        data: Folder in M-BEIR's layout, a nano folder, an id on the Hub (see `open_mbeir`), or an `MBEIR`.
        name: Put before the names of the metrics.
        show_progress_bar: Whether to show how many inputs are embedded.
        encode_kwargs: Further arguments of `encode`, such as `{"truncate_dim": 256}`.

    Raises:
        ValueError: If a k is below 1, there is no such task, or `encode_kwargs` has what the evaluation sets itself.
        MBEIRFormatError: If a file is not what the format says; the message names file and line.
        FileNotFoundError: If a file or an image is missing.

    Example:

    ```python
    >>> evaluator = MBEIREvaluator("demo/emoji", split="test", tasks=["emoji_task1"], name="emoji")
    >>> evaluator.primary_metric
    'emoji_local_score'
    >>> trainer = PumaTrainer(model=model, args=args, evaluator=evaluator, loss=loss)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        data: str | Path | MBEIR,
        *,
        split: str = "val",
        tasks: Sequence[str] | None = None,
        pool: Pool = "local",
        ks: Sequence[int] = (1, 5, 10),
        batch_size: int = 32,
        instruction_seed: int | None = None,
        name: str = "",
        show_progress_bar: bool = False,
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # What is wrong shows before the training.
        check_ks(ks)
        settings_of_encode(encode_kwargs)
        self.name, self.split, self.pool, self.ks = name, split, pool, tuple(ks)
        self.instruction_seed = instruction_seed
        self.primary_metric = f"{f'{name}_' if name else ''}{POOLS[pool][0]}_score"
        self.show_progress_bar = show_progress_bar
        self._options = {"batch_size": batch_size, "show_progress_bar": False, **(encode_kwargs or {})}
        self._searches = read_searches(open_mbeir(data, split=split, tasks=tasks), split, tasks, pool, instruction_seed)
        self.tasks = [search.task for search in self._searches if search.pool_name == POOLS[pool][0]]

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure a model, a `SentenceTransformer` or anything with its `encode`: values between 0 and 1 by name.

        `epoch` and `steps` are for the model's card. The trainer logs the values and keeps them in
        `trainer_state.json`, so nothing is written to `output_path`.

        Raises:
            ValueError: If an embedding is not finite or of a wrong shape.
        """
        # The trainer may call this on one process alone: nothing here may wait for the others. Nor does it use
        # InformationRetrievalEvaluator, which has one instruction for all queries and embeds every pool anew.
        held = HeldInputs(self._searches)
        embeddings = held.embed(partial(model.encode, **self._options), show_progress_bar=self.show_progress_bar)
        results = held.results(embeddings, self.split, self.ks)
        figures = {f"{pool}_{name}": value for pool in results.pools for name, value in results.mean(pool).items()}
        figures |= {f"{row.pool}_{row.task.name}_score": row.score for row in results.rows}
        metrics: dict[str, float] = self.prefix_name_to_metrics(figures, self.name)
        logger.info("M-BEIR at step %s: %s", steps, metrics)
        if hasattr(model, "model_card_data"):
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)  # type: ignore[arg-type]
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the evaluation."""
        names = ("split", "pool", "instruction_seed")
        return {**{name: getattr(self, name) for name in names}, "tasks": [task.name for task in self.tasks]}


class HeldInputs:
    """What some searches embed, held in memory: every candidate once, then the queries with their instructions."""

    def __init__(self, searches: Sequence[Search]) -> None:
        self.searches = searches
        # By what they are, not by their did: should it mean two things in two pools, then each has its row.
        pairs: dict[Pair, None] = {(one, ""): None for search in searches for one in search.pool.values()}
        self.num_candidates = len(pairs)
        pairs |= {pair: None for search in searches for pair in search.queries}
        self.row_of = {pair: row for row, pair in enumerate(pairs)}

    def embed(
        self, encode: Callable[..., Any], *, earlier: Tensor | None = None, show_progress_bar: bool = False
    ) -> Tensor:
        """Embeddings `(len(row_of), embedding_dim)`; a call `encode(inputs, prompt=...)` has inputs of one modality.

        Of `earlier`, what another call returned, the rows of texts stay, and the others are written over.
        ValueError or FileNotFoundError if one cannot be read, with its id; ValueError if a shape is wrong.
        """
        groups: dict[tuple[str, str], list[Any]] = {}
        for record, prompt in self.row_of:
            if earlier is None or record.modality != "text":
                groups.setdefault((prompt, record.modality), []).append(record)
        embeddings = torch.empty(len(self.row_of), 0) if earlier is None else earlier  # the first rows tell the length
        total = sum(map(len, groups.values()))
        with tqdm(total=total, desc="Embedding", unit="item", disable=not show_progress_bar) as progress:
            for (prompt, _), records in groups.items():
                for part in (records[start : start + _PART] for start in range(0, len(records), _PART)):
                    found = encode_named(partial(encode, prompt=prompt), [one.model_input for one in part], part)
                    rows = float_rows(found, part, embeddings.shape[1] or None)
                    embeddings = embeddings if embeddings.shape[1] else torch.empty(len(self.row_of), rows.shape[1])
                    embeddings[[self.row_of[record, prompt] for record in part]] = rows
                    progress.update(len(part))
        return embeddings

    def results(
        self, embeddings: Tensor, split: str, ks: Sequence[int] = (1, 5, 10), *, candidates: Tensor | None = None
    ) -> MBEIRResults:
        """M-BEIR's table from what `embed` returned; its queries alone if another call returned `candidates`."""
        others = embeddings if candidates is None else candidates

        def find(group: Sequence[Search], top_k: int) -> Iterator[SearchResult]:
            pool = [self.row_of[one, ""] for one in group[0].pool.values()]
            queries = [self.row_of[pair] for search in group for pair in search.queries]
            yield exact_search(embeddings[queries], others[pool], top_k)

        return MBEIRResults(split, [row for _, row, _ in measure(self.searches, find, ks)])
