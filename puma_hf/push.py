"""Publish a directory on the Hub: checked, loaded as a stranger would load it, and uploaded in one commit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from puma_hf.card import CardOptions, render_card
from puma_hf.load_check import LoadCheck, check_loads
from puma_hf.push_config import PushConfig
from puma_hf.push_files import ADAPTER_CONFIG, CARD, PushFiles, files_to_push, is_model_file

logger = logging.getLogger(__name__)

# What the Hub itself puts into a repository, or a person by its forms.
_NEUTRAL = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "NOTICE"})


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
    """

    repo_id: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    card: str
    loaded: LoadCheck
    url: str | None

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
        lines.append(f"checked   {self.loaded}")
        if self.url is None:
            lines.append(
                f"nothing was uploaded to {self.repo_id}, as this is a dry run; the card would be:\n\n{self.card}"
            )
        else:
            lines.append(f"uploaded  {self.url}")
        return "\n".join(lines)


def push(directory: str | Path, repo_id: str, *, token: str | None = None, **settings: Any) -> PushReport:
    """Upload what loads of a directory to the Hub, after it was loaded where puma_hf is not installed.

    Args:
        directory: A PUMA directory, or that of a LoRA adapter.
        repo_id: Repository, such as "org/name"; it is made if need be.
        token: Hub token; by default that of `hf auth login` or of HF_TOKEN.
        settings: private, revision, create_pr, dry_run, message, results, base_model, license and datasets, as in
            `PushConfig`.

    Returns:
        What was uploaded; `print` shows it.

    Raises:
        FileNotFoundError: If the directory is none of ours.
        ValueError: If it holds what must not be published, does not load, or the repository holds something else.
        PermissionError: If there is no token, or it may not write there.
        ConnectionError: If the Hub cannot be reached, or the network went in the middle.

    Example:

    ```python
    >>> from puma_hf.push import push

    >>> print(push("puma-k14-mac", "org/puma-k14", dry_run=True))  # doctest: +SKIP
    ```
    """
    return push_configured(PushConfig(directory=directory, repo_id=repo_id, **settings), token=token)


def push_configured(config: PushConfig, *, token: str | None = None) -> PushReport:
    """What `push` does, with its settings as one object; see there."""
    files = files_to_push(config.directory)
    local_base = _check_base(config, files) if files.is_adapter else None
    hub = None if config.dry_run else HfApi(token=token)
    there: list[str] | None = None
    commit = None
    if hub is not None:  # before the slow part: a token is soon mended
        with _told(config):
            _check_rights(hub, config)
            there, commit = _look_up(hub, config)
    removed = _check_content(there or [], config, files)
    options = CardOptions(config.repo_id, config.base_model, config.license, config.datasets)
    card = render_card(config.directory, results=config.results or None, options=options)
    with TemporaryDirectory(prefix="puma-hf-push-") as temporary:
        staged = _stage(files, card, Path(temporary), local_base)
        loaded = check_loads(staged, offline=not files.is_adapter or local_base is not None)
        contents = _contents(files, card, config)
    url = None
    if hub is not None:
        with _told(config):
            url = _upload(hub, config, contents, removed, commit, is_new=there is None)
        logger.info("Pushed %s to %s", config.directory, url)
    sizes = tuple(
        (name, len(content) if isinstance(content, bytes) else content.stat().st_size)
        for name, content in contents.items()
    )
    return PushReport(config.repo_id, sizes, files.left_out, tuple(removed), card, loaded, url)


def _check_base(config: PushConfig, files: PushFiles) -> Path | None:
    """The base of an adapter where it lies on this machine; raise if others could not find it."""
    settings = json.loads((files.directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = str(settings.get("base_model_name_or_path") or "")
    local = Path(base) if base and Path(base).is_dir() else None
    if config.base_model is None and (local is not None or base.count("/") != 1):
        raise ValueError(
            f"The adapter {str(config.directory)!r} belongs to {base!r}, which nobody else has. Push that first, and "
            "name it: base_model='org/base' (--base-model)."
        )
    return local


def _stage(files: PushFiles, card: str, folder: Path, local_base: Path | None) -> Path:
    """The files as they will be downloaded: links to them, but for those that are written anew."""
    for name in files.names:
        (folder / name).symlink_to((files.directory / name).resolve())
    (folder / CARD).write_text(card, encoding="utf-8")
    if local_base is not None:  # its name may be relative to the current directory
        content = _with_base(files, str(local_base.resolve()))
        (folder / ADAPTER_CONFIG).unlink()
        (folder / ADAPTER_CONFIG).write_bytes(content)
    return folder


def _contents(files: PushFiles, card: str, config: PushConfig) -> dict[str, Path | bytes]:
    """What goes to the Hub under which name, the card first."""
    contents: dict[str, Path | bytes] = {CARD: card.encode()}
    contents |= {name: files.directory / name for name in files.names}
    if files.is_adapter and config.base_model is not None:
        contents[ADAPTER_CONFIG] = _with_base(files, config.base_model)
    return contents


def _with_base(files: PushFiles, base: str) -> bytes:
    settings = json.loads((files.directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return (json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n").encode()


def _check_rights(hub: HfApi, config: PushConfig) -> None:
    """Raise if there is no token, or its owner is no member of the organisation."""
    user = hub.whoami()
    namespace = config.repo_id.partition("/")[0]
    members = {user["name"], *(entry["name"] for entry in user.get("orgs", []))}
    if namespace not in members and not config.create_pr:
        raise PermissionError(
            f"{user['name']!r} is no member of {namespace!r} and may not write to {config.repo_id!r}. Choose one of "
            f"{', '.join(sorted(members))}, or propose it with create_pr=True (--create-pr)."
        )


def _look_up(hub: HfApi, config: PushConfig) -> tuple[list[str] | None, str | None]:
    """Files of the repository and its commit on the branch; None if there is no repository or no such branch."""
    try:
        info: Any = hub.repo_info(config.repo_id)
    except RepositoryNotFoundError:
        if config.create_pr:
            raise ValueError(f"{config.repo_id!r} does not exist, so no pull request can be opened there.") from None
        return None, None
    if config.private is not None and bool(info.private) != config.private:
        there, wanted = ("private", "public") if info.private else ("public", "private")
        raise ValueError(
            f"{config.repo_id!r} exists and is {there}, asked for was {wanted}. Change it in its settings, or "
            "choose another name."
        )
    if config.revision is not None:
        with suppress(RevisionNotFoundError):  # then it is made from main, whose files it has
            info = hub.repo_info(config.repo_id, revision=config.revision)
    return [entry.rfilename for entry in info.siblings or []], info.sha


def _check_content(there: list[str], config: PushConfig, files: PushFiles) -> list[str]:
    """Model files of an earlier push that this one no longer has; raise if the repository holds something else."""
    others = sorted(set(there) - _NEUTRAL - set(files.names))
    is_ours = any(name.endswith("_puma.py") for name in there)
    same_kind = (ADAPTER_CONFIG in there) == files.is_adapter
    foreign = [name for name in others if not is_model_file(name)] if is_ours and same_kind else others
    if not is_ours and set(there) - _NEUTRAL:
        foreign = sorted(set(there) - _NEUTRAL)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ValueError(
            f"{config.repo_id!r} exists with other content: {shown}. A push would mix two models: choose another "
            "repository, or remove those files there first."
        )
    return others


def _upload(
    hub: HfApi,
    config: PushConfig,
    contents: dict[str, Path | bytes],
    removed: list[str],
    commit: str | None,
    *,
    is_new: bool,
) -> str:
    if is_new:
        hub.create_repo(config.repo_id, private=config.private)
    if config.revision not in (None, "main"):
        hub.create_branch(config.repo_id, branch=str(config.revision), exist_ok=True)
    operations: list[Any] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    operations += [CommitOperationDelete(name) for name in removed]
    info: Any = hub.create_commit(
        config.repo_id,
        operations,
        commit_message=config.message or "Upload a PUMA embedding model",
        revision=config.revision,
        create_pr=config.create_pr,
        parent_commit=commit,  # what was looked at is what is changed
    )
    return str(info.pr_url or info.commit_url)


@contextmanager
def _told(config: PushConfig) -> Iterator[None]:
    """Errors of the Hub in words that say what to do."""
    name = repr(config.repo_id)
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"There is no Hub token to push to {name} with. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so {name} cannot be reached. Unset it to push.") from error
    except HfHubHTTPError as error:
        raise _refusal(error, name) from error
    except (ValueError, PermissionError, MemoryError):
        raise
    except Exception as error:
        # The HTTP client's own errors differ between versions of huggingface_hub.
        raise ConnectionError(
            f"The connection to the Hub failed while pushing to {name} ({type(error).__name__}: {error}). A commit is "
            "made whole or not at all, so the repository is as it was, or empty if it is new. Run it again: large "
            "files that arrived are not sent again."
        ) from error


def _refusal(error: HfHubHTTPError, name: str) -> OSError:
    status = error.response.status_code
    reason = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 401:
        return PermissionError(f"The Hub does not know the token ({reason}). Log in again with `hf auth login`.")
    if status in (403, 404):
        return PermissionError(
            f"The token may not write to {name} ({reason}). Make one that may at huggingface.co/settings/tokens, or "
            "propose the change with create_pr=True (--create-pr)."
        )
    if status in (409, 412):
        return ConnectionError(f"{name} changed while this push ran ({reason}). Run it again.")
    return ConnectionError(
        f"The Hub refused the push to {name} with status {status} ({reason}). The repository is as it was, or empty if "
        "it is new. Run it again."
    )
