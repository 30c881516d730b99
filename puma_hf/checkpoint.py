"""Find the safetensors files of a checkpoint that a pruned model needs, locally or on the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puma_hf.modeling.modeling_puma import CHECKPOINT_KEY_MAPPING

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Everything small beside the weights: configuration, tokenizer, image processor.
METADATA_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model"]

_DECODER_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")


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
        """Local path of one weight file, downloaded first if the checkpoint is on the Hub.

        Raises:
            FileNotFoundError: If a local shard that the index names is missing.
        """
        if self.repo_id is not None:
            return Path(hf_hub_download(self.repo_id, file_name, revision=self.revision, token=self.token))
        path = self.folder / file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.name!r} lacks the shard {file_name!r} that {INDEX_NAME} names. Download the checkpoint again."
            )
        return path


def open_checkpoint(source: str | Path, *, revision: str | None = None, token: str | None = None) -> SourceCheckpoint:
    """Locate a checkpoint without reading its weights.

    Args:
        source: Local folder, or Hub id such as "Qwen/Qwen2-VL-2B-Instruct".
        revision: Branch, tag or commit on the Hub.
        token: Hub token for gated or private repositories.

    Returns:
        The checkpoint's metadata; weights of a Hub checkpoint are fetched later, shard by shard.

    Raises:
        FileNotFoundError: If the folder, the Hub repository or its configuration does not exist.
        ValueError: If the weights are not in safetensors format, or their index is damaged.
    """
    if Path(source).is_dir():
        folder = Path(source)
        names = [path.name for path in folder.iterdir()]
        return SourceCheckpoint(str(source), folder, _weight_files(folder, names, str(source)))
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'organisation/name'.")
    try:
        commit = HfApi(token=token).model_info(name, revision=revision).sha if not _offline() else revision
        folder = Path(snapshot_download(name, revision=commit, token=token, allow_patterns=METADATA_PATTERNS))
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the Hub has no such model, or needs a token for it, or cannot "
            f"be reached ({type(error).__name__}). Check the name, and the network unless HF_HUB_OFFLINE is "
            "meant."
        ) from error
    except Exception as error:
        # The HTTP client's own errors differ between versions of huggingface_hub.
        raise ConnectionError(
            f"{name!r} is no folder here, and asking the Hub for it failed ({type(error).__name__}: {error}). Check "
            "the network, or download the checkpoint and pass its folder."
        ) from error
    names = [path.name for path in folder.iterdir()]
    if not _offline():
        names = HfApi(token=token).list_repo_files(name, revision=commit)
    weight_files = _weight_files(folder, names, name, repo_id=name, revision=commit, token=token)
    return SourceCheckpoint(name, folder, weight_files, commit, name, token)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _weight_files(
    folder: Path,
    names: list[str],
    source: str,
    repo_id: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, str]:
    if "config.json" not in names:
        raise FileNotFoundError(f"{source!r} has no config.json. Point to the folder of a transformers checkpoint.")
    if INDEX_NAME in names:
        return _read_weight_map(folder / INDEX_NAME)
    if SINGLE_NAME in names:
        path = folder / SINGLE_NAME
        if repo_id is not None:
            path = Path(hf_hub_download(repo_id, SINGLE_NAME, revision=revision, token=token))
        return dict.fromkeys(_tensor_names(path), SINGLE_NAME)
    if pickles := sorted(name for name in names if name.endswith(PICKLE_SUFFIXES)):
        raise ValueError(
            f"{source!r} holds its weights as {pickles[0]!r}, a pickle file that can run code when opened. "
            "Only safetensors is read: convert it with save_pretrained, or choose a safetensors revision."
        )
    raise FileNotFoundError(f"{source!r} has neither {SINGLE_NAME} nor {INDEX_NAME}. Download the checkpoint again.")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # Files are linked under these names, so none may lead out of the folder.
        plain = all(Path(file_name).name == file_name for file_name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.name!r} is not a JSON file that names the shard of each tensor ({type(error).__name__}: "
            f"{error}). Download the checkpoint again."
        ) from error
    if not plain:
        raise ValueError(f"{path.name!r} names shards outside its own folder. Choose a checkpoint that you trust.")
    return weight_map


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name!r} is not a whole safetensors file ({error}). It may be cut off: download it again."
        ) from error


def is_kept(tensor_name: str, layers: Container[int]) -> bool:
    """Whether a tensor of a checkpoint belongs to the model pruned to these of its decoder layers.

    Example:

    ```python
    >>> from puma_hf.checkpoint import is_kept

    >>> is_kept("model.layers.7.mlp.up_proj.weight", range(8)), is_kept("model.layers.8.mlp.up_proj.weight", range(8))
    (True, False)
    >>> is_kept("visual.blocks.30.mlp.fc1.weight", range(8)), is_kept("lm_head.weight", range(8))
    (True, False)
    ```
    """
    if tensor_name.startswith("lm_head."):
        return False
    layer = _DECODER_LAYER.match(tensor_name)
    return layer is None or int(layer.group(1)) in layers


def own_name(name: str) -> str:
    """What PUMA's classes call a tensor, whichever of the published layouts its checkpoint has."""
    for pattern, own in CHECKPOINT_KEY_MAPPING.items():
        name = re.sub(pattern, own, name)
    return name


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by PUMA's own names, each read when it is asked for; a head is left out.

    Args:
        checkpoint: That of a PUMA directory, of an original, or of what `puma_hf.export.export` wrote.

    Example:

    ```python
    >>> from puma_hf.checkpoint import StoredWeights, open_checkpoint

    >>> StoredWeights(open_checkpoint("puma-k14"))["language_model.norm.weight"].shape  # doctest: +SKIP
    torch.Size([1536])
    ```
    """

    def __init__(self, checkpoint: SourceCheckpoint) -> None:
        self._checkpoint, self._paths = checkpoint, dict[str, Path]()
        self._places = {
            own_name(name): (file, name)
            for name, file in checkpoint.weight_files.items()
            if not name.startswith("lm_head.")
        }

    def __getitem__(self, name: str) -> Tensor:
        file_name, stored = self._places[name]
        if file_name not in self._paths:
            self._paths[file_name] = self._checkpoint.fetch(file_name)
        try:
            # Opened anew for each: what was read of a file stays in memory until it is closed.
            with safe_open(self._paths[file_name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(
                f"{file_name!r} of {self._checkpoint.name!r} is cut off, or lacks {stored!r} ({error}). Download or "
                "save it again."
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def kept_weights(checkpoint: SourceCheckpoint, layers: Sequence[int]) -> Iterator[Path]:
    """A temporary checkpoint folder that links to the needed shards and whose index names kept tensors only.

    Yields:
        The folder, ready for `PumaModel.from_pretrained(folder, keep_layers=layers)`.

    Raises:
        FileNotFoundError: If a needed shard is missing.
        ValueError: If a needed shard is cut off, or lacks a tensor that the index promises.
    """
    kept = {name: file for name, file in checkpoint.weight_files.items() if is_kept(name, layers)}
    with TemporaryDirectory(prefix="puma-hf-") as temporary:
        folder = Path(temporary)
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
        for file_name in sorted(set(kept.values())):
            path = checkpoint.fetch(file_name)
            promised = {name for name, file in kept.items() if file == file_name}
            if absent := sorted(promised - set(_tensor_names(path))):
                raise ValueError(
                    f"{file_name!r} lacks {len(absent)} tensors that {INDEX_NAME} places in it (first: "
                    f"{absent[0]!r}). Index and shards are from different versions: download the checkpoint "
                    "again."
                )
            (folder / file_name).symlink_to(path.resolve())
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        yield folder
