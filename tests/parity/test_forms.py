from __future__ import annotations

from pathlib import Path

import torch

from puma_hf.parity.forms import embed_features, features_of, open_auto_model, stock_features
from puma_hf.parity.inputs import check_inputs


def test_stock_features_are_the_processors(puma_dir: Path, exported: Path) -> None:
    inputs = check_inputs()
    expected, found = features_of(puma_dir, inputs), stock_features(exported, inputs)
    assert set(found) == set(expected)
    for name in set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(found[name], expected[name]), name
    # Padding may stand on either side.
    for mine, theirs in zip(_tokens(found), _tokens(expected), strict=True):
        assert mine == theirs


def test_texts_alone_bring_no_pictures(exported: Path) -> None:
    assert set(stock_features(exported, check_inputs()[:2])) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_padding_side(puma_dir: Path) -> None:
    inputs = check_inputs()[:2]
    left, right = (features_of(puma_dir, inputs, padding_side=side) for side in ("left", "right"))
    assert left["attention_mask"][0].tolist() == right["attention_mask"][0].tolist()[::-1]
    assert left["attention_mask"][0, 0] == 0


def test_embeddings_are_of_unit_length(puma_dir: Path) -> None:
    model = open_auto_model(puma_dir, torch.bfloat16, "cpu")
    embeddings = embed_features(model, features_of(puma_dir, check_inputs()[:2]))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def _tokens(features: dict[str, torch.Tensor]) -> list[list[int]]:
    pairs = zip(features["input_ids"], features["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
