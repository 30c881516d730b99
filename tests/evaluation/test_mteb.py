from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf.data.tasks import MBEIR_INSTRUCTIONS
from puma_hf.evaluation.metrics import retrieval_metrics
from puma_hf.evaluation.mteb import PumaEncoder, mbeir_scores, mteb_tasks, puma_model_meta

TEXT = "a picture"
INSTRUCTION = "Find the same picture."
NUM_IMAGES = 12
BLANK = Image.new("RGB", (24, 24), (127, 127, 127))


@pytest.fixture(scope="module")
def mteb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, with its cache in a temporary folder and the network out of reach."""

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"mteb asked the network for {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTEB_CACHE", str(tmp_path_factory.mktemp("mteb")))
        patch.setattr(socket.socket, "connect", no_network)
        import mteb

        yield mteb


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """So different, in size and in colour, that even random weights tell them apart."""
    generator = np.random.default_rng(0)
    sizes = [(16 + 16 * (number // 3), 16 + 16 * (number % 3), 3) for number in range(NUM_IMAGES)]
    return [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def make_task(mteb: Any, pictures: list[Image.Image]) -> Any:
    """A task of MIEB's kind from data in memory: candidate n is right for query n, and has the same picture."""
    metadata = mteb.TaskMetadata(
        name="LocalIT2ITRetrieval",
        description="The same picture again.",
        reference=None,
        dataset={"path": "local/pictures", "revision": "1"},
        type="Any2AnyRetrieval",
        category="it2it",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        modalities=["image", "text"],
        prompt={"query": INSTRUCTION},
    )

    def rows(letter: str) -> Dataset:
        ids = [f"{letter}{number}" for number in range(len(pictures))]
        features = Features({"id": Value("string"), "image": ImageFeature(), "text": Value("string")})
        return Dataset.from_dict({"id": ids, "image": pictures, "text": [TEXT] * len(pictures)}, features=features)

    class LocalTask(mteb.abstasks.retrieval.AbsTaskRetrieval):  # type: ignore[misc]
        def load_data(self, *args: Any, **kwargs: Any) -> None:
            split = {
                "queries": rows("q"),
                "corpus": rows("c"),
                "relevant_docs": {f"q{number}": {f"c{number}": 1} for number in range(len(pictures))},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    LocalTask.metadata = metadata
    return LocalTask()


@pytest.fixture(scope="module")
def runs(mteb: Any, puma_dir: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Scores of the pictures, and what the model was given."""
    cache = mteb.ResultCache(tmp_path_factory.mktemp("results"))
    before = set(puma_dir.rglob("*"))
    seen: list[tuple[list[Any], dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        encode = SentenceTransformer.encode

        def record(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((inputs, kwargs))
            return encode(self, inputs, *args, **kwargs)

        patch.setattr(SentenceTransformer, "encode", record)
        task, options = make_task(mteb, pictures), {"encode_kwargs": {"batch_size": 5}, "co2_tracker": False}
        result = mteb.evaluate(puma_model_meta(puma_dir), task, cache=cache, **options)
    assert set(puma_dir.rglob("*")) == before
    return SimpleNamespace(result=result, seen=seen, cache=cache)


def figures(result: Any) -> dict[str, float]:
    (task_result,) = result.task_results
    (scores,) = task_result.scores["test"]
    return dict(scores)


def test_scores_equal_ours(runs: Any, pictures: list[Image.Image], sentence_transformer: SentenceTransformer) -> None:
    inputs = [{"image": picture, "text": TEXT} for picture in pictures]
    queries = sentence_transformer.encode(inputs, prompt=INSTRUCTION, convert_to_tensor=True)
    candidates = sentence_transformer.encode(inputs, prompt="", convert_to_tensor=True)
    rankings = (queries @ candidates.T).argsort(dim=1, descending=True).tolist()
    ours = retrieval_metrics(rankings, [{row: 1} for row in range(NUM_IMAGES)])
    theirs = figures(runs.result)
    for k in (1, 5, 10):
        assert theirs[f"hit_rate_at_{k}"] == pytest.approx(ours[f"hit@{k}"], abs=1e-5)
    assert theirs["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-5)


def test_the_model_is_given_images_texts_and_instructions(runs: Any) -> None:
    assert {options["prompt"] for _, options in runs.seen} == {INSTRUCTION, ""}
    assert {len(inputs) for inputs, _ in runs.seen} == {5, 2}
    assert all(options["batch_size"] == 5 for _, options in runs.seen)
    items = [item for inputs, _ in runs.seen for item in inputs]
    assert all(isinstance(item["image"], Image.Image) and item["text"] == TEXT for item in items)


def test_results_are_filed_by_the_weights_and_do_not_name_the_directory(runs: Any, puma_dir: Path) -> None:
    files = [path for path in runs.cache.cache_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {puma_model_meta(puma_dir).revision}
    assert not [path for path in files if str(puma_dir.parent) in path.read_text(encoding="utf-8")]


def test_the_entry(mteb: Any) -> None:
    meta = puma_model_meta("org/puma", "abc", prompts={"CIRRIT2IRetrieval": "Find it."})
    assert (meta.name, meta.revision, meta.modalities) == ("org/puma", "abc", ["text", "image"])
    assert meta.use_instructions
    assert meta.experiment_name  # other instructions are another experiment, and filed apart
    assert puma_model_meta("org/puma", "abc").experiment_name is None


@pytest.mark.parametrize(
    ("prompt", "kind", "prompts", "expected"),
    [
        ({"query": "Q", "document": "D"}, "query", {"Other": "mine"}, "Q"),
        ({"query": "Q", "document": "D"}, "document", {"Task": "mine"}, ""),
        ("P", "query", {"Task": "mine"}, "mine"),
    ],
)
def test_own_prompts_win_and_missing_parts_are_left_out(
    mteb: Any, prompt: Any, kind: str, prompts: dict[str, str], expected: str
) -> None:
    calls: list[Any] = []

    def encode(inputs: list[Any], **options: Any) -> torch.Tensor:
        calls.append((inputs, options["prompt"]))
        return torch.ones(len(inputs), 2, dtype=torch.bfloat16)

    model: Any = SimpleNamespace(encode=encode)
    embeddings = PumaEncoder(model, prompts).encode(
        [{"id": ["1", "2"], "text": ["", "http://x/y.png"], "image": [BLANK, None]}],
        task_metadata=SimpleNamespace(name="Task", prompt=prompt),
        hf_split="test",
        hf_subset="default",
        prompt_type=mteb.types.PromptType(kind),
    )
    # A text is never a bare string, which might be opened as a file.
    assert calls == [([{"image": BLANK}, {"text": "http://x/y.png"}], expected)]
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (2, 2))


# --- M-BEIR's rows


def test_every_row_of_mbeir_is_a_task_of_mieb(mteb: Any) -> None:
    assert {f"mbeir_{task.name}" for task in mteb_tasks().values()} == set(MBEIR_INSTRUCTIONS)
    tasks = mteb.get_tasks(list(mteb_tasks()))
    assert len(tasks) == 16
    for task in tasks:
        ours = mteb_tasks()[task.metadata.name]
        assert task.metadata.category == ours.arrow.replace(" -> ", "2")
        assert ours.dataset in task.metadata.dataset["path"].lower()
        assert task.metadata.main_score == "ndcg_at_10"
    mieb = {task.metadata.name for task in mteb.get_benchmark("MIEB(eng)").tasks}
    assert set(mteb_tasks()) <= mieb


def test_what_papers_report_is_read_from_the_results(runs: Any) -> None:
    assert mbeir_scores(runs.result) == {}
    (measured,) = runs.result.task_results
    (scores,) = measured.scores["test"]
    names = ["CIRRIT2IRetrieval", "FashionIQIT2IRetrieval"]
    result = SimpleNamespace(task_results=[SimpleNamespace(task_name=name, scores=measured.scores) for name in names])
    expected = {"cirr_task7": scores["hit_rate_at_5"], "fashioniq_task7": scores["hit_rate_at_10"]}
    assert mbeir_scores(result) == expected
