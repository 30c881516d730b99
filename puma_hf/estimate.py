"""What a model and a training recipe take: parameters, memory, operations, hours; before anything is downloaded.

Shapes come from a `config.json` of any family or from the known sizes of Qwen2-VL; parameters are counted on the meta
device, where a tensor has a shape and no memory. What the data alone tell (tokens, images, rows) is assumed, and said
with the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from puma_hf.checkpoint import plain_forward
from puma_hf.configs import DistillConfig, StageConfig, TrainConfig
from puma_hf.files import read_config
from puma_hf.modeling import PumaConfig
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.modeling.modeling_puma import MODEL_CLASSES
from puma_hf.settings import load_config, read_recipe

# Memory in GiB and dense bfloat16 TFLOP/s (sums in float32, no sparsity), from the makers' data sheets.
GPUS: dict[str, tuple[int, float]] = {
    "RTX 3090": (24, 71),
    "RTX 4090": (24, 165),
    "L4": (24, 121),
    "A10G": (24, 70),
    "L40S": (48, 362),
    "A100 80GB": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
}
UTILISATION = 0.35  # ours: what training of models of this size reaches of a data sheet's figure
FREE_SHARE = 0.08  # ours: what CUDA's context, kernels' workspaces and fragmentation take of a GPU

# Hidden size, inner size of the MLP, heads, heads of keys and values, vocabulary: those of the published checkpoints,
# which both have 28 layers. The rest is Qwen2VLConfig's default.
_NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_SHAPES = {"2b": (1536, 8960, 12, 2, 151_936), "7b": (3584, 18_944, 28, 4, 152_064)}
_NUM_LAYERS = 28
# Rows of the data that the recipes name: PUMA's released training script, and SimCSE's file.
_ROWS = {"M-BEIR": 1_332_790, "nli_for_simcse.csv": 275_601}
_NLI_TOKENS = 64  # its sentences are short: prompt and all, few are longer
_BITS4 = 0.52  # bytes of a weight in doubly quantised NormalFloat4


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: SentenceTransformer, item: Any) -> int:
    """Floating-point operations of embedding one input by every layer, such as a string or `{"image": path}`.

    A multiplication and an addition count as two. Elementwise operations are not counted; they are a small part.
    """
    return int(counted_pass(model, model.preprocess([item])).get_total_flops())


def counted_pass(model: SentenceTransformer, features: Mapping[str, Any]) -> FlopCounterMode:
    """Run a batch of `preprocess` through a model, and return the counter of its operations, part by part."""
    # The counter knows products, not every fused attention kernel: let attention be computed as products.
    counter = FlopCounterMode(display=False)
    with plain_forward(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(batch_to_device(dict(features), model.device))
    return counter


@dataclass(frozen=True)
class Estimate:
    """What each of `num_gpus` devices holds and computes, and what the run takes."""

    parameters: int  # of the pruned model, without the adapter and the teacher
    trainable: int  # parameters of the adapter
    memory: dict[str, int]  # bytes at the peak of a step, by what they are for
    flops_step: int
    flops_run: int | None  # None if the number of rows is not known
    num_gpus: int
    notes: tuple[str, ...]  # what was assumed, one sentence each
    gpus: tuple[str, ...] = tuple(GPUS)  # those that are asked about

    @property
    def peak(self) -> int:
        """Bytes on each device at the peak of a step."""
        return sum(self.memory.values())

    def fits(self, gpu: str) -> bool:
        """Whether a device of this name holds it, with `FREE_SHARE` left to CUDA."""
        return self.peak <= GPUS[gpu][0] * 2**30 * (1 - FREE_SHARE)

    def hours(self, gpu: str) -> float | None:
        """Hours of the run on `num_gpus` of these, at `UTILISATION` of what the data sheet promises."""
        return None if self.flops_run is None else self.flops_run / (GPUS[gpu][1] * 1e12 * UTILISATION * 3600)

    def to_markdown(self) -> str:
        """The memory by part, and a row for each GPU."""
        parts = "\n".join(f"| {name} | {size / 1e9:.1f} |" for name, size in self.memory.items() if size)
        run = "unknown (--rows)" if self.flops_run is None else f"{self.flops_run / 1e18:.3g} EFLOP a GPU"
        rows = "\n".join(
            f"| {name} | {GPUS[name][0] * 2**30 / 1e9:.0f} | {'yes' if self.fits(name) else 'no'} | "
            f"{'?' if (hours := self.hours(name)) is None else f'{hours:.3g}'} |"
            for name in self.gpus
        )
        return (
            f"{self.parameters / 1e9:.2f} B parameters, and {self.trainable / 1e6:.0f} M of LoRA that are trained\n\n"
            f"| a GPU's memory at the peak of a step | GB |\n| --- | ---: |\n{parts}\n"
            f"| **in all** | **{self.peak / 1e9:.1f}** |\n\n"
            f"a step: {self.flops_step / 1e12:.4g} TFLOP a GPU; the run: {run}\n\n"
            f"| GPU | GB | fits | hours on {self.num_gpus} |\n| --- | ---: | --- | ---: |\n{rows}\n\n"
            + "\n".join(f"- {note}" for note in self.notes)
        )


def estimate(
    recipe: str | Path,
    *,
    model: str | Path | None = None,
    num_kept_layers: int | None = None,
    tokens: int | None = None,
    images: float | None = None,
    rows: int | None = None,
    gpu: str | None = None,
    num_gpus: int = 1,
    device: str = "cuda",
) -> Estimate:
    """Estimate what a recipe of `distill` or `train` takes; nothing is loaded or downloaded.

    Args:
        recipe: YAML file.
        model: Directory or config.json of any family, or a published Qwen2-VL by id; None for the recipe's model: if
            its directory is not there yet, its name is read, such as "puma-7b-k12".
        num_kept_layers: Layers, if `model` has more.
        tokens: Length that the rows of a batch are padded to; None for the recipe's `max_length`, of NLI pairs 64.
        images: Images of a row, over all columns; None for 1, of texts 0.
        rows: Rows of the data, if the recipe does not name data that are known.
        gpu: The one name in `GPUS` that is asked about; None for all.
        num_gpus: Devices that the run is started on.
        device: Kind of device; a dropout mask takes one byte a number on "cuda", four on "cpu".

    Raises:
        ValueError: If the file is no training recipe, the shapes cannot be known, or a number is out of range.

    Example:
        >>> estimate("configs/qwen2_vl_7b_stage2.yaml", num_gpus=4).fits("A100 80GB")  # doctest: +SKIP
        True
    """
    given = {"num_gpus": num_gpus, "tokens": tokens, "rows": rows, "num_kept_layers": num_kept_layers}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1. Leave out what you do not know.")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} is not known, must be one of {', '.join(GPUS)}.")
    is_distil = read_recipe(recipe)[0].keys() <= DistillConfig.__dataclass_fields__.keys()
    config: Any = load_config(DistillConfig if is_distil else TrainConfig, recipe)
    shape, told = _shape(config, model, num_kept_layers)
    data = Path(config.data).name
    is_nli = data == "nli_for_simcse.csv"
    of_token = (shape.vision_config.patch_size * shape.vision_config.spatial_merge_size) ** 2
    pixels = config.max_pixels or 300 * of_token
    images = (0 if is_nli else 1) if images is None else images
    tokens = tokens or (_NLI_TOKENS if is_nli else config.max_length or 512)
    # An image is never cut, and the prompt around it takes 34 tokens.
    tokens = max(tokens, math.ceil(pixels / of_token) + 34 if images else 0)
    step = _Step(config, shape, tokens, config.batch_size * images, pixels, mask_bytes=1 if device == "cuda" else 4)
    if rows is None and data in _ROWS:
        rows = _ROWS[data] * (3 if is_nli and is_distil else 1)  # each sentence for itself, if no two are equal
    steps = config.max_steps if config.max_steps > 0 else None
    if steps is None and rows is not None:
        batch = config.batch_size * config.gradient_accumulation_steps * num_gpus
        steps = math.ceil(rows / batch * config.num_train_epochs)
    notes = (
        told,
        f"A step has {config.batch_size} rows of {step.columns} column(s) a GPU, padded to {tokens} tokens (--tokens), "
        f"with {images:g} images a row (--images) of {pixels // of_token} visual tokens.",
        f"The run is {'an unknown number of' if steps is None else f'{steps:,}'} steps.",
        f"Assumed, not measured: {UTILISATION:.0%} of the data sheet's operations are reached, and {FREE_SHARE:.0%} of "
        "the memory is left to CUDA. What a cached teacher takes once, before the run, is not in it.",
    )
    flops, asked = step.flops(), tuple(GPUS) if gpu is None else (gpu,)
    flops_run = None if steps is None else flops * steps
    return Estimate(step.parameters, step.trainable, step.memory(), flops, flops_run, num_gpus, notes, asked)


class _Step:
    """The sizes of a training step on one device, and what follows from them."""

    def __init__(self, config: Any, shape: Any, tokens: int, images: float, pixels: int, *, mask_bytes: int) -> None:
        self.config, self.tokens, self.images, self.mask_bytes = config, tokens, images, mask_bytes
        self.text, self.vision = shape.text_config, shape.vision_config
        self.columns = 2 + config.num_negatives if isinstance(config, TrainConfig) else 1
        self.has_teacher = config.teacher_mode == "frozen" and (isinstance(config, DistillConfig) or config.joint)
        with torch.device("meta"):
            puma = MODEL_CLASSES[type(shape)](shape)
        layers: Any = puma.language_model.layers
        # Those that `lora_config` adapts: not the gates of Qwen3.5's linear attention.
        named = [(name, part) for name, part in layers.named_modules() if isinstance(part, nn.Linear)]
        linears = [part for name, part in named if not name.endswith(("in_proj_a", "in_proj_b"))]
        self.depth, self.full_depth = self.text.num_hidden_layers, shape.original_num_hidden_layers
        # The layers of Qwen3.5 differ: each counts as their average, those that were dropped too.
        self.parameters, self.layer = count_parameters(puma), count_parameters(layers) // self.depth
        adapters = sum(config.lora_r * (part.in_features + part.out_features) for part in linears)
        self.adapter = adapters // self.depth
        self.trainable = adapters + (self.text.hidden_size if config.train_ret_token else 0)
        kinds = getattr(self.text, "layer_types", None) or ["full_attention"]
        heads, dims = self.text.num_attention_heads, getattr(self.text, "head_dim", None)
        # Linear attention is not counted: it is 1 % of its layer, and does not grow with the length.
        full_share = 1 - kinds.count("linear_attention") / len(kinds)
        self.attention_dim = full_share * (heads * dims if dims else self.text.hidden_size)
        self.vision_dim = getattr(self.vision, "embed_dim", self.vision.hidden_size)
        mergers = [part for name, part in puma.visual.named_children() if "merger" in name]  # Qwen3-VL has several
        self.merger = sum(map(count_parameters, mergers))
        self.tower = count_parameters(puma.visual) - self.merger
        self.patches = pixels // self.vision.patch_size**2  # of an image
        self.merged = self.vision.spatial_merge_size**2  # patches of a visual token

    def memory(self) -> dict[str, int]:
        """Bytes by part. Base weights are in bfloat16, as pruned; the adapter and its AdamW in float32."""
        dropped, base = (self.full_depth - self.depth) * self.layer, 2 * self.parameters
        if self.config.load_in_4bit:
            base -= int((2 - _BITS4) * self.depth * self.layer)
            dropped += self.parameters  # a teacher that cannot share four-bit weights is held whole
        vision = self.vision
        # The whole batch in float32; gradient caching keeps what the tower makes of it as well.
        pixels = 4 * self.patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if getattr(self.config, "cached", False):
            pixels += 2 * self.text.hidden_size * self.patches // self.merged
        return {
            "weights": base,
            # The forward pass keeps the adapter once more in bfloat16, for autocast.
            "adapter, float32 and bfloat16": 6 * self.trainable,
            "its gradients": 4 * self.trainable,
            "AdamW's two moments": 8 * self.trainable,
            "frozen teacher: the dropped layers": 2 * dropped if self.has_teacher else 0,
            "activations": self._activations(),
            "images": int(self.images * pixels),
        }

    def _activations(self) -> int:
        """What is alive at the peak besides weights and inputs.

        A decoder layer of width h and inner width m keeps, for each token until its backward pass, in bytes: its two
        norms' float32 inputs 8 h; queries, keys, values (repeated for all heads under a mask) and the attention's
        output 8 h; the bfloat16 inputs of the six adapters at width h with their dropout masks, 6 h (2 + mask); of the
        MLP the gate, its SiLU and the up projection 6 m, and the down adapter's input and mask, m (2 + mask). Frozen
        weights keep no input of their own. For a moment there are 12 m more, where the down adapter works in float32.
        The similarity matrix and embeddings are small beside them.
        """
        config, hidden, inner = self.config, self.text.hidden_size, self.text.intermediate_size
        number, mask = 2 if config.bf16 else 4, self.mask_bytes if config.lora_dropout else 0
        layer = hidden * (8 + 4 * number + 6 * (number + mask)) + inner * (4 * number + mask)
        kept, moment = self.depth * layer, 12 * inner
        if config.gradient_checkpointing:  # the input of each layer, and one layer's whole content, computed again
            kept, moment = self.depth * number * hidden, 12 * inner + layer
        # The loss needs all columns before the first backward pass; with gradient caching one mini-batch at a time.
        columns, num_rows = self.columns, config.batch_size
        if getattr(config, "cached", False):
            by_tokens = config.mini_batch_num_tokens and max(1, config.mini_batch_num_tokens // self.tokens)
            columns, num_rows = 1, min(config.batch_size, by_tokens or config.mini_batch_size)
        saved = num_rows * self.tokens * kept
        # The frozen vision tower keeps nothing. Its widest moment, while earlier columns are alive: 36 bytes, measured,
        # for each patch and unit of width.
        tower = 36 * self.vision_dim * self.patches * min(self.images, num_rows)
        # [RET] alone is trained in a copy of the whole table, whose gradient is as large.
        table = 2 * number * self.text.vocab_size * hidden if config.train_ret_token else 0
        return int(max(columns * saved + num_rows * self.tokens * moment, (columns - 1) * saved + tower) + table)

    def flops(self) -> int:
        """Operations of a step: matrix products of every token, padding too, and attention within the layers.

        Backward passes go through the frozen weights once (no gradient of the weights) and through the adapters twice.
        """
        config = self.config
        # A weight costs a token two operations: one multiplication, one addition. Attention of a token in a layer is
        # two products with all tokens, 2 h each.
        attention = 4 * self.tokens * self.attention_dim
        forward = 2 * (self.layer + self.adapter) + attention
        backward = 2 * self.layer + 4 * self.adapter + 2 * attention
        again = int(config.gradient_checkpointing) + int(getattr(config, "cached", False))
        a_token = self.depth * ((1 + again) * forward + backward)
        if self.has_teacher:
            a_token += self.full_depth * (2 * self.layer + attention)
        an_image = self.patches * (2 * self.tower + 4 * self.patches * self.vision_dim * self.vision.depth)
        an_image += 2 * self.patches // self.merged * self.merger
        a_batch = self.columns * config.batch_size * self.tokens * a_token + self.images * an_image
        return int(config.gradient_accumulation_steps * a_batch)


def _shape(config: StageConfig, model: str | Path | None, num_kept_layers: int | None) -> tuple[Any, str]:
    """The configuration of the pruned model, and where it is from."""
    name = str(config.model if model is None else model)
    file = Path(name) if name.endswith(".json") else Path(name, "config.json")
    if file.is_file():
        family = config_class_of(read_config(file.parent, file.name).get("model_type"))
        shape = family.from_pretrained(file, num_kept_layers=num_kept_layers)
        told = f" Activations are those of Qwen2-VL; {family.source_name} may keep more."
        return shape, f"Shapes: those of {file}.{'' if family is PumaConfig else told}"
    # A recipe names directories that other commands are still to make, such as puma-7b-k12-distilled.
    size, depth = re.search(r"(?:qwen2-vl|puma)-([27]b)\b", name.lower()), re.search(r"\bk(\d+)\b", name.lower())
    kept = num_kept_layers or (int(depth[1]) if depth else None if model is None else _NUM_LAYERS)
    if size is None or kept is None:
        problem = f"model={name!r} is no directory here, and does not name a Qwen2-VL 2B or 7B and its layers"
        raise ValueError(f"{problem}. Give --model (such as Qwen/Qwen2-VL-7B-Instruct) and --num-kept-layers.")
    text = dict(zip(_NAMES, _SHAPES[size[1]], strict=True), num_hidden_layers=_NUM_LAYERS)
    shape = PumaConfig(text_config=text, vision_config={"hidden_size": text["hidden_size"]}, num_kept_layers=kept)
    return shape, f"Shapes: Qwen2-VL-{size[1].upper()} with {kept} of {_NUM_LAYERS} layers, as {name!r} says."
