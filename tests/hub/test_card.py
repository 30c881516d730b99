from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.evaluation.layer_sweep import LayerCosts
from puma_hf.evaluation.mbeir_results import MBEIRResults, MBEIRTaskResult
from puma_hf.evaluation.sweep_report import si
from puma_hf.flops import count_flops
from puma_hf.hub.card import CardOptions, render_card, write_card
from puma_hf.hub.card_results import MeasuredModel
from puma_hf.hub.template import fill_template, with_training_note
from tests.evaluation.sweep_reports import make_model, make_report
from tests.hub.test_card_results import PRINT, write_results
from tests.tiny import build_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
COSTS = LayerCosts((1, 2), (1, 2), (10**7, 15 * 10**6), (10**9, 12 * 10**8), 64, 256)


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: PRINT)
    monkeypatch.setattr(MeasuredModel, "costs", lambda self: COSTS)
    return copy


def test_without_result_files_the_card_has_no_results(folder: Path) -> None:
    card = ModelCard(render_card(folder, options=CardOptions("org/puma")))
    assert "Nothing has been measured on this model yet." in card.text
    assert not {"model-index", "model_name"} & card.data.to_dict().keys()
    assert "M-BEIR: none of its 16 rows." in card.text
    assert "No training after the cut is on record." in card.text
    assert "# org/puma" in card.text
    assert "hit@" not in card.text


def test_other_directories_have_no_card(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a PUMA directory nor that of a LoRA adapter"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_number_written_by_hand_does_not_survive(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    card = card.replace("Nothing has been measured on this model yet.", "hit@5 is 99.9 %.")
    card = with_training_note(card, "A LoRA adapter of rank 64 was trained and merged into the weights.")
    card = with_training_note(card, "It was trained for 123 hours.")
    (folder / "README.md").write_text(card)
    assert write_card(folder) == (folder / "README.md").read_text()
    written = (folder / "README.md").read_text()
    assert not re.search(r"99\.9|123 hours|rank 64", written)
    assert written.count("A LoRA adapter was trained and merged into the weights; its recipe is not at hand.") == 1
    assert write_card(folder) == written  # again: the merge is not forgotten


def test_metadata_are_valid_and_hold_the_files_own_values(folder: Path) -> None:
    write_results(folder / "results.json", data="M-BEIR")
    options = CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "apache-2.0", ("TIGER-Lab/M-BEIR",))
    content = render_card(folder, options=options)
    card = ModelCard(content)
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["TIGER-Lab/M-BEIR"])
    result = card.data.eval_results[0]
    assert (result.metric_value, result.metric_type, result.dataset_split) == (0.625, "hit_at_5", "test")
    assert result.dataset_config == "mscoco_task0-local"
    assert data["model-index"][0]["name"] == "org/puma"


def test_the_table_names_its_file_and_what_is_missing(folder: Path) -> None:
    path = write_results(folder / "results.json", data="M-BEIR")
    card = render_card(folder, results=[path])
    assert "| text → image | mscoco | hit@5 | 50 | 62.5 (of 100) | 81.5 | 78.8 | 79.5 |" in card
    assert re.search(r"From `puma/results\.json`, SHA-256 [0-9a-f]{12}, written by `puma-hf evaluate`", card)
    assert "Of M-BEIR's 16 rows: visualnews_task0," in card
    assert "The global pools." in card
    assert "The local pools." not in card
    assert "none of its 16 rows" not in card


def test_operations_come_from_the_sweep(folder: Path) -> None:
    count = int(re.search(r"\| parameters \| ([\d,]+)", render_card(folder))[1].replace(",", ""))  # type: ignore[index]
    model = make_model("full", [0.1, 0.2, 0.3, 0.4], parameters=count)
    (folder / "sweep.json").write_text(json.dumps(make_report(model).to_dict()))
    card = render_card(folder)
    assert "| operations, text of 64 tokens | 2 GFLOP | 4 GFLOP |" in card
    assert "| operations, image of 256 visual tokens | 18 GFLOP | 26 GFLOP |" in card
    assert re.search(r"Counted by `puma-hf sweep` \(`puma/sweep\.json`, SHA-256 [0-9a-f]{12}\)\.", card)


def test_stages_are_told_from_their_recipes_without_paths(folder: Path) -> None:
    train = {"model": "/home/somebody/distilled", "data": "/home/somebody/M-BEIR", "split": "train", "loss": "mac"}
    train |= {"temperature": 0.05, "hard_temperature": 0.04, "lora_r": 64, "seed": 0, "matryoshka_dims": []}
    train |= {"schedule_end": 1.0}
    distill = {
        "model": "/x/pruned",
        "teacher": "/home/somebody/full",
        "metric": "mse",
        "max_steps": 150,
        "data": "/d/emoji",
    }
    for name, file, recipe in (("puma", "train", train), ("distilled", "distill", distill)):
        lora = folder.with_name(f"{name}-lora")
        lora.mkdir()
        (lora / f"{file}.yaml").write_text(yaml.safe_dump(recipe))
    card = render_card(folder)
    training = card.partition("## Training")[2].partition("## Use")[0]
    first, second = (line for line in training.splitlines() if line.startswith("- "))
    assert first.startswith("- Distilled without labels; teacher: `full`, metric `mse`, on `emoji`")
    assert "max_steps 150" in first
    assert "- Trained with the loss `mac`, on `M-BEIR`, split train: temperature 0.05, hard_temperature 0.04" in second
    assert "hard_temperature 0.04, schedule_end 1.0" in second
    assert "matryoshka_dims" not in second
    assert "somebody" not in card


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_parameters_and_bytes_are_those_that_pruning_counted(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "puma"
    report = prune(build_checkpoint(tmp_path / "original", family), folder, num_kept_layers=2)
    card = render_card(folder)
    assert f"| parameters | {report.parameters_after:,} | {report.parameters_before:,} |" in card
    assert str(tmp_path) not in card
    # What the dropped layers would cost is worked out, not measured; the model with all its layers measures it.
    prune(tmp_path / "original", tmp_path / "full", num_kept_layers=4)
    costs = MeasuredModel(tmp_path / "full", 4, 4, 0).costs()
    assert f"| operations, text of 64 tokens | {si(costs.flops_text[1])}FLOP | {si(costs.flops_text[3])}FLOP |" in card
    assert f"{si(costs.flops_image[1])}FLOP | {si(costs.flops_image[3])}FLOP |" in card


def make_adapter(folder: Path, base: str | Path) -> Path:
    """A directory of an adapter, which has only what a card looks at, in a place without other directories."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


def test_an_adapter_names_its_base(puma_dir: Path, tmp_path: Path) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", puma_dir)
    content = render_card(lora, options=CardOptions("org/lora", "org/puma"))
    card = ModelCard(content)
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"peft", "lora"} <= set(card.data.tags)
    assert "holds a LoRA adapter alone" in card.text
    assert "`org/puma`" in card.text
    assert str(puma_dir) not in content
    assert "Operations per text and image." in card.text


def test_an_adapter_whose_base_is_on_the_hub_says_so_itself(tmp_path: Path) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", "org/puma")
    card = ModelCard(render_card(lora, options=CardOptions("org/lora")))
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/puma", "adapter")
    assert "onto its base, which is fetched from\n`org/puma`." in card.text
    assert "Base: not stated here, of [org/puma]" in card.text


def test_a_base_that_was_moved_away_is_no_name_on_the_hub(tmp_path: Path) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", "../gone")
    content = render_card(lora, options=CardOptions("org/lora"))
    assert ModelCard(content).data.base_model is None
    assert "../gone" not in content


@pytest.mark.parametrize("content", ["[]", "{"])
def test_settings_of_an_adapter_that_are_damaged_are_named(tmp_path: Path, content: str) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", "org/puma")
    (lora / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json' (must hold names with values|cannot be read)"):
        render_card(lora)


def test_results_beside_an_adapter_whose_base_is_out_of_reach_stay_out_of_its_card(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", "org/puma")
    files = [write_results(lora.parent / name / "results.json") for name in ("one", "two")]
    card = render_card(lora, options=CardOptions("org/lora"))
    assert "hit@" not in card
    message = "lora' cannot be loaded (We couldn't connect to"
    assert [message in record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [True]
    with pytest.raises(ValueError, match=r"told to be its own\. Make it loadable first: an adapter needs its base"):
        render_card(lora, results=files)


def test_a_model_that_was_not_trained_has_no_seeds(folder: Path) -> None:
    write_results(folder / "results.json", data="M-BEIR")
    assert "seed" not in render_card(folder)
    (folder / "train.yaml").write_text(yaml.safe_dump({"model": "pruned", "loss": "mac", "seed": 3}))
    card = render_card(folder)
    assert "One model was trained, with seed 3." in card
    assert "- How much the figures would vary with another seed of the training." in card


def test_licences_are_those_that_were_given(folder: Path) -> None:
    options = CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "mit", ("org/data",), "apache-2.0", "cc-by-4.0")
    licences = render_card(folder, options=options).partition("## Licences")[2]
    for line in (
        "- This model: mit",
        "- Base: apache-2.0, of [Qwen/Qwen2-VL-2B-Instruct](https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct); it also",
        "- Data: cc-by-4.0 ([org/data](https://huggingface.co/datasets/org/data))",
    ):
        assert line in licences
    licences = render_card(folder).partition("## Licences")[2]
    assert "- This model: not stated by who published it" in licences
    assert "- Base: not stated here, of the model it was made from" in licences
    assert "- Data: not stated by who published it" in licences


def test_matryoshka_dimensions_come_from_the_recipe(folder: Path) -> None:
    assert "truncate_dim=16)" in render_card(folder)  # half of what there is
    lora = folder.with_name("puma-lora")
    lora.mkdir()
    recipe = {"model": "pruned", "loss": "mac", "matryoshka_dims": [16, 8]}
    (lora / "train.yaml").write_text(yaml.safe_dump(recipe))
    card = render_card(folder)
    assert "truncate_dim=8)" in card
    assert "The model was trained for it." in card


def test_the_code_of_the_card_runs(
    puma_dir: Path, tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(MeasuredModel, "costs", lambda self: COSTS)
    card = render_card(puma_dir, options=CardOptions("org/puma"))
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    images[0].save(tmp_path / "apple.jpg")
    images[1].save(tmp_path / "pear.jpg")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks:
        assert '"org/puma"' in block
        exec(block.replace('"org/puma"', repr(str(puma_dir))), space)
    assert space["embeddings"].shape == (2, 32)
    printed = capsys.readouterr().out
    assert re.search(r"tensor\(\[\[.*, .*, .*\]\]\)", printed)
    assert "(1, 16)" in printed


def test_an_instruction_is_quoted_whatever_it_holds(folder: Path) -> None:
    prompt = 'Instruct: find a "red" \\\nQuery: é '
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": prompt}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    card = render_card(folder)
    (line,) = (line for line in card.splitlines() if line.startswith("instruction = "))
    assert ast.literal_eval(line.removeprefix("instruction = ")) == prompt
    assert '- `query`: Instruct: find a "red" \\ Query: é\n' in card


# --- a number without a source cannot get in

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)*")


def spellings(values: Any) -> set[str]:
    """Each number of a result file, a recipe or a configuration, and of its texts, as a card may print it."""
    if isinstance(values, dict):
        return set().union(*map(spellings, [*values, *values.values()]))
    if isinstance(values, list | tuple):
        return set().union(*map(spellings, values))
    if isinstance(values, str):
        return set(NUMBER.findall(values))
    if isinstance(values, bool) or values is None:
        return set()
    found = {str(values), f"{100 * values:.1f}"}
    return found | {f"{values:,}"} if isinstance(values, int) else found


def numbers_without_source(card: str, sources: set[str]) -> list[str]:
    """The numbers of a card that are neither in the empty template nor in a source."""
    text = re.sub(r"SHA-256 [0-9a-f]{12}", "", card)
    allowed = sources | set(NUMBER.findall(fill_template(ModelCardData())))
    return [number for number in NUMBER.findall(text) if number not in allowed]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A directory as the demo leaves it: pruned, with recipes beside it and results of an evaluation of the model."""
    folder = tmp_path / "work" / "puma"
    prune(build_checkpoint(tmp_path / "original", "qwen2_vl"), folder, num_kept_layers=3)
    for name, stage in (("puma", "train"), ("distilled", "distill")):
        lora = folder.with_name(f"{name}-lora")
        lora.mkdir()
        recipe = yaml.safe_load((CONFIGS / f"demo_{stage}.yaml").read_text())
        recipe |= {"model": str(folder.with_name("distilled")), "data": "demo/emoji", "seed": 7}
        (lora / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    rows = [
        MBEIRTaskResult("emoji", task, pool, 601 + task, 290 + task, task % 2, score, {"hit@1": 0.1, "hit@5": score})
        for pool, scores in (("local", (0.6007, 0.7544)), ("global", (0.5448, 0.6826)))
        for task, score in zip((0, 1), scores, strict=True)
    ]
    prints = MeasuredModel(folder, 3, 4, 0).fingerprint(None)
    made = {"model_fingerprint": prints, "truncate_dim": None, "data": "emoji", "puma_hf": "0.1.0", "torch": "2.13.0"}
    MBEIRResults("test", rows, made_from=made).to_json(folder.with_name("puma-test") / "results.json")
    return folder


def counted(folder: Path) -> set[str]:
    """What is counted, another way than the card's own."""
    tensors = load_file(folder / "model.safetensors")
    full = tensors | {
        name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name
    }
    found = set()
    for weights in (tensors, full):
        parameters = sum(tensor.numel() for tensor in weights.values())
        found |= {f"{parameters:,}", f"{4 * parameters / 1e6:.1f}"}
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    side = 16 * 2 * 8
    # 64 tokens in all: those of the prompt around the words are taken off.
    words = 64 - int(model.preprocess(["a"])["attention_mask"].sum()) + 1
    for item in (" ".join(["a"] * words), {"image": Image.new("RGB", (side, side), "white")}):
        of_three = count_flops(model, item)
        layers = model[0].model.language_model.layers
        del layers[2:]
        one_layer = of_three - count_flops(model, item)
        found |= {si(of_three).split()[0], si(of_three + one_layer).split()[0]}
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    return found


def test_every_number_has_a_source(trained: Path) -> None:
    sources = {"64", "256", "16", "0"}  # the lengths that operations are counted at, half of 32, the first layer
    files = [trained.with_name("puma-test") / "results.json", trained / "config.json"]
    files += [trained / f"{name}.json" for name in ("config_sentence_transformers", "processor_config")]
    files += [trained / "tokenizer_config.json"]
    values = [json.loads(file.read_text()) for file in files]
    for name, stage in (("puma", "train"), ("distilled", "distill")):
        values.append(yaml.safe_load((trained.with_name(f"{name}-lora") / f"{stage}.yaml").read_text()))
    sources |= spellings(values) | counted(trained)
    content = render_card(trained, options=CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "apache-2.0"))
    sources |= {"2", "2.0", "0.1.0"}  # names: of the base, of the licence, of this version
    card = ModelCard(content)
    assert numbers_without_source(card.text, sources) == []
    # What the card must show is there, and a number that nobody measured would be found.
    for shown in ("60.1 (of 601)", "68.3 (of 602)", "hard_temperature", "lora_r", "with seed 7", "MFLOP"):
        assert shown in card.text
    for wrong in ("99.9 %", "1,234,567 pairs", "12 hours", "61.3 (of 601)"):
        assert numbers_without_source(f"{card.text}\n{wrong}", sources) != []
    rows = values[0]["rows"]
    assert sorted(one.metric_value for one in card.data.eval_results or []) == sorted(row["score"] for row in rows)


def test_the_model_index_survives_the_way_through_huggingface_hub(trained: Path, tmp_path: Path) -> None:
    write_card(trained, options=CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "apache-2.0", ("org/emoji",)))
    data = metadata_load(trained / "README.md")
    assert data is not None
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "org/puma"
    assert eval_results_to_model_index(name, results) == data["model-index"]
    card = ModelCard.load(trained / "README.md")
    card.save(tmp_path / "again.md")
    assert metadata_load(tmp_path / "again.md") == data
    assert ModelCard.load(tmp_path / "again.md").text == card.text
