from __future__ import annotations

import math

import pytest
import torch

from puma_hf.parity.report import COSINE_TOLERANCE, TOLERANCE, ParityReport, ParityRow, compare

KINDS = ("text", "image")
VECTORS = torch.tensor([[1.0, 0.0], [0.6, 0.8]])


def test_the_largest_difference_and_where_it_was() -> None:
    row = compare("saved", "model", VECTORS + torch.tensor([[0.0, 1e-6], [0.0, 2e-6]]), VECTORS, KINDS)
    assert row.largest == pytest.approx(2e-6, rel=0.05)
    assert (row.worst, row.bound, row.ok, row.verdict) == ("image", TOLERANCE, True, "ok")
    row = compare("saved", "model", VECTORS + torch.tensor([[2e-5, 0.0], [0.0, 0.0]]), VECTORS, KINDS)
    assert (row.worst, row.ok, row.verdict) == ("text", False, "DIFFERS")


def test_rounded_vectors_are_compared_by_cosine() -> None:
    row = compare("bf16", "model", VECTORS * 1.1, VECTORS, KINDS, measure="1 - cosine")
    assert row.largest == pytest.approx(0, abs=1e-9)
    assert (row.bound, row.ok) == (COSINE_TOLERANCE, True)
    row = compare("bf16", "model", torch.tensor([[1.0, 0.0], [0.8, 0.6]]), VECTORS, KINDS, measure="1 - cosine")
    assert row.largest == pytest.approx(0.04)
    assert not row.ok


@pytest.mark.parametrize("measure", ["difference", "1 - cosine"])
def test_nan_is_no_success(measure: str) -> None:
    found = VECTORS.clone()
    found[1, 0] = math.nan
    row = compare("a", "b", found, VECTORS, KINDS, measure=measure)  # type: ignore[arg-type]
    assert math.isnan(row.largest)
    assert (row.worst, row.ok) == ("image", False)


def test_other_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"a gives embeddings of shape \(2, 1\), but b \(2, 2\): the two are not forms"
    ):
        compare("a", "b", VECTORS[:, :1], VECTORS, KINDS)


def test_report() -> None:
    good = ParityRow("padded on the right", "left", "difference", 1e-7, 1e-5, "text")
    bad = ParityRow("merged", "adapter", "difference", 2e-3, 1e-5, "image")
    report = ParityReport("puma", 10, (good, bad))
    assert not report.ok
    first, middle, last, end = str(report).splitlines()
    assert first.split("  ")[0] == "form"
    assert middle.endswith("1.0e-07  1e-05  text   ok")
    assert last.endswith("2.0e-03  1e-05  image  DIFFERS")
    assert end == "puma, 10 inputs: merged: not what they should be"
    assert [row["ok"] for row in report.to_dict()["rows"]] == [True, False]
    agreed = ParityReport("puma", 10, (good,))
    assert agreed.ok
    assert str(agreed).endswith("puma, 10 inputs: all forms agree")


def test_a_bound_of_nothing_is_shown_as_such() -> None:
    row = ParityRow("exported, weights", "weights", "relative difference", 0.0, 0, "all tensors")
    assert str(ParityReport("puma", 10, (row,))).splitlines()[1].endswith("0.0e+00  0      all tensors  ok")
