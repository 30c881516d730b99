"""Embed a corpus with Ray Data: files here or in object storage in, parquet files of ids and embeddings out.

    pip install 'puma-hf[ray]'
    python examples/ray_embed.py corpus/ --model puma-2b --output embeddings/ --num-workers 2
    python examples/ray_embed.py s3://bucket/corpus/ --model org/puma-7b --output s3://bucket/embeddings/ \
        --address auto --num-workers 64 --gpus-per-worker 1 --cpus-per-worker 6 --checkpoint s3://bucket/done/

For what `puma-hf embed` is too small for: a corpus that no one disk holds. Ray reads blocks of rows, hands them to
workers that open the model once each, and writes what they return, all at the same time; what is on the way is held
back when a later step is slower, so memory does not grow with the corpus.

DATA is, by `--read`:
    parquet   files or a folder of them (default)
    jsonl     likewise, one object a line
    images    a folder of images, whose paths become their ids
Rows have the columns `id` (strings or integers, each once) and `text`, `image` or both, and may have `instruction`. An
image is a path that every worker sees, a URL, or the bytes of a file, as they are or in the struct of 🤗 Datasets.

The output has the columns `id` and `embedding`, in any order: `pyarrow.parquet.read_table(DIR)` reads all of it. Its
folder must be new, or with `--checkpoint` that of an earlier run with the same checkpoint, model and settings: a run
that was ended then goes on where it was, and a corpus that has grown costs only what is new. Ray notes the ids that are
done, and holds all of them in memory when it goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import pyarrow as pa

logger = logging.getLogger(__name__)

INPUT_COLUMNS = ("text", "image", "instruction")
IMAGE_FILES = ["jpg", "jpeg", "png", "gif", "bmp", "tiff", "webp"]


class Embedder:
    """One worker of Ray: opens the model once, then turns tables of rows into tables of ids and embeddings.

    Args:
        model: Folder or Hub id of a PUMA model.
        device: "cuda" or "cpu".
        num_workers: Processes that decode images ahead of the device.
        options: What `puma_hf.embed` takes besides: `prompt`, `on_error`, `truncate_dim` and so on.
    """

    def __init__(self, model: str, device: str, num_workers: int, options: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model, trust_remote_code=True, device=device)
        self.options = {**options, "num_workers": num_workers, "show_progress_bar": False}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed the rows of a table; with `on_error="skip"` those that cannot be embedded are left out."""
        from puma_hf import embed
        from puma_hf.embedding import BrokenInputError

        ids = rows["id"]
        try:
            result = embed(self.model, inputs_of(rows), **self.options)
        except BrokenInputError as error:
            # The index is that of this table; only the id says which row of the corpus it was.
            raise ValueError(f"the row with id {ids[error.index].as_py()!r}: {error}") from None
        for broken in result.errors:
            logger.warning("the row with id %r was not embedded: %s", ids[broken.index].as_py(), broken.message)
        flat = pa.array(result.embeddings.reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(flat, result.embeddings.shape[1])
        return pa.table({"id": ids.take(pa.array(result.indices)), "embedding": embeddings})


def inputs_of(rows: pa.Table) -> list[dict[str, Any]]:
    """The model's inputs, one a row.

    Raises:
        ValueError: If there is no column `id`, or none with anything to embed.
    """
    present = [name for name in INPUT_COLUMNS if name in rows.column_names]
    if "id" not in rows.column_names or not {"text", "image"} & set(present):
        raise ValueError(
            f"The data has the columns {', '.join(rows.column_names)}; it must have id, and text or image. "
            "Rename yours, for example with Dataset.rename_columns in read_rows of this file."
        )
    return [
        {name: value for name, value in row.items() if value is not None} for row in rows.select(present).to_pylist()
    ]


def read_rows(data: str, kind: str) -> Any:
    """The corpus as a `ray.data.Dataset`, of which nothing has been read yet."""
    import ray

    if kind == "images":
        # Undecoded: the workers of the model decode them, at the size that it asks for.
        files = ray.data.read_binary_files(data, include_paths=True, file_extensions=IMAGE_FILES)
        return files.rename_columns({"path": "id", "bytes": "image"})
    return ray.data.read_json(data) if kind == "jsonl" else ray.data.read_parquet(data)


def start_ray(args: argparse.Namespace) -> None:
    """Join a cluster, or start one on this machine."""
    import ray
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    needed = cpus_needed(args)
    if args.address:
        ray.init(args.address)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers if not told otherwise
        # Ray starts 32 processes for the footers of parquet files, twice with a checkpoint: one machine needs one.
        os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
        # CPUs are how Ray counts, not what it takes: a small machine may say that it has more, and one to spare.
        ray.init(num_cpus=max(os.cpu_count() or 1, needed + 1), include_dashboard=False)
    check_cpus(needed, int(ray.cluster_resources().get("CPU", 0)))
    if args.checkpoint:
        place = args.checkpoint if "://" in args.checkpoint else os.path.abspath(args.checkpoint)
        DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=place, delete_checkpoint_on_success=False
        )


def cpus_needed(args: argparse.Namespace) -> int:
    """CPUs of the workers, one to read and write with, and one that leaves out what a checkpoint names."""
    return int(args.num_workers * args.cpus_per_worker + 1 + bool(args.checkpoint))


def check_cpus(needed: int, there: int) -> None:
    """Refuse what would wait for ever: workers keep their CPUs, so one must be left for those who feed them.

    Raises:
        ValueError: If there are fewer CPUs than needed.
    """
    if there < needed:
        raise ValueError(
            f"The cluster has {there} CPUs, and {needed} are needed: num-workers x cpus-per-worker, one to read and "
            "write with, one more with --checkpoint. Lower --num-workers or --cpus-per-worker, or add machines."
        )


def embed_corpus(args: argparse.Namespace) -> None:
    """Read, embed and write, as one stream."""
    import ray

    options = {
        name: getattr(args, name) for name in ("prompt", "on_error", "truncate_dim", "max_batch_tokens", "max_length")
    }
    rows = read_rows(args.data, args.read).map_batches(
        Embedder,
        fn_constructor_kwargs={
            "model": args.model,
            "device": "cuda" if args.gpus_per_worker else "cpu",
            "num_workers": args.cpus_per_worker - 1,
            "options": options,
        },
        batch_size=args.rows_per_call,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.num_workers),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    # What is there is added to only by who knows what it is: without a checkpoint every id would come twice.
    rows.write_parquet(args.output, mode=ray.data.SaveMode.APPEND if args.checkpoint else ray.data.SaveMode.ERROR)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="file, folder or URL that Ray reads")
    parser.add_argument("--read", choices=("parquet", "jsonl", "images"), default="parquet")
    parser.add_argument("--model", required=True, help="folder that every worker sees, or Hub id")
    parser.add_argument("--output", required=True, help="new folder or URL for the parquet files")
    parser.add_argument("--checkpoint", help="folder or URL where Ray notes the ids that are done, to go on from there")
    parser.add_argument("--address", help="cluster to join, such as auto; by default Ray is started on this machine")
    parser.add_argument("--num-workers", type=int, default=1, help="copies of the model")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="all but one of them decode images")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="1, or 0 to embed on CPUs")
    parser.add_argument("--rows-per-call", type=int, default=2048, help="rows that are sorted by length together")
    parser.add_argument("--prompt", help="instruction for rows that bring none of their own")
    parser.add_argument("--on-error", choices=("raise", "skip", "zero"), default="raise")
    parser.add_argument("--truncate-dim", type=int)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--max-length", type=int)
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    try:
        import ray
    except ImportError as error:
        raise SystemExit("This example needs Ray, which is not installed: pip install 'puma-hf[ray]'.") from error
    try:
        start_ray(args)
        embed_corpus(args)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
