"""A SentenceTransformerTrainer for PUMA: scheduled losses, fitting batches, whole checkpoints, telling logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import has_length, rotate_checkpoints
from transformers.training_args import TrainingArguments

from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.losses.cached_mac_puma import find_puma_model
from puma_hf.losses.progress_puma import add_temperature_schedule, find_losses, find_scheduled_losses
from puma_hf.trainer.checkpoints_puma import MARKER, last_whole_checkpoint, mark_whole, why_not_whole
from puma_hf.trainer.lora_puma import PREFIX, checkpoint_decoder, puma_model, save_base_fingerprint
from puma_hf.trainer.statistics_puma import TrainingStatistics


class PumaTrainer(SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that moves the temperature schedule of MAC-Loss, and survives what happens.

    - Checkpoints end with a marker. Resuming takes the last that is whole, whatever a kill or a full disk
      left behind it, and continues as if nothing had happened: same batches, same dropout, same weights.
    - Gradients that are not finite, as of a loss that is not, stop the run before they reach the weights.
    - With `gradient_checkpointing` a frozen vision tower is neither computed twice nor propagated through.
    - Each log line tells, averaged since the last one and over all processes, where the loss knows it:
      `intra_negatives`, `inter_negatives` and `masked_negatives` per query; `positive_similarity`, `intra_similarity`
      and `inter_similarity`; `temperature` and `hard_temperature`; the `teacher_cosine` of the student's states; the
      terms of a loss that has several; `items_per_second`, `images_per_second`. Of the last batch: `effective_rank` and
      `uniformity` of the positives' embeddings, or of the states. A collapse is warned of, and so are batches of one
      modality each, which make MAC-Loss plain InfoNCE.

    Args:
        args: Every argument of `SentenceTransformerTrainer`, and likewise in `kwargs`.
        positives: For each row of `train_dataset`, the ids of all its right answers, as
            `load_mbeir(..., with_ids=True)["positives"]` has them. No two rows of a step, over all devices, share one.
        kwargs: See `args`.

    Raises:
        ValueError: If `positives` come with several datasets or a stream, or one process sees several GPUs.

    Example:
        >>> from puma_hf import MultimodalMACLoss, load_mbeir  # doctest: +SKIP
        >>> dataset = load_mbeir("demo/emoji", num_negatives=1)  # doctest: +SKIP
        >>> loss = MultimodalMACLoss(model)  # doctest: +SKIP
        >>> PumaTrainer(model=model, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP

    Source: PUMA, ACM MM 2025, arXiv 2507.08064, modality-adaptive contrastive learning.
    """

    def __init__(self, *args: Any, positives: Sequence[Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            remedy = "run `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
            raise ValueError(f"One process sees {self.args.n_gpu} GPUs: {remedy}.")
        if positives is not None and not isinstance(self.train_dataset, Dataset):
            raise ValueError(f"positives need one Dataset, and train_dataset is a {type(self.train_dataset).__name__}.")
        self.positives = positives
        if (puma := find_puma_model(self.model)) is not None:
            puma.config.teacher_fingerprint = None  # training leaves the space of an earlier teacher
            # and the depths of an earlier training, or of a loss that was made and is not used, behind
            depths = {depth for loss in find_losses(self.loss, "depths").values() for depth in loss.depths}
            puma.config.trained_depths = sorted(depths) or None
            # The method of SentenceTransformer is deprecated, and in 6.0 refuses what the Trainer passes.
            setattr(self.model, f"{PREFIX}_checkpointing_enable", partial(checkpoint_decoder, puma))
        self._statistics = TrainingStatistics(self.loss)
        # After the flow control, which decides what a step is followed by, and before the reporters.
        self.callback_handler.callbacks[1:1] = [SafeSteps(), self._statistics]
        if find_scheduled_losses(self.loss):
            add_temperature_schedule(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a whole checkpoint; if it is of the last step, its weights are taken.

        Args:
            resume_from_checkpoint: Path of a checkpoint; True for the last whole one in `args.output_dir`.
            args: What the base class takes besides, and likewise in `kwargs`.

        Raises:
            ValueError: If there is no such whole checkpoint, no row has a negative, or gradients or weights are not
                finite.
            OSError: If a checkpoint cannot be written. The last whole one stays.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"output_dir {self.args.output_dir!r} holds no whole checkpoint to continue from.")
        elif resume_from_checkpoint and (reason := why_not_whole(resume_from_checkpoint)):
            last = _last(Path(resume_from_checkpoint).parent)
            raise ValueError(f"The checkpoint {resume_from_checkpoint!r} is not whole: {reason}{last}.")
        self.check_negatives()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; a ValueError if no row has a negative: `eval_loss` would be 0, whatever the model."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is not None and not isinstance(given, str):  # the name of one that was looked at before
            self.check_negatives(given, self.args.eval_batch_size)
        figures: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return figures

    def check_negatives(self, given: Any = None, batch_size: int | None = None) -> None:
        """Raise a ValueError if MAC-Loss or InfoNCE has one candidate a query: it is always 0, and trains nothing."""
        losses = find_losses(self.loss, "negative_counts").values()
        given = self.train_dataset if given is None else given
        if not losses or given is None:
            return
        gathers = any(loss.gather_across_devices for loss in losses)
        batch_size = (batch_size or self.args.train_batch_size) * (self.args.world_size if gathers else 1)
        for dataset in given.values() if isinstance(given, dict) else [given]:
            columns = {*(dataset.column_names or ())} - {*self.data_collator.valid_label_columns, "dataset_name"}
            num_rows = len(dataset) if isinstance(dataset, Dataset) else batch_size
            if len(columns) == 2 and min(batch_size, num_rows) == 1:
                rows = f"{num_rows} row(s) in batches of {batch_size}"
                raise ValueError(f"Nothing is a negative in {rows}: take a larger batch, or columns of negatives.")

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
        if dataset is not self.train_dataset or self.positives is None:
            return super().get_batch_sampler(dataset, *args, **kwargs)
        devices = self.args.world_size
        return DistinctPositivesBatchSampler(dataset, self.positives, *args, num_devices=devices, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward, counted."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # With a loss scaler `SafeSteps` looks at no gradients, but no scale mends a loss.
        if self.args.fp16:
            _require_finite([loss.detach()], f"The loss of optimizer step {self.state.global_step + 1} is", self.args)
        self._statistics.add(inputs)
        return loss

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        loader: Any = self._train_dataloader
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # all is done; the base class would go on for one more step
        if not self.state.global_step or not has_length(loader):
            return epoch, batches
        # The base class divides the optimizer steps by those of a full epoch, but a sampler that keeps rows apart may
        # end an epoch early. The fraction of epochs that it saves tells the very batch.
        epoch, batches = divmod(round((self.state.epoch or 0) * len(loader)), len(loader))
        # With several processes accelerate wraps the sampler once to share the batches out, and once more to skip those
        # of a resumed epoch; the epoch does not get through both, and the first would come again.
        sampler: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        return epoch, 0 if self.args.ignore_data_skip else batches

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        _check_weights(self.model, self.args, self.state)  # those of the last step no loss has seen
        if self.args.should_save:
            (folder / MARKER).unlink(missing_ok=True)  # one of this name is not whole until it is written anew
        # The base class would delete an older checkpoint before the new one is known to be whole: with a limit of one,
        # a kill in between would leave none.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own says nothing of a full disk
            raise OSError(f"{str(folder)!r} could not be written ({error}){_last(run)}. Free some space.") from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(folder)
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the adapter; under FSDP2 its shards are put together first."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, *args, **kwargs)
            return
        card: Any = self.model.model_card_data
        # For its card sentence-transformers would encode, on this process alone, and wait for the others for ever.
        card.generate_widget_examples = False
        with whole_weights(self.model):
            if self.args.should_save:
                self._save(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_base_fingerprint(self.model, str(output_dir or self.args.output_dir))


class SafeSteps(TrainerCallback):
    """Stops a run, by a ValueError, before gradients that are not finite reach the weights, or such weights a result.

    Each process looks at the same: gradients are reduced by then, and of sharded tensors the norm is that of all parts.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Drop what an epoch that ended early, within an accumulation, has left: no checkpoint holds it."""
        given["model"].zero_grad()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the gradients: the norm costs a pass over those of the adapter, and one wait for the device."""
        # With a loss scaler infinite gradients are part of the search for the scale, and it skips the step.
        weights = [] if args.fp16 else given["model"].parameters()
        what = f"The gradients of optimizer step {state.global_step + 1}, in epoch {state.epoch or 0:.2f}, are"
        _require_finite([weight.grad for weight in weights if weight.grad is not None], what, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the weights that the run has come to."""
        _check_weights(given["model"], args, state)


def _check_weights(model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    _require_finite(trained, f"The weights after optimizer step {state.global_step} are", args)


def _require_finite(tensors: list[Tensor], what: str, args: TrainingArguments) -> None:
    """Raise a ValueError if there is a NaN, an infinity, or a number whose square float32 cannot hold."""
    # Of all tensors at once: each of these shows in the norm, for one number to wait for.
    norm = torch.nn.utils.get_total_norm(tensors)
    if not (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite():
        remedy = "Lower learning_rate, raise the temperatures, use bfloat16, clip gradients."
        raise ValueError(f"{what} not finite, or too large{_last(str(args.output_dir))}. {remedy}")


def _last(run: str | Path) -> str:
    safe = last_whole_checkpoint(run)
    return f". The last whole checkpoint is {safe!r}: resume from there" if safe else ""


@contextmanager
def whole_weights(model: SentenceTransformer) -> Iterator[None]:
    """Let a model under FSDP2 be saved as if it were whole. All processes must enter; else nothing happens.

    sentence-transformers saves what a process holds itself, which is a part. Here the trained tensors, those of the
    adapter, are put together on every device; the frozen ones, which are not saved, stay parts.
    """
    backbone = puma_model(model)
    trained = {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}
    whole = {name: weight.full_tensor() for name, weight in trained.items() if isinstance(weight, DTensor)}
    original = backbone.state_dict
    backbone.state_dict = lambda *args, **kwargs: {**original(*args, **kwargs), **whole}
    try:
        yield
    finally:
        del backbone.state_dict
