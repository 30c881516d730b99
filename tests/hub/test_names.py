from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from puma_hf.files import is_hub_id


@pytest.mark.parametrize(
    "name", ["org/puma", "o/p", "Qwen/Qwen2-VL-2B-Instruct", "a_1/b.c-d", f"{96 * 'o'}/{96 * 'n'}"]
)
def test_names_of_the_hub(name: str) -> None:
    validate_repo_id(name)
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *("org/a--b", "org/a..b", "../puma", "./puma", "-a/b", "a/b-", "org/na me", "é/b", "a/b/c", "org/puma.git"),
        *(f"{97 * 'o'}/n", f"o/{97 * 'n'}"),
    ],
)
def test_names_that_the_hub_refuses(name: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert not is_hub_id(name)


@pytest.mark.parametrize("name", ["", "puma", "org/", "/puma", "~/puma", "a/b\n"])
def test_names_without_an_organisation(name: str) -> None:
    assert not is_hub_id(name)
