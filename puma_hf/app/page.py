"""The page: fields for words and a picture, a choice of what to look for, and a grid of answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from puma_hf.app.asking import GONE, Found, ask, ask_again
from puma_hf.app.cards import TITLE, count_line, shown, welcome
from puma_hf.app.config import AppConfig
from puma_hf.app.style import CSS, SCRIPT
from puma_hf.app.uploads import only_uploads
from puma_hf.search.query import Searcher

if TYPE_CHECKING:
    import gradio as gr

_QUEUE_SIZE = 32  # questions that may wait; the next is told so
_UPLOADS_LIVE = 3600  # seconds
_SESSIONS = 500  # people whose last answers are remembered
_CHOICES = {"any": "Anything", "image": "Pictures", "text": "Texts"}
_ONE_MODEL = "model"


def make_page(searcher: Searcher, config: AppConfig, uploads: Path) -> gr.Blocks:
    """Build the page.

    Args:
        searcher: Whom it asks.
        config: How many answers it shows.
        uploads: Where Gradio puts the pictures of queries; no other file can be one.

    Returns:
        Gradio's blocks.

    Raises:
        ValueError: If the index is empty.
    """
    import gradio as gr

    searcher.index.candidates()
    lifetime = (_UPLOADS_LIVE // 4, _UPLOADS_LIVE)
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=lifetime) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>{shown(count_line(searcher.index.counts, searcher.index.model))}</p>",
            elem_id="ph-head",
            apply_default_css=False,
        )
        with gr.Row(elem_id="ph-ask"):
            with gr.Column(scale=3, min_width=280):
                text = gr.Textbox(
                    label="Words", placeholder="What do you look for?", lines=1, max_lines=4, elem_id="ph-words"
                )
                target = _choice(searcher, gr)
                with gr.Accordion("Instruction", open=config.instruction is not None, elem_id="ph-instruction"):
                    instruction = gr.Textbox(
                        config.instruction,
                        label="Instruction",  # which a screen reader says
                        show_label=False,
                        container=False,
                        placeholder="What is asked for, in the words that the model was trained with",
                    )
            with gr.Column(scale=2, min_width=240):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    format="png",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=216,
                    placeholder="Drop a picture here\nor click to choose one",
                    elem_id="ph-picture",
                )
        button = gr.Button("Search", variant="primary", elem_id="ph-search")
        only_uploads(page, picture, (text, instruction, target), uploads)
        hint = "Type a sentence, drop a picture, or give both. Each answer can be the next query."
        results = gr.HTML(
            welcome(hint), elem_id="ph-results", apply_default_css=False, js_on_load=SCRIPT, container=False
        )
        remembered = gr.State(("", ()), time_to_live=_UPLOADS_LIVE)
        _connect(searcher, config.top, (text, picture, instruction, target, button), results, remembered)
    page.queue(max_size=_QUEUE_SIZE, api_open=False, default_concurrency_limit=1)
    page.state_session_capacity = _SESSIONS
    built: gr.Blocks = page
    return built


def look() -> dict[str, Any]:
    """The page's style, as Gradio takes it: the system's fonts, nothing from elsewhere."""
    import gradio as gr

    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    readable = {"body_text_color_subdued": "*neutral_500", "body_text_color_subdued_dark": "*neutral_400"}
    return {"theme": theme.set(**readable), "css": CSS}


def _choice(searcher: Searcher, gr: Any) -> Any:
    """What to look for: of what the index has.

    Embeddings of texts lie nearer to a text than any picture does, so that words find no picture among "Anything".
    """
    counts = searcher.index.counts
    there = {"image": any("image" in name and counts[name] for name in counts), "text": bool(counts.get("text"))}
    names = ["any", *(name for name, is_there in there.items() if is_there)] if all(there.values()) else ["any"]
    return gr.Radio(
        [(_CHOICES[name], name) for name in names],
        value="image" if len(names) > 1 else "any",
        label="Look for",
        visible=len(names) > 1,
        elem_id="ph-target",
    )


def _connect(searcher: Searcher, top: int, fields: tuple[Any, ...], results: Any, remembered: Any) -> None:
    import gradio as gr

    text, picture, instruction, target, button = fields

    def search(text: str, picture: str | None, instruction: str, target: Any) -> tuple[Any, ...]:
        found = ask(searcher, text=text, picture=picture, instruction=instruction, target=target, top=top)
        return _shown(found)

    def again(remembered: Any, instruction: str, target: Any, event: Any) -> tuple[Any, ...]:
        name, items = remembered
        sent = event._data if isinstance(event._data, dict) else {}
        place = sent.get("place") if sent.get("search") == name else None
        asked = ask_again(searcher, items, place, instruction=instruction, target=target, top=top)
        if asked is None:
            gr.Warning(GONE)
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return asked.text, asked.picture, *_shown(asked.found)

    again.__annotations__["event"] = gr.EventData  # Gradio asks for the type itself, not its name

    # One question at a time: the model has the machine for itself.
    common: dict[str, Any] = {
        "concurrency_id": _ONE_MODEL,
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress_on": results,
    }
    gr.on([button.click, text.submit], search, [text, picture, instruction, target], [results, remembered], **common)
    results.again(again, [remembered, instruction, target], [text, picture, results, remembered], **common)


def _shown(found: Found) -> tuple[Any, ...]:
    """The value of the results, and what is remembered of them."""
    return found.html, (found.name, found.items)
