"""Write a PUMA model as a plain checkpoint of its backbone, for programs that know nothing of PUMA."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from puma_hf.checkpoint import INDEX_NAME, SINGLE_NAME, SourceCheckpoint, open_checkpoint, own_name
from puma_hf.configs import ExportFormat
from puma_hf.export_card import write_export_card
from puma_hf.export_onnx import check_onnx_is_installed, write_onnx
from puma_hf.files import ADAPTER_CONFIG, PUMA_MODEL_TYPES, is_puma_directory, new_directory, read_config
from puma_hf.modeling import RET_TOKEN
from puma_hf.modeling.configuration_puma import PumaConfigMixin, config_class_of
from puma_hf.modeling.reading_puma import reading_of
from puma_hf.settings import convert

logger = logging.getLogger(__name__)

# In an export's config.json: what the checkpoint was made of. The stock classes carry it along and do not read it.
LINEAGE_KEY = "puma_export"
CHAT_TEMPLATE = "chat_template.jinja"
_PUMA_FIELDS = tuple(entry.name for entry in fields(PumaConfigMixin))
# Where a save notes things of PUMA's, or of the machine that saved.
_NOT_STOCK = ("auto_map", "is_local", "local_files_only")


@dataclass(frozen=True)
class _Backbone:
    """A stock class, and how tensors are called in the checkpoints that were published for it."""

    model_class: Any
    processor_class: str
    text_prefix: str
    vision_prefix: str


# By the model_type of the original. vLLM's loaders rename from these names, as the stock classes do.
_BACKBONES = {
    "qwen2_vl": _Backbone(Qwen2VLForConditionalGeneration, "Qwen2VLProcessor", "model.", "visual."),
    "qwen2_5_vl": _Backbone(Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor", "model.", "visual."),
    "qwen3_vl": _Backbone(
        Qwen3VLForConditionalGeneration, "Qwen3VLProcessor", "model.language_model.", "model.visual."
    ),
}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        source: PUMA directory or Hub id.
        output: The directory written.
        model_type: That of the stock class, such as "qwen2_vl".
        num_layers: Decoder layers.
        num_parameters: Parameters written; the language-model head is tied to the embedding, so it adds none.
        num_bytes: Their bytes; in ONNX those of the whole graph, which has the text tower alone, in float32.
        format: "stock" or "onnx".
    """

    source: str
    output: str
    model_type: str
    num_layers: int
    num_parameters: int
    num_bytes: int
    format: ExportFormat = "stock"

    def __str__(self) -> str:
        if self.format == "onnx":
            return (
                f"exported the text tower of {self.num_layers} decoder layers as ONNX, {self.num_bytes:,} bytes\n"
                f"saved    {self.output}; its README.md has an example"
            )
        return (
            f"exported {self.model_type} of {self.num_layers} decoder layers, {self.num_parameters:,} parameters, "
            f"{self.num_bytes:,} bytes\n"
            f"saved    {self.output}; compare the two with: puma-hf check {self.source} --exported {self.output}"
        )


def export(
    source: str | Path,
    output: str | Path,
    *,
    format: ExportFormat = "stock",
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a PUMA model as a plain `qwen2_vl` (or `qwen2_5_vl`, `qwen3_vl`) checkpoint of k layers, without code.

    Or, with `format="onnx"`, as an ONNX graph that embeds texts; see `puma_hf.export_onnx.write_onnx`.

    The weights are the same, bit for bit, under the names of the published checkpoints; the language-model head is
    tied to the token embedding. The last hidden state at the last token, scaled to unit length, is the embedding.
    `puma_hf.parity.check.check` compares the two. One weight file is in memory at a time.

    Args:
        source: PUMA directory, or Hub id of one.
        output: New or empty directory; written whole or not at all.
        format: "stock" or "onnx".
        revision: Branch, tag or commit on the Hub.
        token: Hub token for gated or private repositories.
        overwrite: Replace `output` if it holds a PUMA model or an export.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If the source, or one of its files, is missing.
        ValueError: If it is no PUMA model, its weights are damaged or are not those of its configuration, or its
            reading has positions that stock classes do not give to images.
        FileExistsError: If `output` is not empty and `overwrite` is false, or if it holds something else.
        ImportError: If a package that the format "onnx" needs is missing.

    Example:

    ```python
    >>> from puma_hf.export import export

    >>> print(export("puma-k14-mac", "puma-k14-stock"))  # doctest: +SKIP
    ```
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{str(source)!r} is an adapter. Merge it first (puma-hf merge), and export the result.")
    if convert("format", format, ExportFormat) == "onnx":
        check_onnx_is_installed()
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    model_type: Any = PreTrainedConfig.get_config_dict(checkpoint.folder)[0].get("model_type")
    if model_type not in PUMA_MODEL_TYPES:
        raise ValueError(
            f"{str(source)!r} has model_type={model_type!r}, but what is exported is a PUMA model "
            f"({', '.join(PUMA_MODEL_TYPES)}). Make one with puma_hf.prune (puma-hf prune)."
        )
    puma_config = config_class_of(model_type).from_pretrained(checkpoint.folder)
    if puma_config.positions != "mrope" and format == "stock":
        raise ValueError(
            f"{str(source)!r} has {puma_config.positions} positions, but stock classes and vLLM give images those of "
            "M-RoPE, so other embeddings. Serve the PUMA directory itself, or export its texts (--format onnx)."
        )
    backbone = _BACKBONES[puma_config.source_model_type]
    config = _stock_config(puma_config, backbone)
    with new_directory(output, overwrite=overwrite, forbidden=checkpoint.folder, is_ours=_is_ours) as folder:
        shapes, num_bytes = _write_weights(checkpoint, backbone, folder)
        _check_weights(shapes, config, backbone, checkpoint.name)
        config.save_pretrained(folder)
        _write_processor(checkpoint, backbone, folder)
        if format == "onnx":
            num_bytes = write_onnx(folder)
        told = reading_of(read_config(checkpoint.folder, "processor_config.json").get("reading", "puma")).told
        write_export_card(folder, config, getattr(config, LINEAGE_KEY), onnx=format == "onnx", told=told)
    layers = int(config.text_config.num_hidden_layers)
    logger.info("Exported %s as %s of %d layers: %s", source, config.model_type, layers, output)
    num_parameters = sum(shape.numel() for shape in shapes.values())
    return ExportReport(str(source), str(output), config.model_type, layers, num_parameters, num_bytes, format)


def is_export(folder: Path) -> bool:
    """Whether a folder holds what `export` wrote, judged by its `config.json`."""
    config = read_config(folder)
    return config.get("model_type") in _BACKBONES and LINEAGE_KEY in config


def _is_ours(folder: Path) -> bool:
    return is_puma_directory(folder) or is_export(folder)


def _stock_config(puma_config: Any, backbone: _Backbone) -> Any:
    """The stock configuration: as many layers as were kept, and a head that needs no tensor of its own."""
    settings = puma_config.to_dict()
    lineage = {name: settings.pop(name) for name in _PUMA_FIELDS if name in settings}
    for name in ("auto_map", "custom_pipelines"):
        settings.pop(name, None)
    settings["model_type"] = puma_config.source_model_type
    config = backbone.model_class.config_class.from_dict(settings)
    config.architectures = [backbone.model_class.__name__]
    # transformers reads the first of the two, vLLM the one of the text tower.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    setattr(config, LINEAGE_KEY, lineage)
    return config


def _write_weights(
    checkpoint: SourceCheckpoint, backbone: _Backbone, folder: Path
) -> tuple[dict[str, torch.Size], int]:
    """The source's weight files, one by one, under the names of the published checkpoints."""
    shapes: dict[str, torch.Size] = {}
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file_name in sorted(set(checkpoint.weight_files.values())):
        names = [name for name, file in checkpoint.weight_files.items() if file == file_name]
        try:
            with safe_open(checkpoint.fetch(file_name), framework="pt") as file:
                tensors = {_stock_name(name, backbone): file.get_tensor(name) for name in names if _is_read(name)}
        except SafetensorError as error:
            raise ValueError(
                f"{file_name!r} of {checkpoint.name!r} is damaged, or lacks a tensor that it should hold ({error}). "
                "Download or save it again."
            ) from error
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if set(weight_map.values()) != {SINGLE_NAME}:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return shapes, num_bytes


def _is_read(name: str) -> bool:
    return not name.startswith("lm_head.")


def _stock_name(name: str, backbone: _Backbone) -> str:
    name = own_name(name)
    prefixes = (("language_model.", backbone.text_prefix), ("visual.", backbone.vision_prefix))
    return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)


def _check_weights(shapes: dict[str, torch.Size], config: Any, backbone: _Backbone, source: str) -> None:
    """Raise if the stock class would not find exactly its own tensors."""
    with torch.device("meta"):
        model = backbone.model_class(config)
    needed = {
        _stock_name(name, backbone): tensor.shape for name, tensor in model.state_dict().items() if _is_read(name)
    }
    wrong = sorted(name for name in needed.keys() | shapes.keys() if needed.get(name) != shapes.get(name))
    if wrong:
        raise ValueError(
            f"{source!r} has other tensors than its config.json says ({len(wrong)} differ, first: {wrong[0]}, "
            f"{tuple(shapes.get(wrong[0], ()))} instead of {tuple(needed.get(wrong[0], ()))}). Weights and "
            "configuration are of different models: download or save it again."
        )


def _write_processor(checkpoint: SourceCheckpoint, backbone: _Backbone, folder: Path) -> None:
    """Tokenizer, image processor and chat template, as a published checkpoint has them."""
    source = checkpoint.folder
    template = source / CHAT_TEMPLATE
    if not template.is_file():
        raise FileNotFoundError(
            f"{checkpoint.name!r} has no {CHAT_TEMPLATE}, which ends every prompt in {RET_TOKEN}. Copy it from the "
            "model's repository."
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if RET_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of {checkpoint.name!r} does not know {RET_TOKEN}, where embeddings are read: its files are "
            "missing or belong to another model. Download or save it again."
        )
    tokenizer.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(source).save_pretrained(folder)
    shutil.copyfile(template, folder / CHAT_TEMPLATE)
    _rewrite(folder / "tokenizer_config.json", processor_class=backbone.processor_class)
    _rewrite(folder / "preprocessor_config.json", processor_class=backbone.processor_class)
    parts = _read_json(source / "processor_config.json")
    if "video_processor" in parts:  # a Qwen2-VL, of the first release only where torchvision could make one
        settings = {name: value for name, value in parts["video_processor"].items() if name not in _NOT_STOCK}
        _write_json(folder / "video_preprocessor_config.json", settings)


def _rewrite(path: Path, **values: str) -> None:
    settings = {name: value for name, value in _read_json(path).items() if name not in _NOT_STOCK}
    _write_json(path, settings | values)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
