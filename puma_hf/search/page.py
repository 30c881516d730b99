"""`puma-hf app`: the page, made of Gradio's own parts, and its server, until it is stopped.

Gradio keeps uploads in a folder of its own, limits their size, and serves no other file of this machine; it listens on
the loopback address unless told otherwise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from puma_hf.configs import AppConfig
from puma_hf.processes import ends_well_on_sigterm
from puma_hf.search.answers import KINDS, Answers, shorten, small_copy
from puma_hf.search.index import Index
from puma_hf.search.query import Query, Searcher, open_searcher
from puma_hf.settings import from_extra

logger = logging.getLogger(__name__)

TITLE = "Search by words and pictures"

_UPLOADS_LIVE = 3600  # seconds
_HEADERS = ["rank", "score", "id", "text"]


def launch(config: AppConfig, *, started: Callable[[str], None] | None = None) -> None:
    """Serve the page of an index until Ctrl-C or SIGTERM.

    `started` is called with the page's address, once it is there. The errors are those of `open_searcher`; ImportError
    if Gradio is missing, and OSError if the port is in use.
    """
    from_extra("gradio", "app")  # what is missing is told before the model is loaded
    given = config.given("model", "query_model", "num_kept_layers", "backend", "trust_remote_code")
    searcher = open_searcher(config.index, **given)
    with suppress(KeyboardInterrupt), ends_well_on_sigterm(), serving(searcher, config) as url:
        (started or logger.info)(url)
        threading.Event().wait()


@contextmanager
def serving(searcher: Searcher, config: AppConfig) -> Iterator[str]:
    """Serve the page of a searcher from a thread for as long as the block runs; yields its address.

    Of the configuration the index is not read. The errors are those of `launch`.

    Example:
        >>> from puma_hf.search import AppConfig, open_searcher, serving
        >>> with serving(open_searcher("index"), AppConfig(index="index")) as url:  # doctest: +SKIP
        ...     print(url)
        http://127.0.0.1:7860
    """
    gr, page = from_extra("gradio", "app"), make_page(searcher, config)
    # Of the visitor's own system: Gradio's fonts would be fetched from elsewhere, which tells who looks at the page.
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    options: Any = {"theme": gr.themes.Base(primary_hue="indigo", neutral_hue="slate", **fonts), "footer_links": []}
    options |= {"server_name": config.host, "server_port": config.port or None, "inbrowser": config.open_browser}
    options |= {"max_file_size": int(config.max_upload_mb * 2**20), "share": False, "ssr_mode": False}
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **options)
        yield url.rstrip("/")
    finally:
        page.close(verbose=False)


def make_page(searcher: Searcher, config: AppConfig) -> Any:
    """Build the page, `gr.Blocks`, that asks a searcher."""
    gr = from_extra("gradio", "app")
    searcher.index.num_candidates()  # an index that is empty has no page
    # Uploads are removed after an hour: a page that is open to all would fill the disk.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_UPLOADS_LIVE // 4, _UPLOADS_LIVE)) as page:
        gr.Markdown(f"# {TITLE}\n{count_line(searcher.index, searcher.index.model)}")
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(label="Words", placeholder="What do you look for?", max_lines=4)
                # Texts lie nearer to a text than any picture does, so that words find no picture among "Anything".
                both = "text" in searcher.index.counts and len(searcher.index.counts) > 1
                choices = [("Anything", "any"), *([("Pictures", "image"), ("Texts", "text")] if both else [])]
                target = gr.Radio(choices, value="image" if both else "any", label="Look for", visible=both)
                with gr.Accordion("Instruction", open=config.instruction is not None):
                    hint = "What is asked for, in the words that the model was trained with"
                    instruction = gr.Textbox(config.instruction, label="Instruction", placeholder=hint)
            with gr.Column(scale=2):
                # As a path: the file as it came, which the reader that all inputs go through turns upright and checks.
                picture = gr.Image(label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"])
        button = gr.Button("Search", variant="primary")
        note = gr.Markdown("Type a sentence, drop a picture, or give both. Choose an answer to search with it.")
        shape: Any = {"columns": 4, "object_fit": "contain", "allow_preview": False}
        gallery = gr.Gallery(label="Pictures", visible=False, interactive=False, **shape)
        table = gr.Dataframe(headers=_HEADERS, datatype="str", wrap=True, visible=False, interactive=False)
        # The answers that are shown: a visitor names one of these by its place, never a file by its path.
        remembered = gr.State(([], []), time_to_live=_UPLOADS_LIVE)
        results = [note, gallery, table, remembered]

        def ask(text: str | None, picture: Any, instruction: str | None, target: Any) -> tuple[Any, ...]:
            try:
                query = Query(text=text or None, image=picture, instruction=(instruction or "").strip() or None)
                found = searcher.search(query, target=target, top_k=config.top)
            # What a visitor can mend is told; all else is a fault of ours and stays in the log.
            except (ValueError, OSError) as error:
                words = str(error)
                for path in (str(picture), str(searcher.index.folder.resolve()), str(searcher.index.folder)):
                    words = words.replace(path, Path(path).name)  # no path of the server
                raise gr.Error(escape(shorten(words, 500)), print_exception=False) from error
            cards, rows = _cards_and_rows(found)
            return (
                f"{len(found.answers):,} of {found.num_candidates:,} {KINDS[found.target]}, best first",
                gr.Gallery([card for _, *card in cards], visible=bool(cards), selected_index=None),
                gr.Dataframe([row for _, *row in rows] or [[""] * len(_HEADERS)], visible=bool(rows)),
                ([answer for answer, *_ in cards], [answer for answer, *_ in rows]),
            )

        def again(remembered: Any, instruction: str | None, target: Any, event: Any) -> tuple[Any, ...]:
            pictures, texts = remembered
            # A picture's place is a number, that of a cell its row and column.
            answer = texts[event.index[0]] if isinstance(event.index, list) else pictures[event.index]
            shown = answer.image and small_copy(answer.image, 1024)
            return answer.text, shown, *ask(answer.text, shown and answer.image, instruction, target)

        again.__annotations__["event"] = gr.SelectData  # Gradio asks for the type itself, not its name
        # One question at a time: the model has the machine for itself.
        common: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        gr.on([button.click, text.submit], ask, [text, picture, instruction, target], results, **common)
        for part in (gallery, table):
            part.select(again, [remembered, instruction, target], [text, picture, *results], **common)
    page.queue(max_size=32, api_open=False)
    return page


def _cards_and_rows(found: Answers) -> tuple[list[Any], list[Any]]:
    """The answers that have a picture, with it and its caption, and the others as rows of a table."""
    cards, rows = [], []
    for answer in found.answers:
        # A small copy goes out, without what a camera wrote into the file, such as a place.
        shown = answer.image and small_copy(answer.image, 320)
        name, words = shorten(answer.id, 80), shorten(answer.text or "", 280)
        if shown:
            cards.append((answer, shown, f"{answer.rank} · {answer.score:.3f} · {words or name}"))
        else:
            words = "This picture is gone, or cannot be read." if answer.image else words
            rows.append((answer, str(answer.rank), f"{answer.score:.3f}", name, words))
    return cards, rows


def count_line(index: Index, model: str) -> str:
    """One line of an index: how many of what it has, and the model that made it."""
    counts = ", ".join(f"{count:,} of {name}" for name, count in index.counts.items())
    return f"{len(index):,} items ({counts}) · {Path(model).name if Path(model).is_absolute() else model}"
