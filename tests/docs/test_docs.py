"""Every code block of the site runs, page by page and top to bottom, beside the demo's data and models.

Python blocks of a page share a namespace, and the `puma-hf` lines of its shell blocks run between them, in this
process. A block that cannot run here (it downloads, needs a GPU, or serves until it is stopped) has the line
`<!-- not run: why -->` before its fence: it must still compile, and the options of its commands are checked against
the command itself. A YAML block is a file, which its first line names.

What the pages call their reader's own is here: `photos` with `captions.csv`, `notes.txt`, `products.jsonl` and
`corpus.csv`; and what `make demo` leaves in `demo/output`.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from puma_hf import cli

# `make docs` runs this file, with the docstrings' examples and the README's.
pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LANGUAGES = {"python", "bash", "console", "yaml", "csv"}
# Commands of others that a page may show where nothing runs.
OTHERS = {"accelerate", "cd", "curl", "git", "make", "pip", "torchrun", "vllm"}


BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^\n]+ -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    runs: bool

    def compiled(self, name: str) -> CodeType:
        # Blank lines before the code make the line numbers of a traceback those of the page.
        return compile("\n" * (self.line - 1) + self.code, name, "exec")


def blocks_of(markdown: str) -> list[Block]:
    return [
        Block(markdown.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["mark"] is None)
        for found in BLOCK.finditer(markdown)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The command lines of a shell block as words; of a console block those after `$`."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    commands, open_line = [], ""
    for line in lines:
        try:
            commands.append(shlex.split(open_line + line, comments=True))
        except ValueError:  # a quotation that goes on in the next line
            open_line += line + "\n"
        else:
            open_line = ""
    assert not open_line, f"line {block.line}: {open_line}"
    return [words for words in commands if words]


def puma_words(words: list[str]) -> list[str] | None:
    """What follows `puma-hf`, or `puma_hf.cli` where a launcher starts it; None for other commands."""
    if words[0] in ("puma-hf", ".venv/bin/puma-hf"):
        return words[1:]
    return words[words.index("puma_hf.cli") + 1 :] if "puma_hf.cli" in words else None


def is_run(block: Block) -> bool:
    return block.runs and block.language in ("python", "bash", "console", "yaml")


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


# --- what a page needs to run


@pytest.fixture(scope="module")
def demo_output(docs_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves behind, by the same commands, but of a single step of training."""
    output = tmp_path_factory.mktemp("demo") / "output"
    data, backbone = docs_sources / "demo" / "emoji", docs_sources / "demo" / "backbone"
    run(["prune", str(backbone), str(output / "pruned"), "--num-kept-layers", "4"])
    shutil.copytree(output / "pruned", output / "distilled")
    adapter, merged = str(output / "puma-lora"), str(output / "puma")
    few = ["--max-steps", "1", "--batch-size", "4", "--lora-r", "8"]
    run(["train", str(output / "distilled"), adapter, "--data", str(data), *few])
    run(["merge", adapter, merged])
    return output


@pytest.fixture
def page_directory(docs_sources: Path, demo_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "demo").mkdir()
    for name in ("emoji", "backbone"):
        (tmp_path / "demo" / name).symlink_to(docs_sources / "demo" / name)
    (tmp_path / "configs").symlink_to(docs_sources / "configs")
    shutil.copytree(demo_output, tmp_path / "demo" / "output")
    write_readers_own(tmp_path, docs_sources / "demo" / "emoji")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_readers_own(folder: Path, emoji: Path) -> None:
    """A few pictures with captions, texts, and tables of both."""
    with open(emoji / "concepts.tsv", encoding="utf-8") as file:
        names = {row["emoji"]: row["name"] for row in csv.DictReader(file, delimiter="\t")}
    drawings = emoji / "mbeir_images" / "emoji_images" / "noto"
    chosen = {"apple.webp": drawings / "1f34e.webp"}  # the pages name this one
    chosen |= {path.name: path for path in sorted(drawings.glob("*.webp"))[::60] if path.stem in names}
    photos = folder / "photos"
    photos.mkdir()
    for name, path in chosen.items():
        shutil.copyfile(path, photos / name)
    captions = [(name, names[path.stem]) for name, path in chosen.items()]
    rows = [{"text": text, "image": f"photos/{name}"} for name, text in captions[:8]]
    (folder / "notes.txt").write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    (folder / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = [(number, row["text"], row["image"]) for number, row in enumerate(rows)]
    tables = {photos / "captions.csv": [("file_name", "caption"), *captions]}
    for table, lines in {**tables, folder / "corpus.csv": [("id", "text", "image"), *corpus]}.items():
        with open(table, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)


def run(words: list[str]) -> None:
    """One `puma-hf` command in this process, which spares starting Python anew."""
    code = cli.app(words, standalone_mode=False)
    assert not code, f"puma-hf {shlex.join(words)} ended with {code}"


# --- the blocks


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, blocks_of(read(page))))])
def test_blocks_run(page: str, page_directory: Path) -> None:
    blocks = list(filter(is_run, blocks_of(read(page))))
    namespace: dict[str, object] = {"__name__": f"__{page}__"}
    for block in blocks:
        if block.language == "python":
            exec(block.compiled(page), namespace)
        elif block.language == "yaml":  # its first line is its name
            Path(block.code.splitlines()[0].removeprefix("# ")).write_text(block.code, encoding="utf-8")
        else:
            for words in commands_of(block):
                puma = puma_words(words)
                assert puma is not None, f"{page}, line {block.line}: mark it as not run: {shlex.join(words)}"
                run(puma)


# --- blocks that do not run


class Understood(Exception):
    """The command has read its options."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Checks the options of a command as the command does, and stops there."""
    load = cli.load_config

    def stop(*arguments: Any, **values: Any) -> Any:
        load(*arguments, **values)
        raise Understood

    monkeypatch.setattr(cli, "load_config", stop)

    def parse(words: list[str]) -> None:
        with pytest.raises(Understood):
            cli.app(words, standalone_mode=False)

    return parse


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("docs_directory")
def test_blocks_that_do_not_run_are_right(page: str, parse: Callable[[list[str]], None]) -> None:
    text = read(page)
    assert 2 * len(blocks_of(text)) == len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert text.count("<!-- not run: ") == sum(not block.runs for block in blocks_of(text))
    for block in blocks_of(text):
        assert block.language in LANGUAGES
        if block.language == "python":
            block.compiled(page)
        elif block.language in ("bash", "console") and not block.runs:
            for words in commands_of(block):
                check_command(words, parse)


@pytest.mark.usefixtures("docs_directory")
def test_the_python_of_the_readme_runs() -> None:
    """From top to bottom in one namespace, as a reader would paste it."""
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for block in blocks_of(README):
        if block.language == "python" and block.runs:
            exec(block.compiled("README.md"), namespace)


@pytest.mark.usefixtures("docs_directory")
def test_the_commands_of_the_readme_are_right(parse: Callable[[list[str]], None]) -> None:
    for words in [words for block in blocks_of(README) if block.language == "bash" for words in commands_of(block)]:
        check_command(words, parse)


@pytest.mark.usefixtures("docs_directory")
def test_the_examples_of_the_help_are_right(parse: Callable[[list[str]], None]) -> None:
    for name, command in cli.app.commands.items():
        _, mark, example = (command.help or "").partition("Example: puma-hf ")
        assert mark, name
        parse(shlex.split(example))


def check_command(words: list[str], parse: Callable[[list[str]], None]) -> None:
    puma = puma_words(words)
    if puma is not None:
        parse(puma)
        return
    assert Path(words[0]).name in OTHERS | {"python"}, f"unknown command: {shlex.join(words)}"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for script in [word for word in words if word.endswith(".py")]:
        assert (ROOT / script).is_file(), script
