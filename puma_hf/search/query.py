"""Search an index: a query becomes an embedding of the model that made it, compared with all candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from puma_hf.embedding.config import EmbedConfig
from puma_hf.embedding.embed import embed
from puma_hf.embedding.results import BrokenInputError
from puma_hf.embedding.run import open_model
from puma_hf.evaluation.fingerprint import model_fingerprint, model_name
from puma_hf.evaluation.search import exact_search
from puma_hf.files import write_whole
from puma_hf.modeling.image_inputs_puma import load_rgb_image
from puma_hf.search.answers import Answer, Answers
from puma_hf.search.config import Backend, SearchConfig, Target
from puma_hf.search.html import to_html
from puma_hf.search.index import Index, open_index

MAX_QUERY_LENGTH = 100_000  # characters; what a model takes of a text is far less


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to look for: words, a picture, or both.

    Args:
        text: Words, or None.
        image: A picture: PIL, path or bytes; or None.
        instruction: What is asked for, in the words that the model was trained with, or None.

    Raises:
        ValueError: If there is nothing to look for, or the words are too many.

    Example:

    ```python
    >>> from puma_hf.search.query import Query

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
        for name, text in (("text", self.text), ("instruction", self.instruction)):
            if text is not None and len(text) > MAX_QUERY_LENGTH:
                raise ValueError(
                    f"{name} of a query has {len(text):,} characters, must be at most {MAX_QUERY_LENGTH:,}. Look for a "
                    "part of it."
                )

    def model_input(self) -> dict[str, Any]:
        """The query as one input of a model, its picture read.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read as a picture.
        """
        image = None if self.image is None else load_rgb_image(self.image, "image of the query")
        text = self.text if self.text and self.text.strip() else None
        values = {"image": image, "text": text, "instruction": self.instruction}
        return {name: value for name, value in values.items() if value is not None}


class Searcher:
    """Searches an index with the model that made it; make one, and ask it often.

    Args:
        index: The index.
        model: The model, as a `SentenceTransformer`.
        backend: "torch", or "faiss" (`pip install 'puma-hf[faiss]'`); both are exact.

    Raises:
        ValueError: If the index was made by another model.

    Example:
        >>> from puma_hf.search import Query, Searcher, open_index
        >>> searcher = Searcher(open_index("index"), model)  # doctest: +SKIP
        >>> print(searcher.search(Query(text="a red apple"), target="image"))  # doctest: +SKIP
    """

    def __init__(self, index: Index, model: SentenceTransformer, *, backend: Backend = "torch") -> None:
        if model_fingerprint(model) != index.fingerprint:
            raise ValueError(
                f"The index {str(index.folder)!r} was made by another model than {model_name(model)!r}, and vectors of "
                f"two models cannot be compared. Search with {index.description['model']!r} as it was then, its "
                f"weights in {index.stored.manifest['settings']['weights_dtype']}, or make an index with this one."
            )
        self.index = index
        self.model = model
        self.backend: Backend = backend

    def search(self, query: Query, *, target: Target = "any", top_k: int = 10) -> Answers:
        """Compare a query with all candidates.

        Args:
            query: What to look for.
            target: What answers may be: "text", "image", or "any".
            top_k: Answers to give, at most all candidates.

        Returns:
            The answers, best first; among equals the earlier item of the corpus.

        Raises:
            FileNotFoundError: If the picture is no file.
            ValueError: If the query cannot be embedded, there is no such candidate, or a file of the index is damaged.
        """
        candidates = self.index.candidates(target)
        try:
            rows = embed(
                self.model,
                [query.model_input()],
                num_workers=0,
                truncate_dim=self.index.stored.manifest["settings"]["truncate_dim"],
                show_progress_bar=False,
            ).embeddings
        except BrokenInputError as error:
            reason = error.broken.message.removeprefix("inputs[0]: ")
            raise ValueError(f"The query cannot be embedded: {reason}") from error
        found = exact_search(torch.from_numpy(rows), candidates, top_k, backend=self.backend)
        items = self.index.items(candidates.positions[found.indices[0].numpy()].tolist())
        scores = found.scores[0].tolist()
        return Answers(
            query=query.text,
            image=_name_of(query.image),
            instruction=query.instruction,
            target=target,
            num_candidates=len(candidates),
            answers=tuple(
                Answer(rank, score, item.id, item.modality, item.text, item.image)
                for rank, (score, item) in enumerate(zip(scores, items, strict=True), 1)
            ),
        )


def search(config: SearchConfig) -> Answers:
    """Open an index and its model, ask one question, and write a page of the answers if one is wanted.

    An index names its model, and the code of a model in a local directory is run: open only indexes that you trust.

    Args:
        config: What to look for, and where; see `SearchConfig`.

    Returns:
        The answers.

    Raises:
        FileNotFoundError: If the index, its model or the picture is missing.
        ValueError: If the index is empty, unfinished, damaged, of another model, or has nothing of the kind asked for;
            or if the query cannot be embedded.

    Example:
        >>> from puma_hf.search.config import SearchConfig
        >>> from puma_hf.search.query import search
        >>> print(search(SearchConfig(index="index", query="a red apple", target="image")))  # doctest: +SKIP
    """
    index = open_index(config.index)
    index.candidates(config.target)
    query = Query(text=config.query, image=config.image, instruction=config.instruction)
    query.model_input()  # what is wrong is told before the model is loaded
    searcher = Searcher(index, _open_model(index, config), backend=config.backend)
    answers = searcher.search(query, target=config.target, top_k=config.top)
    if config.html is not None:
        write_whole(Path(config.html), to_html(answers, picture=config.image).encode("utf-8", "backslashreplace"))
    return answers


def _open_model(index: Index, config: SearchConfig) -> SentenceTransformer:
    """The model of the index, in the data type that it was made with."""
    described = index.description
    name = config.model or described["model"]
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(
            f"The model {name!r} of the index {str(index.folder)!r} is gone. Pass model (--model), where it is now."
        )
    return open_model(
        EmbedConfig(
            data=described["data"],
            model=name,
            output=index.folder,
            truncate_dim=index.stored.manifest["settings"]["truncate_dim"],
            dtype=described["dtype"],
            revision=described["revision"],
            trust_remote_code=config.trust_remote_code,
        )
    )


def _name_of(image: Any) -> str | None:
    if image is None:
        return None
    return str(image) if isinstance(image, str | Path) else type(image).__name__
