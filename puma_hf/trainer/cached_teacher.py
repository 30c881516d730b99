"""The cached teacher: another teacher's states, computed once over the dataset, after which its layers are freed."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.losses.distillation_puma import TEACHER_KEY
from puma_hf.losses.mac_puma import CONTENT_KEY
from puma_hf.trainer.teacher_base import RunningTeacher, Teacher
from puma_hf.trainer.teacher_cache import CacheManifest, StoredStates, TeacherCache
from puma_hf.trainer.teacher_fingerprint import datasets_sha256

logger = logging.getLogger(__name__)

Part = tuple[Dataset, str]


class CachedTeacher(Teacher):
    """Looks the states up that `compute_states` has stored.

    Args:
        states: The stored states.

    Example:

    ```python
    >>> from puma_hf import PumaDistillationTrainer

    >>> trainer = PumaDistillationTrainer(model=model, teacher_mode="cached", args=args,
    ...                                   train_dataset=dataset)  # doctest: +SKIP
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation; storing the states is this
    library's addition.
    """

    def __init__(self, states: StoredStates) -> None:
        self.stored = states

    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` `(batch_size, hidden_size)` into the features of one column.

        Raises:
            ValueError: If the features have no content ids, or one that was not stored.
        """
        ids = content_ids_of(features)
        features[TEACHER_KEY] = self.stored.lookup(ids).to(ids.device)


def content_ids_of(features: Mapping[str, Any]) -> Tensor:
    """The content ids `(batch_size,)` of a column.

    Raises:
        ValueError: If there are none.
    """
    ids = features.get(CONTENT_KEY)
    if ids is None:
        raise ValueError(
            f"the features {sorted(features)} have no {CONTENT_KEY!r}, by which stored teacher states are found. Use a "
            "PUMA model whose input module adds them (prune it again with this version), or teacher_mode='frozen'."
        )
    found: Tensor = ids
    return found


@dataclass(frozen=True)
class StatesJob:
    """How the states of a dataset are computed.

    Attributes:
        parts: Each dataset of a single column, with the column's name.
        collate: Makes a batch of rows.
        collect: Makes the features of each column from a batch, on the teacher's device.
        batch_size: Cells per batch.
        autocast: Context of a forward pass.
        show_progress: Whether to show a bar.
    """

    parts: Sequence[Part]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    collect: Callable[[dict[str, Any]], list[dict[str, Any]]]
    batch_size: int
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    show_progress: bool = True

    @property
    def num_items(self) -> int:
        """Cells in all, equal ones counted each time."""
        return sum(len(dataset) for dataset, _ in self.parts)

    def dataset_sha256(self) -> str:
        """Fingerprint of the content of all parts."""
        return datasets_sha256(self.parts)

    def ranges(self, shard_size: int) -> list[tuple[Dataset, str, range]]:
        """The cells of each shard; none holds cells of two parts."""
        return [
            (dataset, column, range(begin, min(begin + shard_size, len(dataset))))
            for dataset, column in self.parts
            for begin in range(0, len(dataset), shard_size)
        ]

    def features(self, dataset: Dataset, rows: Sequence[int]) -> dict[str, Any]:
        """Features of some rows of a part."""
        (features,) = self.collect(self.collate([dataset[row] for row in rows]))
        return features


def quiet_collator(collator: Any) -> Any:
    """A data collator that takes one column at a time without a word about the order of columns."""
    quiet = copy.copy(collator)
    quiet.maybe_warn_about_column_order = lambda column_names: None
    return quiet


def cached_teacher(
    folder: str | Path,
    expected: CacheManifest,
    load: Callable[[], RunningTeacher],
    job: StatesJob,
) -> CachedTeacher:
    """Open the cache in `folder`; the main process first computes what is missing, the others wait for it.

    A long computation needs a long `ddp_timeout` in the training arguments, or one run without a launcher before.

    Args:
        folder: Directory of the cache.
        expected: What its manifest must say. `teacher` is filled in once the teacher is loaded.
        load: Loads the teacher, which is let go afterwards; not called if the cache is complete.
        job: How the states are computed.

    Raises:
        NotADirectoryError: If `folder` is a file.
        OSError: If the disk is full.
        ValueError: If the cache in `folder` is of another teacher, dataset, hidden size or processing.
        RuntimeError: If the main process left no complete cache that this process can read.
    """
    cache, state = TeacherCache(folder), PartialState()
    if state.is_main_process and not _is_known(cache, expected, job):
        compute_states(cache, expected, load(), job)
        # The layers went with the last reference to the teacher, except for what a cycle may hold.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    state.wait_for_everyone()
    shards = _shards(cache, expected, job)
    if shards is None:
        raise RuntimeError(
            f"The teacher states in {str(cache.folder)!r} are not complete for process {state.process_index}, although "
            "the main process has computed them. Choose a directory that all machines share: teacher_cache=..."
        )
    return CachedTeacher(StoredStates(shards, cache.folder))


def compute_states(cache: TeacherCache, expected: CacheManifest, teacher: RunningTeacher, job: StatesJob) -> None:
    """Compute the states of all cells that no readable shard holds, shard by shard, and mark the cache complete.

    A run that was killed is continued: its shards are kept, and the rest comes out as it would have.

    Raises:
        OSError: If the disk is full.
        ValueError: If the cache is of another teacher, dataset, hidden size or processing.
    """
    expected = replace(expected, teacher=teacher.fingerprint())
    found = cache.check(expected)
    # The size of a shard decides which cells share a batch.
    manifest = replace(expected, shard_size=found.shard_size) if found is not None else expected
    cache.write_manifest(manifest)
    cache.remove_temporary()
    ranges = job.ranges(manifest.shard_size)
    seen: set[int] = set()
    with tqdm(total=job.num_items, desc="Teacher states", unit="item", disable=not job.show_progress) as progress:
        for number, (dataset, column, rows) in enumerate(ranges):
            shard = cache.read_shard(number, manifest)
            if shard is None:
                shard = _compute_shard(teacher, job, dataset, column, rows, seen, manifest.hidden_size)
                cache.write_shard(number, *shard, dataset=manifest.dataset)
            seen.update(shard[0].tolist())
            progress.update(len(rows))
    cache.write_manifest(replace(manifest, complete=True))
    logger.info("Stored the teacher's states of %d different inputs in %s", len(seen), cache.folder)


def _compute_shard(
    teacher: RunningTeacher,
    job: StatesJob,
    dataset: Dataset,
    column: str,
    rows: range,
    seen: set[int],
    hidden_size: int,
) -> tuple[Tensor, Tensor]:
    """Content ids and states of those cells whose content was not seen before, in their order."""
    all_ids, all_states, known = [torch.empty(0, dtype=torch.long)], [torch.empty(0, hidden_size)], set(seen)
    for batch in _batches(rows, job.batch_size):
        features = job.features(dataset, batch)
        ids = content_ids_of(features).cpu()
        new = []
        for row, content in zip(batch, ids.tolist(), strict=True):
            if content not in known:
                known.add(content)
                new.append(row)
        if not new:
            continue
        if len(new) < len(batch):
            features = job.features(dataset, new)
            ids = content_ids_of(features).cpu()
        with job.autocast():
            states = teacher.states(features).float().cpu()
        if not torch.isfinite(states).all():
            raise ValueError(
                f"The teacher's states of some of the rows {new[0]} to {new[-1]} of column {column!r} are NaN or "
                "infinite. Run the teacher in bfloat16 or float32 instead of float16, or look at these rows."
            )
        all_ids.append(ids)
        all_states.append(states)
    return torch.cat(all_ids), torch.cat(all_states)


def _batches(rows: range, size: int) -> Iterator[range]:
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def _is_known(cache: TeacherCache, expected: CacheManifest, job: StatesJob) -> bool:
    """Whether the cache is whole, and known to be of the expected teacher without loading it."""
    found = cache.check(expected)
    known = found is not None and expected.checkpoint is not None and found.checkpoint == expected.checkpoint
    return known and _shards(cache, expected, job) is not None


def _shards(cache: TeacherCache, expected: CacheManifest, job: StatesJob) -> list[tuple[Tensor, Tensor]] | None:
    """All shards, or None if the cache is not whole."""
    found = cache.check(expected)
    if found is None or not found.complete:
        return None
    shards = []
    for number in range(len(job.ranges(found.shard_size))):
        shard = cache.read_shard(number, found)
        if shard is None:
            logger.warning("Shard %d of the teacher states in %s is damaged or gone.", number, cache.folder)
            return None
        shards.append(shard)
    return shards
