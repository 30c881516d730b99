"""Rules that no single module's test can see: dependencies, imports, sizes, what is shipped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

import puma_hf
from puma_hf.hub.push import travelling_files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "puma_hf"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

SOURCES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
MODELING = [name for name in SOURCES if name.startswith("modeling/")]

# All of them come with sentence-transformers, so a model loads wherever that is installed.
MODELING_MAY_IMPORT = {"PIL", "numpy", "sentence_transformers", "torch", "transformers"}
# Whoever trains has these besides.
TRAINER_MAY_IMPORT = {*MODELING_MAY_IMPORT, "accelerate", "datasets", "peft", "safetensors"}
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"PIL": "pillow", "flash_attn": "flash-attn", "yaml": "pyyaml"}
# The data flow of CONTRIBUTING.md: each part imports those before it, never one behind.
ORDER = (
    *("files", "settings", "processes", "modeling", "losses", "configs_training", "configs"),
    *("fingerprint", "checkpoint", "data", "sources", "pruning", "estimate", "export", "trainer"),
    *("embedding", "evaluation", "search", "hub", "cli"),
)

MAX_LINES = 600
MAX_BODY_LINES = 60


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def tree_of(source: str) -> ast.Module:
    return ast.parse((PACKAGE / source).read_text(encoding="utf-8"), filename=source)


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from puma_hf import trainer` imports puma_hf.trainer
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def flat_import_errors(tree: ast.AST, siblings: set[str], allowed: Iterable[str] = MODELING_MAY_IMPORT) -> list[str]:
    """What in a file would break once it lies alone beside its siblings in a model's directory."""
    errors = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                errors.append(f"line {node.lineno}: only `from .file import name` is allowed")
            elif node.module not in siblings:
                errors.append(f"line {node.lineno}: there is no {node.module}.py in this folder")
    for name in absolute_imports(tree):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            errors.append(f"{top} is not among {sorted(allowed)}")
    return errors


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


# --- dependencies and versions


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == puma_hf.__version__


def test_core_dependencies_have_a_floor_and_a_cap_and_no_torchvision() -> None:
    assert "torch" in map(distribution, CORE)
    for requirement in CORE:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?>=[\d.]+,<\d+", requirement)
        assert not re.search(r"torchvision|\[.*(image|video).*\]", requirement)


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = [EXTRAS[name] for name in ("app", "mteb", "plot", "search", "test", "dev")]
    asked = [text for texts in (CORE, *tested) for text in texts if not text.startswith("puma-hf")]
    for requirement in map(Requirement, asked):
        assert requirement.name in pins
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_third_party_imports_are_declared() -> None:
    declared = {distribution(text) for texts in (CORE, *EXTRAS.values()) for text in texts}
    imported = {name.partition(".")[0] for source in SOURCES for name in absolute_imports(tree_of(source))}
    third_party = imported - set(sys.stdlib_module_names) - {"puma_hf"}
    assert "torch" in third_party
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in third_party} <= declared


# --- the shape of the code


def test_files_that_travel_are_flat() -> None:
    modeling = {Path(name).name: (PACKAGE / name).read_text(encoding="utf-8") for name in MODELING}
    assert all((PACKAGE / "modeling" / name).is_file() for name in modeling)
    travelling = {**modeling, **travelling_files()}
    for name, text in travelling.items():
        siblings = {Path(other).stem for other in (modeling if name in modeling else travelling)}
        of_trainer = not (name in modeling or (PACKAGE / "losses" / name).is_file())
        allowed = TRAINER_MAY_IMPORT if of_trainer else MODELING_MAY_IMPORT
        assert flat_import_errors(ast.parse(text), siblings, allowed) == [], name


def own_imports() -> dict[str, set[str]]:
    """What each module imports of ours, also inside of functions; a package stands for what its `__init__` runs."""
    modules = {
        "puma_hf." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in SOURCES
    }
    found = {}
    for module, source in modules.items():
        if source.endswith("__init__.py") and "resolver" in (PACKAGE / source).read_text():
            continue  # names by module, resolved on first use
        names = set(absolute_imports(tree_of(source)))
        package = module if source.endswith("/__init__.py") else module.rpartition(".")[0]
        names |= {
            f"{package}.{node.module}"
            for node in ast.walk(tree_of(source))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        }
        found[module] = {name for name in names if name in modules} - {module}
    return found


def test_no_import_goes_round_or_up() -> None:
    imports = own_imports()
    parts = {module: module.split(".")[1] for module in imports}
    assert set(parts.values()) <= set(ORDER)
    up = [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in names
        if ORDER.index(name.split(".")[1]) > ORDER.index(parts[module])
    ]
    assert up == []
    TopologicalSorter(imports).prepare()  # a CycleError names the cycle


@pytest.mark.parametrize("source", SOURCES)
def test_files_stay_small_and_leave_printing_and_opening_to_one_place(source: str) -> None:
    text, nodes = (PACKAGE / source).read_text(encoding="utf-8"), list(ast.walk(tree_of(source)))
    assert len(text.splitlines()) <= MAX_LINES
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{f.name}: {body_lines(f)} lines" for f in functions if body_lines(f) > MAX_BODY_LINES] == []
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert source == "cli.py" or "print" not in called
    # `open_image` names the formats: without them Pillow runs Ghostscript for an EPS under any name.
    assert source == "modeling/inputs_puma.py" or "Image.open(" not in text


# --- what is shipped


@pytest.mark.parametrize("from_sdist", [False, True])
def test_the_wheel_holds_the_package_and_its_data(tmp_path: Path, from_sdist: bool) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path), "-t"]
    folder = ROOT
    if from_sdist:
        subprocess.run([*command, "sdist"], cwd=ROOT, check=True, capture_output=True)
        name = f"puma_hf-{puma_hf.__version__}"
        with tarfile.open(tmp_path / f"{name}.tar.gz") as source:
            source.extractall(tmp_path, filter="data")
        folder = tmp_path / name
    subprocess.run([*command, "wheel"], cwd=folder, check=True, capture_output=True)
    wheel = tmp_path / f"puma_hf-{puma_hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("puma_hf/hub_card.md") == (ROOT / "hub_card.md").read_bytes()
    data = {"puma_hf/py.typed"}
    data |= {f"puma_hf/modeling/chat_template{name}.jinja" for name in ("", "_released")}
    data.add("puma_hf/evaluation/retrieval_metric/README.md")
    assert data | {f"puma_hf/{source}" for source in SOURCES} <= names
    assert {name.partition("/")[0] for name in names} == {"puma_hf", f"puma_hf-{puma_hf.__version__}.dist-info"}
