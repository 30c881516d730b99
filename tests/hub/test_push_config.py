from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from puma_hf.cli_options import config_command
from puma_hf.hub.push_config import PushConfig


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "../x/y", "org/", "org/na me", "org/a--b", ""])
def test_a_name_must_be_of_the_hubs_form(repo_id: str) -> None:
    with pytest.raises(ValueError, match=r"repo_id=.* must be a Hub id of the form organisation/name"):
        PushConfig(directory="puma", repo_id=repo_id)


@pytest.mark.parametrize("name", ["base_model", "datasets"])
def test_other_names_are_checked_too(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}='a' must be a Hub id"):
        PushConfig(directory="puma", repo_id="org/name", **{name: "a"})


@pytest.mark.parametrize(
    ("flags", "private", "results"),
    [([], None, ()), (["--private"], True, ()), (["--results", "a", "--results", "b"], None, ("a", "b"))],
)
def test_the_command_reads_it(flags: list[str], private: bool | None, results: tuple[str, ...]) -> None:
    app, seen = typer.Typer(), []

    @config_command(app, PushConfig)
    def push(config: PushConfig) -> None:
        seen.append(config)

    result: Any = CliRunner().invoke(app, ["puma", "org/name", "--dry-run", *flags])
    assert result.exit_code == 0, result.output
    assert (seen[0].directory, seen[0].repo_id, seen[0].dry_run) == ("puma", "org/name", True)
    assert (seen[0].private, seen[0].results) == (private, results)
