"""Publish a directory on the Hub: checked, loaded as a stranger would load it, and uploaded in one commit."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from puma_hf.configs import PushConfig
from puma_hf.files import (
    ADAPTER_CONFIG,
    BASE_FILE,
    LOADED,
    is_adapter_directory,
    is_hub_id,
    model_files,
    named_base,
    read_config,
)
from puma_hf.hub.card import CardOptions, make_card
from puma_hf.hub.load_check import LoadCheck, check_loads

logger = logging.getLogger(__name__)

CARD = "README.md"
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
# What the Hub itself puts into a repository, or a person by its forms.
_NEUTRAL = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "NOTICE"})
# What is removed of an older push unless this one has it: a loader might take its settings or weights with ours.
_REPLACED = ("model*.safetensors", "results*.json", "sweep*.json", *(name for name in LOADED if name not in _NEUTRAL))
_OTHERS_CODE = re.compile(r'"auto_map"\s*:\s*\{[^}]*--')
# What the card shows of the code that travels, by the name that the lines give it.
_SHOWN = {"MultimodalMACLoss": "mac_puma.MultimodalMACLoss", "PumaTrainer": "trainer_puma.PumaTrainer"}


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be.

    Args:
        repo_id: The repository.
        files: Name and bytes of each file, the card first.
        left_out: What of the directory stayed here.
        card: The card.
        loaded: How the files loaded in a fresh process.
        url: Address of the commit or of the pull request; None after a dry run.
    """

    repo_id: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    card: str
    loaded: LoadCheck
    url: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.files)
        lines = [f"{name:<{width}}  {size:>14,} bytes" for name, size in (*self.files, ("in all", self.num_bytes))]
        lines += [f"left out  {', '.join(self.left_out)}"] if self.left_out else []
        dry = f"nothing was uploaded to {self.repo_id}, as this is a dry run; the card would be:\n\n{self.card}"
        return "\n".join([*lines, f"checked   {self.loaded}", f"uploaded  {self.url}" if self.url else dry])


def push_to_hub(directory: str | Path, repo_id: str, *, token: str | None = None, **settings: Any) -> PushReport:
    """Upload what loads of a directory to the Hub, after it was loaded where puma_hf is not installed.

    Files that no loader reads stay here. The card is written anew each time, from files alone: one that is on the Hub
    is replaced, whoever wrote it.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        repo_id: Repository, such as "org/name"; it is made if need be.
        token: Hub token; by default that of `hf auth login` or of HF_TOKEN.
        settings: private, revision, create_pr, dry_run, message, results, base_model, license, base_license,
            data_license and datasets, as in `PushConfig`.

    Returns:
        What was uploaded; `print` shows it.

    Raises:
        FileNotFoundError: If the directory is none of ours.
        ValueError: If it does not load or changes meanwhile, or the repository holds something else.
        OSError: If there is no token, it may not write there, or the Hub refuses what was sent or cannot be reached;
            huggingface_hub's own errors are among them.

    Example:

    ```python
    >>> from puma_hf.hub import push_to_hub

    >>> print(push_to_hub("puma-k14-mac", "org/puma-k14", dry_run=True))  # doctest: +SKIP
    ```
    """
    return push_configured(PushConfig(directory=directory, repo_id=repo_id, **settings), token=token)


def push_configured(config: PushConfig, *, token: str | None = None) -> PushReport:
    """What `push_to_hub` does, with its settings as one object; see there."""
    token = token and token.strip()
    folder = Path(config.directory)
    is_adapter = is_adapter_directory(folder)
    base = _base_of(folder, config.base_model) if is_adapter else None
    # A dry run asks nobody, so it works without a token and without a network.
    hub, there, url = None if config.dry_run else HfApi(token=token), None, None
    if hub is not None:  # before the slow part: a token is soon mended
        with _hub_errors(config.repo_id):
            there = _look_up(hub, config, is_adapter)
            if base is not None:
                _check_base(hub, folder, base)
    with TemporaryDirectory(prefix="puma-hf-push-") as temporary:
        staged, weights = Path(temporary), _stage(folder, Path(temporary), is_adapter)
        local = base is None or Path(named_base(folder)).is_dir()
        loaded = check_loads(staged, offline=local, token=token, shown_as=folder)
        if base is not None:
            _name_base(folder, staged, base)
        card = _write_card(config, folder, staged, base)
        names = [CARD, *sorted(path.name for path in staged.iterdir() if path.name != CARD)]
        sizes = tuple((name, (staged / name).stat().st_size) for name in names)
        if hub is not None:
            if _state(weights) != weights:
                raise ValueError(f"The weights in {str(folder)!r} changed while they were checked. Push again.")
            with _hub_errors(config.repo_id):
                url = _upload(hub, config, staged, there)
            logger.info("Pushed %s to %s", folder, url)
    left_out = tuple(sorted({path.name for path in folder.iterdir()} - set(names)))
    return PushReport(config.repo_id, sizes, left_out, card, loaded, url)


# --- what is sent


def travelling_files() -> dict[str, str]:
    """The losses and the trainer, by file name, as they lie flat beside a model's code: their imports are rewritten.

    So fine-tuning goes on from the Hub alone, where puma_hf is not installed:
    `get_class_from_dynamic_module("trainer_puma.PumaTrainer", "org/puma")`. The stages and the teachers stay here: they
    read configurations, data and original checkpoints.
    """
    package = Path(__file__).parents[1]
    sources = {path.name: path for part in ("losses", "trainer") for path in sorted((package / part).glob("*_puma.py"))}
    sources["sampler_puma.py"] = package / "data" / "sampler.py"  # of the data, but what keeps right answers apart
    ours = re.compile(r"from puma_hf\.(?:modeling|losses|trainer|data)\.(\w+?)(?:_puma)? import")
    return {name: ours.sub(r"from .\1_puma import", path.read_text(encoding="utf-8")) for name, path in sources.items()}


def _stage(folder: Path, staged: Path, is_adapter: bool) -> dict[Path, tuple[int, int]]:
    """Lay out the files as they will be downloaded; what is loaded there is what is sent.

    Weights are links, as they are large, and their state is returned; all else is a copy that nobody changes.
    """
    weights = []
    for name in model_files(folder):
        # "org/repo--file.Class": whoever loads it would run code that is not in what is pushed, and may change.
        if name.endswith("config.json") and _OTHERS_CODE.search((folder / name).read_text(encoding="utf-8")):
            raise ValueError(f"auto_map in {str(folder / name)!r} names code of another repository: save its own.")
        if name.endswith(".safetensors"):
            weights.append(folder / name)
            (staged / name).symlink_to((folder / name).resolve())
        else:
            shutil.copyfile(folder / name, staged / name)
    if (staged / "inputs_puma.py").is_file():  # the model's code, which that of the losses lies beside
        for name, code in travelling_files().items():
            (staged / name).write_text(code, encoding="utf-8")
    if is_adapter:  # for the check the base is where it lies: its name may be relative to this directory
        base = named_base(folder)
        _name_base(folder, staged, str(Path(base).resolve()) if Path(base).is_dir() else base)
    return _state(weights)


def _state(weights: Any) -> dict[Path, tuple[int, int]]:
    return {path: (stat.st_size, stat.st_mtime_ns) for path in weights for stat in [path.stat()]}


def _write_card(config: PushConfig, folder: Path, staged: Path, base: str | None) -> str:
    """Write the card, and the result files that it cites, to what is sent."""
    said = {entry.name: getattr(config, entry.name) for entry in fields(CardOptions)}
    options = CardOptions(**{**said, "base_model": base or config.base_model})
    code = _SHOWN if (staged / "mac_puma.py").is_file() else {}
    card = make_card(folder, results=config.results or None, options=options, code=code)
    for name, path in card.files.items():
        shutil.copyfile(path, staged / name)
    (staged / CARD).write_bytes(card.text.encode())  # the same bytes on every system
    return card.text


def _base_of(adapter: Path, base_model: str | None) -> str:
    """The Hub id of an adapter's base, which whoever downloads the adapter will need."""
    base = base_model or named_base(adapter)
    if not is_hub_id(base) or (base_model is None and Path(base).is_dir()):
        problem = f"The adapter {str(adapter)!r} belongs to {base!r}, which nobody else has."
        raise ValueError(f"{problem} Push that first, and name it: base_model='org/base' (--base-model).")
    return base


def _check_base(hub: HfApi, adapter: Path, base: str) -> None:
    """Raise if the base is not on the Hub, or holds other weights than the adapter was trained on.

    Nothing is downloaded: the Hub knows the SHA-256 of its large files.
    """
    # An adapter on other weights loads, and gives other embeddings in silence.
    siblings = hub.model_info(base, files_metadata=True).siblings or []
    weights = {one.rfilename: one.lfs for one in siblings if fnmatch(one.rfilename, "model*.safetensors")}
    digest = hashlib.sha256()
    for name, large in sorted(weights.items()):  # as `puma_hf.trainer.lora_puma.weights_sha256` has it
        digest.update(name.encode() + bytes.fromhex(large["sha256"] if large else ""))
    if (expected := read_config(adapter, BASE_FILE).get("sha256")) is None:
        logger.warning("Whether %s holds the weights that the adapter was trained on is not known.", base)
    elif digest.hexdigest() != expected:
        raise ValueError(
            f"The adapter was not trained on the weights in {base!r} on the Hub. Push its own, and name it."
        )


def _name_base(folder: Path, staged: Path, base: str) -> None:
    settings = {**read_config(folder, ADAPTER_CONFIG), "base_model_name_or_path": base}
    (staged / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# --- the Hub


def _look_up(hub: HfApi, config: PushConfig, is_adapter: bool) -> str | None:
    """The commit that the push follows, if there is one; raise if nothing may, or should, be pushed there."""
    # The Hub would refuse the commit, too, but only after minutes of loading and hashing.
    user, namespace = hub.whoami(), config.repo_id.partition("/")[0]
    members = {user["name"], *(entry["name"] for entry in user.get("orgs", []))}
    if namespace not in members and not config.create_pr:
        problem = f"{user['name']!r} is no member of {namespace!r}, so it may not write to {config.repo_id!r}."
        remedy = f"Choose one of {', '.join(sorted(members))}, or propose it with create_pr=True (--create-pr)."
        raise PermissionError(f"{problem} {remedy}")
    try:
        info: Any = hub.repo_info(config.repo_id)
    except RepositoryNotFoundError:
        return None
    if config.private is not None and bool(info.private) != config.private:
        there, wanted = ("private", "public") if info.private else ("public", "private")
        problem = f"{config.repo_id!r} exists and is {there}, asked for was {wanted}."
        raise ValueError(f"{problem} Change it in its settings.")
    with suppress(RevisionNotFoundError):  # then it is made from main, whose files it has
        info = hub.repo_info(config.repo_id, revision=config.revision)
    files = tuple(entry.rfilename for entry in info.siblings or [])
    # Files of two models in one repository would load as neither; pictures and notes beside a model of ours may stay.
    is_ours = any(name.endswith("_puma.py") for name in files) and (ADAPTER_CONFIG in files) == is_adapter
    if not is_ours and (foreign := sorted(set(files) - _NEUTRAL)):
        problem = f"{config.repo_id!r} exists with other content: {', '.join(foreign[:5])}."
        raise ValueError(f"{problem} Choose another repository, or remove those files there first.")
    return str(info.sha)


def _upload(hub: HfApi, config: PushConfig, staged: Path, parent: str | None) -> str:
    if not config.create_pr:
        hub.create_repo(config.repo_id, private=config.private, exist_ok=True)
        # The Hub makes the references of pull requests itself, and has no branch of such a name.
        if config.revision is not None and not config.revision.startswith("refs/"):
            hub.create_branch(config.repo_id, branch=config.revision, exist_ok=True)
    options: Any = {"revision": config.revision, "create_pr": config.create_pr, "delete_patterns": list(_REPLACED)}
    options["commit_message"] = config.message or "Upload a PUMA embedding model"
    # With its parent, what was looked at is what is changed.
    info: Any = hub.upload_folder(repo_id=config.repo_id, folder_path=staged, parent_commit=parent, **options)
    return str(info.pr_url or info.commit_url)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Make an OSError of those of the network, as the Hub's own answers are, and say that nothing was half written."""
    try:
        yield
    except Exception as error:
        # The HTTP client differs between versions of huggingface_hub, so its classes cannot be imported; of large files
        # an upload wraps them, and the Hub's answers, in a RuntimeError.
        is_wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
        if isinstance(error, OSError) or not (is_wrapped or type(error).__module__.startswith(_CLIENTS)):
            raise
        problem = f"The push to {repo_id!r} failed ({error.__cause__ if is_wrapped else error})."
        raise ConnectionError(f"{problem} Run it again: a commit is whole or not there.") from error
