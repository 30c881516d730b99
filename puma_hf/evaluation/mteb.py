"""PUMA models in MTEB: images reach the model, and so do the tasks' instructions.

Given a directory's name or a `SentenceTransformer`, mteb takes the model for one of text alone and leaves instructions
out. It has no place to register a model of one's own; its entry is made by `puma_model_meta` and passed to
`mteb.evaluate`.

Sources: MTEB (Muennighoff et al., EACL 2023, arXiv 2210.07316); MIEB (Xiao et al., ICCV 2025, arXiv 2504.10471);
M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.data.tasks import MBEIR_INSTRUCTIONS, MBEIRTask

if TYPE_CHECKING:
    from mteb.models import ModelMeta

# MIEB's names of M-BEIR's 16 rows.
MTEB_TASKS: dict[str, MBEIRTask] = {
    "VisualNewsT2IRetrieval": MBEIRTask(0, "visualnews"),
    "MSCOCOT2IRetrieval": MBEIRTask(0, "mscoco"),
    "Fashion200kT2IRetrieval": MBEIRTask(0, "fashion200k"),
    "WebQAT2TRetrieval": MBEIRTask(1, "webqa"),
    "EDIST2ITRetrieval": MBEIRTask(2, "edis"),
    "WebQAT2ITRetrieval": MBEIRTask(2, "webqa"),
    "VisualNewsI2TRetrieval": MBEIRTask(3, "visualnews"),
    "MSCOCOI2TRetrieval": MBEIRTask(3, "mscoco"),
    "Fashion200kI2TRetrieval": MBEIRTask(3, "fashion200k"),
    "NIGHTSI2IRetrieval": MBEIRTask(4, "nights"),
    "OVENIT2TRetrieval": MBEIRTask(6, "oven"),
    "InfoSeekIT2TRetrieval": MBEIRTask(6, "infoseek"),
    "FashionIQIT2IRetrieval": MBEIRTask(7, "fashioniq"),
    "CIRRIT2IRetrieval": MBEIRTask(7, "cirr"),
    "OVENIT2ITRetrieval": MBEIRTask(8, "oven"),
    "InfoSeekIT2ITRetrieval": MBEIRTask(8, "infoseek"),
}

_MODALITIES = ("image", "text")  # images first, as the backbone's prompt has them
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".py", ".txt")


def puma_model_meta(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ModelMeta:
    """The entry of a PUMA model for `mteb.evaluate`, with images and with the tasks' instructions.

    A task's prompt becomes the instruction of its queries; candidates have none. Inputs of image and text stay
    together.

    mteb's main score of M-BEIR's tasks is nDCG@10. `mbeir_scores` reads from its results what papers on M-BEIR report.
    The prompts of 5 of the 16 tasks are not the first wordings of M-BEIR, one is that of another task;
    `mbeir_prompts` has the first wordings. mteb has no pool of all tasks; for that, see `evaluate_mbeir`.

    Args:
        name_or_path: A directory, or an id on the Hub.
        revision: Commit on the Hub. mteb files results by it; without, the results of all commits are one. A
            directory's is a hash of its files, so that a changed model is evaluated anew.
        prompts: Instructions by name of the mteb task, in place of the tasks' own. They are part of what mteb files
            results by.
        trust_remote_code: Whether code from the Hub may run, which a PUMA model there needs. A directory of yours is
            trusted.

    Returns:
        A `mteb.models.ModelMeta`; `.load_model()` opens the model.

    Raises:
        ImportError: If mteb is not installed.
        FileNotFoundError: If the name is neither a directory nor an id on the Hub.

    Example:
        >>> import mteb  # doctest: +SKIP
        >>> meta = puma_model_meta("puma-demo", prompts=mbeir_prompts())  # doctest: +SKIP
        >>> result = mteb.evaluate(meta, mteb.get_tasks(["CIRRIT2IRetrieval"]))  # doctest: +SKIP
        >>> ndcg_at_10 = result.task_results[0].get_score()  # doctest: +SKIP
        >>> hit_at_5 = mbeir_scores(result)["cirr_task7"]  # doctest: +SKIP
    """
    folder = Path(name_or_path).expanduser()
    name = str(name_or_path)
    # Not in loader_kwargs, which mteb writes into its results: they need not tell whose directory it was.
    loader = partial(_load, source=name, commit=revision, trust_remote_code=trust_remote_code)
    if folder.is_dir():
        folder = folder.resolve()
        loader = partial(_load, source=str(folder), commit=None, trust_remote_code=True)
        name, revision = f"local/{folder.name}", revision or _revision(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'organisation/name'")
    entry: ModelMeta = _meta_class().create_empty(
        overwrites={
            "loader": loader,
            "name": name,
            "revision": revision,
            "modalities": ["text", "image"],
            "framework": ["Sentence Transformers", "PyTorch"],
            "similarity_fn_name": _import_mteb().models.model_meta.ScoringFunction.COSINE,
            "use_instructions": True,
            "experiment_kwargs": {"prompts": dict(prompts)} if prompts else None,
        }
    )
    return entry


def mbeir_prompts() -> dict[str, str]:
    """The first wording of M-BEIR's instruction of each of the 16 tasks, by mteb's name of the task.

    Example:
        >>> mbeir_prompts()["MSCOCOT2IRetrieval"]
        'Find me an everyday image that matches the given caption.'
    """
    return {name: MBEIR_INSTRUCTIONS[f"mbeir_{task.name}"] for name, task in MTEB_TASKS.items()}


def mbeir_scores(result: Any) -> dict[str, float]:
    """What papers on M-BEIR report, from mteb's results: hit@10 on the two fashion datasets, else hit@5.

    Args:
        result: What `mteb.evaluate` returned; tasks that are not M-BEIR's are passed over.

    Returns:
        A number between 0 and 1 for each task, by M-BEIR's name of it, such as "cirr_task7".

    Example:
        >>> list(mbeir_scores(mteb.evaluate(meta, mteb.get_tasks(["CIRRIT2IRetrieval"]))))  # doctest: +SKIP
        ['cirr_task7']
    """
    scores = {}
    for task_result in result.task_results:
        task = MTEB_TASKS.get(task_result.task_name)
        if task is not None:
            (subset,) = task_result.scores["test"]
            scores[task.name] = float(subset[f"hit_rate_at_{task.reported_k}"])
    return scores


class PumaEncoder:
    """A `SentenceTransformer` as mteb calls it.

    Args:
        model: The model.
        prompts: Instructions by name of the mteb task, in place of the tasks' own.
    """

    mteb_model_meta: Any = None  # set by mteb when it has opened the model

    def __init__(self, model: SentenceTransformer, prompts: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.prompts = dict(prompts or {})

    @torch.no_grad()
    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[Any]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Embed the batches of a task.

        Args:
            inputs: Batches with the columns "text", "image", or both.
            task_metadata: What mteb knows of the task; its prompt is the instruction of queries.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: "query", "document", or None where a task has but one kind of input.
            show_progress_bar: Whether to show how many batches are done.
            kwargs: Arguments of `SentenceTransformer.encode`, such as `batch_size`.

        Returns:
            float32 embeddings on the CPU, `(num_inputs, embedding_dim)`.

        Raises:
            ValueError: If an input has neither text nor image.
        """
        # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
        options = {**kwargs, "prompt": self.instruction(task_metadata, prompt_type), "show_progress_bar": False}
        embeddings = [
            torch.as_tensor(self.model.encode(list(_model_inputs(batch, task_metadata.name)), **options)).float().cpu()
            for batch in tqdm(inputs, desc=task_metadata.name, disable=not show_progress_bar)
        ]
        return torch.cat(embeddings)

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The instruction of a task's queries, or of its inputs if there is but one kind; "" for candidates."""
        kind = getattr(prompt_type, "value", prompt_type)
        if kind == "document":
            return ""
        prompt = self.prompts.get(task_metadata.name, task_metadata.prompt)
        return (prompt.get(kind) if isinstance(prompt, Mapping) else prompt) or ""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of every embedding with every other, `(num_embeddings1, num_embeddings2)`."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of each pair of embeddings, `(num_embeddings,)`."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _load(
    model_name: str,
    revision: str | None,
    *,
    source: str,
    commit: str | None,
    embed_dim: int | None = None,
    prompts: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> PumaEncoder:
    """Open a model, as mteb asks for it; the name and the revision are those that it files results by."""
    return PumaEncoder(SentenceTransformer(source, revision=commit, truncate_dim=embed_dim, **kwargs), prompts)


def _model_inputs(batch: Mapping[str, Sequence[Any]], task: str) -> Iterator[dict[str, Any]]:
    columns = [name for name in _MODALITIES if name in batch]
    if not columns:
        raise ValueError(f"the inputs of {task} have the columns {sorted(batch)}; PUMA takes text and image from mteb")
    for row in zip(*(batch[name] for name in columns), strict=True):
        values = dict(zip(columns, row, strict=True))
        known = {name: value for name, value in values.items() if not (value is None or value == "")}
        if not known:
            raise ValueError(f"an input of {task} has neither text nor image, only {values}; leave it out of the task")
        yield known


def _unit(embeddings: Any) -> Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(embeddings).float(), dim=-1)


def _revision(folder: Path) -> str:
    """SHA-256 of the files that the model in a directory, and in the folders of its modules, is made of."""
    digest = hashlib.sha256()
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    places = {"", *(module["path"] for module in modules)}
    for path in sorted(path for place in places for path in (folder / place).glob("*")):
        if path.is_file() and path.suffix in _MODEL_FILES:
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@cache
def _meta_class() -> Any:
    model_meta = _import_mteb().models.ModelMeta

    class PumaModelMeta(model_meta):  # type: ignore[misc, valid-type]
        """mteb asks for torchvision wherever a model takes images; ours are read by Pillow."""

        def _resolve_extras_groups(self) -> list[str]:
            return [group for group in super()._resolve_extras_groups() if group != "image"]

    return PumaModelMeta


def _import_mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ImportError("mteb is not installed; run `pip install 'puma-hf[mteb]'`") from error
    return mteb
