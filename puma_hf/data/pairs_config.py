"""Settings of `puma-hf pairs`, and what `puma-hf train` takes to read pairs.

Nothing heavy is imported here, so that `puma-hf --help` stays quick.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from puma_hf.settings import CheckedConfig, SpecialTokens, option, required, special_tokens_option

BadPairs = Literal["raise", "drop"]
PairDirection = Literal["text-to-image", "image-to-text", "both"]


@dataclass(frozen=True, kw_only=True)
class PairSettings(CheckedConfig):
    """How pairs of one's own are read; `load_pairs` has the same arguments."""

    anchor: str | None = option(
        None, "Column of what asks, or text=COLUMN,image=COLUMN; default: guessed from the names (pairs of your own)."
    )
    positive: str | None = option(None, "Column or columns of the right answers, likewise.")
    negatives: tuple[str, ...] = option((), "Column or columns of a wrong answer, likewise; repeat for more.")
    instruction: str | None = option(None, "What the anchors of pairs look for: a text, or a column of texts.")
    reverse_instruction: str | None = option(None, "What the positives look for when they ask; direction both.")
    direction: PairDirection | None = option(
        None, "Which side of pairs asks; both: either in turn; default: as the columns say, a caption for its image."
    )
    images_to: str | Path | None = option(None, "Folder to save images to that are inside of a dataset's files.")
    bad_pairs: BadPairs = option("raise", "What to do if lines of pairs cannot be used: raise an error, or drop them.")

    special_tokens: SpecialTokens = special_tokens_option()

    def pair_arguments(self) -> dict[str, Any]:
        """The arguments of `load_pairs` that were given, but for what is to be done about errors and special tokens."""
        names = {entry.name for entry in fields(PairSettings)} - {"bad_pairs", "special_tokens"}
        values = {entry.name: getattr(self, entry.name) for entry in fields(PairSettings) if entry.name in names}
        return {name: value for name, value in values.items() if value is not None and value != ()}


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSettings):
    """Settings of the dry run, `puma_hf.data.pairs_report.pairs`.

    Example:

    ```python
    >>> from puma_hf.data.pairs_config import PairsConfig

    >>> PairsConfig(data="photos", direction="both").pair_arguments()
    {'direction': 'both'}
    ```
    """

    data: str | Path = required(
        "Table of pairs (.csv, .tsv, .jsonl, .json, .parquet), or a folder of images with its captions.* or "
        "metadata.*.",
        positional=True,
    )
    decode: bool = option(False, "Decode every image instead of reading its header alone.")
    json: str | Path | None = option(None, "Also write the report to this file as JSON.")
    mbeir: str | Path | None = option(
        None, "Also write the pairs to this new folder in M-BEIR's layout, for puma-hf evaluate --data."
    )
    val_fraction: float = option(0.1, "Share of the queries for the split val; mbeir only.", at_least=0, at_most=1)
    test_fraction: float = option(0.1, "Share of the queries for the split test; mbeir only.", at_least=0, at_most=1)
    seed: int = option(0, "Seed of the splits; mbeir only.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction + self.test_fraction > 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be 1 at most together; "
                "what they leave is for training. Lower one."
            )
