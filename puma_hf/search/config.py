"""The settings of an index and of a search: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from puma_hf.embedding.config import EmbedConfig, OnError
from puma_hf.settings import CheckedConfig, option, required

Target = Literal["any", "text", "image"]
Backend = Literal["torch", "faiss", "ann"]
RESCORE_MULTIPLIER = 50
AnnKind = Literal["none", "hnsw", "int8", "binary"]


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EmbedConfig):
    """Settings of `puma_hf.search.build.build_index`; `puma-hf index --help` explains every field.

    They are those of `EmbedConfig`, since an index is a directory of embeddings and what is needed to show an answer;
    and `ann`.

    Raises:
        ValueError: If a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.search.config import IndexConfig

    >>> IndexConfig(data="photos", model="puma-k4-mac", output="index").on_error
    'skip'
    ```
    """

    model: str = option("", "PUMA directory, here or on the Hub; needed by the first run, which the index remembers.")
    output: str | Path = required(
        "Directory of the index. A run that was stopped goes on from there, and embeddings of the same data, model "
        "and settings, made by puma-hf embed, are kept."
    )
    on_error: OnError = option("skip", "On an input that cannot be read: raise; or skip, which leaves it out.")
    ann: AnnKind | None = option(
        None,
        "Add a file for approximate search in large indexes (--backend ann; needs pip install 'puma-hf[faiss]'): hnsw "
        "is quickest; int8 misses least; binary is smallest; none removes it. By default it stays what it is. "
        "With --format safetensors a search reads only the rows that it rescores.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_error == "zero":
            raise ValueError(
                "on_error='zero' would put zeros into the index, which no query finds. Choose skip, or raise."
            )


def _positional(text: str) -> Any:
    """A field that the command may take by its place, and that may be left out."""
    return field(default=None, metadata={"help": text, "positional": True})


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CheckedConfig):
    """Settings of `puma_hf.search.query.search`; `puma-hf search --help` explains every field.

    Raises:
        ValueError: If there is no query, or a value is out of range; the message names value, constraint and remedy.

    Example:

    ```python
    >>> from puma_hf.search.config import SearchConfig

    >>> SearchConfig(index="index", query="a red apple").top
    10
    ```
    """

    index: str | Path = required("Directory that puma-hf index has written.", positional=True)
    query: str | None = _positional("What to look for, in words.")
    image: str | Path | None = option(None, "Picture to look for, or that the words are about.")
    # `for` is a keyword of Python.
    target: Target = field(
        default="any",
        metadata={"help": "What answers may be: texts, pictures (with or without text), or any.", "flag": "for"},
    )
    top: int = option(10, "Answers to show.", at_least=1)
    instruction: str | None = option(None, "What the query asks for, in the words that the model was trained with.")
    json: bool = option(False, "Print the answers as JSON.")
    html: str | Path | None = option(None, "File for a page of the answers, with small pictures inside.")
    model: str | None = option(None, "The model that made the index, if it is no longer where it was.")
    backend: Backend = option(
        "torch",
        "torch and faiss are exact; ann is approximate, for an index made with --ann. Both faiss and ann need pip "
        "install 'puma-hf[faiss]'.",
    )
    rescore_multiplier: int = option(
        RESCORE_MULTIPLIER,
        "With --backend ann: how many items are compared exactly for each answer that is shown.",
        at_least=1,
    )
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def notes(self) -> list[str]:
        """Options that this combination ignores, one sentence each."""
        default = type(self).__dataclass_fields__["rescore_multiplier"].default
        if self.rescore_multiplier == default or self.backend == "ann":
            return []
        return [f"rescore_multiplier={self.rescore_multiplier}: not used with backend={self.backend!r}."]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.query and self.query.strip()) and self.image is None:
            raise ValueError(
                f"query={self.query!r} and image=None: nothing to look for. Give words, a picture (--image), or both."
            )
        if self.html is not None and Path(self.html).is_dir():
            raise ValueError(f"html={str(self.html)!r} is a directory, must be a file. Name one, such as answers.html.")
