"""What travels to the Hub: configurations, models, processors, sentence-transformers module; registered here."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_puma import PumaConfig, PumaQwen3VLConfig, PumaQwen25VLConfig, PumaQwen35Config
from .inputs_puma import MODALITY_IDS, MODALITY_NAMES
from .modeling_puma import (
    MODEL_CLASSES,
    PumaModel,
    PumaModelOutput,
    PumaQwen3VLModel,
    PumaQwen25VLModel,
    PumaQwen35Model,
)
from .processing_puma import PumaImageTextProcessor, PumaProcessor
from .readings_puma import RET_TOKEN

for _config, _model in MODEL_CLASSES.items():
    _processor = PumaProcessor if _config.takes_video else PumaImageTextProcessor
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)
    # save_pretrained then copies the source files beside the weights.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _processor.register_for_auto_class("AutoProcessor")

__all__ = [
    "MODALITY_IDS", "MODALITY_NAMES", "RET_TOKEN", "PumaConfig", "PumaImageTextProcessor", "PumaModel",
    "PumaModelOutput", "PumaProcessor", "PumaQwen3VLConfig", "PumaQwen3VLModel", "PumaQwen25VLConfig",
    "PumaQwen25VLModel", "PumaQwen35Config", "PumaQwen35Model",
]  # fmt: skip
