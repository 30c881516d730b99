"""The base of an adapter that is pushed alone: whoever downloads the adapter must get the weights it was trained on."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from puma_hf.files import ADAPTER_CONFIG, BASE_FILE, is_hub_id, named_base
from puma_hf.hub.push_files import PushFiles, read_json

logger = logging.getLogger(__name__)

_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter belongs to.

    Args:
        name: Hub id that the pushed adapter names.
        local: The same base on this machine; None if it is only on the Hub.
        settings: The adapter's own settings.
        sha256: What training noted of the weights that it was trained on (`weights_sha256`); None if it is not known.
    """

    name: str
    local: Path | None
    settings: dict[str, Any]
    sha256: str | None

    def config(self, base: str | Path) -> bytes:
        """The adapter's settings with another name for its base."""
        return (json.dumps({**self.settings, "base_model_name_or_path": str(base)}, indent=2) + "\n").encode()


def read_base(files: PushFiles, base_model: str | None) -> AdapterBase:
    """The base that an adapter names.

    Args:
        files: The adapter's files.
        base_model: Hub id of its base, if the adapter itself does not name one.

    Raises:
        ValueError: If the adapter names a base that others could not find, or its settings are damaged.
    """
    settings = read_json(files.directory / ADAPTER_CONFIG)
    if not isinstance(settings, dict):
        raise ValueError(f"{ADAPTER_CONFIG} must hold names with values, not {type(settings).__name__}. Train again.")
    base = named_base(files.directory)
    local = Path(base) if base and Path(base).is_dir() else None
    if base_model is None and (local is not None or not is_hub_id(base)):
        raise ValueError(
            f"The adapter {str(files.directory)!r} belongs to {base!r}, which nobody else has. Push that first, and "
            "name it: base_model='org/base' (--base-model)."
        )
    noted = read_json(files.directory / BASE_FILE) if BASE_FILE in files.names else {}
    sha256 = noted.get("sha256") if isinstance(noted, dict) else None
    return AdapterBase(base_model or base, local, settings, sha256)


def check_base_on_hub(hub: HfApi, base: AdapterBase) -> None:
    """Raise if the base that a pushed adapter would name is not on the Hub, or holds other weights.

    Nothing is downloaded: the Hub knows the SHA-256 of its large files.

    Raises:
        ValueError: If it is not there, or is not what the adapter was trained on.
    """
    try:
        info = hub.model_info(base.name, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"The adapter's base {base.name!r} is not on the Hub, or this token cannot see it, so the adapter would "
            "load for nobody. Push the base first, or name another: base_model='org/base' (--base-model)."
        ) from error
    weights = [
        one for one in info.siblings or [] if one.rfilename.endswith(".safetensors") and "/" not in one.rfilename
    ]
    hashes = {one.rfilename: one.lfs["sha256"] for one in weights if one.lfs}
    if base.sha256 is None or len(hashes) < len(weights):
        logger.warning("Whether %s holds the weights that the adapter was trained on is not known.", base.name)
        return
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(name.encode() + bytes.fromhex(hashes[name]))
    if digest.hexdigest() != base.sha256:
        raise ValueError(
            f"The adapter was not trained on the weights in {base.name!r} on the Hub (SHA-256 "
            f"{digest.hexdigest()[:_SHOWN_DIGITS]} instead of {base.sha256[:_SHOWN_DIGITS]}). Push the directory it "
            "was trained on, and name that: base_model='org/base' (--base-model)."
        )
