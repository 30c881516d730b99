"""Serve the page: bound to an address before anything else is loaded, its uploads in a directory of their own."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puma_hf.app.config import FIRST_PORT, AppConfig
from puma_hf.app.guard import LOOPBACK, Guard
from puma_hf.app.uploads import is_full

if TYPE_CHECKING:
    import uvicorn

    from puma_hf.search.query import Searcher

_PORTS = 100  # that are tried
_MEGABYTE = 1024 * 1024
_GOODBYE = 1  # seconds for what is still being answered when the server stops


def require_gradio() -> None:
    """Raise if what the page is made with is missing.

    Raises:
        ImportError: If it is.
    """
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError as error:
        raise ImportError(f"The page needs Gradio ({error}). Run: pip install 'puma-hf[app]'") from error
    _ = (fastapi, gradio, uvicorn)


def listen(host: str, port: int | None) -> socket.socket:
    """Bind to an address.

    Args:
        host: The address.
        port: The port, 0 for any, None for 7860 or the next that is free.

    Returns:
        A socket that listens: who asks now is answered as soon as the server runs.

    Raises:
        ValueError: If the port is in use, or there is no such address on this machine.
    """
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # the latter of a label that no name can have
        raise ValueError(f"host={host!r} is no address ({error}). Leave it out for 127.0.0.1.") from error
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + _PORTS)
    for number in ports:
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, number))
            bound.listen()
        except OSError as error:
            bound.close()
            reason = error.strerror or str(error)
            continue
        return bound
    which = f"port={port} on {host}" if port is not None else f"any port from {ports[0]} to {ports[-1]} on {host}"
    raise ValueError(f"{which} cannot be had: {reason}. Name another (--port), or stop what has it.")


def address(bound: socket.socket) -> str:
    """What to type into a browser."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def server_of(searcher: Searcher, config: AppConfig) -> Iterator[uvicorn.Server]:
    """A server of the page that is not running yet; what was uploaded is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="puma-hf-app-", ignore_cleanup_errors=True) as folder:
        uploads = Path(folder) / "uploads"
        uploads.mkdir()
        own = {
            "GRADIO_TEMP_DIR": str(uploads),
            "GRADIO_EXAMPLES_CACHE": str(Path(folder) / "examples"),
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        with _environment(own):
            yield _server(searcher, config, uploads)


@contextmanager
def serving(searcher: Searcher, config: AppConfig) -> Iterator[str]:
    """Serve the page from a thread for as long as the block runs.

    Args:
        searcher: Whom the page asks.
        config: Address and limits; its index is not read.

    Yields:
        The address.

    Raises:
        ImportError: If Gradio is missing.
        ValueError: If the port is in use, or the index is empty.

    Example:
        >>> from puma_hf.app import AppConfig, serving
        >>> from puma_hf.search.query import open_searcher
        >>> with serving(open_searcher("index"), AppConfig(index="index")) as url:  # doctest: +SKIP
        ...     print(url)
        http://127.0.0.1:7860
    """
    require_gradio()
    bound = listen(config.host, config.port)
    try:
        with server_of(searcher, config) as server:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
            thread.start()
            try:
                yield address(bound)
            finally:
                server.should_exit = True
                thread.join()
    finally:
        bound.close()


def _server(searcher: Searcher, config: AppConfig, uploads: Path) -> uvicorn.Server:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from puma_hf.app.page import look, make_page

    largest = int(config.max_upload_mb * _MEGABYTE)
    app: Any = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        app,
        make_page(searcher, config, uploads),
        path="/",
        server_name=config.host,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=largest,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **look(),
    )
    # A request is a little more than its file; words alone may be a million letters.
    guarded = Guard(
        app,
        max_bytes=max(largest, 8 * _MEGABYTE) + _MEGABYTE,
        is_full=partial(is_full, uploads),
        hosts=_hosts(config.host),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Every open page waits for news, and each such wait that is cut off would be told as an error.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    return Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=_GOODBYE, server_header=False))


def _hosts(host: str) -> tuple[str, ...] | None:
    """Names that a request may call the server by: None, which is any, if other machines can reach it."""
    number = str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
    return (*LOOPBACK, host.lower(), number) if ip_address(number).is_loopback else None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
