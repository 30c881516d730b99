from __future__ import annotations

import pytest

from puma_hf.data.instructions import MBEIR_INSTRUCTIONS
from puma_hf.evaluation.published import PUBLISHED, PUBLISHED_MEANS, PUBLISHED_MODELS, PUBLISHED_NOTE, published_mean


def test_the_sixteen_rows_are_all_there() -> None:
    assert len(PUBLISHED) == 16
    assert {f"mbeir_{name}" for name in PUBLISHED} == set(MBEIR_INSTRUCTIONS)
    assert {len(figures) for figures in PUBLISHED.values()} == {len(PUBLISHED_MODELS)}


def test_printed_means_are_those_of_the_rows() -> None:
    """Each row is rounded to 0.05, and so is the mean."""
    columns = zip(*PUBLISHED.values(), strict=True)
    for figures, printed in zip(columns, published_mean("local"), strict=True):
        assert sum(figures) / len(figures) == pytest.approx(printed, abs=0.1)


def test_global_means_stand_where_they_are_known() -> None:
    assert published_mean("global") == (54.9, None, None)
    assert PUBLISHED_MEANS["U-MARVEL 7B (Qwen2-VL)"] == (63.2, 60.7)
    assert "LamRA 7B with re-ranker 63.7 / 61.4, " in PUBLISHED_NOTE
    assert "ELVA-7B 58.7 / ?, " in PUBLISHED_NOTE


def test_the_note_names_every_model_and_the_papers() -> None:
    assert all(model in PUBLISHED_NOTE for model in PUBLISHED_MODELS)
    assert all(paper in PUBLISHED_NOTE for paper in ("2507.08064", "2412.01720", "not measured here"))
