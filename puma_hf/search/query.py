"""Search an index: a query becomes an embedding of the model that made it, compared with all candidates."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from puma_hf.checkpoint import open_sentence_transformer
from puma_hf.configs import RESCORE_MULTIPLIER, Backend, SearchConfig, Target
from puma_hf.embedding.embed import processing_for
from puma_hf.files import write_whole
from puma_hf.fingerprint import exit_fingerprint, model_fingerprint, model_name, noted
from puma_hf.search.answers import Answer, Answers, to_html
from puma_hf.search.index import Index, open_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to look for: words, a picture (PIL, path or bytes), or both; and, as the model was trained, an instruction.

    ValueError if there is nothing to look for.

    Example:

    ```python
    >>> from puma_hf.search import Query

    >>> Query(text="a red apple").model_input()
    {'text': 'a red apple'}
    ```
    """

    text: str | None = None
    image: Any = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not (self.text and self.text.strip()) and self.image is None:
            raise ValueError(f"text={self.text!r} and image=None: nothing to look for. Give words, a picture, or both.")

    def model_input(self) -> dict[str, Any]:
        """The query as one input of a model."""
        text = self.text if self.text and self.text.strip() else None
        values = {"image": self.image, "text": text, "instruction": self.instruction}
        return {name: value for name, value in values.items() if value is not None}


class Searcher:
    """Searches an index with the model that made it, at any trained depth, or with a student of that; ask it often.

    Args:
        index: The index.
        model: The model, as a `SentenceTransformer`, or where it is.
        backend: "exact" ("torch" and "faiss" are old words for it); or "ann", for which `puma-hf index --ann` has
            prepared the index.
        rescore_multiplier: With "ann": how many items are compared exactly for each answer that is wanted.
        query_model: Embeds queries in place of `model`, which is not opened: one that was distilled towards it, or
            towards the same teacher.
        num_kept_layers: Layers of the opened model that a query is embedded after, which may be another depth than the
            index has, if the checkpoint was trained at both. None: as the index was made; or all of a `query_model`.
        trust_remote_code: Run the code of a Hub repository, if the model that is opened is one.

    Raises:
        FileNotFoundError: If there is no model.
        ValueError: If the index was made by another model, or at a depth that was not trained with the query's, or has
            nothing for approximate search; or if `query_model` was not distilled towards that model, or its teacher, by
            another metric than "relational", in its last training.
    """

    def __init__(
        self,
        index: Index,
        model: SentenceTransformer | str,
        *,
        backend: Backend = "exact",
        rescore_multiplier: int = RESCORE_MULTIPLIER,
        query_model: SentenceTransformer | str | None = None,
        num_kept_layers: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if backend == "ann" and len(index) and index.ann == "none":
            remedy = "Run puma-hf index again with --ann hnsw, int8 or binary; or search exactly (--backend exact)."
            raise ValueError(f"{index.named} has nothing for approximate search. {remedy}")
        self.index, self._rescored = index, rescore_multiplier if backend == "ann" else None
        is_other, model = query_model is not None, model if query_model is None else query_model
        if isinstance(model, str):
            if Path(model).is_absolute() and not Path(model).is_dir():
                problem = f"The model {model!r} {'for' if is_other else 'of'} the index {str(index.folder)!r} is gone."
                raise FileNotFoundError(f"{problem} Pass model (--model, --query-model), where it is now.")
            # The data type, too, must be that of the index: in another one the fingerprint is another.
            loading: Any = {"model_kwargs": {"dtype": index.description["dtype"]}}
            loading["revision"] = index.description["revision"] if model == index.model else None
            if num_kept_layers is None and not is_other:
                num_kept_layers = index.description.get("num_kept_layers")
            loading |= {"num_kept_layers": num_kept_layers, "trust_remote_code": trust_remote_code}
            model = open_sentence_transformer(model, **loading).eval()
        elif num_kept_layers not in (None, noted(model, "num_kept_layers")):
            problem = f"num_kept_layers={num_kept_layers} is for a model that is opened here; this one is open already"
            raise ValueError(f"{problem}. Open it with num_kept_layers={num_kept_layers}, or pass where it is.")
        self.model = model
        self._check_space(is_other)

    def _check_space(self, is_other: bool) -> None:
        """A ValueError if this model's embeddings cannot be compared with those of the index."""
        index, about, name = self.index, self.index.description, model_name(self.model)
        depth, made = noted(self.model, "num_kept_layers"), about.get("num_kept_layers")
        teacher = noted(self.model, "teacher_fingerprint")
        fits = is_other and teacher is not None and teacher in (about.get("space"), about.get("teacher"))
        # To hash all weights takes a second for gigabytes; vectors of another model would find nonsense silently.
        fits = fits or (made in (None, depth) and model_fingerprint(self.model) == index.fingerprint)
        differ = made is not None and depth is not None and made != depth
        if not fits and differ and about.get("exits"):
            # What the deeper of the two has below the other's exit must be the other, layer by layer.
            common = min(made, depth)
            theirs = about["exits"].get(str(common))
            fits = theirs is not None and exit_fingerprint(self.model, common) == theirs
        if fits:
            if differ:
                told = "queries are embedded after %d layers, the index %r after %d"
                # What was trained by labels alone may have a space at each depth.
                told += "" if teacher else "; without a teacher nothing has made them alike, so measure it: evaluate"
                logger.info(told, depth, str(index.folder), made)
            return
        older = "" if {"space", "exits"} <= about.keys() else "; run puma-hf index again on an older index"
        if is_other:
            problem = f"query_model {name!r} was not distilled towards {index.model!r}, which made"
            problem += f" {str(index.folder)!r}, and is no other trained depth of that, or was trained since"
            remedy = "Distil it towards that model (puma-hf distill --teacher) and merge, or leave query_model out"
        elif differ:
            problem = f"{index.named} was embedded after {made} layers; {name!r} was not trained to be compared"
            problem += f" with that after {depth}, or is another checkpoint"
            remedy = f"Search after {made} layers, or after one of the trained_depths of {index.model!r} as it was then"
        else:
            problem = f"{index.named} was made by another model than {name!r}, and vectors of two models"
            problem += " cannot be compared"
            remedy = f"Search with {index.model!r} as it was then, its weights in {about['weights_dtype']}"
        raise ValueError(f"{problem}. {remedy}{older}.")

    def embed(self, query: Query | str) -> NDArray[np.float32]:
        """The embedding of a query (a string is words), `(1, embedding_dim)`, of length 1."""
        about = self.index.description
        dim = about["truncate_dim"]
        # What a person asks is text, whatever it looks like. A picture is read as those of the index were.
        processing = processing_for(self.model, "split", about.get("max_pixels"), about.get("decode", "exact"))
        options: Any = {"processing_kwargs": processing, "truncate_dim": dim}
        options["normalize_embeddings"] = bool(dim)
        # One query is one call of `encode`: what a search costs besides is the comparison.
        model_input = (Query(text=query) if isinstance(query, str) else query).model_input()
        return np.asarray(self.model.encode([model_input], show_progress_bar=False, **options), np.float32)

    def search(self, query: Query | str, *, target: Target = "any", top_k: int = 10) -> Answers:
        """Compare a query, a string of words or more, with all candidates, or with those that the backend proposes.

        Args:
            query: What to look for.
            target: What answers may be: "text", "image", or "any".
            top_k: Answers to give, at most all candidates.

        Returns:
            The answers, best first. A score is the cosine of the query's embedding and of the item's as it is stored.

        Raises:
            FileNotFoundError: If the picture is no file.
            ValueError: If the query cannot be embedded, there is no such candidate, or a file of the index is damaged.
        """
        query = Query(text=query) if isinstance(query, str) else query
        num_candidates, row = self.index.num_candidates(target), self.embed(query)[0]
        found = self.index.nearest(row, target, top_k, rescored=self._rescored)
        # A graph may not lead to enough of them, which is rare and cheap to find out.
        if len(found) < min(top_k, num_candidates):
            found = self.index.nearest(row, target, top_k)
        answers = tuple(Answer(rank=rank, **values) for rank, values in enumerate(found, 1))
        is_name = query.image is None or isinstance(query.image, str | Path)
        image = query.image and str(query.image) if is_name else type(query.image).__name__
        return Answers(query.text, image, query.instruction, target, num_candidates, answers)


def search(config: SearchConfig) -> Answers:
    """Open an index and its model, ask one question, and write a page of the answers if one is wanted.

    The errors are those of `open_index`, `Searcher` and `Searcher.search`; ImportError if LanceDB is missing.
    """
    names = ("model", "query_model", "num_kept_layers", "backend", "rescore_multiplier", "trust_remote_code")
    searcher = open_searcher(config.index, **config.given(*names))
    query = Query(text=config.query, image=config.image, instruction=config.instruction)
    answers = searcher.search(query, target=config.target, top_k=config.top)
    if config.html is not None:
        write_whole(Path(config.html), to_html(answers, picture=config.image).encode("utf-8", "backslashreplace"))
        logger.info("Saved %s", config.html)
    return answers


def open_searcher(index: str | Path | Index, *, model: str | None = None, **options: Any) -> Searcher:
    """Open an index, or its directory, and its model; ask the searcher as often as is wanted.

    An index names its model, and the code of a model in a local directory is run: open only indexes that you trust.
    `model` says where it is if it has moved; the other options and the errors are those of `Searcher`.

    Example:
        >>> from puma_hf.search import Query, open_searcher
        >>> searcher = open_searcher("index")  # doctest: +SKIP
        >>> print(searcher.search(Query(text="a red apple")))  # doctest: +SKIP
    """
    opened = index if isinstance(index, Index) else open_index(index)
    return Searcher(opened, model or opened.model, **options)
