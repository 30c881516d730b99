"""Write a PUMA model as a plain checkpoint of its backbone, or as ONNX, for programs that know nothing of PUMA."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from puma_hf.checkpoint import Checkpoint, is_kept, open_checkpoint
from puma_hf.configs import ExportFormat
from puma_hf.files import ADAPTER_CONFIG, PUMA_MODEL_TYPES, new_directory, read_config, write_json
from puma_hf.modeling.configuration_puma import PumaConfigMixin, config_class_of, named_layers
from puma_hf.modeling.modeling_puma import last_token_state
from puma_hf.modeling.readings_puma import reading_of
from puma_hf.settings import convert

logger = logging.getLogger(__name__)

# In an export's config.json: what the checkpoint was made of. The stock classes carry it along and do not read it.
LINEAGE_KEY = "puma_export"
ONNX_NAME = "model.onnx"
_TEMPLATE = "chat_template.jinja"
_CARD = Path(__file__).with_name("export_card.jinja")
# What a save notes of PUMA, or of the machine that saved.
_NOT_STOCK = ("auto_map", "is_local", "local_files_only", "custom_pipelines")
_NEEDED_FOR_ONNX = ("onnx", "onnxruntime", "onnxscript")
# Largest difference of a number of a unit vector; float32 on another runtime differs by 1e-7.
_ONNX_BOUND = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, `num_bytes` of parameters; in ONNX of the whole graph: the text tower alone, in float32."""

    output: str
    model_type: str
    num_layers: int
    num_bytes: int
    format: ExportFormat = "stock"

    def __str__(self) -> str:
        how = "" if self.format == "stock" else " as ONNX, for texts"
        what = f"{self.model_type} of {self.num_layers} decoder layers{how}, {self.num_bytes:,} bytes"
        return f"exported {what}\nsaved    {self.output}; its README.md says how to use it"


def export(
    source: str | Path,
    output: str | Path,
    *,
    format: ExportFormat = "stock",
    num_kept_layers: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a PUMA model as a plain `qwen2_vl` (or `qwen2_5_vl`, `qwen3_vl`, `qwen3_5`) checkpoint, without code.

    The weights are the same, bit for bit, under the names of the published checkpoints; the language-model head is
    tied to the token embedding. The last hidden state at the last token, scaled to unit length, is the embedding.
    `puma-hf check --exported` compares the two.

    Or, with `format="onnx"`, a graph that embeds texts: it takes `input_ids` and `attention_mask`, int64 `(batch_size,
    sequence_length)`, padded on either side, and gives `sentence_embedding`, float32 `(batch_size, embedding_dim)`.

    Args:
        source: PUMA directory, or Hub id of one.
        output: New or empty directory; written whole or not at all.
        format: "stock" or "onnx".
        num_kept_layers: Number of decoder layers to export, from the input; all that the model has by default.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; by default the one that huggingface_hub has stored.
        overwrite: Replace `output` if it holds an export.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If the source, or one of its files, is missing.
        ValueError: If it is no PUMA model, is damaged, has positions that stock classes do not give to images, or is to
            be ONNX and has linear attention; or if it has no such number of layers.
        FileExistsError: If `output` is not empty and `overwrite` is false, or if it holds something else.
        ImportError: If a package that the format "onnx" needs is missing.
        RuntimeError: If onnxruntime computes other embeddings than PyTorch.

    Example:
        >>> print(export("puma-k14-mac", "puma-k14-stock"))  # doctest: +SKIP
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{str(source)!r} is an adapter. Merge it first (puma-hf merge), and export the result.")
    missing = [name for name in _NEEDED_FOR_ONNX if find_spec(name) is None]
    if convert("format", format, ExportFormat) == "onnx" and missing:
        raise ImportError(f"format='onnx' needs {', '.join(missing)}, not installed here: pip install 'puma-hf[onnx]'.")
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    model_type = read_config(checkpoint.folder).get("model_type", "")
    if model_type not in PUMA_MODEL_TYPES:
        raise ValueError(f"{str(source)!r} has model_type={model_type!r} and is no PUMA model. See puma-hf prune.")
    puma_config = config_class_of(model_type).from_pretrained(checkpoint.folder, num_kept_layers=num_kept_layers)
    if puma_config.positions != "mrope" and format == "stock":
        problem = f"{str(source)!r} has {puma_config.positions} positions, which stock classes do not give to images"
        raise ValueError(f"{problem}. Serve the PUMA directory itself, or export its texts (--format onnx).")
    if format == "onnx" and puma_config.has_linear_attention:
        problem = f"{str(source)!r} has linear attention, whose loop over a text would be written out for one length"
        raise ValueError(f"{problem}. Export a stock checkpoint (--format stock), or serve the PUMA directory itself.")
    config, layers = _stock_config(puma_config), puma_config.num_kept_layers
    reading = reading_of(read_config(checkpoint.folder, "processor_config.json").get("reading", "puma"))

    def is_export(folder: Path) -> bool:
        return LINEAGE_KEY in read_config(folder)

    with new_directory(output, overwrite=overwrite, forbidden=checkpoint.folder, is_ours=is_export) as folder:
        num_bytes = _write_weights(checkpoint, config, folder)
        needed = reading.end or "<|image_pad|>"
        _write_processor(checkpoint.folder, type(config).__name__.replace("Config", "Processor"), folder, needed)
        if format == "onnx":
            num_bytes = _write_onnx(folder)
        card = Template(_CARD.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
            onnx=format == "onnx",
            name="path/to/this/directory",
            config=config,
            kept=named_layers(puma_config.kept_layers or range(layers)),
            source=puma_config.source_name_or_path,
            total=puma_config.original_num_hidden_layers,
            end=reading.end,
            told=reading.told,  # what the reading makes of inputs, to be done before the template
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("Exported %s as %s of %d layers: %s", source, config.model_type, layers, output)
    return ExportReport(str(output), config.model_type, layers, num_bytes, format)


def _stock_config(puma_config: Any) -> Any:
    """The stock configuration: as many layers as were kept, and a head that needs no tensor of its own."""
    settings = {name: value for name, value in puma_config.to_dict().items() if name not in _NOT_STOCK}
    own = [entry.name for entry in fields(PumaConfigMixin)]
    lineage = {name: settings.pop(name) for name in own if name in settings}
    # A stock class of fewer layers is still the stock class: the number of layers tells it all.
    settings["model_type"] = puma_config.source_model_type
    config = CONFIG_MAPPING[puma_config.source_model_type].from_dict(settings)
    # transformers reads the first of the two, vLLM the one of the text tower.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.text_config.use_cache = False  # no embedder reads one, and of linear attention alone none can be made
    setattr(config, LINEAGE_KEY, lineage)
    return config


def _write_weights(checkpoint: Checkpoint, config: Any, folder: Path) -> int:
    """Save the stock model, which names tensors as the published checkpoints do; bytes, the head aside."""
    layers = range(config.text_config.num_hidden_layers)
    with torch.device("meta"):  # where the whole model takes no memory: it is held once, by the tensors that are read
        model: Any = AutoModelForImageTextToText.from_config(config)
    try:
        kept = {name: checkpoint[name] for name in checkpoint if is_kept(name, layers)}
        model.model.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        problem = f"{checkpoint.name!r} has other tensors than its config.json says"
        raise ValueError(f"{problem}. Save it again. {error}") from error
    # The head that the stock class wants costs nothing: it is the embedding, and is not written.
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)  # it does not generate
    return sum(parameter.nbytes for parameter in model.model.parameters())


def _write_processor(source: Path, processor_class: str, folder: Path, needed: str) -> None:
    """Tokenizer, in which the token `needed` is, image processor and chat template, as published checkpoints have."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if needed not in tokenizer.get_vocab():  # without its files transformers builds an empty one
        raise ValueError(f"{str(source)!r} lacks its tokenizer, with {needed}. Download or save it again.")
    tokenizer.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(source).save_pretrained(folder)
    shutil.copyfile(source / _TEMPLATE, folder / _TEMPLATE)
    written = {name: read_config(folder, name) for name in ("tokenizer_config.json", "preprocessor_config.json")}
    written = {name: {**one, "processor_class": processor_class} for name, one in written.items()}
    if video := read_config(source, "processor_config.json").get("video_processor"):
        written["video_preprocessor_config.json"] = video  # of the first release only where torchvision could make one
    for name, settings in written.items():
        write_json(folder / name, {key: value for key, value in settings.items() if key not in _NOT_STOCK})


# ---------------------------------------------------------------------------------------------------------------- ONNX


class _TextEmbedder(nn.Module):
    """The decoder of a stock model, its positions, and what makes an embedding of its states."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The same in time, height and width: a text has no others.
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
        states = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return nn.functional.normalize(last_token_state(states, attention_mask), dim=-1)


def _write_onnx(folder: Path) -> int:
    """Put an ONNX graph in the place of a stock export's weights, compare the two, and return its bytes."""
    from onnxruntime import InferenceSession

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    embedder = _TextEmbedder(model.model.language_model).eval()
    tokenizer, names = AutoTokenizer.from_pretrained(folder), ["input_ids", "attention_mask"]
    with torch.no_grad():
        program: Any = torch.onnx.export(
            embedder,
            tuple(tokenizer(["a red apple", "a"], padding=True, return_tensors="pt")[name] for name in names),
            input_names=names,
            output_names=["sentence_embedding"],
            dynamic_shapes=({0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"}),
            dynamo=True,
            verbose=False,
        )
    program.save(folder / ONNX_NAME, external_data=True)
    # Other texts, of other lengths: what the export took for a constant shows.
    batch = tokenizer(["two green pears on a table", "a", "an apple"], padding=True, return_tensors="pt")
    session = InferenceSession(str(folder / ONNX_NAME), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: batch[name].numpy() for name in names})
    with torch.inference_mode():
        expected = embedder(*(batch[name] for name in names))
    if not torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=_ONNX_BOUND):  # of NaN, too
        differ = f"ONNX and PyTorch differ by more than {_ONNX_BOUND}"
        raise RuntimeError(f"{differ}. Try other releases of torch, onnxscript and onnxruntime.")
    for path in (*folder.glob("*.safetensors*"), *folder.glob("*preprocessor_config.json")):
        path.unlink()
    return sum(path.stat().st_size for path in folder.glob(f"{ONNX_NAME}*"))
