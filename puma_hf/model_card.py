"""The template of a model card, `hub_card.md`, and the first card of a directory, which `puma-hf prune` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from puma_hf.files import is_hub_id
from puma_hf.modeling import PumaConfig
from puma_hf.modeling.configuration_puma import named_layers

_TEMPLATE = Path(__file__).with_name("hub_card.md")  # where a wheel has it
if not _TEMPLATE.is_file():
    _TEMPLATE = Path(__file__).parents[1] / "hub_card.md"  # at the root of the repository, as in an editable install
TAGS = ("puma", "multimodal-retrieval", "layer-pruning", "sentence-transformers", "transformers", "custom_code")


def write_model_card(folder: Path, config: PumaConfig, facts: Mapping[str, Any]) -> None:
    """Write the `README.md` of a PUMA directory; `facts` is what `PruneReport.to_dict()` has."""
    source = config.source_name_or_path
    card_data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        # A path of this machine is nobody else's business.
        base_model=source if source and is_hub_id(source) else None,
        tags=list(TAGS),
    )
    text_config: Any = config.text_config
    values = {key: value for key, value in facts.items() if key not in ("source", "output_dir")}
    content = fill_template(card_data, source=source, embedding_dim=text_config.hidden_size, **values)
    (folder / "README.md").write_text(content, encoding="utf-8")


def fill_template(card_data: ModelCardData, **values: Any) -> str:
    """The text of a card with its metadata; values that are left out, or None, leave no trace in it."""
    kept, total = values.get("num_kept_layers"), values.get("original_num_hidden_layers")
    if kept and total:
        layers = values.get("kept_layers") or range(kept)
        others = [layer for layer in range(total) if layer not in layers]
        values |= {"kept": named_layers(layers), "dropped": named_layers(others) if others else None}
    return str(ModelCard.from_template(card_data, template_path=str(_TEMPLATE), **values))


def with_training_note(card: str, note: str) -> str:
    """A card with one more line in its section "Training", which is made if need be.

    Example:

    ```python
    >>> from puma_hf.model_card import with_training_note

    >>> card = with_training_note("# Model\\n\\n## Use\\n", "distilled")
    >>> with_training_note(card, "trained on pairs").splitlines()
    ['# Model', '', '## Training', '', '- distilled', '- trained on pairs', '', '## Use']
    ```
    """
    head, use, rest = card.partition("\n\n## Use\n")
    title = "" if "\n## Training\n" in head else "\n\n## Training\n"
    return f"{head}{title}\n- {note}{use}{rest}"
