"""Where the records of a corpus are read: `puma_hf.data.items`."""

from puma_hf.data.items import Corpus, Survey, open_corpus
from puma_hf.data.records import Record

__all__ = ["Corpus", "Record", "Survey", "open_corpus"]
