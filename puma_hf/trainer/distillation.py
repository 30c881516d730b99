"""Self-distillation of a pruned model from the model it was cut from, asked at every step or once before."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor, nn

from puma_hf.configs import TeacherMode
from puma_hf.fingerprint import image_content, model_settings
from puma_hf.losses.distillation_puma import TEACHER_KEY, SelfDistillationLoss
from puma_hf.losses.progress_puma import find_losses
from puma_hf.modeling.inputs_puma import is_image_name
from puma_hf.settings import convert
from puma_hf.trainer.lora_puma import puma_model
from puma_hf.trainer.teachers import FrozenTeacher, Teacher, TeacherSource, find_teacher, is_of_adapter, with_rows
from puma_hf.trainer.trainer_puma import PumaTrainer

logger = logging.getLogger(__name__)

STATES = "teacher_states"  # the label column, (num_columns, hidden_size) in each row
# Rows of a file of stored states: what a killed computation loses at most. A state of 1,536 numbers takes 6 KiB.
ROWS_PER_FILE = 4096


class PumaDistillationTrainer(PumaTrainer):
    """Trains a pruned model to reach after k layers the `[RET]` state that the full model reaches after all.

    No labels are needed, and one column of inputs is enough. Give the model a LoRA adapter first (`add_lora`).

    Args:
        args: The arguments of `SentenceTransformerTrainer`, and likewise in `kwargs`.
        teacher: Path or Hub id of a checkpoint of the same hidden size, by default of the one that was pruned. Or a
            `PumaModel` or `SentenceTransformer`, or a teacher such as [`FrozenTeacher`]. If the loss has the metric
            `"relational"`, of any hidden size; if it has that or `"cosine"`, any `SentenceTransformer`.
        teacher_revision: Branch, tag or commit of a teacher on the Hub.
        teacher_mode: How the teacher is asked.

            - `"frozen"`: at every step; it never moves. If the student still has the base weights of its teacher, one
              copy serves both, and the vision tower runs once. Any other teacher is held whole beside the student,
              with a warning; so is that of a student that was trained and merged since, or is held in 4 bits.
            - `"cached"`: once, over all rows, before training; then its layers are freed, and its states are a label
              column of the datasets, read from the disk. For several epochs, or little memory; not for streams, and
              not for rows with labels of their own.
        teacher_cache: Directory of a cached teacher's states, on a disk that all machines see; by default
            `<output_dir>/teacher_cache`. A computation that was killed goes on, 4,096 rows back at most. States of
            another teacher, data or processing are never read; they stay there until the directory is deleted.
        kwargs: See `args`; the `loss` is by default `SelfDistillationLoss(model)`.

    Raises:
        FileNotFoundError: If the teacher's checkpoint is not there.
        ValueError: If there is no teacher that fits, base weights that it shares are trainable, or states are to be
            stored of a stream, of no rows, or of rows with labels.

    Example:
        >>> add_lora(model, lora_config(r=64))  # doctest: +SKIP
        >>> trainer = PumaDistillationTrainer(
        ...     model=model, teacher="Qwen/Qwen2-VL-2B-Instruct", args=args, train_dataset=dataset
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation. Storing the states is our addition.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherSource | None = None,
        teacher_revision: str | None = None,
        teacher_mode: TeacherMode = "frozen",
        teacher_cache: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        convert("teacher_mode", teacher_mode, TeacherMode)  # refuses any other
        super().__init__(*args, **kwargs)
        student = puma_model(self.model)
        metrics = {loss.metric for loss in find_losses(self.loss, "metric").values()}
        # Similarities alone leave the student a space of its own, and so do labels.
        self._shares_space = "relational" not in metrics and not find_losses(self.loss, "negative_counts")
        # What all losses can compare decides what a teacher may be.
        self._metric = metrics.pop() if len(metrics) == 1 else "mse"
        if self._metric == "relational" and (size := self.args.train_batch_size * self.args.world_size) < 3:
            problem = f"metric='relational' compares a row with two others or more, and a batch has {size} row(s)"
            raise ValueError(f"{problem}. Choose a larger batch_size (--batch-size).")
        self.teacher: Teacher | None = None
        if teacher_mode == "cached":
            folder = Path(str(self.args.output_dir), "teacher_cache") if teacher_cache is None else Path(teacher_cache)
            self._store_states(teacher, teacher_revision, folder)
            # The layers went with the last reference to the teacher, except for what a cycle may hold.
            gc.collect()
            torch.cuda.empty_cache()
            return
        self.teacher = self._find(teacher, teacher_revision)
        if self.teacher.reads_rows:
            self.data_collator = with_rows(self.data_collator)
        trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
        moving = [name for name in trained if not is_of_adapter(name)]
        if moving and isinstance(self.teacher, FrozenTeacher):
            raise ValueError(f"The frozen teacher shares trained weights ({moving[0]} and others): take add_lora.")

    def get_default_loss(self, model: Any) -> nn.Module:
        """`SelfDistillationLoss`, where no loss is given."""
        return SelfDistillationLoss(model)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Features of each column, with the teacher's states `(batch_size, hidden_size)` among them, and labels."""
        features, labels = super().collect_features(inputs)
        if self.teacher is not None:
            # accelerate wraps only the model's own call in autocast; the teacher is asked outside it.
            with self.accelerator.autocast():
                for column in features:
                    self.teacher.add_states(column)
        elif labels is not None:
            for column, states in zip(features, labels.unbind(1), strict=True):
                column[TEACHER_KEY] = states
            labels = None
        return features, labels

    def _store_states(self, source: TeacherSource | None, revision: str | None, folder: Path) -> None:
        """Give the datasets the label column; the main process computes what no file holds, the others wait.

        A long computation needs a long `ddp_timeout` in the training arguments, or one run without a launcher before.
        """
        both: tuple[Any, ...] = (self.train_dataset, self.eval_dataset)
        for rows in both:
            for dataset in rows.values() if isinstance(rows, dict) else [] if rows is None else [rows]:
                labels = {*(dataset.column_names or ())} & {*self.data_collator.valid_label_columns}
                if labels or not isinstance(dataset, Dataset) or not len(dataset):
                    what = f"labels {labels}" if labels else f"a {type(dataset).__name__} without rows that are known"
                    raise ValueError(f"A cached teacher cannot store states for {what}. Take teacher_mode='frozen'.")
        teacher, key = None, ""
        if self.accelerator.is_main_process:
            teacher = self._find(source, revision)
            key = self._key(teacher)
            known = {path.name.partition("-")[0] for path in folder.glob("*.arrow")}
            if known and key not in known:
                logger.warning("%s holds states of another teacher, data or processing: computing them anew.", folder)
        compute = self._compute(teacher)

        def stored(dataset: Dataset) -> Dataset:
            # The others are told the name, find the files that the main process has written, and load no teacher.
            name = [f"{key}-{_content_sha256(dataset)[:16]}" if self.accelerator.is_main_process else ""]
            broadcast_object_list(name)
            with self.accelerator.main_process_first():
                return _with_states(dataset, folder, name[0], self.args.train_batch_size, compute)

        for which in ("train_dataset", "eval_dataset"):
            given: Any = getattr(self, which)
            if isinstance(given, dict):
                setattr(self, which, type(given)({name: stored(part) for name, part in given.items()}))
            elif given is not None:
                setattr(self, which, stored(given))
        # Labels go past the collator as they are, and past the samplers that compare the rows.
        self.data_collator.valid_label_columns.insert(0, STATES)

    def _find(self, source: TeacherSource | None, revision: str | None) -> Teacher:
        """The teacher, whose vector space is noted in the student's configuration if that is trained to share it."""
        options = {"metric": self._metric, "tokenizer": self.model.tokenizer}
        teacher = find_teacher(source, puma_model(self.model), revision=revision, **options)
        if self._shares_space:
            puma_model(self.model).config.teacher_fingerprint = teacher.space(self.model)
        return teacher

    def _key(self, teacher: Teacher) -> str:
        """What, besides the rows, decides the states: the teacher, what the model sees of a row, the data type."""
        mixed = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else str(puma_model(self.model).dtype)
        seen: list[Any] = [self.data_collator.prompts, mixed]
        if not teacher.reads_rows:  # it sees of a row what the student sees
            seen = [model_settings(self.model), seen[0], self.data_collator.max_length, mixed]
        content = json.dumps([teacher.fingerprint(), seen], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _compute(self, teacher: Teacher | None) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
        collate = with_rows(self.data_collator) if teacher and teacher.reads_rows else self.data_collator

        def compute(batch: dict[str, list[Any]]) -> dict[str, Any]:
            # Only the main process has a teacher: where others come here, they do not see its files.
            asked: Any = teacher
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            inputs = self._prepare_inputs(collate(rows))
            columns, _ = super(PumaDistillationTrainer, self).collect_features(inputs)
            with self.accelerator.autocast():
                states = [asked.states(column).float().cpu() for column in columns]
            return {STATES: torch.stack(states, dim=1).numpy()}

        return compute


def _with_states(
    dataset: Dataset, folder: Path, name: str, batch_size: int, compute: Callable[[dict[str, Any]], dict[str, Any]]
) -> Dataset:
    """The dataset with the label column, whose files `datasets` writes whole or not at all, and finds again."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({STATES: List(List(Value("float32")))})
    # A map over all rows would lose all of them in a kill; each of these is done once its file has its name.
    files = [
        dataset.select(range(begin, min(begin + ROWS_PER_FILE, len(dataset)))).map(
            compute,
            batched=True,
            batch_size=batch_size,
            remove_columns=dataset.column_names,
            features=features,
            # `datasets` takes any file of this name for the result, so the name says whose it is.
            cache_file_name=str(folder / f"{name}-{begin:09d}.arrow"),
            new_fingerprint=f"{name}-{begin:09d}",
            load_from_cache_file=True,
            desc="Teacher states",
        )
        for begin in range(0, len(dataset), ROWS_PER_FILE)
    ]
    whole = concatenate_datasets([dataset, concatenate_datasets(files)], axis=1)
    # A transform, such as that with which sentence-transformers tells the name of a dataset, does not come along.
    whole.set_format(dataset.format["type"], **dataset.format["format_kwargs"])
    return whole


def _content_sha256(dataset: Dataset) -> str:
    """Of what the rows hold, not of how or where they are stored, on which `datasets`' own fingerprint depends."""
    # A transform of sentence-transformers tells the name of one of several datasets, by which prompts may differ.
    digest = hashlib.sha256(repr([dataset.column_names, dataset[:1].get("dataset_name")]).encode())
    for table in dataset.with_format("arrow").iter(1000):
        rows = table.to_pylist()
        # A path stays the same when its picture changes: a look at each file, which costs seconds for a million.
        digest.update(repr([rows, *_images_of(rows)]).encode())
    return digest.hexdigest()


def _images_of(cell: Any) -> Iterator[Any]:
    """Size and time of change of each image that is a path, however deep it lies in a cell."""
    if isinstance(cell, str) and is_image_name(cell):
        yield image_content(cell, "")
    for part in cell.values() if isinstance(cell, dict) else cell if isinstance(cell, list) else ():
        yield from _images_of(part)
