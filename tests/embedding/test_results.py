from __future__ import annotations

import pickle

import numpy as np

from puma_hf.embedding.results import BrokenInput, BrokenInputError, EmbedResult


def test_the_error_says_what_and_what_to_do_and_crosses_processes() -> None:
    done = EmbedResult(np.ones((1, 2)), np.array([0]))
    error = pickle.loads(pickle.dumps(BrokenInputError(BrokenInput(3, "inputs[3]: no image."), done)))
    assert isinstance(error, ValueError)
    assert error.index == 3
    assert error.broken == BrokenInput(3, "inputs[3]: no image.")
    assert error.done.indices.tolist() == [0]
    assert str(error) == (
        "inputs[3]: no image. Repair or remove this input, or pass on_error='skip' to leave out what is broken, "
        "'zero' to have zeros in its place."
    )


def test_broken_inputs_sort_by_index() -> None:
    assert sorted([BrokenInput(10, "a"), BrokenInput(9, "b")])[0].index == 9
