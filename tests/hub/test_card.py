from __future__ import annotations

import ast
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from sentence_transformers import SentenceTransformer

from puma_hf import prune
from puma_hf.evaluation.results import PUBLISHED, MBEIRResults, MBEIRTaskResult
from puma_hf.fingerprint import model_fingerprint
from puma_hf.hub.card import CardOptions, count_facts, find_results, load_model, make_card, read_results, write_card
from puma_hf.pruning import cut_copy, fill_template, with_training_note
from tests.tiny import FAMILIES, build_checkpoint, read_weights

CONFIGS = Path(__file__).parents[2] / "configs"
PRINT = "f" * 64
FACTS = {"parameters_after": 10}


def write_results(path: Path, **made_from: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = MBEIRTaskResult("mscoco", 0, "local", 100, 50, 0, 0.625, {"hit@1": 0.5, "hit@5": 0.625})
    values = {"model_fingerprint": PRINT, "truncate_dim": None, **made_from}
    MBEIRResults("test", [row], made_from=values).to_json(path)
    return path


def write_recipe(folder: Path, name: str = "train.yaml", **recipe: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(recipe))


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    measure_nothing(monkeypatch)
    return copy


def measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the place of what takes seconds."""
    monkeypatch.setattr("puma_hf.hub.card.load_model", lambda folder, *_: SimpleNamespace())
    monkeypatch.setattr("puma_hf.hub.card.model_fingerprint", lambda model: PRINT)
    monkeypatch.setattr("puma_hf.hub.card.count_facts", lambda model: FACTS)


def render(folder: Path, results: list[Path] | None = None, **options: Any) -> str:
    return make_card(folder, results=results, options=CardOptions(**options))[0]


def test_without_result_files_the_card_has_no_results(folder: Path) -> None:
    card = ModelCard(render(folder, repo_id="org/puma"))
    assert not {"model-index", "model_name"} & card.data.to_dict().keys()
    assert "hit@" not in card.text


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
    write_results(folder / "results.json", data="M-BEIR", max_pixels=1024, candidates_model="large")
    options = {"base_model": "Qwen/Qwen2-VL-2B-Instruct", "license": "apache-2.0", "datasets": ("TIGER-Lab/M-BEIR",)}
    licences = {"base_license": "mit", "data_license": "cc-by-4.0"}
    card = ModelCard(render(folder, repo_id="org/puma", **options, **licences))
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert (data["library_name"], data["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["TIGER-Lab/M-BEIR"])
    result = card.data.eval_results[0]
    assert (result.metric_value, result.metric_type, result.dataset_split) == (0.625, "hit_at_5", "test")
    assert result.dataset_config == "mscoco_task0-local, at most 1,024 pixels, candidates of large"
    assert result.metric_name == "hit@5, puma/results.json"
    assert data["model-index"][0]["name"] == "org/puma"
    for told in ("- This model: apache-2.0\n", "- Base: mit, of [Qwen/Qwen2", "- Data: cc-by-4.0 ([TIGER-Lab/M-BEIR]"):
        assert told in card.text.partition("## Licences")[2]


def test_the_table_names_its_file_and_what_is_missing(folder: Path) -> None:
    card = render(folder, results=[write_results(folder / "results.json", data="M-BEIR")])
    assert "| t -> i | mscoco | local | 100 | 50 | 5 | 62.5 | 81.5 | 78.8 | 79.5 |" in card
    assert re.search(r"From `puma/results\.json`, SHA-256 [0-9a-f]{12}, written by `puma-hf evaluate`", card)


def test_a_corrected_figure_never_enters_a_card(folder: Path) -> None:
    path = write_results(folder / "results.json")
    plain = render(folder)
    results = MBEIRResults.from_dict(json.loads(path.read_text()))
    rows = [replace(results.rows[0], corrected={"score": 0.987, "hit@5": 0.987})]
    made_from = {**results.made_from, "popularity_penalty": 0.2}
    replace(results, rows=rows, made_from=made_from).to_json(path)
    assert re.sub("SHA-256 .{12}", "", render(folder)) == re.sub("SHA-256 .{12}", "", plain)


def test_stages_are_told_from_their_recipes_without_paths(folder: Path) -> None:
    train = {"model": "/home/somebody/distilled", "data": "/home/somebody/M-BEIR", "split": "train", "loss": "mac"}
    train |= {"temperature": 0.05, "hard_temperature": 0.04, "lora_r": 64, "seed": 0, "matryoshka_dims": [16, 8]}
    distill = {"model": "/x/pruned", "teacher": "/home/somebody/full", "metric": "mse", "max_steps": 150}
    write_recipe(folder, "train.yaml", **train)
    write_recipe(folder, "distill.yaml", data="/home/somebody/emoji", **distill)
    card = render(folder)
    training = card.partition("## Training")[2].partition("## Use")[0]
    first, second = (line for line in training.splitlines() if line.startswith("- "))
    assert first.startswith("- Distilled without labels: data emoji, teacher full, metric mse, max_steps 150")
    assert "- Trained with the loss `mac`: data M-BEIR, split train, temperature 0.05, hard_temperature 0.04" in second
    assert "matryoshka_dims [16, 8]" in second
    assert "metric" not in second  # without a teacher
    assert "somebody" not in card
    assert "truncate_dim=8)" in card
    write_recipe(folder, "train.yaml", **{**train, "loss": "infonce"})  # it has one temperature
    assert "hard_temperature" not in render(folder)


# --- adapters


def make_adapter(folder: Path, base: str | Path) -> Path:
    """A directory of an adapter, which has only what a card looks at, in a place without other directories."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize("is_local", [True, False])
def test_an_adapter_names_its_base(puma_dir: Path, tmp_path: Path, is_local: bool) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", puma_dir if is_local else "org/puma")
    content = render(lora, repo_id="org/lora", base_model="org/puma" if is_local else None)
    card = ModelCard(content)
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/puma", "adapter")
    assert {"peft", "lora"} <= set(card.data.tags)
    assert str(puma_dir) not in content


def test_results_beside_an_adapter_whose_base_is_out_of_reach_stay_out_of_its_card(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = make_adapter(tmp_path / "work" / "lora", "org/puma")
    files = [write_results(lora.parent / name / "results.json") for name in ("one", "two")]
    assert "hit@" not in render(lora, repo_id="org/lora")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["lora cannot be loaded (We couldn't connect to" in message for message in told] == [True]
    with pytest.raises(ValueError, match=r"no result of '.*lora' \(it is of another model, by its fingerprint\)"):
        render(lora, results=files)


# --- result files


def test_results_are_found_in_the_directory_and_beside_it_if_they_are_its_own(folder: Path) -> None:
    for place in (folder, folder.parent / "a-test"):
        write_results(place / "results.json")
    write_results(folder.parent / "other" / "results.json", model_fingerprint="0" * 64)
    (folder.parent / "damaged").mkdir()
    (folder.parent / "damaged" / "results.json").write_text("{")
    closed = write_results(folder.parent / "closed" / "results.json").parent
    closed.chmod(0)  # as in /tmp, where programs have folders that nobody else may look into
    try:
        found = read_results(folder, SimpleNamespace(), None)
    finally:
        closed.chmod(0o755)
    assert [name for name in found.files if not name.startswith("closed")] == [
        "puma/results.json",
        "a-test/results.json",
    ]
    assert found.evaluations[0][1].rows[0].score == 0.625
    write_recipe(folder, model="x")
    assert find_results(folder)[-1] == folder.resolve() / "train.yaml"


def test_results_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for made_from in ({"model_fingerprint": "0" * 64}, {"model_fingerprint": None}):
        with pytest.raises(ValueError, match=r"is no result of .*\(it is of another model, by its fingerprint\)"):
            render(folder, results=[write_results(tmp_path / "results.json", **made_from)])
    for path in (Path("nowhere/results.json"), folder / "config.json"):
        with pytest.raises(ValueError, match=rf"{path.name}' is no result of"):
            render(folder, results=[path])


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"model: [", b"model: \xff"])
def test_damaged_files_are_named_and_passed_by(folder: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("results.json", "train.yaml")[: 1 if content == b"{}" else 2]:
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' is no result of"):
            render(folder, results=[folder / name])
        with caplog.at_level(logging.INFO, logger="puma_hf"):
            found = read_results(folder, SimpleNamespace(), None)
        assert found.evaluations == found.recipes == []
        assert "not in the card: " in caplog.text


# --- what the card says


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_those_that_pruning_counted(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "puma"
    report = prune(build_checkpoint(tmp_path / "original", family), folder, num_kept_layers=2)
    card = render(folder)
    facts = count_facts(load_model(folder))
    if family == "qwen3_5":  # whose dropped layers are not as large as the kept ones
        assert f"| parameters | {report.parameters_after:,} |  |\n" in card
        assert facts["parameters_before"] is facts["bytes_before"] is None
        return
    assert f"| parameters | {report.parameters_after:,} | {report.parameters_before:,} |" in card
    assert (facts["bytes_after"], facts["bytes_before"]) == (report.bytes_after, report.bytes_before)
    # What the dropped layers would cost is worked out, not measured; the model with all its layers measures it.
    prune(tmp_path / "original", tmp_path / "full", num_kept_layers=4)
    full = count_facts(load_model(tmp_path / "full"))["operations"]
    assert [before for _, before in facts["operations"].values()] == [after for after, _ in full.values()]
    assert str(tmp_path) not in card


def test_the_code_of_the_card_runs(
    folder: Path, tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", render(folder, repo_id="org/puma"), re.DOTALL)
    assert len(blocks) == 3
    images[0].save(tmp_path / "apple.jpg")
    images[1].save(tmp_path / "pear.jpg")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks:
        assert '"org/puma"' in block
        exec(block.replace('"org/puma"', repr(str(folder))), space)
    assert space["embeddings"].shape == (2, 32)
    printed = capsys.readouterr().out
    assert re.search(r"tensor\(\[\[.*, .*, .*\]\]\)", printed)
    assert "(1, 16)" in printed


def test_an_instruction_is_quoted_whatever_it_holds(folder: Path) -> None:
    prompt = 'Instruct: find a "red" \\\nQuery: é '
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": prompt}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    card = render(folder)
    (line,) = (line for line in card.splitlines() if line.startswith("instruction = "))
    assert ast.literal_eval(line.removeprefix("instruction = ")) == prompt
    assert '- `query`: Instruct: find a "red" \\ Query: é\n' in card


# --- the depths of one checkpoint

HEAD = "| layers | parameters | bytes | operations, text of 64 tokens | operations, image of 256 visual tokens |"
# By hand: queries and output 32 x 32, keys and values 32 x 16, biases of the first three, the MLP, two norms.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + (32 + 16 + 16) + 3 * 32 * 64 + 2 * 32


def measure_at(folder: Path, depth: int, score: float, **made_from: Any) -> Path:
    """The results of a directory's first layers, as `evaluate --num-kept-layers` leaves them beside it."""
    made = {"model_fingerprint": model_fingerprint(load_model(folder, depth)), "data": "emoji"}
    made |= {"num_kept_layers": depth, **made_from}
    path = write_results(folder.with_name(f"at-{depth}") / "results.json", **made)
    results = MBEIRResults.from_dict(json.loads(path.read_text()))
    replace(results, rows=[replace(results.rows[0], score=score)]).to_json(path)
    return path


@pytest.fixture
def elastic(elastic_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(elastic_dir, tmp_path / "work" / "elastic"))


def test_each_trained_depth_has_a_row(elastic: Path) -> None:
    whole = sum(tensor.numel() for tensor in read_weights(elastic).values())
    for depth, score in ((1, 0.5), (4, 0.75)):
        measure_at(elastic, depth, score)
    measure_at(elastic, 3, 0.6)  # after which nobody has trained it
    measure_at(elastic, 2, 0.7, model_fingerprint="0" * 64)
    card = render(elastic, repo_id="org/puma")
    table = card.partition(HEAD)[2].partition("```")[0]
    assert table.startswith(" hit@k, emoji test, local |\n| ---: |")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    counts = [whole - 3 * LAYER, whole - 2 * LAYER, whole]
    assert [row[1:3] for row in rows] == [[f"{count:,}", f"{4 * count:,}"] for count in counts]
    for text_or_image in (3, 4):  # each layer takes the same
        first, second, fourth = (int(row[text_or_image].replace(",", "")) for row in rows)
        assert fourth - second == 2 * (second - first) > 0
    assert [row[5:] for row in rows] == [["50.0"], [], ["75.0"]]
    assert re.search(
        r"tasks in percent, from `at-1/results.json`, SHA-256 \w+, `at-4/results.json`, SHA-256 \w+\.", table
    )
    # The tables of all tasks, and the model index, are of the whole model alone.
    assert [one.metric_value for one in ModelCard(card).data.eval_results or []] == [0.75]
    assert card.count("| t -> i | mscoco |") == 1
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "shallow" in one)
    space: dict[str, Any] = {"SentenceTransformer": SentenceTransformer}
    exec(block.replace('"org/puma"', repr(str(elastic))), space)
    assert len(space["shallow"][0].model.language_model.layers) == 2
    assert "revision=" not in card


def test_what_was_measured_at_a_depth_alone_is_said_to_be(elastic: Path) -> None:
    paths = [measure_at(elastic, depth, 0.5) for depth in (1, 3)]
    told = "on this model yet with all of its layers; the table of its depths has what was."
    assert told in render(elastic, results=paths[:1])
    with pytest.raises(ValueError, match=r"it is of 3 layers, which are none of its trained depths"):
        render(elastic, results=paths)


def test_a_cut_copy_has_no_deeper_exits_and_no_results_of_them(elastic: Path, tmp_path: Path) -> None:
    scores = {1: 0.5, 2: 0.6, 4: 0.7}
    paths = {depth: measure_at(elastic, depth, score) for depth, score in scores.items()}
    results = json.loads(paths[4].read_text())
    del results["made_from"]["num_kept_layers"]  # then it is of the whole directory
    paths[4].write_text(json.dumps(results))
    for depth, shown, given in ((2, {1, 2}, None), (1, {1}, paths.values())):
        copy = tmp_path / f"k{depth}"
        cut_copy(elastic, copy, depth)
        card, cited = make_card(copy, results=given, beside=elastic)
        assert set(cited.values()) == {paths[one] for one in shown}
        assert (HEAD in card) is (depth == 2)
        assert "70.0" not in card
        assert [one.metric_value for one in ModelCard(card).data.eval_results or []] == [scores[depth]]


# --- a number without a source cannot get in

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)*")


def spellings(text: str) -> set[str]:
    """Each number of a file as a card may print it: as it is, with commas, in percent."""
    found = set(NUMBER.findall(text))
    percent = {f"{100 * float(number):.1f}" for number in found if re.fullmatch(r"0\.\d+", number)}
    return found | percent | {f"{int(number):,}" for number in found if number.isdecimal()}


def numbers_without_source(card: str, sources: set[str]) -> list[str]:
    """The numbers of a card that are neither in the empty template nor in a source."""
    text = re.sub(r"SHA-256 [0-9a-f]{12}|fingerprint [0-9a-f]{12}", "", card)
    allowed = sources | set(NUMBER.findall(fill_template(ModelCardData())))
    return [number for number in NUMBER.findall(text) if number not in allowed]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A directory as the demo leaves it: pruned, with recipes, and with results of an evaluation of the model."""
    folder = tmp_path / "work" / "puma"
    prune(build_checkpoint(tmp_path / "original", "qwen2_vl"), folder, num_kept_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trained_depths": [2, 3]}))
    for stage in ("train", "distill"):
        recipe = yaml.safe_load((CONFIGS / f"demo_{stage}.yaml").read_text())
        write_recipe(folder, f"{stage}.yaml", **{**recipe, "model": "x/distilled", "data": "demo/emoji", "seed": 7})
    rows = [
        MBEIRTaskResult("emoji", task, pool, 601 + task, 290 + task, task % 2, score, {"hit@1": 0.1, "hit@5": score})
        for pool, scores in (("local", (0.6007, 0.7544)), ("global", (0.5448, 0.6826)))
        for task, score in zip((0, 1), scores, strict=True)
    ]
    made = {"model_fingerprint": model_fingerprint(load_model(folder)), "data": "emoji", "puma_hf": "0.1.0"}
    MBEIRResults("test", rows, made_from=made).to_json(folder.with_name("puma-test") / "results.json")
    return folder


def test_every_number_has_a_source_and_the_model_index_survives(trained: Path, tmp_path: Path) -> None:
    sources = {"16", "0"}  # half of 32, the first layer
    sources |= {"64", "256"}  # the lengths that operations are counted at
    sources |= {"2", "2.0", "0.1.0", f"{len(PUBLISHED)}"}  # names: of the base, of the licence, of this version
    results = trained.with_name("puma-test") / "results.json"
    names = ("config", "config_sentence_transformers", "processor_config", "tokenizer_config")
    files = [results, *(trained / f"{name}.json" for name in names), *trained.glob("*.yaml")]
    facts = count_facts(load_model(trained))  # which are compared with other counts above
    sources |= spellings(" ".join([*(path.read_text() for path in files), str(facts)]))
    sources |= {f"{facts[name] / 1e6:.1f}" for name in ("bytes_after", "bytes_before")}
    sources |= {f"{290 + 291}", "67.8", "61.4"}  # queries and means of the table
    write_card(trained, options=CardOptions("org/puma", "Qwen/Qwen2-VL-2B-Instruct", "apache-2.0", ("org/emoji",)))
    card = ModelCard.load(trained / "README.md")
    assert numbers_without_source(card.text, sources) == []
    # What the card must show is there, and a number that nobody measured would be found.
    for shown in ("| 601 | 290 | 5 | 60.1 |", "68.3", "hard_temperature", "lora_r", "seed 7", "operations, text of 64"):
        assert shown in card.text
    for wrong in ("99.9 %", "1,234,567 pairs", "12 hours"):
        assert numbers_without_source(f"{card.text}\n{wrong}", sources) != []
    scores = [row["score"] for row in json.loads(results.read_text())["rows"]]
    assert sorted(one.metric_value for one in card.data.eval_results or []) == sorted(scores)
    data = metadata_load(trained / "README.md")
    assert data is not None
    name, entries = model_index_to_eval_results(data["model-index"])
    assert (name, eval_results_to_model_index(name, entries)) == ("org/puma", data["model-index"])
    card.save(tmp_path / "again.md")
    assert metadata_load(tmp_path / "again.md") == data
