"""How to choose k: every depth of a model measured in one forward pass of the whole model.

A model pruned to k layers returns `norm(h_k)`, and one pass of all L layers computes h_1 .. h_L anyway. So the last
token's state is kept after every layer, and L evaluations cost the operations of one.

Source: PUMA, ACM MM 2025, arXiv 2507.08064 prunes to the first k layers; measuring all k at once is this library's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.masking_utils import create_masks_for_generate

from puma_hf.checkpoint import open_checkpoint, open_sentence_transformer, plain_forward
from puma_hf.configs import SweepConfig, parse_limits, parse_parameters
from puma_hf.data.mbeir_hub import open_mbeir
from puma_hf.estimate import count_parameters, counted_pass
from puma_hf.evaluation.evaluator import HeldInputs
from puma_hf.evaluation.mbeir import POOLS, draw_nano, read_searches
from puma_hf.evaluation.sweep_report import DepthPair, SweepReport, SweepRow, SweptModel
from puma_hf.files import is_puma_directory, read_config
from puma_hf.fingerprint import short_name
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.modeling.modeling_puma import last_token_state
from puma_hf.processes import connect
from puma_hf.pruning import prune
from puma_hf.settings import from_extra, processing_of

logger = logging.getLogger(__name__)

TEXT_TOKENS = 64
_IMAGE_SIDE = 16  # tokens along each side of a square image
_TIMED_PASSES = 5
_DISTILLED = "distilled for one depth"


# --- The embeddings of all depths -----------------------------------------------------------------------------------


def decoder_of(model: SentenceTransformer) -> Any:
    """The decoder of a PUMA model, which has the `layers` and the final `norm`."""
    if len(model) > 1:  # a further one, such as Normalize, would take the embeddings of all depths for one
        raise ValueError(f"The model has {len(model)} modules, must be a PUMA model alone, as `puma-hf prune` has it.")
    return cast(Any, model[0]).model.language_model


def keep_last_depths(model: SentenceTransformer) -> range:
    """Each k below L at which a model may keep its first k - 1 layers and the last; DeepStack's layers stay."""
    decoder, puma = decoder_of(model), cast(Any, model[0])
    return range(puma.model.config.num_deepstack_layers + 1, len(decoder.layers))


@contextmanager
def _all_depths(model: SentenceTransformer, joined: Sequence[int]) -> Iterator[None]:
    """Within the block, the embeddings of all depths of an input lie side by side in the one that `model` returns."""
    decoder, layers = decoder_of(model), decoder_of(model).layers
    types = getattr(decoder.config, "layer_types", None) or [""] * len(layers)
    masks: list[Any] = []
    found: dict[int, Tensor] = {}  # by depth; each batch writes over the last one's

    def keep(depth: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        # Picking rows copies them, so a layer's other positions are free to go: memory grows by L x hidden_size an
        # input, not by the length of the sequence.
        found[depth] = last_token_state(output[0] if isinstance(output, tuple) else output, masks[-1])

    def join(depth: int, kind: str, layer: nn.Module, args: Any, options: dict[str, Any]) -> None:
        if kind != types[-1]:  # the last layer has another kind of attention, and so another mask
            made = create_masks_for_generate(decoder.config, args[0], masks[-1], None, options.get("position_ids"))
            options = {**options, "attention_mask": made[types[-1]]}
        # `forward`, not a call, which would run the last layer's own hook.
        keep(depth, layer, args, layers[-1].forward(*args, **options))

    def finish(_module: nn.Module, _args: Any, features: dict[str, Any]) -> dict[str, Any]:
        normed = decoder.norm(torch.stack([found[depth] for depth in sorted(found)], dim=1))
        embeddings = nn.functional.normalize(normed.float(), dim=-1)
        return {**features, "sentence_embedding": embeddings.flatten(start_dim=1)}

    hooks = [model[0].register_forward_pre_hook(lambda _, args: masks.append(args[0].get("attention_mask")))]
    hooks += [layer.register_forward_hook(partial(keep, depth)) for depth, layer in enumerate(layers)]
    for depth, k in enumerate(joined, start=len(layers)):
        hooks += [layers[k - 1].register_forward_pre_hook(partial(join, depth, types[k - 1]), with_kwargs=True)]
    hooks += [model[0].register_forward_hook(finish)]
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)  # which removes it
        stack.enter_context(plain_forward(model))  # the fast path calls no layer as a whole
        yield


def encode_all_layers(
    model: SentenceTransformer,
    inputs: Sequence[Any],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    processing_kwargs: Mapping[str, Any] | None = None,
    keep_last: bool = False,
) -> Tensor:
    """Embed inputs as every model pruned to k = 1 .. L layers would, in one forward pass of all L.

    The embedding at depth k is `L2(norm(h_k)[RET])`, where h_k is what layer k hands on. With `keep_last` also as the
    models of the first k - 1 layers and the last would: one more call of the last layer for each.

    Returns:
        `(L, len(inputs), hidden_size)`, float32, on the CPU, each row of length 1; row k - 1 is that of k layers. With
        `keep_last` a row for each of `keep_last_depths` comes after these.

    Raises:
        ValueError: If the model has further modules.

    Example:
        >>> encode_all_layers(model, ["a red apple", {"image": "apple.png"}]).shape  # doctest: +SKIP
        torch.Size([28, 2, 1536])
    """
    num_layers, joined = len(decoder_of(model).layers), keep_last_depths(model) if keep_last else range(0)
    depths, hidden_size = num_layers + len(joined), decoder_of(model).config.hidden_size
    with _all_depths(model, joined):
        encoded: Any = model.encode(
            list(inputs),
            prompt=prompt or "",  # unlike None, it keeps a SentenceTransformer's default prompt away
            batch_size=batch_size,
            processing_kwargs=processing_kwargs,
            show_progress_bar=False,
            truncate_dim=depths * hidden_size,  # the model's own would cut off depths, which lie side by side
        )
    embeddings: Tensor = torch.as_tensor(encoded).unflatten(1, (depths, hidden_size))
    return embeddings.transpose(0, 1)


# --- How alike two depths are ---------------------------------------------------------------------------------------


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two spaces `(num_inputs, dim)` and `(num_inputs, other_dim)`, in float64.

    `||Y^T X||^2 / (||X^T X|| ||Y^T Y||)` in Frobenius norms, with the columns of X and Y centred: how alike the
    similarities among the inputs are. Turning, mirroring or scaling a space as a whole changes nothing.

    Returns:
        A number from 0 to 1; NaN where all rows of a space are alike.

    Example:
        >>> import torch
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> round(linear_cka(square, 3 * square.flip(1)), 6), round(linear_cka(square, square[:, :1]), 6)
        (1.0, 0.707107)

    Source: Kornblith et al., ICML 2019, arXiv 1905.00414, equations 3 and 4.
    """
    # Through dim x dim products: the Gram matrices of the definition would be num_inputs x num_inputs.
    x, y = (space.double() - space.double().mean(dim=0) for space in (first, second))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / norms) if norms > 0 else math.nan


# --- What each depth costs ------------------------------------------------------------------------------------------


def layer_costs(
    model: SentenceTransformer, max_pixels: int | None = None, *, time_text: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """What the models pruned to k = 1 .. L layers cost, counted on the whole one, and an image's visual tokens.

    Entry k - 1 has the `parameters`, `bytes`, `flops_text` and `flops_image` of k layers. A text has `TEXT_TOKENS` with
    its prompt; an image 256, or as many as the model's own limits leave of them. With `max_pixels` an image fills this
    limit, and `seconds_image` is there, too; with `time_text` `seconds_text`, from the words to the embedding.
    """
    puma = cast(Any, model[0])
    images = puma.processor.image_processor
    unit, grid = images.patch_size * images.merge_size, (_IMAGE_SIDE, _IMAGE_SIDE)
    if max_pixels is not None:  # of shapes up to 1 : 2 the one that comes closest to the limit
        most = max_pixels // unit**2
        shapes = [(high, min(2 * high, most // high)) for high in range(1, math.isqrt(most) + 1)]
        grid = max(shapes, key=math.prod)
    # An embedder's own prompt may be longer.
    length = max(TEXT_TOKENS, model.preprocess(["a"])["input_ids"].shape[1])
    read_text = partial(model.preprocess, [" ".join(["a"] * TEXT_TOKENS)], max_length=length)
    # A model that was trained on short texts alone may have a limit below that of an image's tokens.
    picture = {"image": Image.new("RGB", (grid[1] * unit, grid[0] * unit), "white")}
    reading: dict[str, Any] = {"max_length": 10 * max(_IMAGE_SIDE**2, math.prod(grid))}
    image = model.preprocess([picture], processing_kwargs=processing_of("raise", max_pixels), **reading)
    parameters = _cut(count_parameters(model), [count_parameters(layer) for layer in decoder_of(model).layers])
    flops = flops_by_depth(model, read_text()), flops_by_depth(model, image)
    costs = [
        {"parameters": count, "bytes": count * puma.model.dtype.itemsize, "flops_text": short, "flops_image": long}
        for count, short, long in zip(parameters, *flops, strict=True)
    ]
    timed: dict[str, Any] = {} if max_pixels is None else {"seconds_image": image}
    timed |= {"seconds_text": read_text} if time_text else {}
    for name, batch in timed.items():
        for cost, seconds in zip(costs, seconds_by_depth(model, batch), strict=True):
            cost[name] = seconds
    return costs, int((image["input_ids"] == puma.model.config.image_token_id).sum())


@torch.inference_mode()
def seconds_by_depth(
    model: SentenceTransformer, batch: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
) -> list[float]:
    """Seconds until each layer has computed a batch of `preprocess`, medians of `_TIMED_PASSES` after one more.

    A call that returns the batch is timed with it.
    """
    ready = batch if callable(batch) else partial(dict, batch_to_device(dict(batch), model.device))
    moments: list[list[float]] = []

    def note(*_: Any) -> None:
        if torch.device(model.device).type == "cuda":
            torch.cuda.synchronize()
        moments[-1].append(time.perf_counter())

    hooks = [layer.register_forward_hook(note) for layer in decoder_of(model).layers]
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        stack.enter_context(plain_forward(model))
        for _ in range(_TIMED_PASSES + 1):
            moments.append([])
            note()
            model(batch_to_device(dict(ready()), model.device))
    passes = torch.tensor(moments[1:], dtype=torch.float64)
    return (passes[:, 1:] - passes[:, :1]).median(dim=0).values.tolist()


def flops_by_depth(model: SentenceTransformer, features: Mapping[str, Any]) -> list[int]:
    """Operations of one batch of `preprocess` at every depth, as `count_flops` counts them, from one forward pass."""
    counter = counted_pass(model, features)
    spent = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    layers = [f".language_model.layers.{number}" for number in range(len(decoder_of(model).layers))]
    by_layer = [next(count for name, count in spent.items() if name.endswith(layer)) for layer in layers]
    return _cut(int(counter.get_total_flops()), by_layer)


def _cut(total: int, by_layer: Sequence[int]) -> list[int]:
    # `total` without the layers from k on, for k = 1 .. L.
    return [total - sum(by_layer[kept:]) for kept in range(1, len(by_layer) + 1)]


# --- The sweep ------------------------------------------------------------------------------------------------------


def embed_all_depths(
    held: HeldInputs,
    model: SentenceTransformer,
    *,
    earlier: Tensor | None = None,
    show_progress_bar: bool = False,
    **options: Any,
) -> Tensor:
    """The embeddings of what an evaluation holds, as `encode_all_layers` orders them; `options` are its own.

    Of `earlier`, what a call with another limit of images returned, texts stay, and the rest is written over.
    All of them are in memory: 4 bytes x depths x inputs x hidden size, 14 GB for M-BEIR's nano data and a 7B model.
    """

    def encode(inputs: list[Any], prompt: str) -> Tensor:
        # All depths of an input side by side, as one long embedding.
        return encode_all_layers(model, inputs, prompt=prompt, **options).transpose(0, 1).flatten(start_dim=1)

    before = None if earlier is None else earlier.transpose(0, 1).flatten(start_dim=1)  # a view
    embeddings = held.embed(encode, earlier=before, show_progress_bar=show_progress_bar)
    by_depth: Tensor = embeddings.unflatten(1, (-1, decoder_of(model).config.hidden_size))
    return by_depth.transpose(0, 1)


def sweep(config: SweepConfig, *, show_progress_bar: bool = True) -> SweepReport:
    """Quality, closeness to the full model, and costs of every k, and a recommendation, in one pass of each model.

    A model to compare with that was trained at several depths (`trained_depths`) has a row for each of these, and a
    pair for each two of them: queries at the one, candidates at the other, at the largest pixel limit if there are.

    Args:
        config: The model, the data, and what to decide by.
        show_progress_bar: Whether to show the progress.

    Raises:
        ValueError: If a model is of none of the families, or a launcher started this as one of several processes, or
            there is `max_query_ms` without a model to compare with that was trained at several depths.
        MBEIRFormatError: If a file of the data is not what the format says.
        FileNotFoundError: If a model, a file or an image is missing.
        ImportError: If `output` is given and matplotlib is not installed, as by `pip install 'puma-hf[plot]'`.

    Example:
        >>> from puma_hf.configs import SweepConfig
        >>> report = sweep(SweepConfig(model="demo/backbone", data="demo/emoji"))  # doctest: +SKIP
        >>> print(report.recommendation.reason)  # doctest: +SKIP
    """
    if (count := connect()[1]) > 1:  # each would embed everything, and write the same files
        raise ValueError(f"A sweep is the work of one process, not {count}. Start it without torchrun or accelerate.")
    if config.output is not None:  # better now than after an hour
        from_extra("matplotlib.figure", "plot")
        Path(config.output).mkdir(parents=True, exist_ok=True)
    sources, decides = [str(config.model), *config.compare, *config.distilled], POOLS[config.pool][0]
    names = [short_name(source) for source in sources]
    names = names if len(set(names)) == len(set(sources)) else sources
    swept: dict[str, SweptModel] = {}
    full: Tensor | None = None
    with TemporaryDirectory(prefix="puma-hf-") as folder:
        data = open_mbeir(config.data, split=config.split, tasks=config.tasks or None)
        if config.nano_queries or config.nano_candidates:
            data = draw_nano(data, Path(folder, "nano"), config)
        held = HeldInputs(read_searches(data, config.split, config.tasks or None, config.pool))
        # What is wrong with the last model shows before the first is embedded.
        stored = [read_config(open_checkpoint(source).folder) for source in sources]
        for one in stored:
            config_class_of(one.get("model_type"))
        if config.max_query_ms and not any(one.get("trained_depths") for one in stored[1 : 1 + len(config.compare)]):
            problem = f"max_query_ms={config.max_query_ms:g} is for pairs of depths, which nothing here was trained for"
            raise ValueError(f"{problem}. Leave it out, or name a model of `distill --depths` as --compare.")
        for number, (source, name) in enumerate(zip(sources, names, strict=True)):
            is_distilled = number > len(config.compare)
            with open_model(source, trust_remote_code=config.trust_remote_code) as model:
                full, curves = _curves(held, model, name, config, full, show_progress_bar, is_distilled)
            for curve in curves:  # what was distilled for one depth is a point of the others' curve
                rows = (*swept[curve.name].rows, *curve.rows) if curve.name in swept else curve.rows
                swept[curve.name] = replace(curve, rows=tuple(sorted(rows, key=lambda row: row.k)))
        measured = [search for search in held.searches if search.pool_name == decides]
        report = SweepReport(
            models=tuple(swept.values()),
            data=short_name(config.data),
            data_hash=data.content_hash,
            tasks=tuple(search.task.name for search in measured),
            num_queries=sum(len(search.relevance) for search in measured),
            num_candidates=held.num_candidates,
            pool=decides,
            text_tokens=TEXT_TOKENS,
            image_tokens=next(iter(swept.values())).image_tokens or 0,
            max_params=None if config.max_params is None else parse_parameters(config.max_params),
            **config.given("split", "metric", "keep", "max_query_ms"),
        )
    if config.output is not None:
        try:
            report.save(config.output)
        except OSError:
            logger.error("The files could not be written. What was measured:\n%s", report.to_markdown())
            raise
    return report


def _curves(
    held: HeldInputs,
    model: SentenceTransformer,
    name: str,
    config: SweepConfig,
    full: Tensor | None,
    show_progress_bar: bool,
    is_distilled: bool,
) -> tuple[Tensor | None, list[SweptModel]]:
    """The full model's embeddings, which are this one's if it is the first, and its curves at each pixel limit."""
    limits = (None,) if config.max_pixels is None else parse_limits(config.max_pixels)
    _check_limits(model, name, limits)
    puma = cast(Any, model[0]).model.config
    elastic = [] if full is None or is_distilled else sorted(getattr(puma, "trained_depths", None) or ())
    depths = [puma.num_kept_layers] if is_distilled else elastic  # the others nobody trained; none for all
    keep_last = config.keep_last and not depths
    options: dict[str, Any] = {"batch_size": config.batch_size, "keep_last": keep_last}
    curves: list[SweptModel] = []
    embeddings: Tensor | None = None
    for limit in limits:
        has_pairs = bool(elastic) and limit == limits[0]
        costs, tokens = layer_costs(model, limit, time_text=has_pairs)
        options["processing_kwargs"] = processing_of(config.special_tokens, limit, config.decode)
        options |= {"earlier": embeddings, "show_progress_bar": show_progress_bar}
        embeddings = embed_all_depths(held, model, **options)
        full, rows = _measure_depths(held, model, config, costs, full, embeddings, depths)
        at = "" if limit is None else f", {limit:,} pixels ({tokens} visual tokens)"
        named = f"{name}{', elastic' * bool(elastic)}{at}"
        if is_distilled:
            rows, named = [replace(row, name=named) for row in rows], f"{_DISTILLED}{at}"
        pairs = _measure_pairs(held, config.split, embeddings, elastic) if has_pairs else ()
        curves.append(SweptModel(named, tuple(rows[: len(costs)]), limit, tokens, pairs))
        if keep_last:  # the full model ends that curve, too
            kept = (*rows[len(costs) :], rows[len(costs) - 1])
            curves.append(SweptModel(f"{named}, first k - 1 layers and the last", kept, limit, tokens))
    return full, curves


def _check_limits(model: SentenceTransformer, name: str, limits: Sequence[int | None]) -> None:
    """Refuse pixel limits that the model cannot have, or that leave as many visual tokens as another."""
    images = cast(Any, model[0]).processor.image_processor
    area = (images.patch_size * images.merge_size) ** 2
    tokens = [limit // area for limit in limits if limit is not None]
    for limit in limits:
        if limit is not None and limit < (least := max(images.size["shortest_edge"], area)):
            raise ValueError(f"max_pixels={limit} must be at least {least}, the least that {name} reads. Choose more.")
        if limit is not None and tokens.count(limit // area) > 1:
            told = f"max_pixels={limit} and another limit both leave {limit // area} visual tokens"
            raise ValueError(f"{told}. Leave one out.")


def _measure_depths(
    held: HeldInputs,
    model: SentenceTransformer,
    config: SweepConfig,
    costs: Sequence[Mapping[str, Any]],
    full: Tensor | None,
    embeddings: Tensor,
    depths: Sequence[int],
) -> tuple[Tensor, list[SweepRow]]:
    """The full model's embeddings, which are this one's if it is the first, and a row for each of `depths`, or all."""
    num_layers = len(costs)
    joined = keep_last_depths(model) if len(embeddings) > num_layers else range(0)
    # On a GPU, if there is one: CKA is products of all inputs, in float64.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full = embeddings[num_layers - 1].to(device, copy=True) if full is None else full  # not a view of all depths
    rows = []
    for k, depth in zip([*range(1, num_layers + 1), *joined], embeddings, strict=True):
        if depths and k not in depths:
            continue
        results, depth = held.results(depth, config.split), depth.to(device)
        cka, is_same_size = linear_cka(depth, full), depth.shape == full.shape
        cosine = float(torch.cosine_similarity(depth.double(), full.double()).mean()) if is_same_size else None
        quality = {pool: results.mean(pool) for pool in results.pools}
        scores: dict[str, dict[str, float]] = {pool: {} for pool in results.pools}
        for row in results.rows:
            scores[row.pool][row.task.name] = row.score
        # All layers cost the same, so it is k that tells the costs, whichever layers are kept.
        told: dict[str, Any] = {**costs[k - 1], "cka": None if math.isnan(cka) else cka, "cosine": cosine}
        rows.append(SweepRow(k=k, quality=quality, scores=scores, **told))
    return full, rows


def _measure_pairs(held: HeldInputs, split: str, embeddings: Tensor, depths: Sequence[int]) -> tuple[DepthPair, ...]:
    """Queries at each of these depths against candidates at each that is no shallower."""
    pairs = []
    for query_k, candidate_k in combinations_with_replacement(depths, 2):
        results = held.results(embeddings[query_k - 1], split, candidates=embeddings[candidate_k - 1])
        pairs.append(DepthPair(query_k, candidate_k, {pool: results.mean(pool) for pool in results.pools}))
    return tuple(pairs)


@contextmanager
def open_model(source: str, *, trust_remote_code: bool = False) -> Iterator[SentenceTransformer]:
    """A PUMA directory or Hub id as it is; an original checkpoint as pruning makes it, with all its layers."""
    folder = open_checkpoint(source).folder
    if is_puma_directory(folder):
        yield open_sentence_transformer(source, trust_remote_code=trust_remote_code)
        return
    with TemporaryDirectory(prefix="puma-hf-") as copy:
        full, config = Path(copy, short_name(source)), AutoConfig.from_pretrained(folder)
        report = prune(source, full, num_kept_layers=config.get_text_config().num_hidden_layers)
        told = "%s is an original checkpoint, read in a temporary copy as %r (%s)"
        logger.info(told, source, report.reading, report.found)
        yield open_sentence_transformer(str(full))
