"""Self-distillation of a pruned model from the model it was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from puma_hf.losses import SelfDistillationLoss
from puma_hf.trainer.cached_teacher import Part, StatesJob, cached_teacher, quiet_collator
from puma_hf.trainer.lora import puma_model
from puma_hf.trainer.puma import PumaTrainer
from puma_hf.trainer.teacher import (
    TeacherMode,
    TeacherSource,
    check_teacher_mode,
    frozen_teacher,
    teacher_loader,
)
from puma_hf.trainer.teacher_base import Teacher
from puma_hf.trainer.teacher_cache import CacheManifest, check_cache_folder
from puma_hf.trainer.teacher_fingerprint import checkpoint_sha256


class PumaDistillationTrainer(PumaTrainer):
    """Trains a pruned model to reach after k layers the `[RET]` state that the full model reaches after all.

    No labels are needed: every column of `train_dataset` holds inputs of any modality, and one column is
    enough. Give the model a LoRA adapter first (`add_lora`). The teacher's states are in the features of each
    column as `teacher_state` `(batch_size, hidden_size)`, and labels stay free for other losses, such as those
    that `JointDistillationLoss` adds.

    Args:
        args: The arguments of `SentenceTransformerTrainer`, and likewise in `kwargs`; the model is a pruned PUMA
            `SentenceTransformer` with an adapter.
        teacher: Path or Hub id of a checkpoint of the same hidden size, by default of the one that was pruned, as the
            model's configuration names it. Or a `PumaModel` or `SentenceTransformer`, or a teacher such as
            [`FrozenTeacher`].
        teacher_revision: Branch, tag or commit of a teacher on the Hub.
        teacher_mode: How the teacher is asked.

            - `"frozen"`: at every step; it never moves. If the student still has the base weights of its teacher, one
              copy serves both, and the vision tower runs once. Any other teacher is held whole beside the student,
              with a warning: another model, or the original checkpoint for a student that has been trained and merged
              since, or is held in 4 bits.
            - `"cached"`: once, over all rows, before training; then its layers are freed. For several epochs,
              or little memory.
        teacher_cache: Directory of the stored states, by default `<output_dir>/teacher_cache`. A computation that
            was interrupted is continued, and a complete cache is read without loading the teacher.
        loss: By default `SelfDistillationLoss(model)`, the mean squared distance of the states.
        kwargs: See `args`.

    Raises:
        FileNotFoundError: If the teacher's checkpoint is not there.
        NotADirectoryError: If `teacher_cache` is a file.
        ValueError: If there is no teacher, base weights that it shares are trainable, its hidden size is not the
            student's, or the stored states are of another teacher or dataset.

    Example:

    ```python
    >>> from puma_hf import PumaDistillationTrainer, add_lora, lora_config

    >>> add_lora(model, lora_config(r=64))  # doctest: +SKIP
    >>> trainer = PumaDistillationTrainer(model=model, teacher="Qwen/Qwen2-VL-2B-Instruct", args=args,
    ...                                   train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, layer-pruned self-distillation; in the released code the teacher is
    the frozen full model.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherSource | None = None,
        teacher_revision: str | None = None,
        teacher_mode: TeacherMode = "frozen",
        teacher_cache: str | Path | None = None,
        loss: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, SentenceTransformer):
            raise ValueError(f"model must be a SentenceTransformer, got {type(model).__name__}.")
        check_teacher_mode(teacher_mode, teacher_cache, teacher)
        super().__init__(*args, loss=SelfDistillationLoss(model) if loss is None else loss, **kwargs)
        student = puma_model(model)
        self.teacher: Teacher
        if teacher_mode == "cached":
            folder = Path(str(self.args.output_dir), "teacher_cache") if teacher_cache is None else teacher_cache
            self.teacher = self._cached_teacher(teacher, teacher_revision, folder)
        else:
            self.teacher = frozen_teacher(teacher, student, revision=teacher_revision)
        if self.teacher.shares_base_weights:
            _check_base_is_frozen(student)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Features of each column, with the teacher's states `(batch_size, hidden_size)` among them, and labels."""
        features, labels = super().collect_features(inputs)
        # accelerate wraps only the model's own call in autocast; the teacher is asked outside it.
        with self.accelerator.autocast():
            for column in features:
                self.teacher.add_states(column)
        return features, labels

    def _cached_teacher(self, teacher: TeacherSource | None, revision: str | None, folder: str | Path) -> Teacher:
        student = puma_model(self.model)
        check_cache_folder(folder)  # before the dataset is read
        load, source, revision = teacher_loader(teacher, student, revision=revision)
        datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        job = StatesJob(
            parts=[part for name, dataset in datasets.items() for part in _parts(dataset, name, self)],
            collate=quiet_collator(self.data_collator),
            collect=self._collect_without_teacher,
            batch_size=self.args.train_batch_size,
            autocast=self.accelerator.autocast,
            show_progress=not self.args.disable_tqdm,
        )
        if not job.num_items:
            raise ValueError("train_dataset is empty, so there is nothing to ask the teacher. Pass one with rows.")
        mixed = self.args.bf16 or self.args.fp16
        text_config: Any = student.config.text_config
        expected = CacheManifest(
            dataset=job.dataset_sha256(),
            hidden_size=text_config.hidden_size,
            precision=("bfloat16" if self.args.bf16 else "float16") if mixed else str(student.dtype).partition(".")[2],
            processing=_processing(self),
            num_items=job.num_items,
            checkpoint=None if source is None else checkpoint_sha256(source, student, revision=revision),
        )
        return cached_teacher(folder, expected, load, job)

    def _collect_without_teacher(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        features, _ = super().collect_features(batch)
        device = puma_model(self.model).device
        return [
            {name: value.to(device) if torch.is_tensor(value) else value for name, value in column.items()}
            for column in features
        ]


def _check_base_is_frozen(student: Any) -> None:
    trained = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and "trainable_tokens" not in name
    ]
    if trained:
        raise ValueError(
            f"{len(trained)} base weights are trainable (first: {trained[0]}), and the frozen teacher "
            "shares them with the student. Freeze them and add an adapter: "
            "puma_hf.add_lora(model, puma_hf.lora_config())."
        )


def _parts(dataset: Any, name: str, trainer: PumaTrainer) -> list[Part]:
    """Each dataset of one input column alone."""
    if dataset is None:
        return []
    if isinstance(dataset, Mapping):
        return [part for value in dataset.values() for part in _parts(value, name, trainer)]
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, but teacher_mode='cached' goes over its rows before training and "
            "needs a datasets.Dataset or a DatasetDict of these. Load it whole, or choose teacher_mode='frozen'."
        )
    collator: Any = trainer.data_collator
    others = {"dataset_name", *collator.valid_label_columns}
    columns = [column for column in dataset.column_names if column not in others]
    return [(dataset.select_columns([column]), column) for column in columns]


def _processing(trainer: PumaTrainer) -> dict[str, Any]:
    """What, besides the rows, decides what the model sees."""
    module: Any = trainer.model[0]
    collator: Any = trainer.data_collator
    return {
        "processing_kwargs": getattr(module, "processing_kwargs", None) or {},
        "prompts": collator.prompts or {},
        "max_length": collator.max_length,
        "limits": [module.processor.image_processor.to_dict()["size"], module.processor.tokenizer.model_max_length],
    }
