"""Search a corpus by text, by picture, or by both: an index in LanceDB, exact answers, a page to show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puma_hf.lazy import resolver

# `search`, the function of a SearchConfig, is in `puma_hf.search.query`: here it would have the package's own name.
_NAMES = {
    "Answer": "puma_hf.search.answers",
    "Answers": "puma_hf.search.answers",
    "Index": "puma_hf.search.index",
    "IndexConfig": "puma_hf.configs",
    "IndexReport": "puma_hf.search.index",
    "Query": "puma_hf.search.query",
    "SearchConfig": "puma_hf.configs",
    "Searcher": "puma_hf.search.query",
    "build_index": "puma_hf.search.index",
    "open_index": "puma_hf.search.index",
    "open_searcher": "puma_hf.search.query",
}

__all__ = [
    "Answer",
    "Answers",
    "Index",
    "IndexConfig",
    "IndexReport",
    "Query",
    "SearchConfig",
    "Searcher",
    "build_index",
    "open_index",
    "open_searcher",
]

__getattr__ = resolver(__name__, _NAMES)


if TYPE_CHECKING:
    from puma_hf.configs import IndexConfig, SearchConfig
    from puma_hf.search.answers import Answer, Answers
    from puma_hf.search.index import Index, IndexReport, build_index, open_index
    from puma_hf.search.query import Query, Searcher, open_searcher
