"""The files that a card's numbers come from: found beside a model, and held to be that model's own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from puma_hf.evaluation.mbeir_results import MBEIRResults
from puma_hf.evaluation.sweep_report import SweepReport, SweepRow
from puma_hf.files import DISTILL_RECIPE, TRAIN_RECIPE

if TYPE_CHECKING:
    from puma_hf.evaluation.layer_sweep import LayerCosts

logger = logging.getLogger(__name__)

RESULT_NAMES = ("results.json", "sweep.json")
RECIPE_NAMES = (DISTILL_RECIPE, TRAIN_RECIPE)
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class SourceFile:
    """A file that numbers are taken from.

    Args:
        name: Its name and its folder's, as the card shows it.
        sha256: SHA-256 of its content.
        path: Where it lies.
    """

    name: str
    sha256: str
    path: Path

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """The file's name and hash."""
        path = path.resolve()
        return cls(f"{path.parent.name}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest(), path)

    def __str__(self) -> str:
        return f"`{self.name}`, SHA-256 {self.sha256[:_SHOWN_DIGITS]}"


@dataclass(frozen=True)
class CardResults:
    """What was measured on a model, each with the file that says so.

    Args:
        evaluations: Tables of `puma-hf evaluate`.
        costs: Rows of `puma-hf sweep` for the model's own depth and for all layers, with what they were counted on.
        recipes: Settings of the stages it was trained in, the last first.
    """

    evaluations: list[tuple[SourceFile, MBEIRResults]] = field(default_factory=list)
    costs: list[tuple[SourceFile, SweepReport, SweepRow, SweepRow]] = field(default_factory=list)
    recipes: list[tuple[SourceFile, dict[str, Any]]] = field(default_factory=list)

    def travelling(self) -> CardResults:
        """The same, with the result files under the names that they have in the model's repository.

        Recipes keep their names: they hold paths of this machine, so they are cited and stay here.
        """

        def renamed(source: SourceFile, stem: str, number: int) -> SourceFile:
            return replace(source, name=f"{stem}-{number}.json" if number > 1 else f"{stem}.json")

        evaluations = [
            (renamed(source, "results", number), results)
            for number, (source, results) in enumerate(self.evaluations, start=1)
        ]
        costs = [
            (renamed(source, "sweep", number), report, row, full)
            for number, (source, report, row, full) in enumerate(self.costs, start=1)
        ]
        return CardResults(evaluations, costs, self.recipes)

    @property
    def files(self) -> dict[str, Path]:
        """The result files by name, without the recipes."""
        sources = [one[0] for one in self.evaluations] + [one[0] for one in self.costs]
        return {source.name: source.path for source in sources}


@dataclass
class MeasuredModel:
    """The model that results must be of.

    Args:
        directory: Its directory.
        num_kept_layers: Its decoder layers.
        original_num_hidden_layers: Those of the model that it was cut from.
        num_parameters: Its parameters.
    """

    directory: Path
    num_kept_layers: int
    original_num_hidden_layers: int
    num_parameters: int
    _model: Any = field(default=None, init=False, repr=False)
    _load_error: str | None = field(default=None, init=False, repr=False)
    _fingerprints: dict[int | None, str | None] = field(default_factory=dict, init=False, repr=False)

    def fingerprint(self, truncate_dim: int | None) -> str | None:
        """Its fingerprint as an evaluation writes it; the model is loaded once, and hashed once for each number.

        Raises:
            ValueError: If the model cannot be loaded.
        """
        from puma_hf.fingerprint import model_fingerprint

        if truncate_dim not in self._fingerprints:
            model = self._loaded()
            model.truncate_dim = truncate_dim
            self._fingerprints[truncate_dim] = model_fingerprint(model)
        return self._fingerprints[truncate_dim]

    def costs(self) -> LayerCosts:
        """Its operations, counted on the model itself; the model is loaded once.

        Raises:
            ValueError: If the model cannot be loaded.
        """
        from puma_hf.evaluation.layer_sweep import layer_costs

        return layer_costs(self._loaded())

    def _loaded(self) -> Any:
        from sentence_transformers import SentenceTransformer

        if self._model is None and self._load_error is None:
            try:
                self._model = SentenceTransformer(str(self.directory), trust_remote_code=True, device="cpu")
            except (OSError, ValueError) as error:  # such as an adapter's base on the Hub, without a network
                # Remembered: each file that is looked at would wait for the network again.
                self._load_error = (
                    f"{str(self.directory)!r} cannot be loaded ({str(error).strip().partition(chr(10))[0]}), so "
                    "nothing can be measured on it, nor results be told to be its own. Make it loadable first: an "
                    "adapter needs its base, from the Hub or on this machine."
                )
                logger.warning("%s", self._load_error)
                raise ValueError(self._load_error) from error
        if self._load_error is not None:
            raise ValueError(self._load_error)
        return self._model


def read_results(model: MeasuredModel, paths: Iterable[str | Path] | None) -> CardResults:
    """Read result files, and refuse those of another model.

    Args:
        model: The model.
        paths: The files, which must lie in its directory or beside it; None looks there for those that are the model's.

    Returns:
        Their content.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file lies elsewhere, is damaged, or is of another model.
    """
    given = None if paths is None else [_beside(model.directory, Path(path)) for path in paths]
    found = CardResults()
    for path in find_results(model.directory) if given is None else given:
        try:
            _add(found, path, model)
        except (ValueError, OSError) as error:  # the latter of a file that only somebody else may read
            if given is not None:
                raise
            logger.info("not in the card: %s", error)
    return found


def find_results(directory: Path) -> list[Path]:
    """Result files in a directory, in folders of it, and in folders beside it; and the recipes of its adapters."""
    folder = directory.resolve()
    places = [
        folder,
        *_folders(folder),
        folder.parent,
        *(place for place in _folders(folder.parent) if place != folder),
    ]
    # `Path.is_file` raises where a folder of somebody else may not be looked into.
    results = [place / name for place in places for name in RESULT_NAMES if os.path.isfile(place / name)]
    return [*results, *_recipes(folder)]


def _recipes(folder: Path) -> list[Path]:
    """Recipes of a directory and of those it came from, the last stage first: training writes NAME-lora/*.yaml."""
    found: list[Path] = []
    while True:
        places = (folder, folder.with_name(f"{folder.name}-lora"))
        here = [place / name for place in places for name in RECIPE_NAMES if os.path.isfile(place / name)]
        if not here or here[0] in found:
            return found
        try:
            base = Path(str(read_mapping(here[0]).get("model"))).name
        except (ValueError, OSError) as error:
            logger.info("not in the card: %s", error)
            return found
        if base == folder.name and here[0].parent != folder:
            return found  # that adapter was trained on this very model, which is none of its merges
        found.append(here[0])
        if not base:
            return found  # "." says nothing of where that was
        folder = folder.with_name(base)


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []  # not ours to read


def _beside(directory: Path, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"results {str(path)!r} is no file. Name one that puma-hf evaluate or sweep wrote.")
    if not path.resolve().is_relative_to(directory.resolve().parent):
        raise ValueError(
            f"results {str(path)!r} lies neither in {str(directory)!r} nor beside it. Copy it there: a card's numbers "
            "and their files stay together."
        )
    if path.name not in (*RESULT_NAMES, *RECIPE_NAMES):
        raise ValueError(f"results {str(path)!r} must be named {', '.join((*RESULT_NAMES, *RECIPE_NAMES))}.")
    return path


def _add(found: CardResults, path: Path, model: MeasuredModel) -> None:
    values = read_mapping(path)
    source = SourceFile.of(path)
    try:
        if path.name in RECIPE_NAMES:
            found.recipes.append((source, values))
        elif path.name == "sweep.json":
            report = SweepReport.from_dict(values)
            found.costs.append((source, report, *_rows_of(report, path, model)))
        else:
            results = MBEIRResults.from_dict(values)
            _check_model(results.made_from, path, model)
            found.evaluations.append((source, results))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is not what puma-hf writes under that name ({type(error).__name__}: {error}). "
            "Measure again."
        ) from error


def _check_model(made_from: Mapping[str, Any], path: Path, model: MeasuredModel) -> None:
    there = made_from.get("model_fingerprint")
    if there is None:
        raise ValueError(f"{str(path)!r} does not say which model it is of (no model_fingerprint). Evaluate again.")
    # The dimensions were chosen when the model was loaded, or for a call of `encode`, which its fingerprint ignores.
    dims = dict.fromkeys((made_from.get("truncate_dim"), None))
    if all(model.fingerprint(dim) != there for dim in dims):
        own = str(model.fingerprint(None))[:_SHOWN_DIGITS]
        raise ValueError(
            f"{str(path)!r} is of another model: fingerprint {there[:_SHOWN_DIGITS]}, that of "
            f"{str(model.directory)!r} is {own}. Evaluate this one: puma-hf evaluate."
        )


def _rows_of(report: SweepReport, path: Path, model: MeasuredModel) -> tuple[SweepRow, SweepRow]:
    """The row of the model's depth and that of all layers, from the swept model that has its shape."""
    depth, total = model.num_kept_layers, model.original_num_hidden_layers
    for swept in report.models:
        row = next((row for row in swept.rows if row.k == depth), None)
        if len(swept.rows) == total and row is not None and row.parameters == model.num_parameters:
            return row, swept.rows[-1]
    raise ValueError(
        f"{str(path)!r} is of another model: it has no row of {depth} of {total} layers with {model.num_parameters:,} "
        "parameters. Sweep what this one was cut from: puma-hf sweep."
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file holds.

    Raises:
        ValueError: If it is damaged, or holds something other than names with values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}). Write it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold names with values, not {type(values).__name__}. Write it again.")
    return values
