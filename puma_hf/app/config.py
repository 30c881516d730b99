"""The settings of the page: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from puma_hf.search.config import Backend
from puma_hf.settings import CheckedConfig, option, required

FIRST_PORT = 7860  # where Gradio's pages are, and what a Space shows


@dataclass(frozen=True, kw_only=True)
class AppConfig(CheckedConfig):
    """Settings of `puma_hf.app.launch.launch`; `puma-hf app --help` explains every field.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.app.config import AppConfig

    >>> AppConfig(index="index").host
    '127.0.0.1'
    ```
    """

    index: str | Path = required("Directory that puma-hf index has written.", positional=True)
    host: str = option(
        "127.0.0.1", "Address to serve at. The default is seen from this machine alone; 0.0.0.0 from all others, too."
    )
    port: int | None = option(
        None,
        f"Port to serve at; 0 for any. Default: {FIRST_PORT}, or the next that is free.",
        at_least=0,
        at_most=65535,
    )
    instruction: str | None = option(
        None, "What queries ask for, in the words that the model was trained with; can be changed on the page."
    )
    top: int = option(24, "Answers to show.", at_least=1, at_most=200)
    max_upload_mb: float = option(10.0, "Megabytes that the file of a picture may have.", above=0, at_most=1000)
    open_browser: bool = option(False, "Open the page in a browser.")
    space: str | Path | None = option(
        None, "New directory for a Space of the Hub that shows this page; written instead of serving."
    )
    model: str | None = option(
        None, "The model that made the index, if it is no longer where it was; of a Space, its name on the Hub."
    )
    backend: Backend = option("torch", "As for puma-hf search; faiss and ann need pip install 'puma-hf[faiss]'.")
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def notes(self) -> list[str]:
        """What a person should know before the run: options that this combination ignores."""
        if self.space is None:
            return []
        of_serving = ("host", "port", "top", "max_upload_mb", "open_browser", "backend")
        given = [one.name for one in fields(self) if one.name in of_serving and getattr(self, one.name) != one.default]
        return [f"{name} is ignored: a Space is written, nothing is served. Its app.py can set it." for name in given]
