"""Models on the disk or on the Hub: their safetensors file by file, for pruning, or whole, to embed with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.files import ADAPTER_CONFIG, is_hub_id, named_base
from puma_hf.modeling.modeling_puma import CHECKPOINT_KEY_MAPPING
from puma_hf.settings import cut

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
# Everything small beside the weights: configuration, index, tokenizer, image processor.
_METADATA_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model"]
_DECODER_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_NOWHERE = (
    "{name!r} is no folder here, and the Hub has no such model, or needs a token for it, or cannot be reached "
    "({reason}). Check the name, and the network unless HF_HUB_OFFLINE is meant."
)


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint whose configuration and index are at hand and whose weights are found file by file.

    Attributes:
        name: Hub id or local path, as given by the user.
        folder: Folder with the configuration, tokenizer and image processor files.
        weight_files: File name of each tensor in the checkpoint.
        revision: Hub commit, or `None` for a local folder.
        repo_id: Hub id, or `None` for a local folder.
        token: Hub token.
    """

    name: str
    folder: Path
    weight_files: dict[str, str]
    revision: str | None = None
    repo_id: str | None = None
    token: str | None = None

    def fetch(self, file_name: str) -> Path:
        """Local path of one weight file, downloaded first if the checkpoint is on the Hub."""
        if self.repo_id is not None:
            return Path(hf_hub_download(self.repo_id, file_name, revision=self.revision, token=self.token))
        path = self.folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{self.name!r} lacks {file_name!r}. Download the checkpoint again.")
        return path


def open_checkpoint(source: str | Path, *, revision: str | None = None, token: str | None = None) -> SourceCheckpoint:
    """Locate a checkpoint without reading its weights; those of the Hub are fetched later, shard by shard.

    Args:
        source: Local folder, or Hub id such as "Qwen/Qwen2-VL-2B-Instruct".
        revision: Branch, tag or commit on the Hub.
        token: Hub token for gated or private repositories.

    Raises:
        FileNotFoundError: If the folder, the Hub repository, its configuration or its safetensors do not exist.
        ValueError: If the index of the weights is damaged.
    """
    name = str(source)
    checkpoint = SourceCheckpoint(name, Path(source), {})
    if not checkpoint.folder.is_dir():
        if not is_hub_id(name):
            raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'organisation/name'.")
        try:
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_METADATA_PATTERNS))
        except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
            raise FileNotFoundError(_NOWHERE.format(name=name, reason=f"{type(error).__name__}: {error}")) from error
        # The folder of a snapshot is named by its commit. All else asks for that, so that files are of one version.
        checkpoint = SourceCheckpoint(name, folder, {}, folder.name, name, token)
    if not (checkpoint.folder / "config.json").is_file():
        raise FileNotFoundError(f"{name!r} has no config.json. Point to a transformers checkpoint.")
    checkpoint.weight_files.update(_weight_files(checkpoint))
    return checkpoint


def _weight_files(checkpoint: SourceCheckpoint) -> dict[str, str]:
    """The file of each tensor, from the index or from the only file."""
    if not (checkpoint.folder / INDEX_NAME).is_file():
        try:
            return dict.fromkeys(_tensor_names(checkpoint.fetch(SINGLE_NAME)), SINGLE_NAME)
        except (FileNotFoundError, EntryNotFoundError) as error:  # a pickle can run code when opened
            lacks = f"{checkpoint.name!r} has neither {SINGLE_NAME} nor {INDEX_NAME}"
            raise FileNotFoundError(f"{lacks}. Only safetensors are read, never a pickle: convert it.") from error
    try:
        content = (checkpoint.folder / INDEX_NAME).read_text(encoding="utf-8")
        files: dict[str, str] = json.loads(content)["weight_map"]
        # Files are linked under these names, so none may lead out of the folder.
        is_safe = all(Path(file_name).name == file_name for file_name in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX_NAME!r} does not name each tensor's shard ({error!r}). Download it again.") from error
    if not is_safe:
        raise ValueError(f"{INDEX_NAME!r} names shards outside its own folder. Choose a checkpoint that you trust.")
    return files


def _tensor_names(path: Path) -> set[str]:
    try:
        # The names stand in the header: some kilobytes of a file of gigabytes are read, and its length is checked.
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name!r} is not a whole safetensors file ({error}). Download it again.") from error


def is_kept(tensor_name: str, layers: Container[int]) -> bool:
    """Whether a tensor of a checkpoint belongs to the model pruned to these of its decoder layers.

    Example:
        >>> [is_kept(f"model.layers.{layer}.mlp.up_proj.weight", range(8)) for layer in (7, 8)]
        [True, False]
        >>> is_kept("visual.blocks.30.mlp.fc1.weight", range(8)), is_kept("lm_head.weight", range(8))
        (True, False)
    """
    layer = _DECODER_LAYER.match(tensor_name)
    return not tensor_name.startswith("lm_head.") and (layer is None or int(layer[1]) in layers)


def own_name(name: str) -> str:
    """What PUMA's classes call a tensor, whichever of the published layouts its checkpoint has."""
    for pattern, own in CHECKPOINT_KEY_MAPPING.items():
        name = re.sub(pattern, own, name)
    return name


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by PUMA's own names, each read when it is asked for; a head is left out.

    Example:
        >>> StoredWeights(open_checkpoint("puma-k14"))["language_model.norm.weight"].shape  # doctest: +SKIP
        torch.Size([1536])
    """

    def __init__(self, checkpoint: SourceCheckpoint) -> None:
        self._checkpoint = checkpoint
        stored = {name: file for name, file in checkpoint.weight_files.items() if not name.startswith("lm_head.")}
        self._places = {own_name(name): (file, name) for name, file in stored.items()}

    def __getitem__(self, name: str) -> Tensor:
        file_name, stored = self._places[name]
        try:
            # Opened anew for each: what was read of a file stays in memory until it is closed.
            with safe_open(self._checkpoint.fetch(file_name), framework="pt") as file:
                tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as error:
            place = f"{file_name!r} of {self._checkpoint.name!r}"
            raise ValueError(f"{place} is cut off, or lacks {stored!r} ({error}). Get or save it again.") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def kept_weights(checkpoint: SourceCheckpoint, layers: Sequence[int]) -> Iterator[Path]:
    """A temporary checkpoint folder that links to the needed shards and whose index names kept tensors only.

    transformers then neither opens a shard nor reads a tensor of a dropped layer, which costs a pruned 7B nothing where
    it would cost 15 GB of download. It is ready for `PumaModel.from_pretrained(folder, keep_layers=layers)`, which
    refuses what lacks a tensor.

    Raises:
        FileNotFoundError: If a needed shard is missing.
        ValueError: If a needed shard is cut off.
    """
    kept = {name: file for name, file in checkpoint.weight_files.items() if is_kept(name, layers)}
    with TemporaryDirectory(prefix="puma-hf-") as temporary:
        folder = Path(temporary)
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
        for file_name in sorted(set(kept.values())):
            path = checkpoint.fetch(file_name)
            _tensor_names(path)  # what is cut off is named now
            # A link: shards stay where they are, in the user's folder or in the cache of the Hub.
            (folder / file_name).symlink_to(path.resolve())
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        yield folder


# ------------------------------------------------------------------------------------------------ a model to embed with


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
            problem = f"model={name!r} is an adapter whose base {base!r} could not be opened from here ({reason})"
            remedy = f"puma-hf merge {name} OUTPUT --base {base if Path(base).is_dir() else 'BASE'}"
            raise FileNotFoundError(f"{problem}. Merge the two: {remedy}") from error
        if is_folder:
            raise
        raise FileNotFoundError("model=" + _NOWHERE.format(name=name, reason=reason)) from error


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
    fast_path = getattr(module, "fast_path", None)
    if fast_path is not None:
        module.fast_path = None
    try:
        yield
    finally:
        if fast_path is not None:
            module.fast_path = fast_path
