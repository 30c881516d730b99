"""The parts of a card that are told in words: costs, training, use, and what was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puma_hf.evaluation.published import PUBLISHED
from puma_hf.evaluation.sweep_report import si
from puma_hf.fingerprint import short_name
from puma_hf.hub.card_results import CardResults, MeasuredModel, read_mapping
from puma_hf.hub.card_table import is_mbeir

# What a merge notes in the card, and what this module makes of that: a card is written anew more than once.
_STAGES = re.compile(
    r"^- (A LoRA adapter .*was trained and merged into the weights|Trained with the loss|Distilled without labels)",
    re.MULTILINE,
)
# Shown in the example for use, if the model has it: that of M-BEIR's best known row.
_EXAMPLE_PROMPT = "mbeir_mscoco_task0"
UNTRAINED = "No training after the cut is on record."
_DEFINITION = "Operations are multiplications and additions, each counted as one, without the language-model head's"


def cost_values(model: MeasuredModel, found: CardResults) -> dict[str, Any]:
    """Operations of a text and of an image, before and after the cut: from a sweep, or counted on the model itself.

    Returns:
        `costs`, as (name, after, before), and `costs_note`, which tells where they come from.
    """
    if found.costs:
        source, report, row, full = found.costs[0]
        text: tuple[int, int | None] = (row.flops_text, full.flops_text)
        image: tuple[int, int | None] = (row.flops_image, full.flops_image)
        tokens = (report.text_tokens, report.image_tokens)
        note = f"{_DEFINITION}. Counted by `puma-hf sweep` ({source})."
    else:
        counted = model.costs()
        dropped = model.original_num_hidden_layers - model.num_kept_layers
        text, image = _with_all(counted.flops_text, dropped), _with_all(counted.flops_image, dropped)
        tokens = (counted.text_tokens, counted.image_tokens)
        note = f"{_DEFINITION}. Counted on these weights; a dropped layer costs as much as a kept one."
    rows = [
        (f"operations, text of {tokens[0]} tokens", *map(_flop, text)),
        (f"operations, image of {tokens[1]} visual tokens", *map(_flop, image)),
    ]
    return {"costs": rows, "costs_note": note}


def _with_all(by_depth: tuple[int, ...], dropped: int) -> tuple[int, int | None]:
    """The operations of the model, and with the dropped layers; of one layer alone its share is not known."""
    if dropped and len(by_depth) == 1:
        return by_depth[-1], None
    return by_depth[-1], by_depth[-1] + (dropped * (by_depth[-1] - by_depth[-2]) if dropped else 0)


def _flop(count: int | None) -> str | None:
    return None if count is None else f"{si(count)}FLOP"


def training_section(folder: Path, found: CardResults, *, is_adapter: bool) -> str | None:
    """The stages, from their recipes; where those are missing, how many there were; None of an adapter without one."""
    lines = [_stage(source, recipe) for source, recipe in reversed(found.recipes)]
    card = folder / "README.md"
    merges = len(_STAGES.findall(card.read_text(encoding="utf-8"))) if card.is_file() else 0
    for _ in range(merges - len(lines)):
        lines.insert(0, "- A LoRA adapter was trained and merged into the weights; its recipe is not at hand.")
    if not lines and not is_adapter:
        return UNTRAINED
    return "\n".join(lines) or None


def _stage(source: object, recipe: Mapping[str, Any]) -> str:
    data = short_name(str(recipe["data"])) if recipe.get("data") else "unknown data"
    settings = ["max_steps", "batch_size", "learning_rate", "lora_r", "seed"]
    if recipe.get("loss"):
        what = f"Trained with the loss `{recipe['loss']}`"
        mac = ["hard_temperature", "schedule", "schedule_end", "grouping"] if recipe["loss"] != "infonce" else []
        settings = ["temperature", *mac, "num_negatives", *settings]
        settings += ["matryoshka_dims"]
        if recipe.get("distillation_weight") or recipe.get("distillation_weight_start"):
            what += f" and distillation of weight {recipe['distillation_weight']}, metric `{recipe.get('metric')}`"
            settings = ["contrastive_weight", "contrastive_weight_start", "distillation_weight_start", *settings]
    else:
        teacher = short_name(str(recipe["teacher"])) if recipe.get("teacher") else "the model with all its layers"
        what = f"Distilled without labels; teacher: `{teacher}`, metric `{recipe.get('metric')}`"
    told = ", ".join(f"{name} {recipe[name]}" for name in settings if recipe.get(name) not in (None, []))
    split = f", split {recipe['split']}" if recipe.get("split") else ""
    return f"- {what}, on `{data}`{split}: {told}. From {source}."


def usage_values(folder: Path, found: CardResults, embedding_dim: int | None) -> dict[str, Any]:
    """Instructions, versions, and how many dimensions to keep in the example."""
    file = folder / "config_sentence_transformers.json"
    settings = read_mapping(file) if file.is_file() else {}
    prompts = {name: prompt for name, prompt in (settings.get("prompts") or {}).items() if prompt}
    versions = settings.get("__version__") or {}
    named = {"sentence_transformers": "Sentence Transformers", "transformers": "Transformers"}
    trained = [dims for _, recipe in found.recipes if (dims := recipe.get("matryoshka_dims"))]
    example = prompts.get(_EXAMPLE_PROMPT, next(iter(prompts.values()), None))
    return {
        "instructions": [f"`{name}`: {' '.join(prompt.split())}" for name, prompt in prompts.items()],
        # Quoted for JSON it is quoted for Python, too.
        "example_instruction": None if example is None else json.dumps(example, ensure_ascii=False),
        "versions": " and ".join(f"{named[name]} {versions[name]}" for name in named if name in versions),
        "matryoshka": bool(trained),
        "truncate_dim": min(trained[0]) if trained else (embedding_dim or 0) // 2,
    }


def not_measured(found: CardResults, *, is_counted: bool, is_trained: bool) -> list[str]:
    """What the result files do not hold."""
    rows = [row for _, results in found.evaluations for row in results.rows]
    ours = {row.task.name for _, results in found.evaluations if is_mbeir(results) for row in results.rows}
    absent = [name for name in PUBLISHED if name not in ours]
    lines = []
    if len(absent) == len(PUBLISHED):
        lines.append("M-BEIR: none of its 16 rows.")
    elif absent:
        lines.append(f"Of M-BEIR's 16 rows: {', '.join(absent)}.")
    if rows:
        pools = {row.pool for row in rows}
        lines += [f"The {pool} pools." for pool in ("local", "global") if pool not in pools]
        lines += ["How much the figures would vary with another seed of the training."] if is_trained else []
    if not found.costs and not is_counted:
        lines.append("Operations per text and image.")
    lines.append("Speed and memory, other data types than that of the weights, video.")
    return lines
