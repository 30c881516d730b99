from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from puma_hf import MultimodalMACLoss, PumaTrainer, evaluate_mbeir
from puma_hf.data.records import MBEIRFormatError
from puma_hf.evaluation.evaluator import MBEIREvaluator
from tests.data import mbeir_builder as builder
from tests.evaluation.fake_encoder import FakeEncoder


@pytest.mark.parametrize("pool", ["local", "global", "both"])
@pytest.mark.parametrize("seed", [None, 3])
def test_figures_are_those_of_the_evaluation(
    root: Path, pool: Any, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puma_hf.evaluation.evaluator._PART", 4)
    evaluator = MBEIREvaluator(root, split="test", pool=pool, ks=(1, 2), instruction_seed=seed)
    encoder = FakeEncoder()
    metrics = evaluator(encoder)
    candidates = sum(len(inputs) for inputs, prompt, _ in encoder.calls if not prompt)
    assert candidates == builder.NUM_CANDIDATES * len(builder.MODALITIES)  # each once, whatever the pools
    table = evaluate_mbeir(FakeEncoder(), root, pool=pool, ks=(1, 2), instruction_seed=seed, show_progress_bar=False)
    expected = {f"{name}_{metric}": value for name in table.pools for metric, value in table.mean(name).items()}
    expected |= {f"{row.pool}_{row.task.name}_score": row.score for row in table.rows}
    assert metrics == expected
    assert evaluator.primary_metric == ("global_score" if pool == "global" else "local_score")
    first = "global" if pool == "global" else "local"
    assert {f"{first}_hit@2", f"{first}_wrong_modality@2", f"{first}_toys_task7_score"} < set(metrics)
    assert 0 < metrics[f"{first}_ndcg@10"] < 1
    assert evaluator(FakeEncoder()) == metrics  # nothing is left over from a call


def test_tasks_and_arguments_of_encode(root: Path) -> None:
    encoder, options = FakeEncoder(), {"truncate_dim": 2}
    metrics = MBEIREvaluator(root, split="test", tasks="toys_task7", batch_size=7, encode_kwargs=options)(encoder)
    assert [name for name in metrics if "task" in name] == ["local_toys_task7_score"]
    assert metrics["local_toys_task7_score"] == metrics["local_score"]
    assert {prompt for _, prompt, _ in encoder.calls} == {"", "7 wording 1."}
    assert all(kwargs == {"batch_size": 7, "show_progress_bar": False, **options} for *_, kwargs in encoder.calls)
    assert sum(len(inputs) for inputs, _, _ in encoder.calls) == builder.NUM_CANDIDATES + builder.NUM_QUERIES


def test_it_waits_for_no_other_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer calls it on the main process alone: what would wait for the others would wait for ever."""
    expected = MBEIREvaluator(root, split="test")
    metrics = expected(FakeEncoder())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it waits for the other processes")

    for name in ("all_gather", "all_gather_object", "barrier", "broadcast", "broadcast_object_list", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, fail)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    assert expected(FakeEncoder()) == metrics


def test_mistakes_are_found_before_the_training(root: Path) -> None:
    wrong: dict[str, Any] = {"ks": (0,), "encode_kwargs": {"precision": "int8"}}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            MBEIREvaluator(root, split="test", **{name: value})
    with pytest.raises(FileNotFoundError):
        MBEIREvaluator(root)  # there is no split named val
    builder.append_line(builder.qrels_path(root, 0, "test"), "11:1000 0 11:99999 1 0")
    with pytest.raises(MBEIRFormatError, match="11:99999"):
        MBEIREvaluator(root, split="test")


# --- in a training


def test_the_best_checkpoint_is_loaded(root: Path, puma_dir: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((root / "images").iterdir())):  # that the tiny model's processor takes
        Image.new("RGB", (16, 16), (number * 2 % 256, number * 37 % 256, 255 - number * 2)).save(path)
    model = SentenceTransformer(str(puma_dir), trust_remote_code=True, device="cpu")
    evaluator = MBEIREvaluator(root, split="test", tasks=["toys_task1", "toys_task7"], name="toys", ks=(1, 2))
    rows = {"anchor": [f"text of q1_{n % 4}" for n in range(8)], "positive": [f"text of c1_{n % 4}" for n in range(8)]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=3e-2,
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_toys_local_ndcg@10",
        **{"eval_strategy": "steps", "save_strategy": "steps", "report_to": "none", "disable_tqdm": True},
        **{"use_cpu": True, "dataloader_pin_memory": False, "seed": 0},
    )
    loss, data = MultimodalMACLoss(model), Dataset.from_dict(rows)
    trainer = PumaTrainer(model=model, args=arguments, train_dataset=data, evaluator=evaluator, loss=loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_toys_local_score" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    figures = [entry["eval_toys_local_ndcg@10"] for entry in logged]
    assert len(set(figures)) > 1
    assert trainer.state.best_metric == max(figures)
    assert evaluator(model)["toys_local_ndcg@10"] == max(figures)
    assert not model.training  # as sentence-transformers' evaluators leave it
