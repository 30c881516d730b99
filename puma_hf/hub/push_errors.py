"""Errors of the Hub and of the network, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

# Whose errors are the network's. The HTTP client differs between versions of huggingface_hub, so its errors are not
# imported; those of hf_xet are plain RuntimeErrors.
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "h11", "h2")
_TRY_LATER = frozenset({408, 425, 429})


@contextmanager
def told(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turn the errors of the Hub in the block into ones that name the remedy.

    Args:
        repo_id: The repository.
        token: The token, which no message shows.

    Raises:
        PermissionError: If there is no token, it is not known, or may not write there.
        ValueError: If the Hub refuses what was sent.
        ConnectionError: If the Hub cannot be reached, or the network went in the middle.
    """
    name = repr(repo_id)
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"There is no Hub token to push to {name} with. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so {name} cannot be reached. Unset it to push.") from error
    except HfHubHTTPError as error:
        raise _refusal(error, name) from error
    except (ValueError, PermissionError):
        raise  # ours, in words already
    except Exception as error:
        causes = list(_causes(error))
        # An upload wraps the Hub's answer, or a file that is gone, into an error that does not tell it.
        for cause in causes:
            if isinstance(cause, HfHubHTTPError):
                raise _refusal(cause, name) from error
            if isinstance(cause, OSError) and cause.filename is not None:
                raise cause from error
        if not any(_is_of_network(cause) for cause in causes):
            raise
        shown = f"{type(causes[-1]).__name__}: {causes[-1]}"
        raise ConnectionError(
            f"The connection to the Hub failed while pushing to {name} "
            f"({shown.replace(token, '***') if token else shown}). A commit is made whole or not at all, so the "
            "repository is as it was, or empty if it is new. Run it again: large files that arrived are not sent again."
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from, the first cause last."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _is_of_network(error: BaseException) -> bool:
    is_of_client = type(error).__module__.startswith(_CLIENTS) or type(error) is RuntimeError
    return is_of_client or isinstance(error, ConnectionError | TimeoutError)


def _refusal(error: HfHubHTTPError, name: str) -> Exception:
    status = error.response.status_code
    reason = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 401:
        return PermissionError(f"The Hub does not know the token ({reason}). Log in again with `hf auth login`.")
    if status in (403, 404):
        return PermissionError(
            f"The token may not write to {name} ({reason}). Make one that may at huggingface.co/settings/tokens, or "
            "propose the change with create_pr=True (--create-pr)."
        )
    if status in (409, 412):
        return ConnectionError(f"{name} changed while this push ran ({reason}). Run it again.")
    if status < 500 and status not in _TRY_LATER:
        return ValueError(
            f"The Hub refused the push to {name} with status {status} ({reason}). The repository is as it was, or "
            "empty if it is new. Mend what the Hub names, and run it again."
        )
    return ConnectionError(
        f"The Hub refused the push to {name} with status {status} ({reason}). The repository is as it was, or empty if "
        "it is new. Run it again later."
    )
