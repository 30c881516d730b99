"""Put an index into LanceDB, a database in a folder, and search it there.

    pip install 'puma-hf[lancedb]'
    puma-hf index photos --model puma-2b --output photos-index
    python examples/lancedb_search.py photos-index photos.lance "a red apple" --for image

Run it again when the index was made again: items are added, replaced and removed by their ids, which must differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import lancedb
import pyarrow as pa

from puma_hf.search import Index, Query, open_index, open_searcher

MODALITIES = {"text": ("text",), "image": ("image", "image,text")}


def schema_of(index: Index) -> pa.Schema:
    """Columns of the table, and whose embeddings they are."""
    texts = [(name, pa.string()) for name in ("id", "modality", "text", "image")]
    vector = ("vector", pa.list_(pa.float32(), index.stored.embedding_dim))
    return pa.schema([*texts, vector], metadata={"model": index.model, "fingerprint": index.fingerprint})


def batches(index: Index, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The items of an index, a shard at a time; what is stored as integers or bits becomes numbers again."""
    start = 0
    for shard in index.stored.shards():
        items = index.items(range(start, start + len(shard.ids)))
        vectors = pa.array(index.stored.to_float(shard.embeddings).ravel())
        columns = [[getattr(item, name) for item in items] for name in schema.names[:-1]]
        vector = pa.FixedSizeListArray.from_arrays(vectors, index.stored.embedding_dim)
        yield pa.RecordBatch.from_arrays([*map(pa.array, columns, schema.types[:-1]), vector], schema=schema)
        start += len(shard.ids)


def update(index: Index, folder: str, name: str = "items") -> lancedb.table.Table:
    """Make the table hold what the index holds, in one transaction."""
    if len(set(index.stored.ids())) < len(index):
        raise SystemExit(f"Ids repeat in {index.folder}. Give every item one of its own, and make the index again.")
    schema = schema_of(index)
    database = lancedb.connect(folder)
    is_there = name in database.list_tables().tables
    table = database.open_table(name) if is_there else database.create_table(name, schema=schema)
    if (table.schema.metadata or {}).get(b"fingerprint", b"").decode() != index.fingerprint:
        raise SystemExit(f"The table {name!r} is of another model than {index.model}. Choose a new folder.")
    rows = pa.RecordBatchReader.from_batches(schema, batches(index, schema))
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.when_not_matched_by_source_delete().execute(rows)
    table.optimize()  # also removes versions of the table that are older than a week
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="directory that puma-hf index has written")
    parser.add_argument("folder", help="directory of the database")
    parser.add_argument("query", nargs="?", help="words to look for")
    parser.add_argument("--image", help="picture to look for, or that the words are about")
    parser.add_argument("--for", dest="target", choices=["any", *MODALITIES], default="any", help="what to find")
    parser.add_argument("--top", type=int, default=10, help="answers to show")
    args = parser.parse_args(arguments)
    index = open_index(args.index)
    table = update(index, args.folder)
    vector = open_searcher(index).embed(Query(text=args.query, image=args.image))[0]
    found = table.search(vector).distance_type("cosine").limit(args.top)
    if args.target != "any":
        kinds = ", ".join(f"'{kind}'" for kind in MODALITIES[args.target])
        found = found.where(f"modality IN ({kinds})", prefilter=True)
    for row in found.to_list():
        print(f"{1 - row['_distance']:.4f}", row["modality"], row["id"], row["text"] or row["image"], sep="  ")


if __name__ == "__main__":
    main()
