"""Uploads against tests/hub/hub_server.py, a double of the Hub on this machine; nothing leaves it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file

from puma_hf.evaluation.layer_sweep import LayerCosts
from puma_hf.hub import fresh_load
from puma_hf.hub.card_results import MeasuredModel
from puma_hf.hub.load_check import LoadCheck
from puma_hf.hub.push import push_to_hub as push
from puma_hf.hub.push_files import loss_files
from tests.hub.hub_server import TOKEN, HubServer, Repository, hub_server
from tests.hub.test_card_results import PRINT, write_results
from tests.warm_process import WarmProcess, warm_process

LOADED = LoadCheck(64, "float32", 1e-7)
COSTS = LayerCosts((1, 2), (1, 2), (10, 20), (30, 40), 64, 256)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def warm(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """Imports while the first tests run. Its caches are new, and it knows no Hub but the double."""
    folder = tmp_path_factory.mktemp("warm")
    variables = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    with warm_process(folder, **variables, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0") as process:
        yield process


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the double speaks LFS alone
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return server


@pytest.fixture
def folder(puma_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "work" / "puma"
    shutil.copytree(puma_dir, copy)
    return copy


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Takes the place of the fresh process and of counting, which take time; keeps what it was given."""
    given = []

    def check(directory: Path, **options: Any) -> LoadCheck:
        content = {path.name: path.read_bytes() for path in directory.iterdir()}
        given.append(SimpleNamespace(content=content, **options))
        return LOADED

    monkeypatch.setattr("puma_hf.hub.push.check_loads", check)
    monkeypatch.setattr(MeasuredModel, "costs", lambda self: COSTS)
    return given


@pytest.fixture
def really_loads(warm: WarmProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process in which the directory is opened has its imports behind it; all else is as it is."""
    monkeypatch.setattr("puma_hf.hub.load_check.subprocess.run", warm.run)
    monkeypatch.setattr(MeasuredModel, "costs", lambda self: COSTS)


def test_a_dry_run_asks_nobody_and_lists_files_and_card(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    (folder / "results.md").write_text("x")
    report = push(folder, "org/puma", dry_run=True, license="mit", base_license="apache-2.0", data_license="cc-by-4.0")
    for line in ("- This model: mit", "- Base: apache-2.0, of", "- Data: cc-by-4.0"):
        assert line in report.card
    assert hub.requests == []
    assert report.url is None
    shown = str(report)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:>14,} bytes" in shown
    assert f"{report.num_bytes:>14,} bytes" in shown
    assert report.num_bytes == sum(map(len, loads[0].content.values())) + len(report.card.encode())
    assert set(loads[0].content) == {path.name for path in folder.iterdir()} - {"README.md", "results.md"} | {
        *loss_files()
    }
    assert "left out  results.md" in shown
    assert "dry run" in shown
    assert report.card in shown
    assert str(LOADED) in shown
    assert {*loads[0].content, "README.md"} == {name for name, _ in report.files}
    assert loads[0].offline


def test_stray_files_are_refused_before_anything_else(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    (folder / ".env").write_text("HF_TOKEN=x")
    with pytest.raises(ValueError, match=r"- \.env: looks like a secret"):
        push(folder, "org/puma", token=TOKEN)
    assert (hub.requests, loads) == ([], [])


@pytest.mark.parametrize("private", [True, False])
def test_visibility_of_a_new_repository(folder: Path, hub: HubServer, loads: list[Any], private: bool) -> None:
    push(folder, "me/puma", token=TOKEN, private=private)
    assert hub.repositories["me/puma"].private == private


def test_visibility_of_an_old_one_is_not_changed(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.repositories["org/puma"] = Repository()
    with pytest.raises(ValueError, match="exists and is public, asked for was private"):
        push(folder, "org/puma", token=TOKEN, private=True)
    assert loads == []


def test_a_pull_request_against_a_branch(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    repository = hub.repositories["org/puma"]
    with pytest.raises(ValueError, match="'org/puma' has no branch 'v2' to open a pull request against"):
        push(folder, "org/puma", token=TOKEN, revision="v2", create_pr=True)
    repository.branches["v2"] = {**repository.branches["main"], "LICENSE": b"of v2"}
    push(folder, "org/puma", token=TOKEN, revision="v2", create_pr=True)
    assert repository.branches["refs/pr/1"] == repository.branches["v2"]
    assert len(loads) == 2


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
    assert repository.branches["main"] == first


def test_an_older_push_is_replaced_and_its_shards_removed(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    files |= {"model-00001-of-00002.safetensors": b"old", ".gitattributes": b"x", "assets/results.PNG": b"x"}
    report = push(folder, "org/puma", token=TOKEN)
    assert report.removed == ("model-00001-of-00002.safetensors",)
    assert "removed   model-00001-of-00002.safetensors" in str(report)
    assert "replaced  README.md; what was written there by hand is in the history" in str(report)
    left = hub.repositories["org/puma"].branches["main"]
    assert "model-00001-of-00002.safetensors" not in left
    assert {".gitattributes", "assets/results.PNG"} <= left.keys()


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"model.safetensors": b"other", "config.json": b"{}"}, "config.json, model.safetensors"),
        ({"notes.txt": b"", "modeling_puma.py": b""}, "notes.txt"),
        ({"photo.jpg": b""}, "photo.jpg"),
        ({"adapter_config.json": b"{}", "modeling_puma.py": b""}, "adapter_config.json"),
        ({f"{number}.txt": b"" for number in range(7)}, r"0\.txt, .*4\.txt and 2 more"),
    ],
)
def test_other_content_is_not_mixed(
    folder: Path, hub: HubServer, loads: list[Any], there: dict[str, bytes], named: str
) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = there
    with pytest.raises(ValueError, match=rf"'org/puma' exists with other content: {named}\."):
        push(folder, "org/puma", token=TOKEN)
    assert loads == []


def test_a_repository_with_a_licence_alone_is_empty_enough(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = {".gitattributes": b"", "README.md": b"", "LICENSE": b""}
    push(folder, "org/puma", token=TOKEN)
    assert "config.json" in hub.repositories["org/puma"].branches["main"]


def test_no_token(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(PermissionError, match=r"There is no Hub token to push to 'org/puma' with. Log in with"):
        push(folder, "org/puma")
    assert loads == []


def test_a_wrong_token(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(PermissionError, match="The Hub does not know the token"):
        push(folder, "org/puma", token="wrong")


def test_no_right_to_write(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(
        PermissionError, match=r"'me' is no member of 'they' who may write, .*'they/puma' .*Choose one of me, org, or"
    ):
        push(folder, "they/puma", token=TOKEN)
    hub.user["orgs"] = [{"name": "they", "roleInOrg": "read"}]
    with pytest.raises(PermissionError, match=r"'me' is no member of 'they' who may write"):
        push(folder, "they/puma", token=TOKEN)
    hub.user["auth"] = {"accessToken": {"role": "read"}}
    with pytest.raises(
        PermissionError, match=r"The token of 'me' may only read\. Make one that may write to 'me/puma'"
    ):
        push(folder, "me/puma", token=TOKEN)
    assert loads == []
    hub.reset()
    hub.fail = {"api/repos/create": 403}
    with pytest.raises(PermissionError, match="The token may not write to 'org/puma'"):
        push(folder, "org/puma", token=TOKEN)


def test_a_repository_that_the_token_cannot_see(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.fail = {"api/repos/create": 409}
    with pytest.raises(PermissionError, match="'org/puma' exists, but this token could not see it a moment ago"):
        push(folder, "org/puma", token=TOKEN)


def test_a_pull_request_needs_a_repository(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(ValueError, match="'they/puma' does not exist, so no pull request"):
        push(folder, "they/puma", token=TOKEN, create_pr=True)


@pytest.mark.parametrize("part", ["/preupload/", "lfs/", "/commit/"])
def test_the_network_goes_in_the_middle(
    folder: Path, hub: HubServer, loads: list[Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    hub.fail = {part: None}
    with pytest.raises((ConnectionError, OSError), match="'org/puma'"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"] == {}
    hub.fail = {}
    push(folder, "org/puma", token=TOKEN)
    assert "model.safetensors" in hub.repositories["org/puma"].branches["main"]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, ValueError, "with status 400 .*refused by the test.*Mend what the Hub names"),
        (412, ConnectionError, "'org/puma' changed while this push ran"),
        (429, ConnectionError, "with status 429 .*Run it again later"),
        (500, ConnectionError, "with status 500 .*Run it again later"),
    ],
)
def test_the_hub_refuses_the_commit(
    folder: Path, hub: HubServer, loads: list[Any], status: int, kind: type[Exception], words: str
) -> None:
    hub.fail = {"/commit/": status}
    with pytest.raises(kind, match=words):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"] == {}


def test_the_hub_refuses_a_large_file(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    hub.fail = {"lfs/": 403}  # huggingface_hub wraps this into an error that does not tell the reason
    with pytest.raises(PermissionError, match=r"The token may not write to 'org/puma' \(.*\)\. Make one"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories["org/puma"].branches["main"] == {}


@pytest.mark.parametrize("error", [KeyError("oid"), RecursionError("oid")])
def test_errors_of_the_code_are_not_called_errors_of_the_network(
    folder: Path, hub: HubServer, loads: list[Any], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(type(error), match="oid"):
        push(folder, "org/puma", token=TOKEN)


@pytest.mark.parametrize("token", ["", "hf_a b", "hf_a\nb", "hf_é"])
def test_a_token_with_a_blank_is_refused_and_not_shown(folder: Path, token: str) -> None:
    with pytest.raises(ValueError, match="The Hub token is empty, or holds a blank") as caught:
        push(folder, "org/puma", token=token)
    assert "hf_" not in str(caught.value)


def test_the_end_of_a_line_does_not_belong_to_a_token(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    push(folder, "org/puma", token=f"{TOKEN}\n")
    assert "org/puma" in hub.repositories


# --- what changes meanwhile


def changing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """While the directory is loaded, something happens."""

    def check(directory: Path, **options: Any) -> LoadCheck:
        change()
        return LOADED

    monkeypatch.setattr("puma_hf.hub.push.check_loads", check)


def test_what_was_checked_is_uploaded(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (folder / "chat_template.jinja").read_bytes()

    def change() -> None:
        (folder / "chat_template.jinja").write_text("other")
        (folder / ".env").write_text("HF_TOKEN=x")

    changing(monkeypatch, change)
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    assert files["chat_template.jinja"] == config
    assert ".env" not in files


def test_weights_that_change_are_not_uploaded(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "model.safetensors"
    changing(monkeypatch, lambda: save_file({name: 2 * one for name, one in load_file(weights).items()}, weights))
    with pytest.raises(ValueError, match=r"The weights in '.*puma' changed while they were checked\. Wait until"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories == {}


def test_a_repository_that_changes_is_left_alone(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    changing(monkeypatch, lambda: files.update({"notes.md": b"of somebody else"}))
    with pytest.raises(ConnectionError, match="'org/puma' changed while this push ran"):
        push(folder, "org/puma", token=TOKEN, message="second")
    assert files["notes.md"] == b"of somebody else"


# --- results


def test_the_results_that_the_card_cites_travel_with_it(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: PRINT)
    beside = write_results(folder.parent / "puma-test" / "results.json")
    write_results(folder / "results.json", truncate_dim=16)
    report = push(folder, "org/puma", token=TOKEN)
    files = hub.repositories["org/puma"].branches["main"]
    assert files["results.json"] == (folder / "results.json").read_bytes()
    assert files["results-2.json"] == beside.read_bytes()
    assert "From `results.json`, SHA-256" in report.card
    assert "From `results-2.json`, SHA-256" in report.card
    assert "puma-test" not in report.card
    beside.unlink()
    assert push(folder, "org/puma", token=TOKEN).removed == ("results-2.json",)


def test_a_recipe_is_told_in_the_card_and_stays_here(folder: Path, hub: HubServer, loads: list[Any]) -> None:
    """A merge copies it from the adapter; it holds paths of this machine."""
    recipe = {"loss": "mac", "split": "train", "seed": 3, "data": "/home/somebody/M-BEIR", "lora_r": 8}
    recipe |= dict.fromkeys(("model", "output", "teacher", "image_root", "instructions"), "/home/somebody/x")
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    report = push(folder, "org/puma", token=TOKEN)
    assert "train.yaml" in report.left_out
    pushed = hub.repositories["org/puma"].branches["main"]
    assert b"Trained with the loss `mac`, on `M-BEIR`, split train" in pushed["README.md"]
    assert [name for name, content in pushed.items() if name == "train.yaml" or b"somebody" in content] == []
    (folder / "train.yaml").write_text(yaml.safe_dump({**recipe, "data": f"https://me:hf_{34 * 'x'}@host/data"}))
    with pytest.raises(ValueError, match=r"train\.yaml: holds what looks like an access token"):
        push(folder, "org/other", token=TOKEN)
    assert "org/other" not in hub.repositories


def test_results_of_another_model_stay_here(
    folder: Path, hub: HubServer, loads: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: PRINT)
    write_results(folder / "results.json", model_fingerprint="0" * 64)
    with caplog.at_level(logging.WARNING):
        report = push(folder, "org/puma", token=TOKEN)
    assert "results.json" not in hub.repositories["org/puma"].branches["main"]
    assert report.left_out == ("results.json",)
    assert "results.json stays here: it was not measured on these weights." in caplog.text


def test_a_token_in_a_result_file_beside_the_model_is_found(
    folder: Path, hub: HubServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeasuredModel, "fingerprint", lambda self, truncate_dim: PRINT)
    write_results(folder.parent / "puma-test" / "results.json", data="hf_" + "a1B2" * 9)
    with pytest.raises(ValueError, match=r"README\.md, results\.json of '.*puma' would hold what looks like an access"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories == {}


def test_no_network_and_offline(folder: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set, so 'org/puma' cannot be reached"):
        push(folder, "org/puma", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The connection to the Hub failed while pushing to 'org/puma'"):
        push(folder, "org/puma", token=TOKEN)


# --- the base of an adapter


@pytest.fixture
def base_on_hub(puma_dir: Path, hub: HubServer) -> Repository:
    hub.repositories["org/puma"] = Repository()
    hub.repositories["org/puma"].branches["main"] = {path.name: path.read_bytes() for path in puma_dir.iterdir()}
    return hub.repositories["org/puma"]


def test_an_adapter_needs_a_base_that_others_have(adapter: Path, hub: HubServer, loads: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"which nobody else has. Push that first, and name it: base_model"):
        push(adapter, "org/puma-lora", token=TOKEN)
    with pytest.raises(ValueError, match=r"base 'org/puma' is not on the Hub, or this token cannot see it"):
        push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    assert (loads, hub.repositories) == ([], {})


def test_a_base_of_other_weights_is_refused(
    adapter: Path, hub: HubServer, loads: list[Any], base_on_hub: Repository
) -> None:
    base_on_hub.branches["main"]["model.safetensors"] += b"x"
    with pytest.raises(
        ValueError, match=r"not trained on the weights in 'org/puma' on the Hub \(SHA-256 \w{12} instead"
    ):
        push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    assert (loads, list(hub.repositories)) == ([], ["org/puma"])


def test_a_base_that_is_not_noted_is_taken_with_a_warning(
    adapter: Path,
    hub: HubServer,
    loads: list[Any],
    base_on_hub: Repository,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (copy / "puma_base.json").unlink()
    with caplog.at_level(logging.WARNING):
        push(copy, "org/puma-lora", token=TOKEN, base_model="org/puma")
    assert "Whether org/puma holds the weights that the adapter was trained on is not known." in caplog.text


def test_an_adapter_of_a_base_on_the_hub_is_loaded_with_the_token(
    adapter: Path, hub: HubServer, loads: list[Any], base_on_hub: Repository, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/puma"}))
    report = push(copy, "org/puma-lora", token=TOKEN)
    assert (loads[0].offline, loads[0].token) == (False, TOKEN)
    assert ModelCard(report.card).data.base_model == "org/puma"
    assert push(copy, "org/puma-lora", token=TOKEN).removed == ()
    (copy / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json must hold names with values, not list"):
        push(copy, "org/puma-lora", token=TOKEN)


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
    with pytest.raises(ValueError, match=r"holds 1 tensors that no loader reads \(first: language_model\.extra\)"):
        push(folder, "org/puma", token=TOKEN)
    tensors["language_model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{folder}' has 1 tensors of another shape .*norm\.weight, \(5,\) instead"):
        push(folder, "org/puma", token=TOKEN)
    assert hub.repositories == {}


@pytest.mark.usefixtures("really_loads")
def test_what_was_pushed_loads_from_a_fresh_cache_without_puma_hf(
    folder: Path, adapter: Path, puma_dir: Path, hub: HubServer, warm: WarmProcess, tmp_path: Path
) -> None:
    report = push(folder, "org/puma", token=TOKEN, message="first")
    repository = hub.repositories["org/puma"]
    files = repository.branches["main"]
    assert files.keys() == {path.name for path in folder.iterdir()} | {*loss_files()}
    for path in folder.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes(), path.name
    assert files["README.md"].decode() == report.card
    assert report.url == f"{hub.url}/org/puma/commit/{repository.sha('main')}"
    assert repository.messages == ["first"]
    assert not repository.private
    report = push(adapter, "org/puma-lora", token=TOKEN, base_model="org/puma")
    _check_pushed_adapter(hub.repositories["org/puma-lora"].branches["main"], adapter, puma_dir, report.card)
    found = {name: _load(name, warm, tmp_path) for name in ("org/puma", "org/puma-lora")}
    assert all(one["difference"] < 1e-4 for one in found.values())
    assert found["org/puma-lora"]["shape"] == found["org/puma"]["shape"]
    for name in ("org/puma/resolve", "org/puma-lora/resolve"):
        assert any(method == "GET" and name in path and path.endswith(".safetensors") for method, path in hub.requests)


def _check_pushed_adapter(files: dict[str, bytes], adapter: Path, base: Path, content: str) -> None:
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/puma"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert "model.safetensors" not in files
    assert str(base).encode() not in b"".join(files[name] for name in files if not name.endswith(".safetensors"))
    card = ModelCard(content)
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/puma", "adapter")
    assert "LoRA adapter alone" in card.text


def _load(name: str, warm: WarmProcess, folder: Path) -> dict[str, Any]:
    job = {"directory": name, "output": str(folder / "found.json")}
    (folder / "job.json").write_text(json.dumps(job))
    process = warm.run([sys.executable, "-P", str(fresh_load.__file__), str(folder / "job.json")], cwd=folder)
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found
