"""The card of a directory that is to be published: every number in it is read from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from puma_hf import __version__
from puma_hf.card_results import CardResults, MeasuredModel, read_results
from puma_hf.checkpoint import is_kept
from puma_hf.evaluation.fingerprint import short_name
from puma_hf.evaluation.mbeir_results import MBEIRResults
from puma_hf.evaluation.published import PUBLISHED
from puma_hf.files import is_puma_directory, write_whole
from puma_hf.hub import TAGS, fill_template
from puma_hf.modeling.configuration_puma import config_class_of

_MERGE_NOTE = re.compile(r"^- A LoRA adapter of rank \d+ was trained and merged into the weights\.$", re.MULTILINE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardOptions:
    """What a card says that no file knows.

    Args:
        repo_id: Hub id that the model will have.
        base_model: Hub id of what it was made from; by default the one its configuration names.
        license: Its licence in the Hub's spelling.
        datasets: Hub ids of what it was trained on.
    """

    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()


def write_card(
    directory: str | Path, *, results: Iterable[str | Path] | None = None, options: CardOptions | None = None
) -> str:
    """Write a directory's `README.md` anew, filled from its own files and from result files.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        results: results.json of `puma-hf evaluate`, sweep.json of `puma-hf sweep`, train.yaml and distill.yaml of
            training; in the directory or beside it. By default those that are found there and are this model's.
        options: What no file knows.

    Returns:
        The card.

    Raises:
        FileNotFoundError: If the directory or a result file is missing.
        ValueError: If a result file is of another model, or lies elsewhere.

    Example:

    ```python
    >>> from puma_hf.card import write_card

    >>> print(write_card("puma-k4-mac", results=["puma-k4-mac-test/results.json"]))  # doctest: +SKIP
    ```
    """
    content = render_card(directory, results=results, options=options)
    write_whole(Path(directory) / "README.md", content.encode())
    return content


def render_card(
    directory: str | Path, *, results: Iterable[str | Path] | None = None, options: CardOptions | None = None
) -> str:
    """The text that `write_card` writes; see there."""
    folder = Path(directory)
    options = options or CardOptions()
    if not (folder / "adapter_config.json").is_file() and not is_puma_directory(folder):
        raise FileNotFoundError(
            f"{str(directory)!r} is neither a PUMA directory nor that of a LoRA adapter. Name one that puma-hf prune, "
            "distill, train or merge wrote."
        )
    adapter = _read(folder / "adapter_config.json")
    base = Path(str(adapter.get("base_model_name_or_path"))) if adapter else folder
    values = _facts(base) if (base / "config.json").is_file() else {}
    model = MeasuredModel(
        folder,
        values.get("num_kept_layers", 0),
        values.get("original_num_hidden_layers", 0),
        values.get("parameters_after", 0),
    )
    found = read_results(model, results)
    named = options.base_model or (None if adapter else values.get("source"))
    base_model = named if named and _HUB_ID.fullmatch(named) else None
    eval_results = list(_eval_results(found)) or None
    card_data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter" if adapter else "finetune",
        license=options.license,
        datasets=list(options.datasets) or None,
        tags=[*TAGS, *(["peft", "lora"] if adapter else [])],
        model_name=None if eval_results is None else options.repo_id or folder.resolve().name,
        eval_results=eval_results,
    )
    return fill_template(
        card_data,
        model_id=options.repo_id,
        title=None if options.repo_id else folder.resolve().name,
        puma_hf_version=__version__,
        is_adapter=bool(adapter),
        instructions=_instructions(folder),
        costs=_costs(found),
        training=_training(folder, found),
        results="\n\n".join(_with_source(*evaluation) for evaluation in found.evaluations) or None,
        not_measured=_not_measured(found),
        licences=_licences(options, base_model),
        **{**values, "source": named},
    )


def _instructions(folder: Path) -> list[str]:
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    return sorted({prompt for prompt in prompts.values() if prompt})


def _facts(folder: Path) -> dict[str, Any]:
    """What the configuration and the headers of the weights say."""
    config = _read(folder / "config.json")
    kept, total = int(config["num_kept_layers"]), int(config["original_num_hidden_layers"])
    tensors = dict(_tensors(folder))
    layer = sum(count for name, (count, _) in tensors.items() if is_kept(name, kept) and not is_kept(name, kept - 1))
    after = sum(count for count, _ in tensors.values())
    text = config.get("text_config", {})
    # All decoder layers are of one size, and the head has the shape of the token embedding.
    head = 0 if config.get("tie_word_embeddings") else int(text["vocab_size"]) * int(text["hidden_size"])
    before = after + (total - kept) * layer + head
    size = sum(size for _, size in tensors.values())
    return {
        "backbone": config_class_of(config["model_type"]).source_name,
        "source": config.get("source_name_or_path"),
        "source_revision": config.get("source_revision"),
        "num_kept_layers": kept,
        "original_num_hidden_layers": total,
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": before * (size // after) if size % after == 0 else None,  # of one data type
        "bytes_after": size,
        "dtype": config.get("dtype"),
        "embedding_dim": text.get("hidden_size"),
    }


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Parameters and bytes of each tensor, from the headers of the safetensors files: nothing is loaded."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for length in entry["shape"]:
                    count *= length
                yield name, (count, entry["data_offsets"][1] - entry["data_offsets"][0])


def _eval_results(found: CardResults) -> Iterator[EvalResult]:
    """One entry of the model index a row of the tables, with the file's own value."""
    for source, results in found.evaluations:
        data = str(results.made_from.get("data") or "unknown")
        truncate_dim = results.made_from.get("truncate_dim")
        for row in results.rows:
            k = row.task.reported_k
            shape = "" if truncate_dim is None else f", first {truncate_dim} dimensions"
            yield EvalResult(
                task_type="retrieval",
                task_name=f"Multimodal retrieval, {row.task.arrow}",
                dataset_type=data,
                dataset_name=f"{data}: {row.task.name}, {row.pool} pool{shape}",
                dataset_config=f"{row.task.name}-{row.pool}{'' if truncate_dim is None else f'-dim{truncate_dim}'}",
                dataset_split=results.split,
                metric_type=f"hit_at_{k}",
                metric_name=f"hit@{k}, {source.name}",
                metric_value=row.score,
            )


def _with_source(source: object, results: MBEIRResults) -> str:
    return f"{results.to_markdown()}\nFrom {source}, written by `puma-hf evaluate` and checked to be of these weights."


def _costs(found: CardResults) -> list[str]:
    """Counted operations; the sweep holds the untrained cut, whose operations are the same."""
    return [
        f"Operations: {row.flops_text:,} for a text of {report.text_tokens} tokens (all layers: {full.flops_text:,}), "
        f"{row.flops_image:,} for an image of {report.image_tokens} visual tokens (all layers: {full.flops_image:,}); "
        f"counted by `puma-hf sweep` ({source})"
        for source, report, row, full in found.costs
    ]


def _training(folder: Path, found: CardResults) -> str | None:
    """The stages, from their recipes; where those are missing, how many there were."""
    lines = [_stage(source, recipe) for source, recipe in reversed(found.recipes)]
    card = folder / "README.md"
    merges = len(_MERGE_NOTE.findall(card.read_text(encoding="utf-8"))) if card.is_file() else 0
    for _ in range(merges - len(lines)):
        lines.insert(0, "- A LoRA adapter was trained and merged into the weights; its recipe is not at hand.")
    return "\n".join(lines) or None


def _stage(source: object, recipe: Mapping[str, Any]) -> str:
    data = short_name(str(recipe["data"])) if recipe.get("data") else "unknown data"
    settings = ["max_steps", "batch_size", "learning_rate", "lora_r", "seed"]
    if recipe.get("loss"):
        what = f"Trained with the loss `{recipe['loss']}`"
        settings = ["temperature", "hard_temperature", "schedule", "grouping", "num_negatives", *settings]
        settings += ["matryoshka_dims"]
        if recipe.get("distillation_weight"):
            what += f" and distillation of weight {recipe['distillation_weight']}"
    else:
        teacher = short_name(str(recipe["teacher"])) if recipe.get("teacher") else "the model with all its layers"
        what = f"Distilled without labels; teacher: `{teacher}`, metric `{recipe.get('metric')}`"
    told = ", ".join(f"{name} {recipe[name]}" for name in settings if recipe.get(name) not in (None, []))
    return f"- {what}, on `{data}`, split {recipe.get('split')}: {told}. From {source}."


def _not_measured(found: CardResults) -> list[str]:
    rows = [row for _, results in found.evaluations for row in results.rows]
    there = {row.task.name for row in rows}
    absent = [name for name in PUBLISHED if name not in there]
    lines = []
    if len(absent) == len(PUBLISHED):
        lines.append("M-BEIR: none of its 16 rows.")
    elif absent:
        lines.append(f"Of M-BEIR's 16 rows: {', '.join(absent)}.")
    if rows:
        pools = {row.pool for row in rows}
        lines += [f"The {pool} pools." for pool in ("local", "global") if pool not in pools]
        lines.append("How much the figures would vary with another seed of the training.")
    if not found.costs:
        lines.append("Operations per text and image.")
    lines.append("Speed and memory, other data types than that of the weights, video.")
    lines.append("The paper's numbers belong to the authors' checkpoints, not to this one.")
    return lines


def _licences(options: CardOptions, base_model: str | None) -> list[str]:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "the model it was made from"
    data = [f"[{name}](https://huggingface.co/datasets/{name})" for name in options.datasets]
    return [
        f"This model: {options.license}" if options.license else "This model: not stated by who published it",
        f"Base: that of {base} applies to what was kept of it",
        f"Data: {', '.join(data)}, each under its own licence" if data else "Data: not stated by who published it",
        "The code in this repository: Apache-2.0",
    ]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
