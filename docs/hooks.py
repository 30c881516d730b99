"""What the site needs beyond its pages: options of the commands, docstrings as Markdown."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

_COMMANDS = "<!-- commands -->"
_GPU = "<!-- gpu -->"
_GPU_RESULTS = Path(__file__).parent / "gpu.json"

_EXAMPLE = re.compile(r"^Example:\n(?P<body>(?:\n|[ ]{4}.*(?:\n|\Z))+)", re.MULTILINE)
_FENCED_EXAMPLE = re.compile(r"^Example:\n\n(?=```)", re.MULTILINE)
_FENCE_OF_PROMPTS = re.compile(r"^```python\n(?=>>> )", re.MULTILINE)
_NAME = re.compile(r"\[`~?(?P<name>[\w.]+)`\](?![\[(])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""
    for place, make in ((_COMMANDS, commands_markdown), (_GPU, gpu_markdown)):
        if place in markdown:
            markdown = markdown.replace(place, make())
    return markdown


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, and the fields of a configuration with their defaults alone."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for everything that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
        if isinstance(obj, griffe.Attribute) and isinstance(obj.value, griffe.ExprCall):
            obj.value = default_of(obj.value)


def default_of(call: griffe.ExprCall) -> Any:
    """The default of a field that a call of `puma_hf.settings` makes; None if it has none."""
    made_by = str(call.function)
    if made_by == "option":
        return call.arguments[0]
    return None if made_by == "positional" else call


def as_markdown(docstring: str) -> str:
    """A docstring, without its margin: its example is a block of code, and [`Name`] a plain name."""
    text = _FENCED_EXAMPLE.sub("**Example:**\n\n", docstring)
    text = _EXAMPLE.sub(_example, text)
    text = _FENCE_OF_PROMPTS.sub("```pycon\n", text)
    return _NAME.sub(r"`\g<name>`", text)


def _example(section: re.Match[str]) -> str:
    body = textwrap.dedent(section["body"]).strip("\n")
    if "```" not in body and ">>> " in body:
        words, prompt, code = body.partition(">>> ")
        body = f"{words}\n```pycon\n{prompt}{code}\n```"
    return f"**Example:**\n\n{body}\n\n"


def commands_markdown() -> str:
    """Every command with its options, in the words of `puma-hf COMMAND --help`."""
    from puma_hf.cli import app

    return "\n".join(_command(name, command) for name, command in app.commands.items())


def gpu_markdown() -> str:
    """What `benchmarks/gpu.py` found when it was last run on a GPU."""
    if not _GPU_RESULTS.is_file():
        return "It was not run yet."
    found = json.loads(_GPU_RESULTS.read_text(encoding="utf-8"))
    place = ", ".join(f"{name} {value}" for name, value in found["where"].items())
    rows = [f"| {name} | {one['verdict']} | {_figures(one)} |" for name, one in found["checks"].items()]
    return "\n".join([f"Run with {place}:", "", "| check | verdict | figures |", "|---|---|---|", *rows])


def _figures(record: dict[str, Any]) -> str:
    figures = "; ".join(f"{name}: {value}" for name, value in record.get("figures", {}).items())
    return (figures or record.get("why", "")).replace("|", "\\|").replace("\n", " ")


def _command(name: str, command: Any) -> str:
    context = command.make_context(f"puma-hf {name}", [], resilient_parsing=True)
    words, _, example = command.help.partition("Example: ")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [_row(*record) for option in command.params if (record := option.get_help_record(context)) is not None]
    parts = [
        f"## {name}",
        " ".join(words.split()),
        f"```console\n$ {' '.join(example.split())}\n```",
        f"Usage: `{usage}`",
        "\n".join(["| option | meaning |", "|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def _row(names: str, meaning: str) -> str:
    left = "<br>".join(f"`{part.strip()}`" for part in names.split(" / "))
    cells = (left, " ".join(meaning.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
