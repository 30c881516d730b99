"""The settings of an index, of a search and of its page: one truth for YAML files, the command's flags, and Python.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from puma_hf.embedding.config import EmbedConfig, FileFormat, OnError, Precision
from puma_hf.settings import CheckedConfig, option, required

Target = Literal["any", "text", "image"]
Backend = Literal["exact", "ann", "torch", "faiss"]
RESCORE_MULTIPLIER = 50
AnnKind = Literal["none", "hnsw", "int8", "binary"]


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EmbedConfig):
    """Settings of `puma_hf.search.index.build_index`; `puma-hf index --help` explains every field."""

    model: str = option("", "PUMA directory, here or on the Hub; needed by the first run, which the index remembers.")
    output: str | Path = required("Directory of the index; a run that was stopped goes on from there.")
    on_error: OnError = option("skip", "On an input that cannot be read: raise; or skip, which leaves it out.")
    precision: Precision = option("float32", "Numbers that are stored: float32; or float16, half as large.")
    shard_size: int = option(
        4096, "Inputs embedded between two writes; a run that is killed loses at most these.", at_least=1, at_most=4096
    )
    calibration_size: int = option(1024, "Not used by an index.", at_least=2)
    format: FileFormat = option("parquet", "Not used by an index, which is a table of LanceDB.")
    ann: AnnKind | None = option(
        None,
        "Add an index for approximate search in large corpora (--backend ann): hnsw is quickest; int8 misses least; "
        "binary is smallest; none removes it. By default it stays what it is.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_error == "zero":
            raise ValueError(
                "on_error='zero' would put zeros into the index, which no query finds. Choose skip, or raise."
            )
        if self.precision not in ("float32", "float16"):
            raise ValueError(
                f"precision={self.precision!r} must be 'float32' or 'float16' in an index. Choose ann='int8' or "
                "'binary' (--ann) for a search that reads less."
            )

    def notes(self) -> list[str]:
        """Options that an index ignores, one sentence each."""
        defaults = type(self).__dataclass_fields__
        given = [name for name in ("calibration_size", "format") if getattr(self, name) != defaults[name].default]
        return [f"{name}={getattr(self, name)!r}: not used by an index." for name in given]


def _positional(text: str) -> Any:
    """A field that the command may take by its place, and that may be left out."""
    return field(default=None, metadata={"help": text, "positional": True})


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CheckedConfig):
    """Settings of `puma_hf.search.query.search`; `puma-hf search --help` explains every field."""

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
        "exact", "exact; or ann, approximate, for an index made with --ann. torch and faiss are old words for exact."
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


FIRST_PORT = 7860  # where Gradio's pages are, and what a Space shows


@dataclass(frozen=True, kw_only=True)
class AppConfig(CheckedConfig):
    """Settings of `puma_hf.app.launch.launch`; `puma-hf app --help` explains every field."""

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
    backend: Backend = option("exact", "As for puma-hf search.")
    trust_remote_code: bool = option(False, "Run the code of a Hub repository; a local directory's is run.")

    def notes(self) -> list[str]:
        """What a person should know before the run: options that this combination ignores."""
        if self.space is None:
            return []
        of_serving = ("host", "port", "top", "max_upload_mb", "open_browser", "backend")
        given = [one.name for one in fields(self) if one.name in of_serving and getattr(self, one.name) != one.default]
        return [f"{name} is ignored: a Space is written, nothing is served. Its app.py can set it." for name in given]
