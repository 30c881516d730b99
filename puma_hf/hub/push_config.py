"""The settings of an upload: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puma_hf.hub.names import is_hub_id
from puma_hf.settings import CheckedConfig, option, required


@dataclass(frozen=True, kw_only=True)
class PushConfig(CheckedConfig):
    """Settings of `puma_hf.hub.push.push_configured`; `puma-hf push --help` explains every field.

    Raises:
        ValueError: If a name is not of the Hub's form, or two settings exclude each other.

    Example:

    ```python
    >>> from puma_hf.hub.push_config import PushConfig

    >>> PushConfig(directory="puma-k14-mac", repo_id="org/puma-k14").create_pr
    False
    ```
    """

    directory: str | Path = required("A PUMA directory, or the directory of a trained LoRA adapter.", positional=True)
    repo_id: str = required("Repository on the Hub, such as org/name; it is made if need be.", positional=True)
    private: bool | None = option(None, "Make the repository private; default: as the organisation has it.")
    revision: str | None = option(None, "Branch to push to, made if need be; default: main.")
    create_pr: bool = option(False, "Open a pull request instead of writing to the branch.")
    dry_run: bool = option(False, "Check and load everything, list files, bytes and the card, and upload nothing.")
    message: str | None = option(None, "Message of the commit.")
    results: tuple[str, ...] = option(
        (), "results.json, sweep.json, train.yaml or distill.yaml for the card; default: those found beside the model."
    )
    base_model: str | None = option(None, "Hub id of what the model was made from, or that an adapter belongs to.")
    license: str | None = option(None, "Licence of the model in the Hub's spelling, such as apache-2.0.")
    base_license: str | None = option(None, "Licence of what it was made from, for the card.")
    data_license: str | None = option(None, "Licence of the data it was trained on, for the card.")
    datasets: tuple[str, ...] = option((), "Hub id of a dataset it was trained on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("repo_id", "base_model", "datasets"):
            value = getattr(self, name)
            for given in value if isinstance(value, tuple) else (value,):
                if given is not None and not is_hub_id(given):
                    raise ValueError(f"{name}={given!r} must be a Hub id of the form organisation/name.")
