"""Copy an index so that it holds all it needs: its pictures, and its model or the name of one on the Hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from puma_hf.embedding.shards import read_info, read_shard, shard_files, write_shard
from puma_hf.embedding.store import MANIFEST
from puma_hf.evaluation.fingerprint import short_name
from puma_hf.files import new_directory
from puma_hf.hub.push_files import files_to_push
from puma_hf.search.ann import ANN_FILE
from puma_hf.search.index import DESCRIPTION, Index, manifest_hash, open_index
from puma_hf.search.items import Item, image_state, read_items, read_seen_hashes, write_items
from puma_hf.search.pictures import keep_picture
from puma_hf.values import shown

MODEL_FOLDER = "model"


def copy_index(index: str | Path | Index, folder: str | Path, *, model: str | None = None) -> Path:
    """Copy an index into a folder that can be moved to any machine: no path in it leads outside.

    Embeddings are copied as they are, and every picture becomes a file of the copy, named by its content and with all
    that its file says, such as the place that a camera wrote into it. What could not be embedded is kept as its number
    alone, because ids and reasons may name paths.

    Args:
        index: The index, or its directory.
        folder: Where to, a new or empty directory. It is written whole or not at all.
        model: What the copy calls its model, such as a Hub id. By default a model in a local directory is copied into
            `folder/model`, and a Hub id stays.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder is not empty.
        FileNotFoundError: If a picture, or the model, is gone.
        ValueError: If a picture is no longer what was embedded or cannot be read, the model's directory holds what
            should not be published, or the index was made anew after it was opened.
        OSError: If the disk is full.

    Example:
        >>> from puma_hf.search.index import open_index
        >>> from puma_hf.search.portable import copy_index
        >>> copy_index(open_index("index"), "portable", model="org/puma-k14")  # doctest: +SKIP
    """
    index = index if isinstance(index, Index) else open_index(index)
    with new_directory(folder, overwrite=False, forbidden=index.folder) as draft:
        described = {**index.description, **_model_of(index, draft, model)}
        described["data"] = short_name(described["data"])
        described["items"] = [_copy_shard(index, shard, draft) for shard in range(len(index.description["items"]))]
        ann = index.description.get("ann")
        others = [MANIFEST, index.stored.manifest.get("ranges"), ANN_FILE if ann and ann["content_hash"] else None]
        for name in filter(None, others):
            shutil.copyfile(index.folder / name, draft / name)
        if manifest_hash(draft) != described["manifest_hash"]:
            raise ValueError(f"The index {str(index.folder)!r} was made anew while it was open. Open it again.")
        (draft / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _model_of(index: Index, draft: Path, model: str | None) -> dict[str, Any]:
    """What the copy says of its model, which is copied if it lies here."""
    revision = index.description["revision"]
    if model is not None:
        return {"model": model, "revision": revision if model == index.model else None}
    if not Path(index.model).is_absolute():
        return {"model": index.model, "revision": revision}
    source = Path(index.model)
    if not source.is_dir():
        raise FileNotFoundError(
            f"The model {index.model!r} of the index {str(index.folder)!r} is gone. Name it on the Hub "
            "(model=..., --model)."
        )
    (draft / MODEL_FOLDER).mkdir()
    for name in files_to_push(source).names:
        shutil.copyfile(source / name, draft / MODEL_FOLDER / name)
    return {"model": f"./{MODEL_FOLDER}", "revision": None}


def _copy_shard(index: Index, shard: int, draft: Path) -> str:
    """Copy embeddings and items of a shard; the hash of the items."""
    file_format = index.stored.manifest["settings"]["file_format"]
    info, errors = read_info(index.folder, shard, file_format)
    if errors:
        unnamed = [error._replace(id=str(error.row), message="could not be embedded") for error in errors]
        write_shard(draft, file_format, info, read_shard(index.folder, shard, file_format), unnamed)
    else:
        for path in shard_files(index.folder, shard, file_format):
            shutil.copyfile(path, draft / path.name)
    content_hash = index.description["items"][shard]
    items = read_items(index.folder, shard, content_hash, range(info.num_rows))
    items = [_with_own_picture(item, draft) for item in items]
    return write_items(draft, shard, items, read_seen_hashes(index.folder, shard, content_hash))


def _with_own_picture(item: Item, draft: Path) -> Item:
    if item.image is None:
        return item
    remedy = "Run puma-hf index again, which leaves out what is gone, and copy it then."
    try:
        name = keep_picture(draft, Path(item.image).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{item.image!r}, the picture of item {shown(item.id)}, is gone. {remedy}") from error
    except OSError as error:
        raise ValueError(
            f"{item.image!r}, the picture of item {shown(item.id)}, cannot be copied ({error}). {remedy}"
        ) from error
    # Pictures of an index are named by their content; others are known by their state.
    is_own = item.image_state is None
    if Path(item.image).name != Path(name).name if is_own else image_state(item.image) != item.image_state:
        raise ValueError(
            f"{item.image!r}, the picture of item {shown(item.id)}, changed after it was indexed, so its embedding is "
            "of another one. Run puma-hf index again, which embeds it anew, and copy it then."
        )
    return replace(item, image=name, image_state=None)
