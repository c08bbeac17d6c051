"""BlueLM-2.5 for TensorRT-LLM's PyTorch backend; importing this package registers the model."""

from .modeling_bluelm_trtllm import BlueLMVLModel
from .processing_bluelm_trtllm import BlueLMVLInputProcessor

__all__ = ["BlueLMVLInputProcessor", "BlueLMVLModel"]
