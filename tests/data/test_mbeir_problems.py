from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from puma_hf.data.mbeir_problems import SHOWN, MBEIRFormatError, Problems, check_is_file

PATH = Path("pool.jsonl")


def wrong(line: int, kind: str = "wrong id") -> MBEIRFormatError:
    return MBEIRFormatError(f"pool.jsonl, line {line}: wrong", kind)


def missing(line: int) -> FileNotFoundError:
    return FileNotFoundError(f"pool.jsonl, line {line}: no image")


def report(*errors: MBEIRFormatError | FileNotFoundError) -> Exception:
    problems = Problems(PATH)
    for error in errors:
        problems.add(error)
    with pytest.raises((MBEIRFormatError, FileNotFoundError)) as caught, problems:
        pass
    return caught.value


def test_nothing_wrong_raises_nothing() -> None:
    with Problems(PATH) as problems:
        assert problems.attempt(int, "3") == 3
        assert not problems


@pytest.mark.parametrize("error", [wrong(3), missing(3)])
def test_one_offender_keeps_its_own_error(error: MBEIRFormatError | FileNotFoundError) -> None:
    assert report(error) is error


def test_several_are_counted_by_kind_and_all_quoted() -> None:
    error = report(wrong(1), missing(2), wrong(3), wrong(4, "missing field"))
    assert isinstance(error, MBEIRFormatError)
    assert str(error).splitlines() == [
        "pool.jsonl: 4 problems (wrong id: 2, missing image: 1, missing field: 1):",
        "- pool.jsonl, line 1: wrong",
        "- pool.jsonl, line 2: no image",
        "- pool.jsonl, line 3: wrong",
        "- pool.jsonl, line 4: wrong",
    ]


def test_missing_images_alone_are_missing_files() -> None:
    assert isinstance(report(missing(1), missing(2)), FileNotFoundError)
    # One other mistake is enough, wherever it comes.
    assert isinstance(report(*map(missing, range(20)), wrong(21)), MBEIRFormatError)


def test_only_the_first_five_are_quoted() -> None:
    error = report(*map(wrong, range(1, 1001)))
    first, *quoted = str(error).splitlines()
    assert first == "pool.jsonl: 1000 problems (wrong id: 1000). The first 5:"
    assert quoted == [f"- pool.jsonl, line {line}: wrong" for line in range(1, SHOWN + 1)]


def test_memory_does_not_grow_with_the_offenders() -> None:
    problems = Problems(PATH)
    tracemalloc.start()
    for line in range(20_000):
        problems.add(wrong(line))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 20_000


def test_attempt_counts_what_a_function_finds_and_goes_on() -> None:
    def read(line: int) -> int:
        if line % 2:
            raise wrong(line)
        return line

    problems = Problems(PATH)
    assert [problems.attempt(read, line) for line in range(4)] == [0, None, 2, None]
    assert problems
    with pytest.raises(MBEIRFormatError, match=r"2 problems \(wrong id: 2\)"), problems:
        pass


def test_any_other_error_passes() -> None:
    problems = Problems(PATH)
    with pytest.raises(ZeroDivisionError):
        problems.attempt(lambda: 1 // 0)
    problems.add(wrong(1))
    with pytest.raises(KeyError), problems:
        raise KeyError


def test_a_file_that_is_not_there_or_a_note_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    with pytest.raises(FileNotFoundError, match=r"pool\.jsonl is missing; M-BEIR's layout needs it"):
        check_is_file(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(FileNotFoundError, match=r"pool\.jsonl is a pointer of Git LFS, .* run `git lfs pull`"):
        check_is_file(path)
    path.write_text("{}\n")
    check_is_file(path)
