"""A SentenceTransformerTrainer for PUMA: scheduled losses, fitting batches, whole checkpoints, telling logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.losses import add_temperature_schedule, find_scheduled_losses
from puma_hf.trainer.checkpoints import (
    explain_full_disk,
    last_whole_checkpoint,
    remove_manifest,
    require_whole_checkpoint,
    rotate_checkpoints,
    write_manifest,
)
from puma_hf.trainer.gradient_checkpointing import enabled_by_backbone, set_non_reentrant, spare_frozen_vision
from puma_hf.trainer.lora import is_puma_model, puma_model, save_base_fingerprint
from puma_hf.trainer.replay import describe_batches
from puma_hf.trainer.row_checks import check_positives, check_rows
from puma_hf.trainer.sharding import whole_weights
from puma_hf.trainer.statistics import TrainingStatistics

logger = logging.getLogger(__name__)


class PumaTrainer(SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that moves the temperature schedule of MAC-Loss, and survives what happens.

    - Checkpoints end with a manifest. Resuming takes the last that is whole, whatever a kill or a full disk
      left behind it, and continues as if nothing had happened: same batches, same dropout, same weights.
    - A loss or gradient that is not finite stops the run before it reaches the weights, and names the rows.
    - With `gradient_checkpointing` a frozen vision tower is neither computed twice nor propagated through.
    - Each log line tells, averaged since the last one and over all processes, where the loss knows it:
      `intra_negatives`, `inter_negatives` and `masked_negatives` per query; `positive_similarity`,
      `intra_similarity` and `inter_similarity`; `temperature` and `hard_temperature`; in self-distillation
      `teacher_cosine`, of the student's states with the teacher's; the terms of a loss that has several;
      `items_per_second` and, with images, `images_per_second`, over all processes and without the time for
      saving and evaluating. Of the last batch: `effective_rank` and `uniformity` of the positives'
      embeddings, or of the states. A collapse is warned of.
    - Batches that hold one modality each, which makes MAC-Loss plain InfoNCE, are warned of.

    A plain `SentenceTransformerTrainer` works as well, after one call of
    `puma_hf.losses.add_temperature_schedule(trainer)`, but does none of this.

    Args:
        args: Every argument of `SentenceTransformerTrainer`, and likewise in `kwargs`.
        positives: For each row of `train_dataset`, the ids of all its right answers, as
            `load_mbeir(..., with_ids=True)["positives"]` has them. No two rows of a step's batches then share one,
            on one device or over several, so that no row's positive is a right answer of another.
        kwargs: See `args`.

    Raises:
        ValueError: If a dataset is empty, or `train_dataset` is not one with as many rows as `positives`; if no
            row could ever have a negative that the loss needs; if one process sees several GPUs; if checkpointing is
            to be reentrant.

    Example:

    ```python
    >>> from puma_hf import MultimodalMACLoss, PumaTrainer, load_mbeir

    >>> dataset = load_mbeir("demo/emoji", num_negatives=1)  # doctest: +SKIP
    >>> loss = MultimodalMACLoss(model)  # doctest: +SKIP
    >>> trainer = PumaTrainer(model=model, train_dataset=dataset, loss=loss)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, modality-adaptive contrastive learning.
    """

    def __init__(
        self,
        *args: Any,
        positives: Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, and nn.DataParallel would split images from their texts. "
                "Run `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.positives = positives
        check_positives(self.train_dataset, positives)
        check_rows(self, self.train_dataset, "train_dataset", self.args.train_batch_size)
        check_rows(self, self.eval_dataset, "eval_dataset", self.args.eval_batch_size)
        self._checkpointed = is_puma_model(self.model) and set_non_reentrant(self.args)
        self._statistics = TrainingStatistics(self.loss)
        # Where the run is: epoch, and batches of it that this process has been through.
        self._epoch, self._batches, self._resumed_batches = -1, 0, 0
        # Of the present optimizer step: the losses of its batches, and the norm of their gradients.
        self._step_losses: list[Tensor] = []
        self._step_norm: Any = None
        # The limit of checkpoints, while a save has set it aside.
        self._set_aside: tuple[int | None] | None = None
        self.add_callback(_PumaCallback(self))
        if find_scheduled_losses(self.loss):
            add_temperature_schedule(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a whole checkpoint.

        Args:
            resume_from_checkpoint: Path of a checkpoint; True for the last whole one in `args.output_dir`.
            args: What the base class takes besides, and likewise in `kwargs`.

        Raises:
            ValueError: If there is no whole checkpoint, the one that is named is not whole (the message names
                the last whole one), or a loss or gradient is not finite.
            FileNotFoundError: If the named checkpoint does not exist.
            OSError: If the disk is full. The last whole checkpoint stays.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"output_dir {self.args.output_dir!r} holds no whole checkpoint to continue from. Start without "
                    "resume_from_checkpoint."
                )
        elif resume_from_checkpoint:
            resume_from_checkpoint = require_whole_checkpoint(resume_from_checkpoint)
        enabled = enabled_by_backbone(self.model) if self._checkpointed else nullcontext()
        try:
            with enabled:
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._statistics.detach()

    def add_model_card_callback(self, *args: Any, **kwargs: Any) -> None:
        """That of the base class, without rows as examples: it expects plain texts, and ours are structs."""
        card = self.model.model_card_data
        given, card.widget = card.widget, card.widget or [{}]  # examples are drawn only where there are none
        super().add_model_card_callback(*args, **kwargs)
        card.widget = given

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator of the base class, in which each process reads its own batches of a stream."""
        settings: Any = self.args.accelerator_config
        if settings.dispatch_batches is None:
            # One process would share its batches out by their first dimension, which in `pixel_values` is the patches.
            settings.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The sampler of the arguments, or for training rows that of `positives`."""
        if dataset is not self.train_dataset:
            return super().get_batch_sampler(dataset, *args, **kwargs)
        devices = self.args.world_size
        if self.positives is not None:
            return DistinctPositivesBatchSampler(dataset, self.positives, *args, num_devices=devices, **kwargs)
        return super().get_batch_sampler(dataset, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The data loader of the base class, whose sampler always learns which epoch it is."""
        loader: Any = super().get_train_dataloader()
        shard: Any = getattr(loader, "batch_sampler", None)
        sampler: Any = getattr(shard, "batch_sampler", None)
        if hasattr(sampler, "set_epoch") and not hasattr(shard, "set_epoch"):
            # With several processes accelerate wraps the sampler once to share the batches out, and once more to
            # skip those of a resumed epoch; the epoch does not get through both, and the first would come again.
            shard.set_epoch = sampler.set_epoch
        self._loader = loader
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward, with what is to be logged and checked of it."""
        self._statistics.count_inputs(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._statistics.read_losses()
        self._step_losses.append(loss.detach())
        self._batches += 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add to a training record what was collected since the last one."""
        if "loss" in logs:
            logs = {**logs, **self._statistics.collect(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time it takes is no training.

        Raises:
            ValueError: If `eval_dataset` is empty, or no row could ever have a negative that the loss needs.
        """
        if not isinstance(eval_dataset, str):  # a name is that of a dataset which was checked at the start
            check_rows(self, eval_dataset, "eval_dataset", self.args.eval_batch_size)
        with self._statistics.paused():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(max_steps, *args, **kwargs)
        if (epoch or batches) and self.state.epoch is not None:
            # The base class divides the optimizer steps by those of a full epoch, but a sampler that keeps rows
            # apart may end an epoch early. The fraction of epochs that it saves tells the very batch.
            length = len(self._loader)
            epoch, batches = divmod(round(self.state.epoch * length), length)
            batches = 0 if self.args.ignore_data_skip else batches
        self._epoch, self._resumed_batches = epoch - 1, batches
        return epoch, batches

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        self._step_norm = base._get_grad_norm(*args, **kwargs)
        return self._step_norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        self.check_weights()
        with self._statistics.paused(), explain_full_disk(folder):
            if self.args.should_save:
                remove_manifest(folder)
            with self._rotation_set_aside():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder)
                rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _rotation_set_aside(self) -> Iterator[None]:
        # The base class would delete an older checkpoint before the new one is known to be whole.
        self._set_aside, self.args.save_total_limit = (self.args.save_total_limit,), None
        try:
            yield
        finally:
            (self.args.save_total_limit,), self._set_aside = self._set_aside, None

    def check_weights(self) -> None:
        """Raise a ValueError if the trained tensors are not finite, before they are saved as if they were a result.

        A loss tells of weights that the step before has spoilt; those of the last step no loss has seen. Weights
        whose squares float32 cannot hold, as after steps that are far too long, are of no use either.
        """
        trained = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        held = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in trained.values()]
        sums = [tensor.detach().float().square().sum().to(self.args.device) for tensor in held]
        if not sums:
            return
        # Each process may hold another part: all stop, or none.
        spoilt = self.accelerator.reduce((~torch.stack(sums).isfinite()).long()).bool().tolist()
        if not any(spoilt):
            return
        first = next(name for name, is_spoilt in zip(trained, spoilt, strict=True) if is_spoilt)
        safe = last_whole_checkpoint(str(self.args.output_dir))
        kept = f"The last whole checkpoint is {safe!r}: resume from there" if safe else "Start again"
        raise ValueError(
            f"Optimizer step {self.state.global_step} has left {sum(spoilt)} of {len(spoilt)} trained tensors not "
            f"finite, or too large to compute with (first: {first}), so they are not saved. {kept} with a lower "
            "learning_rate, and with max_grad_norm above 0."
        )

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the adapter; under FSDP2 its shards are put together first."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, *args, **kwargs)
            return
        with whole_weights(self.model):
            if self.args.should_save:
                self._save(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._set_aside is None:
            super()._save(output_dir, state_dict)
        else:  # the arguments are saved as they were given
            (self.args.save_total_limit,) = self._set_aside
            super()._save(output_dir, state_dict)
            self.args.save_total_limit = None
        # A loss of ours may train other models too; these have no base to note.
        if is_puma_model(self.model):
            save_base_fingerprint(self.model, str(output_dir or self.args.output_dir))

    def _check_finite(self) -> None:
        """Raise if the optimizer step that is about to be done would spoil the weights."""
        losses, self._step_losses = self._step_losses, []
        norm, self._step_norm = self._step_norm, None
        # With a loss scaler infinite gradients are part of the search for the scale, and it skips the step.
        norms = [] if norm is None or self.accelerator.scaler is not None else [torch.as_tensor(norm)]
        norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        device = self.args.device
        values = torch.stack([value.to(device, torch.float32) for value in [*losses, *norms]])
        # The one wait for the device. The base class has waited for each loss already, to filter what it logs.
        numbers: list[float] = values.tolist()
        broken = [number for number, value in enumerate(numbers[: len(losses)]) if not _is_finite(value)]
        if not broken and all(map(_is_finite, numbers)):
            return
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        what = f"The loss is {numbers[broken[0]]}" if broken else f"The norm of the gradients is {numbers[-1]}"
        positions = [self._batches - len(losses) + number for number in broken or range(len(losses))]
        others = ", or in another process, whose error then names the rows" if self.args.world_size > 1 else ""
        safe = last_whole_checkpoint(str(self.args.output_dir))
        raise ValueError(
            f"{what} in optimizer step {self.state.global_step + 1}, "
            f"{describe_batches(self._loader, self.train_dataset, self._epoch, positions)}"
            f"{'' if broken else others}. The step was not done: the weights are those of the step before"
            f"{f', and the last whole checkpoint is {safe!r}' if safe else ''}. Look at these rows for empty or "
            "damaged inputs, lower learning_rate or raise the temperatures, and train in bfloat16 or float32 rather "
            "than float16."
        )


class _PumaCallback(TrainerCallback):
    """Tells a `PumaTrainer` where the run is."""

    def __init__(self, trainer: PumaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer._step_losses = []
        trainer._statistics.attach(trainer.model)
        if trainer._checkpointed:
            spare_frozen_vision(puma_model(trainer.model))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer._epoch += 1
        trainer._batches, trainer._resumed_batches = trainer._resumed_batches, 0
        # An epoch that ends early, within an accumulation, would leave gradients that no checkpoint holds.
        trainer._step_losses = []
        trainer.model.zero_grad()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._check_finite()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last_step = state.global_step >= state.max_steps
        self.trainer._statistics.watch_modalities(self.trainer.accelerator, last_step)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # not true of NaN
