"""Whether the forms of one model give the same embeddings: merged, saved again, exported, padded, truncated."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from puma_hf.checkpoint import open_checkpoint, plain_forward
from puma_hf.embedding.embed import embed
from puma_hf.export import export
from puma_hf.files import ADAPTER_CONFIG, is_puma_directory, named_base, read_config
from puma_hf.modeling import PumaModel
from puma_hf.modeling.modeling_puma import last_token_state

logger = logging.getLogger(__name__)

# Largest difference of a number of an embedding, which is of length 1, in float32.
TOLERANCE = 1e-5
# Largest 1 - cosine where weights are rounded to bfloat16.
COSINE_TOLERANCE = 1e-2
_IMAGE_TOKEN = "<|image_pad|>"
_FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
_WORDS = ["a red apple", "on the", "table", "of", "two", "who painted", "7", "windows?"]
_WORDS += ["é", "苹果", "1998,", "(north)"]
_FIND, _ANSWER = "Find an image that matches the sentence.", "Retrieve a passage that answers the question."

Measure = Literal["difference", "1 - cosine", "relative difference"]


@dataclass(frozen=True)
class ParityRow:
    """How far one form of a model is from another.

    Attributes:
        form: What was compared.
        compared_with: With what.
        measure: "difference" is that of two numbers at the same place of two embeddings; "relative difference" that of
            two weights, as a share of the largest of their tensor.
        largest: The largest over all inputs; NaN if an embedding is.
        bound: What it may be.
        worst: What the input with the largest difference is; of weights the tensor's name.
    """

    form: str
    compared_with: str
    measure: Measure
    largest: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound; NaN never is."""
        return self.largest <= self.bound

    def __str__(self) -> str:
        words = f"{self.form:<27} {self.compared_with:<25} {self.measure:<20} {self.largest:.1e}  {self.bound:<5.0e}"
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
        lines = [f"{'form':<27} {'compared with':<25} {'measure':<20} largest  bound  worst"]
        return "\n".join([*lines, *map(str, self.rows), f"{self.directory}, {self.num_inputs} inputs: {verdict}"])


def check(
    directory: str | Path,
    *,
    merged: str | Path | None = None,
    base: str | Path | None = None,
    exported: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> ParityReport:
    """Compare all forms of a model on a few drawn pictures and texts.

    The plain forward pass of AutoModel, in float32, is what the others are measured by: SentenceTransformer, with its
    fast path and without; padding on the other side; one input at a time; fewer dimensions; `puma_hf.embed`; the
    model saved and loaded again; bfloat16; and an export by the stock classes. Of an adapter the merged model is
    checked so, and the adapter on its base is compared with it. The weights of an export and of a merge are compared
    one by one, too, as no inputs reach all of them. Copies are made in a temporary directory and removed.

    Args:
        directory: PUMA directory, or one that training saved with `adapter_config.json`. Its code is run.
        merged: PUMA directory that the adapter was merged into; by default it is merged for the check.
        base: PUMA directory that the adapter was trained on; by default the one it names.
        exported: What `puma_hf.export.export` wrote; by default the model is exported for the check.
        seed: Draws the inputs.
        device: Where the model runs.

    Returns:
        A row for each pair of forms; `print` shows a table, and `ok` tells whether none differs.

    Raises:
        FileNotFoundError: If the adapter's base is missing.
        ValueError: If a directory is no PUMA model, or the adapter does not fit its base.

    Example:

    ```python
    >>> from puma_hf.hub.check import check

    >>> check("puma-k14-mac").ok  # doctest: +SKIP
    True
    ```
    """
    folder, adapter = Path(directory if merged is None else merged), Path(directory)
    is_adapter = (adapter / ADAPTER_CONFIG).is_file()
    if not is_adapter and (merged is not None or base is not None):
        raise ValueError(f"merged or base is given, but {str(directory)!r} is no adapter: it has no {ADAPTER_CONFIG}.")
    if not is_puma_directory(folder) and not (is_adapter and merged is None):
        raise ValueError(f"{str(folder)!r} holds no PUMA model, by its config.json. An export is named as --exported.")
    with TemporaryDirectory(prefix="puma-hf-") as temporary:
        scratch = Path(temporary)
        if is_adapter and merged is None:
            from puma_hf.trainer.merge import merge_adapter

            merge_adapter(adapter, folder := scratch / "merged", base=base)
        forms = Forms(folder, scratch, check_inputs(seed), device)
        rows = [*forms.by_auto_model(), *forms.by_sentence_transformer(), forms.saved_again(), forms.rounded()]
        rows += forms.exported(None if exported is None else Path(exported))
        rows += forms.not_merged(adapter, base or named_base(adapter)) if is_adapter else []
    report = ParityReport(str(directory), len(forms.inputs), tuple(rows))
    logger.info("Checked %s: %s", directory, "ok" if report.ok else "a form differs")
    return report


class Forms:
    """The forms of the model in `folder`; each opens what it needs and lets it go, for models are large.

    `by_auto_model` makes the reference that most of the others are compared with, so it comes first.
    """

    def __init__(self, folder: Path, scratch: Path, inputs: list[dict[str, Any]], device: str = "cpu") -> None:
        self.folder, self.scratch, self.inputs, self.device = folder, scratch, inputs, device
        self.features = features_of(folder, inputs)
        self.reference = torch.empty(0)

    def _row(self, form: str, found: Tensor, expected: Any = None, *, to: str = "AutoModel", **how: Any) -> ParityRow:
        kinds = [", ".join(one) for one in self.inputs]
        return compare(form, to, found, self.reference if expected is None else expected, kinds, **how)

    def by_auto_model(self) -> Iterator[ParityRow]:
        model = open_model(self.folder, torch.float32, self.device)
        self.reference = embed_features(model, self.features)
        padded = features_of(self.folder, self.inputs, padding_side="right")
        yield self._row("padded on the right", embed_features(model, padded), to="padded on the left")
        # A batch must not change what an input is: padding, packing and positions are all by input.
        single = [embed_features(model, features_of(self.folder, [one])) for one in self.inputs]
        yield self._row("one input at a time", torch.cat(single), to="all in one batch")

    def by_sentence_transformer(self) -> Iterator[ParityRow]:
        with _opened(self.folder, torch.float32, self.device) as model:
            fast = encode(model, self.inputs)
            yield self._row("SentenceTransformer", fast)
            found = torch.from_numpy(embed(model, self.inputs, show_progress_bar=False).embeddings)
            yield self._row("puma_hf.embed", found, fast, to="SentenceTransformer")
            # As Matryoshka training promises, what is left is scaled to unit length again.
            kept = max(1, self.reference.shape[1] // 2)
            cut = encode(model, self.inputs, truncate_dim=kept, normalize_embeddings=True)
            expected = normalize(self.reference[:, :kept], dim=-1)
            yield self._row(f"truncated to {kept}", cut, expected, to=f"the first {kept} of AutoModel")
            with plain_forward(model):
                yield self._row("fast path off", encode(model, self.inputs), fast, to="fast path on")

    def saved_again(self) -> ParityRow:
        """Save and load in the data type that the weights have: not a bit may change."""
        with _opened(self.folder, "auto", self.device) as model:
            expected = encode(model, self.inputs)
            model.save_pretrained(str(self.scratch / "saved"))
        with _opened(self.scratch / "saved", "auto", self.device) as model:
            return self._row("saved and loaded again", encode(model, self.inputs), expected, to="SentenceTransformer")

    def rounded(self) -> ParityRow:
        model = open_model(self.folder, torch.bfloat16, self.device)
        return self._row("in bfloat16", embed_features(model, self.features), measure="1 - cosine")

    def exported(self, folder: Path | None) -> Iterator[ParityRow]:
        if folder is None and read_config(self.folder).get("positions", "mrope") != "mrope":
            logger.info("%s is not compared with an export: stock classes do not have its positions.", self.folder)
            return
        if folder is None:
            export(self.folder, folder := self.scratch / "exported")
        model = open_model(folder, torch.float32, self.device, stock=True)
        yield self._row("exported, stock classes", embed_stock(model, self.features))
        yield self._row("exported, stock inputs too", embed_stock(model, stock_features(folder, self.inputs)))
        found, expected = (open_checkpoint(one) for one in (folder, self.folder))
        yield compare_weights("exported, weights", "the model", found, expected, bound=0)

    def not_merged(self, adapter: Path, base: str | Path) -> Iterator[ParityRow]:
        from peft import PeftModel

        plain = PumaModel.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, str(adapter)).to(self.device).eval()
        # A merged model is saved in its base's data type, which may round the adapter's part away.
        is_exact = read_config(self.folder).get("dtype") in (None, "float32")
        measure: Measure = "difference" if is_exact else "1 - cosine"
        yield self._row("adapter on its base", embed_features(model, self.features), to="merged", measure=measure)
        # Inputs reach a few rows of the embedding only, and a small error may not show in them.
        merged: Any = model.merge_and_unload()
        stored, bound = open_checkpoint(self.folder), TOLERANCE if is_exact else COSINE_TOLERANCE
        yield compare_weights("merged, weights", "adapter and base", stored, merged.state_dict(), bound=bound)


# --- embeddings by every way in


def open_model(folder: Path, dtype: torch.dtype, device: str = "cpu", *, stock: bool = False) -> Any:
    """A PUMA directory by AutoModel, with the code that lies in it; or an export by the stock class, without any."""
    auto: Any = AutoModelForImageTextToText if stock else AutoModel
    return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=not stock).to(device).eval()


@contextmanager
def _opened(folder: Path, dtype: torch.dtype | str, device: str) -> Iterator[SentenceTransformer]:
    """A SentenceTransformer, whose weights go with the block: it holds itself in a cycle, so it would stay a while."""
    model = SentenceTransformer(str(folder), trust_remote_code=True, device=device, model_kwargs={"dtype": dtype})
    yield model.eval()
    model.to("meta")


def features_of(folder: Path, inputs: Sequence[Any], *, padding_side: str = "left") -> dict[str, Tensor]:
    """One batch by a PUMA directory's own processor."""
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = padding_side
    batch = processor.process_inputs(list(inputs))
    return {name: batch[name] for name in _FEATURES if name in batch}


@torch.inference_mode()
def embed_features(model: Any, features: Mapping[str, Tensor]) -> Tensor:
    """Embeddings `(batch_size, embedding_dim)` of a PUMA model, or of an adapter on one."""
    embeddings = model(**{name: tensor.to(model.device) for name, tensor in features.items()}).embeddings
    return torch.as_tensor(embeddings.float().cpu())


def encode(model: SentenceTransformer, inputs: Sequence[Any], **options: Any) -> Tensor:
    """Embeddings of a SentenceTransformer, `(num_inputs, embedding_dim)`."""
    found: Any = model.encode(list(inputs), convert_to_tensor=True, show_progress_bar=False, **options)
    return torch.as_tensor(found.float().cpu())


def stock_features(folder: Path, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """One batch by the tokenizer, image processor and chat template of an export, without any code of PUMA's.

    Written with the parts and not with AutoProcessor, which for these families needs torchvision.
    """
    tokenizer, image_processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    pictures = [picture for one in inputs for picture in one.get("image", [])]
    images = dict(image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    grids = images["image_grid_thw"].prod(dim=1).tolist() if pictures else []
    counts = iter(count // image_processor.merge_size**2 for count in grids)
    texts = []
    for one in inputs:  # the instruction is the system message, and pictures come first
        content: list[dict[str, Any]] = [{"type": "image"} for _ in one.get("image", [])]
        content += [{"type": "text", "text": one["text"]}] if "text" in one else []
        chat = [{"role": "system", "content": one["instruction"]}] if "instruction" in one else []
        prompt = tokenizer.apply_chat_template([*chat, {"role": "user", "content": content}], tokenize=False)
        first, *rest = str(prompt).split(_IMAGE_TOKEN)
        # Each picture's placeholder becomes as many as it has tokens.
        texts.append(first + "".join(_IMAGE_TOKEN * next(counts) + part for part in rest))
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    is_image = batch["input_ids"] == tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return {name: batch[name] for name in _FEATURES[:2]} | {"mm_token_type_ids": is_image.int(), **images}


@torch.inference_mode()
def embed_stock(model: Any, features: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of a stock model at the last token, scaled to unit length: `(batch_size, hidden_size)`."""
    on_device = {name: tensor.to(model.device) for name, tensor in features.items() if name in _FEATURES}
    states = model.model(**on_device).last_hidden_state
    return normalize(last_token_state(states, on_device["attention_mask"]).float(), dim=-1).cpu()


# --- inputs


def check_inputs(seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to 40 words, pictures, both, and two pictures at once, some with an instruction.

    The same seed gives the same inputs on every machine, as `PumaProcessor.process_inputs` takes them.

    Example:

    ```python
    >>> from puma_hf.hub.check import check_inputs

    >>> [sorted(one) for one in check_inputs()[:2]]
    [['text'], ['text']]
    ```
    """
    rng = random.Random(seed)
    # How many pictures and words, and which instruction.
    kinds = [(0, 1, ""), (0, 9, ""), (0, 40, ""), (0, 12, _FIND), (0, 5, _ANSWER), (1, 0, ""), (1, 0, _FIND)]
    inputs = []
    for num_pictures, num_words, instruction in (*kinds, (1, 6, ""), (1, 15, _ANSWER), (2, 7, "")):
        pictures, text = [_picture(rng) for _ in range(num_pictures)], " ".join(rng.choices(_WORDS, k=num_words))
        values = {"image": pictures, "text": text, "instruction": instruction}
        inputs.append({name: value for name, value in values.items() if value})
    return inputs


def _picture(rng: random.Random) -> Image.Image:
    """Noise, which no two ways to resize and to normalise treat alike unless they are the same."""
    width, height = rng.randint(56, 168), rng.randint(56, 168)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


# --- comparisons


def compare(
    form: str, to: str, found: Tensor, expected: Tensor, kinds: Sequence[str], *, measure: Measure = "difference"
) -> ParityRow:
    """Compare the embeddings of two forms, `(num_inputs, embedding_dim)`, of inputs whose kinds are told.

    `measure` is "1 - cosine" where weights are rounded to two bytes. Two of other shapes differ without end.
    """
    if found.shape != expected.shape:
        differences, bound = torch.full((len(kinds),), math.inf), 0.0
    elif measure == "difference":
        differences, bound = (found - expected).abs().amax(dim=1), TOLERANCE
    else:  # rounding may make a cosine larger than 1
        differences, bound = (1 - cosine_similarity(found, expected)).clamp(min=0), COSINE_TOLERANCE
    worst = int(differences.argmax())  # of NaN, too
    return ParityRow(form, to, measure, float(differences[worst]), bound, kinds[worst])


def compare_weights(
    form: str, to: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, bound: float
) -> ParityRow:
    """Compare two sets of tensors by name: drawn inputs never reach every row of an embedding."""
    names = found.keys() | expected.keys()
    largest, worst = max((_difference(found.get(name), expected.get(name)), name) for name in names)
    return ParityRow(form, to, "relative difference", largest, bound, worst if largest else "all tensors")


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    """The largest difference of two tensors as a share of the largest number, once one has the other's data type.

    It is infinite if one is missing, of another shape, or not finite.
    """
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    rounded = expected.cpu().to(found.dtype)
    if torch.equal(found, rounded):  # the copies below are large
        return 0.0
    difference = float((found.double() - rounded.double()).abs().max() / rounded.double().abs().max())
    return difference if math.isfinite(difference) else math.inf
