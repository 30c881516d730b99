"""Publish a directory on the Hub: checked, loaded as a stranger would load it, and uploaded in one commit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from puma_hf.configs import PushConfig
from puma_hf.files import ADAPTER_CONFIG
from puma_hf.hub.card import CardOptions, make_card
from puma_hf.hub.card_results import RESULT_NAMES
from puma_hf.hub.load_check import LoadCheck, check_loads
from puma_hf.hub.push_base import AdapterBase, check_base_on_hub, read_base
from puma_hf.hub.push_contents import holds_secret
from puma_hf.hub.push_errors import told
from puma_hf.hub.push_files import CARD, PushFiles, files_to_push, is_model_file, loss_files

logger = logging.getLogger(__name__)

# What the Hub itself puts into a repository, or a person by its forms.
_NEUTRAL = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "NOTICE"})
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be.

    Args:
        repo_id: The repository.
        files: Name and bytes of each file, the card first.
        left_out: What of the directory stayed here.
        removed: Older model files of the repository that this commit removes.
        card: The card.
        loaded: How the files loaded in a fresh process.
        url: Address of the commit or of the pull request; None after a dry run.
        replaces_card: Whether the repository had a card, which is now in its history alone.
    """

    repo_id: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    card: str
    loaded: LoadCheck
    url: str | None
    replaces_card: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.files)
        lines = [f"{name:<{width}}  {size:>14,} bytes" for name, size in self.files]
        lines.append(f"{'in all':<{width}}  {self.num_bytes:>14,} bytes")
        lines += [f"left out  {', '.join(self.left_out)}"] if self.left_out else []
        lines += [f"removed   {', '.join(self.removed)}"] if self.removed else []
        lines += [f"replaced  {CARD}; what was written there by hand is in the history"] if self.replaces_card else []
        lines.append(f"checked   {self.loaded}")
        if self.url is None:
            lines.append(
                f"nothing was uploaded to {self.repo_id}, as this is a dry run; the card would be:\n\n{self.card}"
            )
        else:
            lines.append(f"uploaded  {self.url}")
        return "\n".join(lines)


def push_to_hub(directory: str | Path, repo_id: str, *, token: str | None = None, **settings: Any) -> PushReport:
    """Upload what loads of a directory to the Hub, after it was loaded where puma_hf is not installed.

    The card is written anew each time, from files alone. `README.md` of the directory stays as it is and is not sent;
    one that is on the Hub is replaced, whoever wrote it.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        repo_id: Repository, such as "org/name"; it is made if need be.
        token: Hub token; by default that of `hf auth login` or of HF_TOKEN.
        settings: private, revision, create_pr, dry_run, message, results, base_model, license, base_license,
            data_license and datasets, as in `PushConfig`.

    Returns:
        What was uploaded; `print` shows it.

    Raises:
        FileNotFoundError: If the directory is none of ours, or lacks a file.
        ValueError: If it holds what must not be published, does not load, or changes meanwhile; if the repository
            holds something else, or the Hub refuses what was sent.
        PermissionError: If there is no token, or it may not write there.
        ConnectionError: If the Hub cannot be reached, or the network went in the middle.

    Example:

    ```python
    >>> from puma_hf.hub import push_to_hub

    >>> print(push_to_hub("puma-k14-mac", "org/puma-k14", dry_run=True))  # doctest: +SKIP
    ```
    """
    return push_configured(PushConfig(directory=directory, repo_id=repo_id, **settings), token=token)


def push_configured(config: PushConfig, *, token: str | None = None) -> PushReport:
    """What `push_to_hub` does, with its settings as one object; see there."""
    token = _checked_token(token)
    files = files_to_push(config.directory)
    base = read_base(files, config.base_model) if files.is_adapter else None
    hub = None if config.dry_run else HfApi(token=token)
    there = None
    if hub is not None:  # before the slow part: a token is soon mended
        with told(config.repo_id, token):
            _check_rights(hub, config)
            there = _look_up(hub, config)
            if base is not None:
                check_base_on_hub(hub, base)
    _check_content(there.files if there else (), config, files, files.names)
    with TemporaryDirectory(prefix="puma-hf-push-") as temporary:
        staged = _stage(files, Path(temporary), base)
        before = _state_of_weights(staged)
        offline = base is None or base.local is not None
        loaded = check_loads(staged, offline=offline, token=token, shown_as=config.directory)
        card = _write_card(config, files, staged, base)
        if base is not None:
            (staged / ADAPTER_CONFIG).write_bytes(base.config(base.name))
        names = [CARD, *sorted(path.name for path in staged.iterdir() if path.name != CARD)]
        sizes = tuple((name, (staged / name).stat().st_size) for name in names)
        removed = _check_content(there.files if there else (), config, files, names)
        url = None
        if hub is not None:
            with told(config.repo_id, token):
                additions = [CommitOperationAdd(name, str(staged / name)) for name in names]  # this hashes them
                if _state_of_weights(staged) != before:
                    raise ValueError(
                        f"The weights in {str(config.directory)!r} changed while they were checked. Wait until nothing "
                        "writes there, and push again."
                    )
                url = _upload(hub, config, [*additions, *map(CommitOperationDelete, removed)], there)
            logger.info("Pushed %s to %s", config.directory, url)
    left_out = tuple(sorted({*files.left_out, *(set(files.names) - set(names))}))
    replaces_card = there is not None and CARD in there.files
    return PushReport(config.repo_id, sizes, left_out, tuple(removed), card, loaded, url, replaces_card)


def _checked_token(token: str | None) -> str | None:
    token = None if token is None else token.strip()
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        # The HTTP client would refuse it in words that show it.
        raise ValueError("The Hub token is empty, or holds a blank or a control character. Copy it again, in one line.")
    return token


def _write_card(config: PushConfig, files: PushFiles, staged: Path, base: AdapterBase | None) -> str:
    """Write the card, and the result files that it cites, to what is sent; others are of another model and stay."""
    options = CardOptions(
        repo_id=config.repo_id,
        base_model=config.base_model if base is None else base.name,
        license=config.license,
        datasets=config.datasets,
        base_license=config.base_license,
        data_license=config.data_license,
    )
    card = make_card(config.directory, results=config.results or None, options=options, travelling=True)
    for name in set(RESULT_NAMES) & set(files.names):
        (staged / name).unlink()
        if not any(path.samefile(files.directory / name) for path in card.files.values()):
            logger.warning("%s stays here: it was not measured on these weights.", name)
    for name, path in card.files.items():
        shutil.copyfile(path, staged / name)
    (staged / CARD).write_bytes(card.text.encode())  # the same bytes on every system
    if leaks := [name for name in (CARD, *card.files) if holds_secret(staged / name)]:
        raise ValueError(
            f"{', '.join(leaks)} of {str(config.directory)!r} would hold what looks like an access token or a private "
            "key, which a result file or a recipe beside it must have. Remove it there, and push again."
        )
    return card.text


def _stage(files: PushFiles, folder: Path, base: AdapterBase | None) -> Path:
    """The files as they will be downloaded; what is loaded there is what is sent.

    Weights are links, as they are large, and all else is a copy, so that nothing changes between check and upload.
    """
    for name in files.names:
        if name.endswith(".safetensors"):
            (folder / name).symlink_to((files.directory / name).resolve())
        else:
            shutil.copyfile(files.directory / name, folder / name)
    if "messages_puma.py" in files.names:  # the model's code, which that of the losses lies beside
        for name, code in loss_files().items():
            (folder / name).write_text(code, encoding="utf-8")
    if base is not None:  # a name on this machine may be relative to the current directory
        (folder / ADAPTER_CONFIG).write_bytes(base.config(base.name if base.local is None else base.local.resolve()))
    return folder


def _state_of_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    stats = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _check_rights(hub: HfApi, config: PushConfig) -> None:
    """Raise if there is no token, it cannot write, or its owner is no member of the organisation."""
    user = hub.whoami()
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise PermissionError(
            f"The token of {user['name']!r} may only read. Make one that may write to {config.repo_id!r} at "
            "huggingface.co/settings/tokens."
        )
    namespace = config.repo_id.partition("/")[0]
    members = {user["name"], *(entry["name"] for entry in user.get("orgs", []) if entry.get("roleInOrg") != "read")}
    if namespace not in members and not config.create_pr:
        raise PermissionError(
            f"{user['name']!r} is no member of {namespace!r} who may write, so not to {config.repo_id!r} either. "
            f"Choose one of {', '.join(sorted(members))}, or propose it with create_pr=True (--create-pr)."
        )


@dataclass(frozen=True)
class _Repository:
    """What is on the Hub: the files of the branch, its commit, and whether the branch is yet to be made."""

    files: tuple[str, ...]
    commit: str | None
    is_new_branch: bool


def _look_up(hub: HfApi, config: PushConfig) -> _Repository | None:
    """The repository; None if there is none."""
    try:
        info: Any = hub.repo_info(config.repo_id)
    except RepositoryNotFoundError:
        if config.create_pr:
            raise ValueError(f"{config.repo_id!r} does not exist, so no pull request can be opened there.") from None
        return None
    if config.private is not None and bool(info.private) != config.private:
        there, wanted = ("private", "public") if info.private else ("public", "private")
        raise ValueError(
            f"{config.repo_id!r} exists and is {there}, asked for was {wanted}. Change it in its settings, or "
            "choose another name."
        )
    is_new_branch = False
    if config.revision is not None:
        try:
            info = hub.repo_info(config.repo_id, revision=config.revision)
        except RevisionNotFoundError:  # then it is made from main, whose files it has
            is_new_branch = True
    if is_new_branch and config.create_pr:
        raise ValueError(
            f"{config.repo_id!r} has no branch {config.revision!r} to open a pull request against. Leave revision out."
        )
    return _Repository(tuple(entry.rfilename for entry in info.siblings or []), info.sha, is_new_branch)


def _check_content(there: tuple[str, ...], config: PushConfig, files: PushFiles, names: Sequence[str]) -> list[str]:
    """Model files of an earlier push that this one no longer has; raise if the repository holds something else.

    Pictures beside a model of ours are a card's, and stay.
    """
    others = sorted(set(there) - _NEUTRAL)
    foreign = others
    if any(name.endswith("_puma.py") for name in there):  # an earlier push
        others = [name for name in others if name not in names and not name.lower().endswith(_PICTURE_SUFFIXES)]
        is_same_kind = (ADAPTER_CONFIG in there) == files.is_adapter
        foreign = [name for name in others if not (is_same_kind and is_model_file(name))]
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ValueError(
            f"{config.repo_id!r} exists with other content: {shown}. A push would mix two models: choose another "
            "repository, or remove those files there first."
        )
    return others


def _upload(hub: HfApi, config: PushConfig, operations: list[Any], there: _Repository | None) -> str:
    if there is None:
        try:
            hub.create_repo(config.repo_id, private=config.private)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            raise PermissionError(
                f"{config.repo_id!r} exists, but this token could not see it a moment ago: it is private, or just made "
                "by somebody. Use a token that may read and write it, or choose another name."
            ) from error
    is_new_branch = config.revision not in (None, "main") if there is None else there.is_new_branch
    if is_new_branch:
        hub.create_branch(config.repo_id, branch=str(config.revision), exist_ok=True)
    info: Any = hub.create_commit(
        config.repo_id,
        operations,
        commit_message=config.message or "Upload a PUMA embedding model",
        revision=config.revision,
        create_pr=config.create_pr,
        parent_commit=None if there is None else there.commit,  # what was looked at is what is changed
    )
    return str(info.pr_url or info.commit_url)
