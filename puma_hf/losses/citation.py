"""The paper that the losses implement, as sentence-transformers' model card wants it."""

from __future__ import annotations

PUMA_CITATION = """
@inproceedings{lyu2025puma,
    title={PUMA: Layer-Pruned Language Model for Efficient Unified Multimodal Retrieval with
           Modality-Adaptive Learning},
    author={Lyu, Yibo and Shao, Rui and Chen, Gongwei and Zhu, Yijie and Guan, Weili and Nie, Liqiang},
    booktitle={Proceedings of the 33rd ACM International Conference on Multimedia},
    pages={7653--7662},
    year={2025},
    eprint={2507.08064},
    archivePrefix={arXiv},
    url={https://arxiv.org/abs/2507.08064},
}
"""
