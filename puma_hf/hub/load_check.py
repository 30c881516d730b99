"""What both loaders make of a directory, and whether they do so where puma_hf is not installed.

`check_loads` runs this very file as a script, `python -P load_check.py DIRECTORY FOUND.json`, in a process of its own:
nothing of puma_hf may be imported here. `puma_hf.hub.check` takes its inputs and its comparison from here, too.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoProcessor

Measure = Literal["difference", "1 - cosine", "relative difference"]

FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
# Largest 1 - cosine in 16 bits, where a number of an embedding is little larger than its rounding.
COSINE_TOLERANCE = 1e-2
# One loader packs inputs and the other pads them, which changes a number by less than this in float32.
_TOLERANCE = 1e-4
# None of the inputs is cut: a model of texts alone may have a limit below the tokens of two pictures.
_MAX_LENGTH = 1024
_WORDS = ["a red apple", "on the", "table", "of", "two", "who painted", "7", "windows?"]
_WORDS += ["é", "苹果", "1998,", "(north)"]
_FIND, _ANSWER = "Find an image that matches the sentence.", "Retrieve a passage that answers the question."
_SCRIPT = Path(__file__)


def check_loads(directory: Path, *, shown_as: str | Path, offline: bool = True, token: str | None = None) -> str:
    """Load a directory by AutoModel and SentenceTransformer in a fresh process, and compare what they embed.

    The process cannot import puma_hf, runs only the code that lies in the directory, and caches it in a new place.
    `shown_as` is what errors call the directory, which may be a copy. Unless it is `offline`, the process may ask the
    Hub, with the token. Returns a line about what was found; ValueError if the directory does not load, or if the two
    differ, with the reason.
    """
    with TemporaryDirectory(prefix="puma-hf-load-") as temporary:
        work, source = Path(temporary), str(directory.resolve())
        # A new cache of modules: an older copy of the directory's code would hide what is missing in it now.
        environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
            environment.pop("HF_TOKEN", None)  # the code in the directory has no use for it
        elif token is not None:
            environment["HF_TOKEN"] = token
        # -P and an empty current directory: nothing lies there that an import could find instead.
        command = [sys.executable, "-P", str(_SCRIPT), source, str(work / "found.json")]
        process = subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)
        found = {"error": f"the process ended with {process.returncode}"}
        if process.returncode == 0:
            found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    if problem := found.get("error"):
        problem = f"{source!r} does not load where puma_hf is not installed ({problem})."
        remedy = "Write the directory again with puma-hf prune or merge."
        raise ValueError(f"{problem.replace(source, str(shown_as))} {remedy}")
    return f"loads without puma_hf by AutoModel and SentenceTransformer: {found['told']}"


# --- inputs, embeddings, differences


def check_inputs(seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to 40 words, pictures, both, and two pictures at once, some with an instruction.

    The same seed gives the same inputs on every machine, as `PumaProcessor.process_inputs` takes them.

    Example:

    ```python
    >>> from puma_hf.hub.load_check import check_inputs

    >>> [sorted(one) for one in check_inputs()[:2]]
    [['text'], ['text']]
    ```
    """
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(rng.choices(_WORDS, k=count))

    def picture() -> Image.Image:
        """Noise, which no two ways to resize and to normalise treat alike unless they are the same."""
        width, height = rng.randint(56, 168), rng.randint(56, 168)
        return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))

    return [
        {"text": words(1)},
        {"text": words(40)},
        {"text": words(12), "instruction": _FIND},
        {"image": [picture()]},
        {"image": [picture()], "instruction": _FIND},
        {"image": [picture()], "text": words(6)},
        {"image": [picture()], "text": words(15), "instruction": _ANSWER},
        {"image": [picture(), picture()], "text": words(7)},
    ]


def features_of(folder: str | Path, inputs: Sequence[Any], *, padding_side: str = "left") -> dict[str, Tensor]:
    """One batch by a PUMA directory's own processor."""
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = padding_side
    batch = processor.process_inputs(list(inputs), max_length=_MAX_LENGTH)
    return {name: batch[name] for name in FEATURES if name in batch}


@torch.inference_mode()
def embed_features(model: Any, features: Mapping[str, Tensor]) -> Tensor:
    """Embeddings `(batch_size, embedding_dim)` of a PUMA model, or of an adapter on one."""
    embeddings = model(**{name: tensor.to(model.device) for name, tensor in features.items()}).embeddings
    return torch.as_tensor(embeddings.float().cpu())


def encode(model: SentenceTransformer, inputs: Sequence[Any]) -> Tensor:
    """Embeddings of a SentenceTransformer, `(num_inputs, embedding_dim)`."""
    how: Any = {"convert_to_tensor": True, "show_progress_bar": False}
    how["truncate_dim"] = cast(Any, model[0]).model.config.text_config.hidden_size  # all, whatever is usual
    found = model.encode(list(inputs), processing_kwargs={"text": {"max_length": _MAX_LENGTH}}, **how)
    return torch.as_tensor(found.float().cpu())


def differences(found: Tensor, expected: Tensor, measure: Measure = "difference") -> Tensor:
    """How far the embeddings of each input are apart, `(num_inputs,)`; without end if their lengths differ."""
    if found.shape != expected.shape:
        return torch.full((len(expected),), math.inf)
    if measure == "difference":
        return (found - expected).abs().amax(dim=1)
    return (1 - torch.cosine_similarity(found, expected)).clamp(min=0)  # rounding may make a cosine larger than 1


# --- the script


def _load_both(directory: str) -> str:
    """What both loaders agree on; ValueError if they do not."""
    inputs = check_inputs()
    model = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
    encoded = encode(model, inputs)
    model.to("meta")  # it holds itself in a cycle; its weights go before they are loaded again
    backbone: Any
    backbone, info = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    if unread := sorted(info["unexpected_keys"]):
        raise ValueError(f"it holds {len(unread)} tensors that no loader reads, first {unread[0]}")
    return compare_loaders(embed_features(backbone.eval(), features_of(directory, inputs)), encoded, backbone.dtype)


def compare_loaders(embeddings: Tensor, encoded: Tensor, dtype: torch.dtype) -> str:
    """A line about the embeddings that AutoModel and SentenceTransformer make of the same inputs in a data type."""
    measure: Measure = "difference" if dtype in (torch.float32, torch.float64) else "1 - cosine"
    largest = float(differences(embeddings, encoded, measure).max())
    bound = _TOLERANCE if measure == "difference" else COSINE_TOLERANCE
    if not largest <= bound:  # NaN, too
        raise ValueError(f"AutoModel and SentenceTransformer read it differently, {measure} {largest}, not {bound:g}")
    return f"{embeddings.shape[1]} dimensions in {dtype}, largest {measure} {largest:.1e}"


def _main(directory: str, output: str) -> None:
    # An import of puma_hf now fails as it does where the package is not installed.
    sys.modules["puma_hf"] = None  # type: ignore[assignment]
    try:
        found = {"told": _load_both(directory)}
    except Exception as error:  # the parent tells it in its own words
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
