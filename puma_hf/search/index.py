"""An index: a table of LanceDB with an embedding, a text and the path of a picture for each item.

`puma_hf.search.build` writes it, and tags at last the version of the table that a run has come to. What opens an index
opens the tagged version, so it never sees half of a run: of one that goes on, or of one that was killed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma_hf.configs import Target
from puma_hf.files import read_config
from puma_hf.settings import cut, from_extra

TABLE = "items"
ABOUT = "puma_hf"  # metadata of the column of vectors: what the index says of itself
COMPLETE = "complete"  # tag of the version that the last whole run has made
FORMAT = 2
ANN_TYPES = {"hnsw": "IvfHnswSq", "int8": "IvfSq", "binary": "IvfRq"}

_SHOWN = ("id", "text", "image", "modality")
_FILTERS = {"text": "modality = 'text'", "image": "modality != 'text'"}


class Index:
    """What `puma-hf index` has written, as its last whole run left it: a folder with a table of LanceDB.

    The `table` has `id`, `text`, `image`, `modality` and `vector` of every item; `counts` says how many there are of
    each modality, and `description` how to open the model, named `model`, and what the vectors depend on.
    """

    def __init__(self, folder: Path, table: Any) -> None:
        self.folder, self.table, self.named = folder, table, f"The index {str(folder)!r}"
        self.description = about(folder, table)
        self.fingerprint = str(self.description["fingerprint"])  # of the model
        self.model = str(self.description["model"])  # an absolute path, or a Hub id
        kinds = ("image", "image,text", "text")
        self.counts = {kind: count for kind in kinds if (count := int(table.count_rows(f"modality = '{kind}'")))}

    def __len__(self) -> int:
        """Number of items."""
        return sum(self.counts.values())

    @property
    def ann(self) -> str:
        """What approximate search rests on; "none" if there is nothing."""
        there = {one.index_type for one in self.table.list_indices()}
        return next((kind for kind, name in ANN_TYPES.items() if name in there), "none")

    def num_candidates(self, target: Target = "any") -> int:
        """How many items a search may find: "text", "image" (with or without text), or "any"; ValueError if none."""
        texts = self.counts.get("text", 0)
        if found := {"any": len(self), "text": texts, "image": len(self) - texts}[target]:
            return found
        there = ", ".join(f"{count} of {name}" for name, count in self.counts.items())
        problem = f"has no {target} to find, only {there}. Look for 'any' (--for any)."
        if not there:
            problem = "is empty: nothing of its corpus could be embedded, see errors.jsonl in it."
        raise ValueError(f"{self.named} {problem}")

    def nearest(
        self, query: NDArray[np.float32], target: Target = "any", top_k: int = 10, *, rescored: int | None = None
    ) -> list[dict[str, Any]]:
        """The items with the largest cosine, best first: `id`, `text`, `image`, `modality` and `score` of each.

        The query is `(embedding_dim,)`. With `rescored=None` all items are compared; otherwise the approximate index
        proposes `rescored * top_k` of them, which are compared exactly. ValueError if files of the index are gone.
        """
        # The filter comes first: after a search, ten pictures among a million texts might be none.
        asked = self.table.search(query).distance_type("cosine").limit(top_k).select([*_SHOWN, "_distance"])
        asked = asked.bypass_vector_index() if rescored is None else asked.refine_factor(rescored)
        try:
            rows = (asked.where(_FILTERS[target], prefilter=True) if target in _FILTERS else asked).to_list()
        except (RuntimeError, OSError, ValueError) as error:
            problem = f"cannot be read ({cut(str(error))}). Open it again; or delete it and run puma-hf index again."
            raise ValueError(f"{self.named} {problem}") from error
        for row in rows:
            # LanceDB divides by both lengths, so cut vectors and float16 need no scaling.
            row["score"] = 1 - row.pop("_distance")
            # Of a copied picture the path is below the index, which may have been moved.
            row["image"] = None if row["image"] is None else os.path.join(self.folder, row["image"])
        # Whose scores are equal LanceDB gives in any order, and in another one the next time.
        return sorted(rows, key=lambda row: (-row["score"], row["id"]))


def open_index(folder: str | Path) -> Index:
    """Open a directory that `puma-hf index` has written.

    FileNotFoundError if there is none; ValueError if its first run was not finished or another version has made it.
    """
    if (table := open_table(Path(folder))) is None:
        raise FileNotFoundError(f"{str(folder)!r} is no index. Name a directory that puma-hf index has written.")
    if COMPLETE not in table.tags.list():
        problem = f"The index {str(folder)!r} is not finished."
        raise ValueError(f"{problem} Wait for the run that makes it, or start it again.")
    table.checkout(COMPLETE)
    return Index(Path(folder), table)


def open_table(folder: Path) -> Any:
    """The table of an index at its newest version, or None if there is none."""
    # 180 MB, and more than a second to import: only what opens an index pays for it.
    lancedb = from_extra("lancedb", "search")
    if (folder / f"{TABLE}.lance").is_dir():
        return lancedb.connect(str(folder)).open_table(TABLE)
    for name in ("index.json", "manifest.json"):  # whose files a table must not lie beside
        if made := read_config(folder, name):
            problem = f"{str(folder)!r} was made by puma-hf embed, or by an older puma-hf index: it has {name}."
            command = f"puma-hf index {made.get('data', 'DATA')} --model {made.get('model', 'MODEL')} --output NEW"
            raise ValueError(f"{problem} Make it anew: {command}")
    return None


def about(folder: Path, table: Any) -> dict[str, Any]:
    """What an index says of itself; ValueError if another version of puma-hf has made it."""
    metadata = next((field.metadata for field in table.schema if field.name == "vector"), None) or {}
    found: dict[str, Any] = json.loads(metadata.get(ABOUT.encode(), "{}"))
    if (version := found.get("format_version")) != FORMAT:
        problem = f"{str(folder)!r} has a table {TABLE!r} of format {version}, must be {FORMAT} of puma-hf index."
        raise ValueError(f"{problem} Choose another folder, or install the puma-hf that has made it.")
    if str(found["model"]).startswith("."):  # a Space has it inside, and says where from its own folder
        found["model"] = str((folder / found["model"]).resolve())
    return found
