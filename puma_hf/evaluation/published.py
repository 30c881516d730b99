"""What papers report on M-BEIR's sixteen rows, to be shown beside one's own figures.

Source: PUMA (ACM MM 2025, arXiv 2507.08064) and LamRA (arXiv 2412.01720): hit@k, which they call Recall@k, in percent,
each task against its own pool, test split. The means of others are those of U-MARVEL (arXiv 2507.14902) and ELVA's
table 1.
"""

from __future__ import annotations

PUBLISHED_MODELS: tuple[str, ...] = ("LamRA-Ret 7B", "LamRA < 4B", "PUMA")

# One row of figures a task, in the order of PUBLISHED_MODELS.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "visualnews_task0": (41.6, 30.8, 35.7),
    "mscoco_task0": (81.5, 78.8, 79.5),
    "fashion200k_task0": (28.7, 25.1, 25.8),
    "webqa_task1": (86.0, 82.5, 86.2),
    "edis_task2": (62.6, 54.3, 58.2),
    "webqa_task2": (81.2, 77.8, 78.4),
    "visualnews_task3": (39.6, 31.2, 35.2),
    "mscoco_task3": (90.6, 88.9, 90.1),
    "fashion200k_task3": (30.4, 27.1, 29.0),
    "nights_task4": (32.1, 28.7, 31.4),
    "oven_task6": (54.1, 51.1, 52.7),
    "infoseek_task6": (52.1, 44.2, 48.3),
    "fashioniq_task7": (33.2, 28.9, 30.6),
    "cirr_task7": (53.1, 47.7, 49.9),
    "oven_task8": (76.2, 72.3, 74.0),
    "infoseek_task8": (63.3, 60.8, 65.2),
}

# Means of the sixteen rows against the local pools and the global one, as printed: the papers average before they
# round. None: not known. A re-ranker reads query and candidate together, so it is no embedder: what it adds is a bound.
PUBLISHED_MEANS: dict[str, tuple[float, float | None]] = {
    "LamRA-Ret 7B": (56.6, 54.9),
    "LamRA < 4B": (51.8, None),
    "PUMA": (54.4, None),
    "CLIP_SF": (50.6, 48.9),
    "PUMA + ELVA's stage": (56.3, None),
    "ELVA-7B": (58.7, None),
    "U-MARVEL 4B (Qwen3-VL)": (58.8, 56.2),
    "U-MARVEL 7B (Qwen2-VL)": (63.2, 60.7),
    "LamRA 7B with re-ranker": (63.7, 61.4),
    "U-MARVEL 7B with re-ranker": (64.8, 61.8),
}


def published_mean(pool: str) -> tuple[float | None, ...]:
    """Means of `PUBLISHED_MODELS` against the local pools or the global one."""
    return tuple(PUBLISHED_MEANS[model][pool == "global"] for model in PUBLISHED_MODELS)


PUBLISHED_NOTE = (
    f"{', '.join(PUBLISHED_MODELS)}: hit@k as published (PUMA, ACM MM 2025, arXiv 2507.08064; LamRA, arXiv 2412.01720) "
    "for the local pools of the test split; not measured here. Published means of all sixteen rows, local / global: "
    + ", ".join(f"{name} {local} / {everywhere or '?'}" for name, (local, everywhere) in PUBLISHED_MEANS.items())
    + " (U-MARVEL, arXiv 2507.14902; ELVA; ?: not known)."
)
