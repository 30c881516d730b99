"""Whether the forms of one model give the same embeddings: by both loaders, merged, saved again, exported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer

from puma_hf.checkpoint import open_checkpoint, plain_forward
from puma_hf.export import export
from puma_hf.files import is_adapter_directory, is_puma_directory, named_base, read_config
from puma_hf.hub.load_check import (
    COSINE_TOLERANCE,
    FEATURES,
    Measure,
    check_inputs,
    differences,
    embed_features,
    encode,
    features_of,
)
from puma_hf.modeling.modeling_puma import last_token_state
from puma_hf.modeling.processing_puma import SETTINGS_FILE
from puma_hf.pruning import cut_copy
from puma_hf.sources import find_source

# Largest difference of a number of an embedding, which is of length 1, in float32.
TOLERANCE = 1e-5
_IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True)
class ParityRow:
    """How far one form of a model is from another."""

    form: str
    compared_with: str
    measure: Measure  # of two numbers of embeddings, or of two weights as a share of the largest of their tensor
    largest: float  # over all inputs; NaN if an embedding is
    bound: float
    worst: str  # what the input with the largest difference is, or the tensor's name

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound; NaN never is."""
        return self.largest <= self.bound

    def __str__(self) -> str:
        words = f"{self.form:<27} {self.compared_with:<20} {self.measure:<20} {self.largest:.1e}  {self.bound:<5.0e}"
        return f"{words}  {self.worst}  {'ok' if self.ok else 'DIFFERS'}"


@dataclass(frozen=True)
class ParityReport:
    """What `check` found: the directory, on how many inputs, and a row for each pair of forms."""

    directory: str
    num_inputs: int
    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        """Whether no form differs."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        wrong = [row.form for row in self.rows if not row.ok]
        verdict = f"{', '.join(wrong)}: not what they should be" if wrong else "all forms agree"
        lines = [f"{'form':<27} {'compared with':<20} {'measure':<20} largest  bound  worst"]
        return "\n".join([*lines, *map(str, self.rows), f"{self.directory}, {self.num_inputs} inputs: {verdict}"])


def check(
    directory: str | Path,
    *,
    merged: str | Path | None = None,
    base: str | Path | None = None,
    exported: str | Path | None = None,
    source: str | Path | None = None,
    num_kept_layers: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> ParityReport:
    """Compare all forms of a model on a few drawn pictures and texts.

    The plain forward pass of AutoModel, in float32, is what most are measured by. Of an adapter the merged model is
    checked, and the adapter on its base is compared with it. The weights of an export and of a merge are compared one
    by one, too, as no inputs reach all of them. Copies are made in a temporary directory and removed.

    Args:
        directory: PUMA directory, or one that training saved with `adapter_config.json`. Its code is run.
        merged: PUMA directory that the adapter was merged into; by default it is merged for the check.
        base: PUMA directory that the adapter was trained on; by default the one it names.
        exported: What `puma_hf.export.export` wrote; by default the model is exported for the check.
        source: The embedder that this is a copy of with all its layers: both are to embed alike.
        num_kept_layers: Check a copy of the PUMA directory that is cut to so many layers, and compare it with the
            directory opened at that depth.
        seed: Draws the inputs.
        device: Where the model runs.

    Returns:
        A row for each pair of forms; `print` shows a table, and `ok` tells whether none differs.

    Raises:
        FileNotFoundError: If the directory is none of ours, or the adapter's base is missing.
        ValueError: If `merged` is no PUMA model, the adapter does not fit its base, a model with a `source` lacks
            some of its layers or has a `[RET]` of its own, or the model has not `num_kept_layers`, or is an adapter.

    Example:

    ```python
    >>> from puma_hf.hub.check import check

    >>> check("puma-k14-mac").ok  # doctest: +SKIP
    True
    ```
    """
    adapter, is_adapter = Path(directory), is_adapter_directory(directory)
    if not is_adapter and (merged or base):
        raise ValueError(f"merged or base is given, but {str(directory)!r} is no adapter. Leave it out.")
    if merged and not is_puma_directory(Path(merged)):
        raise ValueError(f"merged={str(merged)!r} holds no PUMA model. Name what puma-hf merge has written.")
    with TemporaryDirectory(prefix="puma-hf-") as temporary:
        scratch, folder = Path(temporary), Path(merged or directory)
        if num_kept_layers is not None:
            cut_copy(adapter, folder := scratch / "cut", num_kept_layers)
        elif is_adapter and merged is None:
            from puma_hf.trainer.merge import merge_adapter

            merge_adapter(adapter, folder := scratch / "merged", base=base)
        forms = Forms(folder, scratch, check_inputs(seed), device)
        rows = [*forms.of_model(), *forms.of_export(exported)]
        rows += forms.of_whole(adapter, num_kept_layers) if num_kept_layers is not None else []
        rows += forms.of_adapter(adapter, base or named_base(adapter)) if is_adapter else []
        rows += forms.of_source(source) if source else []
    shown = f"{directory}{'' if num_kept_layers is None else f', first {num_kept_layers} layers'}"
    return ParityReport(shown, len(forms.inputs), tuple(rows))


class Forms:
    """The forms of the model in `folder`; each is opened and let go before the next, for models are large.

    `of_model` makes the reference that most of the others are compared with, so it comes first.
    """

    def __init__(self, folder: Path, scratch: Path, inputs: list[dict[str, Any]], device: str = "cpu") -> None:
        self.folder, self.scratch, self.inputs, self.device = folder, scratch, inputs, device
        self.features = features_of(folder, inputs)
        self.reference = torch.empty(0)
        settings = read_config(folder, SETTINGS_FILE)  # an instruction of an embedder's, for inputs without one
        self.default = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))

    def of_model(self) -> Iterator[ParityRow]:
        model = open_model(self.folder, torch.float32, self.device)
        self.reference = embed_features(model, self.features)
        padded = embed_features(model, features_of(self.folder, self.inputs, padding_side="right"))
        yield self._row("padded on the right", "padded on the left", padded)
        del model
        with self._opened(self.folder, torch.float32) as opened:
            fast = encode(opened, self.inputs)
            yield self._row("SentenceTransformer", "AutoModel", fast)
            with plain_forward(opened):
                yield self._row("fast path off", "fast path on", encode(opened, self.inputs), fast)
        # In the data type that the weights have: a copy has the very same ones.
        with self._opened(self.folder, "auto") as opened:
            expected = encode(opened, self.inputs)
            opened.save_pretrained(str(self.scratch / "saved"))
        with self._opened(self.scratch / "saved", "auto") as opened:
            yield self._row("saved and loaded again", "SentenceTransformer", encode(opened, self.inputs), expected)
        rounded = embed_features(open_model(self.folder, torch.bfloat16, self.device), self.features)
        yield self._row("in bfloat16", "AutoModel", rounded, measure="1 - cosine")

    def of_export(self, exported: str | Path | None) -> Iterator[ParityRow]:
        folder = Path(exported or self.scratch / "exported")
        if not exported:
            if read_config(self.folder).get("positions", "mrope") != "mrope":
                return  # stock classes do not have its positions
            export(self.folder, folder)
        model = open_model(folder, torch.float32, self.device, stock=True)
        yield self._row("exported, stock classes", "AutoModel", embed_stock(model, self.features))
        by_stock = embed_stock(model, stock_features(folder, self.inputs, default=self.default))
        yield self._row("exported, stock inputs too", "AutoModel", by_stock)
        found, expected = (open_checkpoint(one) for one in (folder, self.folder))
        yield compare_weights("exported, weights", "the model", found, expected, bound=0)

    def of_source(self, source: str | Path) -> Iterator[ParityRow]:
        config, checkpoint = read_config(self.folder), open_checkpoint(source)
        if config["num_kept_layers"] != config["original_num_hidden_layers"] or config.get("ret_token_id") is not None:
            least = "only an embedder's copy with all its layers, and without [RET], embeds as its source does"
            raise ValueError(f"source={str(source)!r}, but {least}. Prune it with every layer first.")
        tokenizer, features = AutoTokenizer.from_pretrained(checkpoint.folder), dict(self.features)
        if config.get("positions") == "sequential":
            ids = features["input_ids"]  # padded on the left, which shifts positions and changes nothing
            features["position_ids"] = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        model = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).to(self.device).eval()
        yield self._row("source, stock classes", "AutoModel", embed_stock(model, features))
        if (reading := read_config(self.folder, "processor_config.json").get("reading")) == "source":
            tokenizer.chat_template = find_source(checkpoint, tokenizer, reading).template
            how: dict[str, Any] = {"tokenizer": tokenizer, "default": self.default}
            how["size"] = AutoImageProcessor.from_pretrained(self.folder).size
            stock = stock_features(checkpoint.folder, self.inputs, **how)
            yield self._row("source, stock inputs too", "AutoModel", embed_stock(model, stock))

    def of_whole(self, whole: Path, num_kept_layers: int) -> Iterator[ParityRow]:
        """Those of the directory that the model was cut from, opened at its depth."""
        model = open_model(whole, torch.float32, self.device, num_kept_layers=num_kept_layers)
        yield self._row("whole, opened at this depth", "AutoModel", embed_features(model, self.features))
        with self._opened(whole, torch.float32, num_kept_layers=num_kept_layers) as opened:
            yield self._row("the same, with encode", "AutoModel", encode(opened, self.inputs))

    def of_adapter(self, adapter: Path, base: str | Path) -> Iterator[ParityRow]:
        from peft import PeftModel

        plain = AutoModel.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, str(adapter)).to(self.device).eval()
        # A merged model is saved in its base's data type, which may round the adapter's part away.
        is_exact = read_config(self.folder).get("dtype") in (None, "float32")
        measure: Measure = "difference" if is_exact else "1 - cosine"
        yield self._row("adapter on its base", "merged", embed_features(model, self.features), measure=measure)
        # Inputs reach a few rows of the embedding only, and a small error may not show in them.
        merged: Any = model.merge_and_unload()
        stored, bound = open_checkpoint(self.folder), TOLERANCE if is_exact else COSINE_TOLERANCE
        yield compare_weights("merged, weights", "adapter and base", stored, merged.state_dict(), bound=bound)

    def _row(
        self, form: str, to: str, found: Tensor, expected: Tensor | None = None, measure: Measure = "difference"
    ) -> ParityRow:
        """Compare embeddings, `(num_inputs, embedding_dim)`, by cosine where weights are rounded to two bytes."""
        by_input = differences(found, self.reference if expected is None else expected, measure)
        worst = int(by_input.argmax())  # of NaN, too
        bound = TOLERANCE if measure == "difference" else COSINE_TOLERANCE
        return ParityRow(form, to, measure, float(by_input[worst]), bound, ", ".join(self.inputs[worst]))

    @contextmanager
    def _opened(self, folder: Path, dtype: torch.dtype | str, **cut: int) -> Iterator[SentenceTransformer]:
        how: Any = {"trust_remote_code": True, "device": self.device, "model_kwargs": {"dtype": dtype, **cut}}
        model = SentenceTransformer(str(folder), **how)
        yield model.eval()
        model.to("meta")  # it holds itself in a cycle, so its weights would stay a while


def open_model(folder: Path, dtype: torch.dtype, device: str = "cpu", *, stock: bool = False, **cut: int) -> Any:
    """A PUMA directory by AutoModel, with its own code; or an export by the stock class, without any."""
    auto: Any = AutoModelForImageTextToText if stock else AutoModel
    return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=not stock, **cut).to(device).eval()


def stock_features(
    folder: Path, inputs: Sequence[Any], *, tokenizer: Any = None, default: str | None = None, **images: Any
) -> dict[str, Tensor]:
    """One batch by the tokenizer, image processor and chat template of an export, without any code of PUMA's.

    Written with the parts and not with AutoProcessor, which for these families needs torchvision. Of an embedder,
    `default` is the instruction of inputs without one, and `images` are options of its image processor.
    """
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, **images)
    pictures = [picture for one in inputs for picture in one.get("image", [])]
    pixels = dict(image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    grids = pixels["image_grid_thw"].prod(dim=1).tolist() if pictures else []
    counts = iter(count // image_processor.merge_size**2 for count in grids)
    texts = []
    for one in inputs:  # the instruction is the system message, and pictures come first
        content: list[dict[str, Any]] = [{"type": "image"} for _ in one.get("image", [])]
        content += [{"type": "text", "text": one["text"]}] if "text" in one else []
        instruction = one.get("instruction", default)
        chat = [{"role": "system", "content": instruction}] if instruction else []
        prompt = tokenizer.apply_chat_template([*chat, {"role": "user", "content": content}], tokenize=False)
        first, *rest = str(prompt).split(_IMAGE_TOKEN)
        # Each picture's placeholder becomes as many as it has tokens.
        texts.append(first + "".join(_IMAGE_TOKEN * next(counts) + part for part in rest))
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    is_image = batch["input_ids"] == tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return {name: batch[name] for name in FEATURES[:2]} | {"mm_token_type_ids": is_image.int(), **pixels}


@torch.inference_mode()
def embed_stock(model: Any, features: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of a stock model at the last token, scaled to unit length: `(batch_size, hidden_size)`."""
    names = (*FEATURES, "position_ids")
    on_device = {name: tensor.to(model.device) for name, tensor in features.items() if name in names}
    states = getattr(model, "model", model)(**on_device).last_hidden_state
    return normalize(last_token_state(states, on_device["attention_mask"]).float(), dim=-1).cpu()


def compare_weights(
    form: str, to: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, bound: float
) -> ParityRow:
    """Compare two sets of tensors by name: drawn inputs never reach every row of an embedding.

    A difference is a share of the largest number of its tensor, once one has the other's data type. It is infinite if
    one is missing, of another shape, or not finite.
    """
    largest, worst = 0.0, "all tensors"
    for name in found.keys() | expected.keys():
        one, other, difference = found.get(name), expected.get(name), math.inf
        if one is not None and other is not None and one.shape == other.shape:
            rounded = other.cpu().to(one.dtype)
            if torch.equal(one, rounded):  # the copies below are large
                continue
            share = float((one.double() - rounded.double()).abs().max() / rounded.double().abs().max())
            difference = share if math.isfinite(share) else math.inf
        if difference > largest:
            largest, worst = difference, name
    return ParityRow(form, to, "relative difference", largest, bound, worst)
