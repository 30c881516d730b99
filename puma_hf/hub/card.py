"""The card of a directory that is to be published: every number in it is read from a file or counted on the weights."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCardData
from sentence_transformers import SentenceTransformer

from puma_hf import __version__
from puma_hf.configs import RECIPES, PushConfig
from puma_hf.estimate import count_parameters
from puma_hf.evaluation.layer_sweep import TEXT_TOKENS, decoder_of, layer_costs
from puma_hf.evaluation.results import PUBLISHED, MBEIRResults, markdown_table
from puma_hf.files import is_adapter_directory, is_hub_id, named_base, read_config, write_whole
from puma_hf.fingerprint import model_fingerprint, short_name
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.pruning import TAGS, fill_template, told_limits

logger = logging.getLogger(__name__)

RESULTS = "results.json"
_MERGED = "- A LoRA adapter was trained and merged into the weights; its recipe is not at hand."
# What a merge notes in the card, and what this module makes of that: a card is written anew more than once.
_STAGES = r"(?m)^- (A LoRA adapter .*was trained and merged into the weights|Trained with the loss|Distilled without)"
# What is told of a recipe; InfoNCE has one temperature, and without a teacher there are no two terms.
_OF_MAC = ["hard_temperature", "schedule", "schedule_end", "grouping"]
_OF_TEACHER = ["teacher", "metric", "relational_temperature", "distillation_weight", "distillation_weight_start"]
_OF_TEACHER += ["contrastive_weight", "contrastive_weight_start"]
_TOLD = ["data", "split", "temperature", *_OF_MAC, "split_weight", "num_negatives", "matryoshka_dims", *_OF_TEACHER]
_TOLD += ["depths", "depth_weights", "max_steps", "batch_size", "learning_rate", "lora_r", "seed"]
_EXAMPLE_PROMPT = "mbeir_mscoco_task0"  # shown in the example for use, if the model has it


@dataclass(frozen=True)
class CardOptions:
    """What a card says that no file knows."""

    repo_id: str | None = None  # Hub id that the model will have
    base_model: str | None = None  # Hub id of what it was made from; by default the one its configuration names
    license: str | None = None  # in the Hub's spelling
    datasets: tuple[str, ...] = ()  # Hub ids of what it was trained on
    base_license: str | None = None
    data_license: str | None = None


def write_card(
    directory: str | Path, *, results: Iterable[str | Path] | None = None, options: CardOptions | None = None
) -> str:
    """Write a directory's `README.md` anew, filled from its own files and from result files.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        results: results.json of `puma-hf evaluate`, train.yaml and distill.yaml of training. By default those in the
            directory and in those beside it that are this model's.
        options: What no file knows.

    Returns:
        The card.

    Raises:
        FileNotFoundError: If the directory is none of ours.
        ValueError: If a result file cannot be read, or is of another model.

    Example:

    ```python
    >>> from puma_hf.hub import write_card

    >>> print(write_card("puma-k4-mac", results=["puma-k4-mac-test/results.json"]))  # doctest: +SKIP
    ```
    """
    content, _ = make_card(directory, results=results, options=options)
    write_whole(Path(directory) / "README.md", content.encode())
    return content


def make_card(
    directory: str | Path,
    *,
    results: Iterable[str | Path] | None = None,
    options: CardOptions | PushConfig | None = None,
    code: Mapping[str, str] | None = None,
    beside: Path | None = None,
) -> tuple[str, dict[str, Path]]:
    """The card that `write_card` writes, and the result files that it cites by the names it calls them.

    With `code`, references of what travels with the model by class name, the card is that of a repository: it shows
    how these are opened, and calls result files as they will be called there. Those of a copy that is cut to fewer
    layers are looked for `beside` the directory that it was cut from.
    """
    folder, options = Path(directory), options or CardOptions()
    is_adapter = is_adapter_directory(directory)
    # A Hub id is a path to nowhere here, so nothing is known of that base.
    base = Path(named_base(folder) or folder) if is_adapter else folder
    config, model = read_config(base), load_model(folder)
    # Figures come from files that say which model they are of: nobody can write one into a card by hand.
    found = read_results(folder, model, results, travelling=code is not None, beside=beside)
    named = config.get("source_name_or_path")
    if is_adapter:  # a folder of this machine is nobody else's business
        named = base.as_posix() if is_hub_id(base.as_posix()) and not base.exists() else None
    named = options.base_model or named
    metadata: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    metadata |= {"license": options.license, "datasets": list(options.datasets) or None}
    metadata["tags"] = [*TAGS, *(["peft", "lora"] if is_adapter else [])]
    if named and is_hub_id(named):
        metadata |= {"base_model": named, "base_model_relation": "adapter" if is_adapter else "finetune"}
    # The Hub reads the model index from the metadata; a card without results must not have one.
    if eval_results := list(_eval_results(found)):
        metadata |= {"eval_results": eval_results, "model_name": options.repo_id or folder.resolve().name}
    names = ("source_revision", "num_kept_layers", "original_num_hidden_layers", "kept_layers")
    values = {name: config.get(name) for name in names} | ({} if is_adapter or model is None else count_facts(model))
    values |= {"model_id": options.repo_id, "title": None if options.repo_id else folder.resolve().name}
    values |= {"options": options, "is_adapter": is_adapter, "code": dict(code or {}), "puma_hf_version": __version__}
    values |= {"source": named, "embedding_dim": config.get("text_config", {}).get("hidden_size")}
    values |= {"limits": told_limits(folder), "training": _training(folder, found, is_adapter)}
    values |= _usage(folder, found, values["embedding_dim"] or 0)
    values["no_ret"] = bool(config) and config.get("ret_token_id") is None
    values["backbone"] = config_class_of(config["model_type"]).source_name if config else None
    values["results"] = "\n\n".join(_table(*evaluation) for evaluation in found.evaluations) or None
    values["not_measured"] = _not_measured(found)
    values |= _depths(values.get("depths") or [], config.get("num_kept_layers"), found)
    return fill_template(ModelCardData(**metadata), **values), found.files


# --- the model itself


def load_model(folder: Path, num_kept_layers: int | None = None) -> Any:
    """The model of a directory or its first layers; None if it cannot be loaded, as an adapter without its base."""
    try:
        cut: Any = {} if num_kept_layers is None else {"model_kwargs": {"num_kept_layers": num_kept_layers}}
        return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **cut)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning("%s cannot be loaded (%s), so no results are known to be its own.", folder, reason)
        return None


def count_facts(model: Any) -> dict[str, Any]:
    """Parameters, bytes and operations after the cut and before it, and of each depth to load, by the card's names."""
    config, text = model[0].model.config, model[0].model.config.text_config
    after, layer = count_parameters(model), count_parameters(decoder_of(model).layers[-1])
    # Dropped layers are as large as kept ones, unless a family's differ, and the head has the shape of the embedding.
    head = 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
    dropped = config.original_num_hidden_layers - config.num_kept_layers
    before, width, operations = after + head + layer * dropped, model.dtype.itemsize, {}
    costs, image_tokens = layer_costs(model)
    kinds = {"flops_text": f"text of {TEXT_TOKENS} tokens", "flops_image": f"image of {image_tokens} visual tokens"}
    for name, kind in kinds.items():
        flops = [cost[name] for cost in costs]
        # Of one layer alone its share of the operations is not known.
        operations[kind] = (flops[-1], flops[-1] + dropped * (flops[-1] - flops[-2]) if len(flops) > 1 else None)
    facts = {"parameters_after": after, "parameters_before": before, "operations": operations}
    names = {name: f"operations, {kind}" for name, kind in kinds.items()}
    facts["depths"] = [
        {"layers": depth, **{names.get(name, name): value for name, value in costs[depth - 1].items()}}
        for depth in config.trained_depths or ()
    ]
    facts |= {"bytes_after": after * width, "bytes_before": before * width}
    if config.has_linear_attention:  # how many of either kind were dropped is not known
        facts |= {"parameters_before": None, "bytes_before": None}
        facts["operations"] = {kind: (now, None) for kind, (now, _) in operations.items()}
    return facts | {"dtype": str(model.dtype).removeprefix("torch.")}


# --- result files


@dataclass
class CardResults:
    """What was measured on a model, each after the words that cite its file."""

    evaluations: list[tuple[str, MBEIRResults]] = field(default_factory=list)  # tables of `puma-hf evaluate`
    exits: list[tuple[str, MBEIRResults]] = field(default_factory=list)  # those of trained depths below its own
    files: dict[str, Path] = field(default_factory=dict)  # where these come from, by the names that the card has
    # Settings of the stages that it was trained in. They hold paths of this machine, so they are cited and stay here.
    recipes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def read_results(
    folder: Path,
    model: Any,
    paths: Iterable[str | Path] | None,
    *,
    travelling: bool = False,
    beside: Path | None = None,
) -> CardResults:
    """Read result files, or with None those beside the model that are its own, at its depth or a trained one below.

    ValueError if a file that was named cannot be read, or is of another model; others are passed by, and of a cut copy
    those of depths that it does not have.
    """
    found, whole, config = CardResults(), read_config(beside or folder), read_config(folder)
    own, trained = config.get("num_kept_layers"), config.get("trained_depths") or ()

    @cache  # all weights are read for it
    def own_fingerprint(depth: int | None, truncate_dim: int | None) -> str | None:
        one = model if depth == own else load_model(folder, depth)
        if one is None:
            return None
        one.truncate_dim = truncate_dim
        fingerprint = model_fingerprint(one)
        if one is not model:
            one.to("meta")  # it holds itself in a cycle, so its weights would stay a while
        return fingerprint

    for path in find_results(beside or folder) if paths is None else map(Path, paths):
        try:
            content, name = path.read_bytes(), f"{path.resolve().parent.name}/{path.name}"
            digest = hashlib.sha256(content).hexdigest()[:12]
            if path.name in RECIPES.values():
                settings = dict(yaml.safe_load(content).items())
                found.recipes.append((f"`{name}`, SHA-256 {digest}", settings))
                continue
            results = MBEIRResults.from_dict(json.loads(content))
            # Of an adapter the depth is its base's.
            depth = own and results.made_from.setdefault("num_kept_layers", whole["num_kept_layers"])
            if depth != own and depth not in trained:
                if beside is not None:
                    continue
                raise ValueError(f"it is of {depth} layers, which are none of its trained depths")
            # Dimensions may be chosen when a model is loaded, or for a call of `encode`, which no fingerprint covers.
            dims = {results.made_from.get("truncate_dim"), None}
            if results.made_from.get("model_fingerprint") not in {own_fingerprint(depth, dim) for dim in dims} - {None}:
                raise ValueError("it is of another model, by its fingerprint")
        except (ValueError, OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:  # or it is damaged
            if paths is not None:
                problem = f"results {str(path)!r} is no result of {str(folder)!r} ({error})."
                raise ValueError(f"{problem} Measure this model again: puma-hf evaluate.") from error
            logger.info("not in the card: %s (%s)", path, error)
        else:
            if travelling:  # as it will be called beside the model, where no folder tells the tables apart
                name = f"results-{len(found.files) + 1}.json" if found.files else RESULTS
            found.files[name] = path
            measured = found.evaluations if depth == own else found.exits
            measured.append((f"`{name}`, SHA-256 {digest}", results))
    return found


def find_results(directory: Path) -> list[Path]:
    """Result files in a directory and in those beside it, and the directory's recipes, which a merge copies there."""
    folder = directory.resolve()
    # `glob` passes by what may not be looked into; `Path.is_file` raises there.
    beside = [folder.parent / name for name in sorted(glob.glob(f"*/{RESULTS}", root_dir=folder.parent))]
    recipes = [folder / name for name in RECIPES.values() if (folder / name).is_file()]
    return [*sorted(beside, key=lambda path: path.parent != folder), *recipes]


# --- what the card says of them


def _eval_results(found: CardResults) -> Iterator[EvalResult]:
    """One entry of the model index a row of the tables, with the file's own value."""
    for cited, results in found.evaluations:
        data, dims = _setting(results)
        for row in results.rows:
            yield EvalResult(
                task_type="retrieval",
                task_name=f"Multimodal retrieval, {row.task.arrow}",
                dataset_type=data,
                dataset_name=f"{data}: {row.task.name}, {row.pool} pool{dims}",
                dataset_config=f"{row.task.name}-{row.pool}{dims}",
                dataset_split=results.split,
                metric_type=f"hit_at_{row.task.reported_k}",
                metric_name=f"hit@{row.task.reported_k}, {cited.split('`')[1]}",
                metric_value=row.score,
            )


def _setting(results: MBEIRResults) -> tuple[str, str]:
    """The data, and how the vectors were made where that is not the usual way."""
    made_from = results.made_from
    dims = "" if (dim := made_from.get("truncate_dim")) is None else f", first {dim} dimensions"
    dims += f", at most {pixels:,} pixels" if (pixels := made_from.get("max_pixels")) else ""
    if other := made_from.get("candidates_model"):
        dims += f", candidates of {other}"
        dims += f" at {depth} layers" if (depth := made_from.get("candidates_num_kept_layers")) else ""
    return str(made_from.get("data") or "unknown"), dims


def _depths(rows: Sequence[dict[str, Any]], own: Any, found: CardResults) -> dict[str, Any]:
    """The table of the depths that a model was trained for, if some are below its own, with means of result files."""
    below = [row["layers"] for row in rows if row["layers"] < own]
    if not below:
        return {"depths": None}
    scores: dict[str, dict[int, float]] = {}
    for _, results in (measured := [*found.exits, *found.evaluations]):
        data, dims = _setting(results)
        for pool in results.pools:
            by_depth = scores.setdefault(f"hit@k, {data} {results.split}{dims}, {pool}", {})
            by_depth.setdefault(results.made_from["num_kept_layers"], 100 * results.mean(pool)["score"])
    table = [row | {name: by_depth.get(row["layers"]) for name, by_depth in scores.items()} for row in rows]
    cited = ", ".join(cited for cited, _ in measured)
    return {"depths": markdown_table(table), "example_depth": max(below), "depths_cited": cited}


def _table(cited: str, results: MBEIRResults) -> str:
    # A popularity-corrected figure is no part of M-BEIR's protocol, so it never enters a card.
    made_from = {name: value for name, value in results.made_from.items() if name != "popularity_penalty"}
    plain = replace(results, rows=[replace(row, corrected={}) for row in results.rows], made_from=made_from)
    told = f"From {cited}, written by `puma-hf evaluate` and checked to be of these weights, with all metrics."
    return f"{plain.to_markdown().strip()}\n\n{told}"


def _training(folder: Path, found: CardResults, is_adapter: bool) -> str | None:
    """The stages, from their recipes; where those are missing, how many there were; None of an adapter without one."""
    lines = []
    for cited, recipe in found.recipes:
        loss = recipe.get("loss")
        what = f"Trained with the loss `{loss}`" if loss else "Distilled without labels"
        has_teacher = not loss or recipe.get("distillation_weight") or recipe.get("distillation_weight_start")
        unused = [*(_OF_MAC if loss == "infonce" else []), *([] if has_teacher else _OF_TEACHER)]
        unused += [] if loss == "mac-split" else ["split_weight"]
        unused += [] if recipe.get("depths") else ["depth_weights"]
        unused += [] if recipe.get("metric") == "relational" else ["relational_temperature"]
        told = {name: recipe[name] for name in _TOLD if name not in unused and recipe.get(name) not in (None, [])}
        # Of paths the last part: where they lie here is nobody else's business.
        told |= {name: short_name(str(told[name])) for name in ("data", "teacher") if name in told}
        lines.append(f"- {what}: {', '.join(f'{name} {value}' for name, value in told.items())}. From {cited}.")
    # A card is written from nothing, so that a merge without its recipe is known from the card of before alone.
    card = folder / "README.md"
    merges = len(re.findall(_STAGES, card.read_text(encoding="utf-8"))) if card.is_file() else 0
    lines[:0] = [_MERGED] * (merges - len(lines))
    return "\n".join(lines) or (None if is_adapter else "No training after the cut is on record.")


def _usage(folder: Path, found: CardResults, embedding_dim: int) -> dict[str, Any]:
    """The model's instructions, one for the example, and how many dimensions that keeps."""
    saved = read_config(folder, "config_sentence_transformers.json").get("prompts") or {}
    prompts = {name: prompt for name, prompt in saved.items() if prompt}
    example = prompts.get(_EXAMPLE_PROMPT, next(iter(prompts.values()), None))
    trained = [min(dims) for _, recipe in found.recipes if (dims := recipe.get("matryoshka_dims"))]
    return {
        "prompts": prompts,
        # Quoted for JSON it is quoted for Python, too.
        "example_instruction": None if example is None else json.dumps(example, ensure_ascii=False),
        "matryoshka": bool(trained),
        "truncate_dim": trained[-1] if trained else embedding_dim // 2,
    }


def _not_measured(found: CardResults) -> list[str]:
    """What the result files do not hold."""
    whole = [one for _, one in found.evaluations if one.is_whole]
    there = {row.task.name for one in whole for row in one.rows}
    absent = [name for name in PUBLISHED if name not in there]
    lines = [f"Of M-BEIR's {len(PUBLISHED)} rows: {', '.join(absent) if there else 'all'}."] if absent else []
    lines += ["How much the figures would vary with another seed of the training."] if found.evaluations else []
    return [*lines, "Speed and memory, other data types than that of the weights, video."]
