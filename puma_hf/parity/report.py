"""The largest difference of each form of a model, with its bound and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

# Largest difference of a number of an embedding, which is of length 1, in float32.
TOLERANCE = 1e-5
# Largest 1 - cosine where weights are rounded to bfloat16.
COSINE_TOLERANCE = 1e-2

Measure = Literal["difference", "1 - cosine", "relative difference"]


@dataclass(frozen=True)
class ParityRow:
    """How far one form of a model is from another.

    Attributes:
        form: What was compared.
        compared_with: With what.
        measure: "difference" is that of two numbers at the same place of two embeddings; "relative difference" that of
            two weights, as a share of the largest of their tensor.
        largest: The largest over all inputs; NaN if an embedding is.
        bound: What it may be.
        worst: What the input with the largest difference is; of weights the tensor's name.
    """

    form: str
    compared_with: str
    measure: Measure
    largest: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound; NaN never is."""
        return self.largest <= self.bound

    @property
    def verdict(self) -> str:
        """The row's last word."""
        return "ok" if self.ok else "DIFFERS"


@dataclass(frozen=True)
class ParityReport:
    """What `check` found.

    Attributes:
        directory: What was checked.
        num_inputs: On how many inputs.
        rows: One for each pair of forms.
    """

    directory: str
    num_inputs: int
    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        """Whether no form differs."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {"directory": self.directory, "num_inputs": self.num_inputs, "ok": self.ok, "rows": rows}

    def __str__(self) -> str:
        titles = ("form", "compared with", "measure", "largest", "bound", "worst", "")
        cells = [titles] + [
            (
                *(
                    row.form,
                    row.compared_with,
                    row.measure,
                    f"{row.largest:.1e}",
                    f"{row.bound:.0e}" if row.bound else "0",
                    row.worst,
                ),
                row.verdict,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        wrong = [row.form for row in self.rows if not row.ok]
        verdict = f"{', '.join(wrong)}: not what they should be" if wrong else "all forms agree"
        return "\n".join([*(line.rstrip() for line in lines), f"{self.directory}, {self.num_inputs} inputs: {verdict}"])


def compare(
    form: str,
    compared_with: str,
    found: Tensor,
    expected: Tensor,
    kinds: Sequence[str],
    *,
    measure: Measure = "difference",
) -> ParityRow:
    """Compare the embeddings of two forms.

    Args:
        form: What the embeddings are of.
        compared_with: What the expected ones are of.
        found: `(num_inputs, embedding_dim)`.
        expected: `(num_inputs, embedding_dim)`.
        kinds: What each input is.
        measure: How to compare; "1 - cosine" where weights are rounded to two bytes.

    Returns:
        The largest difference, its bound, and where it was.

    Raises:
        ValueError: If the two are of different shapes.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"{form} gives embeddings of shape {tuple(found.shape)}, but {compared_with} {tuple(expected.shape)}: the "
            "two are not forms of one model. Name the directories that belong together."
        )
    found, expected = found.double(), expected.double()
    if measure == "difference":
        differences, bound = (found - expected).abs().amax(dim=1), TOLERANCE
    else:
        # Rounding may make a cosine larger than 1.
        differences, bound = (1 - cosine_similarity(found, expected)).clamp(min=0), COSINE_TOLERANCE
    worst = int(differences.argmax())  # of NaN, too
    return ParityRow(form, compared_with, measure, float(differences[worst]), bound, kinds[worst])
