from __future__ import annotations

import pytest
import torch

from puma_hf.evaluation.candidate_source import CandidateSource, TensorCandidates


@pytest.mark.parametrize(("block_size", "starts"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (5, [0]), (9, [0])])
def test_a_tensor_is_a_source(block_size: int, starts: list[int]) -> None:
    embeddings = torch.arange(15.0).view(5, 3)
    source = TensorCandidates(embeddings)
    assert isinstance(source, CandidateSource)
    assert (len(source), source.embedding_dim) == (5, 3)
    blocks = list(source.blocks(block_size))
    assert [start for start, _ in blocks] == starts
    assert torch.equal(torch.cat([block for _, block in blocks]), embeddings)
    assert torch.equal(source.rows(torch.tensor([4, 0, 4])), embeddings[[4, 0, 4]])
