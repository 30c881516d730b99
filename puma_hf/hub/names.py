"""Names of repositories on the Hub."""

from __future__ import annotations

import re

# huggingface_hub.utils.validate_repo_id has the same rules; to import it would slow `puma-hf --help` down.
_HUB_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, organisation/name; nobody is asked for it.

    Example:

    ```python
    >>> from puma_hf.hub.names import is_hub_id

    >>> is_hub_id("org/puma-k14"), is_hub_id("../puma-k14"), is_hub_id("/home/me/puma-k14")
    (True, False, False)
    ```
    """
    is_forbidden = "--" in name or ".." in name or name.endswith(".git")
    return _HUB_ID.fullmatch(name) is not None and not is_forbidden
