"""Every setting of every command: one dataclass a command, read from YAML, from flags and from Python alike.

The help of a field is its line under `Args`: `puma-hf COMMAND --help` prints it. Nothing heavy is imported here, so
that it stays quick. What the losses can be set to lives with the losses, which travel to the Hub without this file.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puma_hf.configs_training import *  # noqa: F403 - the settings of training, which are exported from here
from puma_hf.files import is_hub_id
from puma_hf.settings import CheckedConfig, Decode, SpecialTokens, option, parse_numbers, positional

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
OnError = Literal["raise", "skip", "zero"]
Pool = Literal["local", "global", "both"]
Target = Literal["any", "text", "image"]
Backend = Literal["exact", "ann", "torch", "faiss"]
AnnKind = Literal["none", "hnsw", "int8", "binary"]
ExportFormat = Literal["stock", "onnx"]

RESCORE_MULTIPLIER = 50
FIRST_PORT = 7860  # where Gradio's pages are, and what a Space shows

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_parameters(value: str | int | float) -> int:
    """A number of parameters, as people write it; a ValueError if it is none, or below 1.

    Example:
        >>> parse_parameters("1.5B"), parse_parameters("800M"), parse_parameters(4e9)
        (1500000000, 800000000, 4000000000)
    """
    text, number = str(value).strip().upper(), 0
    with suppress(ValueError, OverflowError):
        number = round(float(text.rstrip("KMBG")) * _UNITS.get(text[-1:], 1))
    if number < 1:
        raise ValueError(f"max_params={value!r} must be a number of parameters. Write it as 4B, 800M or 300000.")
    return number


def parse_limits(value: str) -> tuple[int, ...]:
    """Pixel limits that are separated by commas, the largest first; a ValueError if one is none, or comes twice.

    Example:
        >>> parse_limits("50000,235200")
        (235200, 50000)
    """
    wanted = "must be different numbers of pixels, each at least 784, such as 50000,100000,235200"
    return parse_numbers("max_pixels", value, 28 * 28, wanted)[::-1]


@dataclass(frozen=True, kw_only=True)
class PruneConfig(CheckedConfig):
    """Keep the first layers of a model and write a directory that AutoModel and SentenceTransformer open.

    Example: puma-hf prune Qwen/Qwen2-VL-2B-Instruct puma-k14 --num-kept-layers 14

    Args:
        source: Folder or Hub id of a Qwen2-VL, 2.5-VL, 3-VL or Qwen3.5, of an embedder made from one, or of a PUMA
            directory to cut further.
        output_dir: New directory for the model.
        num_kept_layers: Decoder layers to keep, from the input.
        keep_layers: Instead, which layers to keep, such as 0-10,27.
        dtype: Data type of the weights, such as bfloat16; auto is what they are stored in.
        max_pixels: Images are scaled down to so many; or source, for the source's limit. By default that, but of a
            generative model at most 300 visual tokens.
        reading: How inputs are read: as the source reads them, if it is an embedder, or with [RET] and this library's
            prompt, or that of PUMA's authors with its plain positions. Found out and told by default.
    """

    source: str = positional()
    output_dir: str | Path = positional(flag="output")
    num_kept_layers: int | None = None
    keep_layers: str | None = None
    dtype: str = "auto"
    max_pixels: str | None = None  # a number, or a word
    reading: Literal["source", "puma", "puma-released", "qwen3-vl-embedding", "gme", "lamra"] | None = None
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(CheckedConfig):
    """Tell what a recipe takes before anything is downloaded: memory, operations, and hours on the GPUs we know.

    Example: puma-hf estimate --config configs/qwen2_vl_7b_stage2.yaml --num-gpus 4

    Args:
        recipe: Recipe of distill or train.
        model: Directory, config.json, or Qwen/Qwen2-VL-7B-Instruct; default: the recipe's.
        num_kept_layers: Decoder layers that are kept of it.
        gpu: Such as 'RTX 4090'; default: a table of all that are known.
        num_gpus: Devices that the run is started on.
        tokens: Length that rows are padded to; default: max_length.
        images: Images of a row, over all columns.
        rows: Rows of the data, where they are not known.
    """

    recipe: str | Path = field(metadata={"flag": "config"})
    model: str | Path | None = None
    num_kept_layers: int | None = None
    gpu: str | None = None
    num_gpus: int = 1
    tokens: int | None = None
    images: float | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(CheckedConfig):
    """Embed a corpus into files of vectors with ids; stopped at any point, it goes on.

    Example: puma-hf embed photos --model puma-k14-mac --output embeddings

    Args:
        data: A folder of images; a .txt, .jsonl, .json, .csv, .tsv or .parquet with columns among id, text, image and
            instruction; or a folder in M-BEIR's layout, whose pool is embedded.
        model: PUMA directory, here or on the Hub.
        output: Directory of the embeddings; a run that was stopped goes on from there.
        split: Split of a folder in M-BEIR's layout.
        pool: Its pool: global, or that of a task, such as webqa_task1.
        prompt: Instruction for every input that brings none of its own.
        precision: Numbers that are stored; binary and ubinary pack 8 dimensions a byte.
        calibration_size: Inputs, drawn at random, that int8 and uint8 are scaled by.
        on_error: On an input that cannot be read: raise; skip, which leaves it out; or zero, which stores zeros.
        format: Files to write; safetensors has the ids in a Parquet file beside.
        shard_size: Inputs a file; their embeddings, and those of 4,096 more, are in memory at a time.
        max_batch_tokens: Tokens of a batch; default: by device.
        num_workers: Processes that read and prepare inputs; default: by device.
        dtype: Data type of the weights; auto is what they are stored in.
        fast: Pack inputs without padding, among other savings; off, they are padded.
    """

    data: str | Path = positional()
    model: str
    output: str | Path
    split: str = "test"
    pool: str = "global"
    prompt: str | None = None
    truncate_dim: int | None = option(None, at_least=1)
    # Numbers on the disk: int8 is a quarter of float32 and needs the range of each dimension from a sample first.
    precision: Precision = "float32"
    calibration_size: int = option(1024, at_least=2)
    on_error: OnError = "raise"
    special_tokens: SpecialTokens = "raise"
    max_pixels: int | None = option(None, at_least=28 * 28)
    decode: Decode | None = None
    format: Literal["parquet", "safetensors"] = "parquet"
    # Memory: a killed run loses a minute at most, whatever the size.
    shard_size: int = option(10_000, at_least=1)
    max_batch_tokens: int | None = option(None, at_least=1)
    num_workers: int | None = option(None, at_least=0)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    fast: bool = True
    num_kept_layers: int | None = option(None, at_least=1)
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class _BenchmarkSettings(CheckedConfig):
    """What measures on M-BEIR has.

    Args:
        tasks: Tasks such as webqa_task1; repeat for more. Default: all of the split.
        pool: Each task's own pool, that of all tasks, or both.
        batch_size: Inputs per forward pass.
        nano_queries: Queries a task of a small, seeded subset; 0 for all.
        nano_candidates: Candidates a task, all relevant ones among them; 0 for all.
        nano_seed: Seed of that choice.
    """

    model: str | Path = positional()
    data: str | Path
    tasks: tuple[str, ...] = ()
    batch_size: int = option(32, at_least=1)
    output: str | Path | None = None
    # All relevant candidates stay among fewer others, so that figures are higher than those of the whole.
    nano_queries: int = option(200, at_least=0)
    nano_candidates: int = option(2000, at_least=0)
    nano_seed: int = option(0, at_least=0)
    special_tokens: SpecialTokens = "raise"
    decode: Decode | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_BenchmarkSettings):
    """Measure hit@k, recall@k, nDCG@10, MRR and wrong modalities on M-BEIR, or on data in its layout.

    Example: puma-hf evaluate puma-k14-mac --data M-BEIR --output results

    Args:
        model: PUMA directory, or any SentenceTransformer here or on the Hub.
        data: Folder in M-BEIR's layout, folder of parquet copies, or a Hub id (mteb/mbeir_cirr_task7, or mteb for all).
        benchmark: mbeir: all of the data; nano: a fixed, seeded subset, quick enough to train by.
        split: Split to evaluate.
        output: Directory for results, run files and embeddings; a run that was stopped goes on from there.
        instruction_seed: Draws one wording of the instruction a query; default: always the first wording.
        candidates_model: Embeds the candidates in place of the model, whose queries then search its vectors, such as
            the teacher that it was distilled towards; the overlap of their best ten is reported, too.
        candidates_output: Output of an evaluation of that model, whose embeddings are used and added to; default:
            candidates in the output.
        query_layers: Embed the queries after so many layers, and the candidates after others of the same model.
        candidate_layers: Embed the candidates after so many layers. Of query_layers and this, one that is not given is
            num_kept_layers.
        popularity_penalty: Also report figures less this share, such as 0.2, of a candidate's mean similarity to all
            queries of its task, as PUMA's released code has it. Transductive: no query can be answered alone.
        nano_folder: Where the nano benchmark is kept for other runs; default: nano in the output.
        embedding_dtype: Data type that embeddings are stored in; two bytes halve the disk space.
        search_backend: Kept for older recipes: torch and faiss are one search.
        data_revision: Branch, tag or commit of data on the Hub.
    """

    model: str = positional()
    benchmark: Literal["mbeir", "nano"] = "mbeir"
    split: str = "test"
    pool: Pool = "both"
    # M-BEIR has several wordings of each instruction.
    instruction_seed: int | None = option(None, at_least=0)
    candidates_model: str | None = None
    candidates_output: str | Path | None = None
    query_layers: int | None = option(None, at_least=1)
    candidate_layers: int | None = option(None, at_least=1)
    popularity_penalty: float | None = option(None, at_least=0, at_most=1)
    nano_folder: str | Path | None = None
    embedding_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    search_backend: Literal["torch", "faiss"] = "torch"
    truncate_dim: int | None = option(None, at_least=1)
    max_pixels: int | None = option(None, at_least=28 * 28)
    num_kept_layers: int | None = option(None, at_least=1)
    revision: str | None = None
    data_revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates_model is not None and (self.query_layers or self.candidate_layers):
            given = f"query_layers={self.query_layers} and candidate_layers={self.candidate_layers}"
            problem = f"candidates_model={self.candidates_model!r} is another model, {given} are depths of one"
            raise ValueError(f"{problem}. Leave out one of both.")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(_BenchmarkSettings):
    """Choose k: measure every depth of a model in one pass, with its parameters and operations.

    Example: puma-hf sweep Qwen/Qwen2-VL-2B-Instruct --data M-BEIR --max-params 1.5B --output sweep

    Args:
        model: The full model: folder or Hub id of an original Qwen-VL (2 to 3.5), or of a PUMA directory.
        data: Folder in M-BEIR's layout, or what else evaluate takes as --data.
        split: Split to measure on; choose k on val, and report test.
        pool: Each task's own pool, that of all tasks, or both; with both, local decides.
        metric: Quality that decides; score is hit@5, and hit@10 on fashion datasets.
        compare: Further models, such as a distilled PUMA directory, swept beside the full. Of one that was trained at
            several depths (distill --depths), these are measured, and pairs of a query's depth and a candidate's.
        distilled: Models that were distilled for one depth each: together one curve, with a point of each.
        output: Directory for sweep.json, sweep.md and sweep.png.
        max_params: Budget of parameters for the recommendation, such as 4B or 800M.
        keep: Share of the full model's quality that k must keep.
        max_query_ms: Milliseconds that a text query may take on this machine, for the recommended pair of depths.
        keep_last: Measure the first k - 1 layers with the last one, too, for every k.
        max_pixels: Limits of an image's pixels to measure every k at, such as 50000,100000,235200; the largest is what
            the others are compared with. The recommendation then goes by an image's operations, not by parameters.
    """

    split: str = "val"
    pool: Pool = "local"
    metric: Literal["score", "hit@1", "hit@5", "hit@10", "ndcg@10", "mrr@10"] = "score"
    compare: tuple[str, ...] = ()
    distilled: tuple[str, ...] = ()
    # The recommendation: the smallest k within the budget that keeps so much of the full model's quality.
    max_params: str | None = None
    keep: float = option(0.97, above=0, at_most=1)
    max_query_ms: float | None = option(None, above=0)
    keep_last: bool = False
    max_pixels: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_params is not None:
            parse_parameters(self.max_params)
        if self.max_pixels is not None:
            parse_limits(self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EmbedConfig):
    """Make an index of pictures and texts to search in; run again, it takes in what changed.

    Example: puma-hf index photos --model puma-k14-mac --output photos-index

    Args:
        model: PUMA directory, here or on the Hub; needed by the first run, which the index remembers.
        output: Directory of the index; a run that was stopped goes on from there.
        on_error: On an input that cannot be read: raise; or skip, which leaves it out.
        precision: Numbers that are stored: float32; or float16, half as large.
        shard_size: Inputs embedded between two writes; a run that is killed loses at most these.
        calibration_size: Not used by an index.
        format: Not used by an index, which is a table of LanceDB.
        ann: Add an index for approximate search (--backend ann): hnsw is quickest, int8 misses least, binary is
            smallest; none removes it. By default it stays what it is.
    """

    model: str = ""
    on_error: Literal["raise", "skip"] = "skip"  # zeros in an index would be an answer to no query
    precision: Literal["float32", "float16"] = "float32"
    shard_size: int = option(4096, at_least=1, at_most=4096)
    # Exact search compares every vector; approximate search reads fewer, and may miss some.
    ann: AnnKind | None = None


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CheckedConfig):
    """Search an index by words, by a picture, or by both.

    Example: puma-hf search photos-index "a red apple" --for image --html answers.html

    Args:
        index: Directory that puma-hf index has written.
        query: What to look for, in words.
        image: Picture to look for, or that the words are about.
        target: What answers may be: texts, pictures (with or without text), or any.
        top: Answers to show.
        instruction: What the query asks for, in the words that the model was trained with.
        json: Print the answers as JSON.
        html: File for a page of the answers, with small pictures inside.
        model: The model that made the index, if it is no longer where it was.
        query_model: A smaller model for the query, if it was distilled towards the one that made the index.
        num_kept_layers: Decoder layers that are run for the query, another trained depth of the model that made the
            index. Default: as many as for the index; or all of a query model.
        backend: exact; or ann, approximate, for an index made with --ann. torch and faiss are old words for exact.
        rescore_multiplier: With --backend ann: how many items are compared exactly for each answer that is shown.
    """

    index: str | Path = positional()
    query: str | None = field(default=None, metadata={"positional": True})
    image: str | Path | None = None
    # `for` is a keyword of Python.
    target: Target = field(default="any", metadata={"flag": "for"})
    top: int = option(10, at_least=1)
    instruction: str | None = None
    json: bool = False
    html: str | Path | None = None
    model: str | None = None
    query_model: str | None = None
    num_kept_layers: int | None = option(None, at_least=1)
    backend: Backend = "exact"
    rescore_multiplier: int = option(RESCORE_MULTIPLIER, at_least=1)
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class AppConfig(CheckedConfig):
    """Search an index on a page in the browser, or write that page as a Space of the Hub.

    Example: puma-hf app photos-index

    Args:
        index: Directory that puma-hf index has written.
        host: Address to serve at. The default is seen from this machine alone; 0.0.0.0 from all others, too.
        port: Port to serve at; 0 for any. Default: 7860, or the next that is free.
        instruction: What queries ask for, in the words that the model was trained with; can be changed on the page.
        top: Answers to show.
        max_upload_mb: Megabytes that the file of a picture may have.
        open_browser: Open the page in a browser.
        space: New directory for a Space of the Hub that shows this page; written instead of serving.
        model: The model that made the index, if it is no longer where it was; of a Space, its name on the Hub.
        query_model: As for puma-hf search; not in a Space.
        num_kept_layers: As for puma-hf search.
        backend: As for puma-hf search.
    """

    index: str | Path = positional()
    # Whoever reaches the page may search and upload: nobody but this machine, unless asked for.
    host: str = "127.0.0.1"
    port: int | None = option(None, at_least=0, at_most=65535)
    instruction: str | None = None
    top: int = option(24, at_least=1, at_most=200)
    # A picture is decoded in memory, where it is many times larger than its file.
    max_upload_mb: float = option(10.0, above=0, at_most=1000)
    open_browser: bool = False
    space: str | Path | None = None
    model: str | None = None
    query_model: str | None = None
    num_kept_layers: int | None = option(None, at_least=1)
    backend: Backend = "exact"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckedConfig):
    """Write a model as a plain Qwen-VL checkpoint of fewer layers, for programs such as vLLM, or as ONNX.

    Example: puma-hf export puma-k14-mac puma-k14-stock

    Args:
        source: PUMA directory, here or on the Hub.
        output: New directory for the plain checkpoint.
        format: stock: a Qwen-VL checkpoint of fewer layers, without code; onnx: a graph that embeds texts.
        num_kept_layers: Decoder layers to export, from the input; default: all that the model has.
    """

    source: str = positional()
    output: str | Path = positional()
    format: ExportFormat = "stock"
    num_kept_layers: int | None = option(None, at_least=1)
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PushConfig(CheckedConfig):
    """Publish a directory on the Hub, after it was loaded where puma_hf is not installed.

    Example: puma-hf push puma-k14-mac org/puma-k14 --dry-run

    Args:
        directory: A PUMA directory, or the directory of a trained LoRA adapter.
        repo_id: Repository on the Hub, such as org/name; it is made if need be.
        num_kept_layers: Push a copy that is cut to so many layers.
        depth_branches: Also push a copy of each trained depth below, to branches k4, k8 and so on.
        private: Make the repository private; default: as the organisation has it.
        revision: Branch to push to, made if need be; default: main.
        create_pr: Open a pull request instead of writing to the branch.
        dry_run: Check and load everything, list files, bytes and the card, and upload nothing.
        message: Message of the commit.
        results: results.json, train.yaml or distill.yaml for the card; default: those found beside the model.
        base_model: Hub id of what the model was made from, or that an adapter belongs to.
        license: Licence of the model in the Hub's spelling, such as apache-2.0.
        base_license: Licence of what it was made from, for the card.
        data_license: Licence of the data it was trained on, for the card.
        datasets: Hub id of a dataset it was trained on.
    """

    directory: str | Path = positional()
    repo_id: str = positional()
    num_kept_layers: int | None = option(None, at_least=1)
    depth_branches: bool = False
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    # An upload cannot be taken back from those who have seen it.
    dry_run: bool = False
    message: str | None = None
    results: tuple[str, ...] = ()
    base_model: str | None = None
    license: str | None = None
    # Nobody but the author knows these; without them the card says that they are not known.
    base_license: str | None = None
    data_license: str | None = None
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.repo_id, self.base_model, *self.datasets):
            if name is not None and not is_hub_id(name):
                raise ValueError(f"{name!r} must be a Hub id of the form organisation/name.")
        if self.depth_branches and self.create_pr:
            problem = "depth_branches=True writes branches, and create_pr=True none"
            raise ValueError(f"{problem}. Leave one out, or push one depth alone: --num-kept-layers 4 --create-pr.")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CheckedConfig):
    """Compare a model's forms: by both loaders, padded, saved again, in bfloat16, exported, merged.

    Example: puma-hf check puma-k14-mac-lora --merged puma-k14-mac

    Args:
        directory: PUMA directory, or one of an adapter. Its code is run.
        merged: PUMA directory that the adapter was merged into; default: it is merged for the check.
        base: PUMA directory that the adapter was trained on; default: the one it names.
        exported: Directory that puma-hf export wrote; default: the model is exported for the check.
        source: Embedder that this is a copy of with all layers; both are compared by stock classes.
        num_kept_layers: Check a copy that is cut to so many layers, and compare it with the model opened at that depth.
        seed: Draws the texts and pictures.
        device: Device that the model runs on, such as cuda; bounds are for float32 on it.
    """

    directory: str | Path = positional()
    merged: str | Path | None = None
    base: str | Path | None = None
    exported: str | Path | None = None
    source: str | Path | None = None
    num_kept_layers: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0)
    device: str = "cpu"
