"""Uploads against tests/hub/hub_server.py, a double of the Hub on this machine; nothing leaves it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.files import model_files
from puma_hf.hub import load_check
from puma_hf.hub.push import push_to_hub as push
from puma_hf.hub.push import travelling_files
from tests.hub.hub_server import TOKEN, HubServer, Repository, hub_server
from tests.hub.test_card import measure_nothing, write_results
from tests.warm_process import WarmProcess

LOADED = "loads without puma_hf"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def warm(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """Imports while the first tests run. Its caches are new, and it knows no Hub but the double."""
    folder = tmp_path_factory.mktemp("warm")
    variables = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    with closing(WarmProcess(folder, **variables, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0")) as process:
        yield process


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the double speaks LFS alone
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return server


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts are tested with the card."""
    measure_nothing(monkeypatch)


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    return copy


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Takes the place of the fresh process; keeps what it was given."""
    given = []

    def check(directory: Path, **options: Any) -> str:
        content = {path.name: path.read_bytes() for path in directory.iterdir()}
        given.append(SimpleNamespace(content=content, **options))
        return LOADED

    monkeypatch.setattr("puma_hf.hub.push.check_loads", check)
    return given


@pytest.fixture
def really_loads(warm: WarmProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process in which the directory is opened has its imports behind it; all else is as it is."""
    monkeypatch.setattr("puma_hf.hub.load_check.subprocess.run", warm.run)


def test_a_dry_run_asks_nobody_and_lists_files_and_card(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    for stray in (".env", "results.md", "training_args.bin", "optimizer.pt", "notes.txt", "id_rsa"):
        (folder / stray).write_text("x")
    (folder / "checkpoint-60").mkdir()
    report = push(folder, "org/puma", dry_run=True, license="mit")
    assert "- This model: mit" in report.card
    assert hub.requests == []
    assert report.url is None
    assert report.num_bytes == sum(map(len, loads[0].content.values())) + len(report.card.encode())
    # What no loader reads stays here, whatever it is called and whatever it holds.
    assert {".env", "checkpoint-60", "id_rsa", "optimizer.pt", "training_args.bin"} < set(report.left_out)
    assert set(loads[0].content) == {*model_files(folder), *travelling_files()}
    assert report.card in str(report)
    assert {*loads[0].content, "README.md"} == {name for name, _ in report.files}
    assert loads[0].offline


def test_shards_are_those_that_the_index_names(folder: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    shutil.copyfile(folder / "model.safetensors", folder / shard)
    assert shard not in model_files(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard, "b": "../x"}}))
    names = model_files(folder)
    assert {shard, "model.safetensors.index.json"} <= set(names)
    assert not {"model.safetensors", "../x"} & set(names)


@pytest.mark.parametrize("private", [True, False])
def test_visibility(folder: Path, hub: HubServer, loads: list[Any], private: bool) -> None:
    push(folder, "me/puma", token=f"{TOKEN}\n", private=private)  # the end of a line does not belong to a token
    assert hub.repositories["me/puma"].private == private
    with pytest.raises(ValueError, match=f"is {'private' if private else 'public'}, and private={not private} was"):
        push(folder, "me/puma", token=TOKEN, private=not private)
    assert len(loads) == 1


def test_a_branch_and_a_pull_request(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    repository = hub.repositories["org/puma"]
    first = dict(repository.branches["main"])
    (folder / "LICENSE").write_text("Apache-2.0")
    push(folder, "org/puma", token=TOKEN, revision="v2")
    assert repository.branches["v2"]["LICENSE"] == b"Apache-2.0"
    report = push(folder, "org/puma", token=TOKEN, create_pr=True)
    assert repository.branches["refs/pr/1"]["LICENSE"] == b"Apache-2.0"
    assert report.url == f"{hub.url}/org/puma/discussions/1"
    (folder / "LICENSE").write_text("Apache")
    push(folder, "org/puma", token=TOKEN, revision="refs/pr/1")  # it goes on, and is no branch to be made
    assert repository.branches["refs/pr/1"]["LICENSE"] == b"Apache"
    assert set(repository.branches) == {"main", "v2", "refs/pr/1"}
    assert repository.branches["main"] == first


def test_code_of_another_repository_is_refused(folder: Path, loads: list[Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "org/other--" + config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(ValueError, match=r"config\.json' names code of another repository"):
        push(folder, "org/puma", dry_run=True)


def test_an_older_push_is_replaced_and_its_shards_removed(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    old = {"model-00001-of-00002.safetensors", "preprocessor_config.json", "old_puma.py"}
    kept = {".gitattributes", "LICENSE", "assets/results.PNG"}
    files |= dict.fromkeys(old | kept, b"x")
    push(folder, "org/puma", token=TOKEN)
    left = hub.repositories["org/puma"].branches["main"].keys()
    assert not old & left
    assert kept | {"model.safetensors"} <= left


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"model.safetensors": b"other", "config.json": b"{}"}, "config.json, model.safetensors"),
        ({"photo.jpg": b""}, "photo.jpg"),
        ({"adapter_config.json": b"{}", "modeling_puma.py": b""}, "adapter_config.json"),
    ],
)
def test_other_content_is_not_mixed(
    folder: Path, hub: HubServer, loads: list[Any], there: dict[str, bytes], named: str
) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = there
    with pytest.raises(ValueError, match=rf"'org/puma' exists with other content: {named}"):
        push(folder, "org/puma", token=TOKEN)
    assert loads == []


def test_no_right_to_write(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(OSError, match="hf auth login"):
        push(folder, "org/puma")
    with pytest.raises(OSError, match="Invalid user token"):
        push(folder, "org/puma", token="wrong")
    assert loads == []


@pytest.mark.parametrize("part", ["/preupload/", "lfs/", "/commit/"])
def test_the_network_goes_in_the_middle(
    folder: Path, hub: HubServer, loads: list[Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    hub.fail = {part}
    with pytest.raises(ConnectionError, match=r"to the Hub failed .* Run it again: a commit is whole"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"] == {}
    hub.fail = set()
    push(folder, "org/puma", token=TOKEN)
    assert "model.safetensors" in hub.repositories["org/puma"].branches["main"]


# --- what changes meanwhile


def changing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """While the directory is loaded, something happens."""

    def check(directory: Path, **options: Any) -> str:
        change()
        return LOADED

    monkeypatch.setattr("puma_hf.hub.push.check_loads", check)


def test_what_was_checked_is_uploaded(folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    template, weights = (folder / "chat_template.jinja").read_bytes(), folder / "model.safetensors"
    changing(monkeypatch, lambda: (folder / "chat_template.jinja").write_text("other"))
    push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"]["chat_template.jinja"] == template
    changing(monkeypatch, lambda: save_file({name: 2 * one for name, one in load_file(weights).items()}, weights))
    with pytest.raises(ValueError, match=r"The weights in '.*puma' changed while they were checked\. Push again"):
        push(folder, "org/other", token=TOKEN)
    assert "org/other" not in hub.repositories


def test_a_repository_that_changes_is_left_alone(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    changing(monkeypatch, lambda: files.update({"notes.md": b"of somebody else"}))
    with pytest.raises(OSError, match=r"A commit has happened since"):
        push(folder, "org/puma", token=TOKEN, message="second")
    assert files["notes.md"] == b"of somebody else"


# --- results


def test_the_results_that_the_card_cites_travel_with_it(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    beside = write_results(folder.parent / "puma-test" / "results.json")
    write_results(folder / "results.json", truncate_dim=16)
    write_results(folder.parent / "other" / "results.json", model_fingerprint="0" * 64)
    report = push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    assert files["results.json"] == (folder / "results.json").read_bytes()
    assert files["results-2.json"] == beside.read_bytes()
    assert "results-3.json" not in files
    assert "From `results.json`, SHA-256" in report.card
    assert "From `results-2.json`, SHA-256" in report.card
    assert "puma-test" not in report.card
    beside.unlink()
    write_results(folder / "results.json", model_fingerprint="0" * 64)
    assert push(folder, "org/puma", token=TOKEN).left_out == ("results.json",)
    assert not {"results.json", "results-2.json"} & hub.repositories["org/puma"].branches["main"].keys()


def test_a_recipe_is_told_in_the_card_and_stays_here(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    recipe = {"loss": "mac", "split": "train", "seed": 3, "data": "/home/somebody/M-BEIR", "lora_r": 8}
    recipe |= dict.fromkeys(("model", "output", "teacher", "image_root", "instructions"), "/home/somebody/x")
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    assert "train.yaml" in push(folder, "org/puma", token=TOKEN).left_out
    pushed = hub.repositories["org/puma"].branches["main"]
    assert b"Trained with the loss `mac`: data M-BEIR, split train" in pushed["README.md"]
    assert [name for name, content in pushed.items() if name == "train.yaml" or b"/home/somebody" in content] == []


# --- the base of an adapter


def test_an_adapter_needs_a_base_that_others_have(adapter: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"which nobody else has. Push that first, and name it: base_model"):
        push(adapter, "org/puma-lora", token=TOKEN)
    with pytest.raises(OSError, match=r"Repository Not Found .*models/org/puma"):
        push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = {"model.safetensors": b"x"}
    with pytest.raises(ValueError, match=r"not trained on the weights in 'org/puma' on the Hub"):
        push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    assert (loads, list(hub.repositories)) == ([], ["org/puma"])


def test_an_adapter_of_a_base_on_the_hub_is_loaded_with_the_token(
    adapter: Path, puma_dir: Path, hub: HubServer, loads: list[Any], tmp_path: Path
) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = {path.name: path.read_bytes() for path in puma_dir.iterdir()}
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/puma"}))
    report = push(copy, "org/puma-lora", token=TOKEN)
    assert (loads[0].offline, loads[0].token) == (False, TOKEN)
    assert ModelCard(report.card).data.base_model == "org/puma"


# --- the depths of one checkpoint


@pytest.fixture
def elastic(elastic_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(elastic_dir, tmp_path / "work" / "elastic"))


def test_a_dry_run_lists_a_branch_for_each_trained_depth_below(elastic: Path, hub: HubServer, loads: list[Any]) -> None:
    settings = json.loads((elastic / "config_sentence_transformers.json").read_text())
    settings |= {"prompts": {"own": "Find it."}, "truncate_dim": 16}
    (elastic / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (elastic / "LICENSE").write_text("MIT")
    (elastic / "modeling_puma.py").write_text((elastic / "modeling_puma.py").read_text() + "# its own\n")
    report = push(elastic, "org/puma", dry_run=True, depth_branches=True)
    assert hub.requests == []
    assert [one.revision for one in report.branches] == ["k1", "k2"]
    cut = ("config.json", "model.safetensors")
    for branch, given, depth in zip((*report.branches, report), loads, (1, 2, 4), strict=True):
        config = json.loads(given.content["config.json"])
        assert config["num_kept_layers"] == config["text_config"]["num_hidden_layers"] == depth
        assert config["trained_depths"] == [one for one in (1, 2, 4) if one <= depth]
        assert branch.num_bytes == sum(map(len, given.content.values())) + len(branch.card.encode())
        for name in {*model_files(elastic)} - {*cut}:  # prompts, limits, code: all of it is the directory's own
            assert given.content[name] == (elastic / name).read_bytes(), name
    sizes = [len(given.content["model.safetensors"]) for given in loads]
    assert sizes[1] - sizes[0] > 0.45 * (sizes[2] - sizes[1]) > 0
    lines = [line.split() for line in str(report).splitlines()]
    assert [line[1] for line in lines if line[:1] == ["branch"]] == ["k1", "k2"]
    weights = [int(line[1].replace(",", "")) for line in lines if line[:1] == ["model.safetensors"]]
    assert weights == sizes
    assert lines.count(["checked", *LOADED.split()]) == 3
    assert {path.name for path in elastic.parent.iterdir()} == {"elastic"}


def test_nothing_is_uploaded_before_all_depths_were_checked(
    elastic: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(elastic, "org/puma", token=TOKEN)
    branches = hub.repositories["org/puma"].branches
    first = dict(branches["main"])
    changing(monkeypatch, lambda: (elastic / "model.safetensors").touch())
    with pytest.raises(ValueError, match="changed while they were checked"):
        push(elastic, "org/puma", token=TOKEN, depth_branches=True)
    assert branches == {"main": first}
    changing(monkeypatch, lambda: None)
    for _ in range(2):  # branches that are there are written anew
        report = push(elastic, "org/puma", token=TOKEN, depth_branches=True, message="all")
        assert branches.keys() == {"main", "k1", "k2"}
        for name, one in {"k1": report.branches[0], "k2": report.branches[1], "main": report}.items():
            assert branches[name]["README.md"].decode() == one.card
            assert one.url == f"{hub.url}/org/puma/commit/{hub.repositories['org/puma'].sha(name)}"
    assert {name: len(files["model.safetensors"]) for name, files in branches.items()}.items() > {
        ("main", len(first["model.safetensors"]))
    }
    assert hub.repositories["org/puma"].messages[-3:] == ["all"] * 3


def test_a_depth_alone(elastic: Path, hub: HubServer, loads: list[Any]) -> None:
    report = push(elastic, "org/puma", token=TOKEN, num_kept_layers=2, revision="k2")
    files = hub.repositories["org/puma"].branches["k2"]
    assert json.loads(files["config.json"])["trained_depths"] == [1, 2]
    assert hub.repositories["org/puma"].branches["main"] == {}
    # Whoever copies its lines gets what the card is about, unless it is to lie elsewhere.
    assert report.card.count('"org/puma", revision="k2"') == 6
    assert "revision=" not in push(elastic, "org/puma", token=TOKEN, num_kept_layers=2, create_pr=True).card


def test_depths_that_are_not_there(elastic: Path, folder: Path, adapter: Path, loads: list[Any]) -> None:
    for place in (folder, adapter):
        with pytest.raises(ValueError, match=rf"depth_branches=True, but '.*{place.name}' has no trained_depths below"):
            push(place, "org/puma", dry_run=True, depth_branches=True, base_model="org/base")
    with pytest.raises(ValueError, match="has no trained_depths below its own"):
        push(elastic, "org/puma", dry_run=True, depth_branches=True, num_kept_layers=1)
    with pytest.raises(ValueError, match=r"revision='k2' is the branch of another depth"):
        push(elastic, "org/puma", dry_run=True, depth_branches=True, revision="k2")
    with pytest.raises(ValueError, match=r"depth_branches=True writes branches, and create_pr=True none"):
        push(elastic, "org/puma", dry_run=True, depth_branches=True, create_pr=True)
    with pytest.raises(ValueError, match=r"num_kept_layers=5 must be an integer from 1 to 4"):
        push(elastic, "org/puma", dry_run=True, num_kept_layers=5)
    with pytest.raises(ValueError, match=r"num_kept_layers=1 is for a whole model, and '.*puma-lora' is an adapter"):
        push(adapter, "org/puma", dry_run=True, num_kept_layers=1, base_model="org/base")
    assert loads == []


# --- real loads, at the end: until then their process has imported what it needs


@pytest.mark.usefixtures("really_loads")
def test_a_directory_that_does_not_load_is_refused_with_the_reason(folder: Path, hub: HubServer) -> None:
    code = (folder / "modeling_puma.py").read_text()
    (folder / "modeling_puma.py").write_text(code + "\nimport puma_hf\n")  # here it can be imported, elsewhere not
    with pytest.raises(ValueError, match=r"puma' does not load where puma_hf is not installed \(.*puma_hf"):
        push(folder, "org/puma", token=TOKEN)
    (folder / "modeling_puma.py").write_text(code)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "language_model.extra": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it holds 1 tensors that no loader reads, first language_model\.extra"):
        push(folder, "org/puma", token=TOKEN)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not load .*model\.safetensors"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories == {}


@pytest.mark.usefixtures("really_loads")
def test_what_was_pushed_loads_from_a_fresh_cache_without_puma_hf(
    folder: Path, adapter: Path, puma_dir: Path, hub: HubServer, warm: WarmProcess, tmp_path: Path
) -> None:
    report = push(folder, "org/puma", token=TOKEN, message="first")
    repository = hub.repositories["org/puma"]
    files = repository.branches["main"]
    assert files.keys() == {"README.md", *model_files(folder), *travelling_files()}
    for name in model_files(folder):
        assert files[name] == (folder / name).read_bytes(), name
    assert files["README.md"].decode() == report.card
    assert report.url == f"{hub.url}/org/puma/commit/{repository.sha('main')}"
    assert (repository.messages, repository.private) == (["first"], False)
    report = push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    pushed = hub.repositories["org/puma-lora"].branches["main"]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/puma"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(puma_dir)
    assert "model.safetensors" not in pushed
    texts = b"".join(content for name, content in pushed.items() if not name.endswith(".safetensors"))
    assert str(puma_dir).encode() not in texts
    card = ModelCard(report.card)
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/puma", "adapter")
    found = {name: _load(name, warm, tmp_path) for name in ("org/puma", "org/puma-lora")}
    assert all(told.startswith("32 dimensions in torch.float32") for told in found.values())


# What a stranger does with a branch, and with the whole repository at a depth.
AT_DEPTHS = """
import json, sys
sys.modules["puma_hf"] = None
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

texts, found = ["a red apple", "on the table of two"], {}
for name, how in {"branch": {"revision": "k2"}, "depth": {"model_kwargs": {"num_kept_layers": 2}}}.items():
    encoded = SentenceTransformer("org/puma", trust_remote_code=True, device="cpu", **how).encode(texts)
    how = {"trust_remote_code": True, "revision": how.get("revision"), **how.get("model_kwargs", {})}
    model, processor = (kind.from_pretrained("org/puma", **how) for kind in (AutoModel, AutoProcessor))
    with torch.inference_mode():
        plain = model.eval()(**processor.process_inputs(texts)).embeddings
    found[name] = [encoded.tolist(), plain.tolist()]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.usefixtures("really_loads")
def test_a_branch_embeds_as_the_whole_at_its_depth_where_puma_hf_is_not_installed(
    elastic: Path, hub: HubServer, warm: WarmProcess, tmp_path: Path
) -> None:
    report = push(elastic, "org/puma", token=TOKEN, depth_branches=True)
    assert all("loads without puma_hf by AutoModel" in one.loaded for one in (report, *report.branches))
    (tmp_path / "script.py").write_text(AT_DEPTHS)
    output = tmp_path / "found.json"
    process = warm.run([sys.executable, "-P", str(tmp_path / "script.py"), str(output)], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    model = open_sentence_transformer(str(elastic), 2, device="cpu")
    expected = model.encode(["a red apple", "on the table of two"], convert_to_tensor=True)
    found = json.loads(output.read_text())
    assert found.keys() == {"branch", "depth"}
    for embeddings in (torch.tensor(one) for both in found.values() for one in both):
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


def _load(name: str, warm: WarmProcess, folder: Path) -> str:
    output = folder / "found.json"
    process = warm.run([sys.executable, "-P", str(load_check.__file__), name, str(output)], cwd=folder)
    assert process.returncode == 0, process.stderr
    return str(json.loads(output.read_text())["told"])
