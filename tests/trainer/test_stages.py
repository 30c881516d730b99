from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, TrainerState

from puma_hf import prune
from puma_hf.configs import DistillConfig, MergeConfig, TrainConfig
from puma_hf.data import load_mbeir
from puma_hf.data.sampler import DistinctPositivesBatchSampler
from puma_hf.export import export
from puma_hf.hub.card import find_results, make_card
from puma_hf.hub.push import push_to_hub
from puma_hf.losses import MultimodalMACLoss
from puma_hf.settings import load_config
from puma_hf.trainer import stages
from puma_hf.trainer.lora_puma import BASE_FILE, puma_model
from puma_hf.trainer.stages import distill, merge, train
from puma_hf.trainer.trainer_puma import PumaTrainer
from tests import released
from tests.data.mbeir_builder import build_mbeir, change_record, qid, query_path

QUICK: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "logging_steps": 1, "lora_r": 2}


def state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def logged(checkpoint: Path, name: str) -> list[float]:
    return [entry[name] for entry in state_of(checkpoint).log_history if name in entry]


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


MakeConfig = Callable[..., Any]


@pytest.fixture
def distill_config(puma_dir: Path, qwen_dir: Path, mbeir_root: Path, tmp_path: Path) -> MakeConfig:
    """Builds settings of the first stage for a few quick steps."""

    def make(**changes: Any) -> DistillConfig:
        paths = {"model": puma_dir, "output": tmp_path / "out", "data": mbeir_root, "teacher": qwen_dir}
        return DistillConfig(**{**QUICK, **paths, **changes})

    return make


@pytest.fixture
def train_config(puma_dir: Path, mbeir_root: Path, tmp_path: Path) -> MakeConfig:
    """Builds settings of the second stage for a few quick steps."""

    def make(**changes: Any) -> TrainConfig:
        return TrainConfig(**{**QUICK, "model": puma_dir, "output": tmp_path / "out", "data": mbeir_root, **changes})

    return make


def test_both_stages_one_after_the_other(distill_config: MakeConfig, train_config: MakeConfig, tmp_path: Path) -> None:
    config = distill_config(output=tmp_path / "first", metric="cosine", learning_rate=1e-2, save_steps=3)
    saved = distill(config)
    assert saved == tmp_path / "first"
    assert state_of(saved / "checkpoint-3").global_step == 3
    assert (saved / BASE_FILE).is_file()
    assert all(0 < loss < 2 for loss in logged(saved / "checkpoint-3", "loss"))  # a cosine distance
    assert sum("token_adapter" in name for name in adapter_tensors(saved)) == 1
    # What it was made with lies beside it, and makes it again.
    assert load_config(DistillConfig, saved / "distill.yaml") == config
    trained = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu").encode(["a red apple"])
    assert merge(MergeConfig(adapter=saved, output=tmp_path / "merged")) < 1e-5
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(merged.encode(["a red apple"]), trained, atol=1e-5, rtol=0)

    settings = {"temperature": 0.05, "hard_temperature": 0.02, "schedule": "linear", "schedule_end": 1.0}
    settings |= {"num_negatives": 1, "save_steps": 3}
    saved = train(train_config(model=tmp_path / "merged", output=tmp_path / "second", lora_alpha=3, **settings))
    assert logged(saved / "checkpoint-3", "hard_temperature") == pytest.approx([0.05, 0.04, 0.03])
    assert not any("token_adapter" in name for name in adapter_tensors(saved))
    assert load_config(TrainConfig, saved / "train.yaml").hard_temperature == 0.02
    assert json.loads((saved / "adapter_config.json").read_text())["lora_alpha"] == 3
    assert merge(MergeConfig(adapter=saved, output=tmp_path / "final")) < 1e-5
    # A card tells of both stages, whatever the adapters were called and wherever they are by then.
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    assert [path.parent.name + "/" + path.name for path in find_results(tmp_path / "final")] == [
        "final/distill.yaml",
        "final/train.yaml",
    ]


@pytest.mark.parametrize("stage", [distill, train])
def test_a_published_recipe_can_be_tried_on_any_machine(
    stage: Any, puma_dir: Path, qwen_dir: Path, mbeir_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bfloat16 is that of the GPU, and where there is none, of the CPU."""
    name = "stage1_ours" if stage is distill else "stage2"
    recipe = Path(__file__).parents[2] / "configs" / f"qwen2_vl_2b_{name}.yaml"
    paths = {"model": puma_dir, "output": tmp_path / "out", "data": mbeir_root}
    paths |= {"teacher": qwen_dir} if stage is distill else {"split": "train"}
    few = {"batch_size": 4, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0}
    config: Any = load_config(DistillConfig if stage is distill else TrainConfig, recipe, **paths, **few)
    assert config.bf16
    dtypes: set[torch.dtype] = set()
    compute_loss = PumaTrainer.compute_loss

    def watch(self: PumaTrainer, *args: Any, **kwargs: Any) -> Any:
        layer = puma_model(self.model).language_model.layers[0].mlp.down_proj
        with layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype)):
            return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PumaTrainer, "compute_loss", watch)
    stage(config)
    assert dtypes == {torch.bfloat16}
    losses = logged(tmp_path / "out" / "checkpoint-2", "loss")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert all(tensor.isfinite().all() for tensor in adapter_tensors(tmp_path / "out").values())


def visual_tokens(folder: Path) -> list[int]:
    """Of a photo of 2,000 x 1,500, by AutoProcessor and by SentenceTransformer, as their directory says."""
    photo = [{"image": Image.new("RGB", (2000, 1500), "red")}]
    by_auto = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    by_st: Any = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert by_auto.tokenizer.model_max_length == by_st.max_seq_length == 200
    batches = (by_auto.process_inputs(photo), by_st[0].preprocess(photo))
    return [int(batch["image_grid_thw"].prod()) // 4 for batch in batches]


def test_what_it_was_trained_with_travels_with_the_model(
    distill_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 visual tokens of 16 x 16 pixels, of which such a photo gets 9 x 6; the source has 256.
    adapter = distill(distill_config(max_pixels=64 * 16 * 16, max_length=200, save_steps=3))
    merge(MergeConfig(adapter=adapter, output=tmp_path / "merged"))
    prune(tmp_path / "merged", tmp_path / "further", num_kept_layers=1)
    again = distill(distill_config(model=tmp_path / "merged", output=tmp_path / "second", max_steps=1))
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    merged.save_pretrained(str(tmp_path / "saved"))

    def keep(directory: Path, **options: Any) -> str:
        shutil.copytree(directory, tmp_path / "pushed")
        return "loads"

    monkeypatch.setattr("puma_hf.hub.push.check_loads", keep)
    card = push_to_hub(tmp_path / "merged", "org/puma", dry_run=True).card
    assert "at most 16,384 pixels, 64 visual tokens; texts are cut at 200 tokens" in card
    copies = [tmp_path / name for name in ("merged", "further", "saved", "pushed")]
    for folder in (adapter, adapter / "checkpoint-3", again, *copies):
        assert visual_tokens(folder) == [54, 54], folder
    export(tmp_path / "merged", tmp_path / "stock")
    stock = AutoImageProcessor.from_pretrained(tmp_path / "stock")
    assert int(stock(Image.new("RGB", (2000, 1500)))["image_grid_thw"].prod()) // 4 == 54
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").model_max_length == 200


def test_runs_repeat_with_their_seed(train_config: MakeConfig, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.seed()  # what happened before does not count
        return adapter_tensors(train(train_config(output=tmp_path / name, seed=seed)))

    first, again, other = run("first", 0), run("again", 0), run("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each batch that a run takes."""
    found: list[list[int]] = []
    iterate = DistinctPositivesBatchSampler.__iter__

    def record(self: DistinctPositivesBatchSampler) -> Iterator[list[int]]:
        for batch in iterate(self):
            found.append(batch)
            yield batch

    monkeypatch.setattr(DistinctPositivesBatchSampler, "__iter__", record)
    return found


def test_rows_of_a_batch_share_no_answer(train_config: MakeConfig, mbeir_root: Path, batches: list[list[int]]) -> None:
    train(train_config(max_steps=-1, batch_size=8))
    assert len(batches) == 4  # 8 tasks of 4 queries
    positives = load_mbeir(mbeir_root, with_ids=True)["positives"]
    rows = [frozenset(positives[row]) for batch in batches for row in batch]
    assert len(frozenset.union(*rows)) < sum(map(len, rows))  # some rows do share one
    for batch in batches:
        answers = [answer for row in batch for answer in set(positives[row])]
        assert len(answers) == len(set(answers))


def test_a_share_of_the_labelled_rows(
    train_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    run = stages._run

    def record(trainer: PumaTrainer, *args: Any) -> Path:
        rows: Any = trainer.train_dataset
        assert len(trainer.positives or ()) == len(rows)
        seen.append([str(row) for row in rows["anchor"]])
        return run(trainer, *args)

    monkeypatch.setattr(stages, "_run", record)
    for number, (fraction, seed) in enumerate([(1.0, 0), (0.25, 0), (0.25, 0), (0.25, 1)]):
        train(train_config(output=tmp_path / str(number), train_fraction=fraction, seed=seed, max_steps=1))
    whole, quarter, again, other = seen
    assert (len(whole), len(quarter)) == (32, 8)
    assert set(quarter) <= set(whole)
    assert quarter == again
    assert quarter != other


def test_resume_continues_the_count(
    train_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output": tmp_path / "whole", "save_steps": 2, "max_steps": 4}
    whole = train(train_config(**settings))
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    # As after a crash: the last checkpoint is not whole, and what was saved at the end is not there.
    expected = adapter_tensors(whole)
    (whole / "checkpoint-4" / "adapter_model.safetensors").unlink()
    (whole / "adapter_model.safetensors").unlink()
    caplog.set_level(logging.INFO, logger="puma_hf")
    steps: list[int] = []
    forward = MultimodalMACLoss.forward

    def count(self: MultimodalMACLoss, columns: Any, labels: Any = None) -> torch.Tensor:
        steps.append(1)
        return forward(self, columns, labels)

    monkeypatch.setattr(MultimodalMACLoss, "forward", count)
    train(train_config(**settings, resume=True))
    assert len(steps) == 2  # the two that were missing
    assert state_of(whole / "checkpoint-4").global_step == 4
    assert len(logged(whole / "checkpoint-4", "loss")) == 4
    assert "starting from the beginning" not in caplog.text
    assert "other settings" not in caplog.text
    for name, tensor in adapter_tensors(whole).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.25}])
def test_resume_of_a_finished_run_adds_no_step(train_config: MakeConfig, steps: dict[str, Any]) -> None:
    saved = train(train_config(save_steps=2, **steps))
    expected = adapter_tensors(saved)
    (saved / "adapter_model.safetensors").unlink()  # killed in the last save
    recipe = saved / "train.yaml"
    recipe.write_text("\n".join(reversed(recipe.read_text().splitlines())) + "\n")  # the order is no setting
    train(train_config(save_steps=2, resume=True, **steps))
    found = adapter_tensors(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(found) == len(expected)


def test_resume_with_other_settings_says_so(train_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    train(train_config(save_steps=2, max_steps=2))
    train(train_config(save_steps=2, max_steps=3, resume=True))
    assert "Continuing with other settings than the run began with: max_steps: 2; max_steps: 3" in caplog.text


def test_resume_where_nothing_was_saved(
    train_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Killed in the first save: neither the recipe nor half a checkpoint is anything to lose.
    begun = tmp_path / "begun"
    (begun / "checkpoint-2").mkdir(parents=True)
    (begun / "train.yaml").write_text("seed: 0\n")
    train(train_config(output=begun, save_steps=0, resume=True))
    assert "starting from the beginning" in caplog.text
    assert not (begun / "checkpoint-2").exists()
    (tmp_path / "mine" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").touch()
    for folder in (begun, tmp_path / "mine"):  # its adapter, or files of somebody else, would be lost
        with pytest.raises(FileExistsError, match=r"' is not empty\. Take overwrite .*whole checkpoint in it"):
            train(train_config(output=folder, resume=True))
    assert (tmp_path / "mine" / "checkpoint-2").is_dir()


def test_overwrite_forgets_an_earlier_run(train_config: MakeConfig, tmp_path: Path) -> None:
    stale = tmp_path / "out" / "checkpoint-500"
    stale.mkdir(parents=True)
    (stale / "trainer_state.json").write_text(json.dumps({"global_step": 500}))
    (tmp_path / "out" / "checkpoint-notes").mkdir()
    with pytest.raises(FileExistsError, match=r"'.*out' is not empty\. Take overwrite .*--overwrite.*--resume"):
        train(train_config())
    for batch_size, message in ((33, "fill no batch of 33"), (1, "Nothing is a negative in 32 row")):
        with pytest.raises(ValueError, match=message):
            train(train_config(batch_size=batch_size, overwrite=True))
    assert stale.is_dir()  # nothing is removed for a run that cannot be
    output = train(train_config(save_steps=3, overwrite=True))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-notes"]


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_is_the_model(train_config: MakeConfig, puma_dir: Path, resume: bool) -> None:
    for folder in (puma_dir, puma_dir.parent):
        with pytest.raises(ValueError, match=r"is, or holds, the model itself"):
            train(train_config(output=folder, overwrite=True, resume=resume))


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_dataset_smaller_than_a_batch(train_config: MakeConfig, tmp_path: Path, max_steps: int) -> None:
    with pytest.raises(ValueError, match=r"The 32 rows fill no batch of 33 .*so nothing was trained.*--batch-size"):
        train(train_config(batch_size=33, max_steps=max_steps))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_only_puma_directories_are_trained(train_config: MakeConfig, qwen_dir: Path, tmp_path: Path) -> None:
    adapter = train(train_config(output=tmp_path / "adapter", max_steps=1))
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it first \(puma-hf merge\)"):
        train(train_config(model=adapter))
    for name in (qwen_dir, tmp_path / "absent", "org/name"):
        with pytest.raises(FileNotFoundError, match=r"is neither a PUMA directory nor an adapter's"):
            train(train_config(model=name))


def test_a_cached_teacher(distill_config: MakeConfig) -> None:
    saved = distill(distill_config(teacher_mode="cached", save_steps=3))
    assert all(loss > 0 for loss in logged(saved / "checkpoint-3", "loss"))
    assert (saved / "teacher_cache").is_dir()


@pytest.fixture
def nli(tmp_path: Path) -> Path:
    """Pairs as the released first stage reads them."""
    table = tmp_path / "nli.csv"
    table.write_text("sent0,sent1,hard_neg\n" + "".join(f"a{n},b{n},c{n}\n" for n in range(8)))
    return table


def test_the_released_first_stage(
    train_config: MakeConfig, nli: Path, qwen_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From pairs to a merged model whose card tells of it; one copy serves student and teacher."""
    optimiser = {"first_layer_learning_rate": 1e-3, "adam_beta2": 0.98, "adam_epsilon": 1e-7}
    recipe = {**released.STAGE_1_GROWING, **optimiser, "data": nli, "teacher": qwen_dir}
    saved = train(train_config(**recipe, save_steps=3, learning_rate=2e-3))
    assert "is held whole" not in caplog.text
    assert "not used" not in caplog.text
    assert (
        len(logged(saved / "checkpoint-3", "contrastive")) == len(logged(saved / "checkpoint-3", "distillation")) == 3
    )
    assert load_config(TrainConfig, saved / "train.yaml").contrastive_weight_start == 0.5
    merge(MergeConfig(adapter=saved, output=tmp_path / "merged"))
    card = make_card(tmp_path / "merged")[0]
    assert "Trained with the loss `infonce`: data nli.csv, split train" in card
    weights = "distillation_weight 0.01, distillation_weight_start 0.05, contrastive_weight 0.9"
    assert f"teacher tiny-qwen2-vl, metric mse-mean, {weights}, contrastive_weight_start 0.5" in card
    assert "temperature 0.05, num_negatives" in card
    assert "hard_temperature" not in card


@pytest.mark.parametrize("stage", ["distill", "train"])
def test_fsdp_runs_plain_losses_only(
    distill_config: MakeConfig, train_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delattr(stages, "SentenceTransformer")  # nothing is loaded for a run that cannot be
    with pytest.raises(ValueError, match=r"^A teacher, and gradient caching, call parts .* Launch DDP"):
        distill(distill_config()) if stage == "distill" else train(train_config(mini_batch_size=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_negatives": 2}, r"num_negatives=2, but .*nli\.csv has 1 a pair"),
        ({"split": "val"}, r"split='val' is a part of M-BEIR, which .*nli\.csv is not"),
        ({"data": None, "direction": "both"}, r"^direction is for pairs of one's own, not for M-BEIR's .*mbeir"),
    ],
)
def test_what_the_rows_do_not_have(
    train_config: MakeConfig, nli: Path, mbeir_root: Path, values: dict[str, Any], message: str
) -> None:
    data = {"data": mbeir_root if "data" in values else nli}
    with pytest.raises(ValueError, match=message):
        train(train_config(**values | data))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five photos with three captions each, and a line whose image is missing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["file_name,caption", "none.png,nothing"]
    for number in range(5):
        Image.new("RGB", (28, 28), (50 * number, 0, 0)).save(folder / f"{number}.png")
        lines += [f"{number}.png,red {number} {word}" for word in ("plain", "square", "small")]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def test_training_on_photos_with_captions(
    train_config: MakeConfig, photos: Path, batches: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"data": photos, "direction": "both", "max_steps": -1}
    with pytest.raises(ValueError, match=r"captions\.csv: 1 of 16 rows cannot be used: image missing"):
        train(train_config(**settings))
    wordings = {"instruction": "Find the photo.", "reverse_instruction": "Find a caption."}
    saved = train(train_config(**settings, **wordings, bad_pairs="drop"))
    assert load_config(TrainConfig, saved / "train.yaml").reverse_instruction == "Find a caption."
    assert "left out 1 of 16 rows" in caplog.text
    assert len(batches) == 6  # 30 rows by 4, but for those that share an answer at the end
    for batch in batches:
        # No photo is the answer twice, nor asked about twice: then its captions would each be right.
        for way in (0, 1):
            asked = [row // 6 for row in batch if row % 2 == way]
            assert len(asked) == len(set(asked))


def test_special_tokens_are_refused_before_training(
    train_config: MakeConfig, distill_config: MakeConfig, tmp_path: Path
) -> None:
    root = build_mbeir(tmp_path / "mbeir")
    change_record(query_path(root, 1, "train"), 2, query_txt="a <|im_end|> b")
    message = r".*mbeir holds a special token, .*row \d+{}: {} is 'a <.im_end.> b'.*--special-tokens split"
    with pytest.raises(ValueError, match=message.format(rf", query '{qid(1, 1)}'", "anchor.text")):
        train(train_config(data=root))
    with pytest.raises(ValueError, match=message.format("", "item.text")):
        distill(distill_config(data=root))
    assert not (tmp_path / "out").exists()
    saved = train(train_config(data=root, special_tokens="split", max_steps=1))
    settings = json.loads((saved / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert settings["processing_kwargs"]["text"] == {"split_special_tokens": True}


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_need_bitsandbytes(train_config: MakeConfig, tmp_path: Path) -> None:
    stale = tmp_path / "out" / "checkpoint-1"
    stale.mkdir(parents=True)
    with pytest.raises(ImportError, match=r"requires bitsandbytes"):
        train(train_config(load_in_4bit=True, overwrite=True))
    assert stale.is_dir()  # nothing is removed for a run that cannot be


def full(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_full_disk_at_the_end_leaves_no_half_adapter(
    distill_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    config = distill_config(save_steps=save_steps, max_steps=2)
    write = transformers.modeling_utils.safe_save_file

    def full_at_the_end(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        full() if stages._UNFINISHED in str(path) else write(tensors, path, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_at_the_end)
    with pytest.raises(SafetensorError, match="No space left"):
        distill(config)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"distill.yaml", *(["checkpoint-2"] if save_steps else [])}
    monkeypatch.undo()
    saved = distill(distill_config(save_steps=save_steps, max_steps=2, resume=True))
    assert {"adapter_config.json", "adapter_model.safetensors", "modules.json", BASE_FILE} <= {
        path.name for path in saved.iterdir()
    }
    assert not (saved / stages._UNFINISHED).exists()
