"""M-BEIR's task instructions as named prompts: the first of the four wordings of each of the 16 test rows.

They are the benchmark's own data, kept word for word so that results can be compared: M-BEIR's
`instructions/query_instructions.tsv` (TIGER-Lab/M-BEIR; UniIR, Wei et al., ECCV 2024, arXiv 2311.17136).  The
wordings and their order are those of Pyserini's default M-BEIR instructions; LamRA's appendix (Liu et al., CVPR
2025, arXiv 2412.01720, Table 12) and the query prompts of MTEB's tasks agree where they were compared.

A name is `mbeir_<dataset>_task<n>`, the stem of the row's file names.  When a dataset folder is at hand,
`puma_hf.data.mbeir.MBEIR.instruction` reads the folder's own table instead; this one is for a model's saved
prompts.
"""

from __future__ import annotations

_WIKIPEDIA_PARAGRAPH = "Retrieve a Wikipedia paragraph that provides an answer to the given query about the image."
_WIKIPEDIA_PAIR = "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image."

MBEIR_INSTRUCTIONS: dict[str, str] = {
    "mbeir_visualnews_task0": "Identify the news-related image in line with the described event.",
    "mbeir_mscoco_task0": "Find me an everyday image that matches the given caption.",
    "mbeir_fashion200k_task0": ("Based on the following fashion description, retrieve the best matching image."),
    "mbeir_webqa_task1": "Retrieve passages from Wikipedia that provide answers to the following question.",
    "mbeir_edis_task2": "Find a news image that matches the provided caption.",
    "mbeir_webqa_task2": "Find a Wikipedia image that answers this question.",
    "mbeir_visualnews_task3": "Find a caption for the news in the given photo.",
    "mbeir_mscoco_task3": "Find an image caption describing the following everyday image.",
    "mbeir_fashion200k_task3": "Find a product description for the fashion item in the image.",
    "mbeir_nights_task4": "Find a day-to-day image that looks similar to the provided image.",
    "mbeir_oven_task6": _WIKIPEDIA_PARAGRAPH,
    "mbeir_infoseek_task6": _WIKIPEDIA_PARAGRAPH,
    "mbeir_fashioniq_task7": "Find a fashion image that aligns with the reference image and style note.",
    "mbeir_cirr_task7": (
        "Retrieve a day-to-day image that aligns with the modification instructions of the provided image."
    ),
    "mbeir_oven_task8": _WIKIPEDIA_PAIR,
    "mbeir_infoseek_task8": _WIKIPEDIA_PAIR,
}
