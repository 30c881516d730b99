"""The card of a directory that is to be published: every number in it is read from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from puma_hf import __version__
from puma_hf.evaluation.mbeir_results import MBEIRResults
from puma_hf.files import ADAPTER_CONFIG, is_adapter_directory, is_hub_id, named_base, write_whole
from puma_hf.hub.card_facts import read_facts
from puma_hf.hub.card_results import CardResults, MeasuredModel, SourceFile, read_mapping, read_results
from puma_hf.hub.card_sections import UNTRAINED, cost_values, not_measured, training_section, usage_values
from puma_hf.hub.card_table import card_table, made_from
from puma_hf.hub.template import TAGS, fill_template
from puma_hf.pruning import told_limits


@dataclass(frozen=True)
class CardOptions:
    """What a card says that no file knows.

    Args:
        repo_id: Hub id that the model will have.
        base_model: Hub id of what it was made from; by default the one its configuration names.
        license: Its licence in the Hub's spelling.
        datasets: Hub ids of what it was trained on.
        base_license: The licence of what it was made from.
        data_license: That of the data.
    """

    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_license: str | None = None
    data_license: str | None = None


@dataclass(frozen=True)
class Card:
    """A card and where its figures come from.

    Args:
        text: The card.
        files: The result files that it cites, by the name it calls them.
    """

    text: str
    files: dict[str, Path]


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
    >>> from puma_hf.hub import write_card

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
    return make_card(directory, results=results, options=options).text


def make_card(
    directory: str | Path,
    *,
    results: Iterable[str | Path] | None = None,
    options: CardOptions | None = None,
    travelling: bool = False,
) -> Card:
    """The card that `write_card` writes, and the files that it cites.

    Args:
        directory: As for `write_card`.
        results: As for `write_card`.
        options: As for `write_card`.
        travelling: Whether result files and losses go into the repository, and are called as they will be there.
    """
    folder = Path(directory)
    options = options or CardOptions()
    is_adapter = is_adapter_directory(directory)
    if is_adapter:
        read_mapping(folder / ADAPTER_CONFIG)  # or it raises, which names what is damaged
    # A Hub id is a path to nowhere here, so nothing is known of that base.
    base = Path(named_base(folder) or folder) if is_adapter else folder
    facts = read_facts(base) if (base / "config.json").is_file() else {}
    model = MeasuredModel(
        folder,
        facts.get("num_kept_layers", 0),
        facts.get("original_num_hidden_layers", 0),
        facts.get("parameters_after", 0),
    )
    found = read_results(model, results)
    found = found.travelling() if travelling else found
    named = options.base_model or (_named_base(base) if is_adapter else facts.get("source"))
    base_model = named if named and is_hub_id(named) else None
    eval_results = list(_eval_results(found)) or None
    card_data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter" if is_adapter else "finetune",
        license=options.license,
        datasets=list(options.datasets) or None,
        tags=[*TAGS, *(["peft", "lora"] if is_adapter else [])],
        model_name=None if eval_results is None else options.repo_id or folder.resolve().name,
        eval_results=eval_results,
    )
    training = training_section(folder, found, is_adapter=is_adapter)
    text = fill_template(
        card_data,
        model_id=options.repo_id,
        title=None if options.repo_id else folder.resolve().name,
        puma_hf_version=__version__,
        is_adapter=is_adapter,
        travelling=travelling,
        **usage_values(folder, found, facts.get("embedding_dim")),
        **(cost_values(model, found) if not is_adapter else {}),
        training=training,
        results="\n\n".join(_with_source(found, *evaluation) for evaluation in found.evaluations) or None,
        not_measured=not_measured(found, is_counted=not is_adapter, is_trained=training != UNTRAINED),
        licences=_licences(options, base_model),
        **{**facts, "source": named, "limits": told_limits(folder)},
    )
    return Card(text, found.files)


def _named_base(base: Path) -> str | None:
    """The Hub id that an adapter gives for its base; a folder of this machine is nobody else's business."""
    name = base.as_posix()
    return name if is_hub_id(name) and not base.exists() else None


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


def _with_source(found: CardResults, source: SourceFile, results: MBEIRResults) -> str:
    seed = next((recipe["seed"] for _, recipe in found.recipes if recipe.get("seed") is not None), None)
    how = made_from(results)
    lines = [
        f"From {source}, written by `puma-hf evaluate` and checked to be of these weights"
        f"{f' ({how})' if how else ''}. All metrics are in that file."
    ]
    lines += [] if seed is None else [f"One model was trained, with seed {seed}."]
    return f"{card_table(results)}\n\n{' '.join(lines)}"


def _licences(options: CardOptions, base_model: str | None) -> list[str]:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "the model it was made from"
    data = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in options.datasets)
    of_data = options.data_license or ("each under its own licence" if data else None)
    return [
        f"This model: {options.license}" if options.license else "This model: not stated by who published it",
        f"Base: {options.base_license or 'not stated here'}, of {base}; it also holds for the weights kept from it",
        f"Data: {of_data}{f' ({data})' if data else ''}" if of_data else "Data: not stated by who published it",
        "The code in this repository: Apache-2.0",
    ]
