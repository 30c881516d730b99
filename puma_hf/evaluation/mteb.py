"""PUMA models in MTEB: images reach the model, and so do the tasks' instructions.

Given a directory's name or a `SentenceTransformer`, mteb leaves a task's instructions out, and an image without a text
comes as an image and None.

Sources: MTEB (Muennighoff et al., EACL 2023, arXiv 2210.07316); MIEB (Xiao et al., ICCV 2025, arXiv 2504.10471);
M-BEIR (UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from puma_hf.data.tasks import MBEIR_INSTRUCTIONS, MBEIRTask, task_named
from puma_hf.evaluation.results import PUBLISHED
from puma_hf.files import is_hub_id, model_files
from puma_hf.settings import from_extra

if TYPE_CHECKING:
    from mteb.models import ModelMeta

_NAMES = ["VisualNews", "Fashion200k", "WebQA", "EDIS", "NIGHTS", "OVEN", "InfoSeek", "FashionIQ", "CIRR", "MSCOCO"]


def puma_model_meta(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ModelMeta:
    """The entry of a PUMA model for `mteb.evaluate`, with images and with the tasks' instructions.

    A task's prompt becomes the instruction of its queries; candidates have none. mteb's main score of M-BEIR's tasks is
    nDCG@10; `mbeir_scores` reads what papers report. The prompts of 5 of the 16 tasks are not the first wordings of
    M-BEIR, one is that of another task; `mbeir_prompts` has these.

    Args:
        name_or_path: A directory, or an id on the Hub.
        revision: Commit on the Hub. mteb files results by it; without, the results of all commits are one. A
            directory's is a hash of its files, so that a changed model is evaluated anew.
        prompts: Instructions by name of the mteb task, in place of the tasks' own. mteb files results by them, too.
        trust_remote_code: Whether code from the Hub may run, which a PUMA model there needs. A directory's does.

    Raises:
        ImportError: If mteb is not installed, as by `pip install 'puma-hf[mteb]'`.
        FileNotFoundError: If the name is neither a directory nor an id on the Hub.

    Example:
        >>> meta = puma_model_meta("puma-demo", prompts=mbeir_prompts())  # doctest: +SKIP
        >>> result = mteb.evaluate(meta, mteb.get_tasks(["CIRRIT2IRetrieval"]))  # doctest: +SKIP
        >>> hit_at_5 = mbeir_scores(result)["cirr_task7"]  # doctest: +SKIP
    """
    mteb = from_extra("mteb", "mteb")

    class PumaModelMeta(mteb.models.ModelMeta):  # type: ignore[name-defined]
        # mteb asks for torchvision wherever a model takes images; ours are read by Pillow.
        def _resolve_extras_groups(self) -> list[str]:
            return [group for group in super()._resolve_extras_groups() if group != "image"]

    folder, name, commit = Path(name_or_path).expanduser().resolve(), str(name_or_path), revision
    source, is_trusted = name, trust_remote_code
    if folder.is_dir():
        source, commit, is_trusted = str(folder), None, True
        digest = hashlib.sha256()
        for file in model_files(folder):
            with Path(folder, file).open("rb") as content:
                digest.update(file.encode() + hashlib.file_digest(content, "sha256").digest())
        name, revision = f"local/{folder.name}", revision or digest.hexdigest()
    elif not is_hub_id(name):
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'organisation/name'")

    def loader(model_name: str, revision: str | None, *, embed_dim: int | None = None, **options: Any) -> PumaEncoder:
        # mteb asks by the name and the revision that it files results by. Where the model is stays out of
        # loader_kwargs, which mteb writes into its results: they need not tell whose directory it was.
        given: dict[str, Any] = {"revision": commit, "truncate_dim": embed_dim, "trust_remote_code": is_trusted}
        prompts = options.pop("prompts", None)
        return PumaEncoder(SentenceTransformer(source, **given, **options), prompts)

    told: dict[str, Any] = {"loader": loader, "name": name, "revision": revision, "modalities": ["text", "image"]}
    told |= {"framework": ["Sentence Transformers", "PyTorch"], "similarity_fn_name": "cosine"}
    told |= {"use_instructions": True, "experiment_kwargs": {"prompts": dict(prompts)} if prompts else None}
    entry: ModelMeta = PumaModelMeta.create_empty(overwrites=told)
    return entry


@cache
def mteb_tasks() -> dict[str, MBEIRTask]:
    """M-BEIR's 16 rows by MIEB's names of them, such as "CIRRIT2IRetrieval"."""
    names = {name.lower(): name for name in _NAMES}
    tasks = [task for name in PUBLISHED if (task := task_named(name)) is not None]
    return {f"{names[task.dataset]}{task.arrow.upper().replace(' -> ', '2')}Retrieval": task for task in tasks}


def mbeir_prompts() -> dict[str, str]:
    """The first wording of M-BEIR's instruction of each of the 16 tasks, by mteb's name of the task.

    Example:
        >>> mbeir_prompts()["MSCOCOT2IRetrieval"]
        'Find me an everyday image that matches the given caption.'
    """
    return {name: MBEIR_INSTRUCTIONS[f"mbeir_{task.name}"] for name, task in mteb_tasks().items()}


def mbeir_scores(result: Any) -> dict[str, float]:
    """What papers on M-BEIR report, hit@10 on the two fashion datasets, else hit@5, from what `mteb.evaluate` returned.

    The figures, between 0 and 1, are by M-BEIR's name of the task, such as "cirr_task7"; other tasks are passed over.
    """
    scores = {}
    for task_result in result.task_results:
        if task := mteb_tasks().get(task_result.task_name):
            (subset,) = task_result.scores["test"]
            scores[task.name] = float(subset[f"hit_rate_at_{task.reported_k}"])
    return scores


class PumaEncoder:
    """A `SentenceTransformer` as mteb calls it; `prompts` are by name of the task, in place of the tasks' own."""

    mteb_model_meta: Any = None  # set by mteb when it has opened the model

    def __init__(self, model: SentenceTransformer, prompts: Mapping[str, str] | None = None) -> None:
        self.model, self.prompts = model, dict(prompts or {})

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
        """Embed the batches of a task, with the columns "text", "image", or both: `(num_inputs, embedding_dim)`.

        The instruction is the prompt of `task_metadata` for inputs of `prompt_type` "query", or where a task has but
        one kind of input; `kwargs` go to `SentenceTransformer.encode`. mteb gives the rest, which is not needed.
        """
        kind = getattr(prompt_type, "value", prompt_type)
        prompt = "" if kind == "document" else self.prompts.get(task_metadata.name, task_metadata.prompt)
        prompt = prompt.get(kind) if isinstance(prompt, Mapping) else prompt
        # The empty prompt, unlike None, keeps a SentenceTransformer's default prompt away.
        options = {**kwargs, "prompt": prompt or "", "show_progress_bar": False}
        progress = tqdm(inputs, desc=task_metadata.name, disable=not show_progress_bar)
        batches = (self.model.encode(list(_model_inputs(batch)), **options) for batch in progress)
        return torch.cat([torch.as_tensor(rows).float().cpu() for rows in batches])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of every embedding with every other, `(num_embeddings1, num_embeddings2)`."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of each pair of embeddings, `(num_embeddings,)`."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)


def _model_inputs(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    # Images first, as the backbone's prompt has them.
    columns = [name for name in ("image", "text") if name in batch]
    for row in zip(*(batch[name] for name in columns), strict=True):
        # What is missing is left out. A bare string might be opened as a file: it stays in its dict.
        yield {name: value for name, value in zip(columns, row, strict=True) if value is not None and value != ""}
