"""What travels to the Hub: configuration, model, processor, sentence-transformers module; registered here."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_puma import PumaConfig
from .modeling_puma import PumaModel, PumaModelOutput
from .processing_puma import MODALITY_IDS, MODALITY_NAMES, RET_TOKEN, PumaProcessor

AutoConfig.register("puma", PumaConfig, exist_ok=True)
AutoModel.register(PumaConfig, PumaModel, exist_ok=True)
AutoProcessor.register(PumaConfig, PumaProcessor, exist_ok=True)
# save_pretrained then copies the source files beside the weights.
PumaConfig.register_for_auto_class()
PumaModel.register_for_auto_class("AutoModel")
PumaProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "MODALITY_IDS",
    "MODALITY_NAMES",
    "RET_TOKEN",
    "PumaConfig",
    "PumaModel",
    "PumaModelOutput",
    "PumaProcessor",
]
