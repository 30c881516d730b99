"""Runs in a process of its own where puma_hf cannot be imported: opens directories and embeds.

Usage: python -m tests.modeling.fresh_process JOB.json, with {"images": [...], "directories": {name: path},
"modules": path, "output": path}. The code that comes with the directories is cached in `modules`.
For each directory the vectors of AutoModel and, where it has a modules.json, of SentenceTransformer are
written to `output` as lists, together with those of the directory that SentenceTransformer saves. What
transformers saves of the first directory comes before all that, while no other code has been opened.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Blocker(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "puma_hf":
            raise ImportError(f"{name} must not be needed here")


def inputs_of_every_kind(paths: list[str]) -> list[Any]:
    return [
        "a red apple",
        {"image": paths[0]},
        {"image": paths[1], "text": "on a table"},
        {"image": paths[1:], "text": "both", "instruction": "Find them."},
        paths[2],
    ]


def embed_with_transformers(folder: str, inputs: list[Any]) -> list[list[float]]:
    import torch
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    batch = processor.process_inputs(inputs)
    with torch.inference_mode():
        vectors: list[list[float]] = model(**batch).embeddings.tolist()
    return vectors


def save_with_transformers(folder: str, parts: str, trained: str) -> None:
    from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(parts)
    processor.save_pretrained(parts)
    arguments = TrainingArguments(output_dir=trained, use_cpu=True, report_to="none")
    Trainer(model, arguments, processing_class=processor).save_model(trained)  # as in each of its checkpoints


def embed_with_pipeline(folder: str, inputs: list[Any]) -> list[list[list[list[float]]]]:
    """One after another, and in batches; each input has a list of one vector."""
    from transformers import pipeline

    extract = pipeline("feature-extraction", model=folder, trust_remote_code=True, device="cpu")
    same = [item for item in inputs if isinstance(item, str) and not Path(item).is_file()] * 2
    return [[extract(item) for item in inputs], extract([*same, "a"], batch_size=2)[:2]]


def watch(module: Any, batches: list[str]) -> None:
    """Keep what kinds of batches a module embeds: packed ones, if it takes the fast path."""
    embed_batch = module.embed_batch

    def watched(batch: Any) -> Any:
        batches.append(type(batch).__name__)
        return embed_batch(batch)

    module.embed_batch = watched


def main(job: dict[str, Any]) -> None:
    sys.meta_path.insert(0, Blocker())
    from sentence_transformers import SentenceTransformer
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = job["modules"]
    inputs = inputs_of_every_kind(job["images"])
    results: dict[str, Any] = {}
    saves = [f"{job['output']}-saved-{number}" for number in range(2 * job.get("saves", True))]
    if saves:
        save_with_transformers(next(iter(job["directories"].values())), *saves)
    results["saves"] = {}
    for name, folder in zip(("parts", "trained"), saves, strict=False):
        model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
        results["saves"][name] = {"vectors": model.encode(inputs).tolist(), "prompts": model.prompts}
    for name, folder in job["directories"].items():
        results[f"{name}: transformers"] = embed_with_transformers(folder, inputs)
        if not (Path(folder) / "modules.json").is_file():
            continue
        model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
        results[f"{name}: batches"] = batches = []
        watch(model[0], batches)
        results[f"{name}: sentence-transformers"] = model.encode(inputs).tolist()
        if not saves:
            continue
        results[f"{name}: one by one"] = [model.encode(item).tolist() for item in inputs]
        saved = f"{job['output']}-{name}"
        model.save_pretrained(saved)
        again = SentenceTransformer(saved, trust_remote_code=True, device="cpu")
        results[f"{name}: saved again"] = again.encode(inputs).tolist()
        results[f"{name}: saved again, transformers"] = embed_with_transformers(saved, inputs)
        results[f"{name}: pipeline"] = embed_with_pipeline(saved, inputs)
    results["puma_hf modules"] = [name for name in sys.modules if name.partition(".")[0] == "puma_hf"]
    results["cached modules"] = [path.name for path in Path(job["modules"]).rglob("*.py")]
    Path(job["output"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
