"""Embed many inputs of any modality: prepared ahead of the device, broken ones by name, a corpus as a stream."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, quantize_embeddings
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from puma_hf.configs import OnError, Precision
from puma_hf.embedding.prepare import BrokenInput, Guess, Prepared, plan, prepared
from puma_hf.fingerprint import model_name
from puma_hf.modeling.sentence_transformers_puma import CPU_TOKENS, CUDA_TOKENS
from puma_hf.settings import Decode, SpecialTokens, processing_of

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
_INPUTS_PER_WORKER = 64  # below this a worker takes longer to start than it saves
_IN_FLIGHT = 2  # chunks on a GPU
_SHOWN = 3


@dataclass(frozen=True)
class EmbedResult:
    """Embeddings, in the order of the inputs.

    Args:
        embeddings: `(num_rows, embedding_dim)`; for binary precisions one eighth of it.
        indices: `(num_rows,)`, int64: the input that each row belongs to.
        errors: Inputs that are broken, by index.
    """

    embeddings: NDArray[Any]
    indices: NDArray[Any]
    errors: tuple[BrokenInput, ...] = ()


class BrokenInputError(ValueError):
    """An input cannot be embedded.

    Args:
        broken: The input.
        done: What was embedded before, by `embed`; None from `iterate_embeddings`, which has yielded it.
    """

    def __init__(self, broken: BrokenInput, done: EmbedResult | None = None) -> None:
        super().__init__(broken, done)
        self.broken, self.done = broken, done

    @property
    def index(self) -> int:
        """Position of the broken input in the inputs."""
        return self.broken.index

    def __str__(self) -> str:
        reason = self.broken.message.rstrip(".")
        return (
            f"{reason}. Repair or remove this input, or pass on_error='skip' to leave out what is broken, 'zero' to "
            "have zeros in its place."
        )


def embed(
    model: Any, inputs: Sequence[Any], *, precision: Precision = "float32", ranges: Any = None, **options: Any
) -> EmbedResult:
    """Embed a list of inputs: the rows of `model.encode`, sooner.

    Worker processes load, decode and tokenise ahead of the device, and memory grows with the result alone.

    Args:
        model: As in `iterate_embeddings`.
        inputs: Strings, images, dicts or chats, as `PumaProcessor.process_inputs` takes them.
        precision: Numbers of the result. int8 and uint8 are scaled by `ranges`, or else by all rows of this call,
            which makes them incomparable with those of another call.
        ranges: `(2, embedding_dim)`, lowest and highest value of each dimension, for int8 and uint8.
        options: Those of `iterate_embeddings`: `prompt`, `max_batch_tokens`, `num_workers`, `on_error`, `load`,
            `truncate_dim`, `processing_kwargs`, `max_length`, `num_kept_layers`, `sort` and `show_progress_bar`.

    Returns:
        Rows `(num_rows, embedding_dim)` in the order of the inputs, which inputs they belong to, and what is broken.

    Raises:
        BrokenInputError: If an input is broken and `on_error` is "raise"; its `done` has the rows made so far.
        ValueError: If the model is no `SentenceTransformer`, or an argument is out of range.
        RuntimeError: If a worker process dies, or the device is out of memory.

    Example:

    ```python
    >>> from sentence_transformers import SentenceTransformer
    >>> from puma_hf.embedding.embed import embed

    >>> model = SentenceTransformer("org/puma", trust_remote_code=True)  # doctest: +SKIP
    >>> embed(model, ["a red apple", {"image": "apple.png"}]).embeddings.shape  # doctest: +SKIP
    (2, 1536)
    ```

    Source: ours; what is computed is PUMA, ACM MM 2025, arXiv 2507.08064.
    """
    errors: list[BrokenInput] = []
    batches = iterate_embeddings(model, inputs, report=errors.append, **options)
    # What needs no range over all rows is stored small at once.
    at_once: Precision = "float32" if precision in ("int8", "uint8") and ranges is None else precision
    empty = quantize(np.zeros((0, embedding_dim(model, options.get("truncate_dim"))), np.float32), at_once, ranges)
    rows, is_there = np.zeros((len(inputs), empty.shape[1]), empty.dtype), np.zeros(len(inputs), dtype=bool)
    try:
        for indices, embeddings in batches:
            rows[indices.numpy()] = quantize(embeddings.numpy(), at_once, ranges)
            is_there[indices.numpy()] = True
    except BrokenInputError as error:
        raise BrokenInputError(error.broken, EmbedResult(rows[is_there], np.flatnonzero(is_there))) from None
    if errors:
        said = " | ".join(error.message for error in errors[:_SHOWN])
        logger.warning("%d of %d inputs are broken: %s", len(errors), len(inputs), said)
    places = np.flatnonzero(is_there)
    rows = rows if is_there.all() else rows[places]
    if at_once != precision and len(rows):
        good = rows[~np.isin(places, [error.index for error in errors])]  # zeros in place of others are no range
        rows = quantize(rows, precision, ranges_of(good, precision))
    return EmbedResult(rows, places, tuple(sorted(errors)))


def iterate_embeddings(
    model: Any,
    inputs: Iterable[Any],
    *,
    prompt: str | None = None,
    max_batch_tokens: int | None = None,
    num_workers: int | None = None,
    on_error: OnError = "raise",
    report: Callable[[BrokenInput], object] | None = None,
    load: Callable[[Any], Any] | None = None,
    truncate_dim: int | None = None,
    processing_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    num_kept_layers: int | None = None,
    sort: bool = True,
    show_progress_bar: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Embed a list or a stream batch by batch, in memory that does not depend on its length.

    Args:
        model: A PUMA model as a `SentenceTransformer`, switched to evaluation mode. Any other, or a PUMA that an older
            version has written, embeds by its own `encode`: the same rows, no sooner.
        inputs: The inputs; any iterable, read once, at most a window of 4,096 ahead.
        prompt: Instruction for inputs that bring none of their own; by default the model's default prompt.
        max_batch_tokens: Most tokens of a batch. Default: 16,384 on CUDA, 2,048 elsewhere.
        num_workers: Processes that prepare inputs. Default: on CUDA up to 8, elsewhere 0, which is this process.
        on_error: What to do about an input that cannot be read: "raise"; "skip", which leaves its row out; or "zero".
        report: Called with each broken input that "skip" and "zero" pass over.
        load: Your own loader, such as from a URL to bytes; called in a worker on every input.
        truncate_dim: Keep the first so many dimensions, scaled to unit length; by default the model's own.
        processing_kwargs: As in `encode`: `{"image": {"max_pixels": ...}, "text": {"max_length": ...}}`.
        max_length: Longest sequence in tokens; texts are cut.
        num_kept_layers: Run only the first so many layers, as a model cut to these would; PUMA models alone.
        sort: Whether to sort by length, inside of a window; otherwise rows come in the order of the inputs, but for
            broken ones.
        show_progress_bar: Whether to show inputs a second and the time left.

    Returns:
        An iterator over indices `(batch_size,)`, int64, into the inputs, and float32 rows
        `(batch_size, embedding_dim)`, both on the CPU. Every input comes once, the longest of a window first.

    Raises:
        BrokenInputError: While iterating, after all that was embedded before has been yielded.
        ValueError: As in `embed`.
        RuntimeError: As in `embed`.

    Example:

    ```python
    >>> for indices, rows in iterate_embeddings(model, captions):  # doctest: +SKIP
    ...     index.add_with_ids(rows.numpy(), indices.numpy())
    ```
    """
    _check(model, inputs, on_error)
    dim = embedding_dim(model, truncate_dim)
    if num_kept_layers is not None:
        if not is_puma(model) or "num_kept_layers" not in signature(model[0].embed_batch).parameters:
            problem = f"num_kept_layers={num_kept_layers} is for PUMA models with the code of this version"
            raise ValueError(f"{problem}, which {model_name(model)!r} is none of. Leave it out.")
        model[0].model.config.check_depths([num_kept_layers])
        model[0].model.config.warn_if_untrained(num_kept_layers)
    prompt = model.prompts.get(model.default_prompt_name) if prompt is None else prompt
    on_cuda = torch.device(model.device).type == "cuda"
    total = len(inputs) if isinstance(inputs, Sized) else None
    # The plan aims at the budget, and the packer, which knows the true number of tokens, keeps to it.
    budget = max_batch_tokens or (CUDA_TOKENS if on_cuda else CPU_TOKENS)
    keep = None if truncate_dim is None and model.truncate_dim is None else dim
    options: dict[str, Any] = {"processing_kwargs": processing_kwargs, "max_length": max_length}
    packer: Any
    if has_packer := is_puma(model):
        packer = model[0].packer(prompt, **options)
        padded = packer.layout is None
        if not padded:
            packer = replace(packer, layout={**packer.layout, "max_tokens": budget})
        images = packer.processor.image_processor
        size = packer.processor._image_options(packer.options["images_kwargs"])["size"]
        limits = size["shortest_edge"], size["longest_edge"]
        guess = Guess((images.patch_size * images.merge_size) ** 2, limits, has_loader=load is not None)
        num_workers = default_num_workers(on_cuda, total) if num_workers is None else num_workers
    else:
        # Any other model embeds by its own `encode`, in this process, where a PUMA would be prepared: a broken input is
        # found and named in the same way, at the speed of `encode`.
        given = {name: value for name, value in options.items() if value is not None}
        given |= {"truncate_dim": keep, "normalize_embeddings": keep is not None, "show_progress_bar": False}
        packer = partial(model.encode, prompt=prompt, convert_to_tensor=True, **given)
        guess, padded, num_workers = Guess(28 * 28, (0.0, 300 * 28 * 28), load is not None), True, 0
    chunks = prepared(
        plan(inputs, guess, budget, sort=sort, padded=padded),
        packer,
        load,
        num_workers=num_workers,
        pin_memory=on_cuda and has_packer,
    )
    progress = partial(tqdm, total=total, desc="Embedding", unit="item", disable=not show_progress_bar, smoothing=0.1)
    model.eval()
    start = partial(_start, model, truncate_dim=keep, num_kept_layers=num_kept_layers)
    return _rows(chunks, start, _IN_FLIGHT if on_cuda else 0, progress, on_error, report, dim)


def _rows(
    chunks: Generator[Prepared, None, None],
    start: Callable[[Prepared], tuple[Tensor | None, Any]],
    in_flight: int,
    new_progress: Callable[[], Any],
    on_error: OnError,
    report: Callable[[BrokenInput], object] | None,
    dim: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    started: deque[tuple[Prepared, Tensor | None, Any]] = deque()
    # However it ends, so do the worker processes.
    with closing(chunks), new_progress() as progress:
        while True:
            # On CUDA a chunk is asked for when two more have been started: the device never waits for the host.
            started.extend((chunk, *start(chunk)) for chunk in islice(chunks, in_flight + 1 - len(started)))
            if not started:
                return
            chunk, rows, event = started.popleft()
            if event is not None:
                event.synchronize()
            if rows is not None:
                progress.update(len(rows))
                # A clone, made outside inference mode, is a tensor like any other; and pinned memory goes back.
                yield torch.tensor(chunk.indices), rows.clone()
            if chunk.broken and on_error == "raise":
                raise BrokenInputError(chunk.broken[0])
            progress.update(len(chunk.broken))
            if report is not None:
                for one in chunk.broken:
                    report(one)
            if chunk.broken and on_error == "zero":
                yield torch.tensor([one.index for one in chunk.broken]), torch.zeros(len(chunk.broken), dim)


@torch.inference_mode()
def _start(
    model: Any, chunk: Prepared, truncate_dim: int | None, num_kept_layers: int | None
) -> tuple[Tensor | None, Any]:
    """The float32 rows of a chunk on the CPU; on CUDA they are there when the event has happened."""
    if chunk.batch is None:
        return None, None
    if isinstance(chunk.batch, Tensor):  # rows that `encode` has made
        return chunk.batch.float().cpu(), None
    try:
        if isinstance(chunk.batch, dict):
            batch: Any = batch_to_device(chunk.batch, model.device)
        else:  # from pinned memory, which is copied while the device computes
            batch = chunk.batch.to(model.device, non_blocking=True)
        # The code beside older models takes the batch alone.
        features = model[0].embed_batch(batch, *(() if num_kept_layers is None else (num_kept_layers,)))
        for module in list(model)[1:]:
            features = module(features)
    except torch.OutOfMemoryError as error:
        error.add_note("Lower max_batch_tokens.")
        raise
    rows: Tensor = features["sentence_embedding"].float()
    rows = rows if truncate_dim is None else normalize(rows[:, :truncate_dim], dim=1)
    if rows.device.type != "cuda":
        return rows.cpu(), None
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(rows.device))  # by default that of the current device
    return host, event


def default_num_workers(on_cuda: bool, num_inputs: int | None) -> int:
    """Processes that prepare inputs."""
    # None where the model itself needs the processors. Beside a GPU, decoding images ahead of it is what they are for.
    if not on_cuda:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    useful = _MOST_WORKERS if num_inputs is None else num_inputs // _INPUTS_PER_WORKER
    return max(0, min(_MOST_WORKERS, cores - 1, useful))


def _check(model: Any, inputs: Any, on_error: str) -> None:
    if not isinstance(model, SentenceTransformer):
        raise ValueError(f"model is a {type(model).__name__}, must be a SentenceTransformer. Open it as one.")
    # A table of pandas or Arrow would yield its columns, or their names.
    if isinstance(inputs, str | bytes | Mapping) or hasattr(inputs, "columns"):
        raise ValueError(f"inputs must be a list of inputs, got {type(inputs).__name__}. Wrap a single input in [ ].")
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], Mapping) and "role" in inputs[0]:
        raise ValueError("inputs is one chat, and embed takes a list of inputs. Wrap it in [ ].")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error is {on_error!r}, must be one of {', '.join(map(repr, get_args(OnError)))}.")


def is_puma(model: Any) -> bool:
    """Whether a model is a PUMA as a `SentenceTransformer`, with the code of this version."""
    is_ours = isinstance(model, torch.nn.Sequential) and len(model) > 0 and hasattr(model[0], "packer")
    return is_ours and hasattr(model[0].packer(), "layout")


def processing_for(
    model: Any, special_tokens: SpecialTokens, max_pixels: int | None, decode: Decode | None
) -> dict[str, dict[str, Any]]:
    """`processing_of` these settings, as far as a model takes them; ValueError if it cannot do what is asked for."""
    processor = _processor_of(model)
    if not hasattr(processor, "process_inputs"):
        name = model_name(model)
        if decode == "fast":
            problem = f"decode='fast' is for PUMA models alone: {name!r} is none, and decodes every pixel."
            raise ValueError(f"{problem} Leave it out (--decode).")
        # Processors whose limit is a number of pixels, such as Qwen-VL's, have it among the types of what they take.
        kinds = getattr(getattr(processor, "image_processor", None), "valid_kwargs", None)
        if max_pixels is not None and "max_pixels" not in getattr(kinds, "__annotations__", ()):
            problem = f"max_pixels={max_pixels} cannot be passed on to {name!r}: it has no such limit for images."
            raise ValueError(f"{problem} Leave it out (--max-pixels).")
        decode = None  # of "exact" it knows nothing, and need not
    return processing_of(special_tokens, max_pixels, decode)


def image_settings(model: Any, processing_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What embeddings of images depend on besides the model: `max_pixels`, None for its own limit, and `decode`."""
    processor, given = _processor_of(model), (processing_kwargs or {}).get("image", {})
    if not hasattr(processor, "process_inputs"):
        return {"max_pixels": given.get("max_pixels"), "decode": "exact"}
    saved = model[0].processing_kwargs.get("image", {})
    own, now = (processor._image_options(one)["size"]["longest_edge"] for one in (saved, {**saved, **given}))
    return {"max_pixels": None if now == own else now, "decode": {"decode": "fast", **saved, **given}["decode"]}


def _processor_of(model: Any) -> Any:
    is_ours = isinstance(model, torch.nn.Sequential) and len(model) > 0
    return getattr(model[0], "processor", None) if is_ours else None


def embedding_dim(model: Any, truncate_dim: int | None = None) -> int:
    """Dimensions of an embedding after truncation."""
    # Of the last module that has any: a Dense layer may come after the model.
    full = [module.get_embedding_dimension() for module in model if hasattr(module, "get_embedding_dimension")][-1]
    if truncate_dim is not None and not 1 <= truncate_dim <= full:
        raise ValueError(f"truncate_dim is {truncate_dim}, must be 1 to {full}, the dimensions of this model.")
    return int(min(full, truncate_dim or model.truncate_dim or full))


def quantize(rows: NDArray[Any], precision: Precision, ranges: Any = None) -> NDArray[Any]:
    """Float32 rows `(num_rows, embedding_dim)` in another precision, through sentence-transformers.

    Binary rows have a bit for each dimension; int8 and uint8 need `ranges`, `(2, embedding_dim)`.
    """
    if precision in ("float32", "float16"):
        return rows.astype(precision, copy=False)
    if not np.isfinite(rows).all():  # which no integer shows
        remedy = "Load the weights as bfloat16 or float32, and look at the inputs."
        raise ValueError(f"Embeddings have NaN or infinity, which {precision} cannot hold. {remedy}")
    given = None if ranges is None else np.asarray(ranges, np.float32)
    # Of more rows, such as embeddings to calibrate by, sentence-transformers would take the first two for the limits.
    if given is not None and given.shape != (2, rows.shape[1]):
        raise ValueError(f"ranges is of shape {given.shape}, must be (2, {rows.shape[1]}): lowest and highest values.")
    quantized: Any = quantize_embeddings(rows, precision=precision, ranges=given)  # type: ignore[arg-type]
    return np.asarray(quantized)


def ranges_of(rows: NDArray[Any], precision: str) -> list[list[float]]:
    """Lowest and highest value of each dimension, `(2, embedding_dim)`; a ValueError for fewer than two rows."""
    if len(rows) < 2:
        raise ValueError(
            f"precision={precision!r} is scaled by the embeddings of 2 inputs or more, and there are {len(rows)} here. "
            "Take float32, float16 or binary."
        )
    return [rows.min(axis=0).tolist(), rows.max(axis=0).tolist()]
