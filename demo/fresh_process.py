"""Open a PUMA directory as a machine without puma_hf would, with both loaders, compare them, and search.

python demo/fresh_process.py DIRECTORY
"""

from __future__ import annotations

import sys

# An import of puma_hf now fails as it does where the package is not installed.
sys.modules["puma_hf"] = None  # type: ignore[assignment]

import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

EMOJI = Path(__file__).resolve().parent / "emoji"


def main() -> None:
    logging.disable_progress_bar()
    directory = sys.argv[1]
    pool = [json.loads(line) for line in (EMOJI / "cand_pool/global/mbeir_union_test_cand_pool.jsonl").open()]
    drawings = [entry["img_path"] for entry in pool if entry["modality"] == "image"]
    candidates = [{"image": str(EMOJI / path)} for path in drawings]
    queries = [
        "red heart",
        {"image": str(EMOJI / drawings[0])},
        {"image": str(EMOJI / drawings[0]), "text": "as a woman"},
    ]
    instruction = "Find a drawing of the emoji with this name."

    model = SentenceTransformer(directory, trust_remote_code=True)
    encoded = model.encode(queries, prompt=instruction, convert_to_tensor=True)

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.inference_mode():
        embeddings = backbone(**processor.process_inputs(queries, prompt=instruction)).embeddings
    difference = (embeddings - encoded.cpu()).abs().max().item()
    print(f"AutoModel and SentenceTransformer agree on text, image and both: largest difference {difference:.1e}")
    if difference > 1e-5:
        sys.exit("error: the two loaders disagree by more than 1e-5")

    scores = model.similarity(encoded[:1], model.encode(candidates, batch_size=64, convert_to_tensor=True))[0]
    print(f'"{queries[0]}" among {len(candidates)} drawings:')
    for score, index in zip(*scores.topk(3), strict=True):
        print(f"  {score:.3f}  {drawings[index]}")


if __name__ == "__main__":
    main()
