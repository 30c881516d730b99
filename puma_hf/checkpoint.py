"""Models on the disk or on the Hub: their safetensors file by file, for pruning, or whole, to embed with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor

from puma_hf.files import ADAPTER_CONFIG, is_hub_id, named_base, read_config
from puma_hf.modeling import PumaModel
from puma_hf.modeling.modeling_puma import CHECKPOINT_KEY_MAPPING, MODEL_CLASSES
from puma_hf.settings import cut

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
# Everything small beside the weights: configuration, index, tokenizer, image processor.
_METADATA_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model"]
_DECODER_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
# What a generative checkpoint has and an embedder does not: the head, and Qwen3.5's for several tokens.
_HEADS = ("lm_head.", "mtp.")
_NOWHERE = (
    "{name!r} is no folder here, and the Hub has no such model, or needs a token for it, or cannot be reached "
    "({reason}). Check the name, and the network unless HF_HUB_OFFLINE is meant."
)


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint's tensors by PUMA's own names, each read when it is asked for; a language-model head is left out.

    Args:
        name: Hub id or local path, as given by the user.
        folder: Folder with the configuration, index, tokenizer and image processor files.
        revision: Hub commit, or `None` for a local folder; weights of the Hub are fetched file by file.
        token: Hub token; by default the one that huggingface_hub has stored.

    Example:
        >>> open_checkpoint("puma-k14")["language_model.norm.weight"].shape  # doctest: +SKIP
        torch.Size([1536])
    """

    def __init__(self, name: str, folder: Path, revision: str | None = None, token: str | None = None) -> None:
        self.name, self.folder, self.revision, self.token = name, folder, revision, token
        self.weight_files = self._find_weights()  # file of each tensor, by the checkpoint's own names
        self._stored_names: dict[str, str] = {}  # by what PUMA's classes call them, whichever layout this is
        for stored in self.weight_files:
            own = stored
            for pattern, replacement in CHECKPOINT_KEY_MAPPING.items():
                own = re.sub(pattern, replacement, own)
            if not stored.startswith(_HEADS):
                self._stored_names[own] = stored

    def _find_weights(self) -> dict[str, str]:
        """The file of each tensor, from the index or from the only file."""
        index = self.folder / INDEX_NAME
        if not index.is_file():
            try:
                return dict.fromkeys(_tensor_names(self.fetch(SINGLE_NAME)), SINGLE_NAME)
            except (FileNotFoundError, EntryNotFoundError) as error:  # a pickle can run code when opened
                lacks = f"{self.name!r} has neither {SINGLE_NAME} nor {INDEX_NAME}"
                raise FileNotFoundError(f"{lacks}. Only safetensors are read, never a pickle: convert it.") from error
        try:
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # Files are linked under these names, so none may lead out of the folder.
            if outside := [name for name in files.values() if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is outside of the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{INDEX_NAME!r} of {self.name!r} does not name each tensor's shard ({error!r})"
            raise ValueError(f"{problem}. Download it again, from who you trust.") from error
        return files

    def fetch(self, file_name: str) -> Path:
        """Local path of one weight file, downloaded first if the checkpoint is on the Hub."""
        if self.revision is not None:
            return Path(hf_hub_download(self.name, file_name, revision=self.revision, token=self.token))
        path = self.folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{self.name!r} lacks {file_name!r}. Download the checkpoint again.")
        return path

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored_names[name]
        file_name = self.weight_files[stored]
        try:
            # Opened anew for each: what was read of a file stays in memory until it is closed.
            with safe_open(self.fetch(file_name), framework="pt") as file:
                tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as error:
            problem = f"{file_name!r} of {self.name!r} is cut off, or lacks {stored!r} ({error})"
            raise ValueError(f"{problem}. Get or save it again.") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)


def open_checkpoint(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Locate a checkpoint without reading its weights; those of the Hub are fetched later, shard by shard.

    Args:
        source: Local folder, or Hub id such as "Qwen/Qwen2-VL-2B-Instruct".
        revision: Branch, tag or commit on the Hub.
        token: Hub token; by default the one that huggingface_hub has stored.

    Raises:
        FileNotFoundError: If the folder, the Hub repository, its configuration or its safetensors do not exist.
        ValueError: If the index of the weights, or the only file of them, is damaged.
    """
    name, folder, commit = str(source), Path(source), None
    if not folder.is_dir():
        if not is_hub_id(name):
            raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'organisation/name'.")
        try:
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_METADATA_PATTERNS))
        except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
            raise FileNotFoundError(_NOWHERE.format(name=name, reason=f"{type(error).__name__}: {error}")) from error
        # The folder of a snapshot is named by its commit. All else asks for that, so that files are of one version.
        commit = folder.name
    if not read_config(folder):
        raise FileNotFoundError(f"{name!r} has no config.json, or a damaged one. Point to a transformers checkpoint.")
    return Checkpoint(name, folder, commit, token)


def _tensor_names(path: Path) -> set[str]:
    try:
        # The names stand in the header: some kilobytes of a file of gigabytes are read, and its length is checked.
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name!r} is not a whole safetensors file ({error}). Download it again.") from error


def is_kept(tensor_name: str, layers: Container[int]) -> bool:
    """Whether a tensor of a checkpoint belongs to the model pruned to these of its decoder layers."""
    layer = _DECODER_LAYER.match(tensor_name)
    return not tensor_name.startswith(_HEADS) and (layer is None or int(layer[1]) in layers)


def load_kept(checkpoint: Checkpoint, config: Any, layers: Sequence[int], dtype: str | torch.dtype) -> PumaModel:
    """The model of these decoder layers; no shard that they do not need is fetched, no other tensor read.

    transformers is given a folder of links to the needed shards, with an index of the kept tensors: a 7B cut to 12 of
    28 layers takes 8 GB of memory in bfloat16, not 15.5, and as much less of a download.
    """
    kept = {name: file for name, file in checkpoint.weight_files.items() if is_kept(name, layers)}
    with TemporaryDirectory(prefix="puma-hf-") as folder:
        shutil.copyfile(checkpoint.folder / "config.json", Path(folder, "config.json"))
        for file_name in sorted(set(kept.values())):
            path = checkpoint.fetch(file_name)
            _tensor_names(path)  # what is cut off is named now
            Path(folder, file_name).symlink_to(path.resolve())
        Path(folder, INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        try:
            model: PumaModel = MODEL_CLASSES[type(config)].from_pretrained(folder, keep_layers=layers, dtype=dtype)
        except ValueError as error:
            # The temporary folder's name says nothing to the user.
            raise ValueError(str(error).replace(folder, checkpoint.name)) from error
    return model


# ------------------------------------------------------------------------------------------------ a model to embed with


def open_sentence_transformer(name: str, num_kept_layers: int | None = None, **loading: Any) -> SentenceTransformer:
    """A model from a directory or from the Hub, or its first layers; the code that lies in a local directory is run.

    A FileNotFoundError says that there is no such model, here or on the Hub, or that an adapter's base is gone; a
    ValueError that it has no such number of layers, or is no PUMA model.
    """
    if num_kept_layers is not None:
        loading["model_kwargs"] = {**(loading.get("model_kwargs") or {}), "num_kept_layers": num_kept_layers}
    # A local directory was put there by the user, and its code is what `puma-hf prune` wrote. A repository may change.
    is_folder = Path(name).is_dir()
    loading["trust_remote_code"] = loading.get("trust_remote_code", False) or is_folder
    try:
        return SentenceTransformer(name, **loading)
    except TypeError as error:
        if num_kept_layers is None or "num_kept_layers" not in str(error):
            raise
        problem = f"num_kept_layers={num_kept_layers} is for PUMA models, which {name!r} is none of"
        raise ValueError(f"{problem}. Leave it out, or cut the model first: puma-hf prune.") from error
    except OSError as error:
        reason = cut(str(error).strip())  # transformers may speak of the network alone, on several lines
        if Path(name, ADAPTER_CONFIG).is_file():
            problem = f"model={name!r} is an adapter whose base {named_base(Path(name))!r} could not be opened"
            raise FileNotFoundError(f"{problem} ({reason}). Merge the two: puma-hf merge (--base).") from error
        if is_folder:
            raise
        raise FileNotFoundError("model=" + _NOWHERE.format(name=name, reason=reason)) from error


@contextmanager
def plain_forward(model: SentenceTransformer) -> Iterator[None]:
    """Within the block, a PUMA model computes every layer for every token, as `AutoModel` does; others are as ever."""
    module: Any = model[0]
    fast_path = getattr(module, "fast_path", None)
    module.fast_path = None
    try:
        yield
    finally:
        module.fast_path = fast_path
