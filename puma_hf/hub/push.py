"""Publish a directory on the Hub: checked, loaded as a stranger would load it, and uploaded in one commit."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

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
from puma_hf.hub.card import make_card
from puma_hf.hub.load_check import check_loads
from puma_hf.pruning import cut_copy

logger = logging.getLogger(__name__)

CARD = "README.md"
# What the Hub itself puts into a repository, or a person by its forms.
_NEUTRAL = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "NOTICE"})
# What is removed of an older push unless this one has it: a loader might take its settings or weights with ours.
_REPLACED = ("model*.safetensors", "results*.json", "sweep*.json", *(name for name in LOADED if name not in _NEUTRAL))
# `HTTPError` of the HTTP client, which is httpx or httpx2, by the version of huggingface_hub.
_CLIENT_ERROR: Any = HfHubHTTPError.__bases__[0]
_OTHERS_CODE = re.compile(r'"auto_map"\s*:\s*\{[^}]*--')
# What the card shows of the code that travels, by the name that the lines give it.
_SHOWN = {"MultimodalMACLoss": "mac_puma.MultimodalMACLoss", "PumaTrainer": "trainer_puma.PumaTrainer"}


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be."""

    repo_id: str
    files: tuple[tuple[str, int], ...]  # name and bytes of each, the card first
    left_out: tuple[str, ...]  # what of the directory stayed here
    card: str
    loaded: str  # what they gave in a fresh process
    url: str | None  # of the commit or of the pull request; None after a dry run
    revision: str | None = None  # the branch, if one was asked for
    branches: tuple[PushReport, ...] = ()  # of the trained depths below, where each has one

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        dry = f"nothing was uploaded to {self.repo_id}, as this is a dry run; the card would be:\n\n{self.card}"
        shown = [f"branch    {one.revision}\n{one._listing()}" for one in self.branches]
        left_out = [f"left out  {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*shown, self._listing(), *left_out, *([] if self.url else [dry])])

    def _listing(self) -> str:
        width = max(len(name) for name, _ in self.files)
        lines = [f"{name:<{width}}  {size:>14,} bytes" for name, size in (*self.files, ("in all", self.num_bytes))]
        uploaded = [f"uploaded  {self.url}"] if self.url else []
        return "\n".join([*lines, f"checked   {self.loaded}", *uploaded])


def push_to_hub(directory: str | Path, repo_id: str, *, token: str | None = None, **settings: Any) -> PushReport:
    """Upload what loads of a directory to the Hub, after it was loaded where puma_hf is not installed.

    Files that no loader reads stay here. The card is written anew each time, from files alone: one that is on the Hub
    is replaced, whoever wrote it. With `depth_branches` the trained depths below are cut and pushed, too: copies in the
    temporary folder, all of them checked before the first is uploaded.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        repo_id: Repository, such as "org/name"; it is made if need be.
        token: Hub token; by default that of `hf auth login` or of HF_TOKEN.
        settings: The other fields of `PushConfig`, such as `private` and `dry_run`.

    Returns:
        What was uploaded; `print` shows it.

    Raises:
        FileNotFoundError: If the directory is none of ours.
        ValueError: If it does not load or changes meanwhile, lacks the layers or the depths that are asked for, or the
            repository holds something else.
        OSError: If the Hub refuses the token or what was sent, or cannot be reached; most are huggingface_hub's own.

    Example:

    ```python
    >>> from puma_hf.hub import push_to_hub

    >>> print(push_to_hub("puma-k14-mac", "org/puma-k14", dry_run=True))  # doctest: +SKIP
    ```
    """
    config = PushConfig(directory=directory, repo_id=repo_id, **settings)
    folder, base = Path(directory), config.base_model
    token = token and token.strip()  # the end of a line does not belong to it, and no header may hold one
    hub = HfApi(token=token)
    is_adapter = is_adapter_directory(folder)
    if is_adapter and base is None:  # whoever downloads the adapter will need it
        base = named_base(folder)
        if not is_hub_id(base) or Path(base).is_dir():
            problem = f"The adapter {str(folder)!r} belongs to {base!r}, which nobody else has."
            raise ValueError(f"{problem} Push that first, and name it: base_model='org/base' (--base-model).")
    pushes = [*_depth_pushes(config, folder), replace(config, base_model=base)]
    parents: list[str | None] = [None] * len(pushes)
    if not config.dry_run:  # before the slow part, for a token is soon mended; a dry run of a model needs none
        parents = [_look_up(hub, one, is_adapter) for one in pushes]
        if is_adapter:
            _check_base(hub, folder, str(base))
    with TemporaryDirectory(prefix="puma-hf-push-") as temporary:
        places = [Path(temporary, str(number)) for number in range(len(pushes))]
        weights = _when_written(folder)
        reports = [_prepare(one, folder, place, token) for one, place in zip(pushes, places, strict=True)]
        if _when_written(folder) != weights:
            raise ValueError(f"The weights in {str(folder)!r} changed while they were checked. Push again.")
        if not config.dry_run:  # the branches of depths first: a first one begins with what main has now
            urls = [_upload(hub, *one) for one in zip(pushes, places, parents, strict=True)]
            reports = [replace(report, url=url) for report, url in zip(reports, urls, strict=True)]
            logger.info("Pushed %s to %s", folder, ", ".join(urls))
    return replace(reports[-1], branches=tuple(reports[:-1]))


# --- what is sent


def _depth_pushes(config: PushConfig, folder: Path) -> list[PushConfig]:
    """The pushes of the trained depths below the one that is pushed itself, each to a branch of its own."""
    if not config.depth_branches:
        return []
    own = read_config(folder)
    kept = config.num_kept_layers or own.get("num_kept_layers")
    depths = [depth for depth in own.get("trained_depths") or () if depth < kept]
    if not depths:
        problem = f"depth_branches=True, but {str(folder)!r} has no trained_depths below its own depth"
        raise ValueError(f"{problem}. Leave it out, or train with several (puma-hf distill --depths) and merge.")
    names = [f"k{depth}" for depth in depths]
    if config.revision in names:
        raise ValueError(f"revision={config.revision!r} is the branch of another depth. Push to another branch.")
    made = zip(depths, names, strict=True)
    return [replace(config, num_kept_layers=k, revision=name, depth_branches=False) for k, name in made]


def _prepare(config: PushConfig, folder: Path, staged: Path, token: str | None) -> PushReport:
    """Lay out in `staged` what one push uploads, with its card, once it was loaded there."""
    source, beside = folder, None
    if config.num_kept_layers is not None:
        source, beside = staged.with_name(f"{staged.name}-cut"), folder
        cut_copy(folder, source, config.num_kept_layers)
    staged.mkdir()
    _stage(source, staged)
    is_adapter = is_adapter_directory(folder)
    local_base = named_base(folder) if is_adapter else ""
    is_local = Path(local_base).is_dir()
    if is_adapter:  # for the check the base is where it lies: its name may be relative to this directory
        _name_base(folder, staged, str(Path(local_base).resolve()) if is_local else local_base)
    loaded = check_loads(staged, shown_as=folder, offline=is_local or not is_adapter, token=token)
    if is_adapter:
        _name_base(folder, staged, str(config.base_model))
    code = _SHOWN if (staged / "mac_puma.py").is_file() else {}
    card, cited = make_card(source, results=config.results or None, options=config, code=code, beside=beside)
    for name, path in cited.items():
        shutil.copyfile(path, staged / name)
    (staged / CARD).write_bytes(card.encode())  # the same bytes on every system
    names = [CARD, *sorted(path.name for path in staged.iterdir() if path.name != CARD)]
    sizes = tuple((name, (staged / name).stat().st_size) for name in names)
    left_out = tuple(sorted({path.name for path in folder.iterdir()} - set(names)))
    return PushReport(config.repo_id, sizes, left_out, card, loaded, None, config.revision)


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


def _stage(folder: Path, staged: Path) -> None:
    """Lay out the files as they will be downloaded; what is loaded there is what is sent."""
    for name in model_files(folder):
        # "org/repo--file.Class": whoever loads it would run code that is not in what is pushed, and may change.
        if name.endswith("config.json") and _OTHERS_CODE.search((folder / name).read_text(encoding="utf-8")):
            raise ValueError(f"auto_map in {str(folder / name)!r} names code of another repository: save its own.")
        if name.endswith(".safetensors"):  # a link, as weights are large; all else is a copy that nobody changes
            (staged / name).symlink_to((folder / name).resolve())
        else:
            shutil.copyfile(folder / name, staged / name)
    if (staged / "inputs_puma.py").is_file():  # the model's code, which that of the losses lies beside
        for name, code in travelling_files().items():
            (staged / name).write_text(code, encoding="utf-8")


def _when_written(staged: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in staged.glob("*.safetensors")}


def _name_base(folder: Path, staged: Path, base: str) -> None:
    settings = {**read_config(folder, ADAPTER_CONFIG), "base_model_name_or_path": base}
    (staged / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# --- the Hub


@contextmanager
def _network_told() -> Iterator[None]:
    """Make an OSError of those of the network, as the Hub's own answers are, and say that nothing was half written."""
    try:
        yield
    except OSError:
        raise
    # Of large files an upload wraps the client's errors, and the Hub's answers, in a RuntimeError.
    except (_CLIENT_ERROR, RuntimeError) as error:
        problem = f"The push to the Hub failed ({error.__cause__ or error})."
        raise ConnectionError(f"{problem} Run it again: a commit is whole or not there.") from error


@_network_told()
def _look_up(hub: HfApi, config: PushConfig, is_adapter: bool) -> str | None:
    """The commit that the push follows, if there is one; raise if nothing may, or should, be pushed there."""
    hub.whoami()  # the Hub would refuse the commit, too, but only after minutes of loading and hashing
    try:
        info: Any = hub.repo_info(config.repo_id)
    except RepositoryNotFoundError:
        return None
    if config.private is not None and bool(info.private) != config.private:
        there = f"{config.repo_id!r} is {'private' if info.private else 'public'}"
        raise ValueError(f"{there}, and private={config.private} was asked for. Change it in its settings.")
    with suppress(RevisionNotFoundError):  # then it is made from main, whose files it has
        info = hub.repo_info(config.repo_id, revision=config.revision)
    files = tuple(entry.rfilename for entry in info.siblings or [])
    # Files of two models in one repository would load as neither; pictures and notes beside a model of ours may stay.
    is_ours = any(name.endswith("_puma.py") for name in files) and (ADAPTER_CONFIG in files) == is_adapter
    if not is_ours and (foreign := sorted(set(files) - _NEUTRAL)):
        problem = f"{config.repo_id!r} exists with other content: {', '.join(foreign[:5])}."
        raise ValueError(f"{problem} Choose another repository, or remove those files there first.")
    return str(info.sha)


@_network_told()
def _check_base(hub: HfApi, adapter: Path, base: str) -> None:
    """Raise if the base is not on the Hub, or holds other weights than the adapter was trained on.

    An adapter on other weights loads, and gives other embeddings in silence. Nothing is downloaded: the Hub knows the
    SHA-256 of its large files.
    """
    siblings = hub.model_info(base, files_metadata=True).siblings or []
    weights = {one.rfilename: one.lfs for one in siblings if fnmatch(one.rfilename, "model*.safetensors")}
    digest = hashlib.sha256()
    for name, large in sorted(weights.items()):  # as `puma_hf.trainer.lora_puma.weights_sha256` has it
        digest.update(name.encode() + bytes.fromhex(large["sha256"] if large else ""))
    if read_config(adapter, BASE_FILE).get("sha256") not in (None, digest.hexdigest()):
        problem = f"The adapter was not trained on the weights in {base!r} on the Hub."
        raise ValueError(f"{problem} Push its own, and name it.")


@_network_told()
def _upload(hub: HfApi, config: PushConfig, staged: Path, parent: str | None) -> str:
    """Make one commit, whole or not at all; its address."""
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
