"""The page as a Space of the Hub: a folder with the index, its pictures, its model, and a few lines that serve it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from puma_hf import __version__
from puma_hf.app.cards import TITLE, count_line
from puma_hf.app.config import FIRST_PORT
from puma_hf.app.serve import require_gradio
from puma_hf.files import new_directory
from puma_hf.search.index import Index, open_index
from puma_hf.search.portable import copy_index

INDEX = "index"  # its folder in a Space

_APP = '''"""Search the index beside this file by words, by a picture, or by both."""

import os
from pathlib import Path

from puma_hf.app import AppConfig
from puma_hf.app.launch import launch

if __name__ == "__main__":
    config = AppConfig(
        index=Path(__file__).resolve().parent / "{index}",
        # A Space is reached from other machines, and through this port.
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "{port}")),{more}
    )
    launch(config, started=print)
'''

_README = """# {title}

{line}.

This folder was written by `puma-hf app --space`. It holds the page (`app.py`) and, in `{index}/`, the embeddings, texts
and pictures that it searches{model}.

Everything in a public Space can be downloaded: publish it only if you may publish all of that, and name its
licence above.

## Put it on the Hub

```
hf repos create ORG/NAME --type space --sdk gradio
hf upload ORG/NAME . --type space
```

`requirements.txt` names `puma-hf` {version}. A Space installs it from the Python package index; if that version is not
there, put an address of the source in its place, such as `puma-hf[app] @ git+https://ADDRESS`.

## Run it here

```
pip install -r requirements.txt
GRADIO_SERVER_NAME=127.0.0.1 python app.py
```
"""


def write_space(
    index: Index,
    folder: str | Path,
    *,
    model: str | None = None,
    instruction: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a folder that is a Space of the Hub as it is: the page, and a copy of an index that needs nothing else.

    Args:
        index: The index.
        folder: Where to, a new or empty directory. It is written whole or not at all.
        model: Name of the index's model on the Hub. By default a model in a local directory is copied.
        instruction: What queries ask for, in the words that the model was trained with; can be changed on the page.
        trust_remote_code: Whether the Space may run the code of a model's repository, which a PUMA model needs unless
            it is copied.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder is not empty.
        FileNotFoundError: If a picture of the index, or its model, is gone.
        ImportError: If Gradio is missing, whose version a Space names.
        ValueError: If the index is empty, a picture cannot be read, or the model's directory holds what should not be
            published.

    Example:
        >>> from puma_hf.app import write_space
        >>> from puma_hf.search import open_index
        >>> write_space(open_index("index"), "space", model="org/puma-k14")  # doctest: +SKIP
        PosixPath('space')
    """
    require_gradio()
    index.candidates()
    with new_directory(folder, overwrite=False, forbidden=index.folder) as draft:
        copy_index(index, draft / INDEX, model=model)
        name = open_index(draft / INDEX).description["model"]
        more = "" if instruction is None else f"\n        instruction={instruction!r},"
        more += "\n        trust_remote_code=True,  # of the model's repository" if trust_remote_code else ""
        files = {
            "app.py": _APP.format(index=INDEX, port=FIRST_PORT, more=more),
            "requirements.txt": f"puma-hf[app]=={__version__}\n",
            "README.md": _readme(index, name),
        }
        for file, content in files.items():
            (draft / file).write_text(content, encoding="utf-8")
    return Path(folder)


def _readme(index: Index, model: str) -> str:
    """What the Hub shows of a Space, its settings first."""
    copied = model.startswith(".")
    settings: Any = SpaceCardData(
        title=TITLE,
        sdk="gradio",
        sdk_version=version("gradio"),
        app_file="app.py",
        models=None if copied else [model],
        tags=["puma", "multimodal-retrieval"],
    )
    body = _README.format(
        title=TITLE,
        line=count_line(index.counts, index.model if copied else model),
        index=INDEX,
        model=", and the model" if copied else "",
        version=__version__,
    )
    return f"---\n{settings.to_yaml()}\n---\n\n{body}"
