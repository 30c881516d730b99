"""Compare the forms of one model that should give the same embeddings, and tell which do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from puma_hf.checkpoint import StoredWeights, open_checkpoint
from puma_hf.embedding.embed import embed
from puma_hf.export import export, is_export
from puma_hf.files import ADAPTER_CONFIG, is_hub_id, is_puma_directory, named_base, read_config
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.parity.forms import (
    embed_features,
    embed_stock,
    encode,
    features_of,
    open_adapter,
    open_auto_model,
    open_sentence_transformer,
    open_stock,
    release,
    stock_features,
)
from puma_hf.parity.inputs import check_inputs, kind_of
from puma_hf.parity.report import COSINE_TOLERANCE, TOLERANCE, Measure, ParityReport, ParityRow, compare
from puma_hf.parity.weights import compare_weights

logger = logging.getLogger(__name__)

_AUTO_MODEL = "AutoModel"
_SENTENCE_TRANSFORMER = "SentenceTransformer"


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
        FileNotFoundError: If a directory, or the adapter's base, is missing.
        ValueError: If a directory is no PUMA model, `merged` or `base` is given without an adapter, or the adapter
            does not fit its base.

    Example:

    ```python
    >>> from puma_hf.parity.check import check

    >>> check("puma-k14-mac").ok  # doctest: +SKIP
    True
    ```
    """
    adapter = Path(directory) if (Path(directory) / ADAPTER_CONFIG).is_file() else None
    _check_arguments(Path(directory), adapter is not None, merged, base, exported)
    trained_on = None if adapter is None else _base_of(adapter, base)
    inputs = check_inputs(seed)
    with TemporaryDirectory(prefix="puma-hf-") as temporary:
        scratch = Path(temporary)
        folder = Path(directory)
        if adapter is not None:
            folder = _merged(adapter, merged, base, scratch)
        forms = _Forms(folder, scratch, inputs, device)
        rows = [*forms.by_auto_model(), *forms.by_sentence_transformer(), forms.saved_again(), forms.rounded()]
        rows += forms.exported(None if exported is None else Path(exported))
        if adapter is not None and trained_on is not None:
            rows += forms.not_merged(adapter, trained_on)
    report = ParityReport(str(directory), len(inputs), tuple(rows))
    logger.info("Checked %s: %s", directory, "ok" if report.ok else "a form differs")
    return report


@dataclass
class _Forms:
    """The forms of the model in `folder`; each opens what it needs and lets it go, for models are large.

    `by_auto_model` makes the reference that most of the others are compared with, so it comes first.
    """

    folder: Path
    scratch: Path
    inputs: list[dict[str, Any]]
    device: str

    def __post_init__(self) -> None:
        self.kinds = [kind_of(one) for one in self.inputs]
        self.features = features_of(self.folder, self.inputs)
        self.reference = torch.empty(0)

    def row(
        self, form: str, found: Tensor, expected: Tensor | None = None, *, to: str = _AUTO_MODEL, **options: Any
    ) -> ParityRow:
        return compare(form, to, found, self.reference if expected is None else expected, self.kinds, **options)

    def by_auto_model(self) -> Iterator[ParityRow]:
        model = open_auto_model(self.folder, torch.float32, self.device)
        self.reference = embed_features(model, self.features)
        padded = features_of(self.folder, self.inputs, padding_side="right")
        yield self.row("padded on the right", embed_features(model, padded), to="padded on the left")
        single = [embed_features(model, features_of(self.folder, [one])) for one in self.inputs]
        yield self.row("one input at a time", torch.cat(single), to="all in one batch")

    def by_sentence_transformer(self) -> Iterator[ParityRow]:
        model = open_sentence_transformer(self.folder, torch.float32, self.device)
        module: Any = model[0]
        fast = encode(model, self.inputs)
        yield self.row(_SENTENCE_TRANSFORMER, fast)
        found = torch.from_numpy(embed(model, self.inputs, show_progress_bar=False).embeddings)
        yield self.row("puma_hf.embed", found, fast, to=_SENTENCE_TRANSFORMER)
        kept = max(1, self.reference.shape[1] // 2)
        cut = encode(model, self.inputs, truncate_dim=kept, normalize_embeddings=True)
        expected = normalize(self.reference[:, :kept], dim=-1)
        yield self.row(f"truncated to {kept}", cut, expected, to=f"the first {kept} of AutoModel")
        module.fast_path = None
        yield self.row("fast path off", encode(model, self.inputs), fast, to="fast path on")
        release(model)

    def saved_again(self) -> ParityRow:
        """Save and load in the data type that the weights have: not a bit may change."""
        model = open_sentence_transformer(self.folder, "auto", self.device)
        expected = encode(model, self.inputs)
        model.save_pretrained(str(self.scratch / "saved"))
        release(model)
        again = open_sentence_transformer(self.scratch / "saved", "auto", self.device)
        found = encode(again, self.inputs)
        release(again)
        return self.row("saved and loaded again", found, expected, to=_SENTENCE_TRANSFORMER)

    def rounded(self) -> ParityRow:
        model = open_auto_model(self.folder, torch.bfloat16, self.device)
        return self.row("in bfloat16", embed_features(model, self.features), measure="1 - cosine")

    def exported(self, folder: Path | None) -> Iterator[ParityRow]:
        if folder is None and read_config(self.folder).get("positions", "mrope") != "mrope":
            logger.info("%s is not compared with an export: stock classes do not have its positions.", self.folder)
            return
        if folder is None:
            folder = self.scratch / "exported"
            export(self.folder, folder)
        model = open_stock(folder, torch.float32, self.device)
        yield self.row("exported, stock classes", embed_stock(model, self.features))
        yield self.row("exported, stock inputs too", embed_stock(model, stock_features(folder, self.inputs)))
        found, expected = (StoredWeights(open_checkpoint(one)) for one in (folder, self.folder))
        yield compare_weights("exported, weights", "the model", found, expected, bound=0)

    def not_merged(self, adapter: Path, base: str | Path) -> Iterator[ParityRow]:
        model = open_adapter(adapter, base, self.device)
        stored = config_class_of(read_config(self.folder)["model_type"]).from_pretrained(self.folder).dtype
        # A merged model is saved in its base's data type, which may round the adapter's part away.
        measure: Measure = "difference" if stored in (None, torch.float32) else "1 - cosine"
        yield self.row("adapter on its base", embed_features(model, self.features), to="merged", measure=measure)
        # Inputs reach a few rows of the embedding only, and a small error may not show in them.
        bound = TOLERANCE if measure == "difference" else COSINE_TOLERANCE
        merged, found = model.merge_and_unload().state_dict(), StoredWeights(open_checkpoint(self.folder))
        yield compare_weights("merged, weights", "adapter and base", found, merged, bound=bound)


def _check_arguments(
    directory: Path,
    is_adapter: bool,
    merged: str | Path | None,
    base: str | Path | None,
    exported: str | Path | None,
) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(f"directory {str(directory)!r} is not there. Name a PUMA directory, or an adapter's.")
    if not is_adapter and (given := [name for name, one in (("merged", merged), ("base", base)) if one is not None]):
        raise ValueError(
            f"{' and '.join(given)} given, but {str(directory)!r} is no adapter (it has no {ADAPTER_CONFIG}). Leave it "
            "out, or name the adapter's directory."
        )
    for name, one in (("directory", None if is_adapter else directory), ("merged", merged)):
        if one is not None and not is_puma_directory(Path(one)):
            remedy = " It is an export: name the PUMA directory, and this one as --exported." * is_export(Path(one))
            raise ValueError(
                f"{name} {str(one)!r} holds no PUMA model, by its config.json.{remedy or ' Name one that does.'}"
            )
    if exported is not None and not is_export(Path(exported)):
        raise ValueError(f"exported {str(exported)!r} is not what puma-hf export wrote. Name such a directory.")


def _merged(adapter: Path, merged: str | Path | None, base: str | Path | None, scratch: Path) -> Path:
    if merged is not None:
        return Path(merged)
    from puma_hf.trainer.merge import merge_adapter

    merge_adapter(adapter, scratch / "merged", base=base)
    return scratch / "merged"


def _base_of(adapter: Path, base: str | Path | None) -> str | Path:
    if base is None:
        base = named_base(adapter)
    if not (str(base) and Path(base).is_dir()) and not is_hub_id(str(base)):
        raise FileNotFoundError(
            f"The adapter's base {str(base)!r} is not a directory. Name the PUMA directory it was trained on: base=... "
            "(--base)."
        )
    return base
