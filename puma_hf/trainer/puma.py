"""A SentenceTransformerTrainer that runs scheduled losses and keeps false negatives out of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer

from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.losses import add_temperature_schedule, find_scheduled_losses
from puma_hf.trainer.lora import is_puma_model, save_base_fingerprint


class PumaTrainer(SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that moves the temperature schedule of MAC-Loss by itself.

    A plain `SentenceTransformerTrainer` works as well, after one call of
    `puma_hf.losses.add_temperature_schedule(trainer)`.

    Args:
        args: Every argument of `SentenceTransformerTrainer`, and likewise in `kwargs`.
        positives: For each row of `train_dataset`, the ids of all its right answers, as
            `load_mbeir(..., with_ids=True)["positives"]` has them. No two rows of a batch then share one, so
            that no row's positive is a right answer of another.
        kwargs: See `args`.

    Raises:
        ValueError: If `train_dataset` is not one dataset with as many rows as `positives`.

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

    def __init__(self, *args: Any, positives: Sequence[Sequence[str]] | None = None, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if model is not None:
            # Its usage example would encode columns of plain text; ours are structs of text and image.
            model.model_card_data.generate_widget_examples = False
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, and nn.DataParallel would split images from their texts. "
                "Run `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.positives = positives
        if positives is not None:
            _check_positives(positives, self.train_dataset)
        if find_scheduled_losses(self.loss):
            add_temperature_schedule(self)

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The sampler of the arguments, or for training rows with `positives` the one that parts them."""
        if self.positives is None or dataset is not self.train_dataset:
            return super().get_batch_sampler(dataset, *args, **kwargs)
        return DistinctPositivesBatchSampler(dataset, self.positives, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A loss of ours may train other models too; these have no base to note.
        if is_puma_model(self.model):
            save_base_fingerprint(self.model, str(output_dir or self.args.output_dir))


def _check_positives(positives: Sequence[Sequence[str]], dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"positives belong to the rows of one dataset, but train_dataset is a {type(dataset).__name__}. "
            "Concatenate the datasets, or leave positives out."
        )
    if len(positives) != len(dataset):
        raise ValueError(
            f"positives has {len(positives)} rows and train_dataset {len(dataset)}. Pass one list of ids per row."
        )
