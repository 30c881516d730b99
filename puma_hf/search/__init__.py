"""Search a corpus by text, by picture, or by both: an index in LanceDB, exact answers, a page to show them, a Space."""

from puma_hf.configs import AppConfig, IndexConfig, SearchConfig
from puma_hf.search.answers import Answer, Answers
from puma_hf.search.build import IndexReport, build_index
from puma_hf.search.index import Index, open_index
from puma_hf.search.page import serving
from puma_hf.search.query import Query, Searcher, open_searcher
from puma_hf.search.space import write_space

# `search` and `launch`, the functions of a SearchConfig and of an AppConfig, are in `query` and `page`.
__all__ = ["Answer", "Answers", "AppConfig", "Index", "IndexConfig", "IndexReport", "Query", "SearchConfig", "Searcher"]
__all__ += ["build_index", "open_index", "open_searcher", "serving", "write_space"]
