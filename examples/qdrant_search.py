"""Put an index into Qdrant, in a folder or on a server, and search it there.

    pip install 'puma-hf[qdrant,search]'
    puma-hf index photos --model puma-2b --output photos-index
    python examples/qdrant_search.py photos-index "a red apple" --for image --path photos.qdrant
    python examples/qdrant_search.py photos-index "a red apple" --url http://localhost:6333  # not run by our tests

Run it again when the index was made again: items are added, replaced and removed by their ids, which must differ.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, MatchAny, MatchValue, PointStruct, VectorParams

from puma_hf.search import Index, Query, open_index, open_searcher

MODALITIES = {"text": ["text"], "image": ["image", "image,text"]}


def points(index: Index) -> Iterator[PointStruct]:
    """The items of an index."""
    columns = ["id", "modality", "text", "image", "vector"]
    for batch in index.table.search().select(columns).limit(len(index)).to_batches(1000):
        for row in batch.to_pylist():
            vector = row.pop("vector")
            name = str(uuid.uuid5(uuid.NAMESPACE_URL, row["id"]))  # Qdrant takes numbers and UUIDs alone
            yield PointStruct(id=name, vector=vector, payload={**row, "version": index.table.version})


def update(index: Index, client: QdrantClient, name: str = "items") -> None:
    """Make the collection hold what the index holds."""
    ids = index.table.search().select(["id"]).limit(len(index)).to_arrow()["id"]
    if len(ids.unique()) < len(index):
        raise SystemExit(f"Ids repeat in {index.folder}. Give every item one of its own, and make the index again.")
    ours = {"model": index.model, "fingerprint": index.fingerprint}
    if not client.collection_exists(name):
        vectors = VectorParams(size=index.table.schema.field("vector").type.list_size, distance=Distance.COSINE)
        client.create_collection(name, vectors_config=vectors, metadata=ours)
    theirs = client.get_collection(name).config.metadata or {}
    if theirs.get("fingerprint") != index.fingerprint:
        raise SystemExit(f"The collection {name!r} is of another model than {index.model}. Choose a new place.")
    client.upload_points(name, points(index), wait=True)
    current = FieldCondition(key="version", match=MatchValue(value=index.table.version))
    client.delete(name, Filter(must_not=[current]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="directory that puma-hf index has written")
    parser.add_argument("query", nargs="?", help="words to look for")
    parser.add_argument("--image", help="picture to look for, or that the words are about")
    parser.add_argument("--for", dest="target", choices=["any", *MODALITIES], default="any", help="what to find")
    parser.add_argument("--top", type=int, default=10, help="answers to show")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--path", help="directory of the database")
    place.add_argument("--url", help="address of a server")
    args = parser.parse_args(arguments)
    index = open_index(args.index)
    client = QdrantClient(path=args.path) if args.path else QdrantClient(url=args.url)
    try:
        update(index, client)
        vector = open_searcher(index).embed(Query(text=args.query, image=args.image))[0]
        kinds = None
        if args.target != "any":
            kinds = Filter(must=[FieldCondition(key="modality", match=MatchAny(any=MODALITIES[args.target]))])
        for point in client.query_points("items", query=vector, query_filter=kinds, limit=args.top).points:
            found = point.payload or {}
            print(f"{point.score:.4f}", found["modality"], found["id"], found["text"] or found["image"], sep="  ")
    finally:
        client.close()


if __name__ == "__main__":
    main()
