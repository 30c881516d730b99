"""A model to embed with: opened with errors that name it, and run without its fast path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from puma_hf.files import ADAPTER_CONFIG, named_base
from puma_hf.settings import cut


def open_sentence_transformer(name: str, **loading: Any) -> SentenceTransformer:
    """A model from a directory or from the Hub; the code that lies in a local directory is run.

    Args:
        name: A directory or a Hub id.
        loading: Arguments of `SentenceTransformer`, such as `device`, `revision` and `trust_remote_code`.

    Raises:
        FileNotFoundError: If there is no such model, here or on the Hub, or an adapter's base is not where it says.

    Example:
        >>> model = open_sentence_transformer("puma-k4-mac", device="cpu")  # doctest: +SKIP
    """
    # A local directory was put there by the user, and its code is what `puma-hf prune` wrote. A repository may change.
    is_folder = Path(name).is_dir()
    loading["trust_remote_code"] = loading.get("trust_remote_code", False) or is_folder
    try:
        return SentenceTransformer(name, **loading)
    except OSError as error:
        reason = cut(str(error).strip())  # transformers may speak of the network alone, on several lines
        if (Path(name) / ADAPTER_CONFIG).is_file():
            base = named_base(Path(name))
            remedy = f"Merge the two: puma-hf merge {name} OUTPUT --base {base if Path(base).is_dir() else 'BASE'}"
            message = (
                f"model={name!r} is an adapter whose base {base!r} could not be opened from here ({reason}). {remedy}"
            )
            raise FileNotFoundError(message) from error
        if is_folder:
            raise
        raise FileNotFoundError(
            f"model={name!r} is no folder here, and the Hub has no such model, or needs a token for it, or cannot be "
            f"reached ({reason}). Check the name, and the network unless HF_HUB_OFFLINE is meant."
        ) from error


def check_truncate_dim(model: SentenceTransformer, name: str, truncate_dim: int | None) -> None:
    """Raise a ValueError if a model's embeddings are shorter than what is to be kept of them."""
    dim = model.get_embedding_dimension()
    if truncate_dim is not None and dim is not None and dim < truncate_dim:
        problem = f"truncate_dim={truncate_dim}, but the embeddings of {name!r} have {dim} dimensions"
        raise ValueError(f"{problem}. Choose fewer, or leave it out.")


@contextmanager
def plain_forward(model: SentenceTransformer) -> Iterator[None]:
    """Within the block, a PUMA model computes every layer for every token, as `AutoModel` does; others are as ever.

    Example:
        >>> with plain_forward(model):  # doctest: +SKIP
        ...     slow = model.encode(["a red apple"])
    """
    module: Any = model[0]
    if not hasattr(module, "fast_path"):
        yield
        return
    fast_path, module.fast_path = module.fast_path, None
    try:
        yield
    finally:
        module.fast_path = fast_path
