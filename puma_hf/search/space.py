"""The page as a Space of the Hub: a folder with the index, its pictures, its model, and a few lines that serve it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from puma_hf import __version__
from puma_hf.configs import FIRST_PORT
from puma_hf.files import model_files, new_directory
from puma_hf.search.build import create_table, keep_picture, tag_complete
from puma_hf.search.index import Index
from puma_hf.search.page import TITLE, count_line
from puma_hf.settings import from_extra

_APP = '''"""Search the index beside this file by words, by a picture, or by both."""

import os
from pathlib import Path

from puma_hf.search import AppConfig
from puma_hf.search.page import launch

# A Space is reached from other machines, and through this port.
host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), int(os.environ.get("GRADIO_SERVER_PORT", "{port}"))
launch(AppConfig(index=Path(__file__).resolve().parent / "index", host=host, port=port{more}), started=print)
'''

_README = """---
title: {title}
sdk: gradio
sdk_version: {sdk}
app_file: app.py
{models}tags:
- puma
- multimodal-retrieval
---

# {title}

{line}. `puma-hf app --space` has written the page (`app.py`) and, in `index/`, the embeddings, texts and pictures that
it searches{model}. All of a public Space can be downloaded: name the licence of that above.

Put it on the Hub with `hf repos create ORG/NAME --type space --sdk gradio` and `hf upload ORG/NAME . --type space`, or
run it here with `GRADIO_SERVER_NAME=127.0.0.1 python app.py`.
"""


def write_space(
    index: Index,
    folder: str | Path,
    *,
    model: str | None = None,
    instruction: str | None = None,
    num_kept_layers: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a folder that is a Space of the Hub as it is: the page, and a copy of an index that needs nothing else.

    A picture is copied with all that its file says, such as the place that a camera wrote into it.

    Args:
        index: The index.
        folder: Where to, a new or empty directory. It is written whole or not at all.
        model: Name of the index's model on the Hub. By default a model in a local directory is copied.
        instruction: What queries ask for; can be changed on the page.
        num_kept_layers: Decoder layers that are run for a query, as `Searcher` takes it.
        trust_remote_code: Let the Space run the code of a model's repository, as a PUMA model needs unless copied.

    Raises:
        FileExistsError: If the folder is not empty.
        FileNotFoundError: If a picture of the index, or its model, is gone.
        ValueError: If the index is empty.
    """
    index.num_candidates()  # an empty one is refused
    sdk = from_extra("gradio", "app").__version__
    is_copied = model is None and Path(index.model).is_absolute()
    name = "./model" if is_copied else model or index.model
    more = "" if instruction is None else f", instruction={instruction!r}"
    more += "" if num_kept_layers is None else f", num_kept_layers={num_kept_layers}"
    more += ", trust_remote_code=True" if trust_remote_code else ""
    told = {"title": TITLE, "sdk": sdk, "model": ", and the model" if is_copied else ""}
    told["line"] = count_line(index, index.model if is_copied else name)
    told["models"] = "" if is_copied else f"models:\n- {name}\n"
    # Written beside its place and renamed: a Space that lacks half of its pictures would be published unnoticed.
    with new_directory(folder, overwrite=False, forbidden=index.folder) as draft:
        if is_copied:
            (draft / "index" / "model").mkdir(parents=True)
            for file in model_files(Path(index.model)):
                shutil.copyfile(Path(index.model, file), draft / "index" / "model" / file)
        _copy_index(index, draft / "index", name)
        (draft / "app.py").write_text(_APP.format(port=FIRST_PORT, more=more), encoding="utf-8")
        (draft / "requirements.txt").write_text(f"puma-hf[app,search]=={__version__}\n", encoding="utf-8")
        (draft / "README.md").write_text(_README.format(**told), encoding="utf-8")
    return Path(folder)


def _copy_index(index: Index, folder: Path, model: str) -> None:
    """Copy an index so that no path in it leads outside."""
    # A branch or commit is one of the model that was named before, and paths say where this machine keeps its files.
    revision = index.description["revision"] if model == index.model else None
    about = {**index.description, "model": model, "revision": revision, "data": Path(index.description["data"]).name}
    table = create_table(folder, about, index.table.schema.field("vector").type.list_size)
    schema = table.schema
    # A thousand rows at a time: the vectors of a million items are gigabytes.
    for batch in index.table.search().select(schema.names).limit(len(index)).to_batches(1000):
        paths = batch["image"].to_pylist()
        images = [path and keep_picture(folder, (index.folder / path).read_bytes()) for path in paths]
        columns = {**{name: batch[name] for name in schema.names}, "image": pa.array(images, pa.string())}
        table.add(pa.table(columns, schema=schema))
    tag_complete(table)
