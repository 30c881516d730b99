"""`puma-hf app`: open an index and its model, and serve the page until it is stopped."""

from __future__ import annotations

import logging
import signal
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from puma_hf.app.config import AppConfig
from puma_hf.app.serve import address, listen, require_gradio, server_of

logger = logging.getLogger(__name__)


def launch(config: AppConfig, *, started: Callable[[str], None] | None = None) -> None:
    """Serve the page of an index until Ctrl-C, or write it as a Space.

    An index names its model, and the code of a model in a local directory is run: open only indexes that you trust.

    Args:
        config: Which index, and where; see `AppConfig`.
        started: Called with the page's address, or the Space's directory, once it is there.

    Raises:
        FileExistsError: If the directory of the Space is not empty.
        FileNotFoundError: If the index or its model is missing.
        ImportError: If Gradio is missing.
        ValueError: If the index is empty, unfinished, damaged or of another model, or the port is in use.

    Example:
        >>> from puma_hf.app.config import AppConfig
        >>> from puma_hf.app.launch import launch
        >>> launch(AppConfig(index="index"), started=print)  # doctest: +SKIP
        http://127.0.0.1:7860
    """
    started = started or logger.info
    for note in config.notes():
        logger.warning(note)
    if config.space is not None:
        from puma_hf.app.space import write_space
        from puma_hf.search.index import open_index

        index = open_index(config.index)
        written = write_space(
            index,
            config.space,
            model=config.model,
            instruction=config.instruction,
            trust_remote_code=config.trust_remote_code,
        )
        started(str(written))
        return
    require_gradio()
    from puma_hf.search.query import open_searcher

    with listen(config.host, config.port) as bound:  # a port in use is told before the model is loaded
        searcher = open_searcher(
            config.index, model=config.model, backend=config.backend, trust_remote_code=config.trust_remote_code
        )
        with server_of(searcher, config) as server:
            started(address(bound))
            if config.open_browser:
                webbrowser.open(address(bound))
            with _stopped_by_signals():
                server.run(sockets=[bound])


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block quietly at Ctrl-C and at SIGTERM, so that the temporary files are removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    of_signals = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if of_signals else None
    try:
        with suppress(KeyboardInterrupt):  # the server hands on what has stopped it
            yield
    finally:
        if of_signals:
            signal.signal(signal.SIGTERM, before)
