"""The card of a directory that is to be published: every number in it is read from a file or counted on the weights."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCardData

from puma_hf import __version__
from puma_hf.configs_training import RECIPES
from puma_hf.evaluation.results import PUBLISHED, MBEIRResults
from puma_hf.evaluation.sweep_report import si
from puma_hf.files import is_adapter_directory, is_hub_id, named_base, read_config, write_whole
from puma_hf.fingerprint import model_fingerprint, short_name
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.pruning import TAGS, fill_template, told_limits

logger = logging.getLogger(__name__)

RESULTS = "results.json"
_RECIPES = tuple(RECIPES.values())
_UNTRAINED = "No training after the cut is on record."
# What a merge notes in the card, and what this module makes of that: a card is written anew more than once.
_STAGES = r"(?m)^- (A LoRA adapter .*was trained and merged into the weights|Trained with the loss|Distilled without)"
# What is told of a recipe: of each stage, of MAC-Loss, and of all labelled training.
_OF_ALL = ("max_steps", "batch_size", "learning_rate", "lora_r", "seed")
_OF_MAC = ("hard_temperature", "schedule", "schedule_end", "grouping")
_WEIGHTS = ("contrastive_weight", "contrastive_weight_start", "distillation_weight_start")
_TOLD = (*_WEIGHTS, "temperature", *_OF_MAC, "num_negatives", *_OF_ALL, "matryoshka_dims")
_EXAMPLE_PROMPT = "mbeir_mscoco_task0"  # shown in the example for use, if the model has it


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
    """The text of a card, and the result files that it cites by the names it calls them."""

    text: str
    files: dict[str, Path]


def write_card(
    directory: str | Path, *, results: Iterable[str | Path] | None = None, options: CardOptions | None = None
) -> str:
    """Write a directory's `README.md` anew, filled from its own files and from result files.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        results: results.json of `puma-hf evaluate`, train.yaml and distill.yaml of training. By default those in the
            directory and beside it that are this model's.
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
    content = make_card(directory, results=results, options=options).text
    write_whole(Path(directory) / "README.md", content.encode())
    return content


def make_card(
    directory: str | Path,
    *,
    results: Iterable[str | Path] | None = None,
    options: CardOptions | None = None,
    code: Mapping[str, str] | None = None,
) -> Card:
    """The card that `write_card` writes, and the files that it cites.

    With `code`, references of what travels with the model by class name, the card is that of a repository: it shows
    how these are opened, and calls result files as they will be called there.
    """
    folder, options = Path(directory), options or CardOptions()
    is_adapter = is_adapter_directory(directory)
    # A Hub id is a path to nowhere here, so nothing is known of that base.
    base = Path(named_base(folder) or folder) if is_adapter else folder
    config, model = read_config(base), MeasuredModel(folder)
    # Figures come from files that say which model they are of: nobody can write one into a card by hand.
    found = CardResults(model, travelling=code is not None).read(results)
    named = config.get("source_name_or_path")
    if is_adapter:  # a folder of this machine is nobody else's business
        named = base.as_posix() if is_hub_id(base.as_posix()) and not base.exists() else None
    named = options.base_model or named
    metadata: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    if named and is_hub_id(named):
        metadata |= {"base_model": named, "base_model_relation": "adapter" if is_adapter else "finetune"}
    # The Hub reads the model index from the metadata; a card without results must not have one.
    if eval_results := list(_eval_results(found)):
        metadata |= {"eval_results": eval_results, "model_name": options.repo_id or folder.resolve().name}
    metadata |= {"license": options.license, "datasets": list(options.datasets) or None}
    card_data = ModelCardData(**metadata, tags=[*TAGS, *(["peft", "lora"] if is_adapter else [])])
    training = _training(folder, found, is_adapter)
    dim = config.get("text_config", {}).get("hidden_size")
    names = ("source_revision", "num_kept_layers", "original_num_hidden_layers", "kept_layers")
    values = {name: config.get(name) for name in names} | _usage(folder, found, dim)
    values |= {} if is_adapter else model.facts
    values |= {"model_id": options.repo_id, "title": None if options.repo_id else folder.resolve().name}
    values |= {"options": options, "is_adapter": is_adapter, "code": dict(code or {}), "puma_hf_version": __version__}
    values |= {"source": named, "embedding_dim": dim, "limits": told_limits(folder), "training": training}
    values["backbone"] = config_class_of(config["model_type"]).source_name if config else None
    values["results"] = "\n\n".join(_table(found, *evaluation) for evaluation in found.evaluations) or None
    values["not_measured"] = _not_measured(found, is_adapter, is_trained=training != _UNTRAINED)
    return Card(fill_template(card_data, **values), found.files)


# --- the model itself


class MeasuredModel:
    """The model of a directory, loaded once, and only if a result or its operations ask for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._fingerprints: dict[int | None, str | None] = {}

    @cached_property
    def model(self) -> Any:
        """The model, or None if it cannot be loaded, as an adapter whose base is out of reach."""
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(self.directory), trust_remote_code=True, device="cpu")
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("%s cannot be loaded (%s), so no results are known to be its own.", self.directory, reason)
            return None

    def fingerprint(self, truncate_dim: int | None) -> str | None:
        """Its fingerprint as an evaluation writes it; all weights are hashed once for each number of dimensions."""
        if self.model is not None and truncate_dim not in self._fingerprints:
            self.model.truncate_dim = truncate_dim
            self._fingerprints[truncate_dim] = model_fingerprint(self.model)
        return self._fingerprints.get(truncate_dim)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Parameters, bytes and operations after the cut and before it, by the names of `hub_card.md`."""
        from puma_hf.evaluation.layer_sweep import layer_costs

        if self.model is None:
            return {}
        # A forward pass of a text and one of an image: seconds, as the model is loaded for its fingerprint anyway.
        counted, config = layer_costs(self.model), self.model[0].model.config
        dropped: int = config.original_num_hidden_layers - config.num_kept_layers

        def before(by_depth: Sequence[int], more: int = 0) -> int | None:
            """With the dropped layers, as all are of one size; of one layer alone its share is not known."""
            if not dropped or len(by_depth) == 1:
                return None if dropped else by_depth[-1] + more
            return by_depth[-1] + more + dropped * (by_depth[-1] - by_depth[-2])

        # The head, which is not counted in operations, has the shape of the token embedding.
        text = config.text_config
        head = 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
        kinds = {f"operations, text of {counted.text_tokens} tokens": counted.flops_text}
        kinds[f"operations, image of {counted.image_tokens} visual tokens"] = counted.flops_image
        return {
            **{"parameters_before": before(counted.parameters, head), "parameters_after": counted.parameters[-1]},
            **{
                "bytes_before": before(counted.bytes, head * self.model.dtype.itemsize),
                "bytes_after": counted.bytes[-1],
            },
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "costs": [(kind, *(n and f"{si(n)}FLOP" for n in (by[-1], before(by)))) for kind, by in kinds.items()],
        }


# --- result files


class CardResults:
    """What was measured on a model, from the files that say so.

    `evaluations` are tables of `puma-hf evaluate`, and `recipes` settings of the stages it was trained in, the last
    first, each after the words that cite its file; `files` are those of the tables, by the names that the card calls
    them. Recipes hold paths of this machine, so they are cited and stay here.
    """

    def __init__(self, model: MeasuredModel, *, travelling: bool = False) -> None:
        self.model, self.travelling = model, travelling
        self.evaluations: list[tuple[str, MBEIRResults]] = []
        self.recipes: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, Path] = {}

    def read(self, paths: Iterable[str | Path] | None) -> CardResults:
        """Read files, or with None those beside the model that are its own.

        ValueError if a file that was named cannot be read, or is of another model; others are passed by.
        """
        for path in find_results(self.model.directory) if paths is None else map(Path, paths):
            try:
                self._add(path)
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                if paths is not None:
                    problem = f"results {str(path)!r} is no result of {str(self.model.directory)!r} ({error})."
                    raise ValueError(f"{problem} Measure this model again: puma-hf evaluate.") from error
                logger.info("not in the card: %s (%s)", path, error)
        return self

    def _add(self, path: Path) -> None:
        values, name = _read(path), f"{path.resolve().parent.name}/{path.name}"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        if path.name in _RECIPES:
            self.recipes.append((f"`{name}`, SHA-256 {digest}", values))
            return
        results = MBEIRResults.from_dict(values)
        fingerprint = results.made_from.get("model_fingerprint")
        # The dimensions were chosen when the model was loaded, or for a call of `encode`, which no fingerprint covers.
        dims = {results.made_from.get("truncate_dim"), None}
        if fingerprint is None or all(self.model.fingerprint(dim) != fingerprint for dim in dims):
            raise ValueError("it is of another model, by its fingerprint")
        if self.travelling:  # as it will be called beside the model, where no folder tells the tables apart
            name = f"results-{len(self.files) + 1}.json" if self.files else RESULTS
        self.files[name] = path
        self.evaluations.append((f"`{name}`, SHA-256 {digest}", results))


def find_results(directory: Path) -> list[Path]:
    """Result files in a directory, in folders of it, and in folders beside it; and the recipes that it came by."""
    folder = directory.resolve()
    # `glob` passes by what may not be looked into; `Path.is_file` raises there.
    places = [(folder, RESULTS), (folder, f"*/{RESULTS}"), (folder.parent, RESULTS), (folder.parent, f"*/{RESULTS}")]
    found = [place / name for place, pattern in places for name in sorted(glob.glob(pattern, root_dir=place))]
    return [*dict.fromkeys(found), *_recipes(folder)]


def _recipes(folder: Path) -> list[Path]:
    """Recipes of a directory and of those beside it that it came from, the last stage first; a merge copies them."""
    found: list[Path] = []
    with suppress(ValueError, OSError):  # whoever reads the recipes will say so
        while (here := [folder / name for name in _RECIPES if (folder / name).is_file()]) and here[0] not in found:
            found.append(here[0])
            # The path may be of another machine; "." says nothing of where that was.
            folder = folder.with_name(Path(str(_read(here[0]).get("model"))).name or folder.name)
    return found


def _read(path: Path) -> dict[str, Any]:
    """The names and values that a JSON or YAML file holds; ValueError if it is damaged."""
    try:
        values = yaml.safe_load(path.read_bytes()) if path.suffix == ".yaml" else json.loads(path.read_bytes())
        return dict(values.items())
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"it does not hold names with values: {error}") from error


# --- what the card says of them


def _eval_results(found: CardResults) -> Iterator[EvalResult]:
    """One entry of the model index a row of the tables, with the file's own value."""
    for cited, results in found.evaluations:
        data, dim = str(results.made_from.get("data") or "unknown"), results.made_from.get("truncate_dim")
        dims, suffix = ("", "") if dim is None else (f", first {dim} dimensions", f"-dim{dim}")
        of_all: Any = {"task_type": "retrieval", "dataset_type": data, "dataset_split": results.split}
        for row in results.rows:
            yield EvalResult(
                **of_all,
                task_name=f"Multimodal retrieval, {row.task.arrow}",
                dataset_name=f"{data}: {row.task.name}, {row.pool} pool{dims}",
                dataset_config=f"{row.task.name}-{row.pool}{suffix}",
                metric_type=f"hit_at_{row.task.reported_k}",
                metric_name=f"hit@{row.task.reported_k}, {cited.split('`')[1]}",
                metric_value=row.score,
            )


def _table(found: CardResults, cited: str, results: MBEIRResults) -> str:
    # A popularity-corrected figure is no part of M-BEIR's protocol, so it never enters a card.
    made_from = {name: value for name, value in results.made_from.items() if name != "popularity_penalty"}
    plain = replace(results, rows=[replace(row, corrected={}) for row in results.rows], made_from=made_from)
    seed = next((recipe["seed"] for _, recipe in found.recipes if recipe.get("seed") is not None), None)
    told = f"From {cited}, written by `puma-hf evaluate` and checked to be of these weights, with all metrics."
    told += "" if seed is None else f" One model was trained, with seed {seed}."
    return f"{plain.to_markdown().strip()}\n\n{told}"


def _training(folder: Path, found: CardResults, is_adapter: bool) -> str | None:
    """The stages, from their recipes; where those are missing, how many there were; None of an adapter without one."""
    # A card is written from nothing, so that a merge without its recipe is known from the card of before alone.
    lines = [_stage(cited, recipe) for cited, recipe in reversed(found.recipes)]
    card = folder / "README.md"
    merges = len(re.findall(_STAGES, card.read_text(encoding="utf-8"))) if card.is_file() else 0
    unknown = "- A LoRA adapter was trained and merged into the weights; its recipe is not at hand."
    return "\n".join([unknown] * (merges - len(lines)) + lines) or (None if is_adapter else _UNTRAINED)


def _stage(cited: str, recipe: Mapping[str, Any]) -> str:
    names: tuple[str, ...] = _TOLD
    if recipe.get("loss"):
        what = f"Trained with the loss `{recipe['loss']}`"
        if recipe.get("distillation_weight") or recipe.get("distillation_weight_start"):
            what += f" and distillation of weight {recipe['distillation_weight']}, metric `{recipe.get('metric')}`"
        if recipe["loss"] == "infonce":  # which has one temperature and all negatives
            names = tuple(name for name in names if name not in _OF_MAC)
    else:
        teacher = short_name(str(recipe["teacher"])) if recipe.get("teacher") else "the model with all its layers"
        what = f"Distilled without labels; teacher: `{teacher}`, metric `{recipe.get('metric')}`"
        names = _OF_ALL
    # Of paths the last part: where they lie here is nobody else's business.
    data = short_name(str(recipe["data"])) if recipe.get("data") else "unknown data"
    told = ", ".join(f"{name} {recipe[name]}" for name in names if recipe.get(name) not in (None, []))
    split = f", split {recipe['split']}" if recipe.get("split") else ""
    return f"- {what}, on `{data}`{split}: {told}. From {cited}."


def _usage(folder: Path, found: CardResults, embedding_dim: int | None) -> dict[str, Any]:
    """Instructions, versions, and how many dimensions to keep in the example."""
    settings = read_config(folder, "config_sentence_transformers.json")
    prompts = {name: prompt for name, prompt in (settings.get("prompts") or {}).items() if prompt}
    versions = settings.get("__version__") or {}
    named = {"sentence_transformers": "Sentence Transformers", "transformers": "Transformers"}
    trained = [dims for _, recipe in found.recipes if (dims := recipe.get("matryoshka_dims"))]
    example = prompts.get(_EXAMPLE_PROMPT, next(iter(prompts.values()), None))
    return {
        # Quoted for JSON it is quoted for Python, too.
        "example_instruction": None if example is None else json.dumps(example, ensure_ascii=False),
        "versions": " and ".join(f"{named[name]} {versions[name]}" for name in named if name in versions),
        "truncate_dim": min(trained[0]) if trained else (embedding_dim or 0) // 2,
        **{"matryoshka": bool(trained), "prompts": prompts},
    }


def _not_measured(found: CardResults, is_adapter: bool, *, is_trained: bool) -> list[str]:
    """What the result files do not hold."""
    every = [results for _, results in found.evaluations]
    # A subset is another benchmark, and so is another split.
    whole = [one for one in every if one.split == "test" and "content_hash" not in one.made_from]
    absent = [name for name in PUBLISHED if name not in {row.task.name for one in whole for row in one.rows}]
    none = len(absent) == len(PUBLISHED)
    lines = ["M-BEIR: none of its 16 rows." if none else f"Of M-BEIR's 16 rows: {', '.join(absent)}."] if absent else []
    if every:
        pools = {row.pool for one in every for row in one.rows}
        lines += [f"The {pool} pools." for pool in ("local", "global") if pool not in pools]
        lines += ["How much the figures would vary with another seed of the training."] if is_trained else []
    lines += ["Operations per text and image."] if is_adapter else []
    return [*lines, "Speed and memory, other data types than that of the weights, video."]
